"""Facts of a run in words: measurements, layers, durations, settings, languages and citations of the card."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

from hf_genlm.config.recipe import Recipe
from hf_genlm.evaluation.measurement import Measurement, figures
from hf_genlm.run_schemas import LanguageCounts

# measurement -> title, definition
DEFINITIONS = {
    "bits_per_byte": (
        "Bits per byte",
        "total -log2 probability of the text divided by the number of its UTF-8 bytes, those of the original "
        "text and not of its tokens; comparable between models with different vocabularies",
    ),
    "nats_per_token": ("Nats per token", "mean -ln probability of a token of this model's own vocabulary"),
    "perplexity": (
        "Perplexity per token",
        "exp of the nats per token; comparable within one vocabulary only",
    ),
    "mean_language_bits_per_byte": (
        "Bits per byte, mean of the languages",
        "every language has the same weight, whatever amount of text it has",
    ),
    "worst_language_bits_per_byte": (
        "Bits per byte, worst language",
        "the highest of the languages; languages also differ in the bytes that their script needs",
    ),
    "top1_accuracy": ("Top-1 accuracy", "share of tokens that the model ranked first; ties count against it"),
    "top5_accuracy": ("Top-5 accuracy", "share of tokens that the model ranked among its first five"),
    "calibration_error": (
        "Calibration error",
        "expected calibration error of the most likely token, over 15 bins of equal width",
    ),
    "word_perplexity": (
        "Perplexity per word",
        "exp of the nats per word of the original text; as in lm-evaluation-harness, a document has one word "
        "more than runs of white space; comparable between models with different vocabularies",
    ),
    "minimal_pairs_accuracy": (
        "Minimal pairs",
        "share of pairs of sentences whose acceptable sentence the model finds more likely; ties count half",
    ),
    "minimal_pairs_accuracy_macro": ("Minimal pairs, macro", "mean of that over the linguistic phenomena"),
}
_MIXERS = {
    "elman": "an Elman network",
    "gru": "a GRU",
    "lstm": "an LSTM",
    "gated_linear": "a gated linear recurrence",
    "full_attention": "causal attention",
    "sliding_attention": "attention over a sliding window",
    "ngram": "n-gram counts",
}
# measurement -> title and format of its column in the table of languages
_LANGUAGE_COLUMNS = {
    "bits_per_byte": ("bits/byte", "{:.3f}"),
    "bits_per_character": ("bits/character", "{:.3f}"),
    "bits_per_sentence": ("bits/sentence", "{:.1f}"),
    "information_parity": ("information parity", "{:.3f}"),
    "bytes_per_token": ("bytes/token", "{:.2f}"),
    "tokens_per_sentence": ("tokens/sentence", "{:.1f}"),
    "tokenization_premium": ("token premium", "{:.2f}"),
}
# sign -> its TeX, so that none is read as a command
_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "{}$&#_%"},
}


def title(measurement: Measurement) -> str:
    """`Bits per byte`, followed by `: part` if it was measured on a part."""
    name, _, part = measurement.name.partition("/")
    shown = DEFINITIONS.get(name, (name, ""))[0]
    return f"{shown}: {part}" if part else shown


def interval(measurement: Measurement) -> str:
    """`1.38 to 1.41`, the ends of the 95 % interval."""
    if measurement.interval is None:
        return "unknown"
    return " to ".join(figures(end, measurement.stderr) for end in measurement.interval)


def describe_layers(mixer_types: Sequence[str]) -> str:
    """`2 layers of a gated linear recurrence and 1 of causal attention`, in the order of first appearance."""
    counted = [(n, _MIXERS.get(mixer, mixer)) for mixer, n in Counter(mixer_types).items()]
    (n, first), others = counted[0], counted[1:]
    parts = [f"{n} layer{'s' if n > 1 else ''} of {first}", *(f"{m} of {words}" for m, words in others)]
    return parts[0] if not others else f"{', '.join(parts[:-1])} and {parts[-1]}"


def duration(seconds: float) -> str:
    """`179 s`, `42 minutes`, `5.3 hours` or `3.1 days`."""
    for unit, length, lowest in (("days", 86400, 172800), ("hours", 3600, 7200), ("minutes", 60, 600)):
        if seconds >= lowest:
            n = seconds / length
            return f"{n:.{1 if n < 10 else 0}f} {unit}"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def settings_of(recipe: Recipe) -> list[tuple[str, str]]:
    """Name and value of the settings that a reader looks for first; undecided ones are left out."""
    training = recipe.training
    if recipe.model.is_ngram:
        return [
            ("smoothing", "interpolated modified Kneser-Ney"),
            ("longest n-grams", f"{recipe.model.ngram_order} tokens"),
            ("stored n-grams, at most", f"{recipe.model.ngram_entries:,}"),
        ]
    rows = rate = None
    if training.batch_size and training.max_seq_length:
        n_passes = training.gradient_accumulation_steps
        rows = f"{training.batch_size * n_passes:,} rows of {training.max_seq_length:,} tokens"
        rows += f", in {n_passes} passes" if n_passes > 1 else ""
    if training.learning_rate is not None:
        warmup = f"{100 * training.warmup_ratio:g} % of the run"
        warmup += f", and {training.warmup_steps} steps at least" if training.warmup_steps else ""
        rate = (
            f"{training.learning_rate:g} at its peak, after {warmup}; "
            f"falls to zero over the last {100 * training.decay_ratio:g} %"
        )
    precisions = {"auto": "bfloat16 where the device computes it, else float32"}
    stated = {
        "optimizer": training.optimizer,
        "learning rate": rate,
        "weight decay": training.weight_decay,
        "gradient norm, at most": training.max_grad_norm or None,
        "one step": rows,
        "dropout": recipe.model.dropout or None,
        "precision": precisions.get(training.dtype, training.dtype),
        "seed": training.seed,
    }
    return [
        (name, f"{value:g}" if isinstance(value, float) else str(value))
        for name, value in stated.items()
        if value is not None
    ]


def year_of(events: Iterable[Mapping[str, Any]]) -> int | None:
    """Year (UTC) of the last event of a log; None if no event has a time."""
    times = [event["time"] for event in events if event.get("time") is not None]
    return datetime.fromtimestamp(times[-1], tz=timezone.utc).year if times else None


def language_table(
    languages: Mapping[str, LanguageCounts],
    measured: Sequence[Measurement],
    name_of: Callable[[str], str | None],
) -> list[list[str]]:
    """Rows of cells, the head first, with text and measurements of each language; none without languages."""
    if not languages:
        return []
    values = {m.name: m.value for m in measured}
    known = [name for name in _LANGUAGE_COLUMNS if any(f"{name}/{code}" in values for code in languages)]
    head = ["language", "training bytes", "read in a pass", "held-out bytes"]
    rows = [[*head, *(_LANGUAGE_COLUMNS[name][0] for name in known)]]
    for code, counts in languages.items():
        found = {name: values.get(f"{name}/{code}") for name in known}
        rows.append(
            [
                f"{name} ({code})" if (name := name_of(code)) else code,
                f"{counts.train.bytes or 0:,}",
                f"{counts.repeats:.2f} times",
                f"{counts.validation.bytes or 0:,}",
                *("" if v is None else _LANGUAGE_COLUMNS[name][1].format(v) for name, v in found.items()),
            ]
        )
    return rows


def describe_scripts(measured: Sequence[Measurement]) -> str:
    """`Latin 99.8 %, Cyrillic 97.1 %`: characters of each script that no token boundary cuts."""
    shares = [(m.name.partition("/")[2], m.value) for m in measured if m.name.startswith("whole_characters/")]
    return ", ".join(f"{script} {100 * share:.1f} %" for script, share in shares)


def cite_model(
    name: str, *, authors: Sequence[str], year: int | None, url: str | None, version: str | None
) -> str:
    """BibTeX entry of a model; unknown fields are left out.

    Args:
        authors: each as "First Last" or "Last, First".
        year: in which the model was trained.
        url: page of the model, not escaped.
        version: of hf_genlm.
    """
    key = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "model"
    fields = {
        "title": f"{tex(name)}: a generative language model",
        "author": " and ".join(map(tex, authors)),
        "year": "" if year is None else str(year),
        "url": url or "",
        "note": f"Trained with hf\\_genlm {tex(version or '')}".strip(),
    }
    return _entry("misc", key if year is None else f"{key}-{year}", fields)


def cite_package(version: str | None) -> str:
    """BibTeX entry of hf_genlm."""
    fields = {
        "title": r"hf\_genlm: from a folder of text to a small generative language model",
        "author": "{The hf\\_genlm authors}",
        "version": tex(version or ""),
        "note": "Python package, Apache-2.0",
    }
    return _entry("software", "hf_genlm", fields)


def tex(text: str) -> str:
    """`text` on one line, escaped for TeX."""
    return "".join(_TEX.get(sign, sign) for sign in " ".join(text.split()))


def _entry(kind: str, key: str, fields: Mapping[str, str]) -> str:
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])


# ---- parameters of a model by part

_MIXER = "mixer"
_OTHER = "other"
# the first of these words that the dotted name of a tensor has -> the part that it belongs to
_PART_OF = {
    "embed_tokens": "token embedding",
    "embed_proj": "embedding projection",
    "embed_bigrams": "bigram embedding",
    "embed_positions": "position embedding",
    "mixer": _MIXER,
    "mixer_norm": "norms",
    "mlp_norm": "norms",
    "norm": "norms",
    "mlp": "MLP",
    "lm_head": "output head",
    "ngrams": "n-gram counts",
    "mixture": "gate of the counts",
}


class Part(NamedTuple):
    """One row of the table: a kind of part, and the stored tensors and parameters of it."""

    name: str
    n_tensors: int
    n_parameters: int


def parts_of(sizes: dict[str, int], mixer_types: Sequence[str]) -> list[Part]:
    """Sum the sizes of a model's tensors by part, in the order in which the model computes the parts.

    `mixer_types` holds the mixer of each stored layer.
    """
    counts: dict[str, list[int]] = {}
    for name, size in sizes.items():
        counts.setdefault(part_of(name, mixer_types), []).append(size)
    return [
        Part(part, len(counts[part]), sum(counts[part])) for part in part_names(mixer_types) if part in counts
    ]


def part_names(mixer_types: Sequence[str]) -> list[str]:
    """Every part that a model of these mixers can have, in the order in which it computes them."""
    order = [*_PART_OF.values(), _OTHER]
    at = order.index(_MIXER)
    order[at : at + 1] = [f"{_MIXER} {kind}" for kind in mixer_types]
    return list(dict.fromkeys(order))


def part_of(name: str, mixer_types: Sequence[str]) -> str:
    """The part that a tensor or module belongs to, by its dotted name; `other` for an unknown name."""
    words = name.split(".")
    part = next((part for word, part in _PART_OF.items() if word in words), _OTHER)
    if part != _MIXER:
        return part
    layer = words[words.index("layers") + 1] if "layers" in words[:-1] else ""
    is_known = layer.isdecimal() and int(layer) < len(mixer_types)
    return f"{_MIXER} {mixer_types[int(layer)]}" if is_known else _OTHER
