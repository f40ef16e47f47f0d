"""A figure before it has a name and a unit, and the standard errors of one over texts or other clusters."""

import math
from typing import NamedTuple

import numpy as np


class Figure(NamedTuple):
    """A figure over `n` things, and its standard error over texts, None where it cannot be known."""

    value: float
    n: int
    stderr: float | None


def as_results(figures: dict[str, Figure | None]) -> dict[str, float | None]:
    """`NAME` and `NAME_stderr` of each, as metrics of evaluate return them."""
    values = {name: None if figure is None else figure.value for name, figure in figures.items()}
    errors = {f"{name}_stderr": None if figure is None else figure.stderr for name, figure in figures.items()}
    return values | errors


def mean_figure(values: np.ndarray) -> Figure:
    """The mean of independent `values` (M,), at least one."""
    stderr = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Figure(float(values.mean()), len(values), stderr)


def jackknife_stderr(left_out: np.ndarray) -> float:
    """Standard error of a figure from its values (M,) with each of M > 1 clusters left out.

    sqrt((M - 1) / M * sum_i (t_i - mean t)^2). Source: Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, ch. 11.
    """
    m = len(left_out)
    return float(np.sqrt((m - 1) / m * np.square(left_out - left_out.mean()).sum()))
