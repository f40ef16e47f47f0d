"""What a card tells of a run in words: its layers, settings and time, and what was taken out of the text."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from hf_genlm.config.recipe import Recipe

_MIXERS = {
    "elman": "an Elman network",
    "gru": "a GRU",
    "lstm": "an LSTM",
    "gated_linear": "a gated linear recurrence",
    "full_attention": "causal attention",
    "sliding_attention": "attention over a sliding window",
}


def counted_layers(mixer_types: Sequence[str]) -> str:
    """`2 layers of a gated linear recurrence and 1 of causal attention`, in the order of first appearance."""
    counted = [(n, _MIXERS.get(mixer, mixer)) for mixer, n in Counter(mixer_types).items()]
    (n, first), others = counted[0], counted[1:]
    parts = [f"{n} layer{'s' if n > 1 else ''} of {first}", *(f"{m} of {words}" for m, words in others)]
    return parts[0] if not others else f"{', '.join(parts[:-1])} and {parts[-1]}"


def duration(seconds: float) -> str:
    """`179 s`, `42 minutes`, `5.3 hours` or `3.1 days`."""
    for unit, length, least in (("days", 86400, 172800), ("hours", 3600, 7200), ("minutes", 60, 600)):
        if seconds >= least:
            n = seconds / length
            return f"{n:.{1 if n < 10 else 0}f} {unit}"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def settings_of(recipe: Recipe) -> list[tuple[str, str]]:
    """The choices of the recipe that a reader looks for first, by name; the open ones left out."""
    training = recipe.training
    rows = None
    if training.batch_size and training.max_seq_length:
        n_rows = training.batch_size * training.gradient_accumulation_steps
        step = f"{n_rows:,} rows of {training.max_seq_length:,} tokens"
        rows = (
            f"{step}, in {training.gradient_accumulation_steps} passes"
            if training.gradient_accumulation_steps > 1
            else step
        )
    rate = None
    if training.learning_rate is not None:
        rate = (
            f"{training.learning_rate:g} at its peak, after {100 * training.warmup_ratio:g} % of the run; "
            f"falls to zero over the last {100 * training.decay_ratio:g} %"
        )
    stated = {
        "optimizer": training.optimizer,
        "learning rate": rate,
        "weight decay": training.weight_decay,
        "gradient norm, at most": training.max_grad_norm or None,
        "one step": rows,
        "dropout": recipe.model.dropout or None,
        "precision": {"auto": "bfloat16 where the device computes it, else float32"}.get(
            training.dtype, training.dtype
        ),
        "seed": training.seed,
    }
    return [
        (name, f"{value:g}" if isinstance(value, float) else str(value))
        for name, value in stated.items()
        if value is not None
    ]


def trained_year(events: Iterable[Mapping[str, Any]]) -> int | None:
    """The year (UTC) of the last event of a log; None: it has no time."""
    times = [event["time"] for event in events if "time" in event]
    return datetime.fromtimestamp(times[-1], tz=timezone.utc).year if times else None
