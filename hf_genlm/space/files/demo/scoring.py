"""How likely a model finds each token of a text, and the text as a whole.

Shapes: N tokens, T tokens of a window, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .characters import spell
from .models import LanguageModel

N_ALTERNATIVES = 5
_CHUNK = 256  # tokens whose logits are held at a time


@dataclass(frozen=True)
class TokenScore:
    """A token and what the model thought before it: natural log of its probability, its rank (1: no other is
    likelier) and the likeliest tokens with their probabilities. The first token of a model without a start
    token has none."""

    token: int
    log_probability: float | None = None
    rank: int | None = None
    alternatives: tuple[tuple[int, float], ...] = ()

    @property
    def probability(self) -> float | None:
        """From 0 to 1."""
        return None if self.log_probability is None else math.exp(self.log_probability)


@dataclass(frozen=True)
class TextScore:
    """A text under a model: its pieces of whole characters with their bits, and in all. A token that could
    not be scored counts as none."""

    pieces: tuple[tuple[str, float], ...]
    bits: float
    n_bytes: int  # of UTF-8
    n_tokens: int
    n_scored: int

    @property
    def bits_per_byte(self) -> float:
        """Compares across tokenizers, since the bytes are those of the text."""
        return self.bits / self.n_bytes


def score_tokens(logits_NV: torch.Tensor, tokens: list[int]) -> list[TokenScore]:
    """Each token by the logits of the position before it."""
    log_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    chosen_N1 = log_NV.gather(1, torch.tensor(tokens, dtype=torch.long, device=log_NV.device)[:, None])
    ranks = (1 + (log_NV > chosen_N1).sum(dim=-1)).tolist()
    best = log_NV.topk(min(N_ALTERNATIVES, log_NV.shape[-1]), dim=-1)
    return [
        TokenScore(token, log, rank, tuple(zip(ids, probabilities, strict=True)))
        for token, log, rank, ids, probabilities in zip(
            tokens, chosen_N1[:, 0].tolist(), ranks, best.indices.tolist(), best.values.exp().tolist(),
            strict=True,
        )
    ]  # fmt: skip


def log_probabilities(model: LanguageModel, ids: list[int]) -> list[float | None]:
    """Natural log of the probability of each token of a text given all before it, as far as the model looks
    back.

    A recurrent decoder reads the text once, its state going from chunk to chunk. Any other reads it in
    windows of its context that lie half of it apart, each scoring what is not scored yet.
    """
    start = model.start_ids
    scores: list[float | None] = [None] * (1 - len(start)) if ids else []
    for logits_NV, targets in _windows(model, start + ids):
        log_NV = torch.log_softmax(logits_NV.float(), dim=-1)
        scores += log_NV.gather(1, targets[:, None])[:, 0].tolist()
    return scores


def score_text(model: LanguageModel, text: str) -> TextScore:
    """
    Raises:
        ValueError: there is no text.
    """
    if not text:
        raise ValueError("there is no text to score")
    ids = model.encode(text)
    logs = log_probabilities(model, ids)
    bits = [None if log is None else -log / math.log(2) for log in logs]
    known = [bit for bit in bits if bit is not None]
    spans = spell(model.tokenizer, ids)
    pieces = [(span.text, sum(bit or 0.0 for bit in bits[span.first : span.stop])) for span in spans]
    return TextScore(tuple(pieces), sum(known), len(text.encode("utf-8")), len(ids), len(known))


def shared_pieces(a: TextScore, b: TextScore) -> list[tuple[str, float, float]]:
    """The shortest pieces of one text that both tokenizers cut out, with their bits under each model."""
    ends_a, ends_b = _bits_by_end(a), _bits_by_end(b)
    text = "".join(piece for piece, _ in a.pieces)
    shared = sorted(ends_a.keys() & ends_b.keys())
    return [
        (text[start:stop], ends_a[stop] - ends_a[start], ends_b[stop] - ends_b[start])
        for start, stop in itertools.pairwise(shared)
    ]


def _bits_by_end(score: TextScore) -> dict[int, float]:
    """Bits of all before each end of a piece, by its place in characters."""
    ends = itertools.accumulate((len(piece) for piece, _ in score.pieces), initial=0)
    sums = itertools.accumulate((bits for _, bits in score.pieces), initial=0.0)
    return dict(zip(ends, sums, strict=True))


@torch.inference_mode()
def _windows(model: LanguageModel, ids: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits (N, V) and targets (N,), in order, until each token but the first has been a target once."""
    row = model.tensor(ids)[0]
    if model.is_recurrent:
        cache = None
        for begin in range(0, len(ids) - 1, _CHUNK):
            inputs = row[None, begin : min(begin + _CHUNK, len(ids) - 1)]
            output = model.module(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            yield output.logits[0], row[begin + 1 : begin + 1 + inputs.shape[1]]
        return
    window = model.context or len(ids)
    scored = 0
    for begin in range(0, len(ids), max(1, window // 2)):
        stop = min(begin + window, len(ids) - 1)
        if stop <= scored:
            return
        logits_TV = model.module(input_ids=row[None, begin:stop], use_cache=False).logits[0]
        yield logits_TV[scored - begin :], row[scored + 1 : stop + 1]
        scored = stop
