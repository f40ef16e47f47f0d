"""Forecast bits per byte on held-out text: of a run with a time limit, and of one with four times its time.

    B = counts (floor + gap (C / 1e10)^-rate)

`counts` is what 5-grams of the training text need, C the tokens that are seen times the weights that each is
multiplied by. Once the run is measured, its own bits per byte replace this level, and only the way down is
forecast. C grows with the time, and a little faster, since the plan chooses a larger decoder, which computes
more operations a second. From the third epoch on, more time gains less. The constants are those of
recipes/benchmarks/forecast.py, which measures the errors: recipes/LOG.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hf_genlm.config.settings import Settings
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.model import GenLMConfig
from hf_genlm.run_folder import RunFolder
from hf_genlm.training.plan import TOKENS_PER_WEIGHT, count_weights

LONGER = 4.0  # times the time
MIN_LONGER = 1.2  # times that the text can use; below, more time is not worth it
_PER_TIME = 1.15  # log C by log of the time
_NEW_EPOCHS, _REPEATED = 2.0, 0.4  # epochs that count in full, and what time beyond them counts
_UNIT = 1e10


class Curve(NamedTuple):
    """Bits per byte by C, relative to those of counts."""

    floor: float
    gap: float  # to the floor, at C = 1e10
    rate: float


# of a network alone, with counts inside, and with a history beside them
CURVES = {
    "network": Curve(0.85, 0.36, 0.22),
    "counts": Curve(0.7, 0.29, 0.055),
    "history": Curve(0.7, 0.29, 0.1),
}


@dataclass(frozen=True)
class Training:
    """A training that sees `tokens` in `epochs`, each times `weights`, and may see `max_tokens`."""

    tokens: float
    weights: float
    curve: Curve
    epochs: float | None = None
    max_tokens: float | None = None

    @property
    def level(self) -> float:
        """Bits per byte that are expected, relative to those of counts."""
        return self.curve.floor + self.curve.gap * (self.tokens * self.weights / _UNIT) ** -self.curve.rate

    @property
    def useful_times(self) -> float:
        """Times of its time, at most `LONGER`, until the largest decoder that is planned saw all it may."""
        if self.max_tokens is None:
            return LONGER
        most = self.max_tokens * max(self.weights, self.max_tokens / TOKENS_PER_WEIGHT)
        return max(1.0, min(LONGER, most / (self.tokens * self.weights)))

    def continued(self, bits: float, counts: float | None, times: float) -> float:
        """Bits per byte after `times` the time, where `bits` are reached in this time.

        Without `counts`, they are those from which such a training is expected to reach `bits`.
        """
        floor = self.curve.floor * (bits / self.level if counts is None else counts)
        path, repeated = math.log(times), 0.0
        if self.epochs:  # they grow with the root of the time, as the decoder grows with it
            repeated = min(path, max(0.0, 2 * math.log(self.epochs / _NEW_EPOCHS) + path))
        path = _PER_TIME * (path - (1 - _REPEATED) * repeated)
        return floor + (bits - floor) * math.exp(-self.curve.rate * path) if bits > floor else bits


def kind_of(config: GenLMConfig) -> str:
    """The curve of `CURVES` for a model."""
    if config.ngram_history is not None:
        return "history"
    return "counts" if config.holds_counts else "network"


def log_forecast(run: RunFolder, settings: Settings, measured: Sequence[Measurement] = ()) -> None:
    """Log what the run will reach, before it is `measured`, and what four times its time would.

    Nothing without a time limit. Before the run, only for a network with counts and without a history: the
    level of others depends on more than on counts, such as on how much a text repeats itself.
    """
    length, last = settings.length, {event["event"]: event for event in run.read_log()}
    if length.seconds is None:
        return
    counts = last["counts"]["bits_per_byte"] if "counts" in last else None
    tokens, epochs = length.pace.tokens(length.expected_steps), length.epochs
    if "trained" in last:
        tokens, epochs = last["trained"]["tokens"], last["trained"].get("epochs")
    model, vocab_size = settings.model, settings.tokenizer.vocab_size
    weights = count_weights(model.hidden_size, model.num_hidden_layers, vocab_size)
    max_tokens = None if length.epochs is None else length.pace.tokens(length.max_steps)
    kind = kind_of(settings.architecture)
    if kind == "history":
        counts = None
    training = Training(max(1, tokens), weights, CURVES[kind], epochs, max_tokens)
    now, expected = next((m.value for m in measured if m.name == "bits_per_byte"), None), None
    if now is None and counts is not None and kind == "counts":
        now = expected = training.level * counts
    if now is None or not math.isfinite(now):
        return
    times = training.useful_times
    run.log(
        "forecast",
        expected=None if expected is None else round(expected, 3),
        times=round(times, 2) if times >= MIN_LONGER else None,
        bits_per_byte=round(training.continued(now, counts, times), 3),
    )
