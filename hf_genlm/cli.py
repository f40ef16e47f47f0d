"""The command line: reads arguments, calls the rooms, and is the only module that prints.

    hf-genlm train [SOURCE ...]          hf-genlm generate MODEL [PROMPT]    hf-genlm card RUN
    hf-genlm tokenizer SOURCE ...        hf-genlm serve MODEL
    hf-genlm evaluate MODEL [SOURCE ...] hf-genlm chat MODEL             hf-genlm doctor

Exit codes: 0 done; 2 the input cannot be used, one line on stderr says why; 1 a fault of ours, with a
traceback.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_genlm.arguments import MODEL_FIELDS, TRAIN_FIELDS, VOCABULARY_FIELD, build_parser
from hf_genlm.display import Display, installation_lines, model_cost_lines, table
from hf_genlm.errors import Stopped, UserError, without_secrets
from hf_genlm.launch import check_processes, is_first, is_launched, launch, use_one_gpu
from hf_genlm.recipe import Recipe, load_recipe, set_field

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_genlm.evaluation.measurement import Measurement
    from hf_genlm.text.corpus import Document


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    try:
        options = build_parser().parse_args(arguments)
        _quiet_libraries()
        options.arguments = sys.argv[1:] if arguments is None else list(arguments)
        return _VERBS[options.verb](options) or 0
    except UserError as error:
        _complain(str(error))
        return 2
    except Stopped as stopped:
        if is_first():
            _say_how_to_go_on(stopped)
        return 0
    except KeyboardInterrupt:
        if not is_launched():  # else the launcher says it
            _complain("stopped")
        return 130


def _say_how_to_go_on(stopped: Stopped) -> None:
    reached = "before its first checkpoint" if stopped.step is None else f"after step {stopped.step:,}"
    print(f"stopped {reached}; to go on:", file=sys.stderr)
    print(f"hf-genlm train --resume --out {stopped.folder}", file=sys.stderr)


def _complain(message: str) -> None:
    """Once, whatever the number of processes."""
    if is_first():
        print(f"hf-genlm: {message}", file=sys.stderr)


def _recipe(options: argparse.Namespace, fields: dict[str, str]) -> Recipe:
    recipe = load_recipe(options.recipe, options.assignments)
    for option, name in fields.items():
        value = getattr(options, option, None)
        if value is not None:
            set_field(recipe, name, value)
    if getattr(options, "sources", None):
        set_field(recipe, "corpus.sources", list(options.sources))
    return recipe


def _quiet_libraries() -> None:
    """Our own bars and messages instead of those of the libraries underneath."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers")


