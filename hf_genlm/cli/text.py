"""The verbs that make vocabularies: `hf-genlm tokenizer` and `hf-genlm extend`."""

import typer

from hf_genlm.cli import options as o
from hf_genlm.cli.display import Display, print_measurements
from hf_genlm.errors import UserError


@o.verb("tokenizer", "Train", "hf-genlm tokenizer my-texts/ --vocab-size 8000 --out my-tokenizer")
def tokenizer(
    ctx: typer.Context,
    output_dir: str = o.option("--out DIR", "The folder to make.", ...),
    sources: list[str] | None = o.SOURCES,
    languages: list[str] | None = o.LANGUAGES,
    parallel: list[str] | None = o.PARALLEL,
    vocab_size: str | None = o.VOCAB_SIZE,
    recipe: str | None = o.RECIPE,
    assignments: list[str] | None = o.ASSIGNMENTS,
) -> None:
    """Train a byte-level BPE tokenizer."""
    stated = o.stated_recipe(ctx.params)
    from hf_genlm.api import tokenizer as train_tokenizer

    with Display() as display:
        found = train_tokenizer(recipe=stated, output_dir=output_dir, listener=display.hear, progress=False)
    trained = found.trained
    print(
        f"{len(trained.tokenizer):,} tokens in the vocabulary; "
        f"{trained.n_bytes / trained.n_tokens:.3f} bytes per token on {trained.n_bytes:,} bytes"
    )
    if found.measurements:
        print_measurements(found.measurements)
    print(f"tokenizer: {trained.path}")


@o.verb("extend", "Train", "hf-genlm extend my-model --source swh=texts/ --vocab-size +500 --out extended")
def extend(
    ctx: typer.Context,
    model: str = o.MODEL,
    n_new_tokens: str = o.option("--vocab-size +N", "Number of tokens to add.", ...),
    output_dir: str = o.option("--out DIR", "The model folder to make.", ...),
    sources: list[str] | None = o.SOURCES,
    languages: list[str] | None = o.LANGUAGES,
    keep: list[str] | None = o.option("--keep SOURCE", "Text whose token ids must not change."),
    recipe: str | None = o.RECIPE,
    assignments: list[str] | None = o.ASSIGNMENTS,
) -> None:
    """Add tokens for another language to a trained model."""
    if not n_new_tokens.startswith("+") or not n_new_tokens[1:].isdecimal() or int(n_new_tokens) < 1:
        raise UserError(f"--vocab-size {n_new_tokens!r}: give the number of tokens to add, such as +1000")
    corpus = o.stated_recipe(ctx.params).corpus
    from hf_genlm.text.languages import check_languages

    check_languages(corpus)
    with Display() as display:
        display.show("loading torch and transformers")
        from hf_genlm.extension import extend as extend_model

        found = extend_model(
            model,
            corpus.languages or corpus.sources,
            n_new_tokens=int(n_new_tokens),
            out=output_dir,
            keep=keep or (),
            corpus=corpus,
            listener=display.hear,
        )
    print(
        f"{found.n_tokens:,} tokens in the vocabulary, {found.n_new_tokens:,} of them new; on "
        f"{found.n_bytes:,} bytes {found.bytes_per_token_before:.3f} bytes per token before, "
        f"{found.bytes_per_token:.3f} now"
    )
    print(f"model: {found.path}\n\nhf-genlm train --from {found.path} SOURCE ...  # trains it further")
