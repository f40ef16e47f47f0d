"""What windows of text add up to, and the figures about all of it that follow, with their errors.

Calibration. The confidence in a prediction is the probability of the likeliest token, and it is right where
top1_accuracy counts it. The expected calibration error is sum_k |hits_k - confidence_k| / N over `BINS` bins
of equal width, each sum over the tokens whose confidence lies in ((k - 1) / BINS, k / BINS] (Naeini et al.,
AAAI 2015; Guo et al., ICML 2017, eq. 3, with as many bins). Such bins are known before the first token is
scored, so that sums of windows are enough. The standard error and the interval take the signs of the bins'
sums as given; of few tokens, chance alone makes the figure larger than that of all text.

Errors. Standard errors (`ratio_stderr`) and 95 % intervals (`bootstrap`) are clustered: by document where at
least `MIN_DOCUMENT_CLUSTERS` were scored, otherwise by window, of which those of a document resemble each
other: their error is rather a lower bound. Windows are taken to have the bytes per token of all documents.

Legend of shapes: N scored tokens, W windows, D documents, C clusters, R resamples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.evaluation.bootstrap import bootstrap_sums, percentile_interval
from hf_genlm.evaluation.measurement import Measurement, ratio_stderr

# From so many documents on, documents are the clusters of standard errors and intervals.
MIN_DOCUMENT_CLUSTERS = 20
BINS = 15


class Sums(NamedTuple):
    """What each window adds up to, in the order of the windows; each (W,) float64, `gaps` (W, BINS).

    `gaps` are hits - confidence of the predictions whose confidence lies in a bin.
    """

    tokens: np.ndarray
    nats: np.ndarray
    top1: np.ndarray
    top5: np.ndarray
    gaps: np.ndarray

    @property
    def miscalibration(self) -> np.ndarray:
        """(W,) float64, in all the sum of |gaps| over the bins of the whole."""
        return self.gaps @ np.sign(self.gaps.sum(axis=0))


class _Figure(NamedTuple):
    """`scale` times the sum of a numerator over that of a denominator, or the exponential of it."""

    name: str
    unit: str
    numerator: str
    denominator: str
    scale: float = 1.0
    is_exponent: bool = False
    higher_is_better: bool = False


_FIGURES = (
    _Figure("nats_per_token", "nats/token", "nats", "tokens"),
    _Figure("perplexity", "1", "nats", "tokens", is_exponent=True),
    _Figure("bits_per_byte", "bits/byte", "nats", "bytes", scale=1 / math.log(2)),
    _Figure("top1_accuracy", "fraction", "top1", "tokens", higher_is_better=True),
    _Figure("top5_accuracy", "fraction", "top5", "tokens", higher_is_better=True),
    _Figure("calibration_error", "fraction", "miscalibration", "tokens"),
    _Figure("word_perplexity", "1", "nats", "words", is_exponent=True),
)
_OF_PARTS = ("nats_per_token", "bits_per_byte")
_NUMERATORS = ("nats", "top1", "top5", "miscalibration")


def gaps_of(hits_N: np.ndarray, confidence_N: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sums of hits - confidence by window and bin: (windows of `lengths` tokens, BINS)."""
    bin_N = np.clip(np.ceil(confidence_N * BINS).astype(np.int64) - 1, 0, BINS - 1)
    cell_N = np.repeat(np.arange(len(lengths)) * BINS, lengths) + bin_N
    sums = np.bincount(cell_N, hits_N - confidence_N, minlength=len(lengths) * BINS)
    return sums.reshape(len(lengths), BINS)


