"""Training curves: the series in a run's log, and figures of them.

All series come from log.jsonl. `plots/curves.png` is written into the run folder and into model/, where the
card shows it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.files import copy_file, sha256_of
from hf_genlm.report.figures import COLOURS, GREY, MARKERS, escape_label, new_figure, save_png
from hf_genlm.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES_FILE = "plots/curves.png"  # in the run folder and in model/
Event = dict[str, Any]
# event -> the step to which training went back
_BACK_TO = {"started": lambda event: 0, "resumed": lambda e: e["step"], "diverged": lambda e: e["back_to"]}
_SMOOTHED_PARTS = 100  # half of a smoothed point's weight lies in this fraction of the curve before it
_MAX_SAMPLES = 8
_WIDTH, _WIDE_HEIGHT, _HEIGHT, _LEGEND_HEIGHT = 6.4, 3.0, 2.3, 0.25  # inches, of a row
_MAX_MARKED = 25  # points; longer series have no markers
_PALE = 0.3
_SHOWN_QUANTILE = 0.98  # of the losses, if a few early ones would flatten all others


@dataclass
class Curves:
    """Events of one training, in the order of its steps.

    A run that was killed, or whose loss became NaN or infinite, goes back to a checkpoint. The steps after
    that checkpoint are in `abandoned`, one list for each time.
    """

    label: str
    steps: list[Event] = field(default_factory=list)
    validations: list[Event] = field(default_factory=list)
    samples: list[Event] = field(default_factory=list)
    abandoned: list[list[Event]] = field(default_factory=list)
    breaks: list[Event] = field(default_factory=list)  # the events `resumed` and `diverged`
    final: Event | None = None  # measurements on the whole validation split by name, and `step`
    vocabulary: str = ""  # differs between runs with different tokenizers

    @property
    def bits_per_nat(self) -> float | None:
        """Bits per byte for each nat per token of the held-out text; None if both were never measured."""
        for event in (self.final or {}, *reversed(self.validations)):
            if event.get("nats_per_token") and "bits_per_byte" in event:
                return float(event["bits_per_byte"] / event["nats_per_token"])
        return None


def curves_of(events: Iterable[Event], label: str = "") -> Curves:
    """Collect the curves of a log, oldest event first."""
    curves = Curves(label)
    series = {"step": curves.steps, "validation": curves.validations, "sample": curves.samples}
    for event in events:
        kind = event["event"]
        if kind in series:
            series[kind].append(event)
        elif kind in _BACK_TO:
            back_to = _BACK_TO[kind](event)
            beyond = [step for step in curves.steps if step["step"] > back_to]
            curves.abandoned += [beyond] if beyond else []
            for kept in series.values():
                kept[:] = [step for step in kept if step["step"] <= back_to]
            curves.breaks += [event] if kind != "started" else []
        elif kind == "evaluated" and curves.steps:
            values = {measured["name"]: measured["value"] for measured in event["measurements"]}
            last = curves.steps[-1]
            at = {name: last[name] for name in ("step", "elapsed_s")}
            curves.final = {**values, **at, "seen_tokens": last["tokens"]}
    return curves


def read_curves(run: RunFolder, label: str = "") -> Curves:
    """Read the curves of a run; without a log they are empty."""
    curves = curves_of(run.read_log(), label)
    tokenizer = run.tokenizer / "tokenizer.json"
    curves.vocabulary = sha256_of(tokenizer) if tokenizer.is_file() else ""
    return curves


def column(events: Iterable[Event], name: str) -> np.ndarray:
    """(n,) float64: field `name` of each event, NaN where it is missing."""
    values = (event.get(name) for event in events)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential moving mean of `values` (n,) with a half-life of a hundredth of the curve.

    Unbiased at the start: Kingma and Ba, Adam, 2015, section 3.
    """
    decay = 0.5 ** (_SMOOTHED_PARTS / max(1, len(values)))
    means = np.empty_like(values)
    mean = weight = 0.0
    for i, value in enumerate(values):
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        means[i] = mean / weight
    return means


def running_median(values: np.ndarray) -> np.ndarray:
    """Median of each of `values` (n,) and its neighbours: 2 plus 1/200 of the curve on each side."""
    reach = 2 + len(values) // (2 * _SMOOTHED_PARTS)
    return np.array([np.median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))])


def first_samples(curves: Curves) -> list[Event]:
    """The first text generated at each of at most eight steps, evenly chosen."""
    by_step: dict[int, Event] = {}
    for event in curves.samples:
        by_step.setdefault(event["step"], event)
    found = list(by_step.values())
    chosen = np.linspace(0, len(found) - 1, min(len(found), _MAX_SAMPLES)).round().astype(int)
    return [found[i] for i in chosen]


