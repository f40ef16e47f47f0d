"""Bootstrap over clusters: what sums over other draws of the same size would have been.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 6 and 13 (percentile intervals).
"""

from collections.abc import Iterator

import numpy as np

RESAMPLES = 2000
COVERAGE = 0.95
_AT_ONCE = 1 << 22  # clusters that are drawn at once: 32 MiB of numbers


def bootstrap_sums(sums_NK: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Column sums of N clusters drawn with replacement out of N, as often as `resamples`.

    All K columns of a resample are those of the same clusters, so a ratio of two of them is a resampled
    ratio. The same `seed` and N always draw the same clusters.

    Args:
        sums_NK: what each cluster adds up to.

    Returns:
        (resamples, K) float64.
    """
    sums_NK = np.asarray(sums_NK, dtype=np.float64)
    return np.concatenate([counts @ sums_NK for counts in _draws(len(sums_NK), resamples, seed)])


def percentile_interval(values_R: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    low, high = np.quantile(values_R, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def _draws(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n clusters is drawn, (some resamples, n) at a time."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // n)
    for first in range(0, resamples, at_once):
        rows = min(at_once, resamples - first)
        drawn = generator.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
