"""Compressed files, unpacked a part at a time.

Memory stays bounded whatever a file expands to: no step unpacks more than `_PART` bytes, or takes in more
than `_SIP` bytes where a library unpacks all that it is given. The names inside an archive are never used as
paths, and nothing is unpacked to a path.
"""

import bz2
import gzip
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import IO

from hf_genlm.errors import UserError
from hf_genlm.text.damage import Damage, Place
from hf_genlm.text.store import CHUNK

_PART = CHUNK
# of zstandard 2 KB are up to 500 blocks of 128 KB, of bz2 inside zip 4 KB up to 90 blocks of 900 KB
_SIP = 1 << 11
_XZ_MEMORY = 1 << 28  # bytes; `xz -9` needs 65 MiB
# zipfile raises the last four: on a password, a method that it does not know, and damaged tables
_FAULTS = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
           RuntimeError, struct.error, LookupError, OverflowError)  # fmt: skip


def unpacked(label: str, stream: IO[bytes], compression: str | None) -> Iterator[bytes]:
    """The content of a file, in parts that are not empty. `label` names it in messages.

    Raises:
        Damage: the file is cut short, damaged or misnamed, or a .zip of several files; not before the place
            of the fault is read.
        UserError: a package is missing.
    """
    if compression is None:
        while content := stream.read(CHUNK):
            yield content
        return
    if compression == "zip":
        only_member(label, stream)
    if compression == "zstd" and find_spec("zstandard") is None:
        raise UserError(
            f"{label!r} is zstd-compressed, which needs one more package: pip install 'hf_genlm[zstd]'"
        )
    try:
        yield from filter(None, _UNPACK[compression](stream))
    except _FAULTS as error:
        raise Damage(
            Place(label),
            f"is not readable as {compression} ({one_line(error)})",
            "the file is damaged or misnamed, copy it anew or unpack it",
        ) from error


def only_member(label: str, stream: IO[bytes]) -> str:
    """Name of the one member of a zip archive, to tell its format by. It is never used as a path.

    Raises:
        Damage: the archive is damaged, or holds several members or none.
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
    """What an error of a library says, short and on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _read_parts(stream: IO[bytes] | gzip.GzipFile, n_bytes: int = _PART) -> Iterator[bytes]:
    while content := stream.read(n_bytes):
        yield content


def _gzip(stream: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=stream) as file:
        yield from _read_parts(file)


def _bz2(stream: IO[bytes]) -> Iterator[bytes]:
    with bz2.BZ2File(stream) as file:
        yield from _read_parts(file)


def _zip(stream: IO[bytes]) -> Iterator[bytes]:
    with zipfile.ZipFile(stream) as archive:
        (member,) = archive.infolist()
        bounds_itself = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        with archive.open(member) as file:
            yield from _read_parts(file, _PART if bounds_itself else _SIP)


def _xz(stream: IO[bytes]) -> Iterator[bytes]:
    """All streams; `lzma`'s own file object sets no bound to its memory, and ignores what it cannot read
    behind the first."""
    unpacker: lzma.LZMADecompressor | None = None
    n_streams, rest = 0, b""
    while content := rest or stream.read(CHUNK):
        rest = b""
        if unpacker is None:
            content = content.lstrip(b"\0") if n_streams else content  # zeros may stand behind a stream
            if not content:
                continue
            unpacker, n_streams = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY), n_streams + 1
        yield unpacker.decompress(content, _PART)
        while not unpacker.eof and not unpacker.needs_input:
            yield unpacker.decompress(b"", _PART)
        if unpacker.eof:
            rest, unpacker = unpacker.unused_data, None
    if unpacker is not None:
        raise EOFError("it ends in the middle of a stream")


def _zstd(stream: IO[bytes]) -> Iterator[bytes]:
    """All frames; `zstandard`'s stream reader stops after the first and takes a cut-off file for whole."""
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


_UNPACK: dict[str, Callable[[IO[bytes]], Iterator[bytes]]] = {
    "gzip": _gzip,
    "bz2": _bz2,
    "xz": _xz,
    "zstd": _zstd,
    "zip": _zip,
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zip": "zip"}  # by suffix
