"""The model card, `hf-genlm card RUN`: written from the files of the run folder and from nothing else.

The same run folder gives the same card. A figure on it is read from a file of the run, never typed. A card
that a person wrote or changed is left as it is: ours end with a hash of themselves.
"""

import hashlib
import json
import re
import shlex
from collections import Counter
from importlib import resources
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from hf_genlm.card import citation, measured
from hf_genlm.card.front_matter import datasets_of, front_matter, languages_of
from hf_genlm.card.hub_rules import check_card, language_names
from hf_genlm.card.languages import is_of_language, language_table, script_line
from hf_genlm.card.parameters import parts_of, read_sizes
from hf_genlm.card.privacy import privacy_section
from hf_genlm.card.told import counted_layers, duration, settings_of, trained_year
from hf_genlm.config.recipe import Recipe, load_recipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.files import write_text
from hf_genlm.report import document
from hf_genlm.report.curves import CURVES_FILE, curves_of, describe_curves, first_samples
from hf_genlm.run_folder import RunFolder, read_json

MAX_FILES_LISTED = 20
N_SAMPLES = 2
MAX_SAMPLE_CHARACTERS = 1500
_MAX_TEASER_CHARACTERS = 120  # of a text that shows how far the training was

_DIRECTORIES = re.compile(r"(?<![\w.:/\\~])(?:file:|~|[A-Za-z]:)?[/\\]+(?:[^\s/\\]+[/\\]+)+")
_SEAL = re.compile(r"\n<!-- hf-genlm card; what stands above has the sha256 ([0-9a-f]{64}) -->\n?")


def write_card(run: RunFolder, repo_id: str | None = None, force: bool = False) -> Path:
    """Write `model/README.md` of a run, without touching the network.

    Args:
        run: a finished run.
        repo_id: the Hub id to show in the loading example; None: the example loads the folder it stands in.
        force: write it in place of one that a person wrote or changed, too, which is else left as it is.

    Returns:
        The path of the card.

    Raises:
        UserError: a file of the run is missing or damaged, and the message names the verb that writes it; or
            the recipe says of the card what the Hub would refuse.
    """
    path = run.model / "README.md"
    if force or not is_by_hand(path):
        write_text(path, card_of(run, repo_id))
    return path


def is_by_hand(path: Path) -> bool:
    """True if a person wrote or changed the card at `path`; not, where there is none."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    seals = list(_SEAL.finditer(text))
    if not seals or seals[-1].end() != len(text):
        return True
    return seals[-1].group(1) != _sha256(text[: seals[-1].start()])


def card_of(
    run: RunFolder, repo_id: str | None = None, picture: str = CURVES_FILE, recipe_file: str | None = None
) -> str:
    """The card of a run, as `write_card` writes it.

    Args:
        run: a finished run.
        repo_id: as of `write_card`.
        picture: where the picture of the curves lies, seen from the card.
        recipe_file: that the run was made by, to be named in the command that repeats it.
    """
    recipe = load_recipe(run.recipe)
    check_card(recipe.card)
    facts = _read_facts(run, recipe)
    facts |= {"repo": "." if repo_id is None else repo_id, "recipe_file": recipe_file}
    if facts["picture"] is not None:
        facts["picture"] = picture
    text = f"---\n{front_matter(recipe, facts).to_yaml()}\n---\n\n{_render(facts).rstrip()}\n"
    return f"{text}\n<!-- hf-genlm card; what stands above has the sha256 {_sha256(text)} -->\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _read_facts(run: RunFolder, recipe: Recipe) -> dict[str, Any]:
    """What the template prints, as it is in the run folder, without directories of this machine."""
    for path in (run.model / "config.json", run.corpus, run.environment, run.evaluation):
        if not path.is_file():
            raise UserError(f"{str(path)!r} does not exist: 'train' writes it; was the run interrupted?")
    config = read_json(run.model / "config.json")
    events = _read_log(run)
    curves = curves_of(events)
    corpus = _portable(read_json(run.corpus))
    languages = corpus.get("languages", {})
    measurements = read_measurements(run.evaluation)
    of_tokenizer = read_measurements(run.languages) if run.languages.is_file() else []
    sizes = read_sizes(run.model / "model.safetensors")
    samples = run.samples.read_text(encoding="utf-8") if run.samples.is_file() else ""
    return {
        "name": recipe.card.name or run.path.resolve().name,
        "card": recipe.card,
        "datasets": datasets_of(recipe.card, corpus),
        "languages": {code: language_names().get(code, code) for code in languages_of(recipe)},
        "config": config,
        "mixers": _counted(config["mixer_types"]),
        "layers": counted_layers(config["mixer_types"]),
        "parts": parts_of(sizes, config["mixer_types"]),
        "n_parameters": sum(sizes.values()),
        "is_tied": "lm_head.weight" not in sizes,
        "measurements": [m for m in measurements if not is_of_language(m, languages)],
        "headline": next((m for m in measurements if m.name == "bits_per_byte"), None),
        "language_table": language_table(languages, [*measurements, *of_tokenizer]),
        "scripts": script_line(of_tokenizer),
        "context": _context_of(recipe),
        "is_audited": run.audit.is_file(),
        "is_private": run.privacy.is_file(),
        "privacy": privacy_section(run),
        "corpus": corpus,
        "vectors": _portable(read_json(run.vectors)) if run.vectors.is_file() else None,
        "environment": read_json(run.environment),
        "trained": _last(events, "trained"),
        "settings": settings_of(recipe),
        "base": None if recipe.model.init_from is None else _portable(recipe.model.init_from),
        "base_model": recipe.card.base_model or _last(events, "started").get("base_model"),
        "recipe": recipe,
        "recipe_yaml": yaml.safe_dump(_portable(recipe.model_dump()), sort_keys=False, allow_unicode=True),
        "picture": CURVES_FILE if curves.steps and (run.model / CURVES_FILE).is_file() else None,
        "picture_in_words": describe_curves(curves) if curves.steps else None,
        "first_samples": first_samples(curves),
        "samples": document.fenced_blocks(samples)[-N_SAMPLES:],
        "year": trained_year(events),
        "out": shlex.quote(run.path.resolve().name),
    }


def _last(events: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The last event of a kind; nothing in it where there is none."""
    return next((event for event in reversed(events) if event.get("event") == kind), {})


