"""Read the vectors of wanted words from a file in the format of GloVe, word2vec or fastText, gzipped or not.

A file is read front to back and only the wanted vectors are kept, so that memory grows with the wanted words
and by 16 bytes per word of the file. A new format is a generator of entries, a row of FORMATS, and the first
bytes by which `_layout_of` recognises it.
"""

import gzip
import hashlib
import importlib.util
import io
import os
import struct
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hf_genlm.errors import UserError, install_command
from hf_genlm.text.cache import check_room
from hf_genlm.text.raw_files import one_line

_PROGRESS_EVERY = 1 << 14  # words
_HEAD_BYTES = 1 << 18  # searched to recognise the format
_HEAD_LINES = 100  # whose most common length gives the dimension if there is no header
_CHUNK = 1 << 20
_MAX_LINE_BYTES = 1 << 20
_MAX_WORD_BYTES = 1 << 12
_MAX_DIMENSION = 1 << 14
_MAX_NGRAM = 100  # characters of fastText's n-grams; its own default is 6
_MAX_WORDS = 1 << 24  # of a file; ConceptNet Numberbatch has 9 million
_MAX_REPEATED = 1 << 20  # words whose hash is that of another one, which are held in memory
_MAX_HELD = 1 << 29  # bytes of the wanted vectors
_GZIP = b"\x1f\x8b"
_ZIP = b"PK\x03\x04"
_FASTTEXT = struct.pack("<i", 793712314)
_NUMBER_BYTES = b"0123456789+-.eE"
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r")) + b"\x7f"

# (line or word number, the word or None if the entry has not the right length, its numbers or the reason)
Entry = tuple[int, bytes | None, Any]


@dataclass(frozen=True)
class WordVectors:
    """The wanted words of a file.

    `words` gives the row of each in `vectors` (n, D) float32; `n_in_file` counts all entries, damaged ones
    included; `n_skipped` counts those left out by reason; `sha256` is of the file on disk.
    """

    words: dict[str, int]
    vectors: np.ndarray
    n_in_file: int
    n_skipped: dict[str, int]
    sha256: str


@dataclass(frozen=True)
class _Layout:
    path: Path
    format: str  # a row of FORMATS
    dimension: int
    n_words: int | None  # as stated in the file's header
    is_gzip: bool

    @property
    def name(self) -> str:
        return repr(str(self.path))

    @property
    def unit(self) -> str:
        return "line" if self.format == "text" else "word"


class _BadEntry(ValueError):
    """An entry that cannot be used: `args` are the name of the reason and the message."""


def peek_dimension(path: str | Path) -> int:
    """Dimension D of the vectors of a file, from its beginning.

    Raises:
        UserError: the file is missing, empty or of no known format, or its format needs a package that is
            missing.
    """
    return _layout_of(Path(path)).dimension


def read_vectors(
    path: str | Path,
    wanted: Container[str],
    damaged: str = "stop",
    on_progress: Callable[[int, int], None] | None = None,
) -> WordVectors:
    """Read the vectors of the `wanted` words of a file; the whole file is checked.

    `damaged="skip"` leaves out and counts bad entries and repeated words; a gzip or binary file that is cut
    short is an error even then. `on_progress` is called with (bytes read, all bytes) on disk.

    Raises:
        UserError: the file is refused by `peek_dimension`, or is damaged; the message names the line or word.
    """
    layout = _layout_of(Path(path))
    entries, vector_of = FORMATS[layout.format]
    found = _Collector(layout, wanted, damaged)
    total = layout.path.stat().st_size
    with _reading(layout.path, layout.is_gzip) as (stream, disk):
        for number, word, payload in entries(stream, layout):
            found.add(number, word, payload, vector_of)
            if on_progress is not None and number % _PROGRESS_EVERY == 0:
                on_progress(disk.tell(), total)
    found.check_count()
    found.check_duplicates()
    if not found.hashes:
        raise UserError(f"{layout.name} holds no word that can be used: name another file of word vectors")
    vectors = np.frombuffer(found.data, dtype=np.float32).reshape(-1, layout.dimension)
    if layout.format == "fasttext binary":
        vectors = _fasttext_vectors(layout, list(found.words))
    digest = hashlib.sha256()
    with _reading(layout.path, is_gzip=False) as (stream, _):
        while content := stream.read(_CHUNK):
            digest.update(content)
    return WordVectors(found.words, vectors, found.n_entries, dict(found.skipped), digest.hexdigest())


