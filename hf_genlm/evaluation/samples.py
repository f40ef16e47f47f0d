"""Sample texts from a language model and measure their diversity, repetition and copied spans.

Texts are counted in words (`text_statistics`), so that values are comparable across tokenizers. Most of them
depend on the number and length of the texts, and none has a best value as such: the target is the value of
human texts of equal number and length, which `reference_texts` measures along with the samples.

MAUVE. Published MAUVE (Pillutla et al., NeurIPS 2021) uses the features of GPT-2 large. Here the features are
the hidden states of the model under evaluation, so that no other model is needed. The value is **not
comparable with published MAUVE**, nor between models with different features; it serves to compare settings
of one model, such as its temperature. From the features on, the package mauve-text computes it with its
defaults.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from hf_genlm.decoding import FastGenerator
from hf_genlm.errors import UserError, install_command
from hf_genlm.evaluation.likelihood import evaluation_mode, start_token_id
from hf_genlm.evaluation.measurement import Measurement, Statistic, mean_statistic
from hf_genlm.evaluation.text_statistics import (
    SPAN_LENGTHS,
    SpanMatcher,
    distinct_n,
    match_texts,
    repetition,
    self_bleu,
    split_words,
)
from hf_genlm.text.encoding import encode_texts

Progress = Callable[[int, int], None]
MIN_MAUVE_TEXTS = 20  # samples, and references: mauve-text makes one cluster of ten texts
_MAX_ROWS = 64  # texts that are generated at once
_MAX_FEATURE_ROWS = 32  # texts whose features are computed at once
_MAX_TOKEN_CHARACTERS = 32  # bounds the part of a reference text that is encoded
_MAX_REPORTS = 1000  # of progress while the training texts are read


class _TextMetric(NamedTuple):
    name: str
    unit: str
    higher_is_better: bool
    compute: Callable[[Sequence[Sequence[str]]], Statistic | None]


def _mean_length(texts: Sequence[Sequence[str]]) -> Statistic:
    return mean_statistic(np.array([len(text) for text in texts], dtype=np.float64))


_TEXT_METRICS = (
    _TextMetric("words_per_text", "words/text", True, _mean_length),
    *(_TextMetric(f"distinct_{n}", "fraction", True, partial(distinct_n, n=n)) for n in (1, 2, 3, 4)),
    _TextMetric("seq_rep_4", "fraction", False, partial(repetition, n=4)),
    _TextMetric("self_bleu_4", "fraction", False, partial(self_bleu, n=4)),
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
    """Sample texts from a causal language model and measure them. The global random state is not changed.

    Args:
        model, tokenizer, count, max_new_tokens, seed, temperature, top_p, prompts: as in `sample_texts`.
        training_texts: training text of the model: texts, (number of the text, part of it) in order, or an
            object whose `texts()` yields the latter, such as `Documents`. Memory does not grow with it.
        reference_texts: human texts. As many pieces of them as there are samples, of `max_new_tokens` if
            there is enough text, are measured as the split "reference".
        mauve: measure MAUVE against the reference texts with the features of `model` itself.
        on_progress: called with (tokens generated, maximum), then with (texts read, total) of the training
            texts if they have a length.

    Returns:
        Of the splits "samples" and "reference", in words:
        - words_per_text (words/text): mean length.
        - distinct_1 .. distinct_4, seq_rep_4, self_bleu_4 (fraction): see `text_statistics`.
        - training_overlap_L (fraction) for L in `SPAN_LENGTHS`: share of the spans of L words that occur in
          the training texts. longest_copied_span (words): the longest that does.
        - mauve_own_features (fraction), of the samples. **Not comparable with published MAUVE.**
        Values for which no text is long enough are left out. Standard errors are over texts: of means
        (words_per_text, seq_rep_4), clustered (training_overlap), or jackknife (distinct, self_bleu).

    Raises:
        UserError: a setting out of range, no start token, or MAUVE without its package or reference texts.
    """
    references: list[str] = []
    if reference_texts is not None:
        references = cut_references(tokenizer, reference_texts, count, max_new_tokens)
    if mauve:
        _check_mauve(count, len(references))
    samples = sample_texts(
        model, tokenizer, count=count, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature,
        top_p=top_p, prompts=prompts, on_progress=on_progress,
    )  # fmt: skip
    splits = {"samples": samples, "reference": references}
    words = {split: [split_words(text) for text in texts] for split, texts in splits.items() if texts}
    found = [
        Measurement(m.name, result.value, m.unit, result.n, result.stderr, split, m.higher_is_better)
        for split, texts in words.items()
        for m in _TEXT_METRICS
        if (result := m.compute(texts)) is not None
    ]
    if training_texts is not None:
        found += _measure_overlap(words, training_texts, on_progress)
    if mauve:
        ids = [encode_texts(tokenizer, texts) for texts in (references, samples)]
        with evaluation_mode(model):
            features = [last_hidden_states(model, of_split, start_token_id(tokenizer)) for of_split in ids]
        value = mauve_score(*features)
        found.append(Measurement("mauve_own_features", value, "fraction", count, None, "samples", True))
    return found


def sample_texts(
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
    """Sample `count` texts from the full distribution of a causal language model, without dropout.

    Args:
        model: one of ours generates with `FastGenerator`, any other with its own `generate`. Its generation
            config is not used.
        max_new_tokens: maximum length of a text; end-of-text ends it earlier.
        seed: equal seeds give equal texts on the same machine.
        temperature: 0 takes the likeliest token.
        top_p: sample from the likeliest tokens with this total probability.
        prompts: text i continues prompt i modulo their number, and does not include it. Default: the start of
            a document.
        on_progress: called with (tokens generated, maximum).

    Raises:
        UserError: a setting out of range, or a tokenizer without a start token.
    """
    _check_settings(count, max_new_tokens, temperature, top_p, prompts)
    start = start_token_id(tokenizer)
    prompt_ids = [[start, *ids] for ids in encode_texts(tokenizer, prompts or [""])]
    rows = [prompt_ids[i % len(prompt_ids)] for i in range(count)]
    end = tokenizer.eos_token_id
    pad = start if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        **(sampling if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens, bos_token_id=start, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    progress = _ProgressStreamer(count, max_new_tokens, on_progress)
    device = next(model.parameters()).device
    texts: list[str] = []
    with evaluation_mode(model), _generation_config(model, config), _seeded(seed, device):
        generator = FastGenerator(model)
        for first in range(0, count, _MAX_ROWS):
            chosen = rows[first : first + _MAX_ROWS]
            longest = max(map(len, chosen))
            ids = [[pad] * (longest - len(row)) + row for row in chosen]
            mask = [[0] * (longest - len(row)) + [1] * len(row) for row in chosen]
            progress.begin(first, len(chosen))
            made = generator.generate(
                torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                streamer=progress,
            )
            new = [row[: row.index(end)] if end in row else row for row in made[:, longest:].tolist()]
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def cut_references(tokenizer: Any, texts: Sequence[str], count: int, max_tokens: int) -> list[str]:
    """Cut at most `count` pieces of `max_tokens` tokens (or fewer, if a text is shorter) out of human texts.

    Of at least `count` texts, the beginnings of `count` texts spread evenly; of fewer, pieces spread evenly
    over each. Pieces do not overlap, and none is empty.
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
            pieces.append(text[begin : min(end, begin + max_tokens * _MAX_TOKEN_CHARACTERS)])
    ids = [of_piece[:max_tokens] for of_piece in encode_texts(tokenizer, pieces)]
    return [text for text in tokenizer.batch_decode(ids) if text.strip()][:count]


