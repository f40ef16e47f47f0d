"""Helpers shared by tests: whether random arrays are independent of each other."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np

_MAX_Z = 6.0  # standard errors; exceeded by chance in one of 500 million comparisons
_MAX_SHARED = 0.05  # share of equal values; of 5,000 float32 Gaussians by chance about one in a thousand


def dependent_pairs(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, str, str]]:
    """Pairs of arrays that depend on each other, and what shows it: the correlation of their values or of
    their squares, over the common length, or values that both have, wherever they stand."""
    flat = {name: np.asarray(values, dtype=np.float64).ravel() for name, values in arrays.items()}
    found = []
    for (name, first), (other, second) in combinations(flat.items(), 2):
        n = min(len(first), len(second))
        for what, power in (("values", 1), ("squares", 2)):
            pair = np.stack([first[:n] ** power, second[:n] ** power])
            if abs(np.corrcoef(pair)[0, 1]) * np.sqrt(n) > _MAX_Z:
                found.append((name, other, what))
        if len(np.intersect1d(first, second)) > _MAX_SHARED * n:
            found.append((name, other, "shared values"))
    return found
