"""A language model of the text that is being read: the words that followed the same words earlier.

    P(w) = sum_k a_k n_k(w) / sum_k a_k n_k,   n_k = sum_w n_k(w),   a_k = exp(s theta_k)

n_k(w) counts how often w stands, among the last H words, after k words that are the last k of the context,
for k from 0 to `MATCHED`. theta is learned. It holds no text of its training. (A cache of words: Kuhn and De
Mori, 1990, A cache-based natural language model for speech recognition; of words by what precedes them:
Grave et al., 2017, arXiv:1612.04426.)

Shapes: N contexts, H words of each, oldest first, as numbers + 1 and 0 for no word; K = `MATCHED` + 1.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

MATCHED = 3  # words of a context that are compared, at most
HISTORY_FEATURES = MATCHED + 1  # of a gate
GATE_SCALE = 8.0  # of theta and of a gate, which are to learn faster than a network at the same rate
_MAX_ENTRIES = 1 << 22  # of contexts, compared at once
_LEAST_WEIGHT = 1e-9  # weight of a history; one without words has none


class GenLMHistory(nn.Module):
    """P(w) after contexts (N, H), as the module's docstring defines it, and features (N, F) of these: the log
    of the weight of all words, and log(1 + n_k) for k from 1 on."""

    def __init__(self, n_words: int):
        super().__init__()
        self.n_words = n_words  # H
        self.theta = nn.Parameter(torch.zeros(MATCHED + 1))

    @staticmethod
    def start(history: "GenLMHistory") -> None:
        """A word counts e^(2 k) where k words before it are those of the context."""
        init.copy_(history.theta, torch.arange(MATCHED + 1) / 4)

    def of_words(self, contexts: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """P of `words` (N,), 0 for one that does not occur, and features."""
        n_rows = max(1, _MAX_ENTRIES // contexts.shape[1])
        parts = zip(contexts.split(n_rows), words.split(n_rows), strict=True)
        counted = [self._count(*part) for part in parts]
        n_all, n_hits = (torch.cat(each) for each in zip(*counted, strict=True))
        total = (n_all * self._weights()).sum(1).clamp(min=_LEAST_WEIGHT)
        return (n_hits * self._weights()).sum(1) / total, _history_features(n_all, total)

    def _count(self, contexts: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """n_k and n_k(`words`), (N, K) each."""
        earlier, are_after = self._find(contexts)
        is_hit = (earlier == (words + 1)[:, None]).to(self._dtype)
        n_all = torch.stack([is_after.sum(1) for is_after in are_after], dim=1)
        return n_all, torch.stack([(is_after * is_hit).sum(1) for is_after in are_after], dim=1)

    def of_contexts(self, contexts: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """P (N, V), all 0 where there is no earlier word, and features."""
        earlier, are_after = self._find(contexts)
        weights = torch.zeros_like(are_after[0])
        for weight, is_after in zip(self._weights(), are_after, strict=True):
            weights = torch.addcmul(weights, is_after, weight)
        n_all = torch.stack([is_after.sum(1) for is_after in are_after], dim=1)
        total = weights.sum(1).clamp(min=_LEAST_WEIGHT)
        p = weights.new_zeros(len(contexts), vocab_size + 1).scatter_add(1, earlier.long(), weights)
        return p[:, 1:] / total[:, None], _history_features(n_all, total)

    def _find(self, contexts: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The words (N, H - 1) before which there can be others, and for each k where they stand after the
        last k of the context: 1, elsewhere 0."""
        contexts = contexts[:, -self.n_words :]
        n_words, earlier = contexts.shape[1], contexts[:, 1:]
        found = [(earlier > 0).to(self._dtype)]
        for k in range(1, MATCHED + 1):
            is_same = contexts[:, : max(0, n_words - k)] == contexts[:, max(0, n_words - k), None]
            found.append(found[-1] * F.pad(is_same, (k - 1, 0))[:, : n_words - 1])
        return earlier, found

    def _weights(self) -> torch.Tensor:
        """a, (K,)."""
        return torch.exp(GATE_SCALE * self.theta.to(self._dtype))

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.theta.dtype, torch.float32)


def _history_features(n_all: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return torch.cat([total.log()[:, None] / 4, torch.log1p(n_all[:, 1:])], dim=1)
