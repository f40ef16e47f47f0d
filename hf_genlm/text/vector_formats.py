"""How files of word vectors are built: which format one has, and the entries of each.

A new format is a generator of its entries, a row of FORMATS, and the bytes by which `layout_of` knows it.
"""

import gzip
import hashlib
import importlib.util
import io
import os
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.text.cache import check_room

_HEAD_BYTES = 1 << 18  # looked at to tell the format
_HEAD_LINES = 100  # whose commonest length gives the dimension where no header does
_CHUNK = 1 << 20
_MAX_LINE_BYTES = 1 << 20
_MAX_WORD_BYTES = 1 << 12
_MAX_DIMENSION = 1 << 14
_GZIP = b"\x1f\x8b"
_ZIP = b"PK\x03\x04"
_FASTTEXT = struct.pack("<i", 793712314)
_NUMBER_BYTES = b"0123456789+-.eE"
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r")) + b"\x7f"
_NON_ASCII = bytes(range(128, 256))

# (line or word number, the word or None where the entry has not the right length, what stands behind it)
Entry = tuple[int, bytes | None, Any]


@dataclass(frozen=True)
class Layout:
    format: str  # a row of FORMATS
    dimension: int
    n_words: int | None  # as the file itself states it
    is_gzip: bool


class BadEntry(ValueError):
    """One entry that cannot be used: `args` are the reason's name and its words."""


def layout_of(path: Path) -> Layout:
    """
    Raises:
        UserError: nothing that can be read lies at `path`.
    """
    name = repr(str(path))
    if not path.is_file():
        raise UserError(
            f"vectors.path = {name} is no file: name one of word vectors, such as glove.6B.50d.txt"
        )
    with reading(path, False) as (stream, _):
        is_gzip = stream.read(2) == _GZIP
    with reading(path, is_gzip) as (stream, _):
        head = stream.read(_HEAD_BYTES)
    if not head:
        raise UserError(f"{name} is empty: name a file of word vectors")
    if head.startswith(_ZIP):
        raise UserError(f"{name} is a zip archive, which may hold many files: unpack it and name one")
    if head.startswith(_FASTTEXT):
        if importlib.util.find_spec("gensim") is None:
            raise UserError(
                f"{name} is a fastText model, which gensim reads: pip install 'hf_genlm[vectors]'"
            )
        if len(head) < 12:
            raise UserError(f"{name} is cut short in its header: copy it anew")
        (dimension,) = struct.unpack_from("<i", head, 8)
        return _checked(name, Layout("fasttext binary", dimension, None, is_gzip))
    first, _, rest = head.partition(b"\n")
    fields = first.split()
    if len(fields) == 2 and all(field.isdigit() and len(field) <= 12 for field in fields):
        n_words, dimension = map(int, fields)
        kind = "word2vec binary" if _is_binary(rest, dimension) else "text"
        return _checked(name, Layout(kind, dimension, n_words, is_gzip))
    if b"\0" in head:
        raise UserError(
            f"{name} is binary and neither word2vec's nor fastText's: name a file of word vectors"
        )
    lines = head.split(b"\n")[:_HEAD_LINES]
    whole = lines[:-1] if len(lines) > 1 and len(lines) < _HEAD_LINES else lines
    lengths = Counter(len(line.split()) - 1 for line in whole if line.strip())
    dimension = lengths.most_common(1)[0][0] if lengths else 0  # of equally many, that of the first line
    return _checked(name, Layout("text", dimension, None, is_gzip))


def _checked(name: str, layout: Layout) -> Layout:
    if not 1 <= layout.dimension <= _MAX_DIMENSION:
        raise UserError(
            f"{name} would hold vectors of {layout.dimension:,} numbers, not 1 to {_MAX_DIMENSION:,}: "
            "name a file of word vectors, a word and its numbers on each line"
        )
    return layout


def _is_binary(rest: bytes, dimension: int) -> bool:
    """True if bytes that no line of numbers has follow the first word after a header."""
    _, _, behind = rest[: _MAX_WORD_BYTES + max(512, 4 * dimension)].partition(b" ")
    behind = behind[: max(512, 4 * dimension)]
    numbers = behind.partition(b"\n")[0]
    return len(behind) != len(behind.translate(None, _CONTROLS)) or not numbers.isascii()