class _Collector:
    """Takes the entries of a file in order, keeps the wanted ones, and hashes all words to find repeats."""

    def __init__(self, layout: _Layout, wanted: Container[str], damaged: str):
        self.layout, self.wanted, self.damaged = layout, wanted, damaged
        self.words: dict[str, int] = {}
        self.data = bytearray()  # the wanted vectors, float32
        self.skipped: Counter[str] = Counter()
        self.n_entries = 0  # damaged ones included
        self.hashes, self._numbers = array("q"), array("q")  # of every good entry

    def add(self, number: int, word: bytes | None, payload: Any, vector_of: Callable[..., Any]) -> None:
        self.n_entries += 1
        if self.n_entries > _MAX_WORDS:
            raise UserError(
                f"{self.layout.name} holds more than {_MAX_WORDS:,} words: name a file of its frequent words"
            )
        try:
            if word is None:
                raise _BadEntry("wrong_dimension", payload)
            try:
                text = word.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _BadEntry("not_utf8", f"the word {_shown(word)} is not UTF-8") from error
            is_wanted = text in self.wanted and text not in self.words
            vector = vector_of(payload, is_wanted)
        except _BadEntry as bad:
            self._skip(number, *bad.args)
            return
        self.hashes.append(hash(word))
        self._numbers.append(number)
        if is_wanted:
            self.words[text] = len(self.words)
            if vector is not None:
                self.data += vector.tobytes()
            if len(self.data) > _MAX_HELD:
                raise _too_many_vectors(self.layout)

    def check_count(self) -> None:
        """Compare the number of entries with the header's."""
        stated = self.layout.n_words
        if stated is None or stated == self.n_entries:
            return
        remedy = "it is cut short, copy it anew" if self.n_entries < stated else "mend its first line"
        if self.damaged == "stop":
            raise UserError(
                f"{self.layout.name} holds {self.n_entries:,} words and its first line says {stated:,}: "
                f"{remedy}, or take it as it is with --set vectors.damaged=skip"
            )
        if self.n_entries < stated:
            self.skipped["missing"] += stated - self.n_entries

    def check_duplicates(self) -> None:
        """Skip words that occur twice. The file is read again only if two hashes are equal."""
        hashes = np.frombuffer(self.hashes, dtype=np.int64)
        order = np.argsort(hashes, kind="stable")
        follows = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        if len(follows) > _MAX_REPEATED:
            raise UserError(
                f"{self.layout.name} holds more than {_MAX_REPEATED:,} words that stand there already: "
                "copy the file anew"
            )
        suspects = np.frombuffer(self._numbers, dtype=np.int64)[order[np.union1d(follows, follows + 1)]]
        if len(suspects) == 0:
            return
        suspected = set(suspects.tolist())
        first: dict[bytes, int] = {}
        entries, _ = FORMATS[self.layout.format]
        with _reading(self.layout.path, self.layout.is_gzip) as (stream, _):
            for number, word, _ in entries(stream, self.layout):
                if word is not None and number in suspected and first.setdefault(word, number) != number:
                    what = f"{_shown(word)} stands in {self.layout.unit} {first[word]:,} already"
                    self._skip(number, "duplicate", what)

    def _skip(self, number: int, reason: str, what: str) -> None:
        if self.damaged == "stop":
            raise UserError(
                f"{self.layout.name}, {self.layout.unit} {number:,}: {what}; copy the file anew, "
                "or leave out what is damaged with --set vectors.damaged=skip"
            )
        self.skipped[reason] += 1


def _too_many_vectors(layout: _Layout) -> UserError:
    return UserError(
        f"{layout.name}: the vectors of the vocabulary take more than {_MAX_HELD:,} bytes: name a file of a "
        "smaller dimension"
    )


