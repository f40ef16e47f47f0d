"""Pictures of numbers as HTML: heat maps as PNG inside the page, curves as SVG. Colours keep their order of
lightness, so that no kind of colour vision loses it.
"""

import base64
import io
import math

import numpy as np
from PIL import Image

# anchors in RGB: from none to much, and from below zero (blue) over zero to above (orange)
_SEQUENTIAL = np.array([(250, 248, 242), (174, 212, 214), (42, 117, 144), (13, 48, 82)])
_DIVERGING = np.array([(9, 60, 110), (88, 150, 196), (246, 244, 238), (226, 146, 70), (130, 62, 4)])


def heat_map(values: np.ndarray, description: str, is_signed: bool) -> str:
    """(rows, columns) of values as an image: from 0 to the largest, or from minus to plus it."""
    most = float(np.abs(values).max()) or 1.0
    share = values / most / 2 + 0.5 if is_signed else values / most
    pixels = _colours(np.clip(share, 0, 1), _DIVERGING if is_signed else _SEQUENTIAL)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img class="heat" alt="{description}" src="data:image/png;base64,{data}">'


def key_of(most: float, is_signed: bool) -> str:
    """The legend of a heat map whose largest size is `most`."""
    ends = (f"-{most:.2g}", "0", f"{most:.2g}") if is_signed else ("0", f"{most:.2g}")
    kind = "signed" if is_signed else "plain"
    return f'<div class="key {kind}"><i></i>{"".join(f"<span>{end}</span>" for end in ends)}</div>'


def curve(values: np.ndarray, description: str, is_log: bool = False) -> str:
    """One value for each column, from left to right, with its range."""
    heights = np.log10(np.maximum(values, 1e-9)) if is_log else values
    low, high = (heights.min(), heights.max()) if is_log else (0.0, heights.max())
    span = (high - low) or 1.0
    x = (np.arange(len(values)) + 0.5) / len(values)  # above the columns of a heat map
    points = " ".join(f"{a:.4f},{b:.4f}" for a, b in zip(x, 1 - (heights - low) / span, strict=True))
    ends = (("most", values.max()), ("least", values.min() if is_log else 0.0))
    marks = "".join(f'<span class="{name}">{_short(float(value))}</span>' for name, value in ends)
    return (
        f'<div class="curve" role="img" aria-label="{description}">{marks}<svg viewBox="0 0 1 1" '
        f'preserveAspectRatio="none"><polyline points="{points}"/></svg></div>'
    )


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if value >= 1000:
        return f"{value:.0e}".replace("e+0", "e")
    return f"{value:.{max(0, 1 - math.floor(math.log10(abs(value))))}f}" if value < 10 else f"{value:.0f}"


def _colours(share: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """From 0..1 to RGB bytes between the anchors."""
    at = np.linspace(0, 1, len(anchors))
    channels = [np.interp(share, at, anchors[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
