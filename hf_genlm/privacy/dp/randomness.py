"""The randomness of a private run: which documents are drawn at a step, and the noise.

All of it follows from a secret key of 256 bits and the number of the step, by SHAKE-256 (FIPS 202). So a run
that is resumed draws what an uninterrupted one does, and nobody without the key can say what was drawn.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

KEY_BYTES = 32
_AT_ONCE = 1 << 20  # numbers
_ADDED = 4  # Gaussians that make one


def draw_documents(key: bytes, step: int, n_documents: int, rate: float) -> np.ndarray:
    """(k,) numbers of the documents of a step, each drawn with probability `rate`, independently of all
    others: Poisson sampling."""
    words = _words(key, step, "documents", n_documents)
    return np.flatnonzero(words < np.uint64(rate * 2.0**64)) if rate < 1 else np.arange(n_documents)


def draw_numbers(key: bytes, step: int, count: int) -> np.ndarray:
    """(count,) uint64, uniform: where in its document a window begins."""
    return _words(key, step, "windows", count)


def fast_noise(
    key: bytes, step: int, shapes: Sequence[tuple[int, ...]], device: torch.device
) -> list[torch.Tensor]:
    """Standard Gaussians of `shapes`, by Philox: good numbers that no cryptographer vouches for."""
    seed = _words(key, step, "noise", 2)
    if device.type == "cuda":
        generator = torch.Generator(device).manual_seed(int(seed[0]) >> 1)
        return [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    numbers = np.random.Generator(np.random.Philox(key=seed))
    return [torch.from_numpy(numbers.standard_normal(shape, dtype=np.float32)).to(device) for shape in shapes]


def secure_noise(
    key: bytes, step: int, shapes: Sequence[tuple[int, ...]], device: torch.device
) -> list[torch.Tensor]:
    """Standard Gaussians of `shapes`, from SHAKE-256 by Box and Muller (1958).

    Each is the sum of four, halved: then the last bits of the result do not tell what the noise was added to
    (Holohan and Braghin, 2021, arXiv:2107.10138).
    """
    total = sum(math.prod(shape) for shape in shapes)
    flat = np.empty(total, dtype=np.float32)
    for part, start in enumerate(range(0, total, _AT_ONCE)):
        count = min(_AT_ONCE, total - start)
        words = _words(key, step, f"secure noise {part}", _ADDED * count)
        flat[start : start + count] = _gaussians(words).reshape(_ADDED, count).sum(0) / math.sqrt(_ADDED)
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return [
        torch.from_numpy(part.reshape(shape)).to(device)
        for part, shape in zip(np.split(flat, ends), shapes, strict=True)
    ]


NOISES: dict[bool, Callable[..., list[torch.Tensor]]] = {False: fast_noise, True: secure_noise}


def _gaussians(words: np.ndarray) -> np.ndarray:
    """As many float64 as there are words; an even number of them."""
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
    first, second = uniform.reshape(2, -1)
    radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def _words(key: bytes, step: int, purpose: str, count: int) -> np.ndarray:
    """(count,) uint64, uniform and independent of those of any other step or purpose."""
    assert len(key) == KEY_BYTES
    text = key + step.to_bytes(8, "little") + purpose.encode()
    return np.frombuffer(hashlib.shake_256(text).digest(8 * count), dtype="<u8")
