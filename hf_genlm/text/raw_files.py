"""Raw files: their bytes, unpacked a part at a time, and the count of what is too damaged to be used.

Memory is bounded whatever a compressed file expands to: at most `CHUNK` bytes are unpacked at once, or `_SIP`
bytes are fed at once to zstandard, which unpacks all it is given; a dictionary or window of more than
`max_window` bytes is refused. Names inside an archive are never used as paths, and nothing is unpacked to a
path.
"""

import bz2
import codecs
import contextlib
import inspect
import io
import itertools
import lzma
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import IO, Any

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError, install_command, without_secrets
from hf_genlm.text.cache import scratch_file
from hf_genlm.text.store import CHUNK

MAX_PLACES = 20  # damaged records and files that a report names
_FEED = 1 << 16  # bytes of a compressed file that are read at once
_SIP = 1 << 11  # the same of zstd: 2 KB hold up to 500 blocks of 128 KB
MAX_WINDOW = 1 << 28  # bytes; `xz -9` needs 65 MiB, `zstd --long` 128 MiB
_WIDER = "allow it 2 GB of memory with --set corpus.unpack_memory_mb=2048, or unpack it"
_MAX_EMPTY = 1000  # streams without content in a row
_MAX_HEADER = 1 << 20  # bytes of the headers of a member of a tar archive
_MAX_TABLE = 1 << 22  # bytes of the table of a .zip, which zipfile holds in memory
_MAX_MEMORY = 1 << 30  # bytes, of the process that reads a PDF or Word file
_MAX_SECONDS = 600  # of a processor, likewise
_MAX_REASON = 500  # bytes of its message
# zipfile raises the last four: for a password, an unknown method, and damaged tables
_FAULTS = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
           RuntimeError, struct.error, LookupError, OverflowError, tarfile.TarError)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A whole file, or one of its records: `unit` is "line" or "row", `number` counts from 1."""

    label: str  # the file, as messages name it
    unit: str | None = None
    number: int = 0

    def __str__(self) -> str:
        return self.label if self.unit is None else f"{self.label}, {self.unit} {self.number}"


class Damage(UserError):
    """A record or a whole file that cannot be used; the message is place, `reason` and remedy."""

    def __init__(self, place: Place, reason: str, remedy: str):
        super().__init__(f"{str(place)!r} {reason}: {remedy}")
        self.place, self.reason = place, reason


LeaveOut = Callable[[Damage], None]  # counts a damaged record, or raises it


@dataclass(frozen=True)
class RawFile:
    """An open file at its beginning. `label` names it in messages, the suffixes of `name` tell its format."""

    label: str
    name: str
    stream: Any  # IO[bytes], or Joined
    start: float = 0.0  # share of the row groups of parquet that are left out at the beginning
    max_line: int = 1 << 24  # characters of a .jsonl line, which takes up to 60 bytes of memory for each
    separator: str | None = None  # lines of nothing else part the documents of plain text
    skipped: Counter[str] = field(default_factory=Counter)  # "files": of an archive, by their suffix
    told: list[tuple[str, str]] = field(default_factory=list)  # of members of an archive: a line, a name
    shown: str = ""  # to people


@dataclass
class LeftOut:
    """Count of damaged records and files that were left out, with the first `MAX_PLACES` of them."""

    records: int = 0
    files: int = 0
    places: list[dict[str, Any]] = field(default_factory=list)  # file, line or row of a record, reason

    def add(self, name: str, damage: Damage) -> None:
        """Count a damaged record of the file `name`, or the file itself."""
        unit, number = damage.place.unit, damage.place.number
        record = {} if unit is None else {unit: number}
        self.records += unit is not None
        self.files += unit is None
        self.places = [*self.places, {"file": name, **record, "reason": damage.reason}][:MAX_PLACES]

    def update(self, other: "LeftOut") -> None:
        """Add the counts of `other`."""
        self.records += other.records
        self.files += other.files
        self.places = [*self.places, *other.places][:MAX_PLACES]

    def to_json(self) -> dict[str, Any]:
        """Value of `damaged` in corpus.json."""
        n_more = self.records + self.files - len(self.places)
        return {"records": self.records, "files": self.files, "places": self.places, "more_places": n_more}


def left_out_line(report: dict[str, Any]) -> str | None:
    """One line for people about `LeftOut.to_json`; None if nothing was left out."""
    counts = ((report["records"], "record"), (report["files"], "file"))
    parts = [f"{n:,} damaged {what}{'s' if n > 1 else ''}" for n, what in counts if n]
    if not parts:
        return None
    first = report["places"][0]
    where = [f"{unit} {first[unit]}" for unit in ("line", "row") if unit in first]
    return (
        f"{' and '.join(parts)} left out, the first: {', '.join([first['file'], *where])!r} {first['reason']}"
    )


def unpacked(
    label: str, stream: IO[bytes], compression: str | None, max_window: int = MAX_WINDOW
) -> Iterator[bytes]:
    """Content of a file in non-empty parts. `label` names the file in messages.

    Raises:
        Damage: the file is cut short, damaged or misnamed, a .zip of several files, or takes more memory than
            `max_window`; raised where the fault is read.
        UserError: a package is missing.
    """
    if compression == "zip":
        members = list(zip_members(label, stream, max_window))
        if len(members) != 1:
            reason = f"holds {len(members)} members, and its name is that of one file"
            raise Damage(Place(label), reason, "name it .zip, without a suffix before that")
        yield from members[0][1]
        return
    if compression == "zstd" and find_spec("zstandard") is None:
        raise UserError(
            f"{label!r} is zstd-compressed, which needs one more package: {install_command('zstd')}"
        )
    with _faults(label, compression):
        yield from (
            _plain(stream) if compression is None else _chunks(_UNPACK[compression](stream, max_window))
        )


def content_of(file: RawFile, compression: str | None, recipe: CorpusRecipe) -> Iterator[bytes]:
    """`unpacked` in as much memory as the recipe allows."""
    return unpacked(file.label, file.stream, compression, recipe.unpack_memory_mb << 20)


@contextlib.contextmanager
def _faults(label: str, compression: str | None) -> Iterator[None]:
    """Raise Damage for the errors of the libraries that unpack."""
    try:
        yield
    except _FAULTS as error:
        if compression is None or isinstance(error, UserError):
            raise
        needs_memory = "emory" in str(error)  # in the messages of zstd and xz
        raise Damage(
            Place(label),
            f"is not readable as {compression} ({one_line(error)})",
            _WIDER if needs_memory else "the file is damaged or misnamed, copy it anew or unpack it",
        ) from error


def zip_members(
    label: str, stream: IO[bytes], max_window: int = MAX_WINDOW
) -> Iterator[tuple[str, Iterator[bytes]]]:
    """(name, content in parts) of the files in a zip archive, without hidden ones and those that Finder adds.

    A name tells the format and is never used as a path.

    Raises:
        Damage: the archive is damaged; raised where the fault is read.
    """

    def content(member: zipfile.ZipInfo) -> Iterator[bytes]:
        with _faults(label, "zip"):
            yield from _chunks(_zip_member(stream, member, max_window))

    with _faults(label, "zip"):
        members = _members(stream)
        places = sorted((member.header_offset, member.compress_size) for member in members)
        if any(at + size > after for (at, size), (after, _) in itertools.pairwise(places)):
            raise ValueError("its members overlap")
    for member in members:
        yield member.filename, content(member)


def tar_members(label: str, parts: Iterator[bytes]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """The same of a tar archive that `parts` join to; links, devices and sparse files are left out.

    Raises:
        Damage: the archive is damaged or cut short; raised where the fault is read.
    """

    def content(member: tarfile.TarInfo) -> Iterator[bytes]:
        with _faults(label, "tar"):
            file: Any = tar.extractfile(member)
            while found := file.read(_FEED):
                yield found

    with _faults(label, "tar"):
        stream = Joined(parts, _MAX_HEADER)
        tar = tarfile.TarFile(fileobj=stream)  # type: ignore[arg-type]
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            stream.left = None
            if member.isreg() and not member.issparse() and not _is_hidden(member.name):
                yield member.name, content(member)
            stream.left = _MAX_HEADER
        if not stream.last or stream.last.strip(b"\0"):
            raise EOFError("it ends without the mark of its end")
        stream.left = None
        while rest := stream.read(_FEED):  # the checksum of a compression is at its end
            if rest.strip(b"\0"):
                raise ValueError("more stands behind the mark of its end")


def extracted(kind: str, label: str, stream: IO[bytes]) -> Iterator[str]:
    """Text of a PDF or Word file in parts, by a library in a process whose memory and time are bounded.

    Raises:
        Damage: it is not readable, or holds no text.
    """
    arguments = f"{kind!r}, {sys.path!r}, {_MAX_MEMORY}, {_MAX_SECONDS}"
    command = [sys.executable, "-I", "-c", f"{inspect.getsource(_extract)}\n_extract({arguments})"]
    decode, is_empty = codecs.getincrementaldecoder("utf-8")("replace").decode, True
    with (
        scratch_file() as errors,
        subprocess.Popen(command, stdin=stream, stdout=subprocess.PIPE, stderr=errors) as child,
    ):
        assert child.stdout is not None
        try:
            while content := child.stdout.read(CHUNK):
                part = decode(content)
                is_empty = is_empty and not part.strip()
                yield part
            status = child.wait()
        finally:
            child.kill()
        errors.seek(0)
        reason = " ".join(errors.read(_MAX_REASON).decode("utf-8", "replace").split())
    if status < 0 or "MemoryError" in reason:
        reason = f"it takes more than {_MAX_MEMORY >> 20:,} MB of memory or {_MAX_SECONDS:,} s"
    if status:
        reason = f"is not readable as .{kind} ({reason})"
    elif is_empty:
        reason = "holds no text, only pictures as of a scan"
    else:
        return
    raise Damage(Place(label), reason, "save its text as .txt, and name that")


def _extract(kind: str, paths: list[str], max_memory: int, max_seconds: int) -> None:
    """Write the text of the document on standard input to standard output.

    The source of this function is a program of its own: a process that loads no more starts at once.
    """
    import contextlib
    import logging
    import os
    import sys

    sys.path[:] = paths
    with contextlib.suppress(ImportError, ValueError, OSError):  # ImportError: on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_memory, max_memory))
        resource.setrlimit(resource.RLIMIT_CPU, (max_seconds, max_seconds))
    logging.disable()
    try:
        if kind == "pdf":
            import pypdf

            texts = (page.extract_text() for page in pypdf.PdfReader(sys.stdin.buffer).pages)
        else:
            import docx

            texts = (
                "\n".join("\t".join(cell.text for cell in row.cells) for row in block.rows)
                if hasattr(block, "rows")
                else block.text
                for block in docx.Document(sys.stdin.buffer).iter_inner_content()
            )
        for text in texts:
            os.write(1, f"{text}\n".encode("utf-8", "replace"))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


class Joined:
    """The bytes that `parts` join to, as a file that is read forwards once.

    Of headers, which tarfile holds in memory whatever size they state, `left` bytes may be read; None: any.
    """

    def __init__(self, parts: Iterator[bytes], left: int | None = None):
        self._parts, self._part, self._at = parts, io.BytesIO(), 0
        self.left, self.last = left, b""

    def tell(self) -> int:
        return self._at

    def seek(self, at: int) -> None:
        while self._at < at and self._read(min(_FEED, at - self._at)):
            pass

    def read(self, n: int) -> bytes:
        if self.left is not None:
            self.left -= n
            if self.left < 0:
                raise ValueError(f"the header of a member has more than {_MAX_HEADER:,} bytes")
        self.last = self._read(n)
        return self.last

    def _read(self, n: int) -> bytes:
        content = self._part.read(n)
        while len(content) < n and (part := next(self._parts, b"")):
            self._part = io.BytesIO(part)
            content += self._part.read(n - len(content))
        self._at += len(content)
        return content


def one_line(error: BaseException) -> str:
    """Message of a library's error without access tokens, short and on one line."""
    # tokens are removed before the message is shortened: half a token would not be recognised
    return without_secrets(" ".join(str(error).split()))[:200] or type(error).__name__


