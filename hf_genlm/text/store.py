"""Append-only document store: texts are written once, as they are read, and read back a part at a time.

A store of more than 64 MB lies in a nameless file, so memory does not grow with the text.
"""

import codecs
import io
import itertools
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, NamedTuple, overload

import numpy as np

from hf_genlm.text.cache import check_room, no_room, scratch_file

CHUNK = 1 << 20  # bytes read or written at once
_SPACE = re.compile(r"\s+")
_LOOK_AHEAD = 1 << 12  # bytes searched for a line end at once
_AT_ONCE = 4096  # documents whose borders are converted to Python at once
_ARRAYS = ("starts", "stops", "characters", "source_ids", "is_chat")  # of Documents
TURN = "\ufdd0"  # begins a message in the text of a chat; Unicode leaves this sign to programs
_CHAT = re.compile(f"{TURN}[^\n{TURN}]+\n")


def chat_text(messages: Iterable[Mapping[str, str]]) -> str:
    """Text of a document that holds the messages of a chat, each {"role", "content"}, in order.

    White space around a content is left out, as by the chat template, and so are messages without content.
    """
    turns = []
    for message in messages:
        role = " ".join(message["role"].replace(TURN, "").lower().split()) or "user"
        content = message["content"].replace(TURN, "\ufffd").strip()
        turns += [f"{TURN}{role}\n{content}"] if content else []
    return "".join(turns)


@dataclass(frozen=True, slots=True)
class Document:
    """One text, exactly as it was read. `source` names its file in messages and is never an absolute path."""

    text: str
    source: str

    @property
    def n_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode("utf-8"))


class Block(NamedTuple):
    """A part of a document: the bytes [start, stop) of its store."""

    document: int
    start: int
    stop: int
    characters: int


