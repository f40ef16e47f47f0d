"""Find documents that are equal, or nearly equal, to another one, and held-out text that training has too.

The similarity of two documents is the Jaccard similarity of their shingles, runs of five words: shared ones
over all. MinHash signatures in bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3)
name candidates, so that not every pair is compared; a candidate is a near-duplicate only if its exact
similarity is high enough.
"""

import hashlib
import importlib.util
import itertools
import re
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError, install_command
from hf_genlm.text.store import Documents

Progress = Callable[[int, int], None]

SHINGLE = 5  # units in a row
PERMUTATIONS = 128  # of a signature: 4 bytes each
MAX_MISS_RATE = 1e-3  # of the pairs whose similarity is exactly the threshold
_SHINGLES_HASHED = 1 << 14  # at once, by all permutations
_PROGRESS_EVERY = 256  # documents
_CACHE_BYTES = 1 << 28  # of the shingle hashes of recently compared documents
MAX_MEMBERS = 256  # latest documents of a group that a document is compared with, by signature
MAX_COMPARED = 32  # documents of the most similar signatures whose shingles are compared
_MAX_UNIT = 1 << 13  # characters: a longer word may be cut
_FACTOR = 0x9E3779B97F4A7C15  # odd: multiplication by it is invertible
RUN = 64  # bytes of UTF-8 in a row, without case, spaces and punctuation of ASCII
COPY_SHARE = 0.8  # of the runs of a document that is a copy of others
_LETTERS_AT_ONCE = 1 << 16  # bytes
_MAX_RUNS = 1 << 15  # runs that are compared, about: of a longer text, a sample of them
_LOWER = bytes.maketrans(bytes(range(65, 91)), bytes(range(97, 123)))
_DROPPED = bytes(code for code in range(128) if not chr(code).isalnum())