def _plain(stream: IO[bytes]) -> Iterator[bytes]:
    while content := stream.read(CHUNK):
        yield content


def _chunks(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes that `parts` join to, in parts of `CHUNK` bytes."""
    begun = bytearray()
    for part in parts:
        begun += part
        while len(begun) >= CHUNK:
            yield bytes(begun[:CHUNK])
            del begun[:CHUNK]
    if begun:
        yield bytes(begun)


class _Decompressor:
    """The interface of the decompressors of bz2 and lzma over `_object`, the one of another library."""

    _object: Any

    @property
    def eof(self) -> bool:
        return self._object.eof

    @property
    def unused_data(self) -> bytes:
        return self._object.unused_data


class _Zlib(_Decompressor):
    """Decompressor of deflated data."""

    def __init__(self, window_bits: int):
        self._object, self.needs_input = zlib.decompressobj(window_bits), True

    def decompress(self, content: bytes, max_bytes: int) -> bytes:
        found = self._object.decompress(self._object.unconsumed_tail + content, max_bytes)
        self.needs_input = len(found) < max_bytes
        return found


class _Zstd(_Decompressor):
    """Decompressor of zstd; `max_bytes` is ignored. zstandard's stream reader accepts a truncated file."""

    needs_input = True

    def __init__(self, max_window: int) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._object = zstandard.ZstdDecompressor(max_window_size=min(max_window, 1 << 31)).decompressobj()

    def decompress(self, content: bytes, max_bytes: int) -> bytes:
        try:
            return self._object.decompress(content)
        except self._error as error:
            raise ValueError(str(error)) from error


def _streams(read: Callable[[int], bytes], start: Callable[[], Any], n_fed: int = _FEED) -> Iterator[bytes]:
    """Unpack all compressed streams of a file, one behind another."""
    unpacker, rest, n_streams, n_empty = None, b"", 0, 0
    while content := rest or read(n_fed):
        rest = b""
        if unpacker is None:
            content = content.lstrip(b"\0") if n_streams else content  # padding may follow a stream
            if not content:
                continue
            unpacker, n_streams, n_empty = start(), n_streams + 1, n_empty + 1
        while True:
            found = unpacker.decompress(content, CHUNK)
            n_empty = 0 if found else n_empty
            yield found
            if unpacker.eof or unpacker.needs_input:
                break
            content = b""
        if unpacker.eof:
            rest, unpacker = unpacker.unused_data, None
            if n_empty > _MAX_EMPTY:
                raise ValueError(f"more than {_MAX_EMPTY:,} empty streams follow one another")
    if unpacker is not None:
        raise EOFError("it ends in the middle of a stream")


class Capped:
    """A file for a library that reads `part` of it at once, whatever its size."""

    closed = False

    def __init__(self, stream: IO[bytes], max_bytes: int, part: str):
        self._stream, self._max_bytes, self._part = stream, max_bytes, part
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, n: int = -1) -> bytes:
        if n > self._max_bytes:
            raise ValueError(f"{self._part} has more than {self._max_bytes:,} bytes")
        return self._stream.read(n)


