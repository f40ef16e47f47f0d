"""HTML of everything that the demo shows. Text from models and users is escaped here.

Heat maps are PNGs within the page, curves are SVG. Color scales are monotonic in lightness, so that they can
be read with any kind of color vision. Shapes: T tokens, R units of a state, H heads.
"""

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from .layers import States
from .models import LanguageModel, Span, SpanDecoder
from .scoring import TextScore, TokenScore, shared_pieces

# from the color nearest to the page to that farthest from it: bound, and its words in the legend
PROBABILITY_STEPS = ((0.5, "over 50 %"), (0.2, "over 20 %"), (0.05, "over 5 %"), (0.01, "over 1 %"),
                     (0.001, "over 0.1 %"), (0.0, "less"))  # fmt: skip
ATTENTION_STEPS = ((0.005, "under 0.5 %"), (0.01, "under 1 %"), (0.02, "under 2 %"), (0.05, "under 5 %"),
                   (0.1, "under 10 %"), (float("inf"), "more"))  # fmt: skip
_WHITESPACE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})
# anchors in RGB: from zero up, and from negative (blue) over zero to positive (orange)
_SEQUENTIAL = np.array([(250, 248, 242), (174, 212, 214), (42, 117, 144), (13, 48, 82)])
_DIVERGING = np.array([(9, 60, 110), (88, 150, 196), (246, 244, 238), (226, 146, 70), (130, 62, 4)])


class TokenPainter:
    """Text as colored spans, built token by token; the details of each are in its `data-tokens`."""

    def __init__(self, model: LanguageModel):
        self._tokenizer = model.tokenizer
        self._decoder = SpanDecoder(model.tokenizer)
        self._scores: list[TokenScore] = []

    def paint(self, scores: Sequence[TokenScore]) -> str:
        """HTML of the spans that these tokens complete."""
        self._scores += scores
        return "".join(self._paint(span) for span in self._decoder.decode(score.token for score in scores))

    def finish(self) -> str:
        """HTML of the open span."""
        return "".join(self._paint(span) for span in self._decoder.finish())

    def _paint(self, span: Span) -> str:
        scores = self._scores[span.first : span.stop]
        known = [score.probability for score in scores if score.probability is not None]
        color = probability_color(float(np.prod(known))) if len(known) == len(scores) else "unscored"
        details = [
            {
                "text": self._name(score.token),
                "p": score.probability,
                "rank": score.rank,
                "others": [[self._name(token), p] for token, p in score.alternatives],
            }
            for score in scores
        ]
        return token_span(span.text, color, details)

    def _name(self, token: int) -> str:
        """A single token: its characters, or its bytes if they are no complete characters."""
        content = self._decoder.bytes_of(token)
        if content is None:
            text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            return show_whitespace(text or self._tokenizer.convert_ids_to_tokens(token))
        try:
            return show_whitespace(content.decode("utf-8"))
        except UnicodeDecodeError:
            return f"{'byte' if len(content) == 1 else 'bytes'} {content.hex(' ')}"


def probability_color(probability: float) -> str:
    """CSS class of a probability."""
    return f"s{next(i for i, (low, _) in enumerate(PROBABILITY_STEPS) if probability >= low)}"


def attention_color(share: float) -> str:
    """CSS class of a share of the attention."""
    return f"s{next(i for i, (high, _) in enumerate(ATTENTION_STEPS) if share < high)}"


def gain_color(bits: float) -> str:
    """CSS class of a difference in bits: g0 and g1 in favor of the first model, g3 and g4 of the second."""
    return f"g{sum(bits < bound for bound in (3.0, 1.0, -1.0, -3.0))}"


def token_span(text: str, color: str, details: Any) -> str:
    """A span whose details appear on touch."""
    data = escape(json.dumps(details, ensure_ascii=False), quote=True)
    # the style sheet draws line ends, which are no part of the text
    shown = escape(text, quote=False).replace("\n", "<b></b>\n")
    return f'<span class="token {color}" tabindex="0" data-tokens="{data}">{shown}</span>'


def show_whitespace(text: str) -> str:
    """Replace white space by visible signs."""
    return text.translate(_WHITESPACE) or "nothing"


