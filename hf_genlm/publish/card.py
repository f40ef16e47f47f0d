"""The model card, `hf-genlm card RUN`: written from the files of the run folder and from nothing else.

The same run folder gives the same card. A figure on it is read from a file of the run, never typed.
"""

import json
import math
import re
from collections import Counter
from dataclasses import asdict
from importlib import resources
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import yaml

from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import Measurement, read_measurements
from hf_genlm.publish import markdown
from hf_genlm.publish.curves import curves_of, first_samples, in_words
from hf_genlm.publish.languages import is_of_language, language_table, script_line
from hf_genlm.publish.parameters import parts_of, read_sizes
from hf_genlm.publish.plots import PICTURE
from hf_genlm.publish.privacy import privacy_section
from hf_genlm.recipe import Recipe, load_recipe
from hf_genlm.run_folder import RunFolder, read_json, write_text

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

MAX_FILES_LISTED = 20
N_SAMPLES = 2
MAX_SAMPLE_CHARACTERS = 1500
_MAX_TEASER_CHARACTERS = 120  # of a text that shows how far the training was

# What a card says of each measurement: title, definition.
_DEFINITIONS = {
    "bits_per_byte": (
        "Bits per byte",
        "total -log2 probability of the text over the number of its UTF-8 bytes, those of the original text, "
        "not of its tokens; models with different vocabularies compare by it",
    ),
    "nats_per_token": ("Nats per token", "mean -ln probability of a token of this model's own vocabulary"),
    "perplexity": ("Perplexity per token", "exp of the nats per token; compares only within one vocabulary"),
    "mean_language_bits_per_byte": (
        "Bits per byte, mean of the languages",
        "every language weighs the same, whatever text there is of it",
    ),
    "worst_language_bits_per_byte": (
        "Bits per byte, worst language",
        "the highest of the languages; a language also differs in what its script needs in bytes",
    ),
    "top1_accuracy": ("Top-1 accuracy", "share of tokens that the model ranked first; ties count against it"),
    "top5_accuracy": ("Top-5 accuracy", "share of tokens that the model ranked among its first five"),
    "calibration_error": (
        "Calibration error",
        "expected calibration error of the likeliest token, over 15 bins of equal width",
    ),
    "word_perplexity": (
        "Perplexity per word",
        "exp of the nats per word of the original text; as lm-evaluation-harness counts, a document has one "
        "word more than runs of white space; models with different vocabularies compare by it",
    ),
    "minimal_pairs_accuracy": (
        "Minimal pairs",
        "share of pairs of sentences of which the model finds the acceptable one likelier; ties count half",
    ),
    "minimal_pairs_accuracy_macro": ("Minimal pairs, macro", "mean of that over the linguistic phenomena"),
}
_DECODER_TAGS = {"full_attention": "transformer", "sliding_attention": "sliding"}
_DIRECTORIES = re.compile(r"(?<![\w.:/\\~])(?:file:|~|[A-Za-z]:)?[/\\]+(?:[^\s/\\]+[/\\]+)+")


def write_card(run: RunFolder, repo_id: str | None = None) -> Path:
    """Write `model/README.md` of a run, without touching the network.

    Args:
        run: a finished run.
        repo_id: the Hub id to show in the loading example; None: the example loads the folder it stands in.

    Returns:
        The path of the card.

    Raises:
        UserError: a file of the run is missing or damaged; the message names the verb that writes it.
    """
    recipe = load_recipe(run.recipe)
    facts = _read_facts(run, recipe)
    facts["repo"] = "." if repo_id is None else repo_id
    data = _front_matter(recipe, facts)
    path = run.model / "README.md"
    write_text(path, f"---\n{data.to_yaml()}\n---\n\n{_render(facts)}")
    return path


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
    measured = read_measurements(run.evaluation)
    of_tokenizer = read_measurements(run.languages) if run.languages.is_file() else []
    sizes = read_sizes(run.model / "model.safetensors")
    samples = run.samples.read_text(encoding="utf-8") if run.samples.is_file() else ""
    return {
        "name": recipe.card.name or run.path.resolve().name,
        "license": recipe.card.license,
        "languages": _languages_of(recipe),
        "config": config,
        "mixers": _counted(config["mixer_types"]),
        "parts": parts_of(sizes, config["mixer_types"]),
        "n_parameters": sum(sizes.values()),
        "is_tied": "lm_head.weight" not in sizes,
        "measurements": [m for m in measured if not is_of_language(m, languages)],
        "language_table": language_table(languages, [*measured, *of_tokenizer]),
        "scripts": script_line(of_tokenizer),
        "context": _context_of(recipe),
        "is_audited": run.audit.is_file(),
        "privacy": privacy_section(run),
        "corpus": corpus,
        "vectors": _portable(read_json(run.vectors)) if run.vectors.is_file() else None,
        "environment": read_json(run.environment),
        "trained": next((event for event in reversed(events) if event.get("event") == "trained"), None),
        "recipe_yaml": yaml.safe_dump(_portable(asdict(recipe)), sort_keys=False, allow_unicode=True),
        "picture": PICTURE if curves.steps and (run.model / PICTURE).is_file() else None,
        "picture_in_words": in_words(curves) if curves.steps else None,
        "first_samples": first_samples(curves),
        "samples": markdown.fenced_blocks(samples)[-N_SAMPLES:],
    }