def _context_of(recipe: Recipe) -> int | None:
    """Tokens that a measured prediction looked back on at most; None: to the start of its document."""
    if recipe.evaluation.carry_state:
        return None
    return recipe.evaluation.context_length or recipe.training.max_seq_length


def _render(facts: dict[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        prose=document.prose,
        code=document.code,
        fence=document.fence,
        count=document.count,
        figures=measured.figures,
        title=measured.title,
        interval=measured.interval,
        cut=_cut,
        teaser=_teaser,
        duration=duration,
    )
    template = resources.files("hf_genlm.card").joinpath("card_template.md").read_text(encoding="utf-8")
    known = measured.DEFINITIONS
    return environment.from_string(template).render(
        **facts,
        definitions=[known[m.name] for m in facts["measurements"] if m.name in known],
        max_files_listed=MAX_FILES_LISTED,
        citations=_citations(facts),
    )


def _citations(facts: dict[str, Any]) -> list[str]:
    """Entries of BibTeX: of the model, and of this package."""
    card, version = facts["card"], facts["environment"]["packages"].get("hf_genlm")
    of_model = card.citation or citation.model_entry(
        facts["name"], authors=card.authors, year=facts["year"], url=card.url, version=version
    )
    return [of_model, citation.package_entry(version)]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SAMPLE_CHARACTERS else text[:MAX_SAMPLE_CHARACTERS] + "…"


def _teaser(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_TEASER_CHARACTERS else line[:_MAX_TEASER_CHARACTERS] + "…"


def _counted(mixer_types: list[str]) -> str:
    """`2 gated_linear, 1 full_attention` in the order of first appearance."""
    return ", ".join(f"{n} {mixer}" for mixer, n in Counter(mixer_types).items())


def _read_log(run: RunFolder) -> list[dict[str, Any]]:
    if not run.log_file.is_file():
        return []
    try:
        return run.read_log()
    except json.JSONDecodeError as error:
        raise UserError(f"{str(run.log_file)!r} is damaged: {error}") from error


def _portable(value: Any) -> Any:
    """`value` with every absolute path in it, on any system, cut down to its last part."""
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if not isinstance(value, str):
        return value
    if PurePosixPath(value).is_absolute() or value.startswith("~"):
        return PurePosixPath(value).name
    if PureWindowsPath(value).is_absolute():
        return PureWindowsPath(value).name
    return _DIRECTORIES.sub("", value)
