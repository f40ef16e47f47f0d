"""Use of the context: loss by position in the context, gain from more context, and extrapolation.

Windows. Documents are cut into full, adjacent windows of `context` targets; the rest of a document is not
read. A target at position p of a window is scored given the p tokens before it, including the start token
before the first window. So every position is a mean over the same windows.

Gain from more context. The same targets, those of the last quarter of each window, are scored given all of
the window before them (between 3/4 C and C tokens) and given what follows its middle (between C/4 and C/2).
This is the difference between sliding windows of C and of C/2 tokens, both with a stride of C/4, at the cost
of half a window more.

Extrapolation. `measure_extrapolation` reads windows of 2, 4, ... times the trained length, with each scaling
of rotary positions that transformers defines by two numbers: linear (Chen et al., 2023, arXiv:2306.15595),
dynamic NTK, yarn (Peng et al., 2023, arXiv:2309.00071).

Legend of shapes: W windows, B of them in a batch, C targets of a window, H = C // 2, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.evaluation.aggregation import MIN_DOCUMENT_CLUSTERS, Document
from hf_genlm.evaluation.likelihood import MAX_LOGITS, evaluation_mode
from hf_genlm.evaluation.measurement import Measurement, ratio_stderr

Progress = Callable[[int, int], None]  # (windows read, windows to read)

FIRST_BUCKET = 64  # positions in the first bucket; each next one ends at twice the position
MIN_CONTEXT = 8  # is cut into quarters
_MAX_LONG_WINDOWS = 8  # beyond the trained length, in one forward pass

# scaling -> what it adds to `rope_parameters` for texts of `factor` times the trained length
ROPE_SCALINGS: dict[str, Callable[[int], dict[str, Any]]] = {
    "none": lambda factor: {},
    "linear": lambda factor: {"rope_type": "linear", "factor": float(factor)},
    # transformers multiplies by the current length; with 1, the lowest frequency ends where it was trained to
    "dynamic": lambda factor: {"rope_type": "dynamic", "factor": 1.0},
    "yarn": lambda factor: {"rope_type": "yarn", "factor": float(factor)},
}


def measure_loss_by_position(
    model: Any,
    documents: Sequence[Document],
    start_id: int,
    context: int,
    *,
    batch_size: int = 32,
    split: str = "validation",
    max_tokens: int | None = None,
    on_progress: Progress | None = None,
) -> list[Measurement]:
    """Measure the loss by position in the context, and the gain from twice the context.

    Args:
        model: called as `model(input_ids=(B, C) int64, use_cache=False)`; its `.logits` are (B, C, V).
        documents: (token ids (T,), bytes) each; those shorter than `context` are not read.
        start_id: id of the token before each document.
        context: targets C of a window.
        batch_size: windows per forward pass, fewer if their logits would be too large. Changes no result
            beyond the rounding of float32.
        max_tokens: score only a part: windows spread evenly over all, until so many tokens are scored.
        on_progress: called with (windows read, windows to read), a window of C/2 counting as half.

    Returns:
        - nats_per_token/1-64, /65-128, /129-256, ... (nats/token): by the number of tokens before the target.
        - nats_gain_from_2x_context (nats/token): the loss with C/2 minus that with C, of the same targets.
        Standard errors are clustered: by document if there are at least 20, otherwise by window.

    Raises:
        UserError: a context below 8, or longer than every document.
    """
    rows, document_W = _cut_windows(documents, start_id, context, max_tokens)
    n, half, quarter = len(rows), context // 2, context // 4
    tell = on_progress or (lambda done, total: None)
    with evaluation_mode(model), torch.inference_mode():
        nats_WC = _score(model, rows, batch_size, lambda read: tell(read, 3 * n // 2))
        short_rows = [row[context - half :] for row in rows]
        nats_WH = _score(model, short_rows, batch_size, lambda read: tell((2 * n + read) // 2, 3 * n // 2))
    cluster_W = _clusters(document_W)
    gains_W = (nats_WH[:, -quarter:] - nats_WC[:, -quarter:]).sum(axis=1)
    return [
        *_mean_by_bucket(nats_WC, cluster_W, "nats_per_token", split),
        _mean("nats_gain_from_2x_context", gains_W, quarter, cluster_W, split, higher_is_better=True),
    ]


def measure_extrapolation(
    model: Any,
    documents: Sequence[Document],
    start_id: int,
    *,
    trained_length: int | None = None,
    factors: Sequence[int] = (2, 4),
    scalings: Sequence[str] = tuple(ROPE_SCALINGS),
    split: str = "validation",
    on_progress: Progress | None = None,
) -> list[Measurement]:
    """Measure the loss by position in windows of `factors` times the trained length, with each of `scalings`.

    A model without rotary positions has nothing to scale: only "none" is measured.

    Args:
        trained_length: default: the config's `max_position_embeddings`.
        scalings: names in ROPE_SCALINGS.

    Returns:
        nats_per_token/2x_linear/1-64 and so on (nats/token): factor, scaling, positions.

    Raises:
        UserError: an unknown scaling or trained length, learned positions, or no document of that length.
    """
    for name in scalings:
        if name not in ROPE_SCALINGS:
            raise UserError(f"unknown scaling of positions {name!r}{did_you_mean(name, ROPE_SCALINGS)}")
    length = trained_length or getattr(model.config, "max_position_embeddings", None)
    if length is None:
        raise UserError("the model's config has no max_position_embeddings: give trained_length")
    if has_learned_positions(model):
        raise UserError("the model's positions are learned: there are none beyond the trained length")
    chosen = scalings if _rotary_embeddings(model) else ["none"]
    measurements: list[Measurement] = []
    for factor_index, factor in enumerate(factors):
        rows, document_W = _cut_windows(documents, start_id, factor * length)
        n = len(rows)
        for scaling_index, name in enumerate(chosen):
            n_before = (factor_index * len(chosen) + scaling_index) * n

            def report(read: int, n_before: int = n_before, n: int = n) -> None:
                if on_progress is not None:
                    on_progress(n_before + read, len(factors) * len(chosen) * n)

            with scaled_rope(model, name, factor, length), evaluation_mode(model), torch.inference_mode():
                nats_WC = _score(model, rows, _MAX_LONG_WINDOWS, report)
            title = f"nats_per_token/{factor}x_{name}"
            measurements += _mean_by_bucket(nats_WC, _clusters(document_W), title, split)
    return measurements


@contextmanager
def scaled_rope(model: Any, scaling: str, factor: int, trained_length: int) -> Iterator[None]:
    """Scale the rotary positions of `model` for texts of `factor` times the trained length; restore them.

    transformers computes the frequencies: each rotary embedding is built anew from a copy of its config with
    other `rope_parameters`. The model's own base is kept; "none" changes nothing.
    """
    found = _rotary_embeddings(model) if ROPE_SCALINGS[scaling](factor) else []
    try:
        for parent, name, rotary in found:
            config = copy.deepcopy(rotary.config)
            config.max_position_embeddings = trained_length
            config.rope_parameters = {
                **config.rope_parameters,
                **ROPE_SCALINGS[scaling](factor),
                "original_max_position_embeddings": trained_length,
            }
            setattr(parent, name, type(rotary)(config).to(rotary.inv_freq.device))
        yield
    finally:
        for parent, name, rotary in found:
            setattr(parent, name, rotary)


def position_buckets(context: int) -> list[tuple[int, int]]:
    """(first, last) positions, from 1: the first FIRST_BUCKET, then up to twice as far each, to `context`."""
    found = [(1, min(FIRST_BUCKET, context))]
    while found[-1][1] < context:
        found.append((found[-1][1] + 1, min(2 * found[-1][1], context)))
    return found


def _cut_windows(
    documents: Sequence[Document], start_id: int, context: int, max_tokens: int | None = None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Inputs and last target of each window, C + 1 tokens; and the index (W,) of its document."""
    if context < MIN_CONTEXT:
        raise UserError(f"context = {context}: must be at least {MIN_CONTEXT} tokens to be cut in quarters")
    places = [
        (d, begin)
        for d, (ids, _) in enumerate(documents)
        for begin in range(0, len(ids) - context + 1, context)
    ]
    if not places:
        longest = max((len(ids) for ids, _ in documents), default=0)
        raise UserError(
            f"no document has {context:,} tokens, the longest {longest:,}: measure with a smaller context, "
            "or on longer documents"
        )
    if max_tokens is not None:
        n_chosen = min(len(places), max(1, -(-max_tokens // context)))
        places = [places[i] for i in np.linspace(0, len(places) - 1, n_chosen).round().astype(int)]
    rows = []
    for d, begin in places:
        ids = np.asarray(documents[d][0])
        before = ids[begin - 1] if begin else start_id
        rows.append(np.concatenate([[before], ids[begin : begin + context]]).astype(np.int64))
    return rows, np.array([d for d, _ in places])


def _score(
    model: Any, rows: Sequence[np.ndarray], batch_size: int, report: Callable[[int], None]
) -> np.ndarray:
    """(W, C) float64 nats of the targets of `rows`, each of C + 1 tokens."""
    device = next(model.parameters()).device
    width = len(rows[0]) - 1
    size = min(batch_size, max(1, MAX_LOGITS // (width * model.config.vocab_size)))
    nats = []
    for begin in range(0, len(rows), size):
        ids_BT = torch.from_numpy(np.stack(rows[begin : begin + size])).to(device)
        logits_BCV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        logits_BCV = logits_BCV.to(torch.promote_types(logits_BCV.dtype, torch.float32))
        nats_N = cross_entropy(logits_BCV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
        nats.append(nats_N.view(-1, width).double().cpu().numpy())
        report(begin + len(ids_BT))
    nats_WC = np.concatenate(nats)
    if not np.isfinite(nats_WC).all():
        raise UserError(
            "the model's logits are NaN or infinite: its training diverged, or the text is too long for it"
        )
    return nats_WC


def _clusters(document_W: np.ndarray) -> np.ndarray:
    """Cluster (W,) of each window: its document, or the window itself if there are few documents."""
    documents, cluster_W = np.unique(document_W, return_inverse=True)
    return cluster_W if len(documents) >= MIN_DOCUMENT_CLUSTERS else np.arange(len(document_W))


def _mean_by_bucket(nats_WC: np.ndarray, cluster_W: np.ndarray, title: str, split: str) -> list[Measurement]:
    found = []
    for first, last in position_buckets(nats_WC.shape[1]):
        sums_W, n = nats_WC[:, first - 1 : last].sum(axis=1), last - first + 1
        found.append(_mean(f"{title}/{first}-{last}", sums_W, n, cluster_W, split, higher_is_better=False))
    return found


def _mean(
    name: str,
    sums_W: np.ndarray,
    n_targets: int,
    cluster_W: np.ndarray,
    split: str,
    *,
    higher_is_better: bool,
) -> Measurement:
    """Mean of sums over `n_targets` targets per window, with its standard error over clusters of windows."""
    n = n_targets * len(sums_W)
    sizes = np.bincount(cluster_W) * n_targets
    stderr = ratio_stderr(np.bincount(cluster_W, sums_W), sizes)
    return Measurement(name, float(sums_W.sum() / n), "nats/token", n, stderr, split, higher_is_better)


def _rotary_embeddings(model: Any) -> list[tuple[Any, str, Any]]:
    """(parent, name, module) of rotary embeddings with one set of `rope_parameters`."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(getattr(child, "rope_type", None), str) and hasattr(child, "inv_freq")
    ]


def has_learned_positions(model: Any) -> bool:
    """True if our config says so, or if another model has a table of about as many vectors as positions."""
    if hasattr(model.config, "position_type"):
        return bool(model.config.position_type == "learned")
    n_positions = getattr(model.config, "max_position_embeddings", None) or 0
    return any(
        n_positions <= module.num_embeddings <= n_positions + 2  # OPT's positions begin at 2
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings()
    )