@contextmanager
def _reading(path: Path, is_gzip: bool) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the content, the file on disk).

    Raises:
        UserError: the file cannot be opened, or is a damaged gzip file.
    """
    try:
        with path.open("rb", buffering=_CHUNK) as disk:
            stream: Any = io.BufferedReader(gzip.GzipFile(fileobj=disk), _CHUNK) if is_gzip else disk
            yield stream, disk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{str(path)!r} is not readable as gzip ({one_line(error)}): it is cut short or damaged, copy it "
            "anew"
        ) from error
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror}): name a readable file") from error


def _layout_of(path: Path) -> _Layout:
    """
    Raises:
        UserError: the file at `path` cannot be read.
    """
    name = repr(str(path))
    if not path.is_file():
        raise UserError(
            f"vectors.path = {name} is no file: name one of word vectors, such as glove.6B.50d.txt"
        )
    with _reading(path, is_gzip=False) as (stream, _):
        is_gzip = stream.read(2) == _GZIP
    with _reading(path, is_gzip) as (stream, _):
        head = stream.read(_HEAD_BYTES)
    if not head:
        raise UserError(f"{name} is empty: name a file of word vectors")
    if head.startswith(_ZIP):
        raise UserError(f"{name} is a zip archive, which may hold many files: unpack it and name one")
    first, _, rest = head.partition(b"\n")
    fields = first.split()
    n_words = None
    if head.startswith(_FASTTEXT):
        if importlib.util.find_spec("gensim") is None:
            raise UserError(f"{name} is a fastText model, which gensim reads: {install_command('vectors')}")
        if len(head) < 12:
            raise UserError(f"{name} is cut short in its header: copy it anew")
        kind, (dimension,) = "fasttext binary", struct.unpack_from("<i", head, 8)
    elif len(fields) == 2 and all(field.isdigit() and len(field) <= 12 for field in fields):
        n_words, dimension = map(int, fields)
        # bytes that no line of numbers has follow the first word
        _, _, behind = rest[: _MAX_WORD_BYTES + max(512, 4 * dimension)].partition(b" ")
        behind = behind[: max(512, 4 * dimension)]
        has_controls = len(behind) != len(behind.translate(None, _CONTROLS))
        kind = "word2vec binary" if has_controls or not behind.partition(b"\n")[0].isascii() else "text"
    elif b"\0" in head:
        raise UserError(
            f"{name} is binary and neither word2vec's nor fastText's: name a file of word vectors"
        )
    else:
        lines = head.split(b"\n")[:_HEAD_LINES]
        whole = lines[:-1] if len(lines) > 1 and len(lines) < _HEAD_LINES else lines
        lengths = Counter(len(line.split()) - 1 for line in whole if line.strip())
        # of equally common lengths, that of the first line
        kind, dimension = "text", lengths.most_common(1)[0][0] if lengths else 0
    if not 1 <= dimension <= _MAX_DIMENSION:
        raise UserError(
            f"{name} would hold vectors of {dimension:,} numbers, not 1 to {_MAX_DIMENSION:,}: "
            "name a file of word vectors, a word and its numbers on each line"
        )
    return _Layout(path, kind, dimension, n_words, is_gzip)


def _text_entries(stream: BinaryIO, layout: _Layout) -> Iterator[Entry]:
    """One entry a line: the word, which may hold spaces, and D numbers."""
    dimension, number = layout.dimension, 0
    if layout.n_words is not None:
        stream.readline()
        number = 1
    while line := stream.readline(_MAX_LINE_BYTES):
        number += 1
        ends = line.endswith(b"\n")
        if not ends and len(line) == _MAX_LINE_BYTES:
            raise UserError(
                f"{layout.name}, line {number:,}, has more than {_MAX_LINE_BYTES:,} bytes: "
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
    """Vector (D,) float32; None for an unwanted word, of which only the characters are checked."""
    if b"".join(fields).translate(None, _NUMBER_BYTES):
        bad = next(field for field in fields if field.translate(None, _NUMBER_BYTES))
        reason = "not_finite" if _is_number(bad) else "not_a_number"
        raise _BadEntry(reason, f"{_shown(bad)} is not a finite number")
    if not is_wanted:
        return None
    try:
        with np.errstate(over="ignore"):
            vector = np.array([float(field) for field in fields]).astype(np.float32)
    except ValueError as error:
        bad = next(field for field in fields if not _is_number(field))
        raise _BadEntry("not_a_number", f"{_shown(bad)} is not a finite number") from error
    return _finite(vector)


def _binary_entries(stream: BinaryIO, layout: _Layout) -> Iterator[Entry]:
    """word2vec's entries: the word, a space, D float32, and sometimes a line end."""
    stream.readline()
    cursor = _Cursor(stream, layout.name)
    for number in range(1, layout.n_words + 1):  # type: ignore[operator]  # the header was read
        word = cursor.until(b" ", number)
        yield number, word.lstrip(b"\n"), cursor.exactly(4 * layout.dimension, number)
    if cursor.rest().strip(b"\n"):
        raise UserError(
            f"{layout.name} goes on after the {layout.n_words:,} words that its first line says: "
            "it is damaged, copy it anew"
        )


def _fasttext_entries(stream: BinaryIO, layout: _Layout) -> Iterator[Entry]:
    """Dictionary of a fastText model; the rest of the file is skipped over, to see that none is missing."""
    cursor = _Cursor(stream, layout.name)
    cursor.exactly(64, 0)  # magic, version, and the settings of its training
    n_words, _, n_labels, _, n_pruned = struct.unpack("<3i2q", cursor.exactly(28, 0))
    if n_labels > 0:
        raise UserError(f"{layout.name} is a fastText classifier: name a model of word vectors")
    for number in range(1, n_words + 1):
        word = cursor.until(b"\0", number)
        cursor.exactly(9, number)  # its count and type
        yield number, word, None
    cursor.skip(8 * max(0, n_pruned), n_words)
    for _ in ("input", "output"):
        is_quantised, n_rows, n_columns = struct.unpack("<?2q", cursor.exactly(17, n_words))
        if is_quantised:
            raise UserError(f"{layout.name} is a quantised fastText model: name the .bin it was made from")
        cursor.skip(4 * max(0, n_rows) * max(0, n_columns), n_words)
    cursor.rest()


