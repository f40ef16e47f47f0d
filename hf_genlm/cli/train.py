"""The verbs that train: `hf-genlm train` (in one process or several), `tokenizer` and `extend`."""

import os
import shlex
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from hf_genlm.cli import options as o
from hf_genlm.cli.display import LOADING, Display, print_json, print_measurements, say
from hf_genlm.cli.launch import (
    check_processes,
    complain,
    end_with_launcher,
    is_first,
    is_launched,
    launch,
    package_command,
    use_one_gpu,
)
from hf_genlm.errors import UserError
from hf_genlm.run_folder import is_watched

if TYPE_CHECKING:
    from hf_genlm.config.recipe import Recipe


@o.verb("train", "Train", "hf-genlm train my-texts/ --decoder lstm --minutes 10 --out lstm-10")
def train(
    ctx: typer.Context,
    sources: list[str] | None = o.SOURCES,
    languages: list[str] | None = o.LANGUAGES,
    parallel: list[str] | None = o.PARALLEL,
    validation: list[str] | None = o.text_option(
        "--validation FILE", "Hold out this text, instead of a part."
    ),
    stream: bool = o.text_option(
        "--stream", "Read the text while training and keep none of it: for text larger than memory and disk."
    ),
    scrub: bool = o.text_option(
        "--scrub",
        "Replace e-mail and IP addresses, phone, card and account numbers and keys by placeholders.",
    ),
    near_duplicates: str | None = o.text_option(
        "--near-duplicates F",
        "Leave out training documents that share this part of their 5-word runs with another, such as 0.8.",
    ),
    decoder: str | None = o.DECODER,
    mixers: str | None = o.MIXERS,
    size: str | None = o.SIZE,
    vectors: str | None = o.VECTORS,
    vocab_size: str | None = o.VOCAB_SIZE,
    init_from: str | None = o.model_option("--from MODEL", "Continue from a run or model folder."),
    minutes: str | None = o.training_option("--minutes F", "Time of training.", shown="3"),
    steps: str | None = o.training_option("--steps N", "Number of optimizer steps, instead of a time."),
    tokens: str | None = o.training_option("--tokens N", "Number of training tokens, instead of a time."),
    seed: str | None = o.training_option("--seed N", "Of the weights and the order of rows.", shown="0"),
    processes: int | None = o.training_option(
        "--processes N",
        "Number of processes; each takes a GPU where there are any.",
        shown="1",
        parse=o.parse_count,
    ),
    epsilon: str | None = o.privacy_option(
        "--epsilon E", "Train with differential privacy for each document."
    ),
    delta: str | None = o.privacy_option(
        "--delta D", "Probability that this guarantee fails.", shown="n^-1.1 of n documents"
    ),
    canaries: str | None = o.privacy_option(
        "--canaries N,N,..",
        "Plant random secrets in the text, each so many times, such as 1,4,16,32: for audit.",
    ),
    output_dir: str | None = o.run_option("--out DIR", "The run folder to make.", shown="runs/DECODER-DATE"),
    resume: bool = o.run_option("--resume", "Continue the run in --out from its last checkpoint."),
    as_json: bool = o.JSON,
    recipe: str | None = o.RECIPE,
    assignments: list[str] | None = o.ASSIGNMENTS,
) -> int:
    """Train a tokenizer and a model, measure the model, and write a run folder.

    Without SOURCE it trains on the library source that Python brings.
    """
    stated = o.stated_recipe(ctx.params)
    if resume and not output_dir:
        raise UserError("--resume continues a run: name its folder by --out DIR")
    decoder_name = "mixed" if stated.model.mixers else stated.model.decoder
    output_dir = output_dir or f"runs/{decoder_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_processes(processes)
    if is_launched():
        return _train_as_one_of_several(stated, output_dir, resume, as_json)
    if processes == 1:
        use_one_gpu()
    elif processes is not None:
        return _launch_several(ctx.meta[o.WORDS], output_dir, processes)
    _train_and_print(stated, output_dir, resume, as_json)
    return 0


def _launch_several(words: list[str], output_dir: str, processes: int) -> int:
    """Run the same command in several processes; returns the exit code."""
    from hf_genlm.run_folder import RunFolder

    try:
        code, message = launch([*package_command(), *words, "--out", output_dir], processes)
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    if code > 128 and RunFolder(output_dir).has_stopped():  # the first process has printed how to continue
        return 0
    if message is not None:
        complain(message)
    return code


def _train_as_one_of_several(recipe: "Recipe", output_dir: str, resume: bool, as_json: bool) -> int:
    from hf_genlm.api import run_training
    from hf_genlm.training.processes import LostProcess, detect_lost_process, leave

    end_with_launcher()
    if not is_watched():
        n = int(os.environ["WORLD_SIZE"])
        say(f"waiting for {n - 1} more processes: WORLD_SIZE={n}; for one process, unset it", is_error=True)
    try:
        with detect_lost_process():
            if is_first():
                _train_and_print(recipe, output_dir, resume, as_json)
            else:
                run_training(recipe, output_dir, resume)
            leave()
    except LostProcess:
        return 1  # the launcher names the process that was lost
    return 0


