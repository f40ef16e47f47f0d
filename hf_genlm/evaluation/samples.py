"""What the texts that a model writes are like: how varied, how repetitive, how much is copied.

Texts are counted in words (see `words`), so that figures compare across tokenizers. Most of them depend on
how many texts there are and how long they are, and none has a best value in itself: what they should be is
what they are for human texts of the same count and length, which `reference_texts` measures beside them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from hf_genlm.decoding import FastGenerator
from hf_genlm.errors import UserError
from hf_genlm.evaluation.figure import Figure, mean_figure
from hf_genlm.evaluation.likelihood import evaluation_mode, start_id_of
from hf_genlm.evaluation.mauve import check_mauve, last_hidden_states, mauve_of_features
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.evaluation.ngrams import distinct_n, repetition, self_bleu
from hf_genlm.evaluation.overlap import LENGTHS, SpanCounter, read_texts
from hf_genlm.evaluation.words import words_of

Progress = Callable[[int, int], None]
_ROWS = 64  # texts that are generated at once
_CHARACTERS = 32  # of a token, at most: how much of a reference text is encoded
_TOLD = 1000  # times that the reading of the training texts is told of


class _Statistic(NamedTuple):
    name: str
    unit: str
    higher_is_better: bool
    of: Callable[[Sequence[Sequence[str]]], Figure | None]


def _mean_length(texts: Sequence[Sequence[str]]) -> Figure:
    return mean_figure(np.array([len(text) for text in texts], dtype=np.float64))


STATISTICS = (
    _Statistic("words_per_text", "words/text", True, _mean_length),
    *(_Statistic(f"distinct_{n}", "fraction", True, partial(distinct_n, n=n)) for n in (1, 2, 3, 4)),
    _Statistic("seq_rep_4", "fraction", False, partial(repetition, n=4)),
    _Statistic("self_bleu_4", "fraction", False, partial(self_bleu, n=4)),
)


def measure_samples(
    model: Any,
    tokenizer: Any,
    *,
    count: int = 100,
    max_new_tokens: int = 256,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    prompts: Sequence[str] | None = None,
    training_texts: Any = None,
    reference_texts: Sequence[str] | None = None,
    mauve: bool = False,
    on_progress: Progress | None = None,
) -> list[Measurement]:
    """Generate texts with a causal language model and measure them. Global random state is left as it was.

    Args:
        model, tokenizer, count, max_new_tokens, seed, temperature, top_p, prompts: as in `generate_texts`.
        training_texts: what the model was trained on: texts, (number of the text, part of it) in order, or a
            thing whose `texts()` gives the latter, as `Documents`. Memory does not grow with it.
        reference_texts: human texts. As many pieces of them as there are samples, `max_new_tokens` long where
            there is text enough, are measured too, as the split "reference".
        mauve: measure MAUVE against the reference texts, by the features of `model` itself.
        on_progress: called with (tokens generated, at most), then with (texts read, in all) of the training
            texts where they have a length.

    Returns:
        Of the splits "samples" and "reference", in words:
        - words_per_text (words/text): the mean length, which most of the others depend on.
        - distinct_1 .. distinct_4, seq_rep_4, self_bleu_4 (fraction): see `ngrams`.
        - training_overlap_L (fraction) for L of `overlap.LENGTHS`: the share of their spans of L words that
          stand in the training texts. longest_copied_span (words): the longest that does.
        - mauve_own_features (fraction), of the samples: see `mauve`. **Not comparable with published MAUVE.**
        Figures that no text is long enough for are left out. Standard errors are those of another draw of
        texts: of means over texts (words_per_text, seq_rep_4), clustered by text (training_overlap), or by
        the jackknife over texts (distinct, self_bleu); the longest span and MAUVE have none.

    Raises:
        UserError: a setting outside its range, no start token, MAUVE without its package or reference texts.
    """
    references = None
    if reference_texts is not None:
        references = reference_pieces(tokenizer, reference_texts, count, max_new_tokens)
    if mauve:
        check_mauve(count, len(references or ()))
    samples = generate_texts(
        model, tokenizer, count=count, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature,
        top_p=top_p, prompts=prompts, on_progress=on_progress,
    )  # fmt: skip
    groups = {"samples": samples, "reference": references}
    words = {split: [words_of(text) for text in texts] for split, texts in groups.items() if texts}
    found = [
        Measurement(s.name, figure.value, s.unit, figure.n, figure.stderr, split, s.higher_is_better)
        for split, texts in words.items()
        for s in STATISTICS
        if (figure := s.of(texts)) is not None
    ]
    if training_texts is not None:
        found += _overlap(words, training_texts, on_progress)
    if mauve and references:
        encoded = [_encode(tokenizer, texts) for texts in (references, samples)]
        with evaluation_mode(model):
            features = [last_hidden_states(model, ids, start_id_of(tokenizer)) for ids in encoded]
        value = mauve_of_features(*features)
        found.append(Measurement("mauve_own_features", value, "fraction", count, None, "samples", True))
    return found


def generate_texts(
    model: Any,
    tokenizer: Any,
    *,
    count: int,
    max_new_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    prompts: Sequence[str] | None = None,
    on_progress: Progress | None = None,
) -> list[str]:
    """`count` texts drawn from a causal language model: nothing cuts its distribution but what is given here.

    Args:
        model: one of ours goes through `FastGenerator`, any other through its own `generate`. Settings of its
            generation config are not used.
        max_new_tokens: of each text; the end-of-text token ends it before.
        seed: of the draws. The same one gives the same texts on the same machine.
        temperature: 0 takes the likeliest token each time.
        top_p: draw from the likeliest tokens that have this share of the probability.
        prompts: text i goes on from prompt i modulo their number, which is no part of it; None: from the
            start of a document.
        on_progress: called with (tokens generated, at most).

    Raises:
        UserError: a setting outside its range, or a tokenizer without a start token.
    """
    _check(count, max_new_tokens, temperature, top_p, prompts)
    start = start_id_of(tokenizer)
    begun = [[start, *ids] for ids in _encode(tokenizer, prompts or [""])]
    rows = [begun[i % len(begun)] for i in range(count)]
    end = tokenizer.eos_token_id
    pad = start if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        **(sampling if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens, bos_token_id=start, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    ticker = _Ticker(count, max_new_tokens, on_progress)
    device = next(model.parameters()).device
    texts: list[str] = []
    with evaluation_mode(model), _generating_by(model, config), _seeded(seed, device):
        fast = FastGenerator(model)
        for first in range(0, count, _ROWS):
            inputs = _left_padded(rows[first : first + _ROWS], pad, device)
            ticker.begin(first, len(inputs["input_ids"]))
            made = fast.generate(inputs.pop("input_ids"), streamer=ticker, **inputs)
            length = max(len(row) for row in rows[first : first + _ROWS])
            ids = [_before(end, row) for row in made[:, length:].tolist()]
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def reference_pieces(tokenizer: Any, texts: Sequence[str], count: int, max_tokens: int) -> list[str]:
    """At most `count` pieces of human texts, of `max_tokens` tokens where the text is as long.

    Of at least `count` texts the beginnings of as many, spread evenly; of fewer, pieces from places spread
    evenly over each. Pieces do not overlap, and empty ones are left out.
    """
    texts = [text for text in texts if text.strip()]
    if not texts:
        return []
    chosen = [texts[i * len(texts) // count] for i in range(count)] if len(texts) > count else texts
    per_text = -(-count // len(chosen))
    pieces = []
    for text in chosen:
        borders = [len(text) * j // per_text for j in range(per_text + 1)]
        for begin, end in pairwise(borders):
            pieces.append(text[begin : min(end, begin + max_tokens * _CHARACTERS)])
    cut = [ids[:max_tokens] for ids in _encode(tokenizer, pieces)]
    return [text for text in tokenizer.batch_decode(cut) if text.strip()][:count]


def _overlap(
    words: dict[str, list[list[str]]], training_texts: Any, on_progress: Progress | None
) -> list[Measurement]:
    """One reading of the training texts, for the texts of all splits."""
    counters = {split: SpanCounter(texts) for split, texts in words.items()}
    read_texts(list(counters.values()), _with_progress(training_texts, on_progress))
    found = []
    for split, counter in counters.items():
        for length in LENGTHS:
            figure = counter.share(length)
            if figure is not None:
                name, (value, n, stderr) = f"training_overlap_{length}", figure
                found.append(Measurement(name, value, "fraction", n, stderr, split, False))
        longest, n = len(counter.longest()), len(words[split])
        found.append(Measurement("longest_copied_span", longest, "words", n, None, split, False))
    return found


def _with_progress(texts: Any, on_progress: Progress | None) -> Iterator[tuple[int, str]]:
    """(number of the text, part of it), told of where it is known how many there are."""
    total = len(texts) if hasattr(texts, "__len__") else None
    parts = texts.texts() if hasattr(texts, "texts") else texts
    told = 0
    for i, item in enumerate(parts):
        number, part = item if isinstance(item, tuple) else (i, item)
        if on_progress is not None and total is not None and (number + 1) * _TOLD // total > told:
            told = (number + 1) * _TOLD // total
            on_progress(number + 1, total)
        yield number, part


def _check(
    count: int, max_new_tokens: int, temperature: float, top_p: float, prompts: Sequence[str] | None
) -> None:
    if count < 2:
        raise UserError(f"count = {count}: at least 2 texts are needed, and some 100 for errors to mean much")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature = {temperature}: must be 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p = {top_p}: must be more than 0 and at most 1 (all tokens)")
    if prompts is not None and not len(prompts):
        raise UserError("prompts is an empty list: give at least one, or None for the start of a document")


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _before(end: int | None, ids: list[int]) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


class _Ticker(BaseStreamer):
    """Tells of every token that a batch has come forward by."""

    def __init__(self, count: int, max_new_tokens: int, on_progress: Progress | None):
        self._per_text, self._total = max_new_tokens, count * max_new_tokens
        self._tell = on_progress or (lambda done, total: None)
        self._done = self._rows = self._stop = 0

    def begin(self, first: int, rows: int) -> None:
        """The next batch: `rows` texts from `first` on."""
        self._rows = rows
        self._done, self._stop = first * self._per_text - rows, (first + rows) * self._per_text

    def put(self, value: torch.Tensor) -> None:
        """The prompts first, then a token of each row."""
        self._done += self._rows
        self._tell(self._done, self._total)

    def end(self) -> None:
        """All rows have ended, some of them perhaps before their last token."""
        self._tell(self._stop, self._total)


@contextmanager
def _generating_by(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Only `config` decides: `generate` fills what a config leaves open from the model's own."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
