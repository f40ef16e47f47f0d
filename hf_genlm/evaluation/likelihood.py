"""Exact likelihood of held-out text: every token is scored once, and sums are over tokens, not batches.

Definition. A document w_1..w_T is scored given the start token s (end-of-text used as a beginning):
nats = - sum_t log P(w_t | s, w_1..w_{t-1}). The end-of-text that closes a document is not scored. This is the
convention of `loglikelihood_rolling` in lm-evaluation-harness. Bytes are those of the original text.

Long documents. A document of more than `context` tokens is read in windows of at most `context` input tokens
whose beginnings lie `stride` apart. The first window scores all its targets, each later one only those that
are not scored yet: each of these has at least context - stride tokens before it, besides the one it follows.
With stride = context the windows are those of lm-evaluation-harness: the last one is moved back until it is
full.

Chats. Of documents with `targets` (text/encoding.py), the targets alone are scored, the token that ends a
turn of the assistant among them, and bytes are those of the targets.

Carried state. A purely recurrent decoder can read a document once, in adjacent windows, each of which begins
with the final states of the previous one: every token is then scored given all tokens before it.

Measurements (their errors and the calibration error: module `aggregation`).
- nats_per_token (nats/token): sum of nats over number of tokens.
- perplexity (1): exp(nats_per_token). word_perplexity (1): exp(nats per word).
- bits_per_byte (bits/byte): nats_per_token / ln 2 * tokens per byte of all documents. In a full pass this is
  total bits over total bytes; a partial pass estimates it.
- top1_accuracy, top5_accuracy (fraction): the target counts as among the k best if fewer than k other tokens
  have a logit at least as high. Ties count against the model: equal logits score 0.
- calibration_error (fraction).
- nats_per_token/NAME and bits_per_byte/NAME of each part of the documents.

Legend of shapes: B windows in a batch, T input tokens, N scored tokens, V vocabulary, W windows, D documents.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from hf_genlm.errors import UserError
from hf_genlm.evaluation.aggregation import (
    NUM_BINS,
    Document,
    Window,
    WindowSums,
    aggregate,
    aggregate_parts,
    sum_calibration_gaps,
)
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.text.encoding import TokenizedDocuments

# Default bound on B * T * V of one forward pass: 64 MiB of float32 logits, and up to three times as much
# again while they are scored. A single window that is larger is read alone.
MAX_LOGITS = 2**24
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def measure_likelihood(
    model: Any,
    documents: Sequence[Document],
    *,
    start_id: int,
    context: int,
    stride: int | None = None,
    batch_size: int = 32,
    split: str = "validation",
    max_tokens: int | None = None,
    carry_state: bool = False,
    n_words: Sequence[int] | np.ndarray | None = None,
    parts: Mapping[str, int] | None = None,
    max_logits: int = MAX_LOGITS,
    on_progress: Callable[[int, int], None] | None = None,
    on_scores: Callable[[Sequence[Window], np.ndarray], None] | None = None,
) -> list[Measurement]:
    """Score `documents` with a causal language model, on the device and in the dtype of its weights.

    Args:
        model: called as `model(input_ids=(B, T) int64, use_cache=False)`; its `.logits` are (B, T, V).
            Padding is on the right, where a causal model cannot see it.
        documents: (token ids (T,), bytes of the original text) each. Empty ones contribute nothing.
        start_id: id of the token before each document.
        context: maximum number of input tokens of a window, including the start token.
        stride: tokens between the beginnings of two windows. Default: half the context.
        batch_size: windows per forward pass, fewer if `max_logits` requires. Changes no result.
        max_tokens: score only a part with at least so many tokens: windows spread evenly over all of them,
            always the same ones. Each window's score is that of the full pass.
        carry_state: carry the recurrent states from window to window; the model's config must have a true
            `is_recurrent`. `context` is then the length of a window, and `stride` is not used. `max_tokens`
            selects documents spread evenly; the last one is scored only as far as needed.
        n_words: (D,) words of each document's original text; without them, no word_perplexity.
        parts: number of documents of each part (such as a language), in reading order; for a full pass.
        max_logits: bound on B * T * V of one forward pass. Changes no result.
        on_progress: called with (tokens scored so far, tokens to score) after each forward pass.
        on_scores: called with the windows of each pass and the nats (N,) of their tokens, in order: 0 for one
            that is not scored.

    Returns:
        The measurements that the module describes.

    Raises:
        UserError: a context, stride or model that cannot be used, no token to score, or NaN or infinite
            logits.
    """
    stride = max(1, context // 2) if stride is None else stride
    _check_settings(context, stride, batch_size, max_tokens)
    sizes = np.array([(len(ids), n_bytes) for ids, n_bytes in documents], dtype=np.int64).reshape(-1, 2)
    n_tokens, n_bytes = sizes[:, 0], sizes[:, 1] * (sizes[:, 0] > 0)
    if carry_state:
        _check_recurrent(model.config)
    windows = make_windows(n_tokens, context, stride, carry_state)
    targets: Callable[[int], np.ndarray] | None = None
    if isinstance(documents, TokenizedDocuments) and documents.targets is not None:
        targets = documents.targets_of
        n_tokens = np.array([targets(i).sum() for i in range(len(documents))])
        if not carry_state:
            windows = [w for w in windows if targets(w.document)[w.first : w.stop].any()]
    if not windows:
        raise UserError(f"the {split} split has no token to score: give it a source with text")
    if max_tokens is not None:
        windows = (_select_documents if carry_state else select_windows)(windows, max_tokens)
    make_batches = _batches_with_state if carry_state else _batches_by_length
    batches = make_batches(windows, batch_size, max_logits // model.config.vocab_size)
    sums = _score(model, documents, windows, batches, start_id, carry_state, on_progress, on_scores, targets)
    document_sizes = {"tokens": n_tokens, "bytes": n_bytes}
    if n_words is not None:
        document_sizes["words"] = np.asarray(n_words, dtype=np.int64) * (n_tokens > 0)
    document_W = np.array([window.document for window in windows])
    found = aggregate(sums, document_W, document_sizes, split)
    return found + aggregate_parts(parts or {}, sums, document_W, document_sizes, split)


def document_nats(
    model: Any,
    token_ids: Sequence[Sequence[int] | np.ndarray],
    *,
    start_id: int,
    context: int,
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Negative log-probability of each of D texts given the start token, as `measure_likelihood` scores it.

    Windows have a stride of half the context.

    Returns:
        (D,) float64 sums over tokens, 0 for an empty text.
    """
    stride = max(1, context // 2)
    _check_settings(context, stride, batch_size, None)
    documents = [(np.asarray(ids, dtype=np.int64), 0) for ids in token_ids]
    windows = make_windows([len(ids) for ids in token_ids], context, stride)
    batches = _batches_by_length(windows, batch_size, MAX_LOGITS // model.config.vocab_size)
    sums = _score(model, documents, windows, batches, start_id, False, on_progress)
    return np.bincount([window.document for window in windows], sums.nats, minlength=len(documents))


def make_windows(
    n_tokens: Sequence[int] | np.ndarray, context: int, stride: int, carry_state: bool = False
) -> list[Window]:
    """Cut documents with `n_tokens` tokens each into windows in reading order; each token is scored once.

    With `carry_state` the windows are adjacent, whatever the `stride`.
    """
    windows = []
    step = context if carry_state else stride
    is_last_moved_back = stride == context and not carry_state
    for document, length in enumerate(n_tokens):
        start = first = 0
        while first < length:
            stop = min(start + context, int(length))
            if is_last_moved_back:
                start = max(0, stop - context)
            windows.append(Window(document, start, first, stop))
            start, first = start + step, stop
    return windows


def start_token_id(tokenizer: Any) -> int:
    """Id of the token before a document: bos if the tokenizer has one, otherwise eos.

    Raises:
        UserError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("the tokenizer has neither a bos nor an eos token: a text needs one as its first input")


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch the model to evaluation mode; afterwards restore the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def select_windows(windows: list[Window], max_tokens: int) -> list[Window]:
    """Select windows with at least `max_tokens` targets, spread evenly. A larger part contains a smaller one.

    The i-th of W windows has rank frac(i * golden ratio): any leading part of that order is nearly uniform
    over the text (Niederreiter, Random Number Generation and Quasi-Monte Carlo Methods, 1992, sec. 3.1).
    """
    order = _spread_order(len(windows))
    sizes = np.array([windows[i].stop - windows[i].first for i in order])
    enough = int(np.searchsorted(np.cumsum(sizes), max_tokens)) + 1
    return [windows[i] for i in sorted(order[:enough])]


def _select_documents(windows: list[Window], max_tokens: int) -> list[Window]:
    """Select as `select_windows`, but whole documents; of the last one, windows from its beginning."""
    begins = [i for i, window in enumerate(windows) if window.start == 0]
    ends = [*begins[1:], len(windows)]
    chosen: list[int] = []
    n_tokens = 0
    for document in _spread_order(len(begins)):
        for i in range(begins[document], ends[document]):
            if n_tokens >= max_tokens:
                return [windows[k] for k in sorted(chosen)]
            chosen.append(i)
            n_tokens += windows[i].stop - windows[i].first
    return [windows[k] for k in sorted(chosen)]


def _spread_order(count: int) -> np.ndarray:
    return np.argsort((np.arange(count) * _GOLDEN_RATIO) % 1.0, kind="stable")


def _check_settings(context: int, stride: int, batch_size: int, max_tokens: int | None) -> None:
    if context < 2:
        raise UserError(f"evaluation.context_length = {context}: a window needs at least 2 tokens")
    if not 1 <= stride <= context:
        raise UserError(
            f"evaluation.stride = {stride}: must be in 1..{context}, which is evaluation.context_length"
        )
    if batch_size < 1:
        raise UserError(f"evaluation.batch_size = {batch_size}: must be at least 1")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens = {max_tokens}: must be at least 1")


def _check_recurrent(config: Any) -> None:
    if not getattr(config, "is_recurrent", False):
        mixers = sorted(set(getattr(config, "mixer_types", [config.model_type])))
        raise UserError(
            f"evaluation.carry_state = true: a model with {', '.join(mixers)} is not purely recurrent; "
            "set it to false"
        )


def _score(
    model: Any,
    documents: Sequence[Document],
    windows: list[Window],
    batches: Iterable[np.ndarray],
    start_id: int,
    carry_state: bool,
    on_progress: Callable[[int, int], None] | None,
    on_scores: Callable[[Sequence[Window], np.ndarray], None] | None = None,
    targets: Callable[[int], np.ndarray] | None = None,
) -> WindowSums:
    """Score all windows. Sums are per window, so that they do not depend on the batches.

    `targets(i)` masks the tokens (T,) of document i that are scored; None: all.
    """
    n_targets = [
        w.stop - w.first if targets is None else targets(w.document)[w.first : w.stop].sum() for w in windows
    ]
    tokens = np.array(n_targets, dtype=np.float64)
    found = np.zeros((3, len(windows)))
    gaps = np.zeros((len(windows), NUM_BINS))
    n_scored = 0
    cache: Any = None  # recurrent states of the documents in a batch, a cache of transformers
    with evaluation_mode(model), torch.inference_mode():
        for batch in batches:
            chosen = [windows[i] for i in batch]
            if chosen[0].start == 0:
                cache = None
            elif cache is not None:
                cache.batch_select_indices(torch.arange(len(chosen)))  # drop documents that have ended
            scores_4N, cache = _score_batch(model, documents, chosen, start_id, cache, carry_state, targets)
            if not np.isfinite(scores_4N).all():
                raise UserError(
                    "the model's logits are NaN or infinite: its training diverged; "
                    "train with a lower learning_rate"
                )
            lengths = tokens[batch].astype(np.int64)
            some = lengths > 0  # a window of a carried state may have no target
            begins = (np.cumsum(lengths) - lengths)[some]
            if len(begins):
                found[:, batch[some]] = np.add.reduceat(scores_4N[:3], begins, axis=1)
            gaps[batch] = sum_calibration_gaps(scores_4N[1], scores_4N[3], lengths)
            n_scored += scores_4N.shape[1]
            if on_scores is not None:
                nats = scores_4N[0]
                if targets is not None:
                    is_scored = np.concatenate([targets(w.document)[w.first : w.stop] for w in chosen])
                    nats = np.zeros(len(is_scored))
                    nats[is_scored] = scores_4N[0]
                on_scores(chosen, nats)
            if on_progress is not None:
                on_progress(n_scored, int(tokens.sum()))
    nats, top1, top5 = found
    return WindowSums(tokens, nats, top1, top5, gaps)


def _batches_by_length(windows: list[Window], batch_size: int, max_inputs: int) -> Iterator[np.ndarray]:
    """Yield indices of windows, longest first: little padding, and a lack of memory shows at once.

    `max_inputs` bounds the inputs (B * T) of a batch of several windows.
    """
    lengths = np.array([window.stop - window.start for window in windows])
    order = np.argsort(-lengths, kind="stable")
    begin = 0
    while begin < len(order):
        rows = min(batch_size, max(1, max_inputs // int(lengths[order[begin]])))
        yield order[begin : begin + rows]
        begin += rows


def _batches_with_state(windows: list[Window], batch_size: int, max_inputs: int) -> Iterator[np.ndarray]:
    """Yield indices of the k-th windows of a group of documents, for k = 0, 1, ..., group by group.

    The longest documents come first, so that those with a further window are the first rows of a batch.
    """
    begins = np.array([i for i, window in enumerate(windows) if window.start == 0])
    counts = np.diff(begins, append=len(windows))
    lengths = np.array([windows[last].stop for last in begins + counts - 1])
    order = np.argsort(-lengths, kind="stable")
    longest = max(window.stop - window.start for window in windows)
    rows = min(batch_size, max(1, max_inputs // longest))
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        for k in range(counts[chosen[0]]):
            yield begins[chosen[counts[chosen] > k]] + k


def _score_batch(
    model: Any,
    documents: Sequence[Document],
    windows: list[Window],
    start_id: int,
    cache: Any,
    carry_state: bool,
    targets: Callable[[int], np.ndarray] | None,
) -> tuple[np.ndarray, Any]:
    """Score the targets of `windows` in one forward pass.

    Returns:
        (4, N) float64: nats, target is the best token, target is among the best 5, probability of the
        likeliest token; and the cache after the windows, if states are carried.
    """
    shape = len(windows), max(window.stop - window.start for window in windows)
    inputs_BT = np.full(shape, start_id, dtype=np.int64)
    targets_BT = np.zeros(shape, dtype=np.int64)
    scored_BT = np.zeros(shape, dtype=bool)
    for row, (document, start, first, stop) in enumerate(windows):
        ids = np.asarray(documents[document][0])
        offset = 1 if start == 0 else 0  # position 0 of a document's inputs is the start token
        inputs_BT[row, offset : stop - start] = ids[start + offset - 1 : stop - 1]
        targets_BT[row, : stop - start] = ids[start:stop]
        scored_BT[row, first - start : stop - start] = (
            True if targets is None else targets(document)[first:stop]
        )
    device = next(model.parameters()).device
    given = {"past_key_values": cache, "use_cache": True} if carry_state else {"use_cache": False}
    output = model(input_ids=torch.from_numpy(inputs_BT).to(device), **given)
    logits_BTV = output.logits
    mask_BT = torch.from_numpy(scored_BT).to(device)
    logits_NV = logits_BTV.flatten(0, 1) if scored_BT.all() else logits_BTV[mask_BT]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    targets_N = torch.from_numpy(targets_BT[scored_BT]).to(device)
    nats_N = cross_entropy(logits_NV, targets_N, reduction="none")
    target_logits_N = logits_NV.gather(1, targets_N[:, None])
    # counts the target itself; sums of floats are three times as fast as sums of bools
    at_least_N = torch.ge(logits_NV, target_logits_N, out=torch.empty_like(logits_NV)).sum(dim=1)
    # log of the sum of exp(logits) = nats + the target's logit
    confidence_N = (logits_NV.amax(dim=1) - target_logits_N[:, 0] - nats_N).exp()
    scores_4N = torch.stack([nats_N, at_least_N <= 1, at_least_N <= 5, confidence_N])
    return scores_4N.cpu().double().numpy(), output.past_key_values if carry_state else None
