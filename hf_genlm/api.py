"""Functions for Python users: one for each verb of the command line, and the run that `train` returns.

Importing this module is quick: torch and transformers are imported by the functions that need them.
"""

import contextlib
import copy
import functools
import inspect
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_genlm.config.recipe import ENDS, Recipe, load_recipe, set_field
from hf_genlm.errors import Stopped, UserError, did_you_mean, escape_controls, quiet_libraries
from hf_genlm.files import note_write_errors
from hf_genlm.loading import load
from hf_genlm.run import Run
from hf_genlm.run_folder import Listener, RunFolder, describe_step, launched_as
from hf_genlm.text.locating import Texts, as_sources, source_words, write_texts

if TYPE_CHECKING:
    from hf_genlm.evaluation.measurement import Measurement
    from hf_genlm.privacy.audit import AuditResult
    from hf_genlm.text.tokenizer import TrainedTokenizer

Model = Any  # a run, a run folder, a model folder, a Hub id, or a pair (model, tokenizer)
_Function = TypeVar("_Function", bound=Callable[..., Any])

# keyword of `train` and option of the command line -> the recipe field that it sets
SHORTCUTS = {
    "decoder": "model.decoder",
    "mixers": "model.mixers",
    "size": "model.size",
    "vectors": "vectors.path",
    "vocab_size": "tokenizer.vocab_size",
    "init_from": "model.init_from",
    "minutes": "training.minutes",
    "steps": "training.steps",
    "tokens": "training.tokens",
    "seed": "training.seed",
    "stream": "corpus.stream",
    "languages": "corpus.languages",
    "parallel": "corpus.parallel",
    "canaries": "privacy.canaries",
    "scrub": "corpus.scrub",
    "near_duplicates": "corpus.near_duplicates",
    "epsilon": "privacy.epsilon",
    "delta": "privacy.delta",
}
# public name -> the service that does it
SERVICES = {
    "audit": "hf_genlm.privacy.audit.audit",
    "compare": "hf_genlm.comparison.compare",
    "evaluate": "hf_genlm.evaluation.evaluate.evaluate",
    "export": "hf_genlm.exporting.export",
    "extend": "hf_genlm.extension.extend",
    "measure_range": "hf_genlm.long_range.measure_range",
    "plot": "hf_genlm.report.curves.plot",
    "push": "hf_genlm.hub.push.push",
    "write_card": "hf_genlm.card.write_card",
    "write_space": "hf_genlm.space.build.build_space",
}
_TEXT_PARAMETERS = ("sources", "trained_on", "held_out", "keep", "validation")
_SECTIONS = list(Recipe.model_fields)
_BAR = "{desc}{percentage:3.0f}%|{bar}|{postfix}"
# words of other libraries, and what they are called here
_SYNONYMS = {"out": "output_dir", "output": "output_dir", "from_": "init_from", "model": "decoder"}


class UnknownKeyword(UserError, TypeError):
    """A function of this package was called with a keyword that it does not have."""


def _as_public(function: _Function) -> _Function:
    """Prepare a service for Python users.

    The public function takes a `Run` for a path and strings or a dataset for sources, sections of the recipe
    such as training=dict(...) for `assignments`, and `progress` to show a bar. Unknown keywords raise
    `UnknownKeyword`.
    """
    signature = inspect.signature(function)
    parameters = dict(signature.parameters)
    has_sections = "assignments" in parameters

    @functools.wraps(function)
    def call(*args: Any, progress: bool = True, listener: Listener | None = None, **keywords: Any) -> Any:
        sections = [
            name for name in keywords if name in _SECTIONS and has_sections and name not in parameters
        ]
        assignments = [
            f"{section}.{key}={json.dumps(value, ensure_ascii=False)}"
            for section in sections
            for key, value in keywords.pop(section).items()
        ]
        for name in keywords.keys() - parameters.keys():
            raise _unknown(name, function.__name__, [*parameters, "progress"], has_sections)
        bound = signature.bind(*args, **keywords)
        if assignments:
            bound.arguments["assignments"] = [*bound.arguments.get("assignments", ()), *assignments]
        with quiet_libraries(), contextlib.ExitStack() as stack:
            for name, value in bound.arguments.items():
                if isinstance(value, Run):
                    bound.arguments[name] = os.fspath(value)
                elif name in _TEXT_PARAMETERS and value is not None and not isinstance(value, dict):
                    bound.arguments[name] = stack.enter_context(as_sources(value))
            if "listener" in parameters:
                bound.arguments["listener"] = stack.enter_context(_progress_bar(progress, listener))
            return function(*bound.args, **bound.kwargs)

    shown = [p for name, p in parameters.items() if name != "listener"]
    for name, default in (("progress", True), ("listener", None)):
        if "listener" in parameters:
            shown.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
    call.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def find_field(word: str) -> str | None:
    """Return the recipe field that `word` is the key or a synonym of, such as lr; None if there is none."""
    from hf_genlm.config.recipe import describe_fields

    word = word.replace("-", "_").lower()
    named = (row.name for row in describe_fields(word) if word in (row.name.partition(".")[2], *row.synonyms))
    return next(named, None)


