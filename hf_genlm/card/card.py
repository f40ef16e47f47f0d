"""The model card of a run, rendered from the files of its folder alone.

The same run folder gives the same card, and every figure on it is read from a file. A card that a person
wrote or edited is not overwritten: a rendered card ends with a hash of itself.
"""

import dataclasses
import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, TypeVar

import yaml

import hf_genlm.card.wording as wording
from hf_genlm.card.front_matter import check_card, datasets_of, front_matter, language_name, languages_of
from hf_genlm.card.privacy import hides_figures, is_of_public_text, privacy_section, without_figures
from hf_genlm.card.wording import parts_of
from hf_genlm.config.recipe import Recipe, load_recipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import figures, read_measurements
from hf_genlm.files import read, read_bytes, read_tensor_sizes, read_text, write_text
from hf_genlm.report import document
from hf_genlm.report.audit_plot import AUDIT_FILE
from hf_genlm.report.curves import CURVES_FILE, curves_of, describe_curves, first_samples, write_curves
from hf_genlm.run_folder import RunFolder
from hf_genlm.run_schemas import CorpusFile, EnvironmentFile, ModelConfigFile, VectorsFile

MAX_FILES_LISTED = 20
NUM_SAMPLES = 2
MAX_SAMPLE_CHARACTERS = 1500
_MAX_TEASER_CHARACTERS = 120  # of a text in the table of first samples

_DIRECTORIES = re.compile(r"(?<![\w.:/\\~])(?:file:|~|[A-Za-z]:)?[/\\]+(?:[^\s/\\]+[/\\]+)+")
# of this edition, and of the first one
_SEAL_WORDS = "(?:sha256 of the text above:|what stands above has the sha256)"
_SEAL = re.compile(rf"\n<!-- hf-genlm card; {_SEAL_WORDS} ([0-9a-f]{{64}}) -->\n?")
_Value = TypeVar("_Value")


def write_card(
    run: RunFolder | str | Path,
    repo_id: str | None = None,
    *,
    revision: str | None = None,
    assignments: Sequence[str] = (),
    if_edited: Literal["keep", "refuse", "overwrite"] = "keep",
    redraw: bool = False,
) -> Path:
    """Write model/README.md of a finished run, without touching the network.

    Args:
        run: a run or its folder.
        repo_id: Hub id for the loading example; None: the example loads the folder that holds the card.
        revision: commit of `repo_id` that the example loads; None: the newest.
        assignments: words `card.KEY=VALUE`, which are also written into the run's recipe.
        if_edited: what happens to a card that a person wrote or edited.
        redraw: first draw the training curves again, which the card shows.

    Returns:
        The path of the card.

    Raises:
        UserError: a file of the run is missing or damaged, an assignment is not about the card, the Hub would
            refuse a field, the card was edited and `if_edited` is "refuse", or a file cannot be written.
    """
    run = RunFolder.open(run.path if isinstance(run, RunFolder) else run)
    path = run.model / "README.md"
    for assignment in assignments:
        if not assignment.lstrip().startswith("card."):
            raise UserError(
                f"--set {assignment!r}: give card.KEY=VALUE; all other settings were fixed by training"
            )
    recipe = load_recipe(run.recipe, list(assignments))
    check_card(recipe.card)
    if if_edited != "overwrite" and is_edited(path):
        if if_edited == "refuse":
            raise UserError(
                f"{str(path)!r} was written or edited by hand and is not overwritten: --force overwrites it"
            )
        return path
    if run.model.is_dir() and assignments:
        write_text(run.recipe, recipe.to_yaml())
    if run.model.is_dir() and redraw:
        write_curves(run)
    if hides_figures(run, recipe):
        for picture in (CURVES_FILE, AUDIT_FILE):  # of an earlier version, or of a card that showed them
            (run.model / picture).unlink(missing_ok=True)
    write_text(path, render_card(run, repo_id, revision=revision))
    return path


def is_edited(path: Path) -> bool:
    """True if a person wrote or edited the card at `path`; False if there is none."""
    if not path.is_file():
        return False
    text = read_bytes(path).decode("utf-8", "replace")
    seals = list(_SEAL.finditer(text))
    if not seals or seals[-1].end() != len(text):
        return True
    return seals[-1].group(1) != _sha256(text[: seals[-1].start()])


def render_card(
    run: RunFolder, repo_id: str | None = None, picture: str = CURVES_FILE, recipe_file: str | None = None,
    revision: str | None = None,
) -> str:  # fmt: skip
    """Render the card of a finished run.

    Args:
        repo_id: as of `write_card`, and `revision` too.
        picture: path of the figure of the curves, relative to the card.
        recipe_file: the recipe that the run was started with, for the command that reproduces it.

    Raises:
        UserError: a file of the run is missing or damaged, or the Hub would refuse a field of the recipe.
    """
    recipe = load_recipe(run.recipe)
    check_card(recipe.card)
    facts = _read_facts(run, recipe, picture)
    facts |= {"repo": repo_id or ".", "revision": revision, "recipe_file": recipe_file}
    filters: dict[str, Callable] = {
        "count": document.count,
        "figures": lambda number, m: figures(number, m.stderr),
        "title": wording.title,
        "interval": wording.interval,
        "duration": wording.duration,
        "cut": lambda text: _shorten(text, MAX_SAMPLE_CHARACTERS),
        "teaser": lambda text: _shorten(" ".join(text.split()), _MAX_TEASER_CHARACTERS),
    }
    body = document.render("card/card_template.md", filters, **facts, max_files_listed=MAX_FILES_LISTED)
    text = document.without_controls(
        f"---\n{front_matter(recipe, facts).to_yaml()}\n---\n\n{body.rstrip()}\n"
    )
    return f"{text}\n<!-- hf-genlm card; sha256 of the text above: {_sha256(text)} -->\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _shorten(text: str, n_characters: int) -> str:
    return text if len(text) <= n_characters else text[:n_characters] + "…"


