"""`hf-genlm tokenizer`."""

import argparse
from pathlib import Path

from hf_genlm.arguments import VOCABULARY_FIELD
from hf_genlm.display import Display
from hf_genlm.errors import UserError
from hf_genlm.verbs.recipes import recipe_of


def run(options: argparse.Namespace) -> None:
    recipe = recipe_of(options, VOCABULARY_FIELD)
    out = Path(options.out)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {options.out!r} already holds files: name a new folder, or remove it")
    from hf_genlm.text.corpus import notes_on, read_documents
    from hf_genlm.text.encoding import encode_documents
    from hf_genlm.text.tokenizer import train_tokenizer

    with Display() as display:
        display.show("reading")
        documents, report = read_documents(recipe.corpus.sources, recipe.corpus)
        display.note(notes_on(report))
        n_bytes = int(documents.n_bytes.sum())
        display.show("training the tokenizer")
        tokenizer = train_tokenizer(documents, recipe.tokenizer, n_bytes)
        try:
            tokenizer.save_pretrained(out)
        except OSError as error:
            raise UserError(f"--out {options.out!r} cannot be written ({error.strerror})") from error
        n_tokens = encode_documents(tokenizer, documents).n_tokens
    print(
        f"{len(tokenizer):,} tokens in the vocabulary; "
        f"{n_bytes / n_tokens:.3f} bytes per token on {n_bytes:,} bytes"
    )
    print(f"tokenizer: {out}")
