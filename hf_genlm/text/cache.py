"""What a run need not compute again: arrays in files, each found by a hash of all that decides its content.

The files lie in `$HF_GENLM_CACHE`, or else in `hf_genlm` in `$XDG_CACHE_HOME` or `~/.cache`. Each ends with a
table of its arrays and a checksum: one that is cut off or damaged is made anew. Beyond 20 GB the ones used
longest ago go. The folder may be removed at any time.
"""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.files import PendingFile

_FORMAT = 1  # part of every key: raise it when the content for the same key changes
_SUFFIX = ".arrays"
_MAX_BYTES = 20 * 10**9
_SPARE = 1 << 28  # bytes of the disk that are left to others
_STALE_S = 86_400  # age of a file that was never finished
_TAIL = struct.Struct("<Q32s8s")  # bytes of the table, sha256 of all before it and of the table, magic
_MAGIC = b"hfgenlm\n"
_ALIGNMENT = 64


class ArrayFile:
    """Arrays in one file: `arrays[name]` is read-only, and read from disk when it is used."""

    def __init__(self, file: IO[bytes], table: Mapping[str, Any]):
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.arrays = {
            name: np.frombuffer(self._map, place["dtype"], place["length"], place["offset"])
            for name, place in table.items()
        }

    def release(self) -> None:
        """Give back the memory of what was read; it is read again when it is used."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class ArrayWriter:
    """Writes an `ArrayFile`: `append` part by part, `finish` at the end. Nothing is left without that.

    Raises:
        UserError: from both, when the disk is full.
    """

    def __init__(self, cache: "Cache", key: str | None):
        self._cache = cache
        self._pending = cache.new_file(key)
        self._file = scratch_file() if self._pending is None else self._pending.file
        self._hash = hashlib.sha256()
        self._n_bytes = 0
        self._table: dict[str, dict[str, Any]] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Write `values` (n,) behind those of the same name; a name that was left is not taken up again."""
        if name not in self._table:
            self._write(b"\0" * (-self._n_bytes % _ALIGNMENT))
            self._table[name] = {"dtype": values.dtype.str, "length": 0, "offset": self._n_bytes}
        assert name == list(self._table)[-1]
        assert values.dtype.str == self._table[name]["dtype"]
        self._write(np.ascontiguousarray(values).tobytes())
        self._table[name]["length"] += len(values)

    def finish(self) -> ArrayFile:
        """The arrays that were written, in the cache from now on."""
        table = json.dumps(self._table).encode()
        length = len(table)
        self._write(table)
        self._write(_TAIL.pack(length, self._hash.digest(), _MAGIC))
        try:
            self._file.flush()
            finished = ArrayFile(self._file, self._table)
            if self._pending is not None:
                self._pending.commit()
                self._cache.remove_oldest(self._pending.path)
        except OSError as error:
            raise no_space(error, self._n_bytes) from error
        return finished

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pending is None:
            self._file.close()
        else:
            self._pending.discard()

    def _write(self, content: bytes) -> None:
        self._hash.update(content)
        try:
            self._file.write(content)
        except OSError as error:
            raise no_space(error, self._n_bytes) from error
        self._n_bytes += len(content)


class Cache:
    """Array files by key in `folder`; None keeps nothing. `note(message)` is told what goes wrong."""

    def __init__(self, folder: Path | None, note: Callable[[str], None] | None = None):
        self.folder, self._note = folder, note or (lambda message: None)

    def load(self, key: str) -> ArrayFile | None:
        """The entry of `key`, verified; None when there is none, or none that is whole."""
        if self.folder is None:
            return None
        path = self.folder / (key + _SUFFIX)
        try:
            with path.open("rb") as file:
                table = _verified_table(file)
                if table is not None:
                    os.utime(path)  # the one used last
                    return ArrayFile(file, table)
            self._note(f"the cached {path.name} is damaged: it is made anew")
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._note(f"the cached {path.name} cannot be used ({error.strerror}): it is made anew")
        return None

    def new_file(self, key: str | None) -> PendingFile | None:
        """An open file that may become the entry of `key`; None where nothing is kept."""
        if self.folder is not None and key is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                return PendingFile(self.folder / (key + _SUFFIX), mode=0o600)
            except OSError as error:
                self._note(
                    f"the cache {str(self.folder)!r} cannot be written ({error.strerror}): this run keeps "
                    "nothing; name another folder by HF_GENLM_CACHE, or --set corpus.cache=false"
                )
                self.folder = None
        return None

    def remove_oldest(self, kept: Path) -> None:
        """Remove unfinished files, and beyond the limit the entries used longest ago, but not `kept`."""
        room = _MAX_BYTES - kept.stat().st_size
        for age_s, size, path in sorted(_ages_of(kept.parent)):
            if path.suffix == ".part" and age_s > _STALE_S:
                path.unlink(missing_ok=True)
            elif path.suffix == _SUFFIX and path != kept:
                room -= size
                if room < 0:
                    path.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where entries lie, whether or not it exists."""
    if os.environ.get("HF_GENLM_CACHE"):
        return Path(os.environ["HF_GENLM_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hf_genlm"


def key_of(**decides: Any) -> str:
    """The key of what is decided by `decides`, whose values JSON can hold."""
    content = json.dumps({"format": _FORMAT, **decides}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def scratch_file() -> IO[bytes]:
    """A file without a name, which goes with the process: in the cache folder, or else the temporary one."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=cache_folder())
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return tempfile.TemporaryFile()


class NoRoom(UserError):
    """The disk that scratch files lie on has no room for more."""


def check_room(file: IO[bytes], n_bytes: int, n_more: int) -> None:
    """
    Raises:
        NoRoom: with `n_more` bytes in `file`, which has `n_bytes`, less than `_SPARE` would be left of the
            disk for everything else that writes to it.
    """
    if not hasattr(os, "fstatvfs"):
        return
    state = os.fstatvfs(file.fileno())
    if state.f_bavail * state.f_frsize < n_more + _SPARE:
        raise _no_room(n_bytes, "the disk is nearly full")


def no_space(error: OSError, n_bytes: int) -> NoRoom:
    """What a person can do about `error`, which came after `n_bytes` were written."""
    return _no_room(n_bytes, "the disk is full" if error.errno == errno.ENOSPC else error.strerror)


def _no_room(n_bytes: int, reason: str | None) -> NoRoom:
    return NoRoom(
        f"writing to the cache or {tempfile.gettempdir()!r} failed after {n_bytes:,} bytes ({reason}): "
        "make room, or name a folder on another disk by HF_GENLM_CACHE"
    )


def _ages_of(folder: Path) -> list[tuple[float, int, Path]]:
    """(seconds since it was used, bytes, path) of the files in `folder`."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                state = entry.stat()
                found.append((time.time() - state.st_mtime, state.st_size, Path(entry.path)))
    return found


def _verified_table(file: IO[bytes]) -> dict[str, Any] | None:
    """The table at the end of `file`; None unless every byte is as it was written."""
    size = file.seek(0, os.SEEK_END)
    if size < _TAIL.size:
        return None
    file.seek(size - _TAIL.size)
    length, digest, magic = _TAIL.unpack(file.read())
    if magic != _MAGIC or length > size - _TAIL.size:
        return None
    file.seek(0)
    found = hashlib.sha256()
    left = size - _TAIL.size
    while left:
        content = file.read(min(left, 1 << 20))
        found.update(content)
        left -= len(content)
    if found.digest() != digest:
        return None
    file.seek(size - _TAIL.size - length)
    return json.loads(file.read(length))
