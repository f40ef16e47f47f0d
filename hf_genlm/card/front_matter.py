"""The YAML front matter of a card, and the Hub's rules for it, checked without asking the Hub."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_genlm.card.wording import title
from hf_genlm.config.recipe import Recipe
from hf_genlm.config.sections import CardRecipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.run_schemas import CorpusFile

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

# as the Hub's own message listed them in May 2026
_LICENSE_WORDS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa
unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSE_WORDS.split())
_LICENSE_PAGE = "https://huggingface.co/docs/hub/repositories-licenses"
_LICENSE_FILES = ("LICENSE", "LICENSE.md")
_LICENSE_NAME = re.compile(r"[a-z0-9.-]+")
_ADDRESS = re.compile(r"https?://[^\s{}<>\"\\^`|]+")
_SUBTAGS = re.compile(r"(-[A-Za-z0-9]{1,8})*")
_SCOPE = re.compile(r" \((?:macrolanguage|[^()\d]*\d[^()]*)\)$")  # as in Modern Greek (1453-)
_NO_NATURAL_LANGUAGES = {"code": "source code", "multilingual": "many languages"}
_DECODER_TAGS = {"full_attention": "transformer", "sliding_attention": "sliding"}


def front_matter(recipe: Recipe, facts: Mapping[str, Any]) -> "ModelCardData":
    """Collect what the Hub reads of a card.

    Args:
        recipe: that of the run.
        facts: `name`, `config`, `corpus`, `corpus_name`, `measurements` and `base_model`, as card.py reads
            them.
    """
    from huggingface_hub import ModelCardData

    card, measurements = recipe.card, facts["measurements"]
    results = [_result(facts, m) for m in measurements if math.isfinite(m.value)]
    return ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", license=card.license,
        license_name=card.license_name, license_link=card.license_link, language=languages_of(recipe) or None,
        tags=["genlm", "custom_code", *decoder_tags(facts["config"].mixer_types), *card.tags],
        datasets=datasets_of(card, facts["corpus"]) or None, base_model=facts["base_model"],
        metrics=list(dict.fromkeys(m.name.partition("/")[0] for m in measurements)) or None,
        model_name=facts["name"], eval_results=results or None,
        language_bcp47=[tag for tag in stated_languages(recipe) if "-" in tag] or None,
        base_model_relation="finetune" if facts["base_model"] else None,
    )  # fmt: skip


def stated_languages(recipe: Recipe) -> list[str]:
    """Language tags of the model: those of the card, or else those of the sources."""
    return recipe.card.language or list(recipe.corpus.languages)


def languages_of(recipe: Recipe) -> list[str]:
    """Language codes of the model that the Hub knows, of ISO 639-1 where there is one, without scripts and
    regions."""
    codes = dict.fromkeys(tag.partition("-")[0] for tag in stated_languages(recipe))
    known = [code for code in codes if language_name(code) is not None]
    return list(dict.fromkeys(getattr(_find_language(code), "alpha_2", code) for code in known))


def datasets_of(card: CardRecipe, corpus: CorpusFile) -> list[str]:
    """Hub ids of the data sets that were read, and of those that the recipe names."""
    read = [name.partition(":")[0] for name in _hub_sources(corpus)]
    return list(dict.fromkeys([*read, *card.datasets]))


def decoder_tags(mixer_types: Sequence[str]) -> list[str]:
    """The decoder's preset, and its mixers."""
    kinds = list(dict.fromkeys(mixer_types))
    preset = _DECODER_TAGS.get(kinds[0], kinds[0]) if len(kinds) == 1 else "hybrid"
    return list(dict.fromkeys([preset, *kinds]))


def _hub_sources(corpus: CorpusFile) -> list[str]:
    """The sources `owner/name:config`, which are no files on this disk."""
    return [file.name for file in corpus.files if file.bytes is None]


