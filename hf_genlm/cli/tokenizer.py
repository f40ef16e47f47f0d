"""`hf-genlm tokenizer`."""

import argparse
from pathlib import Path

from hf_genlm.cli.arguments import LANGUAGE_FIELDS, VOCABULARY_FIELD
from hf_genlm.cli.display import Display, table
from hf_genlm.cli.recipes import recipe_of
from hf_genlm.errors import UserError


def run(options: argparse.Namespace) -> None:
    recipe = recipe_of(options, VOCABULARY_FIELD | LANGUAGE_FIELDS)
    if not recipe.corpus.sources and not recipe.corpus.languages:
        raise UserError("there is no text: name a SOURCE, or several by language with --source CODE=SOURCE")
    out = Path(options.out)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {options.out!r} already holds files: name a new folder, or remove it")
    from hf_genlm.evaluation.measurement import write_measurements
    from hf_genlm.text.balanced import balanced_text
    from hf_genlm.text.corpus import notes_on, read_documents
    from hf_genlm.text.encoding import encode_documents
    from hf_genlm.text.languages import check_languages
    from hf_genlm.text.tokenizer import train_tokenizer
    from hf_genlm.training.languages import tokenization_of

    check_languages(recipe.corpus)
    measured = []

    with Display() as display:
        display.show("reading")
        documents, report = read_documents(recipe.corpus.languages or recipe.corpus.sources, recipe.corpus)
        languages = report.get("languages", {})
        display.note(notes_on(report))
        n_bytes = int(documents.n_bytes.sum())
        display.show("training the tokenizer")
        tokenizer = train_tokenizer(balanced_text(documents, languages), recipe.tokenizer, n_bytes)
        try:
            tokenizer.save_pretrained(out)
        except OSError as error:
            raise UserError(f"--out {options.out!r} cannot be written ({error.strerror})") from error
        if languages or recipe.corpus.parallel:
            display.show("measuring languages")
            measured = tokenization_of(tokenizer, documents, languages, recipe.corpus, "train")
            write_measurements(out / "languages.json", measured)
        n_tokens = encode_documents(tokenizer, documents).n_tokens
    print(
        f"{len(tokenizer):,} tokens in the vocabulary; "
        f"{n_bytes / n_tokens:.3f} bytes per token on {n_bytes:,} bytes"
    )
    if measured:
        print(table(measured))
    print(f"tokenizer: {out}")