def _members(stream: IO[bytes]) -> list[zipfile.ZipInfo]:
    capped: Any = Capped(stream, _MAX_TABLE, "its table of members")
    with zipfile.ZipFile(capped) as archive:
        return [each for each in archive.infolist() if not each.is_dir() and not _is_hidden(each.filename)]


def _is_hidden(name: str) -> bool:
    """True for .DS_Store, ._a.txt and the folder __MACOSX, which macOS adds, and for other hidden files."""
    parts = set(re.split(r"[/\\]", name)) - {".", ".."}
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _zip_member(stream: IO[bytes], member: zipfile.ZipInfo, max_window: int) -> Iterator[bytes]:
    """zipfile itself unpacks bz2 and LZMA without a bound."""
    if member.flag_bits & 1:
        raise ValueError("it is encrypted")
    if member.compress_type not in _ZIP_METHODS:
        raise ValueError(
            f"it is compressed by method {member.compress_type}, not stored, deflate, bz2 or LZMA"
        )
    stream.seek(member.header_offset)
    header = stream.read(30)
    stream.seek(sum(struct.unpack("<2H", header[26:])), 1)  # its name and an extra field
    left = member.compress_size

    def read(n: int) -> bytes:
        nonlocal left
        content = stream.read(min(n, left))
        left -= len(content)
        return content

    n_bytes, checksum = 0, 0
    for content in _ZIP_METHODS[member.compress_type](read, member, max_window):
        n_bytes, checksum = n_bytes + len(content), zlib.crc32(content, checksum)
        yield content
    if (n_bytes, checksum) != (member.file_size, member.CRC):
        raise ValueError(f"it holds {n_bytes:,} bytes and not those {member.file_size:,} of its checksum")


