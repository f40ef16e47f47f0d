"""The n-gram model: its state is the last n - 1 words, its head a table of counts. Alone, or in a network.

    e_w = w                                          the embedding of a word is its number
    h_t = (h_{t-1} without its oldest word, w_t)
    P(w | h_t) = P_n(w | h_t),   P_0(w) = 1 / V
    P_k(w | h) = max(c(h w) - D_k(c(h w)), 0) / c(h) + gamma(h) P_{k-1}(w | h without its oldest word)

Interpolated modified Kneser-Ney smoothing (Chen and Goodman, 1999, An empirical study of smoothing techniques
for language modeling, section 4.1): c counts occurrences at the longest n-grams, and different words before
the n-gram below; D_k takes D1, D2 or D3+ from a count of 1, 2 or more; gamma(h) is the mass that they take,
and that of n-grams that are not stored. A context that does not occur leaves P_{k-1} as it is.

In a network, P(w) = g P_network(w) + (1 - g) ((1 - s) P_n(w) + s P_history(w)), the last of which counts the
text that is being read: history_genlm.py. The gates g and s see the network's state, how often the contexts
of each length occur, and what the history holds. On the text that was counted, a word must not find its own
count: training leaves one out of the longest n-gram that ends in it, and of the next shorter where none is
left.

Shapes: B batch, T tokens, N contexts, C words of a context, n - 1 and those of the history at least, V
vocabulary, F features.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_genlm import read_states
from .configuration_genlm import GenLMConfig
from .history_genlm import GATE_SCALE, HISTORY_FEATURES, GenLMHistory
from .layout_genlm import TimeLayout

_MAX_PROBABILITIES = 1 << 22  # computed at once
_LEAST = 1e-30  # probability of a word
_GATE_UNITS, _N_FEATURES = 16, 3  # of a gate; of each length of a context
_FIRST_SHARE = -0.3  # bias of the logit of s, before it is scaled: a history is less known than counts


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
        self.least = max(1, config.ngram_order - 1)
        self.width = max(self.least, config.ngram_history or 0)

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
        states, recording, width = None, False, self.width
        if past_key_values is not None:
            states = read_states(past_key_values, at, (0,), (n_rows, width))
            recording = past_key_values.is_recording_past(at)
        else:  # no context is longer than the rows
            width = max(self.least, min(width, n_tokens + 1))
        state = hidden_states.new_zeros(n_rows, width) if states is None else states[0].float()
        words = torch.cat([state, hidden_states.squeeze(-1)], dim=1)  # (B, C + T)
        ends = torch.arange(1, n_tokens + 1, device=words.device).expand(n_rows, -1)
        if layout.valid is not None:  # tokens move to the left, over the padding
            order = torch.sort(layout.valid.logical_not().int(), dim=1, stable=True).indices
            words = torch.cat([state, words[:, width:].gather(1, order)], dim=1)
            ends = layout.valid.cumsum(dim=1)
        places = (ends[..., None] + torch.arange(width, device=words.device)).flatten(1)
        contexts = words.gather(1, places).view(n_rows, n_tokens, width)
        if layout.document is not None:
            document = layout.document if layout.valid is None else layout.document.gather(1, order)
            document = torch.cat([torch.zeros_like(document[:, :1]).expand(-1, width), document], dim=1)
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

    _keep_in_fp32_modules_strict = ["backoffs", "discounts"]  # a model takes these names from its children

    def __init__(self, config: GenLMConfig):
        super().__init__()
        self.vocab_size = config.ngram_sizes[0]
        sizes = [1, *config.ngram_sizes]  # rows of levels 0 to n
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

    def forward(self, contexts: torch.Tensor) -> torch.Tensor:
        """Map contexts (..., C), as those of `NgramContext`, to log-probabilities (..., V), in float32."""
        return self.of_contexts(contexts)[0].clamp(min=_LEAST).log()

    @torch.no_grad()
    def of_contexts(self, contexts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """P_n (..., V) after contexts (..., C), and features (..., F) of these, in float32."""
        contexts = contexts[..., -max(1, self.order - 1) :]
        words = contexts.reshape(-1, contexts.shape[-1]).long() - 1
        found = []  # of contexts of 1 to n - 1 words: rows, c(h) and gamma(h)
        for length in range(1, self.order):
            rows, is_known = self._find(words[:, -length:])
            total = self.totals[length][rows].masked_fill(~is_known, 0)
            found.append((rows, total, self.backoffs[length][rows].float()))
        n_rows, single = max(1, _MAX_PROBABILITIES // self.vocab_size), self._of_single_words()
        probabilities = single.new_empty(len(words), self.vocab_size)
        for start in range(0, len(words), n_rows):
            some = slice(start, start + n_rows)
            self._fill(probabilities[some], [[part[some] for part in parts] for parts in found], single)
        totals, backoffs = [total for _, total, _ in found], [backoff for _, _, backoff in found]
        shape = contexts.shape[:-1]
        return probabilities.view(*shape, -1), _features(totals, backoffs, words[:, 0]).view(*shape, -1)

    @torch.no_grad()
    def of_words(
        self, contexts: torch.Tensor, words: torch.Tensor, leave_one_out: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (B, T) of `words` after contexts (B, T, C), and `features` (B, T, F).

        Args:
            contexts: of successive tokens, as `NgramContext` gives them.
            words: (B, T); a number outside the vocabulary stands for any word.
            leave_one_out: these words were counted in these contexts, and are to see what the others leave.
        """
        is_word = (words >= 0) & (words < self.vocab_size)
        words = words.masked_fill(~is_word, 0)
        nearest = contexts[..., -max(1, self.order - 1) :]
        ngrams = self._rows_of(nearest.long() - 1)  # contexts of 0 to n - 1 words
        ended = [(words, is_word)]  # the n-grams of 1 to n words that end in the word
        for level, before in enumerate(ngrams[1:], start=2):
            ended += [self._extend(level, *before, words, is_word)]
        is_due, parts = torch.full_like(is_word, leave_one_out), []
        for length in range(self.order - 1, -1, -1):
            (rows, is_known), (at, is_stored) = ngrams[length], ended[length]
            total = self.totals[length][rows].masked_fill(~is_known, 0)
            mass = self.backoffs[length][rows].float() * total
            count = self.counts[length][at].masked_fill(~is_stored, 0)
            left_out = (is_due & is_stored).int()
            was_kept, kept = (self._discounted(length + 1, some) for some in (count, count - left_out))
            mass = (mass - left_out + was_kept - kept).clamp(min=0)
            parts.append((total - left_out, mass, kept))
            is_due = is_due & (~is_stored | (count == 1))  # where none is left, of the next shorter
        totals, masses, kept = zip(*reversed(parts), strict=True)
        p = torch.full_like(masses[0], 1 / self.vocab_size)
        for total, mass, of_word in zip(totals, masses, kept, strict=True):
            p = torch.where(total > 0, (of_word + mass * p) / total.clamp(min=1), p)
        backoffs = [mass / total.clamp(min=1) for total, mass in zip(totals, masses, strict=True)]
        return p.clamp(min=_LEAST).log(), _features(totals[1:], backoffs[1:], words)

    def _rows_of(self, words: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Rows (B, T) of the last 0 to n - 1 words of successive contexts (B, T, C), and where known."""
        last = words[..., -1]
        is_word = (last >= 0) & (last < self.vocab_size)
        last = last.masked_fill(~is_word, 0)
        found = [(torch.zeros_like(last), torch.ones_like(is_word))]
        if self.order > 1:
            found.append((last, is_word))
        for level in range(2, self.order):
            # the words before the last one end the context one token earlier
            first = self._find(words[:, 0, -level:-1])
            before, is_known = (
                torch.cat([of_first[:, None], of_all[:, :-1]], dim=1)
                for of_first, of_all in zip(first, found[-1], strict=True)
            )
            found.append(self._extend(level, before, is_known & (words[..., -level] >= 0), last, is_word))
        return found

    def _extend(self, level, rows, is_known, words, is_word) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows in `level` of n-grams: `rows` of the level below and a word each; and where known."""
        keys, wanted = self.keys[level - 2], rows * self.vocab_size + words
        found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        is_known = is_known & is_word & (keys[found] == wanted)
        return found.masked_fill(~is_known, 0), is_known

    def _of_single_words(self) -> torch.Tensor:
        """P_1, (V,)."""
        total, backoff = self.totals[0], self.backoffs[0].float()
        return self._discounted(1, self.counts[0]) / total.clamp(min=1) + backoff / self.vocab_size

    def _discounted(self, level: int, counts: torch.Tensor) -> torch.Tensor:
        discounts = self.discounts[level - 1].float()[counts.clamp(1, 3).long() - 1]
        return (counts - discounts).clamp(min=0)

    def _fill(self, probabilities: torch.Tensor, found: list, single: torch.Tensor) -> None:
        """Write P_n into `probabilities` (N, V), of contexts that were found in the tables."""
        scale = single.new_ones(len(probabilities))  # of what a context leaves to the next shorter one
        scales = []
        for _, total, backoff in reversed(found):
            scales.append(scale / total.clamp(min=1))
            scale = torch.where(total > 0, scale * backoff, scale)
        torch.mul(scale[:, None], single, out=probabilities)
        for length, (rows, total, _) in enumerate(found, start=1):
            self._add_words(probabilities, length, rows, total > 0, scales[-length])

    def _find(self, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (N,) of n-grams (N, k) in level k, and where they are known; elsewhere the row is 0."""
        are_words = (words >= 0) & (words < self.vocab_size)
        words = words.masked_fill(~are_words, 0)
        rows, is_known = words[:, 0], are_words[:, 0]
        for k in range(1, words.shape[1]):
            rows, is_known = self._extend(k + 1, rows, is_known, words[:, k], are_words[:, k])
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


class GenLMMixture(nn.Module):
    """A network's, the counts' and the history's predictions: g P_network + (1 - g) Q, where
    Q = (1 - s) P_n + s P_history, or P_n without a history.

    The gates g and s are sigmoid(8 (v tanh(U [network's state, features of both] + c) + b)).
    """

    _keep_in_fp32_modules_strict = [*GenLMNgramHead._keep_in_fp32_modules_strict, "theta"]

    def __init__(self, config: GenLMConfig, width: int):
        super().__init__()
        self.ngrams = GenLMNgramHead(config)
        self.history = None if config.ngram_history is None else GenLMHistory(config.ngram_history)
        n_features = _N_FEATURES * (config.ngram_order - 1)
        n_features += 0 if self.history is None else HISTORY_FEATURES
        self.of_state = nn.Linear(width, _GATE_UNITS)
        self.of_counts = nn.Linear(n_features, _GATE_UNITS, bias=False)
        self.gate = nn.Linear(_GATE_UNITS, 1 if self.history is None else 2)
        self.gate.start = _start_gates

    def forward(self, logits: torch.Tensor, states: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        """Map the network's logits (..., V) and states (..., D), and contexts (..., C), to log P (..., V)."""
        return self.mix(logits, self.of_state(states), contexts)

    def mix(self, logits: torch.Tensor, units: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        """`forward`, where the state's part of the gates' units (..., U) is known.

        Without gradients, many logits are overwritten, a few rows at a time: they are large.
        """
        n_rows = max(1, _MAX_PROBABILITIES // max(logits.shape[-1], contexts.shape[-1]))
        flat = [each.flatten(0, -2) for each in (logits, units, contexts)]
        if len(flat[0]) <= n_rows or torch.is_grad_enabled():
            return self._mix(*flat).view_as(logits)
        for some in zip(*(each.split(n_rows) for each in flat), strict=True):
            some[0].copy_(self._mix(*some))
        return flat[0].view_as(logits)

    def _mix(self, logits: torch.Tensor, units: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        beside, features = self.ngrams.of_contexts(contexts)
        n_new = logits.shape[-1] - beside.shape[-1]  # words that came into the vocabulary later
        if n_new:
            beside = F.pad(beside, (0, n_new))
        if self.history is None:
            gate = self.gates(units, features)[0]
        else:
            repeated, more = self.history.of_contexts(contexts, logits.shape[-1])
            gate, share = self.gates(units, torch.cat([features, more], dim=-1))
            beside = torch.lerp(beside.to(share.dtype), repeated.to(share.dtype), share[..., None])
        gate = torch.sigmoid(gate)[..., None]
        mixed = torch.lerp(beside.to(gate.dtype), torch.softmax(logits.to(gate.dtype), dim=-1), gate)
        return mixed.clamp(min=_LEAST).log().to(logits.dtype)

    def gates(self, units: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logit (...) of g, and s (...) if there is a history, in float32 at least, from units (..., U)
        and features (..., F)."""
        units = units + self.of_counts(features.to(units.dtype))
        logits = GATE_SCALE * self.gate(torch.tanh(units))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        share = None if self.history is None else torch.sigmoid(logits[..., 1])
        return logits[..., 0], share

    def of_words(
        self, states: torch.Tensor, contexts: torch.Tensor, words: torch.Tensor, leave_one_out: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logit of g and log Q, (B, T) each, for the loss of `words` (B, T)."""
        log_p, features = self.ngrams.of_words(contexts, words, leave_one_out)
        units = self.of_state(states)
        if self.history is None:
            return self.gates(units, features)[0], log_p
        repeated, more = self.history.of_words(contexts.flatten(0, 1), words.flatten())
        features = torch.cat([features, more.view(*words.shape, -1)], dim=-1)
        gate, share = self.gates(units, features)
        beside = torch.lerp(log_p.exp().to(share.dtype), repeated.view(words.shape).to(share.dtype), share)
        return gate, beside.clamp(min=_LEAST).log()


def _start_gates(linear: nn.Linear) -> None:
    """Network and counts count alike, and a history less than counts."""
    init.zeros_(linear.weight)
    init.copy_(linear.bias, torch.tensor([0.0, _FIRST_SHARE])[: len(linear.bias)])


def _features(totals, backoffs, like: torch.Tensor) -> torch.Tensor:
    """(..., F) of the contexts of 1 to n - 1 words, from their c(h) and gamma(h) (...): for each whether it
    occurs, the log of how often, and gamma."""
    found = []
    for total, backoff in zip(totals, backoffs, strict=True):
        is_known = (total > 0).float()
        found += [is_known, torch.log1p(total.float()) / 4, backoff * is_known]
    return torch.stack(found, dim=-1) if found else like.new_zeros(*like.shape, 0, dtype=torch.float32)