def _read_facts(run: RunFolder, recipe: Recipe, picture: str) -> dict[str, Any]:
    """Read all that the template shows, without directories of this machine."""
    for path in (run.model / "config.json", run.corpus, run.environment, run.evaluation):
        if not path.is_file():
            raise UserError(f"{str(path)!r} does not exist: 'train' writes it; was the run interrupted?")
    card, name = recipe.card, recipe.card.name or run.path.resolve().name
    config = read(run.model / "config.json", ModelConfigFile)
    corpus = _portable(read(run.corpus, CorpusFile))
    environment = read(run.environment, EnvironmentFile)
    events = run.read_log()
    curves = curves_of(events)
    measured = read_measurements(run.evaluation)
    of_tokenizer = read_measurements(run.languages) if run.languages.is_file() else []
    sizes = read_tensor_sizes(run.model / "model.safetensors")
    samples = read_text(run.samples) if run.samples.is_file() else ""
    last = {event["event"]: event for event in events}
    trained, is_hiding = last.get("trained"), hides_figures(run, recipe)
    if is_hiding:
        recipe, corpus = without_figures(recipe, corpus)
        measured, of_tokenizer, trained = [m for m in measured if is_of_public_text(m)], [], None
    has_picture = bool(curves.steps) and (run.model / CURVES_FILE).is_file()
    shown = [m for m in measured if m.name.partition("/")[2] not in corpus.languages]
    year, version = wording.year_of(events), environment.packages.get("hf_genlm")
    cited = card.citation or wording.cite_model(
        name, authors=card.authors, year=year, url=card.url, version=version
    )
    context = recipe.evaluation.context_length or recipe.training.max_seq_length
    order = recipe.model.ngram_order if recipe.model.is_ngram else None
    return {
        "name": name,
        "card": card,
        "datasets": datasets_of(card, corpus),
        "languages": {code: language_name(code) for code in languages_of(recipe)},
        "config": config,
        "mixers": ", ".join(f"{n} {mixer}" for mixer, n in Counter(config.mixer_types).items()),
        "layers": wording.describe_layers(config.mixer_types),
        "parts": parts_of(sizes, config.mixer_types),
        "n_parameters": sum(sizes.values()),
        "is_tied": order is None and "lm_head.weight" not in sizes,
        "ngram_order": order,
        "counts": last.get("counts"),
        "forecast": last.get("forecast"),
        "measurements": shown,
        "definitions": [wording.DEFINITIONS[m.name] for m in shown if m.name in wording.DEFINITIONS],
        "headline": next((m for m in measured if m.name == "bits_per_byte"), None),
        "language_table": wording.language_table(corpus.languages, [*measured, *of_tokenizer], language_name),
        "scripts": wording.describe_scripts(of_tokenizer),
        "context": None if recipe.evaluation.carry_state else context,
        "is_audited": run.audit.is_file(),
        "is_private": run.privacy.is_file(),
        "is_hiding": is_hiding,
        "privacy": privacy_section(run, shows_audit=not is_hiding),
        "corpus": corpus,
        "corpus_name": card.corpus or corpus.description,
        "vectors": _portable(read(run.vectors, VectorsFile)) if run.vectors.is_file() else None,
        "environment": environment,
        "trained": trained,
        "settings": wording.settings_of(recipe),
        "base": None if recipe.model.init_from is None else _portable(recipe.model.init_from),
        "base_model": card.base_model or last.get("started", {}).get("base_model"),
        "recipe": recipe,
        "recipe_yaml": yaml.safe_dump(_portable(recipe.model_dump()), sort_keys=False, allow_unicode=True),
        "picture": picture if has_picture and not is_hiding else None,
        "picture_text": describe_curves(curves) if curves.steps else None,
        "first_samples": first_samples(curves),
        "samples": document.fenced_blocks(samples)[-NUM_SAMPLES:],
        "out": shlex.quote(run.path.resolve().name),
        "citations": [cited, wording.cite_package(version)],
    }


def _portable(value: _Value) -> _Value:
    """Replace every absolute path in `value`, of any system, by its last part."""
    changed: Any = value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        changed = dataclasses.replace(value, **_portable(fields))
    elif isinstance(value, dict):
        changed = {key: _portable(item) for key, item in value.items()}
    elif isinstance(value, list):
        changed = [_portable(item) for item in value]
    elif isinstance(value, str):
        if PurePosixPath(value).is_absolute() or value.startswith("~"):
            changed = PurePosixPath(value).name
        elif PureWindowsPath(value).is_absolute():
            changed = PureWindowsPath(value).name
        else:
            changed = _DIRECTORIES.sub("", value)
    return changed
