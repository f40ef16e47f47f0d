"""`hf-genlm tokenizer`: train a byte-level BPE tokenizer."""

import argparse

from hf_genlm.cli.arguments import LANGUAGE_FIELDS, VOCABULARY_FIELD
from hf_genlm.cli.display import Display, table
from hf_genlm.cli.recipes import recipe_of


def run(options: argparse.Namespace) -> None:
    recipe = recipe_of(options, VOCABULARY_FIELD | LANGUAGE_FIELDS)
    from hf_genlm.evaluation.languages import measure_corpus_tokenization
    from hf_genlm.evaluation.measurement import write_measurements
    from hf_genlm.text.languages import check_languages
    from hf_genlm.text.tokenizer import train_tokenizer_on

    corpus = recipe.corpus
    check_languages(corpus)
    with Display() as display:
        found = train_tokenizer_on(
            corpus.languages or corpus.sources,
            out=options.out,
            tokenizer=recipe.tokenizer,
            corpus=corpus,
            listener=display.hear,
        )
        measured = []
        if found.languages or corpus.parallel:
            display.show("measuring languages")
            measured = measure_corpus_tokenization(
                found.tokenizer, found.documents, found.languages, corpus, "train"
            )
            write_measurements(found.path / "languages.json", measured)
    print(
        f"{len(found.tokenizer):,} tokens in the vocabulary; "
        f"{found.n_bytes / found.n_tokens:.3f} bytes per token on {found.n_bytes:,} bytes"
    )
    if measured:
        print(table(measured))
    print(f"tokenizer: {found.path}")
