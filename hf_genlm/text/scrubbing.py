"""Personal data and secrets in a text, replaced by the name of what they are, as `<EMAIL>` or `<SECRET>`.

A placeholder is plain text. The tokenizer learns it as any other word that occurs often, and a model needs no
token that others lack.
"""

import importlib.util
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.text.detectors import DETECTORS, LIBRARIES

ALL = "all"
_PIECE = 1 << 20  # characters that are looked at together, so that memory is bounded
_REACH = 1 << 16  # characters in which a piece looks back for a place to end


@dataclass
class Tally:
    """What was replaced: how many of each type, and in how many documents."""

    types: Counter[str] = field(default_factory=Counter)
    documents: int = 0

    def join(self, other: "Tally") -> None:
        """Count what another has counted."""
        self.types += other.types
        self.documents += other.documents


class Scrubber:
    """Replaces what the detectors of `recipe.scrub` find.

    Raises:
        UserError: see `check_scrubbing`.
    """

    def __init__(self, recipe: CorpusRecipe):
        check_scrubbing(recipe)
        self.recipe = recipe
        self.types = _types_of(recipe)

    def scrub(self, text: str, tally: Tally | None = None) -> str:
        """`text` with placeholders. Spans that meet are replaced together, by the name of the type that comes
        first in DETECTORS."""
        found = sorted(
            (*span, rank)
            for rank, name in enumerate(self.types)
            for span in DETECTORS[name](text, self.recipe)
        )
        parts, end = [], 0
        for start, stop, rank in _joined(found):
            parts += [text[end:start], f"<{self.types[rank].upper()}>"]
            end = stop
            if tally is not None:
                tally.types[self.types[rank]] += 1
        return "".join([*parts, text[end:]])

    def scrub_parts(self, parts: Iterable[str], tally: Tally | None = None) -> Iterator[str]:
        """The same of the document that `parts` join to, whatever the parts are, in bounded memory.

        A document is looked at in pieces that end at a line end, or, where there is none for long, anywhere.
        """
        of_document = Tally()
        for piece in _pieces(parts):
            yield self.scrub(piece, of_document)
        of_document.documents = int(of_document.types.total() > 0)
        if tally is not None:
            tally.join(of_document)

    def to_json(self, tally: Tally | None) -> dict[str, Any]:
        """As it stands in corpus.json; no tally where nothing is counted."""
        libraries = [LIBRARIES[name][1] for name in self.types if name in LIBRARIES]
        return {
            "types": {name: None if tally is None else tally.types[name] for name in self.types},
            "documents": None if tally is None else tally.documents,
            "splits": ["train", "validation"],
            "phone_regions": list(self.recipe.phone_regions),
            "libraries": {name: metadata.version(name) for name in libraries},
        }


def scrubber_of(recipe: CorpusRecipe) -> Scrubber | None:
    """None where a recipe asks for none."""
    return Scrubber(recipe) if recipe.scrub else None


def check_scrubbing(recipe: CorpusRecipe) -> None:
    """
    Raises:
        UserError: an unknown type or region, or a library is not installed.
    """
    for name in recipe.scrub:
        if name not in DETECTORS and name != ALL:
            raise UserError(f"unknown corpus.scrub {name!r}{did_you_mean(name, [*DETECTORS, ALL])}")
    for name in _types_of(recipe):
        if name in LIBRARIES and importlib.util.find_spec(LIBRARIES[name][0]) is None:
            raise UserError(
                f"corpus.scrub = {name} needs the library {LIBRARIES[name][1]}: pip install "
                "'hf_genlm[privacy]', or name the other types"
            )
    if not recipe.phone_regions:
        return
    if "phone" not in _types_of(recipe):
        raise UserError("corpus.phone_regions is for corpus.scrub = phone: add it, or leave the regions out")
    from phonenumbers import SUPPORTED_REGIONS

    for region in recipe.phone_regions:
        if region not in SUPPORTED_REGIONS:
            raise UserError(
                f"corpus.phone_regions has {region!r}, no region that phonenumbers knows: name it by ISO "
                "3166 in capital letters, such as DE or US"
            )


def _types_of(recipe: CorpusRecipe) -> list[str]:
    """In the order of DETECTORS."""
    return [name for name in DETECTORS if name in recipe.scrub or ALL in recipe.scrub]


def _joined(found: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """(start, stop, least rank) of spans in order, those that overlap as one."""
    begun: tuple[int, int, int] | None = None
    for start, stop, rank in found:
        if begun is not None and start < begun[1]:
            begun = begun[0], max(begun[1], stop), min(begun[2], rank)
            continue
        if begun is not None:
            yield begun
        begun = start, stop, rank
    if begun is not None:
        yield begun


def _pieces(parts: Iterable[str]) -> Iterator[str]:
    """A text in pieces of at most `_PIECE` characters that depend on it alone, not on its parts."""
    begun: list[str] = []
    size = 0
    for part in parts:
        begun.append(part)
        size += len(part)
        if size < _PIECE:
            continue
        text = "".join(begun)
        while len(text) >= _PIECE:
            border = _border(text[:_PIECE])
            yield text[:border]
            text = text[border:]
        begun, size = [text], len(text)
    yield "".join(begun)


def _border(piece: str) -> int:
    """Behind the last line end, and before a private key that has begun; all of it where neither is near."""
    near = len(piece) - _REACH
    border = piece.rfind("\n", near) + 1 or len(piece)
    key = piece.find("-----BEGIN ", max(near, piece.rfind("-----END ", near, border)), border)
    return key if key > 0 else border