def _zip_lzma(read: Callable[[int], bytes], member: zipfile.ZipInfo, max_window: int) -> Iterator[bytes]:
    """LZMA as in a .lzma file, whose header differs, and for which a limit of memory can be set."""
    size = -1 if member.flag_bits & 2 else member.file_size  # unknown: the end is marked
    head = read(9)[4:] + struct.pack("<q", size)
    heads = iter([head])
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=max_window)
    return _streams(lambda n: next(heads, None) or read(n), lambda: unpacker)


_ZIP_METHODS: dict[int, Callable[[Callable[[int], bytes], zipfile.ZipInfo, int], Iterator[bytes]]] = {
    zipfile.ZIP_STORED: lambda read, *_: iter(lambda: read(CHUNK), b""),
    zipfile.ZIP_DEFLATED: lambda read, *_: _streams(read, lambda: _Zlib(-15)),
    zipfile.ZIP_BZIP2: lambda read, *_: _streams(read, bz2.BZ2Decompressor),
    zipfile.ZIP_LZMA: _zip_lzma,
}


_UNPACK: dict[str, Callable[[IO[bytes], int], Iterator[bytes]]] = {
    "gzip": lambda stream, _: _streams(stream.read, lambda: _Zlib(31)),
    "bz2": lambda stream, _: _streams(stream.read, bz2.BZ2Decompressor),
    "xz": lambda stream, n: _streams(stream.read, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=n)),
    "zstd": lambda stream, n: _streams(stream.read, lambda: _Zstd(n), _SIP),
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zip": "zip"}  # by suffix
