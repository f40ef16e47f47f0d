"""Training documents that are nearly another one: found by MinHash, and compared exactly before one goes.

Two documents are alike as far as they share their shingles, runs of five words in a row (Jaccard similarity:
shared ones over all). MinHash signatures in bands (Broder 1997; Leskovec et al., Mining of Massive Datasets,
chapter 3) name candidates, so that not every pair is compared; a candidate is a copy only if its similarity
itself is high enough.
"""

import hashlib
import importlib.util
import itertools
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.text.store import Documents

Progress = Callable[[int, int], None]

SHINGLE = 5  # units in a row
PERMUTATIONS = 128  # of a signature: 4 bytes each
MOST_MISSED = 1e-3  # of the pairs that are just as similar as the threshold
_AT_ONCE = 1 << 21  # bytes of a document whose shingles are held at once
_SHINGLES_HASHED = 1 << 14  # at once, by all permutations
_MARGIN = 5  # standard errors by which a signature may tell less than the threshold
_TOLD_EVERY = 256  # documents
_KEPT_SETS = 16  # shingle sets of documents that were looked at last
_FACTOR = 0x9E3779B97F4A7C15  # odd: no two hashes of a place in a run come to the same

# scripts that do not part words: Thai, Lao, Tibetan, Burmese, Khmer, kana, bopomofo and Han; a unit is a
# character there
_UNPARTED = (
    "\u0e01-\u0e4e\u0e81-\u0ecd\u0f00-\u0fbc\u1000-\u104f\u1780-\u17d3\u3005-\u3007\u3041-\u30ff\u3105-\u312f"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9fe\uaa60-\uaa7f\uf900-\ufaff\U0001b000-\U0001b16f"
    "\U00020000-\U0003ffff"
)
# white space and punctuation
_SIGNS = (
    r"\s!-/:-@\[-`{-~\u00a1\u00ab\u00b7\u00bb\u00bf\u060c\u061b\u061f\u06d4\u0964\u0965\u2000-\u206f"
    r"\u3000-\u3003\u3008-\u3020\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_UNIT = re.compile(rf"[{_UNPARTED}]|[^{_SIGNS}{_UNPARTED}]+")


@dataclass(frozen=True)
class NearDuplicates:
    """Which training documents stay, `kept` (n,) bool, and how many went for what."""

    kept: np.ndarray
    threshold: float
    clusters: int  # documents that others were copies of
    of_validation: int  # training documents that were copies of a validation document

    def to_json(self) -> dict[str, Any]:
        """As it stands in corpus.json."""
        return {
            "removed": int((~self.kept).sum()),
            "of_validation": self.of_validation,
            "clusters": self.clusters,
            "threshold": self.threshold,
            "shingle": SHINGLE,
        }


def check_near_duplicates(recipe: CorpusRecipe) -> None:
    """
    Raises:
        UserError: the library is not installed.
    """
    if recipe.near_duplicates is not None and importlib.util.find_spec("datasketch") is None:
        raise UserError(
            f"corpus.near_duplicates = {recipe.near_duplicates:g} needs the library datasketch: pip install "
            "'hf_genlm[privacy]'"
        )


def find_near_duplicates(
    train: Documents, validation: Documents, threshold: float, on_progress: Progress | None = None
) -> NearDuplicates:
    """Training documents whose similarity to a validation document, or to one before them that stays, is
    `threshold` or more.

    So no two documents that stay are that similar, but for at most MOST_MISSED of the pairs at the threshold
    (more similar ones are missed less often), and each that goes has one that stays. Documents without a word
    stay. Depends on the order of the documents alone. Keeps some 700 bytes a document, and the shingles of
    some documents.
    """
    all_documents = _InOrder(validation, train)
    signatures, has_words = _signatures_of(all_documents, on_progress)
    groups = _groups_of(signatures, has_words, *bands_of(threshold))
    at_least = threshold - _MARGIN * (threshold * (1 - threshold) / PERMUTATIONS) ** 0.5
    members: dict[int, list[int]] = defaultdict(list)  # of each group, those that stay
    kept = np.ones(len(all_documents), dtype=bool)
    copied: set[int] = set()
    n_of_validation = 0
    for i in np.flatnonzero((groups >= 0).any(axis=1)).tolist():
        own = [group for group in groups[i].tolist() if group >= 0]
        twin = None
        if i >= len(validation):
            near = np.array(sorted({j for group in own for j in members[group]}), dtype=np.int64)
            likely = near[(signatures[near] == signatures[i]).mean(axis=1) >= at_least].tolist()
            twin = next((j for j in likely if all_documents.similarity(i, j) >= threshold), None)
        if twin is not None:
            kept[i] = False
            copied.add(twin)
            n_of_validation += twin < len(validation)
            continue
        for group in own:
            members[group].append(i)
    return NearDuplicates(kept[len(validation) :], threshold, len(copied), n_of_validation)


def bands_of(threshold: float) -> tuple[int, int]:
    """(bands, rows of each): the longest bands by which a pair at the threshold t shares one but with
    probability (1 - t^rows)^bands of at most MOST_MISSED."""
    rows = PERMUTATIONS
    while rows > 1 and (1 - threshold**rows) ** (PERMUTATIONS // rows) > MOST_MISSED:
        rows -= 1
    return PERMUTATIONS // rows, rows


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of the shingles of two texts; 0 where one has no word."""
    return _jaccard(*(_unique(_shingles([text])) for text in (one, other)))


def units_of(text: str) -> list[str]:
    """The words of a text without case and punctuation; of scripts that do not part words, its characters."""
    return _UNIT.findall(text.casefold())  # unlike `lower`, the same whatever stands around a character


class _InOrder:
    """The documents of both splits, validation first, and what is known of their shingles."""

    def __init__(self, validation: Documents, train: Documents):
        self.parts = (validation, train)
        self._sets: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def shingles(self) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
        """(number of the document, hashes of its shingles in parts)."""
        first = 0
        for part in self.parts:
            for i, texts in itertools.groupby(part.texts(), key=lambda pair: pair[0]):
                yield first + i, _shingles(text for _, text in texts)
            first += len(part)

    def similarity(self, i: int, j: int) -> float:
        """Of two documents, exactly; very long ones by classes of their hashes, a class at a time."""
        n_classes = 1 + max(self._n_bytes(i), self._n_bytes(j)) // _AT_ONCE
        if n_classes == 1:
            return _jaccard(self._set(i), self._set(j))
        shared = together = 0
        for number in range(n_classes):
            one, other = (_unique(self._of_class(k, number, n_classes)) for k in (i, j))
            n_shared = len(np.intersect1d(one, other, assume_unique=True))
            shared, together = shared + n_shared, together + len(one) + len(other) - n_shared
        return shared / together if together else 0.0

    def _of_class(self, i: int, number: int, n_classes: int) -> Iterator[np.ndarray]:
        for hashes in self._shingles(i):
            yield hashes[hashes % np.uint64(n_classes) == number]

    def _set(self, i: int) -> np.ndarray:
        if i not in self._sets:
            self._sets[i] = _unique(self._shingles(i))
            if len(self._sets) > _KEPT_SETS:
                self._sets.popitem(last=False)
        self._sets.move_to_end(i)
        return self._sets[i]

    def _shingles(self, i: int) -> Iterator[np.ndarray]:
        return _shingles(text for _, text in self._one(i).texts())

    def _n_bytes(self, i: int) -> int:
        return int(self._one(i).n_bytes[0])

    def _one(self, i: int) -> Documents:
        validation, train = self.parts
        part, i = (validation, i) if i < len(validation) else (train, i - len(validation))
        return part[i : i + 1]


def _signatures_of(documents: _InOrder, on_progress: Progress | None) -> tuple[np.ndarray, np.ndarray]:
    """Signatures (documents, PERMUTATIONS) uint32, and which documents have words (documents,) bool."""
    from datasketch import MinHash

    signatures = np.zeros((len(documents), PERMUTATIONS), dtype=np.uint32)
    has_words = np.zeros(len(documents), dtype=bool)
    empty = MinHash(PERMUTATIONS, seed=1, scheme="affine32", hashfunc=_as_it_is)
    for i, parts in documents.shingles():
        minhash = empty.copy()
        for hashes in parts:
            has_words[i] |= len(hashes) > 0
            for start in range(0, len(hashes), _SHINGLES_HASHED):
                minhash.update_batch((hashes[start : start + _SHINGLES_HASHED] >> np.uint64(32)).tolist())
        signatures[i] = minhash.hashvalues
        if on_progress is not None and i % _TOLD_EVERY == 0:
            on_progress(i, len(documents))
    return signatures, has_words


def _groups_of(signatures: np.ndarray, has_words: np.ndarray, n_bands: int, n_rows: int) -> np.ndarray:
    """(documents, bands) int64: documents that agree in a band have one number there, which no other band
    has; -1 where a document is alone. (A table of datasketch's takes kilobytes a document.)"""
    groups = np.full((len(signatures), n_bands), -1, dtype=np.int64)
    n_groups = 0
    for band in range(n_bands):
        rows = signatures[has_words, band * n_rows : (band + 1) * n_rows]
        keys = np.ascontiguousarray(rows).view(np.dtype((np.void, 4 * n_rows)))[:, 0]
        _, number, count = np.unique(keys, return_inverse=True, return_counts=True)
        groups[has_words, band] = np.where(count[number] > 1, n_groups + number, -1)
        n_groups += len(count)
    return groups


def _as_it_is(value: int) -> int:
    return value


def _shingles(parts: Iterable[str]) -> Iterator[np.ndarray]:
    """64-bit hashes of the shingles of the text that `parts` join to, part by part, (n,) uint64 each.

    A text of fewer than SHINGLE units is one shingle, without units none.
    """
    before = np.zeros(0, dtype=np.uint64)
    is_short = True
    for units in _units_of_parts(parts):
        hashes = np.concatenate([before, _hashes_of(units)])
        if len(hashes) >= SHINGLE:
            is_short = False
            yield _runs(hashes, SHINGLE)
        before = hashes if is_short else hashes[len(hashes) - SHINGLE + 1 :]
    if is_short and len(before):
        yield _runs(before, len(before))


def _units_of_parts(parts: Iterable[str]) -> Iterator[list[str]]:
    """The units of the text that `parts` join to; one that a part may have cut waits for the next."""
    begun = ""
    for part in parts:
        text = begun + part
        last = _start_of_last(text)
        yield units_of(text[:last])
        begun = text[last:]
    yield units_of(begun)


def _start_of_last(text: str) -> int:
    """Where the last unit begins; the end, where punctuation stands behind it for long."""
    reach = 256
    while True:
        first = max(0, len(text) - reach)
        starts = [found.start() for found in _UNIT.finditer(text, first)]
        if not starts:
            return len(text)
        if first == 0 or starts[-1] > first:
            return starts[-1]
        reach *= 16  # a unit longer than that


def _hashes_of(units: list[str]) -> np.ndarray:
    known = {
        unit: int.from_bytes(hashlib.blake2b(unit.encode(), digest_size=8).digest(), "little")
        for unit in set(units)
    }
    return np.fromiter(map(known.__getitem__, units), dtype=np.uint64, count=len(units))


def _runs(hashes: np.ndarray, length: int) -> np.ndarray:
    """A hash of each `length` neighbours among n, (n - length + 1,) uint64."""
    n = len(hashes) - length + 1
    mixed = np.zeros(n, dtype=np.uint64)
    for place in range(length):
        mixed = (mixed ^ hashes[place : place + n]) * np.uint64(_FACTOR)
        mixed ^= mixed >> np.uint64(32)
    return mixed


def _unique(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The different hashes, in order."""
    return np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *(np.unique(part) for part in parts)]))


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Of two sets without repeats; 0 where one is empty."""
    if not len(one) or not len(other):
        return 0.0
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