def _languages_of(recipe: Recipe) -> list[str]:
    """As stated, or else those of the sources; the Hub knows languages, not their scripts and regions."""
    return recipe.card.language or list(
        dict.fromkeys(code.partition("-")[0] for code in recipe.corpus.languages)
    )


def _context_of(recipe: Recipe) -> int | None:
    """Tokens that a measured prediction looked back on at most; None: to the start of its document."""
    if recipe.evaluation.carry_state:
        return None
    return recipe.evaluation.context or recipe.training.row_length


def _front_matter(recipe: Recipe, facts: dict[str, Any]) -> "ModelCardData":
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=facts["corpus"]["description"] if _is_of(facts, measurement) else measurement.split,
            dataset_split=measurement.split,
            dataset_args={"sha256": facts["corpus"][measurement.split]["sha256"]}
            if _is_of(facts, measurement)
            else None,
            metric_type=measurement.name,
            metric_name=_title(measurement),
            metric_value=measurement.value,
        )
        for measurement in facts["measurements"]
        if math.isfinite(measurement.value)
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=recipe.card.license,
        language=_languages_of(recipe) or None,
        tags=["genlm", "custom_code", *_decoder_tags(facts["config"]["mixer_types"])],
        metrics=list(dict.fromkeys(m.name.partition("/")[0] for m in facts["measurements"])),
        model_name=facts["name"],
        eval_results=results or None,
    )


def _render(facts: dict[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        prose=markdown.prose, code=markdown.code, fence=markdown.fence, count=markdown.count, figures=_figures
    )
    environment.filters.update(title=_title, cut=_cut, interval=_interval, teaser=_teaser)
    template = resources.files("hf_genlm.publish").joinpath("card_template.md").read_text(encoding="utf-8")
    definitions = [_DEFINITIONS[m.name] for m in facts["measurements"] if m.name in _DEFINITIONS]
    return environment.from_string(template).render(
        **facts, definitions=definitions, max_files_listed=MAX_FILES_LISTED
    )


def _is_of(facts: dict[str, Any], measurement: Measurement) -> bool:
    """Whether it was measured on a split of the run's corpus."""
    return measurement.split in ("train", "validation") and measurement.split in facts["corpus"]


def _title(measurement: Measurement) -> str:
    name, _, part = measurement.name.partition("/")
    title = _DEFINITIONS.get(name, (name, ""))[0]
    return f"{title}: {part}" if part else title


def _interval(measurement: Measurement) -> str:
    if measurement.interval is None:
        return "unknown"
    return " to ".join(_figures(end, measurement) for end in measurement.interval)


def _figures(number: float | None, measurement: Measurement) -> str:
    """`number` to the second figure of its standard error, to 4 decimals where that is unknown."""
    if number is None or not math.isfinite(number):
        return "unknown"
    if not measurement.stderr:
        return f"{number:.4f}"
    return f"{number:.{min(8, max(0, 1 - math.floor(math.log10(measurement.stderr))))}f}"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SAMPLE_CHARACTERS else text[:MAX_SAMPLE_CHARACTERS] + "…"


def _teaser(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_TEASER_CHARACTERS else line[:_MAX_TEASER_CHARACTERS] + "…"


def _counted(mixer_types: list[str]) -> str:
    """`2 gated_linear, 1 full_attention` in the order of first appearance."""
    return ", ".join(f"{n} {mixer}" for mixer, n in Counter(mixer_types).items())


def _decoder_tags(mixer_types: list[str]) -> list[str]:
    kinds = list(dict.fromkeys(mixer_types))
    preset = _DECODER_TAGS.get(kinds[0], kinds[0]) if len(kinds) == 1 else "hybrid"
    return list(dict.fromkeys([preset, *kinds]))


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
