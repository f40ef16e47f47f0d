"""Cache of computed arrays on disk: one file per entry, keyed by a hash of all that decides its content.

The files lie in `$HF_GENLM_CACHE`, or else in `hf_genlm` in `$XDG_CACHE_HOME` or `~/.cache`. Each ends with a
table of its arrays and a checksum; a truncated or damaged file is computed again. Above 20 GB the least
recently used entries are deleted. The folder may be removed at any time.
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
from hf_genlm.files import PendingFile, cache_folder, open_file

SPARE_BYTES = 1 << 28  # free space that scratch files leave on the disk
STALE_S = 86_400  # age at which an unfinished file is deleted
_FORMAT = 1  # part of every key: raise it when the content for the same key changes
_SUFFIX = ".arrays"
_TAIL = struct.Struct("<Q32s8s")  # length of the table, sha256 of arrays and table, magic
_MAGIC = b"hfgenlm\n"
_ALIGNMENT = 64


class ArrayFile:
    """Read-only arrays `arrays[name]` (n,), memory-mapped from one file."""

    def __init__(self, file: IO[bytes], table: Mapping[str, Any]):
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.arrays = {
            name: np.frombuffer(self._map, place["dtype"], place["length"], place["offset"])
            for name, place in table.items()
        }

    def release(self) -> None:
        """Return the memory of pages read so far to the system; they are read again when used."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class ArrayWriter:
    """Context manager that writes an `ArrayFile` part by part; without `finish` nothing is left on disk.

    Raises:
        NoRoom: from `append` and `finish`, if the disk is full.
    """

    def __init__(self, cache: "Cache", key: str | None):
        self._cache = cache
        self._pending = cache.new_file(key)
        self._file = scratch_file() if self._pending is None else self._pending.file
        self._hash = hashlib.sha256()
        self._n_bytes = 0
        self._table: dict[str, dict[str, Any]] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Append `values` (n,) to the array `name`; the arrays are written one after another."""
        if name not in self._table:
            self._write(b"\0" * (-self._n_bytes % _ALIGNMENT))
            self._table[name] = {"dtype": values.dtype.str, "length": 0, "offset": self._n_bytes}
        assert name == list(self._table)[-1]
        assert values.dtype.str == self._table[name]["dtype"]
        self._write(np.ascontiguousarray(values).tobytes())
        self._table[name]["length"] += len(values)

    def finish(self) -> ArrayFile:
        """Write the table and add the file to the cache; returns its arrays."""
        table = json.dumps(self._table).encode()
        self._write(table)
        self._write(_TAIL.pack(len(table), self._hash.digest(), _MAGIC))
        try:
            self._file.flush()
            finished = ArrayFile(self._file, self._table)
            if self._pending is not None:
                self._pending.commit()
                self._cache.remove_oldest(self._pending.path)
        except OSError as error:
            raise no_room(error, self._n_bytes) from error
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
            raise no_room(error, self._n_bytes) from error
        self._n_bytes += len(content)


def usable_cache(is_wanted: bool, note: Callable[[str], None]) -> "Cache":
    """The cache of this user, which keeps nothing if there is no place for it; `note` receives why."""
    try:
        return Cache(cache_folder() if is_wanted else None, note)
    except UserError as error:
        note(f"the text is tokenized again by each run: {error}")
        return Cache(None, note)


class Cache:
    """Array files by key in `folder`, at most `max_bytes` of them; a folder of None stores nothing.

    `note(message)` receives what goes wrong: a cache that cannot be used never stops a run.
    """

    def __init__(
        self,
        folder: Path | None,
        note: Callable[[str], None] = lambda message: None,
        max_bytes: int = 20 * 10**9,
    ):
        self.folder, self.max_bytes, self._note = folder, max_bytes, note

    def load(self, key: str) -> ArrayFile | None:
        """Verified entry of `key`; None if there is none, it is damaged, or another user wrote it."""
        if self.folder is None:
            return None
        path = self.folder / (key + _SUFFIX)
        try:
            with open_file(path) as file:
                if hasattr(os, "geteuid") and os.fstat(file.fileno()).st_uid != os.geteuid():
                    raise PermissionError(errno.EPERM, "another user wrote it")
                entry = None
                # a table that this package did not write
                with contextlib.suppress(
                    ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError
                ):
                    table = _verified_table(file)
                    entry = None if table is None else ArrayFile(file, table)
                if entry is not None:
                    os.utime(path)  # marks the entry as recently used
                    return entry
            self._note(f"the cached {path.name} is damaged: it is made anew")
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._note(f"the cached {path.name} cannot be used ({error.strerror}): it is made anew")
        return None

    def new_file(self, key: str | None) -> PendingFile | None:
        """An open file to become the entry of `key`; None if nothing is stored."""
        if self.folder is not None and key is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / (key + _SUFFIX)
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, f"{path.name} is a folder")
                return PendingFile(path, mode=0o600)
            except OSError as error:
                self._note(
                    f"the cache {str(self.folder)!r} cannot be written ({error.strerror}): this run keeps "
                    "nothing; name another folder by HF_GENLM_CACHE, or --set corpus.cache=false"
                )
                self.folder = None
        return None

    def remove_oldest(self, newest: Path) -> None:
        """Delete unfinished files, and above the limit the least recently used entries except `newest`."""
        left, now = self.max_bytes - newest.stat().st_size, time.time()
        others: list[tuple[float, int, Path]] = []  # seconds since the last use, bytes, path
        with os.scandir(newest.parent) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process deleted it first
                    state = entry.stat()
                    others.append((now - state.st_mtime, state.st_size, Path(entry.path)))
        for age_s, size, path in sorted(others):
            if path.suffix == ".part" and age_s > STALE_S:
                path.unlink(missing_ok=True)
            elif path.suffix == _SUFFIX and path != newest:
                left -= size
                if left < 0:
                    path.unlink(missing_ok=True)


def key_of(**decides: Any) -> str:
    """Key of an entry whose content is decided by `decides`, JSON values."""
    content = json.dumps({"format": _FORMAT, **decides}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def scratch_file() -> IO[bytes]:
    """A nameless temporary file, deleted with the process; in the cache folder if possible."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=cache_folder())
    except (OSError, UserError):
        return tempfile.TemporaryFile()


class NoRoom(UserError):
    """The disk of scratch and cache files is full, or would be."""


def check_room(file: IO[bytes], n_bytes: int, n_more: int) -> None:
    """
    Raises:
        NoRoom: `n_more` bytes added to the `n_bytes` of `file` would leave less than `SPARE_BYTES` of its
            disk free.
    """
    if not hasattr(os, "fstatvfs"):
        return
    state = os.fstatvfs(file.fileno())
    if state.f_bavail * state.f_frsize < n_more + SPARE_BYTES:
        raise no_room("the disk is nearly full", n_bytes)


def no_room(reason: OSError | str, n_bytes: int) -> NoRoom:
    """The error to raise for `reason`, met after `n_bytes` were written."""
    if isinstance(reason, OSError):
        reason = "the disk is full" if reason.errno == errno.ENOSPC else reason.strerror or "unknown error"
    return NoRoom(
        f"writing to the cache or {tempfile.gettempdir()!r} failed after {n_bytes:,} bytes ({reason}): "
        "make room, or name a folder on another disk by HF_GENLM_CACHE"
    )


def _verified_table(file: IO[bytes]) -> dict[str, Any] | None:
    """Table at the end of `file`; None if the checksum of the file does not match."""
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
