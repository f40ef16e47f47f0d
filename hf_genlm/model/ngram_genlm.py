"""The n-gram model as a decoder: its state is the last n - 1 words, its head a table of counts.

    e_w = w                                          the embedding of a word is its number
    h_t = (h_{t-1} without its oldest word, w_t)
    P(w | h_t) = P_n(w | h_t),   P_0(w) = 1 / V
    P_k(w | h) = max(c(h w) - D_k(c(h w)), 0) / c(h) + gamma(h) P_{k-1}(w | h without its oldest word)

Interpolated modified Kneser-Ney smoothing (Chen and Goodman, 1999, An empirical study of smoothing techniques
for language modeling, section 4.1): c counts occurrences at the longest n-grams, and different words before
the n-gram below; D_k takes D1, D2 or D3+ from a count of 1, 2 or more; gamma(h) is the mass that they take,
and that of n-grams that are not stored. A context that does not occur leaves P_{k-1} as it is.

Shapes: B batch, T tokens, N contexts, C = max(1, n - 1) words of a context, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_genlm import read_states
from .configuration_genlm import GenLMConfig
from .layout_genlm import TimeLayout

_MAX_PROBABILITIES = 1 << 22  # computed at once
_LEAST = 1e-30  # probability of a word


class GenLMWordNumbers(nn.Module):
    """Map tokens (B, T) to their numbers + 1, (B, T, 1) in float32; 0 is no word."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.num_embeddings = vocab_size
        self.weight = nn.Parameter(torch.zeros(vocab_size, 1, dtype=torch.int32), requires_grad=False)

    @staticmethod
    def start(embedding: "GenLMWordNumbers") -> None:
        """1, 2, 3, ..."""
        numbers = torch.arange(1, embedding.num_embeddings + 1, dtype=torch.int32)
        init.copy_(embedding.weight, numbers[:, None])

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        return F.embedding(input_ids, self.weight).float()


