"""The picture of an audit: exposure by repetitions, ROC curves, extraction by prefix length.

`plots/audit.png` lies in the run folder and in model/, where the card shows it.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.files import copy_file
from hf_genlm.report.figures import COLOURS, DASHES, MARKERS, line_style, new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AUDIT_PICTURE = "plots/audit.png"  # in the run folder, and in the folder of the model
_WIDTH, _HEIGHT = 5.2, 4.2  # inches, of a panel
_GREY = "#777777"
_APART = 0.06  # between the points of two series, so that their intervals can be told apart
_EXPOSURES = {"exposure": "by rank", "exposure_extrapolated": "extrapolated"}

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def write_audit_picture(
    folder: Path, measured: Sequence[Measurement], curves: Curves, model: Path | None = None
) -> Path | None:
    """Draw what was measured to plots/audit.png of `folder`, and copy it to that of `model`, a folder.

    None, and nothing is drawn, where nothing of it was measured.
    """
    panels: list[Any] = []
    exposure = {words: _by_number(measured, f"{name}/", "canaries") for name, words in _EXPOSURES.items()}
    if exposure["by rank"]:
        panels.append(lambda axes: _draw_exposure(axes, exposure))
    if curves:
        panels.append(lambda axes: _draw_roc(axes, curves, measured))
    extraction = {split: _extraction(measured, split) for split in ("train", "validation")}
    if extraction["train"]:
        panels.append(lambda axes: _draw_extraction(axes, extraction))
    if not panels:
        return None
    figure, axes = new_figure(_WIDTH * len(panels), _HEIGHT, columns=len(panels))
    for draw, one in zip(panels, [axes] if len(panels) == 1 else axes, strict=True):
        draw(one)
    path = save_png(figure, folder / AUDIT_PICTURE)
    if model is not None and model.is_dir():
        copy_file(path, model / AUDIT_PICTURE)
    return path


def _draw_exposure(axes: "Axes", by_kind: Mapping[str, Mapping[int, Measurement]]) -> None:
    """Over categories, since 0 has no place on a logarithmic axis."""
    counts = sorted(by_kind["by rank"])
    for index, (words, by_count) in enumerate(by_kind.items()):
        at = [place + index * _APART for place in range(len(counts))]
        _draw_points(axes, at, [by_count[count] for count in counts], index, words)
    axes.axhline(math.log2(math.e), color=_GREY, linestyle="--", linewidth=1, label="never seen: 1.44 bits")
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set(title="Exposure of canaries", xlabel="times planted", ylabel="exposure (bits)")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _draw_roc(axes: "Axes", curves: Curves, measured: Sequence[Measurement]) -> None:
    areas = {m.name.partition("/")[2]: m.value for m in measured if m.name.startswith("membership_auc/")}
    least = min((x for fpr, _ in curves.values() for x in fpr if x > 0), default=0.01)
    for index, (name, (fpr, tpr)) in enumerate(curves.items()):
        style = {**line_style(index), "marker": "", "linewidth": 1.4}
        x = [max(rate, least) for rate in fpr]
        axes.plot(x, tpr, label=f"{name}: {areas[name]:.3f}", drawstyle="steps-post", **style)
    diagonal = [least * (1 / least) ** (i / 50) for i in range(51)]
    axes.plot(diagonal, diagonal, color=_GREY, linewidth=1, linestyle=":", label="chance: 0.5")
    axes.set_xscale("log")
    axes.set(
        title="Membership of passages",
        xlabel="false positive rate",
        ylabel="true positive rate",
        xlim=(least, 1),
        ylim=(0, 1.02),
    )
    _legend(axes, title="area under the curve")


def _draw_extraction(axes: "Axes", by_split: Mapping[str, Mapping[int, Measurement]]) -> None:
    names = {"train": "training text", "validation": "held-out text"}
    for index, (split, by_prefix) in enumerate(by_split.items()):
        if by_prefix:
            at = [prefix * (1 + index * _APART) for prefix in by_prefix]
            _draw_points(axes, at, list(by_prefix.values()), index, names[split])
    n_tokens = next(iter(by_split["train"].values())).name.split("_")[1]
    axes.set_xscale("log")
    prefixes = list(by_split["train"])
    axes.set_xticks(prefixes, [str(prefix) for prefix in prefixes])
    axes.minorticks_off()
    axes.set(
        title=f"Passages whose next {n_tokens} tokens are extracted",
        xlabel="tokens of the prefix",
        ylabel="share of passages",
    )
    axes.set_ylim(bottom=0)
    _legend(axes)


def _legend(axes: "Axes", title: str | None = None) -> None:
    """Below the panel, where it hides no curve."""
    place: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
    axes.legend(title=title, fontsize="small", title_fontsize="small", frameon=False, **place)


def _draw_points(
    axes: "Axes", x: Sequence[float], measured: Sequence[Measurement], index: int, label: str
) -> None:
    ends = [m.interval or (m.value, m.value) for m in measured]
    below = [max(0.0, m.value - low) for m, (low, _) in zip(measured, ends, strict=True)]
    above = [max(0.0, high - m.value) for m, (_, high) in zip(measured, ends, strict=True)]
    axes.errorbar(
        list(x),
        [m.value for m in measured],
        yerr=[below, above],
        color=COLOURS[index],
        marker=MARKERS[index],
        linestyle=DASHES[index],
        capsize=3,
        label=label,
    )


def _by_number(measured: Sequence[Measurement], head: str, split: str) -> dict[int, Measurement]:
    found = [(m.name.removeprefix(head), m) for m in measured if m.name.startswith(head) and m.split == split]
    return {int(number): m for number, m in sorted(found, key=lambda each: each[0]) if number.isdecimal()}


def _extraction(measured: Sequence[Measurement], split: str) -> dict[int, Measurement]:
    """Those of the longest continuation, by the prefix."""
    named = [
        m for m in measured if m.name.startswith("extraction_") and "/prefix_" in m.name and m.split == split
    ]
    longest = max((int(m.name.split("_")[1]) for m in named), default=0)
    found = _by_number(named, f"extraction_{longest}_tokens/prefix_", split)
    return dict(sorted(found.items()))