def _result(facts: Mapping[str, Any], measurement: Measurement) -> "EvalResult":
    from huggingface_hub import EvalResult

    corpus: CorpusFile = facts["corpus"]
    split = {"train": corpus.train, "validation": corpus.validation}.get(measurement.split)
    hub = _hub_sources(corpus) if split is not None and len(corpus.files) == 1 else []
    repo_id, _, config = hub[0].partition(":") if hub else ("text", "", "")
    return EvalResult(
        task_type="text-generation", task_name="Text Generation", dataset_type=repo_id,
        dataset_name=measurement.split if split is None else facts["corpus_name"],
        dataset_config=config or None, dataset_split=measurement.split,
        dataset_args={"sha256": split.sha256} if split is not None and split.sha256 else None,
        metric_type=measurement.name, metric_name=title(measurement), metric_value=measurement.value,
    )  # fmt: skip


def check_card(card: CardRecipe) -> None:
    """Check the card's section of a recipe by the Hub's rules.

    Raises:
        UserError: the Hub would refuse a field.
    """
    _check_license(card)
    for code in card.language:
        _check_language(code)
    for name, ids in (("datasets", card.datasets), ("base_model", [card.base_model])):
        for repo_id in ids:
            if repo_id is not None:
                _check_repo_id(f"card.{name}", repo_id)
    if card.url is not None and not _ADDRESS.fullmatch(card.url):
        raise UserError(
            f"card.url = {card.url!r} is no address: write it whole, as https://example.org/model"
        )
    if card.citation is not None and not card.citation.lstrip().startswith("@"):
        raise UserError(
            f"card.citation = {card.citation[:60]!r}: it must be an entry of BibTeX, as @misc{{key, ...}}; "
            "or leave it out: one is made of card.authors and card.url"
        )


def language_name(code: str) -> str | None:
    """English name of a language code that the Hub takes (ISO 639-1, -2, -3; no script); None for others."""
    if code in _NO_NATURAL_LANGUAGES:
        return _NO_NATURAL_LANGUAGES[code]
    language = _find_language(code)
    return None if language is None else _SCOPE.sub("", language.name)


def _find_language(code: str) -> Any:
    import pycountry

    if not re.fullmatch("[a-z]{2,3}", code):
        return None
    keys = ("alpha_2",) if len(code) == 2 else ("alpha_3", "bibliographic")
    found = (pycountry.languages.get(**{key: code}) for key in keys)
    return next(filter(None, found), None) or pycountry.language_families.get(alpha_3=code)


def _check_license(card: CardRecipe) -> None:
    if card.license is not None and card.license not in LICENSES:
        near = difflib.get_close_matches(card.license.lower(), LICENSES, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"see {_LICENSE_PAGE}."
        raise UserError(
            f"card.license = {card.license!r} is no license identifier of the Hub; {hint} Any other: "
            "card.license=other, card.license_name=NAME and card.license_link=ADDRESS"
        )
    is_other = card.license == "other"
    if not is_other and (card.license_name is not None or card.license_link is not None):
        raise UserError("card.license_name and card.license_link need card.license=other: set that too")
    if is_other and card.license_name is None:
        raise UserError("card.license = 'other' needs card.license_name, and a card.license_link to its text")
    if card.license_name is not None and not _LICENSE_NAME.fullmatch(card.license_name):
        raise UserError(
            f"card.license_name = {card.license_name!r}: use only small letters, digits, - and ., as psf-2.0"
        )
    link = card.license_link
    if link is not None and link not in _LICENSE_FILES and not _ADDRESS.fullmatch(link):
        raise UserError(
            f"card.license_link = {link!r}: it must be an address (https://...), or LICENSE, a file that you "
            "put beside the weights"
        )


def _check_language(tag: str) -> None:
    import pycountry

    code, hyphen, rest = tag.partition("-")
    if language_name(code) is not None and _SUBTAGS.fullmatch(hyphen + rest):
        return
    try:
        found = pycountry.languages.lookup(tag)
        hint = f"did you mean {getattr(found, 'alpha_2', found.alpha_3)!r}?"
    except LookupError:
        hint = "code stands for source code, multilingual for many"
    raise UserError(
        f"card.language = {tag!r} is no code of ISO 639 (2 or 3 small letters, as en or swh, and a script or "
        f"region after them): {hint}"
    )


def _check_repo_id(name: str, repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{name} = {repo_id!r} is no id of the Hub: write owner/name") from error
