"""How far back a causal language model looks: its loss by the number of tokens that it has before it.

Windows. Documents are cut into whole windows of `context` targets side by side; what is left over at the end
of a document is not read. A target at position p of a window is scored given the p tokens before it, the
start token before the first window included. Every position is thus a mean over the same windows, and every
document is read once.

More context. The gain from twice the context compares the same targets, those of the last quarter of each
window, given all of the window before them (between 3/4 C and C tokens) and given what follows its middle
(between C/4 and C/2). This is the difference between sliding windows of C and of C/2 tokens, both with a
stride of C/4, and costs half a window more of reading.

Beyond the trained length. `measure_extrapolation` reads windows of 2, 4, ... times that length, with each
scaling of rotary positions that transformers knows by two numbers: linear (Chen et al., 2023,
arXiv:2306.15595), dynamic NTK, yarn (Peng et al., 2023, arXiv:2309.00071).

Legend of shapes: W windows, B of them in a batch, C targets of a window, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.evaluation.likelihood import MAX_LOGITS, Document, evaluation_mode
from hf_genlm.evaluation.measurement import Measurement, ratio_stderr
from hf_genlm.evaluation.sums import MIN_DOCUMENT_CLUSTERS

Progress = Callable[[int, int], None]

FIRST_BUCKET = 64  # positions in the first bucket; each next one ends twice as far
LEAST_CONTEXT = 8

# scaling -> what it adds to `rope_parameters` for texts of `factor` times the trained length
ROPE_SCALINGS: dict[str, Callable[[int], dict[str, Any]]] = {
    "none": lambda factor: {},
    "linear": lambda factor: {"rope_type": "linear", "factor": float(factor)},
    # transformers multiplies by the length in hand; with 1, the slowest turn ends where it was trained to
    "dynamic": lambda factor: {"rope_type": "dynamic", "factor": 1.0},
    "yarn": lambda factor: {"rope_type": "yarn", "factor": float(factor)},
}


class Windows(NamedTuple):
    """What is read, and how it went."""

    ids: list[np.ndarray]  # inputs and last target of each, C + 1 tokens
    document: np.ndarray  # (W,) the number of the document of each


def measure_range(
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
    """The loss by position in the context, and what twice the context gains.

    Args:
        model: called as `model(input_ids=(B, C) int64, use_cache=False)`; its `.logits` are (B, C, V).
        documents: (token ids (T,), bytes) each; those shorter than `context` are not read.
        start_id: id of the token before each document.
        context: targets C of a window.
        batch_size: windows in one forward pass, fewer where their logits would be large. No result depends
            on it, beyond the rounding of float32.
        max_tokens: read a part only: windows spread evenly over all, until so many tokens are scored.
        on_progress: called with (windows read, windows to read), halves counted as halves of a window.

    Returns:
        - nats_per_token/1-64, /65-128, /129-256, ... (nats/token): by the number of tokens before the target.
        - nats_gain_from_2x_context (nats/token): the loss with C/2 minus that with C, of the same targets.
        Standard errors are clustered: by document where there are at least 20, else by window.

    Raises:
        UserError: a context below 8, or longer than every document.
    """
    windows = _whole_windows(documents, start_id, context, max_tokens)
    half = context // 2
    report = _halved(on_progress, len(windows.ids))
    with evaluation_mode(model), torch.inference_mode():
        nats_WC = _score(model, [ids[:] for ids in windows.ids], batch_size, report(0, 2))
        short_WH = _score(model, [ids[context - half :] for ids in windows.ids], batch_size, report(2, 1))
    cluster = _clusters(windows)
    quarter = context // 4
    gains_W = (short_WH[:, -quarter:] - nats_WC[:, -quarter:]).sum(axis=1)
    return [
        *_by_position(nats_WC, cluster, "nats_per_token", split),
        _mean("nats_gain_from_2x_context", gains_W, quarter, cluster, split, higher_is_better=True),
    ]


def measure_extrapolation(
    model: Any,
    documents: Sequence[Document],
    start_id: int,
    *,
    trained_length: int | None = None,
    factors: Sequence[int] = (2, 4),
    scalings: Sequence[str] = tuple(ROPE_SCALINGS),
    batch_size: int = 8,
    split: str = "validation",
    max_tokens: int | None = None,
    on_progress: Progress | None = None,
) -> list[Measurement]:
    """The loss by position in windows of `factors` times the trained length, with each of `scalings`.

    A model without rotary positions has nothing to scale: of it, "none" alone is measured.

    Args:
        trained_length: None: the config's `max_position_embeddings`.
        scalings: of ROPE_SCALINGS.
        others: as `measure_range`; `max_tokens` holds for each factor and scaling.

    Returns:
        nats_per_token/2x_linear/1-64 and so on (nats/token): the factor, the scaling, the positions.

    Raises:
        UserError: an unknown scaling or trained length; learned positions, which end; no document of that
            length.
    """
    for name in scalings:
        if name not in ROPE_SCALINGS:
            raise UserError(f"unknown scaling of positions {name!r}{did_you_mean(name, ROPE_SCALINGS)}")
    length = trained_length or getattr(model.config, "max_position_embeddings", None)
    if length is None:
        raise UserError("the model's config has no max_position_embeddings: give trained_length")
    if _has_learned_positions(model):
        raise UserError("the model's positions are learned: none beyond the trained length has a vector")
    chosen = scalings if _rotary_embeddings(model) else ["none"]
    measurements: list[Measurement] = []
    for done, factor in enumerate(factors):
        windows = _whole_windows(documents, start_id, factor * length, max_tokens)
        n = len(windows.ids)
        for part, name in enumerate(chosen):

            def report(read: int, begin: int = (done * len(chosen) + part) * n, n: int = n) -> None:
                if on_progress is not None:
                    on_progress(begin + read, len(factors) * len(chosen) * n)

            with (
                scaled_positions(model, name, factor, length),
                evaluation_mode(model),
                torch.inference_mode(),
            ):
                nats_WC = _score(model, windows.ids, batch_size, report)
            title = f"nats_per_token/{factor}x_{name}"
            measurements += _by_position(nats_WC, _clusters(windows), title, split)
    return measurements


@contextmanager
def scaled_positions(model: Any, scaling: str, factor: int, trained_length: int) -> Iterator[None]:
    """Inside, the rotary positions of `model` are scaled for texts of `factor` times the trained length.

    transformers' own functions compute the frequencies: each rotary embedding is made anew from a copy of
    its config with other `rope_parameters`, and put back afterwards. The model's own base is kept, and
    "none" keeps all.
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


