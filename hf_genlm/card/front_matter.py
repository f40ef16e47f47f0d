"""The front matter of a card: what the Hub reads of it, by its rules."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_genlm.card.hub_rules import is_language
from hf_genlm.card.measured import title
from hf_genlm.config.recipe import CardRecipe, Recipe
from hf_genlm.evaluation.measurement import Measurement

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

_DECODER_TAGS = {"full_attention": "transformer", "sliding_attention": "sliding"}


def front_matter(recipe: Recipe, facts: Mapping[str, Any]) -> "ModelCardData":
    """
    Args:
        recipe: that of the run.
        facts: what `card.py` read of it: `name`, `config`, `corpus`, `measurements`, `base_model`.
    """
    from huggingface_hub import ModelCardData

    card, measurements = recipe.card, facts["measurements"]
    results = [_result(facts["corpus"], m) for m in measurements if math.isfinite(m.value)]
    tagged = ["genlm", "custom_code", *decoder_tags(facts["config"]["mixer_types"]), *card.tags]
    more: dict[str, Any] = {
        "language_bcp47": [tag for tag in stated_languages(recipe) if "-" in tag] or None,
        "base_model_relation": "finetune" if facts["base_model"] else None,
    }
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=card.license,
        license_name=card.license_name,
        license_link=card.license_link,
        language=languages_of(recipe) or None,
        tags=tagged,
        datasets=datasets_of(card, facts["corpus"]) or None,
        base_model=facts["base_model"],
        metrics=list(dict.fromkeys(m.name.partition("/")[0] for m in measurements)) or None,
        model_name=facts["name"],
        eval_results=results or None,
        **{key: value for key, value in more.items() if value},
    )


def stated_languages(recipe: Recipe) -> list[str]:
    """Tags of the languages of a model: as stated, or else those of its sources."""
    return recipe.card.language or list(recipe.corpus.languages)


def languages_of(recipe: Recipe) -> list[str]:
    """Their codes that the Hub knows, without scripts and regions."""
    codes = dict.fromkeys(tag.partition("-")[0] for tag in stated_languages(recipe))
    return [code for code in codes if is_language(code)]


def datasets_of(card: CardRecipe, corpus: Mapping[str, Any]) -> list[str]:
    """Hub ids of what was read from there, and of what the recipe names besides."""
    read = [name.partition(":")[0] for name in _of_the_hub(corpus)]
    return list(dict.fromkeys([*read, *card.datasets]))


def decoder_tags(mixer_types: Sequence[str]) -> list[str]:
    """The decoder by its preset's word, and its mixers."""
    kinds = list(dict.fromkeys(mixer_types))
    preset = _DECODER_TAGS.get(kinds[0], kinds[0]) if len(kinds) == 1 else "hybrid"
    return list(dict.fromkeys([preset, *kinds]))


def _of_the_hub(corpus: Mapping[str, Any]) -> list[str]:
    """The words `owner/name:config` among the sources: nothing of them was a file on this disk."""
    return [file["name"] for file in corpus["files"] if file["bytes"] is None]


def _result(corpus: Mapping[str, Any], measurement: Measurement) -> "EvalResult":
    from huggingface_hub import EvalResult

    split = measurement.split
    is_of_corpus = split in ("train", "validation") and split in corpus
    hub = _of_the_hub(corpus) if is_of_corpus and len(corpus["files"]) == 1 else []
    repo_id, _, config = hub[0].partition(":") if hub else ("text", "", "")
    sha256 = corpus[split]["sha256"] if is_of_corpus else None
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=repo_id,
        dataset_name=corpus["description"] if is_of_corpus else split,
        dataset_config=config or None,
        dataset_split=split,
        dataset_args={"sha256": sha256} if sha256 else None,
        metric_type=measurement.name,
        metric_name=title(measurement),
        metric_value=measurement.value,
    )