def describe_curves(curves: Curves) -> str:
    """Describe the figure in a sentence, for readers who do not see it."""
    first, last = curves.steps[0], curves.steps[-1]
    loss = smoothed(column(curves.steps, "loss"))
    parts = [
        f"Curves of {last['step']:,} steps of training on {last['tokens']:,} tokens in "
        f"{last['elapsed_s']:.0f} s: the loss goes from {loss[0]:.2f} to {loss[-1]:.2f} nats per token"
    ]
    if curves.validations:
        bits = column(curves.validations, "bits_per_byte")
        parts.append(
            f"bits per byte of validation text from {bits[0]:.3f} to {bits[-1]:.3f} at {len(bits)} points"
        )
    rates = column([first, *curves.steps], "learning_rate")
    parts.append(f"the learning rate peaks at {np.nanmax(rates):.2g} and ends at {rates[-1]:.2g}")
    parts += [
        f"the loss became NaN or infinite after step {event['step']:,} and training went back to step "
        f"{event['back_to']:,}"
        for event in curves.breaks
        if event["event"] == "diverged"
    ]
    return "; ".join(parts) + "."


def write_curves(run: RunFolder) -> Path | None:
    """Draw the curves of `run` into its folder, and into model/ for the card, if there is a model.

    The losses of a private run are exact, so its figure is not copied into model/.

    Returns:
        The path in the run folder; None if no step was logged.

    Raises:
        UserError: the log is damaged, or the file cannot be written.
    """
    curves = read_curves(run)
    if not curves.steps:
        return None
    path = save_png(draw_curves([curves]), run.path / CURVES_FILE)
    if run.model.is_dir() and not run.privacy.is_file():
        copy_file(path, run.model / CURVES_FILE)
    return path


