"""Initialization of a model from the bigrams of its training text.

A new decoder is close to the identity: its logits are head(norm(e_i)) for the last token i alone. Their best
values are the log of how much more likely token j is after i than elsewhere. The best low-rank approximation
of this matrix gives the embedding (as in Levy and Goldberg, 2014, Neural word embedding as implicit matrix
factorization), a least-squares fit the head, and the counts of single tokens its bias, with which each token
is predicted as often as it occurs. Training then begins near the loss of a bigram model instead of near
log V, for the price of a few steps.

Shapes: V vocabulary, D width of the head's input, R width of the embedding.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from hf_genlm.model import GenLMForCausalLM

MAX_COUNTED_TOKENS = 5_000_000  # counted, a stream's over all of it: bounds time and memory
PRIOR = 60.0  # pseudo-counts of each token's successors, distributed as single tokens are
_UNSEEN_COUNT = 0.5  # of a token that does not occur
_EXTRA_DIRECTIONS = 8  # of the random sketch beyond the wanted rank (Halko et al., 2011, arXiv:0909.4061)
_SKETCH_ITERATIONS = 3
_RIDGE = 1e-3  # in parts of the mean square of the head's input
_BATCH_SIZE = 4096  # tokens in one forward pass
_CALIBRATIONS = 2  # of the bias; each removes nearly all of the error that is left
_MAX_LOGITS = 1 << 24  # at once


@dataclass(frozen=True)
class BigramStatistics:
    """Log-ratios S_ij = log P(j | i) / P(j) of successive tokens i, j, up to a constant for each i."""

    frequencies: torch.Tensor  # (V,) p, of single tokens
    log_ratios: torch.Tensor  # (V, V) sparse S; 0 for a bigram that does not occur
    row_means: torch.Tensor  # (V,) sum_j p_j S_ij
    n_tokens: int
    n_bigrams: int  # distinct

    def times(self, matrix_VK: torch.Tensor) -> torch.Tensor:
        """(S - its row means) @ matrix."""
        return self.log_ratios @ matrix_VK - self.row_means[:, None] * matrix_VK.sum(0)

    def transposed_times(self, matrix_VK: torch.Tensor) -> torch.Tensor:
        """(S - its row means)^T @ matrix."""
        return self.log_ratios.t() @ matrix_VK - (self.row_means @ matrix_VK)[None]


@torch.no_grad()
def init_from_bigrams(
    model: "GenLMForCausalLM", stream: np.ndarray, keep_embedding: bool
) -> BigramStatistics:
    """Set the embedding, the head that is not tied to it, and the head's bias if it has one.

    Deterministic: the random sketch has its own seed.

    Args:
        stream: (T,) token ids of the training text, documents separated by the end-of-text token.
        keep_embedding: fit only the head, to the embedding as it is (word vectors).

    Raises:
        ValueError: the head is tied to the embedding.
    """
    if model.config.tie_word_embeddings:
        raise ValueError("a head is fitted to bigrams where it is not tied to the embedding")
    statistics = count_bigrams(stream, model.config.vocab_size)
    embedding = model.model.embed_tokens.weight
    if not keep_embedding:
        table_VR = embed_bigrams(statistics, embedding.shape[1])
        # the root mean square of a row, averaged over the text, is to be the initializer range
        size = statistics.frequencies @ table_VR.square().mean(1).sqrt()
        embedding.copy_(table_VR * (model.config.initializer_range / size))
    inputs = _head_inputs(model)
    weight, bias = fit_head(statistics, inputs)
    model.lm_head.weight.copy_(weight)
    if model.lm_head.bias is not None:
        model.lm_head.bias.copy_(calibrate_bias(statistics.frequencies, inputs, weight, bias))
    return statistics


def count_bigrams(stream: np.ndarray, vocab_size: int) -> BigramStatistics:
    """Return the statistics of a stream (T,) of token ids, T at least 2."""
    ids = stream.astype(np.int64)
    frequencies = np.maximum(np.bincount(ids, minlength=vocab_size), _UNSEEN_COUNT)
    frequencies = frequencies / frequencies.sum()
    bigrams, counts = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
    before, after = np.divmod(bigrams, vocab_size)
    ratios = np.log1p(counts / (PRIOR * frequencies[after]))
    log_ratios = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([before, after])),
        torch.from_numpy(ratios.astype(np.float32)),
        (vocab_size, vocab_size),
        is_coalesced=True,
        check_invariants=False,
    )
    p = torch.from_numpy(frequencies.astype(np.float32))
    return BigramStatistics(p, log_ratios, log_ratios @ p, len(ids), len(bigrams))


def embed_bigrams(
    statistics: BigramStatistics, width: int, iterations: int = _SKETCH_ITERATIONS
) -> torch.Tensor:
    """Return (V, R): U s^(1/2) of the best approximation of rank R, weighted by token frequency.

    The singular vectors come from a random sketch with so many power iterations (Halko et al., 2011).
    """
    root = statistics.frequencies.sqrt()[:, None]
    size = len(root)
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(size, min(size, width + _EXTRA_DIRECTIONS), generator=generator)
    for _ in range(iterations):
        basis, _ = torch.linalg.qr(root * statistics.times(root * sketch))
        sketch, _ = torch.linalg.qr(root * statistics.transposed_times(root * basis))
    left, singular, _ = torch.linalg.svd(root * statistics.times(root * sketch), full_matrices=False)
    table = left * singular.sqrt() / root
    return torch.nn.functional.pad(table[:, :width], (0, max(0, width - table.shape[1])))


def fit_head(
    statistics: BigramStatistics, inputs_VD: torch.Tensor, ridge: float = _RIDGE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (weight (V, D), bias (V,)) of log P(j | i) = weight_j inputs_i + bias_j.

    By least squares over the tokens i, weighted by token frequency.
    """
    p = statistics.frequencies[:, None]
    mean_D = (p * inputs_VD).sum(0)
    centred = inputs_VD - mean_D
    gram = centred.T @ (p * centred)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    means_V = statistics.transposed_times(p)[:, 0]
    # the centred inputs have the weighted mean 0: the mean of the log-ratios drops out
    weight = torch.linalg.solve(gram, statistics.transposed_times(p * centred).T).T
    return weight, statistics.frequencies.log() + means_V - weight @ mean_D