def note(text: str) -> str:
    """A remark."""
    return f'<p class="note">{escape(text)}</p>'


def legend(title: str, steps: Sequence[tuple[float, str]]) -> str:
    """Legend of a color scale."""
    items = "".join(f'<li><i class="s{i}"></i>{words}</li>' for i, (_, words) in enumerate(steps))
    return f'<div class="legend"><span>{title}</span><ul>{items}</ul></div>'


def model_summary(model: LanguageModel) -> str:
    """Name, layers and size of a model."""
    count = model.n_parameters
    size = f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count / 1e3:.0f} thousand"
    kinds = Counter(model.mixers or [])
    stack = " + ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items())
    layers = "layer" if sum(kinds.values()) == 1 else "layers"
    decoder = f"{stack} {layers}" if kinds else model.module.config.model_type
    return (
        f'<h3>{escape(model.name)}</h3><p class="facts">{escape(decoder)} · {size} parameters · '
        f"{len(model.tokenizer):,} tokens</p>"
    )


def state_view(states: States, spans: Sequence[Span], n_before: int) -> str:
    """Heat map, size and memory length of a recurrent layer, without its first `n_before` states."""
    h_TR = states.h_TR[n_before:].numpy()
    n_tokens, n_units = h_TR.shape
    order = np.arange(n_units)
    sorting = ""
    memory = note("An Elman cell has no forget gate, and so no memory length per unit.")
    if states.memory_R is not None:
        memory_R = states.memory_R.numpy()
        order = memory_R.argsort()[::-1]
        sorting = ", the longest memory at the top"
        memory = (
            "<h4>Memory length of each unit</h4>"
            + curve(np.sort(memory_R), "memory of each unit in tokens, sorted", is_log=True)
            + note(
                "Tokens until the forget gates of this text would shrink a unit's state to 1/e, sorted: half "
                f"of the units below {np.median(memory_R):.1f}, one in ten above "
                f"{np.quantile(memory_R, 0.9):.1f}."
            )
        )
    return "".join(
        [
            f"<h4>State after each of {n_tokens:,} tokens</h4>",
            f'<div class="axis" data-columns="{column_names(spans)}">',
            heat_map(h_TR.T[order], f"state of {n_units} units over {n_tokens} tokens", is_signed=True),
            f"</div>{color_bar(float(np.abs(h_TR).max()), is_signed=True)}",
            note(f"A column is a token, a row is one of {n_units} units{sorting}."),
            "<h4>Size of the state</h4>",
            curve(states.rms_T[n_before:].numpy(), "root mean square of the state over the tokens"),
            note(
                "Root mean square over the units after each token. "
                f"{100 * states.saturated_fraction:.1f} % of all values lie beyond ±0.95."
            ),
            memory,
        ]
    )


def attention_view(weights_HT: np.ndarray, spans: Sequence[Span], n_before: int) -> str:
    """Attention of the last token: the text colored by the mean over heads, and each head."""
    on_text_HT = weights_HT[:, n_before:]
    n_heads, n_tokens = on_text_HT.shape
    chips = []
    for span in spans:
        share_H = on_text_HT[:, span.first : span.stop].sum(axis=1)
        share = float(share_H.mean())
        details = {"text": show_whitespace(span.text), "share": share, "heads": share_H.tolist()}
        chips.append(token_span(span.text, attention_color(share), details))
    parts = [
        f'<h4>Attention of the last token</h4><div class="written">{"".join(chips)}</div>',
        legend("Share of the attention", ATTENTION_STEPS),
        f"<h4>{f'Each of {n_heads} heads' if n_heads > 1 else 'Its one head'}</h4>",
        f'<div class="axis heads" data-columns="{column_names(spans)}">',
        heat_map(on_text_HT, f"attention of {n_heads} heads on {n_tokens} tokens", is_signed=False),
        f"</div>{color_bar(float(on_text_HT.max()), is_signed=False)}",
    ]
    if n_before:
        on_start = 100 * weights_HT[:, :n_before].sum(axis=1).mean()
        parts.append(note(f"{on_start:.1f} % of the attention is on the start token, left of these."))
    return "".join(parts)


