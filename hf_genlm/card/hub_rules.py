"""What the Hub takes in the front matter of a card, checked where no Hub is asked: before training too."""

import difflib
import functools
import importlib.util
import json
import re
from pathlib import Path

from hf_genlm.config.recipe import CardRecipe
from hf_genlm.errors import UserError

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
_NO_NATURAL_LANGUAGES = {"code": "source code", "multilingual": "many languages"}


def check_card(card: CardRecipe) -> None:
    """
    Raises:
        UserError: a field of the card's section that the Hub would refuse on a card.
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


@functools.cache
def language_names() -> dict[str, str]:
    """Name by code: ISO 639-1, -2 and -3 as `datasets` lists them for cards, and what the Hub takes besides.

    Where `datasets` has no such list, the Hub's own words alone.
    """
    spec = importlib.util.find_spec("datasets")  # not imported: it takes seconds
    names: dict[str, str] = {}
    if spec is not None and spec.origin is not None:
        listed = Path(spec.origin).parent / "utils" / "resources" / "languages.json"
        names = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else {}
    return {**names, **_NO_NATURAL_LANGUAGES}


def is_language(code: str) -> bool:
    """True if the Hub takes `code` (no script, no region) for a language."""
    if code in _NO_NATURAL_LANGUAGES:
        return True
    is_listed = len(language_names()) > len(_NO_NATURAL_LANGUAGES)
    if len(code) == 2 and is_listed:
        return code in language_names()
    # the list leaves out three letters where there are two, as eng for en; the Hub takes both
    return re.fullmatch("[a-z]{2,3}", code) is not None


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
        raise UserError("card.license_name and card.license_link are for card.license=other: say that too")
    if is_other and card.license_name is None:
        raise UserError("card.license = 'other' needs card.license_name, and a card.license_link to its text")
    if card.license_name is not None and not _LICENSE_NAME.fullmatch(card.license_name):
        raise UserError(
            f"card.license_name = {card.license_name!r}: small letters, digits, - and . alone, as psf-2.0"
        )
    link = card.license_link
    if link is not None and link not in _LICENSE_FILES and not _ADDRESS.fullmatch(link):
        raise UserError(
            f"card.license_link = {link!r}: it must be an address (https://...), or LICENSE, a file that you "
            "put beside the weights"
        )


def _check_language(code: str) -> None:
    language, hyphen, rest = code.partition("-")
    if is_language(language) and _SUBTAGS.fullmatch(hyphen + rest):
        return
    by_name = {name.casefold(): known for known, name in reversed(language_names().items())}
    known = by_name.get(code.casefold())
    hint = f"did you mean {known!r}?" if known else "code stands for source code, multilingual for many"
    raise UserError(
        f"card.language = {code!r} is no code of ISO 639 (2 or 3 small letters, as en or swh, a script or "
        f"region behind it): {hint}"
    )


def _check_repo_id(name: str, repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{name} = {repo_id!r} is no id of the Hub: write owner/name") from error
