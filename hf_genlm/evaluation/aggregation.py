"""Aggregate token scores: window sums into measurements with errors, and sums by block of text.

Calibration. The confidence of a prediction is the probability of the likeliest token; a prediction is correct
where top1_accuracy counts it. The expected calibration error is sum_k |hits_k - confidence_k| / N over
`NUM_BINS` bins of equal width, each sum over the tokens whose confidence lies in
((k - 1) / NUM_BINS, k / NUM_BINS] (Naeini et al., AAAI 2015; Guo et al., ICML 2017, eq. 3, same number of
bins). Fixed bins make sums over windows sufficient. The standard error and the interval take the sign of each
bin's sum as given; with few tokens, chance alone inflates the value.

Errors. Standard errors (`ratio_stderr`) and 95 % intervals (`bootstrap_sums`) are clustered: by document if
at least `MIN_DOCUMENT_CLUSTERS` were scored, otherwise by window. Windows of one document are correlated, so
their error is rather a lower bound. Windows are assumed to have the bytes per token of all documents.

Legend of shapes: N scored tokens, W windows, D documents, C clusters, R resamples.
"""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import (
    Measurement,
    Statistic,
    bootstrap_sums,
    percentile_interval,
    ratio_stderr,
)
from hf_genlm.files import atomic_file, open_file
from hf_genlm.memory import MAX_BYTES

Document = tuple[np.ndarray, int]  # token ids (T,), bytes of the original text
MIN_DOCUMENT_CLUSTERS = 20  # number of documents from which on they are the clusters of errors
NUM_BINS = 15  # of the calibration error
BLOCK_BYTES = 2048
_BLOCK_FIELDS = [("document", np.int64), ("bytes", np.float64), ("tokens", np.int64), ("nats", np.float64)]


class Window(NamedTuple):
    """Inputs [start, stop) of the start token and a document; the targets [first, stop) are scored."""

    document: int
    start: int
    first: int
    stop: int


class WindowSums(NamedTuple):
    """Totals of each window in reading order: (W,) float64 each, `gaps` (W, NUM_BINS).

    `gaps` are hits - confidence of the predictions whose confidence lies in a bin.
    """

    tokens: np.ndarray
    nats: np.ndarray
    top1: np.ndarray
    top5: np.ndarray
    gaps: np.ndarray

    @property
    def miscalibration(self) -> np.ndarray:
        """(W,) float64 that add up to the sum of |gaps| over the bins of all windows together."""
        return self.gaps @ np.sign(self.gaps.sum(axis=0))


class _Metric(NamedTuple):
    """`scale` times the ratio of two totals, or the exponential of it."""

    name: str
    unit: str
    numerator: str
    denominator: str
    scale: float = 1.0
    is_exponential: bool = False
    higher_is_better: bool = False


_METRICS = (
    _Metric("nats_per_token", "nats/token", "nats", "tokens"),
    _Metric("perplexity", "1", "nats", "tokens", is_exponential=True),
    _Metric("bits_per_byte", "bits/byte", "nats", "bytes", scale=1 / math.log(2)),
    _Metric("top1_accuracy", "fraction", "top1", "tokens", higher_is_better=True),
    _Metric("top5_accuracy", "fraction", "top5", "tokens", higher_is_better=True),
    _Metric("calibration_error", "fraction", "miscalibration", "tokens"),
    _Metric("word_perplexity", "1", "nats", "words", is_exponential=True),
)
_METRICS_OF_PARTS = ("nats_per_token", "bits_per_byte")