def service(name: str) -> Callable[..., Any]:
    """Return the public function `name`, a row of `SERVICES`."""
    module, _, function = SERVICES[name].rpartition(".")
    found = getattr(import_module(module), function)
    return _as_public(functools.wraps(found)(audit_and_draw) if name == "audit" else found)


def _unknown(name: str, function: str, known: Iterable[str], has_sections: bool = True) -> UnknownKeyword:
    known = list(known)
    field = find_field(name) if has_sections else None
    if _SYNONYMS.get(name) in known:
        hint = f"; write {_SYNONYMS[name]}=..."
    elif field is not None:
        section, _, key = field.partition(".")
        hint = f"; it is a field of the recipe: write {section}=dict({key}=...)"
    else:
        hint = did_you_mean(name, known)
    return UnknownKeyword(f"{function}() has no keyword {name!r}{hint}")


def recipe_of(
    recipe: Recipe | str | os.PathLike[str] | None = None,
    assignments: Iterable[str] = (),
    stated: Mapping[str, Any] | None = None,
) -> Recipe:
    """Combine a recipe (object, YAML file or the defaults), assignments and stated fields, in this order.

    A stated end of the run (`training.minutes`, `training.steps` or `training.tokens`) replaces the end that
    the recipe states. The given object is not changed.

    Args:
        assignments: words `section.key=value`, as of `--set`.
        stated: value by `section.key`; a value of None states nothing.

    Raises:
        UserError: unknown section or key, or a value of another type or out of range.
    """
    stated = {name: value for name, value in (stated or {}).items() if value is not None}
    assignments = list(assignments)
    if isinstance(recipe, Recipe):
        combined = copy.deepcopy(recipe)
        for assignment in assignments:
            name, _, value = assignment.partition("=")
            set_field(combined, name.strip(), value.strip())
    else:
        combined = load_recipe(None if recipe is None else Path(recipe), assignments)
    is_end_assigned = any(assignment.partition("=")[0].strip() in ENDS for assignment in assignments)
    if not is_end_assigned and any(name in ENDS for name in stated):
        for name in ENDS:
            set_field(combined, name, None)
    for name, value in stated.items():
        set_field(combined, name, value)
    return combined


def train(
    texts: Texts = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    decoder: str | None = None,
    size: str | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    validation: Texts = None,
    init_from: "str | os.PathLike[str] | Run | None" = None,
    resume: bool = False,
    progress: bool = True,
    listener: Listener | None = None,
    **fields: Any,
) -> "Run":
    """Train a tokenizer and a model, measure the model on held-out text, and write all of it to a run folder.

    The run folder holds the model (`model/`, loaded by `from_pretrained`), its tokenizer, the complete
    recipe, the measurements, the log, the curves and the model card. Ctrl-C saves a checkpoint, draws the
    curves so far and raises `Stopped`; the same call with `resume=True` continues.

    Args:
        texts: a path, a glob or a Hub dataset id; a list of these; a list of strings, each one a document; or
            a `datasets.Dataset`. None: the library source that every CPython brings. Strings and datasets are
            written to `sources.jsonl` in the run folder, so that a run can be resumed and evaluated again
            without them.
        output_dir: the run folder to make. Default: `runs/DECODER-DATE`.
        recipe: a `Recipe` or the path of a YAML file. What the keywords say replaces what it says.
        decoder: gated_linear (default), gru, lstm, elman, transformer, sliding or hybrid.
        size: tiny, small, base or a number of parameters such as "30M". Default: the size that `minutes` can
            train.
        minutes: time of training; 3 by default. Give `minutes`, `steps` or `tokens`.
        steps: number of optimizer steps.
        tokens: number of tokens to train on.
        validation: held-out text, in any form of `texts`. Default: a part of `texts`.
        init_from: a run or model folder to continue training from.
        resume: continue the run in `output_dir` from its last checkpoint.
        progress: show a progress bar, in a notebook as a widget and in a script on stderr.
        listener: called as listener(event, fields) with every logged event and with the progress of each
            stage.
        **fields: a short name (mixers, vectors, vocab_size, seed, stream, languages, parallel, canaries,
            scrub, near_duplicates, epsilon, delta), or a section of the recipe with its fields, such as
            training=dict(learning_rate=1e-3). `hf-genlm settings` lists all fields.

    Returns:
        The finished run.

    Raises:
        UserError: a keyword, value, text or folder that cannot be used. A new `output_dir` is then removed.
        Stopped: Ctrl-C or SIGTERM ended the training.

    Example:
        run = train(texts, minutes=1, output_dir="mine", training=dict(batch_size=8))
    """
    shortcuts = {
        "decoder": decoder,
        "size": size,
        "minutes": minutes,
        "steps": steps,
        "tokens": tokens,
        "init_from": None if init_from is None else os.fspath(init_from),
    }
    stated = _stated_fields(shortcuts, fields)
    combined = recipe_of(recipe, stated=stated)
    if resume and output_dir is None:
        raise UserError("resume=True continues a run: name its folder by output_dir")
    if output_dir is None:
        name = "mixed" if combined.model.mixers else combined.model.decoder
        output_dir = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with _progress_bar(progress, listener) as hear:
        return run_training(combined, output_dir, resume, hear, texts=texts, validation=validation)