def measurements_of(
    sums: Sums, documents_W: Sequence[int] | np.ndarray, sizes: dict[str, np.ndarray], split: str
) -> list[Measurement]:
    """The figures of windows that lie in `documents_W`.

    `sizes` has the tokens and bytes, and perhaps the words, of whole documents, (D,) each. Of windows alone
    they are not known: the figures over bytes and words take all text to have as many per token.
    """
    n, totals = int(sums.tokens.sum()), {unit: int(size.sum()) for unit, size in sizes.items()}
    assert totals["bytes"] > 0, "documents with tokens must have bytes"
    clusters = _clusters(sums, documents_W, sizes, totals)
    resampled: dict[str, np.ndarray] = {}
    if len(clusters["tokens"]) > 1:
        resampled_RK = bootstrap_sums(np.stack(list(clusters.values()), axis=1))
        resampled = dict(zip(clusters, resampled_RK.T, strict=True))
    found = []
    for figure in _FIGURES:
        if figure.denominator not in totals:
            continue
        rate = totals[figure.denominator] / totals["tokens"]
        value = figure.scale * (math.fsum(getattr(sums, figure.numerator)) / n / rate)
        stderr = ratio_stderr(clusters[figure.numerator], clusters[figure.denominator])
        interval = None
        if stderr is not None:
            stderr *= figure.scale
            ratio_R = resampled[figure.numerator] / resampled[figure.denominator]
            interval = percentile_interval(figure.scale * ratio_R)
        if figure.is_exponent:
            value, stderr, interval = _exponential(value, stderr, interval)
        found.append(
            Measurement(
                figure.name,
                value,
                figure.unit,
                n=round(n * rate),
                stderr=stderr,
                split=split,
                higher_is_better=figure.higher_is_better,
                interval=interval,
            )
        )
    return found


def measurements_of_parts(
    parts: Mapping[str, int], sums: Sums, documents_W: np.ndarray, sizes: dict[str, np.ndarray], split: str
) -> list[Measurement]:
    """`nats_per_token/NAME` and `bits_per_byte/NAME` of each part of the documents, as if it were all.

    `parts` has how many documents each has, in the order in which they stand.

    Raises:
        UserError: a part without a token.
    """
    found = []
    stop = 0
    for name, n_documents in parts.items():
        start, stop = stop, stop + n_documents
        chosen_W = (start <= documents_W) & (documents_W < stop)
        if not chosen_W.any():
            raise UserError(f"the {split} split holds no token of {name!r} to score: give it text of it")
        of_part = measurements_of(
            Sums(*(values[chosen_W] for values in sums)),
            documents_W[chosen_W] - start,
            {unit: size[start:stop] for unit, size in sizes.items()},
            split,
        )
        found += [replace(m, name=f"{m.name}/{name}") for m in of_part if m.name in _OF_PARTS]
    return found


def _clusters(
    sums: Sums,
    documents_W: Sequence[int] | np.ndarray,
    sizes: dict[str, np.ndarray],
    totals: dict[str, int],
) -> dict[str, np.ndarray]:
    """What each cluster adds up to, (C,) float64 of each kind: documents, or windows where those are few."""
    documents, document_W = np.unique(documents_W, return_inverse=True)
    by_document = len(documents) >= MIN_DOCUMENT_CLUSTERS
    cluster_W = document_W if by_document else np.arange(len(document_W))
    tokens: np.ndarray = np.bincount(cluster_W, sums.tokens)
    clusters: dict[str, np.ndarray] = {
        kind: np.bincount(cluster_W, getattr(sums, kind)) for kind in _NUMERATORS
    }
    is_whole = by_document and int(tokens.sum()) == totals["tokens"]
    for unit, size in sizes.items():
        rate = totals[unit] / totals["tokens"]
        clusters[unit] = size[documents].astype(np.float64) if is_whole else tokens * rate
    return clusters


def _exponential(
    exponent: float, stderr: float | None, interval: tuple[float, float] | None
) -> tuple[float, float | None, tuple[float, float] | None]:
    """exp of a figure; its standard error by the delta method, the ends of its interval as they are."""
    value = _exp(exponent)
    if stderr is None or interval is None:
        return value, None, None
    return value, value * stderr, (_exp(interval[0]), _exp(interval[1]))


def _exp(exponent: float) -> float:
    return math.exp(exponent) if exponent < 700 else math.inf