def last_hidden_states(model: Any, ids: Sequence[Sequence[int]], start_id: int) -> np.ndarray:
    """Hidden state of the last layer at the last token of each text, given `start_id` and all tokens before.

    Args:
        model: a causal model of transformers in evaluation mode. Padding is on the right, where it cannot see
            it.
        ids: token ids of M texts.

    Returns:
        (M, hidden size) float32.
    """
    device = next(model.parameters()).device
    states = []
    with torch.inference_mode():
        for first in range(0, len(ids), _MAX_FEATURE_ROWS):
            rows = [[start_id, *text] for text in ids[first : first + _MAX_FEATURE_ROWS]]
            longest = max(map(len, rows))
            padded = torch.tensor([row + [start_id] * (longest - len(row)) for row in rows], device=device)
            hidden = model.base_model(input_ids=padded, use_cache=False).last_hidden_state
            ends = torch.tensor([len(row) - 1 for row in rows], device=device)
            states.append(hidden[torch.arange(len(rows), device=device), ends].float().cpu().numpy())
    return np.concatenate(states)


def mauve_score(reference: np.ndarray, samples: np.ndarray) -> float:
    """MAUVE (0 to 1) of features (M, d) and (M', d), clustered with a fixed seed."""
    from mauve import compute_mauve

    return float(compute_mauve(p_features=reference, q_features=samples).mauve)