def run_training(
    recipe: Recipe,
    output_dir: str | os.PathLike[str],
    resume: bool = False,
    listener: Listener | None = None,
    *,
    texts: Texts = None,
    validation: Texts = None,
) -> "Run":
    """Train by a complete `recipe`; then draw the curves and write the model card.

    The command line and `train` both call this. Raises as `train` does. In a group of processes every process
    calls it; only the first one writes.
    """
    from hf_genlm.card import check_card, write_card

    check_card(recipe.card)
    from hf_genlm.report.curves import write_curves
    from hf_genlm.training import processes
    from hf_genlm.training.train import train as train_run

    folder, files = Path(output_dir), {}
    for name, given in (("sources", texts), ("validation", validation)):
        words = source_words(given)
        if words is None:
            files[f"{name}.jsonl"] = given
            words = [os.fspath(folder / f"{name}.jsonl")]
        if words:
            set_field(recipe, f"corpus.{name}", words)
    is_first = launched_as()[0] == 0  # the processes of a group have not met yet
    is_new = bool(files) and is_first and not resume
    if is_new:
        RunFolder.create(folder)
    try:
        if is_first:
            for name, given in files.items():
                write_texts(given, folder / name, recipe.corpus.text_column, resume)
        run = train_run(recipe, folder, listener, resume)
    except UserError:
        if is_new and folder.is_dir() and not RunFolder(folder).recipe.exists():
            shutil.rmtree(folder)  # nothing but the texts is in it
        raise
    except Stopped:
        if processes.is_first():
            write_curves(RunFolder(folder))
        raise
    if processes.is_first():
        if listener is not None:
            listener("progress", {"task": "drawing", "done": 0, "total": None})
        write_curves(run)
        write_card(run)
    return Run(run.path)


@dataclass(frozen=True)
class TokenizerResult:
    """A trained tokenizer. `measurements` are those by language, empty for text without named languages."""

    trained: "TrainedTokenizer"
    measurements: "list[Measurement]"


def tokenizer(
    texts: Texts = None,
    *,
    output_dir: str | os.PathLike[str],
    recipe: Recipe | str | os.PathLike[str] | None = None,
    vocab_size: int | None = None,
    progress: bool = True,
    listener: Listener | None = None,
    **fields: Any,
) -> TokenizerResult:
    """Train a byte-level BPE tokenizer on all of `texts` and save it to the new folder `output_dir`.

    Args:
        texts: as of `train`.
        vocab_size: number of tokens. Default: by the size of the text.
        **fields: as of `train`; `languages` and `parallel` also measure the tokenizer by language.

    Raises:
        UserError: text or folder cannot be used, or the text cannot fill the vocabulary.
    """
    stated = recipe_of(recipe, stated=_stated_fields({"vocab_size": vocab_size}, fields))
    corpus = stated.corpus
    from hf_genlm.evaluation.languages import measure_corpus_tokenization
    from hf_genlm.evaluation.measurement import write_measurements
    from hf_genlm.text.languages import check_languages
    from hf_genlm.text.tokenizer import train_tokenizer_on

    check_languages(corpus)
    with _progress_bar(progress, listener) as hear, as_sources(texts, corpus.text_column) as words:
        trained = train_tokenizer_on(
            words or corpus.languages or corpus.sources, out=Path(output_dir), tokenizer=stated.tokenizer,
            corpus=corpus, listener=hear,
        )  # fmt: skip
        measured = []
        if trained.languages or corpus.parallel:
            hear("progress", {"task": "measuring languages", "done": 0, "total": None})
            measured = measure_corpus_tokenization(
                trained.tokenizer, trained.documents, trained.languages, corpus, "train"
            )
            write_measurements(trained.path / "languages.json", measured)
    return TokenizerResult(trained, measured)


