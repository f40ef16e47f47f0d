"""Texts behind one another in one place: written once, as they are read, and read again a part at a time.

Up to 64 MB they stay in memory, more go to a nameless file: memory does not grow with the text.
"""

import codecs
import io
import itertools
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, overload

import numpy as np

from hf_genlm.text.cache import check_room, no_space, scratch_file

CHUNK = 1 << 20  # bytes read or written at once
_IN_MEMORY = 1 << 26  # bytes; a larger text goes to disk
_ROOM_EVERY = 1 << 26  # bytes after which the room on the disk is looked at again
_SPACE = re.compile(r"\s+")
_BLOCK = 4096  # documents whose borders are looked up at once


@dataclass(frozen=True, slots=True)
class Document:
    """One text, exactly as it was read. `source` is shown to people and never an absolute path."""

    text: str
    source: str

    @property
    def n_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode("utf-8"))


class TextStore:
    """UTF-8 bytes that are appended and read by their place. The file goes when nothing refers to it.

    Raises:
        NoRoom: from `append`, before the disk is full: a small compressed file may hold any amount of text.
    """

    def __init__(self) -> None:
        self.file: IO[bytes] = io.BytesIO()
        self.n_bytes = 0
        self._checked_to = 0  # bytes that the disk has room for

    def append(self, content: bytes) -> None:
        """Write `content` behind what is there."""
        try:
            if isinstance(self.file, io.BytesIO) and self.n_bytes + len(content) > _IN_MEMORY:
                in_memory, self.file = self.file, scratch_file()
                self.file.write(in_memory.getbuffer())
            if self.n_bytes + len(content) > max(_IN_MEMORY, self._checked_to):
                check_room(self.file, self.n_bytes, _ROOM_EVERY + len(content))
                self._checked_to = self.n_bytes + len(content) + _ROOM_EVERY
            self.file.seek(self.n_bytes)
            self.file.write(content)
        except OSError as error:
            raise no_space(error, self.n_bytes) from error
        self.n_bytes += len(content)

    def cut(self, n_bytes: int) -> None:
        """Keep the first `n_bytes`."""
        self.file.truncate(n_bytes)
        self.n_bytes = n_bytes

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop)."""
        self.file.seek(start)
        return self.file.read(stop - start)


def spooled(chunks: Iterable[bytes]) -> IO[bytes]:
    """A file to move about in, of the content that `chunks` join to."""
    store = TextStore()
    for content in chunks:
        store.append(content)
    store.file.seek(0)
    return store.file


@dataclass(frozen=True, eq=False)
class Documents(Sequence[Document]):
    """n documents of a store, each read when it is asked for.

    Document i is the bytes [starts[i], stops[i]) of `store`, `characters[i]` of them, and comes from
    `sources[source_ids[i]]`; each array is (n,).
    """

    store: TextStore
    starts: np.ndarray
    stops: np.ndarray
    characters: np.ndarray
    sources: Sequence[str]
    source_ids: np.ndarray

    @property
    def n_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document (n,) int64."""
        return self.stops - self.starts

    @property
    def n_characters(self) -> int:
        """Characters of all documents."""
        return int(self.characters.sum())

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> "Documents": ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        i = range(len(self))[index]
        text = self.store.read(int(self.starts[i]), int(self.stops[i])).decode("utf-8")
        return Document(text, self.sources[self.source_ids[i]])

    def take(self, indices: np.ndarray) -> "Documents":
        """The documents at `indices`, or those where a mask is true."""
        starts, stops, characters, source_ids = (
            values[indices] for values in (self.starts, self.stops, self.characters, self.source_ids)
        )
        return Documents(self.store, starts, stops, characters, self.sources, source_ids)

    @staticmethod
    def join(parts: "Sequence[Documents]") -> "Documents":
        """The documents of parts of one store behind one another."""
        first = parts[0]
        assert all(part.store is first.store and part.sources is first.sources for part in parts)
        joined = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("starts", "stops", "characters", "source_ids")
        )
        starts, stops, characters, source_ids = joined
        return Documents(first.store, starts, stops, characters, first.sources, source_ids)

    def contents(self) -> Iterator[tuple[int, bytes]]:
        """(number of the document, bytes) in order; one longer than `CHUNK` comes in parts."""
        for first, starts, stops in self._neighbours():
            if stops[0] - starts[0] > CHUNK:
                for start in range(starts[0], stops[0], CHUNK):
                    yield first, self.store.read(start, min(start + CHUNK, stops[0]))
                continue
            content = self.store.read(starts[0], stops[-1])
            for i, (start, stop) in enumerate(zip(starts, stops, strict=True), first):
                yield i, content[start - starts[0] : stop - starts[0]]

    def texts(self) -> Iterator[tuple[int, str]]:
        """As `contents`, decoded."""
        for i, parts in itertools.groupby(self.contents(), key=lambda part: part[0]):
            decoder = codecs.getincrementaldecoder("utf-8")()
            for _, content in parts:
                yield i, decoder.decode(content)

    def count_words(self) -> np.ndarray:
        """(n,) int64: one more than there are runs of white space, as lm-evaluation-harness counts the words
        of each text (`len(re.split(r"\\s+", text))`)."""
        words = np.ones(len(self), dtype=np.int64)
        last, in_space = -1, False
        for i, text in self.texts():
            words[i] += len(_SPACE.findall(text)) - (i == last and in_space and text[:1].isspace())
            if text:
                last, in_space = i, text[-1].isspace()
        return words

    def total_words(self) -> int:
        """Words between white space, as `str.split` has them, of all documents."""
        n, before, ends_within = 0, -1, False
        for i, text in self.texts():
            n += len(text.split())
            if i == before and ends_within and not text[:1].isspace():  # one word in two parts
                n -= 1
            before, ends_within = i, not text[-1:].isspace()
        return n

    def _neighbours(self) -> Iterator[tuple[int, list[int], list[int]]]:
        """(first document, starts, stops) of documents that one read of at most `CHUNK` bytes gets, or of a
        single longer one."""
        for first in range(0, len(self), _BLOCK):
            starts, stops = (values[first : first + _BLOCK].tolist() for values in (self.starts, self.stops))
            i = 0
            while i < len(starts):
                j = i + 1
                while j < len(starts) and stops[j - 1] <= starts[j] and stops[j] - starts[i] <= CHUNK:
                    j += 1
                yield first + i, starts[i:j], stops[i:j]
                i = j


