"""Control of the C library's heap: return freed memory to the system, or keep it for the next use.

Only glibc has these calls; with another C library nothing happens.
"""

import contextlib
import ctypes
from collections.abc import Iterator

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
