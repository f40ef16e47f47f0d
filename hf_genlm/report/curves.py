"""What the log of a run says of its training, as series of points; see plots.py for the pictures.

Every line that is drawn or told comes from log.jsonl and from nothing else.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_genlm.run_folder import RunFolder

Event = dict[str, Any]
_BACK_TO = {"started": lambda event: 0, "resumed": lambda e: e["step"], "diverged": lambda e: e["back_to"]}
_SMOOTHED_PARTS = 100  # of a curve: half of a smoothed point comes from so small a part before it
_MOST_SAMPLES = 8


@dataclass
class Curves:
    """One training, event by event, in the order of its steps.

    A run that was killed, or whose loss left the numbers, goes back to a checkpoint: what it had done
    beyond led nowhere, and is in `abandoned`, a list for each time.
    """

    label: str
    steps: list[Event] = field(default_factory=list)
    validations: list[Event] = field(default_factory=list)
    samples: list[Event] = field(default_factory=list)
    abandoned: list[list[Event]] = field(default_factory=list)
    breaks: list[Event] = field(default_factory=list)  # `resumed` and `diverged`
    final: Event | None = None  # the measurements of the whole validation split, by name, and `step`

    def go_back_to(self, step: int) -> None:
        """Give up what was done after `step`."""
        beyond = [event for event in self.steps if event["step"] > step]
        if beyond:
            self.abandoned.append(beyond)
        for events in (self.steps, self.validations, self.samples):
            events[:] = [event for event in events if event["step"] <= step]


def curves_of(events: Iterable[Event], label: str = "") -> Curves:
    """The curves of a log, oldest event first."""
    curves = Curves(label)
    kept = {"step": curves.steps, "validation": curves.validations, "sample": curves.samples}
    for event in events:
        kind = event.get("event")
        if kind in kept:
            kept[kind].append(event)
        elif kind in _BACK_TO:
            curves.go_back_to(_BACK_TO[kind](event))
            curves.breaks += [event] if kind != "started" else []
        elif kind == "evaluated" and curves.steps:
            values = {measured["name"]: measured["value"] for measured in event["measurements"]}
            last = curves.steps[-1]
            at = {name: last[name] for name in ("step", "elapsed_s")}
            curves.final = {**values, **at, "seen_tokens": last["tokens"]}
    return curves


def read_curves(run: RunFolder, label: str = "") -> Curves:
    """The curves of a run, without any step where nothing was trained in it yet."""
    return curves_of(run.read_log() if run.log_file.is_file() else [], label)


def column(events: Iterable[Event], name: str) -> np.ndarray:
    """(n,) float64: field `name` of each event, nan where it has none."""
    values = (event.get(name) for event in events)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The exponential moving mean of `values` (n,), its beginning unbiased (Kingma and Ba, 2015, section 3).

    Its half-life is a hundredth of the curve: few points stay nearly as they are.
    """
    kept = 0.5 ** (_SMOOTHED_PARTS / max(1, len(values)))
    means = np.empty_like(values)
    mean = weight = 0.0
    for i, value in enumerate(values):
        mean, weight = kept * mean + (1 - kept) * value, kept * weight + (1 - kept)
        means[i] = mean / weight
    return means


def running_median(values: np.ndarray) -> np.ndarray:
    """The median of `values` (n,) and their neighbours, a hundredth of the curve and two to either side."""
    reach = 2 + len(values) // (2 * _SMOOTHED_PARTS)
    return np.array([np.median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))])


def first_samples(curves: Curves) -> list[Event]:
    """The first text that was written after each of at most eight steps, evenly chosen."""
    by_step: dict[int, Event] = {}
    for event in curves.samples:
        by_step.setdefault(event["step"], event)
    found = list(by_step.values())
    chosen = np.linspace(0, len(found) - 1, min(len(found), _MOST_SAMPLES)).round().astype(int)
    return [found[i] for i in chosen]


def in_words(curves: Curves) -> str:
    """What the picture of `curves` shows, for those who do not see it."""
    first, last = curves.steps[0], curves.steps[-1]
    loss = smoothed(column(curves.steps, "loss"))
    said = [
        f"Curves of {last['step']:,} steps of training on {last['tokens']:,} tokens in "
        f"{last['elapsed_s']:.0f} s: the loss goes from {loss[0]:.2f} to {loss[-1]:.2f} nats per token"
    ]
    if curves.validations:
        bits = column(curves.validations, "bits_per_byte")
        said.append(
            f"bits per byte of validation text from {bits[0]:.3f} to {bits[-1]:.3f} at {len(bits)} points"
        )
    rates = column([first, *curves.steps], "learning_rate")
    said.append(f"the learning rate peaks at {np.nanmax(rates):.2g} and ends at {rates[-1]:.2g}")
    said += [
        f"the loss left the numbers after step {event['step']:,} and went back to {event['back_to']:,}"
        for event in curves.breaks
        if event["event"] == "diverged"
    ]
    return "; ".join(said) + "."
