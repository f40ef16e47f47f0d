"""Writing on from a prompt, one token at a time, with the probability of each."""

from collections.abc import Callable, Iterator
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

from .models import MOST_TOKENS, LanguageModel
from .scoring import TokenScore, score_tokens


@dataclass(frozen=True)
class Settings:
    """How to sample; `temperature` 0: always the likeliest token, `top_k` 0, `top_p` 1 and
    `repetition_penalty` 1: off."""

    max_new_tokens: int = 120
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt that are read, the last ones of all `n_tokens`."""

    ids: list[int]
    n_tokens: int

    @property
    def is_cut(self) -> bool:
        """True if its beginning is not read."""
        return len(self.ids) < self.n_tokens


def prompt_of(model: LanguageModel, text: str) -> Prompt:
    """As much of the end of `text` as leaves room to write: half of what the model can hold."""
    ids = model.encode(text)
    room = min(MOST_TOKENS, max(1, model.most_tokens // 2))
    return Prompt(ids[-room:], len(ids))


def write(model: LanguageModel, prompt: list[int], settings: Settings) -> Iterator[list[TokenScore]]:
    """The scored tokens of the prompt, and then each new one as it is drawn: those of transformers'
    `generate` under the same seed, set for this text alone.

    Probabilities are the model's own, before temperature and cuts. Ends with the end of text, which is given
    too, or where the model can hold no more.
    """
    ids = model.start_ids + prompt
    if not ids:
        raise ValueError("this model has no token for the start of a text: give it a prompt")
    process = _processors(settings)
    generator = torch.Generator(model.module.device).manual_seed(settings.seed)
    room = min(settings.max_new_tokens, model.most_tokens - len(ids))
    logits_TV, cache = _step(model, ids, None)
    first = [] if model.start_ids else [TokenScore(prompt[0])]
    yield first + score_tokens(logits_TV[:-1], ids[1:])
    for _ in range(room):
        chosen = _choose(process(model.tensor(ids), logits_TV[-1:]), settings, generator)
        yield score_tokens(logits_TV[-1:], [chosen])
        if chosen in model.end_ids:
            return
        ids.append(chosen)
        # a model that keeps its state elsewhere is read to from the start again
        logits_TV, cache = _step(model, ids if cache is None else [chosen], cache)


@torch.inference_mode()
def _step(model: LanguageModel, ids: list[int], cache: Cache | None) -> tuple[torch.Tensor, Cache | None]:
    """Logits (T, V) of `ids`, which follow what is in the cache."""
    output = model.module(input_ids=model.tensor(ids), past_key_values=cache, use_cache=True)
    return output.logits[0].float(), getattr(output, "past_key_values", None)


def _choose(scores_1V: torch.Tensor, settings: Settings, generator: torch.Generator) -> int:
    if settings.temperature == 0:
        return int(scores_1V.argmax())
    return int(torch.multinomial(scores_1V.softmax(dim=-1), 1, generator=generator))


def _processors(settings: Settings) -> Callable[[Any, Any], torch.Tensor]:
    """In the order of `generate`."""
    chosen = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        chosen.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature == 0:
        return chosen
    chosen.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k > 0:
        chosen.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        chosen.append(TopPLogitsWarper(settings.top_p))
    return chosen