class _Disk(io.RawIOBase):
    """A file as it lies on disk, with the digest and the number of the bytes that were read."""

    def __init__(self, path: Path):
        self._file = path.open("rb", buffering=0)
        self.digest = hashlib.sha256()
        self.n_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._file.readinto(buffer) or 0
        self.digest.update(memoryview(buffer)[:n])
        self.n_bytes += n
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def reading(path: Path, is_gzip: bool) -> Iterator[tuple[BinaryIO, _Disk]]:
    """(the content, the file on disk).

    Raises:
        UserError: the file cannot be opened, or is no whole gzip file.
    """
    try:
        with _Disk(path) as disk:
            stream: Any = io.BufferedReader(disk, _CHUNK)
            if is_gzip:
                stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), _CHUNK)
            yield stream, disk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{str(path)!r} is not readable as gzip ({' '.join(str(error).split())}): "
            "it is cut short or damaged, copy it anew"
        ) from error
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror}): name a readable file") from error


def _text_entries(stream: BinaryIO, layout: Layout, path: Path) -> Iterator[Entry]:
    """One a line: the word, which may hold spaces, and D numbers."""
    dimension, number = layout.dimension, 0
    if layout.n_words is not None:
        stream.readline()
        number = 1
    while line := stream.readline(_MAX_LINE_BYTES):
        number += 1
        ends = line.endswith(b"\n")
        if not ends and len(line) == _MAX_LINE_BYTES:
            raise UserError(
                f"{str(path)!r}, line {number:,}, has more than {_MAX_LINE_BYTES:,} bytes: "
                "name a file of word vectors, a word and its numbers on each line"
            )
        fields = line.split()
        n_more = len(fields) - 1 - dimension
        if n_more == 0:
            yield number, fields[0], fields[1:]
        elif n_more > 0 and not _is_number(fields[n_more]):
            yield number, line.rsplit(None, dimension)[0].strip(), fields[n_more + 1 :]
        else:
            what = f"it holds {max(0, len(fields) - 1):,} numbers, not {dimension:,}"
            yield number, None, what if ends else f"the file is cut short in this line: {what}"


def _text_vector(fields: list[bytes], is_wanted: bool) -> np.ndarray | None:
    """(D,) float32; of a word that nobody wants only the characters are looked at."""
    if b"".join(fields).translate(None, _NUMBER_BYTES):
        bad = next(field for field in fields if field.translate(None, _NUMBER_BYTES))
        raise BadEntry(
            "not_finite" if _is_number(bad) else "not_a_number", f"{shown(bad)} is no finite number"
        )
    if not is_wanted:
        return None
    try:
        with np.errstate(over="ignore"):
            vector = np.array([float(field) for field in fields]).astype(np.float32)
    except ValueError as error:
        bad = next(field for field in fields if not _is_number(field))
        raise BadEntry("not_a_number", f"{shown(bad)} is no finite number") from error
    return _finite(vector)


def _binary_entries(stream: BinaryIO, layout: Layout, path: Path) -> Iterator[Entry]:
    """word2vec's: the word, a space, D float32, and sometimes a line end."""
    stream.readline()
    cursor = _Cursor(stream, path)
    for number in range(1, layout.n_words + 1):  # type: ignore[operator]  # its header was read
        word = cursor.until(b" ", number)
        yield number, word.lstrip(b"\n"), cursor.exactly(4 * layout.dimension, number)
    if cursor.rest().strip(b"\n"):
        raise UserError(
            f"{str(path)!r} goes on after the {layout.n_words:,} words that its first line says: "
            "it is damaged, copy it anew"
        )


def _binary_vector(payload: bytes, is_wanted: bool) -> np.ndarray:
    return _finite(np.frombuffer(payload, dtype="<f4").astype(np.float32, copy=False))


def _fasttext_entries(stream: BinaryIO, layout: Layout, path: Path) -> Iterator[Entry]:
    """The dictionary of a fastText model; what follows is walked through, so that none of it is missing."""
    cursor = _Cursor(stream, path)
    cursor.exactly(64, 0)  # magic, version, and the settings of its training
    n_words, _, n_labels, _, n_pruned = struct.unpack("<3i2q", cursor.exactly(28, 0))
    if n_labels > 0:
        raise UserError(f"{str(path)!r} is a fastText classifier: name a model of word vectors")
    for number in range(1, n_words + 1):
        word = cursor.until(b"\0", number)
        cursor.exactly(9, number)  # its count and type
        yield number, word, None
    cursor.skip(8 * max(0, n_pruned), n_words)
    for _ in ("input", "output"):
        is_quantised, n_rows, n_columns = struct.unpack("<?2q", cursor.exactly(17, n_words))
        if is_quantised:
            raise UserError(f"{str(path)!r} is a quantised fastText model: name the .bin it was made from")
        cursor.skip(4 * max(0, n_rows) * max(0, n_columns), n_words)
    cursor.rest()