def _fasttext_vectors(layout: _Layout, words: list[str]) -> np.ndarray:
    """Vectors (n, D) float32: for each word the mean of its own vector and those of its n-grams.

    Only their rows are read (Bojanowski et al., 2017, arXiv:1607.04606, section 3.2).
    """
    from gensim.models.fasttext import ft_ngram_hashes

    if 4 * len(words) * layout.dimension > _MAX_HELD:
        raise _too_many_vectors(layout)
    with tempfile.TemporaryDirectory() as folder:
        plain = layout.path
        if layout.is_gzip:  # rows are read where they stand
            plain = Path(folder) / "model.bin"
            with _reading(layout.path, True) as (stream, _), plain.open("wb") as file:
                while content := stream.read(_CHUNK):
                    check_room(file, file.tell(), len(content))
                    file.write(content)
        with _reading(plain, is_gzip=False) as (stream, disk):
            head = os.pread(disk.fileno(), 92, 0)
            bucket, min_n, max_n = struct.unpack_from("<3i", head, 40)
            n_words, _, _, _, n_pruned = struct.unpack_from("<3i2q", head, 64)
            at = len(head) + 8 * max(0, n_pruned)
            row_of: dict[bytes, int] = {}
            sought = {word.encode() for word in words}
            for number, entry, _ in _fasttext_entries(stream, layout):
                assert entry is not None
                at += len(entry) + 10  # its end, count and type
                if entry in sought:
                    row_of.setdefault(entry, number - 1)
            n_rows, n_columns = struct.unpack("<2q", os.pread(disk.fileno(), 16, at + 1))
            if (
                (n_rows, n_columns) != (n_words + bucket, layout.dimension)
                or bucket < 0
                or not 0 <= max_n <= _MAX_NGRAM
            ):
                raise UserError(f"{layout.name} has a matrix that does not fit its header: copy it anew")
            at += 17  # its quantisation and shape

            def row(index: int) -> np.ndarray:
                content = os.pread(disk.fileno(), 4 * n_columns, at + 4 * n_columns * index)
                return np.frombuffer(content, np.float32)

            vectors = np.empty((len(words), n_columns), np.float32)
            for word, vector in zip(words, vectors, strict=True):
                vector[:] = row(row_of[word.encode()])
                hashes = ft_ngram_hashes(word, min_n, max_n, bucket) if bucket else []
                for index in hashes:
                    vector += row(n_words + index)
                vector /= len(hashes) + 1
                if not np.isfinite(vector).all():
                    raise UserError(
                        f"{layout.name}: the vector of {word!r} is not finite: copy the file anew"
                    )
    return vectors


class _Cursor:
    """Reads words up to a mark, and pieces of a known length, from a stream; `name` is for messages."""

    def __init__(self, stream: BinaryIO, name: str):
        self.stream, self.name = stream, name
        self._buffer, self._at = b"", 0

    def until(self, mark: bytes, number: int) -> bytes:
        self._fill(_MAX_WORD_BYTES + 1)
        end = self._buffer.find(mark, self._at, self._at + _MAX_WORD_BYTES + 1)
        if end < 0 and len(self._buffer) - self._at > _MAX_WORD_BYTES:
            raise UserError(
                f"{self.name}, word {number:,}, has more than {_MAX_WORD_BYTES:,} bytes: "
                "the file is damaged, copy it anew"
            )
        word = self.exactly((end if end >= 0 else len(self._buffer) + 1) - self._at, number)
        self._at += 1
        return word

    def exactly(self, n: int, number: int) -> bytes:
        self._fill(n)
        if len(self._buffer) - self._at < n:
            where = f"word {number:,}" if number else "its header"
            raise UserError(f"{self.name} is cut short in or after {where}: copy it anew")
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
    vector = vector.astype(np.float32, copy=False)
    if not np.isfinite(vector).all():
        raise _BadEntry("not_finite", f"{vector[~np.isfinite(vector)][0]} is not a finite number")
    return vector


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _shown(word: bytes) -> str:
    return repr(word.decode("utf-8", errors="backslashreplace")[:60])


# format -> (its entries, the vector of an entry)
FORMATS: dict[str, tuple[Callable[..., Iterator[Entry]], Callable[..., np.ndarray | None]]] = {
    "text": (_text_entries, _text_vector),
    "word2vec binary": (_binary_entries, lambda payload, is_wanted: _finite(np.frombuffer(payload, "<f4"))),
    "fasttext binary": (_fasttext_entries, lambda payload, is_wanted: None),
}
