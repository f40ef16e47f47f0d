"""Figures of what was scored elsewhere: texts, minimal pairs, predictions with a confidence."""

import math
from collections.abc import Sequence

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.evaluation.figure import Figure
from hf_genlm.evaluation.measurement import ratio_stderr
from hf_genlm.evaluation.sums import BINS

_ROUNDING = 1e-6  # relative, of a sum of float32 log-probabilities


def bits_per_byte(nats: Sequence[float] | np.ndarray, n_bytes: Sequence[int] | np.ndarray) -> Figure:
    """sum(nats) / ln 2 / sum(bytes) of texts.

    Args:
        nats: - log P (M,) of each text, summed over its tokens.
        n_bytes: UTF-8 bytes (M,) of each text.

    Returns:
        Bits per byte, the number of bytes, and the standard error clustered by text.

    Raises:
        UserError: no text, arrays of different lengths, a number that is not finite, no bytes at all.
    """
    nats, n_bytes = _checked("nats and bytes of texts", nats, n_bytes)
    if n_bytes.sum() <= 0:
        raise UserError("the texts hold no bytes: bits per byte need some text")
    bits = nats / math.log(2)
    return Figure(float(bits.sum() / n_bytes.sum()), int(n_bytes.sum()), ratio_stderr(bits, n_bytes))


def pair_accuracy(good: Sequence[float] | np.ndarray, bad: Sequence[float] | np.ndarray) -> Figure:
    """The share of minimal pairs whose good sentence is the likelier one; as likely, to rounding, counts 1/2.

    Source: Warstadt et al., BLiMP: The Benchmark of Linguistic Minimal Pairs for English, TACL 2020.

    Args:
        good, bad: log-probabilities (P,) of the sentences of each pair, summed over their tokens.

    Returns:
        The share, the number of pairs, and the standard error over pairs.

    Raises:
        UserError: no pair, arrays of different lengths, or a number that is not finite.
    """
    good, bad = _checked("log-probabilities of good and bad sentences", good, bad)
    worth = worth_of_pairs(good, bad)
    return Figure(float(worth.mean()), len(worth), ratio_stderr(worth, np.ones(len(worth))))


def worth_of_pairs(good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """(P,): 1 where the good sentence has the higher log-probability, 1/2 where both have one, else 0."""
    is_tie = np.abs(good - bad) <= _ROUNDING * np.maximum(np.abs(good), np.abs(bad))
    return np.where(is_tie, 0.5, good > bad)


def calibration_error(
    confidence: Sequence[float] | np.ndarray,
    correct: Sequence[bool] | np.ndarray,
    bins: int = BINS,
) -> Figure:
    """The expected calibration error: sum_k |hits_k - confidence_k| / n over bins of equal width.

    Bin k of K holds the predictions with a confidence in ((k - 1) / K, k / K]; 0 is in the first. Source: Guo
    et al., On Calibration of Modern Neural Networks, ICML 2017, eq. 3. Of few predictions, chance alone makes
    it larger than that of all. The standard error takes the sign of each bin as given.

    Args:
        confidence: probability (n,) that each prediction was given.
        correct: whether it was right (n,).

    Raises:
        UserError: no prediction, arrays of different lengths, a confidence outside 0..1, fewer than one bin.
    """
    confidence, correct = _checked("confidences and outcomes", confidence, correct)
    if confidence.min() < 0 or confidence.max() > 1:
        outside = confidence[(confidence < 0) | (confidence > 1)][0]
        raise UserError(f"a confidence of {outside}: it is a probability from 0 to 1")
    if not np.isin(correct, (0, 1)).all():
        raise UserError("an outcome is right or wrong: give 1 or 0 for each prediction")
    if bins < 1:
        raise UserError(f"bins = {bins}: must be at least 1")
    bin_of = np.maximum(np.ceil(confidence * bins).astype(np.int64) - 1, 0)
    gaps = np.bincount(bin_of, correct - confidence, bins)
    signed = (correct - confidence) * np.sign(gaps)[bin_of]
    return Figure(float(signed.mean()), len(signed), ratio_stderr(signed, np.ones(len(signed))))


def _checked(
    what: str, first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise UserError(
            f"{what} belong together: give as many of one as of the other, not {a.shape}, {b.shape}"
        )
    if not len(a):
        raise UserError(f"no {what} were given: nothing can be computed of none")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError(f"{what} must be finite numbers")
    return a, b