class NgramContext(nn.Module):
    """Map the numbers of words (B, T, 1) to the last C words after each, (B, T, C), oldest first."""

    def __init__(self, config: GenLMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.width = config.hidden_size

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: TimeLayout | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """The arguments are those of `RecurrentMixer.forward`."""
        n_rows, n_tokens, _ = hidden_states.shape
        at = self.layer_idx if layer_idx is None else layer_idx
        layout = layout or TimeLayout()
        states, recording = None, False
        if past_key_values is not None:
            states = read_states(past_key_values, at, (0,), (n_rows, self.width))
            recording = past_key_values.is_recording_past(at)
        state = hidden_states.new_zeros(n_rows, self.width) if states is None else states[0].float()
        words = torch.cat([state, hidden_states.squeeze(-1)], dim=1)  # (B, C + T)
        ends = torch.arange(1, n_tokens + 1, device=words.device).expand(n_rows, -1)
        if layout.valid is not None:  # tokens move to the left, over the padding
            order = torch.sort(layout.valid.logical_not().int(), dim=1, stable=True).indices
            words = torch.cat([state, words[:, self.width :].gather(1, order)], dim=1)
            ends = layout.valid.cumsum(dim=1)
        places = (ends[..., None] + torch.arange(self.width, device=words.device)).flatten(1)
        contexts = words.gather(1, places).view(n_rows, n_tokens, self.width)
        if layout.document is not None:
            document = layout.document if layout.valid is None else layout.document.gather(1, order)
            document = torch.cat([torch.zeros_like(document[:, :1]).expand(-1, self.width), document], dim=1)
            is_other = document.gather(1, places).view_as(contexts) != layout.document[..., None]
            contexts = contexts.masked_fill(is_other, 0)
        if past_key_values is not None:
            past = torch.cat([state[:, None], contexts], dim=1) if recording else None
            past_key_values.update_recurrent_state(
                contexts[:, -1], at, 0, n_tokens=n_tokens, past_states=past
            )
        return contexts, None


class GenLMNgramLayer(GradientCheckpointingLayer):
    """The layer of an n-gram model, whose hidden states are the last words."""

    def __init__(self, config: GenLMConfig, layer_idx: int):
        super().__init__()
        self.mixer = NgramContext(config, layer_idx)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Map numbers of words (B, T, 1) to contexts (B, T, C)."""
        return self.mixer(hidden_states, **kwargs)[0]


class GenLMNgramHead(nn.Module):
    """Log-probabilities of the next word from tables of n-grams.

    Level k holds the n-grams of k words, sorted by `keys`: the row of the first k - 1 words in level k - 1,
    times V, plus the last word. Level 1 has a row for each word of the vocabulary and no keys. `totals` and
    `backoffs` are c(h) and gamma(h) of the contexts of 0, 1, ... n - 1 words; a total of 0 is no context.
    All are parameters that have no gradient, so that tools count, move and save them.
    """

    def __init__(self, config: GenLMConfig):
        super().__init__()
        self.vocab_size = config.vocab_size
        sizes = [1, config.vocab_size, *config.ngram_sizes]  # rows of levels 0 to n
        self.keys = _tables(sizes[2:], torch.int64)
        self.counts = _tables(sizes[1:], torch.int32)
        self.totals = _tables(sizes[:-1], torch.int32)
        self.backoffs = _tables(sizes[:-1], torch.float32)
        self.discounts = nn.Parameter(torch.zeros(config.ngram_order, 3), requires_grad=False)

    @staticmethod
    def start(head: "GenLMNgramHead") -> None:
        """No counts: every word has the probability 1 / V."""
        for table in head.parameters():
            init.zeros_(table)
        init.ones_(head.backoffs[0])

    @property
    def order(self) -> int:
        """n, the words of the longest n-grams."""
        return len(self.counts)

    @torch.no_grad()
    def forward(self, contexts: torch.Tensor) -> torch.Tensor:
        """Map contexts (..., C), as those of `NgramContext`, to log-probabilities (..., V), in float32."""
        words = contexts.reshape(-1, contexts.shape[-1]).long() - 1
        single = self._of_single_words()
        n_rows = max(1, _MAX_PROBABILITIES // self.vocab_size)
        found = [self._log_probabilities(some, single) for some in words.split(n_rows)]
        return torch.cat(found).view(*contexts.shape[:-1], self.vocab_size)

    def _of_single_words(self) -> torch.Tensor:
        """P_1, (V,)."""
        total, backoff = self.totals[0], self.backoffs[0].float()
        return self._discounted(1, self.counts[0]) / total.clamp(min=1) + backoff / self.vocab_size

    def _discounted(self, level: int, counts: torch.Tensor) -> torch.Tensor:
        discounts = self.discounts[level - 1].float()[counts.clamp(1, 3).long() - 1]
        return (counts - discounts).clamp(min=0)

    def _log_probabilities(self, words: torch.Tensor, single: torch.Tensor) -> torch.Tensor:
        """(N, V) from contexts (N, C) of token ids, -1 for none."""
        scale = single.new_ones(len(words))  # of what a context leaves to the next shorter one
        parts = []
        for length in range(self.order - 1, 0, -1):
            rows, is_known = self._find(words[:, -length:])
            total = self.totals[length][rows]
            is_known = is_known & (total > 0)
            parts.append((length, rows, is_known, scale / total.clamp(min=1)))
            scale = torch.where(is_known, scale * self.backoffs[length][rows].float(), scale)
        probabilities = scale[:, None] * single
        for length, rows, is_known, scale in parts:
            self._add_words(probabilities, length, rows, is_known, scale)
        return probabilities.clamp(min=_LEAST).log()

    def _find(self, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (N,) of n-grams (N, k) in level k, and where they are known; elsewhere the row is 0."""
        is_known = (words[:, 0] >= 0) & (words[:, 0] < self.vocab_size)
        rows = words[:, 0].masked_fill(~is_known, 0)
        for keys, word in zip(self.keys, words[:, 1:].unbind(1), strict=False):
            wanted = rows * self.vocab_size + word
            found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
            is_known = is_known & (keys[found] == wanted) & (word >= 0)
            rows = found.masked_fill(~is_known, 0)
        return rows, is_known

    def _add_words(self, probabilities, length, rows, is_known, scale) -> None:
        """Add scale max(c(h w) - D, 0) for the words w that follow the contexts h, rows of level `length`."""
        keys = self.keys[length - 1]
        first = torch.searchsorted(keys, rows * self.vocab_size)
        n_words = torch.searchsorted(keys, (rows + 1) * self.vocab_size) - first
        n_words = n_words.masked_fill(~is_known, 0)
        owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), n_words)
        skipped = first - (n_words.cumsum(0) - n_words)
        found = torch.arange(len(owner), device=rows.device) + skipped[owner]
        words = keys[found] - rows[owner] * self.vocab_size
        mass = scale[owner] * self._discounted(length + 1, self.counts[length][found])
        probabilities.view(-1).index_add_(0, owner * self.vocab_size + words, mass)


def _tables(sizes: list[int], dtype: torch.dtype) -> nn.ParameterList:
    """Tables of zeros without gradient, of at least one row each."""
    zeros = (torch.zeros(max(1, size), dtype=dtype) for size in sizes)
    return nn.ParameterList(nn.Parameter(table, requires_grad=False) for table in zeros)