def column_names(spans: Sequence[Span]) -> str:
    """JSON for an attribute: the characters at each column of a picture over tokens."""
    names = [show_whitespace(span.text) for span in spans for _ in range(span.stop - span.first)]
    return escape(json.dumps(names, ensure_ascii=False), quote=True)


def scores_view(scores: Sequence[tuple[str, TextScore]]) -> str:
    """Bits per byte of one text under each model by name, and the difference between two."""
    highest = max(score.bits_per_byte for _, score in scores) or 1.0
    cards = "".join(
        f'<div class="score"><h4>{escape(name)}</h4>'
        f'<p class="figure">{score.bits_per_byte:.3f}<small>bits per byte</small></p>'
        f'<div class="bar"><i style="width:{100 * score.bits_per_byte / highest:.1f}%"></i></div>'
        f'<p class="facts">{score.bits:,.0f} bits · {score.n_bytes:,} bytes · {score.n_tokens:,} tokens · '
        f"{score.n_bytes / score.n_tokens:.2f} bytes per token</p></div>"
        for name, score in scores
    )
    parts = [f'<div class="scores">{cards}</div>']
    if len(scores) == 2:
        (better, a), (other, b) = sorted(scores, key=lambda pair: pair[1].bits_per_byte)
        gap = b.bits_per_byte - a.bits_per_byte
        parts.append(note(f"{better} needs {gap:.3f} bits per byte less than {other} for this text."))
        parts.append(_gains_view(*scores))
    if any(score.n_scored < score.n_tokens for _, score in scores):
        parts.append(note("A model without a start token cannot score the first token: it is left out."))
    return "".join(parts)


def _gains_view(first: tuple[str, TextScore], second: tuple[str, TextScore]) -> str:
    """The text, colored by the difference between two models."""
    (name_a, a), (name_b, b) = first, second
    chips = []
    for text, bits_a, bits_b in shared_pieces(a, b):
        details = {"text": show_whitespace(text), "bits": [[name_a, bits_a], [name_b, bits_b]]}
        chips.append(token_span(text, gain_color(bits_b - bits_a), details))
    steps = (
        f"{name_a} by over 3 bits",
        "by over 1",
        "about the same",
        "by over 1",
        f"{name_b} by over 3 bits",
    )
    items = "".join(f'<li><i class="g{i}"></i>{escape(words)}</li>' for i, words in enumerate(steps))
    return (
        '<div class="model"><h4>Which model finds it likelier</h4>'
        f'<div class="written">{"".join(chips)}</div><div class="legend"><ul>{items}</ul></div></div>'
    )


def heat_map(values: np.ndarray, description: str, is_signed: bool) -> str:
    """An image of (rows, columns): from 0 to the maximum, or symmetric around 0 if signed."""
    highest = float(np.abs(values).max()) or 1.0
    share = values / highest / 2 + 0.5 if is_signed else values / highest
    anchors = _DIVERGING if is_signed else _SEQUENTIAL
    positions = np.linspace(0, 1, len(anchors))
    channels = [np.interp(np.clip(share, 0, 1), positions, anchors[:, i]) for i in range(3)]
    file = io.BytesIO()
    Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8)).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img class="heat" alt="{description}" src="data:image/png;base64,{data}">'


def color_bar(highest: float, is_signed: bool) -> str:
    """Legend of a heat map."""
    ends = (f"-{highest:.2g}", "0", f"{highest:.2g}") if is_signed else ("0", f"{highest:.2g}")
    kind = "signed" if is_signed else "plain"
    return f'<div class="key {kind}"><i></i>{"".join(f"<span>{end}</span>" for end in ends)}</div>'


def curve(values: np.ndarray, description: str, is_log: bool = False) -> str:
    """A line over the columns of a heat map, with its range."""
    heights = np.log10(np.maximum(values, 1e-9)) if is_log else values
    low, high = (heights.min(), heights.max()) if is_log else (0.0, heights.max())
    x = (np.arange(len(values)) + 0.5) / len(values)
    y = 1 - (heights - low) / ((high - low) or 1.0)
    points = " ".join(f"{a:.4f},{b:.4f}" for a, b in zip(x, y, strict=True))
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