def calibrate_bias(
    frequencies_V: torch.Tensor, inputs_VD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor
) -> torch.Tensor:
    """Return the bias (V,) with which the head predicts each token as often as it occurs.

    Least squares leaves the normalisers of the rows out, so that some tokens are predicted too often and
    others too rarely, and the first gradients would move all outputs of the layers alike to correct that. By
    iterative proportional fitting (Deming and Stephan, 1940); an iteration costs about a training step.
    """
    n_rows = max(1, _MAX_LOGITS // len(frequencies_V))
    for _ in range(_CALIBRATIONS):
        parts = zip(frequencies_V.split(n_rows), inputs_VD.split(n_rows), strict=True)
        predicted_V = sum(p @ torch.softmax(inputs @ weight_VD.T + bias_V, dim=-1) for p, inputs in parts)
        bias_V = bias_V + (frequencies_V / predicted_V.clamp_min(torch.finfo(predicted_V.dtype).tiny)).log()
    return bias_V


def _head_inputs(model: "GenLMForCausalLM") -> torch.Tensor:
    """Return (V, D): the head's input after each token as the only one of its row."""
    was_training = model.training
    model.eval()
    tokens = torch.arange(model.config.vocab_size, device=model.device)[:, None]
    inputs = [
        model.model(rows, use_cache=False).last_hidden_state[:, 0] for rows in tokens.split(_BATCH_SIZE)
    ]
    model.train(was_training)
    return torch.cat(inputs).float().cpu()
