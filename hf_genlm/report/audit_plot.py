"""Figure of a privacy audit: exposure by repetitions, ROC curves, extraction by prefix length.

`plots/audit.png` is written into the run folder and, unless the run is a private one, into model/, where the
card shows it.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.files import copy_file
from hf_genlm.report.figures import COLOURS, DASHES, GREY, MARKERS, line_style, new_figure, save_png
from hf_genlm.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AUDIT_FILE = "plots/audit.png"  # in the run folder and in model/
_WIDTH, _HEIGHT = 5.2, 4.2  # inches, of a panel; one below the other, legible on a phone
_OFFSET = 0.06  # between the points of two series, so that their intervals do not overlap
_EXPOSURES = {"exposure": "by rank", "exposure_extrapolated": "extrapolated"}
_SPLITS = {"train": "training text", "validation": "held-out text"}

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # false and true positive rates by attack
Points = dict[int, Measurement]


def write_audit_figure(
    folder: Path, measured: Sequence[Measurement], curves: Curves, model: Path | None = None
) -> Path | None:
    """Draw the results of an audit to plots/audit.png of `folder`, and copy it into the folder `model`.

    Returns:
        The path in `folder`; None if none of the measurements belongs into a panel.
    """
    panels: list[Any] = []
    exposure = {label: _by_number(measured, f"{name}/", "canaries") for name, label in _EXPOSURES.items()}
    if exposure["by rank"]:
        panels.append(partial(_draw_exposure, exposure))
    if curves:
        panels.append(partial(_draw_roc, curves, measured))
    lengths = [
        int(m.name.split("_")[1]) for m in measured if m.name.startswith("extraction_") and "/" in m.name
    ]
    head = f"extraction_{max(lengths, default=0)}_tokens/prefix_"
    extraction = {label: _by_number(measured, head, split) for split, label in _SPLITS.items()}
    if extraction["training text"]:
        panels.append(partial(_draw_extraction, extraction, max(lengths)))
    if not panels:
        return None
    figure, axes = new_figure(_WIDTH, _HEIGHT * len(panels), rows=len(panels))
    for draw, one in zip(panels, [axes] if len(panels) == 1 else axes, strict=True):
        draw(one)
    path = save_png(figure, folder / AUDIT_FILE)
    if model is not None and model.is_dir() and not RunFolder(folder).privacy.is_file():
        copy_file(path, model / AUDIT_FILE)
    return path


def _draw_exposure(series: Mapping[str, Points], axes: "Axes") -> None:
    """Draw over categories, since 0 has no place on a logarithmic axis."""
    counts = sorted(series["by rank"])
    for index, (label, points) in enumerate(series.items()):
        found = {place + index * _OFFSET: points[n] for place, n in enumerate(counts) if n in points}
        _draw_points(axes, found, index, label)
    axes.axhline(math.log2(math.e), color=GREY, linestyle="--", linewidth=1, label="never seen: 1.44 bits")
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set(title="Exposure of canaries", xlabel="times planted", ylabel="exposure (bits)")
    axes.set_ylim(bottom=0)
    _add_legend(axes)


def _draw_roc(curves: Curves, measured: Sequence[Measurement], axes: "Axes") -> None:
    areas = {m.name.partition("/")[2]: m.value for m in measured if m.name.startswith("membership_auc/")}
    lowest = min((x for fpr, _ in curves.values() for x in fpr if x > 0), default=0.01)
    for index, (name, (fpr, tpr)) in enumerate(curves.items()):
        style = {**line_style(index), "marker": "", "linewidth": 1.4}
        x = [max(rate, lowest) for rate in fpr]
        axes.plot(x, tpr, label=f"{name}: {areas[name]:.3f}", drawstyle="steps-post", **style)
    diagonal = [lowest * (1 / lowest) ** (i / 50) for i in range(51)]
    axes.plot(diagonal, diagonal, color=GREY, linewidth=1, linestyle=":", label="chance: 0.5")
    axes.set_xscale("log")
    axes.set(title="Membership of passages", xlabel="false positive rate", ylabel="true positive rate")
    axes.set(xlim=(lowest, 1), ylim=(0, 1.02))
    _add_legend(axes, title="area under the curve")


def _draw_extraction(series: Mapping[str, Points], n_tokens: int, axes: "Axes") -> None:
    for index, (label, points) in enumerate(series.items()):
        if points:
            _draw_points(axes, {n * (1 + index * _OFFSET): m for n, m in points.items()}, index, label)
    axes.set_xscale("log")
    prefixes = list(series["training text"])
    axes.set_xticks(prefixes, [str(prefix) for prefix in prefixes])
    axes.minorticks_off()
    axes.set(title=f"Passages whose next {n_tokens} tokens are extracted")
    axes.set(xlabel="tokens of the prefix", ylabel="share of passages")
    axes.set_ylim(bottom=0)
    _add_legend(axes)


def _add_legend(axes: "Axes", title: str | None = None) -> None:
    """Add a legend below the panel, where it hides no curve."""
    place: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
    axes.legend(title=title, fontsize="small", title_fontsize="small", frameon=False, **place)


def _draw_points(axes: "Axes", points: Mapping[float, Measurement], index: int, label: str) -> None:
    """Draw values with their 95 % intervals at the places that are the keys of `points`."""
    values = [m.value for m in points.values()]
    ends = [m.interval or (m.value, m.value) for m in points.values()]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
    style: Any = {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": DASHES[index]}
    axes.errorbar(list(points), values, yerr=[below, above], capsize=3, label=label, **style)


def _by_number(measured: Sequence[Measurement], head: str, split: str) -> Points:
    """Measurements of `split` whose name is `head` and a number, by that number in ascending order."""
    found = [(m.name.removeprefix(head), m) for m in measured if m.name.startswith(head) and m.split == split]
    return dict(sorted((int(number), m) for number, m in found if number.isdecimal()))
