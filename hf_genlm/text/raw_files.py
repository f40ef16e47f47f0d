"""Raw files: their bytes, unpacked a part at a time, and the count of what is too damaged to be used.

Memory is bounded whatever a compressed file expands to: at most `CHUNK` bytes are unpacked at once, or `_SIP`
bytes are fed at once to a library that unpacks all it is given. Names inside an archive are never used as
paths, and nothing is unpacked to a path.
"""

import bz2
import gzip
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import IO, Any

from hf_genlm.errors import UserError, without_secrets
from hf_genlm.text.store import CHUNK

MAX_PLACES = 20  # damaged records and files that a report names
# 2 KB of zstd hold up to 500 blocks of 128 KB, 4 KB of bz2 in zip up to 90 blocks of 900 KB
_SIP = 1 << 11
_XZ_MEMORY = 1 << 28  # bytes; `xz -9` needs 65 MiB
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
    max_line: int = 1 << 28  # characters of a .jsonl line, which is held in memory


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
        raise UserError(f"{label!r} is zstd-compressed, which needs one more package: pip install '.[zstd]'")
    try:
        yield from filter(None, _UNPACK[compression](stream))
    except _FAULTS as error:
        if compression is None:
            raise
        raise Damage(
            Place(label),
            f"is not readable as {compression} ({one_line(error)})",
            "the file is damaged or misnamed, copy it anew or unpack it",
        ) from error


def only_member(label: str, stream: IO[bytes]) -> str:
    """Name of the only member of a zip archive; it tells the format and is never used as a path.

    Raises:
        Damage: the archive is damaged, or does not have exactly one member.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            members = archive.namelist()
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


def _plain(stream: Any, n_bytes: int = CHUNK) -> Iterator[bytes]:
    while content := stream.read(n_bytes):
        yield content


def _zip(stream: IO[bytes]) -> Iterator[bytes]:
    with zipfile.ZipFile(stream) as archive:
        (member,) = archive.infolist()
        is_bounded = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        with archive.open(member) as file:
            yield from _plain(file, CHUNK if is_bounded else _SIP)


def _xz(stream: IO[bytes]) -> Iterator[bytes]:
    """All streams of the file; `lzma.LZMAFile` has no memory limit and ignores garbage behind the first."""
    unpacker: lzma.LZMADecompressor | None = None
    n_streams, rest = 0, b""
    while content := rest or stream.read(CHUNK):
        rest = b""
        if unpacker is None:
            content = content.lstrip(b"\0") if n_streams else content  # padding may follow a stream
            if not content:
                continue
            unpacker, n_streams = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY), n_streams + 1
        yield unpacker.decompress(content, CHUNK)
        while not unpacker.eof and not unpacker.needs_input:
            yield unpacker.decompress(b"", CHUNK)
        if unpacker.eof:
            rest, unpacker = unpacker.unused_data, None
    if unpacker is not None:
        raise EOFError("it ends in the middle of a stream")


def _zstd(stream: IO[bytes]) -> Iterator[bytes]:
    """All frames of the file; zstandard's stream reader stops after one and accepts a truncated file."""
    import zstandard

    frame = None
    try:
        while content := stream.read(_SIP):
            while content:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(content)
                content, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")


_UNPACK: dict[str | None, Callable[[IO[bytes]], Iterator[bytes]]] = {
    None: _plain,
    "gzip": lambda stream: _plain(gzip.GzipFile(fileobj=stream)),
    "bz2": lambda stream: _plain(bz2.BZ2File(stream)),
    "xz": _xz,
    "zstd": _zstd,
    "zip": _zip,
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zip": "zip"}  # by suffix