def fasttext_vectors(path: Path, layout: Layout, words: list[str]) -> np.ndarray:
    """(n, D) float32: of each word the mean of its own vector and those of its n-grams."""
    from gensim.models.fasttext import load_facebook_vectors

    with tempfile.TemporaryDirectory() as folder:
        plain = path
        if layout.is_gzip:
            plain = Path(folder) / "model.bin"  # gensim knows gzip by the suffix, and reads it slowly
            with reading(path, True) as (stream, _), plain.open("wb") as file:
                while content := stream.read(_CHUNK):
                    check_room(file, file.tell(), len(content))
                    file.write(content)
        try:
            loaded = load_facebook_vectors(os.fspath(plain))
            rows = [loaded.key_to_index[word] for word in words]
        except Exception as error:  # gensim asserts, and raises what its parts raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"{str(path)!r} is not readable as a fastText model ({reason}): copy it anew"
            ) from error
    vectors = np.asarray(loaded.vectors[rows], dtype=np.float32).reshape(len(rows), layout.dimension)
    for word, vector in zip(words, vectors, strict=True):
        if not np.isfinite(vector).all():
            raise UserError(f"{str(path)!r}: the vector of {word!r} is not finite: copy the file anew")
    return vectors


class _Cursor:
    """Words up to a mark, and pieces of a known length, out of a stream."""

    def __init__(self, stream: BinaryIO, path: Path):
        self.stream, self.path = stream, path
        self._buffer, self._at = b"", 0

    def until(self, mark: bytes, number: int) -> bytes:
        self._fill(_MAX_WORD_BYTES + 1)
        end = self._buffer.find(mark, self._at, self._at + _MAX_WORD_BYTES + 1)
        if end < 0 and len(self._buffer) - self._at > _MAX_WORD_BYTES:
            raise UserError(
                f"{str(self.path)!r}, word {number:,}, has more than {_MAX_WORD_BYTES:,} bytes: "
                "the file is damaged, copy it anew"
            )
        word = self.exactly((end if end >= 0 else len(self._buffer) + 1) - self._at, number)
        self._at += 1
        return word

    def exactly(self, n: int, number: int) -> bytes:
        self._fill(n)
        if len(self._buffer) - self._at < n:
            where = f"word {number:,}" if number else "its header"
            raise UserError(f"{str(self.path)!r} is cut short in or after {where}: copy it anew")
        self._at += n
        return self._buffer[self._at - n : self._at]

    def skip(self, n: int, number: int) -> None:
        while n > 0:
            self.exactly(min(n, _CHUNK), number)
            n -= _CHUNK

    def rest(self) -> bytes:
        """Up to a chunk of what is left; all of it is read."""
        left = self._buffer[self._at :] or self.stream.read(_CHUNK)
        while self.stream.read(_CHUNK):
            pass
        return left

    def _fill(self, n: int) -> None:
        if len(self._buffer) - self._at < n:
            self._buffer = self._buffer[self._at :] + self.stream.read(max(_CHUNK, n))
            self._at = 0


def _finite(vector: np.ndarray) -> np.ndarray:
    if not np.isfinite(vector).all():
        bad = vector[~np.isfinite(vector)][0]
        raise BadEntry("not_finite", f"{bad} is no finite number")
    return vector


def decoded(word: bytes) -> str:
    try:
        return word.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadEntry("not_utf8", f"the word {shown(word)} is not UTF-8") from error


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def shown(word: bytes) -> str:
    return repr(word.decode("utf-8", errors="backslashreplace")[:60])


def unit_of(layout: Layout) -> str:
    return "line" if layout.format == "text" else "word"


# format: (its entries, the vector of an entry)
FORMATS: dict[str, tuple[Callable[..., Iterator[Entry]], Callable[..., np.ndarray | None]]] = {
    "text": (_text_entries, _text_vector),
    "word2vec binary": (_binary_entries, _binary_vector),
    "fasttext binary": (_fasttext_entries, lambda payload, is_wanted: None),
}
