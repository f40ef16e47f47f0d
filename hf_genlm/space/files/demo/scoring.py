"""Probabilities of the tokens of a text: of a given one, and of one that the model generates.

Shapes: N tokens, T tokens of a window, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    Cache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .models import MAX_PROMPT_TOKENS, LanguageModel, decode_spans

N_ALTERNATIVES = 5
_CHUNK = 256  # tokens per forward pass of a recurrent model


@dataclass(frozen=True)
class TokenScore:
    """A token, its natural log probability, its rank (1: the most likely) and the most likely tokens.

    The first token of a model without a start token has no probability.
    """

    token: int
    log_probability: float | None = None
    rank: int | None = None
    alternatives: tuple[tuple[int, float], ...] = ()  # token, probability

    @property
    def probability(self) -> float | None:
        return None if self.log_probability is None else math.exp(self.log_probability)


@dataclass(frozen=True)
class TextScore:
    """A text under a model: bits of each span of whole characters, and in total; unscored tokens count 0."""

    pieces: tuple[tuple[str, float], ...]
    bits: float
    n_bytes: int  # in UTF-8
    n_tokens: int
    n_scored: int

    @property
    def bits_per_byte(self) -> float:
        """Comparable across tokenizers, because the bytes are those of the text."""
        return self.bits / self.n_bytes


def score_tokens(logits_NV: torch.Tensor, tokens: list[int]) -> list[TokenScore]:
    """Score each token by the logits of the position before it."""
    log_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    chosen_N1 = log_NV.gather(1, torch.tensor(tokens, dtype=torch.long, device=log_NV.device)[:, None])
    ranks = (1 + (log_NV > chosen_N1).sum(dim=-1)).tolist()
    best = log_NV.topk(min(N_ALTERNATIVES, log_NV.shape[-1]), dim=-1)
    columns = (tokens, chosen_N1[:, 0].tolist(), ranks, best.indices.tolist(), best.values.exp().tolist())
    return [
        TokenScore(token, log, rank, tuple(zip(ids, probabilities, strict=True)))
        for token, log, rank, ids, probabilities in zip(*columns, strict=True)
    ]


def score_text(model: LanguageModel, text: str) -> TextScore:
    """Score each token of a text given all tokens before it, as far as the model's context reaches.

    Raises:
        ValueError: the text is empty.
    """
    if not text:
        raise ValueError("there is no text to score")
    ids = model.encode(text)
    start = model.start_ids
    bits: list[float | None] = [] if start else [None]
    for logits_NV, targets_N in _windows(model, start + ids):
        log_NV = torch.log_softmax(logits_NV.float(), dim=-1)
        bits += (log_NV.gather(1, targets_N[:, None])[:, 0] / -math.log(2)).tolist()
    known = [bit for bit in bits if bit is not None]
    pieces = [
        (span.text, sum(bit or 0.0 for bit in bits[span.first : span.stop]))
        for span in decode_spans(model.tokenizer, ids)
    ]
    return TextScore(tuple(pieces), sum(known), len(text.encode("utf-8")), len(ids), len(known))


def shared_pieces(a: TextScore, b: TextScore) -> list[tuple[str, float, float]]:
    """Split one text at the boundaries that both tokenizers share; text and bits under each model."""
    bits_until_a, bits_until_b = _cumulative_bits(a), _cumulative_bits(b)
    text = "".join(piece for piece, _ in a.pieces)
    return [
        (text[i:j], bits_until_a[j] - bits_until_a[i], bits_until_b[j] - bits_until_b[i])
        for i, j in itertools.pairwise(sorted(bits_until_a.keys() & bits_until_b.keys()))
    ]


def _cumulative_bits(score: TextScore) -> dict[int, float]:
    """Total bits before each piece boundary, by position in characters."""
    ends = itertools.accumulate((len(piece) for piece, _ in score.pieces), initial=0)
    sums = itertools.accumulate((bits for _, bits in score.pieces), initial=0.0)
    return dict(zip(ends, sums, strict=True))


@torch.inference_mode()
def _windows(model: LanguageModel, ids: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield logits (N, V) and targets (N,) in order; each token except the first is a target once.

    A recurrent model carries its state from chunk to chunk. Any other model reads overlapping windows of its
    context, with a stride of half a window.
    """
    row_T = model.tensor(ids)[0]
    if model.is_recurrent:
        cache = None
        for begin in range(0, len(ids) - 1, _CHUNK):
            inputs = row_T[None, begin : min(begin + _CHUNK, len(ids) - 1)]
            output = model.module(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            yield output.logits[0], row_T[begin + 1 : begin + 1 + inputs.shape[1]]
        return
    window = model.context or len(ids)
    n_scored = 0
    for begin in range(0, len(ids), max(1, window // 2)):
        stop = min(begin + window, len(ids) - 1)
        if stop <= n_scored:
            return
        logits_TV = model.module(input_ids=row_T[None, begin:stop], use_cache=False).logits[0]
        yield logits_TV[n_scored - begin :], row_T[n_scored + 1 : stop + 1]
        n_scored = stop


@dataclass(frozen=True)
class Sampling:
    """Sampling options. Off: `top_k` 0, `top_p` 1, `repetition_penalty` 1; `temperature` 0 is greedy."""

    max_new_tokens: int = 120
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    seed: int = 0

    def processors(self) -> Any:
        """Logits processors in the order of `generate`."""
        chosen = LogitsProcessorList()
        if self.repetition_penalty != 1:
            chosen.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature == 0:
            return chosen
        chosen.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chosen.append(TopPLogitsWarper(self.top_p))
        return chosen


def encode_prompt(model: LanguageModel, text: str) -> tuple[list[int], int]:
    """Tokens at the end of a prompt that leave half of the model's length free, and the number of all."""
    ids = model.encode(text)
    room = min(MAX_PROMPT_TOKENS, max(1, model.max_tokens // 2))
    return ids[-room:], len(ids)


def generate(model: LanguageModel, prompt: list[int], sampling: Sampling) -> Iterator[list[TokenScore]]:
    """Yield the scored tokens of the prompt, then each generated token.

    The tokens equal those of transformers' `generate` with the same seed. Probabilities are those of the
    model, before temperature and truncation. Generation stops after an end token, which is yielded too, or at
    `max_tokens`.

    Raises:
        ValueError: the prompt is empty and the model has no start token.
    """
    ids = model.start_ids + prompt
    if not ids:
        raise ValueError("this model has no token for the start of a text: give it a prompt")
    process = sampling.processors()
    generator = torch.Generator(model.module.device).manual_seed(sampling.seed)
    room = min(sampling.max_new_tokens, model.max_tokens - len(ids))
    logits_TV, cache = _forward(model, ids, None)
    yield [*([] if model.start_ids else [TokenScore(prompt[0])]), *score_tokens(logits_TV[:-1], ids[1:])]
    for _ in range(room):
        scores_1V = process(model.tensor(ids), logits_TV[-1:])
        if sampling.temperature == 0:
            chosen = int(scores_1V.argmax())
        else:
            chosen = int(torch.multinomial(scores_1V.softmax(dim=-1), 1, generator=generator))
        yield score_tokens(logits_TV[-1:], [chosen])
        if chosen in model.end_ids:
            return
        ids.append(chosen)
        # a model without `past_key_values` reads the whole text again
        logits_TV, cache = _forward(model, ids if cache is None else [chosen], cache)


@torch.inference_mode()
def _forward(model: LanguageModel, ids: list[int], cache: Cache | None) -> tuple[torch.Tensor, Cache | None]:
    """Logits (T, V) of the tokens after those in the cache."""
    output = model.module(input_ids=model.tensor(ids), past_key_values=cache, use_cache=True)
    return output.logits[0].float(), getattr(output, "past_key_values", None)