class DocumentWriter:
    """Takes documents in, one after the other."""

    def __init__(self) -> None:
        self._store = TextStore()
        self._sources: list[str] = []
        self._stops, self._characters, self._source_ids = array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._stops)

    def add(self, parts: Iterable[str], source: str) -> bool:
        """Take in the text that `parts` join to; False, and nothing is added, if it is empty."""
        start, characters = self._store.n_bytes, 0
        for part in parts:
            self._store.append(part.encode("utf-8"))
            characters += len(part)
        if self._store.n_bytes == start:
            return False
        if not self._sources or self._sources[-1] != source:
            self._sources.append(source)
        self._stops.append(self._store.n_bytes)
        self._characters.append(characters)
        self._source_ids.append(len(self._sources) - 1)
        return True

    def keep(self, n: int) -> None:
        """Let go of all but the first `n` documents, and of one that was begun."""
        self._store.cut(self._stops[n - 1] if n else 0)
        for values in (self._stops, self._characters, self._source_ids):
            del values[n:]
        del self._sources[self._source_ids[-1] + 1 if n else 0 :]

    def documents(self) -> Documents:
        """All that was taken in."""
        stops, characters, source_ids = (
            np.array(values, dtype=np.int64) for values in (self._stops, self._characters, self._source_ids)
        )
        starts = np.concatenate([[0], stops[:-1]]).astype(np.int64)[: len(stops)]
        return Documents(self._store, starts, stops, characters, self._sources, source_ids)


def as_documents(documents: Iterable[Document]) -> Documents:
    """Documents in a store; those that lie in one already are given back."""
    if isinstance(documents, Documents):
        return documents
    writer = DocumentWriter()
    empty: list[int] = []
    for document in documents:
        if not writer.add((document.text,), document.source):
            empty.append(len(writer) + len(empty))
    found = writer.documents()
    if not empty:
        return found
    # empty ones are no part of a corpus, but a caller's list keeps its numbers
    where = np.zeros(len(found) + len(empty), dtype=bool)
    where[empty] = True
    starts, stops, characters = (
        _spread(values, ~where) for values in (found.starts, found.stops, found.characters)
    )
    source_ids = _spread(found.source_ids, ~where, len(found.sources))
    return Documents(found.store, starts, stops, characters, [*found.sources, ""], source_ids)


def _spread(values: np.ndarray, where: np.ndarray, other: int = 0) -> np.ndarray:
    """`values` at the places that `where` (n,) marks, `other` elsewhere."""
    spread = np.full(len(where), other, dtype=np.int64)
    spread[where] = values
    return spread