# scripts without spaces between words, where a unit is a character: Thai, Lao, Tibetan, Burmese, Khmer, kana,
# bopomofo and Han
_UNSPACED = (
    "\u0e01-\u0e4e\u0e81-\u0ecd\u0f00-\u0fbc\u1000-\u104f\u1780-\u17d3\u3005-\u3007\u3041-\u30ff\u3105-\u312f"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9fe\uaa60-\uaa7f\uf900-\ufaff\U0001b000-\U0001b16f"
    "\U00020000-\U0003ffff"
)
# white space and punctuation
_SIGNS = (
    r"\s!-/:-@\[-`{-~\u00a1\u00ab\u00b7\u00bb\u00bf\u060c\u061b\u061f\u06d4\u0964\u0965\u2000-\u206f"
    r"\u3000-\u3003\u3008-\u3020\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_UNIT = re.compile(rf"[{_UNSPACED}]|[^{_SIGNS}{_UNSPACED}]+")


def digests(documents: Documents) -> Iterator[bytes]:
    """sha256 of each text."""
    for _, parts in itertools.groupby(documents.contents(), key=lambda part: part[0]):
        digest = hashlib.sha256()
        for _, content in parts:
            digest.update(content)
        yield digest.digest()


def find_in(documents: Documents, others: Documents) -> np.ndarray:
    """Mask (n,) of the documents whose text is that of one of `others`."""
    # texts of different lengths differ: most documents need not be read
    alike = np.flatnonzero(np.isin(documents.n_bytes, others.n_bytes))
    found = np.zeros(len(documents), dtype=bool)
    if len(alike):
        texts = set(digests(others.take(np.isin(others.n_bytes, documents.n_bytes[alike]))))
        found[alike] = [digest in texts for digest in digests(documents.take(alike))]
    return found


def share_found(held_out: Documents, train: Documents) -> float | None:
    """Share of the runs of `held_out` that stand in `train` too; None if it has no text of that length."""
    n_skipped = _sampling(held_out)
    none = np.zeros(0, dtype=np.uint64)
    runs, count = np.unique(np.concatenate([none, *_runs(held_out, n_skipped)]), return_counts=True)
    if not len(runs):
        return None
    is_found = np.zeros(len(runs), dtype=bool)
    for part in _runs(train, n_skipped):
        place = np.minimum(np.searchsorted(runs, part), len(runs) - 1)
        is_found[place[runs[place] == part]] = True
    return round(float(count[is_found].sum() / count.sum()), 4)


def find_copies(documents: Documents) -> np.ndarray:
    """Mask (n,) of the documents of which longer ones, or earlier ones of equal length, hold most."""
    order, n_skipped = np.argsort(-documents.n_bytes, kind="stable"), _sampling(documents, 64 * _MAX_RUNS)
    none = np.zeros(0, dtype=np.uint64)
    runs = [np.unique(np.concatenate([none, *_runs(documents[i : i + 1], n_skipped)])) for i in order]
    rank = np.repeat(np.arange(len(runs)), [len(part) for part in runs])
    _, first, number = np.unique(np.concatenate([none, *runs]), return_index=True, return_inverse=True)
    n_known = np.bincount(rank[rank[first][number] < rank], minlength=len(runs))
    is_copy = np.zeros(len(documents), dtype=bool)
    is_copy[order] = n_known >= np.maximum(1, COPY_SHARE * np.array([len(part) for part in runs]))
    return is_copy


def _sampling(documents: Documents, max_runs: int = _MAX_RUNS) -> int:
    """Number of runs, a power of two, of which one is compared."""
    return 1 << max(0, int(documents.n_bytes.sum()) // max_runs).bit_length()


def _runs(documents: Documents, n_skipped: int) -> Iterator[np.ndarray]:
    """Hashes of the runs of each document, in parts (n,) uint64: about one in `n_skipped`, by the hash."""

    def hashed(content: bytes) -> np.ndarray:
        codes = np.frombuffer(content, dtype=np.uint8)
        hashes = codes.astype(np.uint64)
        width = 1
        while width < RUN:  # of twice as many bytes each time
            hashes = (hashes[:-width] ^ hashes[:-width] >> np.uint64(29)) * np.uint64(_FACTOR) + hashes[
                width:
            ]
            width *= 2
        hashes = (hashes ^ hashes >> np.uint64(32)) * np.uint64(_FACTOR)
        n_ends = np.concatenate([[0], np.cumsum(codes == 0)])  # of documents
        is_taken = (hashes >> np.uint64(40) & np.uint64(n_skipped - 1)) == 0
        return hashes[is_taken & (n_ends[RUN:] == n_ends[:-RUN])]

    begun, last = bytearray(), 0
    for i, content in documents.contents():
        begun += b"\0" * (i != last) + content.translate(_LOWER, _DROPPED)
        last = i
        if len(begun) > _LETTERS_AT_ONCE:
            yield hashed(bytes(begun))
            del begun[: len(begun) - RUN + 1]
    if len(begun) >= RUN:
        yield hashed(bytes(begun))


@dataclass(frozen=True)
class NearDuplicates:
    """Mask `kept` (n,) of the training documents that stay, and counts of the near-duplicates."""

    kept: np.ndarray
    threshold: float
    clusters: int  # documents that have near-duplicates
    of_validation: int  # training documents that are near-duplicates of a validation document

    def to_json(self) -> dict[str, Any]:
        """Value of `near_duplicates` in corpus.json."""
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
        UserError: the recipe asks for near-duplicates and the library is not installed.
    """
    if recipe.near_duplicates is not None and importlib.util.find_spec("datasketch") is None:
        raise UserError(
            f"corpus.near_duplicates = {recipe.near_duplicates:g} needs the library datasketch: "
            + install_command("privacy")
        )


def find_near_duplicates(
    train: Documents,
    validation: Documents,
    threshold: float,
    on_progress: Progress | None = None,
    *,
    bands: tuple[int, int] | None = None,
    margin: float = 5.0,
) -> NearDuplicates:
    """Find training documents whose similarity to a validation document, or to an earlier training document
    that stays, is at least `threshold`.

    So no two documents that stay are that similar, except for at most MAX_MISS_RATE of the pairs at the
    threshold (more similar pairs are missed less often). Documents without a word stay. The result depends on
    the order of the documents only. Memory: some 700 bytes a document, and 256 MB of shingles.

    Time is linear in the text, also where all documents share most of their text: of the documents that share
    a band with a document and stay, the first MAX_MEMBERS validation documents and the last MAX_MEMBERS
    training documents of each band are compared by signature, and the MAX_COMPARED most similar by shingles.

    Args:
        on_progress: called with (documents hashed, all documents).
        bands: (bands, rows) of the signatures; `bands_of(threshold)` if None.
        margin: standard errors that the similarity of two signatures may lie below the threshold.
    """
    documents = ShingledDocuments(validation, train)
    signatures, has_words = _signatures_of(documents, on_progress)
    groups = _groups_of(signatures, has_words, *(bands or bands_of(threshold)))
    min_likeness = threshold - margin * (threshold * (1 - threshold) / PERMUTATIONS) ** 0.5
    # of both splits: group -> its documents that stay
    members: list[dict[int, deque[int]]] = [defaultdict(lambda: deque(maxlen=MAX_MEMBERS)) for _ in range(2)]
    kept = np.ones(len(documents), dtype=bool)
    copied: set[int] = set()
    n_of_validation = 0
    for i in np.flatnonzero((groups >= 0).any(axis=1)).tolist():
        own = [group for group in groups[i].tolist() if group >= 0]
        twin = None
        if i >= len(validation):
            near = np.array(sorted({j for g in own for s in members for j in s.get(g, ())}), dtype=np.int64)
            likeness = (signatures[near] == signatures[i]).mean(axis=1)
            most_similar = np.sort(np.argsort(-likeness, kind="stable")[:MAX_COMPARED])
            likely = near[most_similar[likeness[most_similar] >= min_likeness]].tolist()
            twin = next((j for j in likely if documents.similarity(i, j) >= threshold), None)
        if twin is None:
            split = members[i >= len(validation)]
            for group in own:
                if i >= len(validation) or len(split[group]) < MAX_MEMBERS:
                    split[group].append(i)
        else:
            kept[i] = False
            copied.add(twin)
            n_of_validation += twin < len(validation)
    return NearDuplicates(kept[len(validation) :], threshold, len(copied), n_of_validation)


def bands_of(threshold: float) -> tuple[int, int]:
    """(bands, rows of each): the longest bands with which a pair at the threshold t shares no band with a
    probability (1 - t^rows)^bands of at most MAX_MISS_RATE."""
    rows = PERMUTATIONS
    while rows > 1 and (1 - threshold**rows) ** (PERMUTATIONS // rows) > MAX_MISS_RATE:
        rows -= 1
    return PERMUTATIONS // rows, rows


class ShingledDocuments:
    """Shingle hashes of the documents of both splits, numbered with the validation split first.

    Of a document of more than `max_shingles` distinct shingles, those of the least hashes are compared, a
    random sample: the standard error of a similarity is at most 0.001 (k minimum values, Bar-Yossef et al.,
    Counting Distinct Elements in a Data Stream, 2002).
    """

    def __init__(
        self,
        validation: Documents,
        train: Documents,
        max_shingles: int = 1 << 18,
        cache_bytes: int = _CACHE_BYTES,
    ):
        self.splits, self.max_shingles, self.cache_bytes = (validation, train), max_shingles, cache_bytes
        self._sets: OrderedDict[int, np.ndarray] = OrderedDict()
        self._n_bytes = 0  # of the sets

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    def __iter__(self) -> Iterator[Iterator[np.ndarray]]:
        """Hashes of each document's shingles, in parts, not deduplicated."""
        for split in self.splits:
            for _, texts in itertools.groupby(split.texts(), key=lambda pair: pair[0]):
                yield shingles_of(text for _, text in texts)

    def similarity(self, i: int, j: int) -> float:
        """Jaccard similarity of two documents; 0 if one has no word."""
        one, other = self.hashes(i), self.hashes(j)
        shared = np.intersect1d(one, other, assume_unique=True)
        together = len(one) + len(other) - len(shared)
        if max(len(one), len(other)) == self.max_shingles:
            sample = np.union1d(one, other)[: self.max_shingles]
            shared, together = shared[shared <= sample[-1]], len(sample)
        return len(shared) / together if together else 0.0

    def hashes(self, i: int) -> np.ndarray:
        """The `max_shingles` least distinct hashes of document i, sorted, (n,) uint64."""
        if i in self._sets:
            self._sets.move_to_end(i)
            return self._sets[i]
        distinct = np.zeros(0, dtype=np.uint64)
        for part in shingles_of(text for _, text in self._document(i).texts()):
            distinct = np.unique(np.concatenate([distinct, part]))[: self.max_shingles]
        self._sets[i] = distinct = distinct.copy()
        self._n_bytes += distinct.nbytes
        while self._n_bytes > self.cache_bytes and len(self._sets) > 1:
            self._n_bytes -= self._sets.popitem(last=False)[1].nbytes
        return distinct

    def _document(self, i: int) -> Documents:
        validation, train = self.splits
        split, i = (validation, i) if i < len(validation) else (train, i - len(validation))
        return split[i : i + 1]


def _signatures_of(
    documents: ShingledDocuments, on_progress: Progress | None
) -> tuple[np.ndarray, np.ndarray]:
    """Signatures (documents, PERMUTATIONS) uint32, and the mask (documents,) of those that have words."""
    from datasketch import MinHash

    signatures = np.zeros((len(documents), PERMUTATIONS), dtype=np.uint32)
    has_words = np.zeros(len(documents), dtype=bool)
    empty = MinHash(PERMUTATIONS, seed=1, scheme="affine32", hashfunc=int)
    for i, parts in enumerate(documents):
        minhash = empty.copy()
        for hashes in parts:
            has_words[i] |= len(hashes) > 0
            for start in range(0, len(hashes), _SHINGLES_HASHED):
                minhash.update_batch((hashes[start : start + _SHINGLES_HASHED] >> np.uint64(32)).tolist())
        signatures[i] = minhash.hashvalues
        if on_progress is not None and i % _PROGRESS_EVERY == 0:
            on_progress(i, len(documents))
    return signatures, has_words


def _groups_of(signatures: np.ndarray, has_words: np.ndarray, n_bands: int, n_rows: int) -> np.ndarray:
    """Group numbers (documents, bands) int64: documents that agree in a band share a number, which no other
    band has; -1 for a document that is alone. (datasketch's MinHashLSH takes kilobytes a document.)"""
    groups = np.full((len(signatures), n_bands), -1, dtype=np.int64)
    n_groups = 0
    for band in range(n_bands):
        rows = signatures[has_words, band * n_rows : (band + 1) * n_rows]
        keys = np.ascontiguousarray(rows).view(np.dtype((np.void, 4 * n_rows)))[:, 0]
        _, number, count = np.unique(keys, return_inverse=True, return_counts=True)
        groups[has_words, band] = np.where(count[number] > 1, n_groups + number, -1)
        n_groups += len(count)
    return groups


def shingles_of(parts: Iterable[str]) -> Iterator[np.ndarray]:
    """Hash the shingles of the text that `parts` join to, part by part, (n,) uint64 each.

    A text of fewer than SHINGLE units is one shingle, a text without units has none.
    """
    before = np.zeros(0, dtype=np.uint64)
    is_short = True
    for units in _units_of_parts(parts):
        known = {
            unit: int.from_bytes(hashlib.blake2b(unit.encode(), digest_size=8).digest(), "little")
            for unit in set(units)
        }
        hashes = np.fromiter(map(known.__getitem__, units), dtype=np.uint64, count=len(units))
        hashes = np.concatenate([before, hashes])
        if len(hashes) >= SHINGLE:
            is_short = False
            yield _hash_runs(hashes, SHINGLE)
        before = hashes if is_short else hashes[len(hashes) - SHINGLE + 1 :]
    if is_short and len(before):
        yield _hash_runs(before, len(before))


def _hash_runs(hashes: np.ndarray, length: int) -> np.ndarray:
    """Hash each run of `length` neighbours among n, (n - length + 1,) uint64."""
    n = len(hashes) - length + 1
    mixed = np.zeros(n, dtype=np.uint64)
    for place in range(length):
        mixed = (mixed ^ hashes[place : place + n]) * np.uint64(_FACTOR)
        mixed ^= mixed >> np.uint64(32)
    return mixed


def units_of(text: str) -> list[str]:
    """Words of a text without case and punctuation; characters in scripts without spaces between words."""
    return _UNIT.findall(text.casefold())  # unlike `lower`, it does not depend on neighbouring characters


def _units_of_parts(parts: Iterable[str]) -> Iterator[list[str]]:
    """Units of the text that `parts` join to; a unit at the end of a part waits for the next part, unless it
    is longer than _MAX_UNIT."""
    begun = ""
    for part in parts:
        text = begun + part
        last = _start_of_last(text)
        last = last if len(text) - last <= _MAX_UNIT else len(text)
        yield units_of(text[:last])
        begun = text[last:]
    yield units_of(begun)


def _start_of_last(text: str) -> int:
    """Start of the last unit; the end, if only punctuation is found there."""
    reach = 256
    while True:
        first = max(0, len(text) - reach)
        starts = [found.start() for found in _UNIT.finditer(text, first)]
        if not starts:
            return len(text)
        if first == 0 or starts[-1] > first:
            return starts[-1]
        reach *= 16  # the unit is longer than that