def plot(runs: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Draw the training curves of one or several run folders in one PNG file.

    Args:
        runs: one run folder or several, which are drawn over one another.
        out: the file to write; None: plots/curves.png of one run, `curves.png` here for several.

    Returns:
        The path of the file.

    Raises:
        UserError: a folder is not a run, its log is damaged or holds no step, or the file cannot be written.
    """
    paths = [runs] if isinstance(runs, (str, Path)) else list(runs)
    folders = [RunFolder.open(path) for path in paths]
    names = [run.path.resolve().name for run in folders]
    labels = names if len(set(names)) == len(names) else [str(path) for path in paths]
    curves = [read_curves(run, label) for run, label in zip(folders, labels, strict=True)]
    for run, found in zip(folders, curves, strict=True):
        if not found.steps:
            raise UserError(f"{str(run.log_file)!r} holds no training step: there is nothing to draw yet")
    if out is None and len(folders) == 1:
        path = write_curves(folders[0])
        assert path is not None
        return path
    return save_png(draw_curves(curves), Path(out or "curves.png"))


@dataclass(frozen=True)
class Panel:
    """One of the axes: field `y` of the events, in `unit`, over field `x` of a step."""

    title: str
    unit: str
    y: str
    draw: "Callable[[Axes, Panel, Curves, str, str], None]"
    x: str = "step"
    is_logarithmic: bool = False
    in_bits: bool = False  # nats per token are drawn as bits per byte

    def places(self, events: Iterable[Event]) -> np.ndarray:
        """(n,) float64: where the events of the held-out text stand."""
        return column(events, "seen_tokens" if self.x == "tokens" else self.x)


def _draw_loss(axes: "Axes", panel: Panel, curves: Curves, colour: str, marker: str) -> None:
    scale = (curves.bits_per_nat or np.nan) if panel.in_bits else 1.0
    x, loss = column(curves.steps, panel.x), column(curves.steps, panel.y) * scale
    for events in curves.abandoned:
        beyond = column(events, panel.x), column(events, panel.y) * scale
        axes.plot(*beyond, color=GREY, linewidth=1, linestyle=":", label="abandoned")
    if len(loss) > _MAX_MARKED:
        axes.plot(x, loss, color=colour, alpha=_PALE, linewidth=0.8, label="training")
        axes.plot(x, smoothed(loss), color=colour, label="training, smoothed")
    else:
        axes.plot(x, loss, color=colour, marker=marker, label="training")
    if curves.validations:
        at = panel.places(curves.validations)
        measured = column(curves.validations, "nats_per_token") * scale
        ring: Any = {"markersize": 7, "markeredgewidth": 1.8, "markeredgecolor": colour, "color": "white"}
        axes.plot(at, measured, marker=marker, linestyle="", label="validation, a part of it", **ring)


def _draw_measured(axes: "Axes", panel: Panel, curves: Curves, colour: str, marker: str) -> None:
    found = curves.validations
    axes.plot(panel.places(found), column(found, panel.y), color=colour, marker=marker, label="a part of it")
    if curves.final is not None:
        at = panel.places([curves.final]), column([curves.final], panel.y)
        axes.plot(*at, color=colour, marker="*", markersize=11, linestyle="", label="all of it, at the end")


def _draw_line(axes: "Axes", panel: Panel, curves: Curves, colour: str, marker: str) -> None:
    x, y = column(curves.steps, panel.x), column(curves.steps, panel.y)
    axes.plot(x, y, color=colour, linewidth=1.2, marker=marker if len(y) <= _MAX_MARKED else "")


def _draw_median(axes: "Axes", panel: Panel, curves: Curves, colour: str, marker: str) -> None:
    """Draw the running median, and the values in pale, with outliers such as the write of a checkpoint."""
    x, y = column(curves.steps, panel.x), column(curves.steps, panel.y)
    if len(y) <= _MAX_MARKED:
        axes.plot(x, y, color=colour, linewidth=1.2, marker=marker)
    else:
        axes.plot(x, y, color=colour, alpha=_PALE, linewidth=0.8)
        axes.plot(x, running_median(y), color=colour, linewidth=1.2)


PANELS = {
    "loss": Panel("Loss", "nats per token", "loss", _draw_loss),
    "bits": Panel("Held-out text", "bits per byte", "bits_per_byte", _draw_measured),
    "rate": Panel("Learning rate", "learning rate", "learning_rate", _draw_line),
    "norm": Panel("Gradient norm", "L2 norm", "grad_norm", _draw_median, is_logarithmic=True),
    "speed": Panel("Speed", "tokens per second", "tokens_per_s", _draw_median),
}
_PLACES = {"step": "optimizer steps", "tokens": "tokens trained on"}


def draw_curves(runs: Sequence[Curves]) -> "Figure":
    """Draw all runs in each panel for which at least one of them has values.

    One run is drawn over its steps; several, whose batches may differ, over the tokens they were trained on.
    Losses of runs with different tokenizers are drawn in bits per byte, by the bytes that each run's
    tokens of the held-out text have. The first panel is as wide as the figure. The others stand in pairs; a
    last one without a partner is wide.
    """
    x = "step" if len(runs) == 1 else "tokens"
    panels = {name: replace(panel, x=x) for name, panel in PANELS.items()}
    if len({curves.vocabulary for curves in runs}) > 1:
        loss = panels["loss"]
        panels["loss"] = replace(
            loss, title="Loss (different tokenizers)", unit="bits per byte", in_bits=True
        )
    names = [name for name, panel in panels.items() if any(_has_values(panel, curves) for curves in runs)]
    pairs = [names[i : i + 2] for i in range(1, len(names), 2)]
    mosaic = [[names[0], names[0]], *([pair[0], pair[-1]] for pair in pairs)]
    height = _WIDE_HEIGHT + len(pairs) * _HEIGHT + (_LEGEND_HEIGHT * len(runs) if len(runs) > 1 else 0)
    figure, axes = new_figure(_WIDTH, height, mosaic=mosaic)
    for name in names:
        for i, curves in enumerate(runs):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            panels[name].draw(axes[name], panels[name], curves, colour, marker)
        _finish_panel(axes[name], panels[name], runs)
    if len(runs) > 1:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)])
            for i in range(len(runs))
        ]
        labels = [escape_label(curves.label) for curves in runs]
        figure.legend(handles, labels, loc="outside upper left", ncols=1, fontsize="small", frameon=False)
    else:
        for name in {"loss", "bits"}.intersection(names):
            axes[name].legend(fontsize="small", frameon=False)
    return figure


def _has_values(panel: Panel, curves: Curves) -> bool:
    events = [*curves.validations, curves.final or {}] if panel.draw is _draw_measured else curves.steps
    return bool(np.isfinite(column(events, panel.y)).any())


def _finish_panel(axes: "Axes", panel: Panel, runs: Sequence[Curves]) -> None:
    """Set title, limits, number formats, and lines where a run went back to a checkpoint."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_title(panel.title, fontsize="medium", loc="left")
    axes.set_xlabel(_PLACES[panel.x], fontsize="small")
    axes.set_ylabel(panel.unit, fontsize="small")
    axes.tick_params(which="both", labelsize="small")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    if panel.is_logarithmic and any((column(curves.steps, panel.y) > 0).any() for curves in runs):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if panel.y == "tokens_per_s":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylim(bottom=0)
    if panel.draw is _draw_loss:
        _clip_outliers(axes)
    if panel.y == "learning_rate":
        axes.yaxis.set_major_formatter("{x:.3g}")
    if panel.x == "step" and len(runs) == 1:
        for event in runs[0].breaks:
            at = event["back_to"] if event["event"] == "diverged" else event["step"]
            axes.axvline(at, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    last = max((float(column(curves.steps, panel.x)[-1]) for curves in runs if curves.steps), default=1.0)
    axes.set_xlim(-0.03 * last, 1.03 * last)


def _clip_outliers(axes: "Axes") -> None:
    """Let the few highest losses of a long training leave the panel at the top if they flatten the others."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines])
    values = values[np.isfinite(values)]
    low, high, top = values.min(), np.quantile(values, _SHOWN_QUANTILE), values.max()
    margin = 0.05 * (high - low)
    if top > high + (high - low):
        axes.set_ylim(low - margin, high + margin)
