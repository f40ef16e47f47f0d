"""What the C library does with memory that is freed: give it back to the system, or keep it for the next use.

Only glibc has these calls; with another C library nothing happens.
"""

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names in malloc.h
_NEVER = 2**31 - 1  # bytes, the most that mallopt takes
_LARGEST_OWN = 1 << 25  # what glibc's own threshold grows to


def give_back_memory() -> None:
    """To the system, what merges and batches took: hundreds of megabytes."""
    _call("malloc_trim", 0)


@contextlib.contextmanager
def keeping_memory() -> Iterator[None]:
    """Freed memory stays with the process inside, and is given back at the end.

    A training step takes and frees the same large tensors again and again; what comes new from the system is
    zeroed page by page first.
    """
    _call("mallopt", _MMAP_THRESHOLD, _NEVER)
    _call("mallopt", _TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        _call("mallopt", _MMAP_THRESHOLD, _LARGEST_OWN)
        _call("mallopt", _TRIM_THRESHOLD, 2 * _LARGEST_OWN)
        give_back_memory()


def _call(name: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows, of CDLL(None)
        getattr(ctypes.CDLL(None), name)(*arguments)
