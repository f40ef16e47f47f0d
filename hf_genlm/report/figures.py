"""How every picture of ours looks: one palette, one style, one way to save.

The colours are those of Okabe and Ito (Color Universal Design, 2008), which people with any of the common
forms of colour blindness tell apart; markers and dashes differ too, so that a print in grey can be read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_genlm.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
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
    width: float = 7.0, height: float = 4.0, rows: int = 1, columns: int = 1
) -> "tuple[Figure, Any]":
    """A figure of `width` x `height` inches and its axes, as `Figure.subplots` gives them.

    It belongs to no window and no global state, and draws on any machine.
    """
    return _new(width, height, lambda figure: figure.subplots(rows, columns))


def new_mosaic(pattern: list[Any], width: float, height: float) -> "tuple[Figure, dict[str, Any]]":
    """As `new_figure`, its axes by their names in `pattern`, a list of names for each row; one
    that stands in neighbouring places spans them."""
    return _new(width, height, lambda figure: figure.subplot_mosaic(pattern))


def _new(width: float, height: float, divide: "Callable[[Figure], Any]") -> "tuple[Figure, Any]":
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, divide(figure)


def line_style(index: int) -> dict[str, Any]:
    """Keywords of `Axes.plot` for the `index`-th series: colour, marker and dashes of its own."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def plain(text: str) -> str:
    """`text` as matplotlib shows it word for word: no formula between dollars, and in legends too."""
    shown = text.replace("$", r"\$")
    return f"\u2009{shown}" if shown.startswith("_") else shown


def save_png(figure: "Figure", path: Path) -> Path:
    """Write `figure` as PNG; the same figure gives the same bytes."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
    return path
