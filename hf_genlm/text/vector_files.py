"""The vectors of wanted words, out of a file of GloVe's, word2vec's or fastText's format, gzipped or not.

A file is read once, from front to back, and the wanted words alone are kept, so that memory grows with them
and, by 16 bytes a word, with the file. (fastText's binary is the exception: gensim loads it whole.)
"""

from array import array
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.text.damage import DAMAGED
from hf_genlm.text.vector_formats import (
    FORMATS,
    BadEntry,
    Layout,
    decoded,
    fasttext_vectors,
    layout_of,
    reading,
    shown,
    unit_of,
)

_PROGRESS_EVERY = 1 << 14  # words


@dataclass(frozen=True)
class WordVectors:
    """The wanted words of a file.

    `words` gives the row of each in `vectors` (n, D) float32; `n_in_file` counts all entries, damaged ones
    too; `n_skipped` says how many were left out, by reason; `sha256` is of the file as it lies on disk.
    """

    words: dict[str, int]
    vectors: np.ndarray
    n_in_file: int
    n_skipped: dict[str, int]
    sha256: str


def peek_dimension(path: str | Path) -> int:
    """Numbers in each vector of a file, from its beginning.

    Raises:
        UserError: the file is missing, empty or of no known format, or a package for it is.
    """
    return layout_of(Path(path)).dimension


def read_vectors(
    path: str | Path,
    wanted: Container[str],
    damaged: str = "stop",
    on_progress: Callable[[int, int], None] | None = None,
) -> WordVectors:
    """The vectors of the `wanted` words of a file; the whole file is checked.

    `damaged="skip"` leaves out bad entries, and of a word that comes twice all but the first, and counts
    them; a gzip or binary file that is cut short stops the reading even then. `on_progress(done, total)` is
    told bytes on disk.

    Raises:
        UserError: a file that `peek_dimension` refuses, or one that is damaged, with the line or word.
    """
    if damaged not in DAMAGED:
        raise UserError(f"unknown vectors.damaged {damaged!r}{did_you_mean(damaged, DAMAGED)}")
    path = Path(path)
    layout = layout_of(path)
    entries, vector_of = FORMATS[layout.format]
    shelf = _Shelf(path, layout, wanted, damaged)
    total = path.stat().st_size
    with reading(path, layout.is_gzip) as (stream, disk):
        for number, word, payload in entries(stream, layout, path):
            shelf.take(number, word, payload, vector_of)
            if on_progress is not None and number % _PROGRESS_EVERY == 0:
                on_progress(disk.n_bytes, total)
    shelf.check_count()
    shelf.check_duplicates()
    if shelf.n_taken == 0:
        raise UserError(f"{str(path)!r} holds no word that can be used: name another file of word vectors")
    vectors = np.frombuffer(shelf.data, dtype=np.float32).reshape(-1, layout.dimension)
    if layout.format == "fasttext binary":
        vectors = fasttext_vectors(path, layout, list(shelf.words))
    return WordVectors(shelf.words, vectors, shelf.n_seen, dict(shelf.skipped), disk.digest.hexdigest())


class _Shelf:
    """Takes the entries of a file one after the other, keeps the wanted ones, and knows all by their hash."""

    def __init__(self, path: Path, layout: Layout, wanted: Container[str], damaged: str):
        self.path, self.layout, self.wanted, self.damaged = path, layout, wanted, damaged
        self.words: dict[str, int] = {}
        self.data = bytearray()  # the kept vectors, float32
        self.skipped: Counter[str] = Counter()
        self.n_seen = 0  # entries, damaged ones too
        self._hashes, self._numbers = array("q"), array("q")  # of every good entry

    @property
    def n_taken(self) -> int:
        return len(self._hashes)

    def take(self, number: int, word: bytes | None, payload: Any, vector_of: Callable[..., Any]) -> None:
        self.n_seen += 1
        try:
            if word is None:
                raise BadEntry("wrong_dimension", payload)
            text = decoded(word)
            is_wanted = text in self.wanted and text not in self.words
            vector = vector_of(payload, is_wanted)
        except BadEntry as bad:
            self._refuse(number, *bad.args)
            return
        self._hashes.append(hash(word))
        self._numbers.append(number)
        if is_wanted:
            self.words[text] = len(self.words)
            if vector is not None:
                self.data += vector.tobytes()

    def check_count(self) -> None:
        """The header's number of words is the file's."""
        stated = self.layout.n_words
        if stated is None or stated == self.n_seen:
            return
        what = "it is cut short, copy it anew" if self.n_seen < stated else "mend its first line"
        if self.damaged == "stop":
            raise UserError(
                f"{str(self.path)!r} holds {self.n_seen:,} words and its first line says {stated:,}: {what}, "
                "or take it as it is with --set vectors.damaged=skip"
            )
        if self.n_seen < stated:
            self.skipped["missing"] += stated - self.n_seen

    def check_duplicates(self) -> None:
        """No good word comes twice. The file is read again only where two hashes are the same."""
        hashes = np.frombuffer(self._hashes, dtype=np.int64)
        order = np.argsort(hashes, kind="stable")
        follows = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        suspects = np.frombuffer(self._numbers, dtype=np.int64)[order[np.union1d(follows, follows + 1)]]
        if len(suspects) == 0:
            return
        suspected = set(suspects.tolist())
        first: dict[bytes, int] = {}
        entries, _ = FORMATS[self.layout.format]
        with reading(self.path, self.layout.is_gzip) as (stream, _):
            for number, word, _ in entries(stream, self.layout, self.path):
                if word is not None and number in suspected and first.setdefault(word, number) != number:
                    what = f"{shown(word)} stands in {unit_of(self.layout)} {first[word]:,} already"
                    self._refuse(number, "duplicate", what)

    def _refuse(self, number: int, reason: str, what: str) -> None:
        if self.damaged == "stop":
            raise UserError(
                f"{str(self.path)!r}, {unit_of(self.layout)} {number:,}: {what}; copy the file anew, "
                "or leave out what is damaged with --set vectors.damaged=skip"
            )
        self.skipped[reason] += 1