def _train(options: argparse.Namespace) -> int:
    recipe = _recipe(options, TRAIN_FIELDS)
    if options.resume and not options.out:
        raise UserError("--resume goes on with a run: name its folder by --out DIR")
    out = (
        options.out
        or f"runs/{'mixed' if recipe.model.mixers else recipe.model.decoder}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    check_processes(options.processes)
    if is_launched():
        return _train_as_one_of_several(recipe, out, options.resume)
    if options.processes == 1:
        use_one_gpu()
    elif options.processes is not None:
        return _train_by_several(options, out)
    _train_and_tell(recipe, out, options.resume)
    return 0


def _train_by_several(options: argparse.Namespace, out: str) -> int:
    from hf_genlm.run_folder import RunFolder

    try:
        code, message = launch(["-m", "hf_genlm", *options.arguments, "--out", out], options.processes)
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    if code > 128 and RunFolder(out).has_stopped():  # the first process has said how to go on
        return 0
    if message is not None:
        _complain(message)
    return code


def _train_as_one_of_several(recipe: Recipe, out: str, resume: bool) -> int:
    from hf_genlm.training.processes import LostProcess, leave, noticing_losses

    try:
        with noticing_losses():
            if is_first():
                _train_and_tell(recipe, out, resume)
            else:
                from hf_genlm.training.train import train

                train(recipe, out, resume=resume)
            leave()
    except LostProcess:
        return 1  # the launcher says which one it was
    return 0


def _train_and_tell(recipe: Recipe, out: str, resume: bool) -> None:
    from hf_genlm.evaluation.measurement import read_measurements

    with Display() as display:
        display.show("loading torch and transformers")
        from hf_genlm.publish.card import write_card
        from hf_genlm.training.train import train

        run = train(recipe, out, display.hear, resume)
        write_card(run)
    print(table(read_measurements(run.evaluation)))
    print(f"\nmodel:  {run.model}\ncard:   {run.model / 'README.md'}\n")
    print(f"hf-genlm generate {run.path}\n")
    print("from transformers import AutoModelForCausalLM\nimport hf_genlm")
    print(f'model = AutoModelForCausalLM.from_pretrained("{run.model.as_posix()}")')


def _tokenizer(options: argparse.Namespace) -> None:
    recipe = _recipe(options, VOCABULARY_FIELD)
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


def _evaluate(options: argparse.Namespace) -> None:
    from hf_genlm.evaluation.measurement import write_measurements
    from hf_genlm.run_folder import RunFolder

    is_run = (Path(options.model) / "recipe.yaml").is_file()
    if not is_run and not options.sources:
        raise UserError(f"{options.model!r} is not a run folder: name the SOURCE to measure it on")
    run = RunFolder.open(options.model) if is_run else None
    recipe = load_recipe(run.recipe, options.assignments) if run else _recipe(options, {})
    with Display() as display:
        display.show("loading torch and transformers")
        from hf_genlm.text.corpus import notes_on, read_corpus, read_documents
        from hf_genlm.text.held_out import read_stream

        if options.sources:
            split = "given"
            set_field(recipe, "corpus.sources", list(options.sources))  # names what may not be in it
            documents, report = read_documents(options.sources, recipe.corpus)
        else:
            split = "validation"
            corpus = (read_stream if recipe.corpus.stream else read_corpus)(recipe.corpus)
            documents, report = corpus.validation, corpus.report
            _check_same_text(run, report)
        display.note(notes_on(report))
        model, tokenizer = _load(options.model)
        measurements = _measure(model, tokenizer, documents, recipe, split, display)
    if run and not options.sources and not options.assignments:
        write_measurements(run.evaluation, measurements)
    if options.json:
        print(json.dumps({"measurements": [m.to_json() for m in measurements]}, indent=2))
    else:
        print(table(measurements))


def _measure(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: "Sequence[Document]",
    recipe: Recipe,
    split: str,
    display: Display,
) -> list["Measurement"]:
    from hf_genlm.evaluation.likelihood import measure_likelihood
    from hf_genlm.text.encoding import encode_documents

    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start_id is None:
        raise UserError("this tokenizer has neither a bos nor an eos token: a first token cannot be scored")
    limit = getattr(model.config, "max_position_embeddings", None) or 1024
    return measure_likelihood(
        model,
        encode_documents(tokenizer, documents),
        start_id=start_id,
        context=recipe.evaluation.context or limit,
        stride=recipe.evaluation.stride,
        batch_size=recipe.evaluation.batch_size,
        carry_state=bool(recipe.evaluation.carry_state),
        split=split,
        on_progress=lambda done, total: display.hear(
            "progress", {"task": "evaluation", "done": done, "total": total}
        ),
    )


def _check_same_text(run: Any, report: dict[str, Any]) -> None:
    from hf_genlm.run_folder import read_json

    if read_json(run.corpus)["validation"]["sha256"] != report["validation"]["sha256"]:
        raise UserError(
            f"the sources of {str(run.path)!r} have changed since it was trained: name the text to measure on"
        )


def _load(name: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Model and tokenizer of a run folder, a model folder or a Hub id; no code from there is executed."""
    source = _source_of(name)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_genlm.model  # noqa: F401  registers the Auto classes

    try:
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged folder raises anything, from KeyError to the Rust libraries' own
        reason = without_secrets(" ".join(str(error).split()))[:500] or type(error).__name__
        raise UserError(f"cannot load {name!r}: {reason}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _source_of(name: str) -> str:
    """The model folder of a run, or the model folder or Hub id itself."""
    path = Path(name)
    source = str(path / "model") if (path / "model" / "config.json").is_file() else name
    if path.exists() and not (Path(source) / "config.json").is_file():
        raise UserError(f"{name!r} holds no model: neither it nor its model/ has a config.json")
    if path.exists() and not any(Path(source).glob("*.safetensors")):
        raise UserError(
            f"{name!r} has no weights in model.safetensors, and no others are read, since a pickle can run "
            "code: load the model where you trust it, and save_pretrained it again"
        )
    if not path.exists() and name.count("/") != 1:
        raise UserError(f"no model at {name!r}: name a run folder, a model folder or a Hub id")
    return source


def _generate(options: argparse.Namespace) -> None:
    _source_of(options.model)  # before the wait for torch
    with Display() as display:
        display.show("loading torch and transformers")
        model, tokenizer = _load(options.model)
    import torch
    from transformers import TextStreamer

    from hf_genlm.decoding import FastGenerator

    fast = FastGenerator(model, program="compiled" if options.compile else None, int8=options.int8)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    ids = tokenizer(options.prompt, add_special_tokens=False).input_ids
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt = torch.tensor([start + ids], device=model.device)
    sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    fast.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=options.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **(sampling if options.temperature > 0 else {"do_sample": False}),
    )


def _serve(options: argparse.Namespace) -> None:
    from hf_genlm.serving import serve

    serve(_source_of(options.model), options.rest)


def _chat(options: argparse.Namespace) -> None:
    from hf_genlm.serving import chat

    chat(_source_of(options.model), options.url, options.rest)


def _card(options: argparse.Namespace) -> None:
    from hf_genlm.publish.card import write_card
    from hf_genlm.run_folder import RunFolder

    print(write_card(RunFolder.open(options.run_path)))


def _doctor(options: argparse.Namespace) -> None:
    _check_doctor(options)
    if options.parameters is None:
        with Display() as display:
            display.show("loading torch and transformers")
            from hf_genlm.doctor import describe_installation

            installation = describe_installation()
        lines = installation_lines(installation)
        content = installation.to_json()
    else:
        recipe = _recipe_to_examine(options)
        with Display() as display:
            display.show("loading torch and transformers")
            from hf_genlm.doctor import describe_model

            cost = describe_model(recipe)
        lines = model_cost_lines(cost)
        content = cost.to_json()
    print(json.dumps(content, indent=2) if options.json else "\n".join(lines))


def _check_doctor(options: argparse.Namespace) -> None:
    """The options that describe a model need a model to describe, and one that is not described already."""
    given = [name for name in (*MODEL_FIELDS, "recipe") if getattr(options, name) is not None]
    option = "--" + given[0].replace("_", "-") if given else "--set"
    if options.parameters is None and (given or options.assignments):
        raise UserError(f"{option} describes a model: add --parameters")
    if options.parameters and given:
        raise UserError(
            f"{option}: the recipe of {options.parameters!r} states it already; "
            "change a field of it by --set section.key=value"
        )


def _recipe_to_examine(options: argparse.Namespace) -> Recipe:
    from hf_genlm.run_folder import RunFolder

    if options.parameters:
        return load_recipe(RunFolder.open(options.parameters).recipe, options.assignments)
    return _recipe(options, MODEL_FIELDS)


_VERBS = {
    "train": _train,
    "tokenizer": _tokenizer,
    "evaluate": _evaluate,
    "generate": _generate,
    "serve": _serve,
    "chat": _chat,
    "card": _card,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())