def audit_and_draw(*args: Any, listener: Listener | None = None, **keywords: Any) -> "AuditResult":
    """Call `hf_genlm.privacy.audit.audit`; of a run, also draw the picture and write the model card."""
    from hf_genlm.card import write_card
    from hf_genlm.privacy.audit import audit
    from hf_genlm.report.audit_plot import write_audit_figure

    result = audit(*args, listener=listener, **keywords)
    if result.path is not None:
        if listener is not None:
            listener("progress", {"task": "drawing", "done": 0, "total": None})
        folder = RunFolder(result.path.parent)
        model = folder.model if keywords.get("output_dir") is None and folder.model.is_dir() else None
        note = listener or (lambda event, fields: None)
        with note_write_errors(lambda message: note("note", {"message": message})):
            write_audit_figure(folder.path, result.measurements, result.roc_curves, model)
            if model is not None:
                write_card(folder)
    return result


@_as_public
def generate(
    model: Model,
    prompt: str = "",
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
    compile: bool = False,
    int8: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Continue a prompt with a trained model.

    Args:
        model: a run, a run folder, a model folder, a Hub id, or a pair (model, tokenizer) as `load` returns
            it.
        prompt: empty: the start of a document.
        temperature: 0 takes the most probable token each time.
        top_p: sample from the most probable tokens that together have this probability.
        seed: of the sampling; None: other text at each call.
        compile: generate with a compiled program, which is kept on disk for models of this shape.
        int8: round the weights to 8 bits, on a CPU.
        on_text: called with each piece of the text as soon as it is generated.

    Returns:
        The prompt and its continuation.

    Raises:
        UserError: the model cannot be loaded, or cannot be compiled or rounded.
    """
    loaded, tokenizer = model if isinstance(model, tuple) else load(model)
    import torch
    from transformers import TextStreamer

    from hf_genlm.decoding import FastGenerator
    from hf_genlm.text.encoding import encode_texts

    pieces: list[str] = []

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            if on_text is not None:
                on_text(text)

    fast = FastGenerator(loaded, program="compiled" if compile else None, int8=int8)
    if seed is not None:
        torch.manual_seed(seed)
    ids = encode_texts(tokenizer, [prompt])[0]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    inputs = torch.tensor([start + ids], device=loaded.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    fast.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens,
        streamer=Streamer(tokenizer, skip_special_tokens=True),
        **(sampling if temperature > 0 else {"do_sample": False}),
    )  # fmt: skip
    return "".join(pieces)


def _stated_fields(shortcuts: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Value by recipe field, from the keywords of `train`: short names and sections.

    Raises:
        UserError: a keyword is neither, or a section is not a mapping.
    """
    stated = {SHORTCUTS[name]: value for name, value in shortcuts.items()}
    for name, value in fields.items():
        if name in SHORTCUTS:
            stated[SHORTCUTS[name]] = "all" if name == "scrub" and value is True else value
        elif name in _SECTIONS:
            if not isinstance(value, Mapping):
                raise UserError(f"{name}={value!r}: give the fields of this section, as {name}=dict(...)")
            stated |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            own = [
                p.name for p in inspect.signature(train).parameters.values() if p.kind is not p.VAR_KEYWORD
            ]
            raise _unknown(name, "train", [*own, *SHORTCUTS, *_SECTIONS])
    return stated


@contextlib.contextmanager
def _progress_bar(is_shown: bool, listener: Listener | None) -> Iterator[Listener]:
    """Give a listener that shows progress and passes every event on to `listener`.

    Progress is one bar on a terminal, a widget in a notebook, and lines in a file: at most one in ten seconds
    of training.
    """
    from tqdm.auto import tqdm
    from tqdm.notebook import tqdm_notebook

    is_live = issubclass(tqdm, tqdm_notebook) or sys.stderr.isatty()
    bar = tqdm(total=1.0, disable=not (is_shown and is_live), leave=False, bar_format=_BAR)
    task, line_s = "", 0.0

    def hear(event: str, fields: dict[str, Any]) -> None:
        nonlocal task, line_s
        if event == "progress":
            bar.total = fields["total"]
            bar.n = fields["done"] if fields["total"] else 0
            bar.set_postfix_str("", refresh=False)
            bar.set_description(escape_controls(fields["task"]))
            if is_shown and not is_live and task != fields["task"]:
                bar.write(escape_controls(fields["task"]), file=sys.stderr)
            task = fields["task"]
        elif event == "step":
            bar.total, bar.n = 1.0, fields["progress"]
            bar.set_description("training", refresh=False)
            bar.set_postfix_str(describe_step(fields))
            if is_shown and not is_live and time.monotonic() - line_s >= 10:
                line_s = time.monotonic()
                bar.write(f"training: {describe_step(fields)}", file=sys.stderr)
        elif event == "note" and is_shown:
            bar.write(escape_controls(fields["message"]), file=sys.stderr)
        if listener is not None:
            listener(event, fields)

    with quiet_libraries(), bar:
        yield hear