def _check_mauve(n_samples: int, n_references: int) -> None:
    if find_spec("mauve") is None:
        raise UserError(f"MAUVE needs the package mauve-text: {install_command('mauve')}")
    if min(n_samples, n_references) < MIN_MAUVE_TEXTS:
        raise UserError(
            f"MAUVE of {n_samples} samples and {n_references} reference texts: it needs at least "
            f"{MIN_MAUVE_TEXTS} of each, and is meaningful from some hundreds on"
        )


def _check_settings(
    count: int, max_new_tokens: int, temperature: float, top_p: float, prompts: Sequence[str] | None
) -> None:
    if count < 2:
        raise UserError(f"count = {count}: at least 2 texts are needed, and about 100 for small errors")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature = {temperature}: must be 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p = {top_p}: must be more than 0 and at most 1 (all tokens)")
    if prompts is not None and not len(prompts):
        raise UserError("prompts is an empty list: give at least one, or None for the start of a document")


def _measure_overlap(
    words: dict[str, list[list[str]]], training_texts: Any, on_progress: Progress | None
) -> list[Measurement]:
    """Read the training texts once, for the texts of all splits."""
    matchers = {split: SpanMatcher(texts) for split, texts in words.items()}
    match_texts(list(matchers.values()), _with_progress(training_texts, on_progress))
    found = []
    for split, matcher in matchers.items():
        for length in SPAN_LENGTHS:
            share = matcher.share(length)
            if share is not None:
                name = f"training_overlap_{length}"
                found.append(Measurement(name, share.value, "fraction", share.n, share.stderr, split, False))
        longest, n = len(matcher.longest()), len(words[split])
        found.append(Measurement("longest_copied_span", longest, "words", n, None, split, False))
    return found


def _with_progress(texts: Any, on_progress: Progress | None) -> Iterator[tuple[int, str]]:
    """Yield (number of the text, part of it); report progress if the number of texts is known."""
    total = len(texts) if hasattr(texts, "__len__") else 0
    parts = texts.texts() if hasattr(texts, "texts") else texts
    n_reports = 0
    for i, item in enumerate(parts):
        number, part = item if isinstance(item, tuple) else (i, item)
        if on_progress is not None and (number + 1) * _MAX_REPORTS >= (n_reports + 1) * total > 0:
            n_reports = (number + 1) * _MAX_REPORTS // total
            on_progress(number + 1, total)
        yield number, part


class _ProgressStreamer(BaseStreamer):
    """Report the progress of batches to `on_progress`."""

    def __init__(self, count: int, max_new_tokens: int, on_progress: Progress | None):
        self._per_text, self._total = max_new_tokens, count * max_new_tokens
        self._report = on_progress or (lambda done, total: None)
        self._done = self._rows = self._stop = 0

    def begin(self, first: int, rows: int) -> None:
        """Begin a batch of `rows` texts, the first of which is text `first`."""
        self._rows = rows
        self._done, self._stop = first * self._per_text - rows, (first + rows) * self._per_text

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompts, and afterwards one token of each row per call."""
        self._done += self._rows
        self._report(self._done, self._total)

    def end(self) -> None:
        """End the batch, whose rows may have ended early."""
        self._report(self._stop, self._total)


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Use only `config`: `generate` takes what it leaves open from the model's own."""
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