def _train_and_print(recipe: "Recipe", output_dir: str, resume: bool, as_json: bool) -> None:
    from hf_genlm.api import run_training
    from hf_genlm.evaluation.measurement import read_measurements
    from hf_genlm.files import read, read_json
    from hf_genlm.report.curves import CURVES_FILE
    from hf_genlm.run_schemas import CorpusFile

    with Display(LOADING) as display:
        run = run_training(recipe, output_dir, resume, display.hear)
    folder = run.folder
    measured = read_measurements(folder.evaluation)
    guarantee = read_json(folder.privacy) if folder.privacy.is_file() else None
    made = {
        "model": folder.model,
        "card": folder.model / "README.md",
        "curves": folder.path / CURVES_FILE,
        "samples": folder.samples,
    }
    paths = {name: str(path) for name, path in made.items() if path.exists()}
    if as_json:
        measurements = [m.to_json() for m in measured]
        print_json({"run": str(run.path), **paths, "privacy": guarantee, "measurements": measurements})
        return
    print_measurements(measured)
    say("", *(f"{name + ':':<9} {path}" for name, path in paths.items()))
    if guarantee is not None:
        say(
            f"privacy:  epsilon {guarantee['epsilon']:g}, delta {guarantee['delta']:g}, "
            f"for {guarantee['unit']}"
        )
    quoted = shlex.quote(str(run.path))
    verb = "chat" if read(folder.corpus, CorpusFile).chats else "generate"
    say(
        "", f"hf-genlm {verb} {quoted}", f"hf-genlm evaluate {quoted} FILE",
        f"hf-genlm push {quoted} OWNER/NAME --dry-run", "", "from transformers import AutoModelForCausalLM",
        "import hf_genlm", f'model = AutoModelForCausalLM.from_pretrained("{folder.model.as_posix()}")',
    )  # fmt: skip


@o.verb("tokenizer", "Train", "hf-genlm tokenizer my-texts/ --vocab-size 8000 --out my-tokenizer")
def tokenizer(
    ctx: typer.Context,
    output_dir: str = o.option("--out DIR", "The folder to make.", ...),
    sources: list[str] | None = o.SOURCES,
    languages: list[str] | None = o.LANGUAGES,
    parallel: list[str] | None = o.PARALLEL,
    vocab_size: str | None = o.VOCAB_SIZE,
    as_json: bool = o.JSON,
    recipe: str | None = o.RECIPE,
    assignments: list[str] | None = o.ASSIGNMENTS,
) -> None:
    """Train a byte-level BPE tokenizer."""
    stated = o.stated_recipe(ctx.params)
    from hf_genlm.api import tokenizer as train_tokenizer

    with Display() as display:
        found = train_tokenizer(recipe=stated, output_dir=output_dir, listener=display.hear, progress=False)
    trained = found.trained
    if as_json:
        print_json(
            {
                "tokenizer": str(trained.path),
                "vocab_size": len(trained.tokenizer),
                "bytes": trained.n_bytes,
                "tokens": trained.n_tokens,
                "measurements": [m.to_json() for m in found.measurements],
            }
        )
        return
    say(
        f"{len(trained.tokenizer):,} tokens in the vocabulary; "
        f"{trained.n_bytes / trained.n_tokens:.3f} bytes per token on {trained.n_bytes:,} bytes"
    )
    if found.measurements:
        print_measurements(found.measurements)
    say(f"tokenizer: {trained.path}")


@o.verb("extend", "Train", "hf-genlm extend my-model --source swh=texts/ --vocab-size +500 --out extended")
def extend(
    ctx: typer.Context,
    model: str = o.MODEL,
    n_new_tokens: str = o.option("--vocab-size +N", "Number of tokens to add.", ...),
    output_dir: str = o.option("--out DIR", "The model folder to make.", ...),
    sources: list[str] | None = o.SOURCES,
    languages: list[str] | None = o.LANGUAGES,
    keep: list[str] | None = o.option("--keep SOURCE", "Text whose token ids must not change."),
    as_json: bool = o.JSON,
    recipe: str | None = o.RECIPE,
    assignments: list[str] | None = o.ASSIGNMENTS,
) -> None:
    """Add tokens for another language to a trained model."""
    if not n_new_tokens.startswith("+") or not n_new_tokens[1:].isdecimal() or int(n_new_tokens) < 1:
        raise UserError(f"--vocab-size {n_new_tokens!r}: give the number of tokens to add, such as +1000")
    corpus = o.stated_recipe(ctx.params).corpus
    from hf_genlm.text.languages import check_languages

    check_languages(corpus)
    with Display(LOADING) as display:
        from hf_genlm.extension import extend as extend_model

        found = extend_model(
            model, corpus.languages or corpus.sources, n_new_tokens=int(n_new_tokens), out=output_dir,
            keep=keep or (), corpus=corpus, listener=display.hear,
        )  # fmt: skip
    if as_json:
        print_json({**asdict(found), "path": str(found.path)})
        return
    say(
        f"{found.n_tokens:,} tokens in the vocabulary, {found.n_new_tokens:,} of them new; on "
        f"{found.n_bytes:,} bytes {found.bytes_per_token_before:.3f} bytes per token before, "
        f"{found.bytes_per_token:.3f} now",
        f"model: {found.path}",
        "",
        f"hf-genlm train --from {found.path} SOURCE ...  # trains it further",
    )
