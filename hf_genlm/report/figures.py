"""The style of all figures: palette, line styles, and one function that saves PNG files.

The colours are those of Okabe and Ito (Color Universal Design, 2008), which people with any of the common
forms of colour blindness can distinguish. Markers and dashes differ too, for prints in grey.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_genlm.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
GREY = "#777777"
_STYLE: Any = {
    "figure.dpi": 144,
    "font.size": 10,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


def new_figure(
    width: float = 7.0,
    height: float = 4.0,
    rows: int = 1,
    columns: int = 1,
    mosaic: Sequence[Sequence[str]] | None = None,
) -> "tuple[Figure, Any]":
    """Make a figure of `width` x `height` inches and its axes, without a window or global state.

    Args:
        mosaic: names of axes by row and column; equal neighbours are one axes that spans them.

    Returns:
        The figure, and its axes as `Figure.subplots` or, with `mosaic`, `Figure.subplot_mosaic` returns them.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        if mosaic is not None:
            return figure, figure.subplot_mosaic([list(row) for row in mosaic])
        return figure, figure.subplots(rows, columns)


def line_style(index: int) -> dict[str, Any]:
    """Keywords of `Axes.plot` for series number `index`: a colour, a marker and dashes of its own."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def escape_label(text: str) -> str:
    """Escape `text` so that matplotlib shows it verbatim, in legends too, and reads no formula in it."""
    shown = text.replace("$", r"\$")
    return f"\u2009{shown}" if shown.startswith("_") else shown


def save_png(figure: "Figure", path: Path) -> Path:
    """Write `figure` as PNG and return `path`; the same figure gives the same bytes."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
    return path
