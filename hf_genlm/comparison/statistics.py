"""How sure a mean or a difference is, from a few seeds and one held-out text.

Two things vary: the run (weights and order of rows, by the seed) and the text that happened to be held out.
All runs are measured on the same text, so seeds and pieces of text are crossed. The variance of a mean over S
seeds is then that between the seeds over S, plus that of the text, which of a difference is taken between
pairs on the same piece. Where seed and piece interact both parts hold the interaction, so their sum is rather
too large (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007). The parts have few degrees
of freedom: their sum is given those of Satterthwaite (Biometrics Bulletin 2, 1946), and Student's t with
them, as Welch (Biometrika 34, 1947) does for two groups. A bootstrap over three seeds would be too narrow: it
makes their variance smaller by a third, and knows no t.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from hf_genlm.evaluation.measurement import ratio_stderr

LEVEL = 0.95
Key = TypeVar("Key")


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error, and the degrees of freedom of that; None: nothing is known of it."""

    value: float
    stderr: float | None
    degrees: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The two ends of the 95 % interval."""
        if self.stderr is None:
            return None
        from scipy.stats import t

        reach = float(t.ppf((1 + LEVEL) / 2, self.degrees)) * self.stderr
        return self.value - reach, self.value + reach

    @property
    def p_value(self) -> float | None:
        """Of the two-sided test that the true value is 0."""
        if self.stderr is None:
            return None
        from scipy.stats import t

        if self.stderr == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * t.sf(abs(self.value) / self.stderr, self.degrees))


def mean_bits(nats_SC: np.ndarray, bytes_C: np.ndarray) -> Estimate:
    """Bits per byte of a candidate, over its S seeds and C clusters of the text."""
    return _estimate(
        float(_bits(nats_SC, bytes_C).mean()),
        [_seed_part(_bits(nats_SC, bytes_C)), _text_part(nats_SC.mean(axis=0), bytes_C)],
    )


def difference_in_bits(nats_SC: np.ndarray, others_SC: np.ndarray, bytes_C: np.ndarray) -> Estimate:
    """Bits per byte of a candidate less those of another one, paired by the clusters of the text.

    The numbers of seeds may differ; a candidate of a single one is taken to vary as the other does. With one
    seed each, only the text varies: the estimate is one of these two models then, and not of how they were
    made.
    """
    bits, other_bits = _bits(nats_SC, bytes_C), _bits(others_SC, bytes_C)
    text = _text_part(nats_SC.mean(axis=0) - others_SC.mean(axis=0), bytes_C)
    parts = [_seed_part(bits), _seed_part(other_bits)]
    if None in parts:
        several = bits if len(bits) > 1 else other_bits
        both = 1 / len(bits) + 1 / len(other_bits)
        parts = [(float(several.var(ddof=1)) * both, len(several) - 1)] if len(several) > 1 else []
    return _estimate(float(bits.mean() - other_bits.mean()), [*parts, text])


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """p-values for several tests at once: the chance of any false finding stays below the level.

    The i-th smallest of m is multiplied by m - i + 1, and none is less than one before it (Holm, A simple
    sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979).
    """
    adjusted: dict[Key, float] = {}
    largest = 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[key]))
        adjusted[key] = largest
    return adjusted


def _bits(nats_SC: np.ndarray, bytes_C: np.ndarray) -> np.ndarray:
    return nats_SC.sum(axis=1) / (math.log(2) * bytes_C.sum())


def _seed_part(values: np.ndarray) -> tuple[float, float] | None:
    """Variance of the mean, and its degrees of freedom; None: of a single one nothing is known."""
    if len(values) < 2:
        return None
    return float(values.var(ddof=1)) / len(values), len(values) - 1


def _text_part(nats_C: np.ndarray, bytes_C: np.ndarray) -> tuple[float, float] | None:
    stderr = ratio_stderr(nats_C / math.log(2), bytes_C)
    return None if stderr is None else (stderr**2, len(nats_C) - 1)


def _estimate(value: float, parts: Sequence[tuple[float, float] | None]) -> Estimate:
    known = [part for part in parts if part is not None]
    if not known:
        return Estimate(value, None, None)
    total = sum(variance for variance, _ in known)
    if total == 0:
        return Estimate(value, 0.0, min(degrees for _, degrees in known))
    return Estimate(
        value, math.sqrt(total), total**2 / sum(variance**2 / degrees for variance, degrees in known)
    )
