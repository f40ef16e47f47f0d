"""The Hub's rules for the front matter of a model card, as its documentation and its messages state them.

The Hub checks a card when it is pushed, by a service that no test can ask. Sources: the specification
`modelcard.md` and the pages `repositories-licenses.md` and `model-cards.md` of huggingface/hub-docs, and the
docstring of `huggingface_hub.ModelCardData`.
"""

import json
import math
import re
from pathlib import Path

import datasets
import yaml

_LICENSES = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "gpl-3.0", "openrail", "other"}
_LISTED = json.loads(
    (Path(datasets.__file__).parent / "utils" / "resources" / "languages.json").read_text(encoding="utf-8")
)
_LANGUAGES = {*_LISTED, "code", "multilingual"}
_REPO_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w.-]{1,96}")
_LICENSE_NAME = re.compile(r"[a-z0-9-.]+")
_TEXT_KEYS = ("library_name", "pipeline_tag", "license", "license_name", "license_link", "base_model")


def _is_language(code: str) -> bool:
    """ISO 639-1, -2 or -3 in small letters, or a word of the Hub's; of two letters all are listed."""
    return code in _LANGUAGES or (len(code) == 3 and code.isascii() and code.isalpha() and code.islower())


_LIST_KEYS = ("language", "language_bcp47", "tags", "datasets", "metrics")
_KNOWN = {*_TEXT_KEYS, *_LIST_KEYS, "model-index", "base_model_relation"}


def front_matter_of(card: str) -> dict:
    """The metadata block at the top of a card."""
    assert card.startswith("---\n")
    block, _, _ = card[4:].partition("\n---\n")
    return yaml.safe_load(block)


def faults_of(data: dict) -> list[str]:
    """What the Hub would refuse, or would not know what to do with; a line each."""
    found = [f"{key}: unknown" for key in data.keys() - _KNOWN]
    found += [f"{key}: missing" for key in {"library_name", "pipeline_tag", "tags"} - data.keys()]
    found += [f"{key}: not text" for key in _TEXT_KEYS if key in data and not _is_text(data[key])]
    for key in _LIST_KEYS:
        if key in data and not (data[key] and isinstance(data[key], list) and all(map(_is_text, data[key]))):
            found.append(f"{key}: no list of texts")
    if data.get("pipeline_tag") != "text-generation":
        found.append("pipeline_tag: not that of a causal language model")
    found += [f"language: {code}" for code in data.get("language", []) if not _is_language(code)]
    for key in ("datasets", "base_model"):
        ids = data.get(key, [])
        for repo_id in [ids] if isinstance(ids, str) else ids:
            found += [] if _REPO_ID.fullmatch(repo_id) else [f"{key}: {repo_id}"]
    if data.get("base_model_relation", "finetune") not in {"finetune", "adapter", "merge", "quantized"}:
        found.append("base_model_relation: no kind of it")
    return [*found, *_faults_of_license(data), *_faults_of_index(data.get("model-index"))]


def _faults_of_license(data: dict) -> list[str]:
    found = []
    if "license" in data and data["license"] not in _LICENSES:
        found.append(f"license: {data['license']}")
    if data.get("license") == "other" and not _LICENSE_NAME.fullmatch(data.get("license_name", "")):
        found.append("license_name: missing, or not in small letters")
    link = data.get("license_link")
    if link is not None and link not in {"LICENSE", "LICENSE.md"} and not link.startswith("https://"):
        found.append(f"license_link: {link}")
    return found


def _faults_of_index(index: list | None) -> list[str]:
    """A result needs the type of its task, type and name of its data set, and metrics with type and value."""
    found = []
    for model in index or []:
        if not _is_text(model.get("name")) or not model.get("results"):
            found.append("model-index: a name and results")
        for result in model.get("results", []):
            needed = [
                result.get("task", {}).get("type"),
                result.get("dataset", {}).get("type"),
                result.get("dataset", {}).get("name"),
            ]
            if not all(map(_is_text, needed)):
                found.append("model-index: task.type, dataset.type, dataset.name")
            elif not _REPO_ID.fullmatch(needed[1]):
                found.append(f"model-index: dataset.type {needed[1]}")
            for metric in result.get("metrics") or [{}]:
                value = metric.get("value")
                if not _is_text(metric.get("type")) or type(value) not in (int, float):
                    found.append("model-index: metric type and value")
                elif not math.isfinite(value):
                    found.append(f"model-index: {metric['type']} {value}")
    return found


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