class TextStore:
    """Append-only bytes with random access, in memory up to `max_in_memory` and then in a nameless file.

    `chunk_bytes` is how much readers take at once.

    Raises:
        NoRoom: from `append`, before the disk is full: a small compressed file may hold any amount of text.
    """

    max_in_memory = 1 << 26  # bytes
    check_room_every = 1 << 26  # bytes written between two looks at the free space

    def __init__(self, chunk_bytes: int = CHUNK) -> None:
        self.chunk_bytes = chunk_bytes
        self.file: IO[bytes] = io.BytesIO()
        self.n_bytes = 0
        self._checked_to = 0  # the disk has room for so many bytes

    def append(self, content: bytes) -> None:
        n_after = self.n_bytes + len(content)
        try:
            if isinstance(self.file, io.BytesIO) and n_after > self.max_in_memory:
                in_memory, self.file = self.file, scratch_file()
                self.file.write(in_memory.getbuffer())
            if n_after > max(self.max_in_memory, self._checked_to):
                check_room(self.file, self.n_bytes, self.check_room_every + len(content))
                self._checked_to = n_after + self.check_room_every
            self.file.seek(self.n_bytes)
            self.file.write(content)
        except OSError as error:
            raise no_room(error, self.n_bytes) from error
        self.n_bytes = n_after

    def truncate(self, n_bytes: int) -> None:
        self.file.truncate(n_bytes)
        self.n_bytes = n_bytes

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop)."""
        self.file.seek(start)
        return self.file.read(stop - start)


@dataclass(frozen=True, eq=False)
class Documents(Sequence[Document]):
    """n documents of a store, each read when it is indexed.

    Document i is the bytes [starts[i], stops[i]) of `store`, which hold `characters[i]` characters, and comes
    from `sources[source_ids[i]]`; each of these arrays is (n,) int64. `is_chat` (n,) bool is true for a text
    of `chat_text`. Slices and `take` copy no text.
    """

    store: TextStore
    starts: np.ndarray
    stops: np.ndarray
    characters: np.ndarray
    sources: Sequence[str]
    source_ids: np.ndarray
    is_chat: np.ndarray

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
            return self.take(index)
        i = range(len(self))[index]
        text = self.store.read(int(self.starts[i]), int(self.stops[i])).decode("utf-8")
        return Document(text, self.sources[self.source_ids[i]])

    def take(self, indices: np.ndarray | slice) -> "Documents":
        """Documents at `indices`, or where a mask (n,) is true."""
        arrays: dict[str, Any] = {name: getattr(self, name)[indices] for name in _ARRAYS}
        return replace(self, **arrays)

    @staticmethod
    def join(parts: "Sequence[Documents]") -> "Documents":
        """Concatenate documents of one store."""
        first = parts[0]
        assert all(part.store is first.store and part.sources is first.sources for part in parts)
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS
        }
        return replace(first, **arrays)

    def take_blocks(self, blocks: Sequence[Block]) -> "Documents":
        """Each block of these documents as a document of its own."""
        index, starts, stops, characters = np.array(blocks, dtype=np.int64).reshape(-1, 4).T
        return replace(self.take(index), starts=starts, stops=stops, characters=characters)

    def contents(self) -> Iterator[tuple[int, bytes]]:
        """(index of the document, bytes) in order; a document above `chunk_bytes` comes in several parts."""
        chunk = self.store.chunk_bytes
        for first in range(0, len(self), _AT_ONCE):
            starts, stops = (
                values[first : first + _AT_ONCE].tolist() for values in (self.starts, self.stops)
            )
            i = 0
            while i < len(starts):
                j = i + 1
                if stops[i] - starts[i] > chunk:
                    for start in range(starts[i], stops[i], chunk):
                        yield first + i, self.store.read(start, min(start + chunk, stops[i]))
                else:  # one read for all adjacent documents that fit
                    while j < len(starts) and stops[j - 1] <= starts[j] and stops[j] - starts[i] <= chunk:
                        j += 1
                    content = self.store.read(starts[i], stops[j - 1])
                    for k in range(i, j):
                        yield first + k, content[starts[k] - starts[i] : stops[k] - starts[i]]
                i = j

    def texts(self) -> Iterator[tuple[int, str]]:
        """`contents`, decoded."""
        for i, parts in itertools.groupby(self.contents(), key=lambda part: part[0]):
            decoder = codecs.getincrementaldecoder("utf-8")()
            for _, content in parts:
                yield i, decoder.decode(content)

    def count_words(self) -> np.ndarray:
        """Words of each document (n,) int64, as lm-evaluation-harness counts them: `len(re.split(r"\\s+",
        text))`, one more than there are runs of white space."""
        words = np.ones(len(self), dtype=np.int64)
        last, in_space = -1, False
        for i, text in self.texts():
            words[i] += len(_SPACE.findall(text)) - (i == last and in_space and text[:1].isspace())
            if text:
                last, in_space = i, text[-1].isspace()
        return words

    def total_words(self, leave_out: re.Pattern[str] | None = None) -> int:
        """Words of all documents, as `str.split` finds them where a space stands for each `leave_out`."""
        n, before, ends_within = 0, -1, False
        for i, text in self.texts():
            if leave_out is not None and not text.isascii():
                text = leave_out.sub(" ", text)
            n += len(text.split())
            if i == before and ends_within and not text[:1].isspace():  # one word in two parts
                n -= 1
            before, ends_within = i, not text[-1:].isspace()
        return n


def cut_blocks(documents: Documents, index: int, length: int, max_reach: int) -> Iterator[Block]:
    """Cut document `index` into blocks of about `length` characters.

    Each block ends at the first line end behind `length` characters, or exactly there if no line end follows
    within `max_reach` more. A last block shorter than half of `length` is left with its neighbour.
    """
    store, start, stop = documents.store, int(documents.starts[index]), int(documents.stops[index])
    left = int(documents.characters[index])
    while left > 1.5 * length:
        at_least = _skip(store, start, stop, length - 1)  # the last character that must be in it
        end, n_more = _line_end(store, at_least, stop, max_reach + 1)
        if n_more == 0:
            end, n_more = _skip(store, at_least, stop, 1), 1
        yield Block(index, start, end, length - 1 + n_more)
        start, left = end, left - (length - 1 + n_more)
    if left:
        yield Block(index, start, stop, left)


def _skip(store: TextStore, start: int, stop: int, n_characters: int) -> int:
    """Byte at which the character `n_characters` after that at `start` begins; at most `stop`."""
    while n_characters and start < stop:
        # no more bytes than the characters can have
        content = store.read(start, min(stop, start + min(store.chunk_bytes, 4 * n_characters)))
        begins = np.flatnonzero(_begins_character(content))
        if len(begins) > n_characters:
            return start + int(begins[n_characters])
        start, n_characters = start + len(content), n_characters - len(begins)
    while start < stop and not _begins_character(store.read(start, start + 1))[0]:
        start += 1
    return start


def _line_end(store: TextStore, start: int, stop: int, n_characters: int) -> tuple[int, int]:
    """(byte behind the first line end, characters up to and with it) among the next `n_characters`; 0
    characters if there is none."""
    n_passed = 0
    while n_passed < n_characters and start < stop:
        content = store.read(start, min(stop, start + min(store.chunk_bytes, _LOOK_AHEAD)))
        at = content.find(b"\n")
        n_passed += int(_begins_character(content[: at + 1] if at >= 0 else content).sum())
        if at >= 0:
            return (start + at + 1, n_passed) if n_passed <= n_characters else (start, 0)
        start += len(content)
    return start, 0


def _begins_character(content: bytes) -> np.ndarray:
    """Mask (n,) of the bytes of UTF-8 that are the first of a character."""
    return (np.frombuffer(content, dtype=np.uint8) & 0xC0) != 0x80


class DocumentWriter:
    """Builds `Documents` one text at a time."""

    def __init__(self, store: TextStore | None = None) -> None:
        self._store = store or TextStore()
        self._sources: list[str] = []
        self._stops, self._characters, self._source_ids = array("q"), array("q"), array("q")
        self._is_chat = array("b")

    def __len__(self) -> int:
        return len(self._stops)

    def add(self, parts: Iterable[str], source: str, keep_empty: bool = False) -> None:
        """Add the text that `parts` join to; an empty one is dropped unless `keep_empty`."""
        start, characters, is_chat = self._store.n_bytes, 0, False
        for part in parts:
            is_chat = is_chat or (not characters and _CHAT.match(part) is not None)
            self._store.append(part.encode("utf-8"))
            characters += len(part)
        if self._store.n_bytes == start and not keep_empty:
            return
        if not self._sources or self._sources[-1] != source:
            self._sources.append(source)
        self._stops.append(self._store.n_bytes)
        self._characters.append(characters)
        self._source_ids.append(len(self._sources) - 1)
        self._is_chat.append(is_chat)

    def truncate(self, n: int) -> None:
        """Remove all but the first `n` documents, and a document whose `add` was interrupted."""
        self._store.truncate(self._stops[n - 1] if n else 0)
        for values in (self._stops, self._characters, self._source_ids, self._is_chat):
            del values[n:]
        del self._sources[self._source_ids[-1] + 1 if n else 0 :]

    def documents(self) -> Documents:
        """All documents added so far."""
        stops, characters, source_ids = (
            np.array(values, dtype=np.int64) for values in (self._stops, self._characters, self._source_ids)
        )
        starts = np.concatenate([[0], stops[:-1]]).astype(np.int64)[: len(stops)]
        is_chat = np.array(self._is_chat, dtype=bool)
        return Documents(self._store, starts, stops, characters, self._sources, source_ids, is_chat)


def as_documents(documents: Iterable[Document], store: TextStore | None = None) -> Documents:
    """`documents` in a store, empty ones included; `Documents` are returned as they are."""
    if isinstance(documents, Documents):
        return documents
    writer = DocumentWriter(store)
    for document in documents:
        writer.add((document.text,), document.source, keep_empty=True)
    return writer.documents()
