"""Where a model starts: with what pairs of neighbouring tokens of its own training text say.

At first a decoder is close to the identity, so that its logits are head(norm(e_i)) for the last token i
alone. The best that these can be is the log of how much more likely j is after i than elsewhere; its best
approximation of low rank gives the embedding (as in Levy and Goldberg, 2014, Neural word embedding as
implicit matrix factorization), a least squares fit the head, and the counts of single tokens its bias.
Training then begins near the loss of a bigram model instead of near log V, for the price of a few steps.

Shapes: V vocabulary, D width of what the head reads, R width of the embedding, n distinct pairs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from hf_genlm.model import GenLMForCausalLM

MOST_TOKENS = 5_000_000  # worth counting, from the start of the text: bounds time and memory
_PRIOR = 60.0  # pseudo-counts, as single tokens are distributed, that each token's successors start with
_UNSEEN = 0.5  # occurrences that a token without any is taken to have
_EXTRA_DIRECTIONS = 8  # a random sketch needs some more than are wanted (Halko et al., 2011, arXiv:0909.4061)
_SKETCH_ROUNDS = 3
_AT_ONCE = 4096  # tokens that the model reads
_RIDGE = 1e-3  # in parts of the mean square of what the head reads


@dataclass(frozen=True)
class PairStatistics:
    """How tokens follow each other, as log-ratios S = log P(j | i) / P(j), up to a constant for each i."""

    shares: torch.Tensor  # (V,) of the tokens in the text, p
    log_ratios: torch.Tensor  # (V, V) sparse S; 0 where the pair was never seen
    row_means: torch.Tensor  # (V,) sum_j p_j S_ij
    n_tokens: int
    n_pairs: int  # distinct

    def times(self, matrix_VK: torch.Tensor) -> torch.Tensor:
        """(S - its row means) @ matrix."""
        return self.log_ratios @ matrix_VK - self.row_means[:, None] * matrix_VK.sum(0)

    def transposed_times(self, matrix_VK: torch.Tensor) -> torch.Tensor:
        """(S - its row means)^T @ matrix."""
        return self.log_ratios.t() @ matrix_VK - (self.row_means @ matrix_VK)[None]


@torch.no_grad()
def start_from_pairs(model: "GenLMForCausalLM", stream: np.ndarray, keep_embedding: bool) -> PairStatistics:
    """Set the embedding, the head that is not tied to it, and the head's bias where there is one.

    Deterministic: what is drawn has a seed of its own.

    Args:
        stream: (T,) token ids of the training text, documents parted by the end-of-text token.
        keep_embedding: fit the head alone, to an embedding that is there: word vectors.

    Raises:
        ValueError: the head is tied.
    """
    if model.config.tie_word_embeddings:
        raise ValueError("a head is fitted to pairs of tokens where it is not tied to the embedding")
    statistics = count_pairs(stream, model.config.vocab_size)
    embedding = model.model.embed_tokens.weight
    if not keep_embedding:
        table = embed_pairs(statistics, embedding.shape[1])
        embedding.copy_(table * (model.config.initializer_range / _mean_size(table, statistics.shares)))
    weight, bias = fit_head(statistics, _read_alone(model))
    model.lm_head.weight.copy_(weight)
    if model.lm_head.bias is not None:
        model.lm_head.bias.copy_(bias)
    return statistics


def count_pairs(stream: np.ndarray, vocab_size: int) -> PairStatistics:
    """The statistics of a stream (T,) of token ids, T at least 2."""
    ids = stream.astype(np.int64)
    counts = np.bincount(ids, minlength=vocab_size)
    shares = np.maximum(counts, _UNSEEN)
    shares = shares / shares.sum()
    pairs, n_each = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
    before, after = np.divmod(pairs, vocab_size)
    ratios = np.log1p(n_each / (_PRIOR * shares[after]))
    log_ratios = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([before, after])),
        torch.from_numpy(ratios.astype(np.float32)),
        (vocab_size, vocab_size),
        is_coalesced=True,
        check_invariants=False,
    )
    p = torch.from_numpy(shares.astype(np.float32))
    return PairStatistics(p, log_ratios, log_ratios @ p, len(ids), len(pairs))


def embed_pairs(statistics: PairStatistics, width: int) -> torch.Tensor:
    """(V, R): U s^(1/2) of the best approximation of rank R, weighted by how often tokens occur."""
    root = statistics.shares.sqrt()[:, None]
    size = len(root)
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(size, min(size, width + _EXTRA_DIRECTIONS), generator=generator)
    for _ in range(_SKETCH_ROUNDS):
        basis, _ = torch.linalg.qr(root * statistics.times(root * sketch))
        sketch, _ = torch.linalg.qr(root * statistics.transposed_times(root * basis))
    left, singular, _ = torch.linalg.svd(root * statistics.times(root * sketch), full_matrices=False)
    table = left * singular.sqrt() / root
    return torch.nn.functional.pad(table[:, :width], (0, max(0, width - table.shape[1])))


def fit_head(statistics: PairStatistics, read_VD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight (V, D), bias (V,)) of log P(j | i) = weight_j read_i + bias_j, by least squares over the
    tokens i, weighted by how often they occur."""
    p = statistics.shares[:, None]
    mean_D = (p * read_VD).sum(0)
    centred = read_VD - mean_D
    gram = centred.T @ (p * centred)
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    means_V = statistics.transposed_times(p)[:, 0]
    # the centred inputs have the weighted mean 0: the mean of the log-ratios drops out
    weight = torch.linalg.solve(gram, statistics.transposed_times(p * centred).T).T
    return weight, statistics.shares.log() + means_V - weight @ mean_D


def _read_alone(model: "GenLMForCausalLM") -> torch.Tensor:
    """(V, D): what the head reads after each token by itself."""
    was_training = model.training
    model.eval()
    tokens = torch.arange(model.config.vocab_size, device=model.device)[:, None]
    read = [model.model(rows, use_cache=False).last_hidden_state[:, 0] for rows in tokens.split(_AT_ONCE)]
    model.train(was_training)
    return torch.cat(read).float().cpu()


def _mean_size(table_VR: torch.Tensor, shares_V: torch.Tensor) -> torch.Tensor:
    """The root mean square of a row, averaged over the text."""
    return shares_V @ table_VR.square().mean(1).sqrt()
