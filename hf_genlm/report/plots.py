"""The curves of training as a picture: loss, bits per byte, learning rate, gradient norm and speed.

`plots/curves.png` lies in the run folder and in model/, where the card shows it. `hf-genlm plot` draws one
run again, or several over one another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_genlm.files import copy_file
from hf_genlm.report.curves import Curves, column, read_curves, running_median, smoothed
from hf_genlm.report.figures import COLOURS, MARKERS, new_mosaic, plain, save_png
from hf_genlm.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "plots/curves.png"  # in the run folder, and in the folder of the model
_WIDTH, _WIDE_HEIGHT, _HEIGHT, _LEGEND_HEIGHT = 6.4, 2.7, 2.0, 0.25  # inches, of a row
_FEW = 25  # points that are marked
_PALE = 0.3
_SHARE_SHOWN = 0.98  # of the values, where a few would flatten all others
_GREY = "#777777"


@dataclass(frozen=True)
class Panel:
    """One of the axes: field `y` of the events over field `x`."""

    title: str
    x: str
    y: str
    draw: "Callable[[Axes, Panel, Curves, str, str], None]"
    is_logarithmic: bool = False


def _draw_loss(axes: "Axes", panel: Panel, curves: Curves, colour: str, marker: str) -> None:
    x, loss = column(curves.steps, panel.x), column(curves.steps, panel.y)
    for events in curves.abandoned:
        beyond = column(events, panel.x), column(events, panel.y)
        axes.plot(*beyond, color=_GREY, linewidth=1, linestyle=":", label="given up")
    if len(loss) > _FEW:
        axes.plot(x, loss, color=colour, alpha=_PALE, linewidth=0.8, label="training")
        axes.plot(x, smoothed(loss), color=colour, label="training, smoothed")
    else:
        axes.plot(x, loss, color=colour, marker=marker, label="training")
    if curves.validations:
        at = column(curves.validations, "seen_tokens" if panel.x == "tokens" else panel.x)
        measured = column(curves.validations, "nats_per_token")
        ring: Any = {"markersize": 7, "markeredgewidth": 1.8, "markeredgecolor": colour, "color": "white"}
        axes.plot(at, measured, marker=marker, linestyle="", label="validation, a part of it", **ring)


def _draw_measured(axes: "Axes", panel: Panel, curves: Curves, colour: str, marker: str) -> None:
    found = curves.validations
    axes.plot(
        column(found, panel.x), column(found, panel.y), color=colour, marker=marker, label="a part of it"
    )
    if curves.final is not None:
        at = column([curves.final], panel.x), column([curves.final], panel.y)
        axes.plot(*at, color=colour, marker="*", markersize=11, linestyle="", label="all of it, in the end")


def _draw_line(axes: "Axes", panel: Panel, curves: Curves, colour: str, marker: str) -> None:
    x, y = column(curves.steps, panel.x), column(curves.steps, panel.y)
    axes.plot(x, y, color=colour, linewidth=1.2, marker=marker if len(y) <= _FEW else "")


def _draw_typical(axes: "Axes", panel: Panel, curves: Curves, colour: str, marker: str) -> None:
    """The running median, and what goes beyond it pale, as the dip where a checkpoint was written."""
    x, y = column(curves.steps, panel.x), column(curves.steps, panel.y)
    if len(y) <= _FEW:
        axes.plot(x, y, color=colour, linewidth=1.2, marker=marker)
    else:
        axes.plot(x, y, color=colour, alpha=_PALE, linewidth=0.8)
        axes.plot(x, running_median(y), color=colour, linewidth=1.2)


PANELS = {
    "steps": Panel("loss in nats per token, over steps", "step", "loss", _draw_loss),
    "tokens": Panel("loss over tokens", "tokens", "loss", _draw_loss),
    "time": Panel("loss over seconds", "elapsed_s", "loss", _draw_loss),
    "bits": Panel("bits per byte, validation, over steps", "step", "bits_per_byte", _draw_measured),
    "rate": Panel("learning rate over steps", "step", "learning_rate", _draw_line),
    "norm": Panel("gradient norm over steps", "step", "grad_norm", _draw_typical, is_logarithmic=True),
    "speed": Panel("tokens per second, over steps", "step", "tokens_per_s", _draw_typical),
}


def write_curves(run: RunFolder) -> Path | None:
    """Draw the curves of `run` into its folder, and into model/ where there is one, for its card; of a
    private run only into the first, as its losses are exact ones. None: nothing was trained in it yet."""
    curves = read_curves(run)
    if not curves.steps:
        return None
    path = save_png(draw_curves([curves]), run.path / PICTURE)
    if run.model.is_dir() and not run.privacy.is_file():
        copy_file(path, run.model / PICTURE)
    return path


def draw_curves(runs: Sequence[Curves]) -> "Figure":
    """The panels of which at least one of the runs has something to show, all runs in each."""
    names = [name for name, panel in PANELS.items() if any(_has(panel, curves) for curves in runs)]
    pattern = _pattern(names)
    rows = len(pattern) - 1
    height = _WIDE_HEIGHT + rows * _HEIGHT + (_LEGEND_HEIGHT * len(runs) if len(runs) > 1 else 0)
    figure, axes = new_mosaic(pattern, _WIDTH, height)
    for name in names:
        for i, curves in enumerate(runs):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            PANELS[name].draw(axes[name], PANELS[name], curves, colour, marker)
        _finish(axes[name], PANELS[name], runs)
    if len(runs) > 1:
        _name_runs(figure, runs)
    else:
        for name in {"steps", "bits"}.intersection(names):
            axes[name].legend(fontsize="small", frameon=False)
    return figure


def _has(panel: Panel, curves: Curves) -> bool:
    events = [*curves.validations, curves.final or {}] if panel.draw is _draw_measured else curves.steps
    return bool(np.isfinite(column(events, panel.y)).any())


def _pattern(names: Sequence[str]) -> list[list[str]]:
    """The first panel as wide as the picture, the others in pairs, one that is left over wide too."""
    first, others = names[0], names[1:]
    pairs = [list(others[i : i + 2]) for i in range(0, len(others), 2)]
    return [[first, first], *([pair[0], pair[-1]] for pair in pairs)]


def _finish(axes: "Axes", panel: Panel, runs: Sequence[Curves]) -> None:
    """Title, limits and numbers of one panel."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_title(panel.title, fontsize="medium", loc="left")
    axes.tick_params(which="both", labelsize="small")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    is_whole = panel.x != "elapsed_s"
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=is_whole, min_n_ticks=1))
    if panel.is_logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if panel.y == "tokens_per_s":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylim(bottom=0)
    if panel.draw is _draw_loss:
        _show_most(axes, [line.get_ydata() for line in axes.lines])
    if panel.y == "learning_rate":
        axes.yaxis.set_major_formatter("{x:.3g}")
    if panel.x == "step" and len(runs) == 1:
        for event in runs[0].breaks:
            at = event["back_to"] if event["event"] == "diverged" else event["step"]
            axes.axvline(at, color=_GREY, linewidth=0.8, linestyle="--", zorder=0)
    last = max(float(column(curves.steps, panel.x)[-1]) for curves in runs)
    axes.set_xlim(-0.03 * last, 1.03 * last)


def _show_most(axes: "Axes", drawn: Sequence[Any]) -> None:
    """Let the first steps of a long training rise above the top: below it is what there is to see."""
    values = np.concatenate([np.asarray(y, dtype=np.float64) for y in drawn])
    values = values[np.isfinite(values)]
    low, high, most = values.min(), np.quantile(values, _SHARE_SHOWN), values.max()
    margin = 0.05 * (high - low)
    if most > high + (high - low):
        axes.set_ylim(low - margin, high + margin)


def _name_runs(figure: "Figure", runs: Sequence[Curves]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)])
        for i in range(len(runs))
    ]
    names = [plain(curves.label) for curves in runs]
    figure.legend(handles, names, loc="outside upper left", ncols=1, fontsize="small", frameon=False)
