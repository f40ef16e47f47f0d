"""`hf-genlm extend`: a trained model with tokens for another language, to be trained further."""

import argparse

from hf_genlm.cli.arguments import SOURCE_FIELD
from hf_genlm.cli.display import Display
from hf_genlm.cli.recipes import recipe_of
from hf_genlm.errors import UserError
from hf_genlm.text.languages import check_languages


def run(options: argparse.Namespace) -> None:
    corpus = recipe_of(options, SOURCE_FIELD).corpus
    word = options.vocab_size
    if not word.startswith("+") or not word[1:].isdecimal() or int(word) < 1:
        raise UserError(f"--vocab-size {word!r}: say how many tokens to add, as +1000")
    check_languages(corpus)
    with Display() as display:
        display.show("loading torch and transformers")
        from hf_genlm.extension import extend

        found = extend(
            options.model,
            corpus.languages or corpus.sources,
            n_new_tokens=int(word),
            out=options.out,
            keep=options.keep or (),
            corpus=corpus,
            listener=display.hear,
        )
    print(
        f"{found.n_tokens:,} tokens in the vocabulary, {found.n_new_tokens:,} of them new; on "
        f"{found.n_bytes:,} bytes {found.bytes_per_token_before:.3f} bytes per token before, "
        f"{found.bytes_per_token:.3f} now"
    )
    print(f"model: {found.path}\n\nhf-genlm train --from {found.path} SOURCE ...  # trains it further")
