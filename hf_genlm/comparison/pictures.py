"""The two pictures of a comparison: how good each candidate is, and how it came there."""

from pathlib import Path
from typing import Any

import numpy as np

from hf_genlm.comparison.results import CandidateResult, Results
from hf_genlm.report.figures import COLOURS, line_style, new_figure, save_png

_WIDTH = 5.2  # inches: the words of it are still read on a phone
_ROW, _FRAME = 0.42, 0.95  # inches: of a candidate, and around them
_MIN_CURVE = 2  # points


def draw_scores(results: Results, path: Path) -> Path:
    """Above, bits per byte with every seed as a dot; below, how much worse than the best each is."""
    n = len(results.candidates)
    rows = 2 if results.differences else 1
    figure, axes = new_figure(_WIDTH, rows * _FRAME + (2 * n - 1) * _ROW if rows == 2 else 1.6, rows)
    above, below = (axes[0], axes[1]) if rows == 2 else (axes, None)
    for place, candidate in enumerate(results.candidates):
        style: Any = {"color": COLOURS[place % len(COLOURS)]}
        if candidate.mean.interval is not None:
            above.plot(candidate.mean.interval, [place, place], linewidth=5, alpha=0.3, **style)
        above.plot([candidate.mean.value], [place], marker="|", markersize=16, markeredgewidth=2, **style)
        values = [run.bits_per_byte for run in candidate.runs]
        above.plot(values, np.full(len(values), place), "o", markersize=5, markeredgecolor="white", **style)
    _name_rows(above, [candidate.name for candidate in results.candidates])
    above.set_xlabel("bits per byte (less is better)")
    if below is not None:
        _draw_differences(below, results)
    return save_png(figure, path)


def _draw_differences(axes: Any, results: Results) -> None:
    for place, difference in enumerate(results.differences):
        style: Any = {"color": COLOURS[(place + 1) % len(COLOURS)]}
        if difference.estimate.interval is not None:
            axes.plot(difference.estimate.interval, [place, place], linewidth=2, **style)
        face = style["color"] if difference.is_told else "white"
        axes.plot([difference.estimate.value], [place], "D", markersize=7, markerfacecolor=face, **style)
    axes.axvline(0, color="#444444", linewidth=1, linestyle="--")
    _name_rows(axes, [difference.name for difference in results.differences])
    axes.set_xlabel(f"bits per byte more than {results.best.name}")


def _name_rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def draw_curves(results: Results, path: Path) -> tuple[Path, bool]:
    """Loss against the time of training, a line for each run; the candidates are named in a legend.

    Returns:
        The path, and whether it is the loss on held-out text: short runs measure none while they train, and
        show that on the training text.
    """
    is_validation = all(
        len(run.validation_curve) >= _MIN_CURVE for candidate in results.candidates for run in candidate.runs
    )
    figure, axes = new_figure(_WIDTH, 3.6)
    longest = max(run.seconds for candidate in results.candidates for run in candidate.runs)
    unit, name = (60.0, "minutes") if longest >= 120 else (1.0, "seconds")
    for place, candidate in enumerate(results.candidates):
        _draw_candidate(axes, candidate, place, unit, is_validation)
    axes.set_xlabel(f"{name} of training")
    axes.set_ylabel(
        "bits per byte, part of held-out text" if is_validation else "training loss, nats per token"
    )
    axes.legend(frameon=False)
    return save_png(figure, path), is_validation


def _draw_candidate(
    axes: Any, candidate: CandidateResult, place: int, unit: float, is_validation: bool
) -> None:
    style = {**line_style(place), "linewidth": 1.3}
    if not is_validation:
        style["marker"] = None
    for number, run in enumerate(candidate.runs):
        curve = run.validation_curve if is_validation else run.training_curve[1:] or run.training_curve
        seconds, values = zip(*curve, strict=True) if curve else ((), ())
        label = candidate.name if number == 0 else None
        axes.plot([s / unit for s in seconds], values, label=label, **style)
