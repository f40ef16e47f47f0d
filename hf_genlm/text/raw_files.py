"""Raw files: their bytes, unpacked a part at a time, and the count of what is too damaged to be used.

Memory is bounded whatever a compressed file expands to: at most `CHUNK` bytes are unpacked at once, or `_SIP`
bytes are fed at once to zstandard, which unpacks all it is given; a dictionary or window of more than
`_MAX_WINDOW` bytes is refused. Names inside an archive are never used as paths, and nothing is unpacked to a
path.
"""

import bz2
import lzma
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import IO, Any

from hf_genlm.errors import UserError, install_command, without_secrets
from hf_genlm.text.store import CHUNK

MAX_PLACES = 20  # damaged records and files that a report names
_FEED = 1 << 16  # bytes of a compressed file that are read at once
_SIP = 1 << 11  # the same of zstd: 2 KB hold up to 500 blocks of 128 KB
_MAX_WINDOW = 1 << 28  # bytes; `xz -9` needs 65 MiB, `zstd --long` 128 MiB
_MAX_EMPTY = 1000  # streams without content in a row
_MAX_TABLE = 1 << 22  # bytes of the table of a .zip, which zipfile holds in memory
# zipfile raises the last four: for a password, an unknown method, and damaged tables
_FAULTS = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
           RuntimeError, struct.error, LookupError, OverflowError)  # fmt: skip


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
    stream: IO[bytes]
    start: float = 0.0  # share of the row groups of parquet that are left out at the beginning
    max_line: int = 1 << 24  # characters of a .jsonl line, which takes up to 60 bytes of memory for each
    separator: str | None = None  # lines of nothing else part the documents of plain text


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


def unpacked(label: str, stream: IO[bytes], compression: str | None) -> Iterator[bytes]:
    """Content of a file in non-empty parts. `label` names the file in messages.

    Raises:
        Damage: the file is cut short, damaged or misnamed, or a .zip of several files; raised where the fault
            is read.
        UserError: a package is missing.
    """
    if compression == "zip":
        only_member(label, stream)
    if compression == "zstd" and find_spec("zstandard") is None:
        raise UserError(
            f"{label!r} is zstd-compressed, which needs one more package: {install_command('zstd')}"
        )
    try:
        yield from _plain(stream) if compression is None else _chunks(_UNPACK[compression](stream))
    except _FAULTS as error:
        if compression is None:
            raise
        raise Damage(
            Place(label),
            f"is not readable as {compression} ({one_line(error)})",
            "the file is damaged or misnamed, copy it anew or unpack it"
            if "emory" not in str(error)  # in the messages of zstd and xz
            else "its window is larger than 256 MB: unpack it, as by zstd -d --long=31",
        ) from error


def only_member(label: str, stream: IO[bytes]) -> str:
    """Name of the only member of a zip archive; it tells the format and is never used as a path.

    Raises:
        Damage: the archive is damaged, or does not have exactly one member.
    """
    try:
        members = [member.filename for member in _members(stream)]
        stream.seek(0)
    except _FAULTS as error:
        raise Damage(
            Place(label), f"is not readable as zip ({one_line(error)})", "the file is damaged, copy it anew"
        ) from error
    if len(members) != 1:
        raise Damage(
            Place(label),
            f"holds {len(members)} members, and only a .zip of one file is read",
            "unpack it to a folder",
        )
    return members[0]


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

    def __init__(self) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._object = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()

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


class _Capped:
    """A file for zipfile, which reads the whole table at once."""

    def __init__(self, stream: IO[bytes]):
        self._stream, self.seek, self.tell = stream, stream.seek, stream.tell

    def read(self, n: int = -1) -> bytes:
        if n > _MAX_TABLE:
            raise ValueError(f"its table of members has more than {_MAX_TABLE:,} bytes")
        return self._stream.read(n)


def _members(stream: IO[bytes]) -> list[zipfile.ZipInfo]:
    capped: Any = _Capped(stream)
    with zipfile.ZipFile(capped) as archive:
        return [each for each in archive.infolist() if not each.is_dir() and not _is_hidden(each.filename)]


def _is_hidden(name: str) -> bool:
    """True for .DS_Store, ._a.txt and the folder __MACOSX, which macOS adds, and for other hidden files."""
    parts = set(re.split(r"[/\\]", name)) - {".", ".."}
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _zip(stream: IO[bytes]) -> Iterator[bytes]:
    """The only member. zipfile itself unpacks bz2 and LZMA without a bound."""
    (member,) = _members(stream)
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
    for content in _ZIP_METHODS[member.compress_type](read, member):
        n_bytes, checksum = n_bytes + len(content), zlib.crc32(content, checksum)
        yield content
    if (n_bytes, checksum) != (member.file_size, member.CRC):
        raise ValueError(f"it holds {n_bytes:,} bytes and not those {member.file_size:,} of its checksum")


def _zip_lzma(read: Callable[[int], bytes], member: zipfile.ZipInfo) -> Iterator[bytes]:
    """LZMA as in a .lzma file, whose header differs, and for which a limit of memory can be set."""
    size = -1 if member.flag_bits & 2 else member.file_size  # unknown: the end is marked
    head = read(9)[4:] + struct.pack("<q", size)
    heads = iter([head])
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_MAX_WINDOW)
    return _streams(lambda n: next(heads, None) or read(n), lambda: unpacker)


_ZIP_METHODS: dict[int, Callable[[Callable[[int], bytes], zipfile.ZipInfo], Iterator[bytes]]] = {
    zipfile.ZIP_STORED: lambda read, member: iter(lambda: read(CHUNK), b""),
    zipfile.ZIP_DEFLATED: lambda read, member: _streams(read, lambda: _Zlib(-15)),
    zipfile.ZIP_BZIP2: lambda read, member: _streams(read, bz2.BZ2Decompressor),
    zipfile.ZIP_LZMA: _zip_lzma,
}


def _xz_stream() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_WINDOW)


_UNPACK: dict[str, Callable[[IO[bytes]], Iterator[bytes]]] = {
    "gzip": lambda stream: _streams(stream.read, lambda: _Zlib(31)),
    "bz2": lambda stream: _streams(stream.read, bz2.BZ2Decompressor),
    "xz": lambda stream: _streams(stream.read, _xz_stream),
    "zstd": lambda stream: _streams(stream.read, _Zstd, _SIP),
    "zip": _zip,
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zip": "zip"}  # by suffix