def buckets(context: int) -> list[tuple[int, int]]:
    """(first, last) positions, from 1: the first FIRST_BUCKET, then twice as far each, up to `context`."""
    ends = [FIRST_BUCKET]
    while ends[-1] < context:
        ends.append(2 * ends[-1])
    return [
        (first, min(last, context)) for first, last in zip([1, *(e + 1 for e in ends)], ends, strict=False)
    ]


def _whole_windows(
    documents: Sequence[Document], start_id: int, context: int, max_tokens: int | None
) -> Windows:
    if context < LEAST_CONTEXT:
        raise UserError(f"context = {context}: must be at least {LEAST_CONTEXT} tokens to be cut in quarters")
    places = [
        (d, begin)
        for d, (ids, _) in enumerate(documents)
        for begin in range(0, len(ids) - context + 1, context)
    ]
    if not places:
        longest = max((len(ids) for ids, _ in documents), default=0)
        raise UserError(
            f"no document holds {context:,} tokens, the longest {longest:,}: measure with a smaller context, "
            "or on longer documents"
        )
    if max_tokens is not None:
        n_kept = min(len(places), max(1, -(-max_tokens // context)))
        places = [places[i] for i in np.linspace(0, len(places) - 1, n_kept).round().astype(int)]
    cut = []
    for d, begin in places:
        ids = np.asarray(documents[d][0])
        before = ids[begin - 1] if begin else start_id
        cut.append(np.concatenate([[before], ids[begin : begin + context]]).astype(np.int64))
    return Windows(cut, np.array([d for d, _ in places]))


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
        raise UserError("the model's logits are not finite: its training diverged, or it cannot read so far")
    return nats_WC


def _by_position(nats_WC: np.ndarray, cluster: np.ndarray, title: str, split: str) -> list[Measurement]:
    return [
        _mean(
            f"{title}/{first}-{last}",
            nats_WC[:, first - 1 : last].sum(axis=1),
            last - first + 1,
            cluster,
            split,
            higher_is_better=False,
        )
        for first, last in buckets(nats_WC.shape[1])
    ]


def _mean(
    name: str, sums_W: np.ndarray, n_targets: int, cluster: np.ndarray, split: str, *, higher_is_better: bool
) -> Measurement:
    """The mean of sums over `n_targets` targets a window, its standard error over clusters of windows."""
    n = n_targets * len(sums_W)
    sizes = np.bincount(cluster) * n_targets
    return Measurement(
        name=name,
        value=float(sums_W.sum() / n),
        unit="nats/token",
        n=n,
        stderr=ratio_stderr(np.bincount(cluster, sums_W), sizes),
        split=split,
        higher_is_better=higher_is_better,
    )


def _clusters(windows: Windows) -> np.ndarray:
    documents, cluster = np.unique(windows.document, return_inverse=True)
    return cluster if len(documents) >= MIN_DOCUMENT_CLUSTERS else np.arange(len(windows.document))


def _rotary_embeddings(model: Any) -> list[tuple[Any, str, Any]]:
    """(parent, name, module) of those whose angles follow one set of `rope_parameters`."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(getattr(child, "rope_type", None), str) and hasattr(child, "inv_freq")
    ]


def _has_learned_positions(model: Any) -> bool:
    """By our configs' own word; of others, by a table of about as many vectors as positions."""
    if hasattr(model.config, "position_type"):
        return bool(model.config.position_type == "learned")
    n_positions = getattr(model.config, "max_position_embeddings", None) or 0
    return any(
        n_positions <= module.num_embeddings <= n_positions + 2  # OPT's begin at 2
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings()
    )


def _halved(on_progress: Progress | None, n_windows: int) -> Callable[[int, int], Callable[[int], None]]:
    """Reports in windows of work that is counted in halves: (halves done before, halves a window)."""

    def part(before: int, halves: int) -> Callable[[int], None]:
        def report(read: int) -> None:
            if on_progress is not None:
                on_progress((before * n_windows + halves * read) // 2, 3 * n_windows // 2)

        return report

    return part
