"""Bounds of files that are held in memory; control of the C library's heap.

Freed memory is returned to the system, or kept for the next use. Only glibc has these calls; with another C
library nothing happens.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

from hf_genlm.errors import UserError

MAX_BYTES = 1 << 26  # of a file that is held in memory as a whole
MAX_VALUES = 1 << 21  # of a JSON file
_PARSED = {".json", ".txt", ".model", ".jinja", ".yaml", ".md"}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt in malloc.h
_NEVER = 2**31 - 1  # bytes, the maximum of mallopt
_MAX_THRESHOLD = 1 << 25  # bytes, the maximum of glibc's own, dynamic threshold


def give_back_memory() -> None:
    """Return freed heap memory to the system: after BPE merges or large batches, hundreds of megabytes."""
    _call("malloc_trim", 0)


@contextlib.contextmanager
def keeping_memory() -> Iterator[None]:
    """Keep freed memory in the process within the block, and return it to the system at the end.

    A training step allocates and frees the same large tensors again and again. Memory that comes new from the
    system is zeroed page by page first.
    """
    _call("mallopt", _MMAP_THRESHOLD, _NEVER)
    _call("mallopt", _TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        _call("mallopt", _MMAP_THRESHOLD, _MAX_THRESHOLD)
        _call("mallopt", _TRIM_THRESHOLD, 2 * _MAX_THRESHOLD)
        give_back_memory()


def _call(name: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: CDLL(None) on Windows
        getattr(ctypes.CDLL(None), name)(*arguments)


def check_size(content: bytes, max_bytes: int, path: str | Path) -> bytes:
    """Return `content`.

    Raises:
        UserError: it has more than `max_bytes`; `path` is where it was read, for the message.
    """
    if len(content) > max_bytes:
        raise UserError(f"{str(path)!r} has more than {max_bytes:,} bytes: name a smaller file")
    return content


def check_values(content: str, path: str | Path) -> str:
    """Return `content`, JSON of at most `MAX_VALUES` values: parsed, each takes up to 250 bytes.

    Raises:
        UserError: there are more; `path` is where it was read, for the message.
    """
    if sum(map(content.count, ",[{")) > MAX_VALUES:
        raise UserError(f"{str(path)!r} is damaged: it holds more than {MAX_VALUES:,} values")
    return content


def check_sizes(folder: str | Path) -> None:
    """Refuse a model folder whose files of text, such as tokenizer.json, are too large to be parsed.

    Raises:
        UserError: a file has more than `MAX_BYTES`.
    """
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in _PARSED and path.is_file() and path.stat().st_size > MAX_BYTES:
            raise UserError(
                f"{str(path)!r} has more than {MAX_BYTES:,} bytes, too many to be parsed: "
                "name a folder with a smaller one"
            )