def sum_calibration_gaps(hits_N: np.ndarray, confidence_N: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sum hits - confidence by window and bin: (windows of `lengths` tokens, NUM_BINS)."""
    bin_N = np.clip(np.ceil(confidence_N * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    cell_N = np.repeat(np.arange(len(lengths)) * NUM_BINS, lengths) + bin_N
    sums = np.bincount(cell_N, hits_N - confidence_N, minlength=len(lengths) * NUM_BINS)
    return sums.reshape(len(lengths), NUM_BINS)


def aggregate(
    sums: WindowSums, documents_W: np.ndarray, sizes: Mapping[str, np.ndarray], split: str
) -> list[Measurement]:
    """Compute all metrics of scored windows.

    Args:
        documents_W: document of each window.
        sizes: "tokens", "bytes" and optionally "words" of whole documents, (D,) each. If only some windows
            were scored, metrics per byte and word assume the ratio of all documents.
    """
    n, totals = int(sums.tokens.sum()), {unit: int(size.sum()) for unit, size in sizes.items()}
    assert totals["bytes"] > 0, "documents with tokens must have bytes"
    clusters = _sum_by_cluster(sums, documents_W, sizes, totals)
    resampled: dict[str, np.ndarray] = {}
    if len(clusters["tokens"]) > 1:
        resampled_RK = bootstrap_sums(np.stack(list(clusters.values()), axis=1))
        resampled = dict(zip(clusters, resampled_RK.T, strict=True))
    found = []
    for metric in _METRICS:
        if metric.denominator not in totals:
            continue
        rate = totals[metric.denominator] / totals["tokens"]
        value = metric.scale * (math.fsum(getattr(sums, metric.numerator)) / n / rate)
        stderr = ratio_stderr(clusters[metric.numerator], clusters[metric.denominator])
        interval = None
        if stderr is not None:
            stderr *= metric.scale
            ratio_R = resampled[metric.numerator] / resampled[metric.denominator]
            interval = percentile_interval(metric.scale * ratio_R, len(clusters["tokens"]))
        if metric.is_exponential:  # standard error by the delta method
            value = _exp(value)
            stderr = None if stderr is None else value * stderr
            interval = None if interval is None else (_exp(interval[0]), _exp(interval[1]))
        found.append(
            Measurement(
                metric.name,
                value,
                metric.unit,
                n=round(n * rate),
                stderr=stderr,
                split=split,
                higher_is_better=metric.higher_is_better,
                interval=interval,
            )
        )
    return found


def aggregate_parts(
    parts: Mapping[str, int],
    sums: WindowSums,
    documents_W: np.ndarray,
    sizes: Mapping[str, np.ndarray],
    split: str,
) -> list[Measurement]:
    """Compute `nats_per_token/NAME` and `bits_per_byte/NAME` of consecutive parts of the documents.

    Args:
        parts: number of documents of each part, in reading order.

    Raises:
        UserError: a part has no token.
    """
    found = []
    stop = 0
    for name, n_documents in parts.items():
        start, stop = stop, stop + n_documents
        chosen_W = (start <= documents_W) & (documents_W < stop)
        if not chosen_W.any():
            raise UserError(f"the {split} split has no token of {name!r} to score: give it text of it")
        of_part = aggregate(
            WindowSums(*(values[chosen_W] for values in sums)),
            documents_W[chosen_W] - start,
            {unit: size[start:stop] for unit, size in sizes.items()},
            split,
        )
        found += [replace(m, name=f"{m.name}/{name}") for m in of_part if m.name in _METRICS_OF_PARTS]
    return found


def _sum_by_cluster(
    sums: WindowSums, documents_W: np.ndarray, sizes: Mapping[str, np.ndarray], totals: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """(C,) float64 totals by cluster of every numerator and denominator."""
    documents, document_W = np.unique(documents_W, return_inverse=True)
    by_document = len(documents) >= MIN_DOCUMENT_CLUSTERS
    cluster_W = document_W if by_document else np.arange(len(document_W))
    clusters: dict[str, np.ndarray] = {
        name: np.bincount(cluster_W, getattr(sums, name))
        for name in dict.fromkeys(metric.numerator for metric in _METRICS)
    }
    tokens: np.ndarray = np.bincount(cluster_W, sums.tokens)
    is_whole = by_document and int(tokens.sum()) == totals["tokens"]
    for unit, size in sizes.items():
        rate = totals[unit] / totals["tokens"]
        clusters[unit] = size[documents].astype(np.float64) if is_whole else tokens * rate
    return clusters


def _exp(exponent: float) -> float:
    return math.exp(exponent) if exponent < 700 else math.inf


def bits_per_byte(nats: Sequence[float] | np.ndarray, n_bytes: Sequence[int] | np.ndarray) -> Statistic:
    """Bits per byte of texts that were scored elsewhere: sum(nats) / ln 2 / sum(bytes).

    Args:
        nats: negative log-probability (M,) of each text, summed over its tokens.
        n_bytes: UTF-8 bytes (M,) of each text.

    Returns:
        Bits per byte, the number of bytes, and the standard error clustered by text.

    Raises:
        UserError: no text, arrays of different lengths, a number that is not finite, or no bytes.
    """
    nats, n_bytes = check_paired("nats and bytes of texts", nats, n_bytes)
    if n_bytes.sum() <= 0:
        raise UserError("the texts have no bytes: bits per byte need some text")
    bits = nats / math.log(2)
    return Statistic(float(bits.sum() / n_bytes.sum()), int(n_bytes.sum()), ratio_stderr(bits, n_bytes))


def calibration_error(
    confidence: Sequence[float] | np.ndarray, correct: Sequence[bool] | np.ndarray, num_bins: int = NUM_BINS
) -> Statistic:
    """Expected calibration error of predictions: sum_k |hits_k - confidence_k| / n over bins of equal width.

    Bin k of K has the predictions with a confidence in ((k - 1) / K, k / K]; 0 is in the first (Guo et al.,
    ICML 2017, eq. 3). The standard error takes the sign of each bin as given.

    Args:
        confidence: probability (n,) that each prediction was given.
        correct: whether it was correct (n,).

    Raises:
        UserError: no prediction, arrays of different lengths, a confidence outside 0..1, fewer than one bin.
    """
    confidence, correct = check_paired("confidences and outcomes", confidence, correct)
    if confidence.min() < 0 or confidence.max() > 1:
        outside = confidence[(confidence < 0) | (confidence > 1)][0]
        raise UserError(f"a confidence of {outside}: it is a probability from 0 to 1")
    if not np.isin(correct, (0, 1)).all():
        raise UserError("an outcome is right or wrong: give 1 or 0 for each prediction")
    if num_bins < 1:
        raise UserError(f"bins = {num_bins}: must be at least 1")
    bin_of = np.maximum(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0)
    gaps = np.bincount(bin_of, correct - confidence, num_bins)
    signed = (correct - confidence) * np.sign(gaps)[bin_of]
    return Statistic(float(signed.mean()), len(signed), ratio_stderr(signed, np.ones(len(signed))))


def check_paired(
    what: str, first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Convert two sequences (n,) to float64.

    Raises:
        UserError: they differ in length, are empty, or hold a number that is not finite.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise UserError(
            f"{what} come in pairs: give as many of one as of the other, not {a.shape}, {b.shape}"
        )
    if not len(a):
        raise UserError(f"no {what} were given: give at least one pair")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError(f"{what} must be finite numbers")
    return a, b


class BlockSums:
    """Likelihood sums by block of text, which pair the results of several models on one text.

    A document is cut into blocks of about `BLOCK_BYTES` bytes. Its token i of T lies in block floor(i * K /
    T) of its K blocks: models with one vocabulary have exactly the same blocks, others nearly so.

    `table` (B,) has the blocks in reading order: `document`, `bytes`, `tokens`, and the sum of `nats`.
    """

    def __init__(self, table: np.ndarray):
        self.table = table
        n_documents = int(table["document"].max(initial=-1)) + 1
        self._n_tokens = np.bincount(table["document"], table["tokens"], n_documents).astype(np.int64)
        self._n_blocks = np.bincount(table["document"], minlength=n_documents)
        self._first = np.cumsum(self._n_blocks) - self._n_blocks

    @classmethod
    def from_documents(cls, documents: Sequence[Document]) -> "BlockSums":
        """Cut `documents` into blocks with zero nats. A document without tokens has no block."""
        rows = []
        for document, (ids, n_bytes) in enumerate(documents):
            n_blocks = min(len(ids), max(1, round(n_bytes / BLOCK_BYTES)))
            # block k begins with the first token i for which i * K // T is k
            begins = [-(-k * len(ids) // n_blocks) for k in range(n_blocks + 1)] if n_blocks else []
            rows += [
                (document, n_bytes / n_blocks, stop - start, 0.0)
                for start, stop in itertools.pairwise(begins)
            ]
        return cls(np.array(rows, dtype=_BLOCK_FIELDS))

    def add(self, windows: Sequence[Window], nats: np.ndarray) -> None:
        """Add the nats (N,) of the scored tokens of `windows`; fits `on_scores` of `measure_likelihood`."""
        documents = np.repeat([w.document for w in windows], [w.stop - w.first for w in windows])
        places = np.concatenate([np.arange(w.first, w.stop) for w in windows])
        blocks = places * self._n_blocks[documents] // self._n_tokens[documents]
        np.add.at(self.table["nats"], self._first[documents] + blocks, nats)

    def save(self, path: Path) -> None:
        """Write the table as .npy."""
        with atomic_file(path) as file:
            np.save(file, self.table, allow_pickle=False)

    @classmethod
    def load(cls, path: Path) -> "BlockSums":
        """Read a file of `save`.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            with open_file(path) as file:
                if file.seek(0, os.SEEK_END) > MAX_BYTES:
                    raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
                file.seek(0)
                table = np.load(file, allow_pickle=False)
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be read: {error}") from error
        except (ValueError, EOFError, MemoryError, OverflowError) as error:
            raise UserError(f"{str(path)!r} is damaged: {error}") from error
        is_table = isinstance(table, np.ndarray) and table.dtype == np.dtype(_BLOCK_FIELDS)
        if not is_table or table.ndim != 1 or not _is_plausible(table):
            raise UserError(f"{str(path)!r} is damaged: it is no table of blocks")
        return cls(table)


def _is_plausible(table: np.ndarray) -> bool:
    """False for a table of blocks whose numbers cannot have been written by `BlockSums.save`."""
    sizes = np.stack([table["bytes"], table["tokens"], table["nats"]])
    documents = table["document"]
    return bool(
        np.isfinite(sizes).all() and (sizes >= 0).all() and ((documents >= 0) & (documents < 1e8)).all()
    )
