"""What a causal language model says of each token of short sequences, whichever model it is."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_genlm.errors import UserError
from hf_genlm.evaluation.likelihood import MAX_LOGITS, evaluation_mode

Progress = Callable[[int, int], None]


class Passage(NamedTuple):
    """Tokens (T,) that a model reads at once, of which those from `first` on are scored; `first` > 0."""

    ids: np.ndarray
    first: int


class Scores(NamedTuple):
    """Of each scored token (N,): log P in nats, whether no other token is likelier, and the mean and the
    standard deviation of log P over the model's own distribution there."""

    log_p: np.ndarray
    is_best: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


def score(
    model: Any,
    sequences: Sequence[Passage],
    batch_size: int = 32,
    on_progress: Progress | None = None,
) -> list[Scores]:
    """The scores of each sequence, in order.

    Args:
        model: called as `model(input_ids=(B, T) int64, use_cache=False)`; its `.logits` are (B, T, V).
            Padding stands on the right, where a causal model cannot see it.
        sequences: in any order; those of like length share a forward pass.
        batch_size: of sequences, fewer where their logits would pass `MAX_LOGITS`.
        on_progress: called with (sequences scored, all of them) after each pass.

    Raises:
        UserError: logits that are not finite.
    """
    found: list[Scores] = [None] * len(sequences)  # type: ignore[list-item]
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    begin = 0
    with evaluation_mode(model), torch.inference_mode():
        while begin < len(order):
            longest = len(sequences[order[begin]].ids)
            rows = min(batch_size, max(1, MAX_LOGITS // (longest * model.config.vocab_size)))
            chosen = order[begin : begin + rows]
            for i, scores in zip(chosen, _score_batch(model, [sequences[i] for i in chosen]), strict=True):
                found[i] = scores
            begin += rows
            if on_progress is not None:
                on_progress(min(begin, len(order)), len(order))
    return found


def _score_batch(model: Any, sequences: Sequence[Passage]) -> list[Scores]:
    lengths = np.array([len(sequence.ids) for sequence in sequences])
    ids_BT = np.zeros((len(sequences), lengths.max()), dtype=np.int64)
    is_scored_BT = np.zeros(ids_BT.shape, dtype=bool)
    for row, (ids, first) in enumerate(sequences):
        assert 0 < first < len(ids), "a token before, and one to score"
        ids_BT[row, : len(ids)] = ids
        is_scored_BT[row, first : len(ids)] = True
    device = next(model.parameters()).device
    given_BT = torch.from_numpy(ids_BT).to(device)
    logits_BTV = model(input_ids=given_BT[:, :-1], use_cache=False).logits
    mask_BT = torch.from_numpy(is_scored_BT[:, 1:]).to(device)
    logits_NV = logits_BTV[mask_BT].float()
    targets_N = given_BT[:, 1:][mask_BT]
    log_p_NV = logits_NV.log_softmax(dim=1)
    log_p_N = log_p_NV.gather(1, targets_N[:, None])[:, 0]
    if not torch.isfinite(log_p_N).all():
        raise UserError(
            "the model's logits are not finite: its training diverged, and nothing can be audited"
        )
    is_best_N = log_p_N >= log_p_NV.amax(dim=1)
    p_NV = log_p_NV.exp()
    log_p_NV = log_p_NV.clamp(min=-1e4)  # a token that cannot be adds 0 to both moments, not nan
    mean_N = (p_NV * log_p_NV).sum(dim=1)
    deviation_N = (p_NV * (log_p_NV - mean_N[:, None]).square()).sum(dim=1).sqrt()
    columns = [column.double().cpu().numpy() for column in (log_p_N, is_best_N, mean_N, deviation_N)]
    ends = np.cumsum(is_scored_BT.sum(axis=1))[:-1]
    return [Scores(*of_one) for of_one in zip(*(np.split(column, ends) for column in columns), strict=True)]
