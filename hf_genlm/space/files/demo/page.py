"""The HTML of what is shown. Whatever comes from a text or a name is escaped here.

Shapes: T tokens, R units of a state, H heads.
"""

import json
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from .characters import Span, Speller
from .inside import States
from .models import LanguageModel
from .pictures import curve, heat_map, key_of
from .scoring import TextScore, TokenScore, shared_pieces

# from the palest colour to the darkest: what the legend says, and the bound that decides
PROBABILITY_STEPS = ((0.5, "over 50 %"), (0.2, "over 20 %"), (0.05, "over 5 %"), (0.01, "over 1 %"),
                     (0.001, "over 0.1 %"), (0.0, "less"))  # fmt: skip
ATTENTION_STEPS = ((0.005, "under 0.5 %"), (0.01, "under 1 %"), (0.02, "under 2 %"), (0.05, "under 5 %"),
                   (0.1, "under 10 %"), (float("inf"), "more"))  # fmt: skip
_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})


class TokenPainter:
    """A text as coloured spans, made as its tokens come; what each says on touch is in its `data-tokens`."""

    def __init__(self, model: LanguageModel):
        self._tokenizer = model.tokenizer
        self._speller = Speller(model.tokenizer)
        self._scores: list[TokenScore] = []

    def paint(self, scores: Sequence[TokenScore]) -> str:
        """The spans that end in these tokens."""
        self._scores += scores
        return "".join(self._span(span) for span in self._speller.read(score.token for score in scores))

    def finish(self) -> str:
        """What was begun and not ended."""
        return "".join(self._span(span) for span in self._speller.finish())

    def _span(self, span: Span) -> str:
        scores = self._scores[span.first : span.stop]
        known = [score.probability for score in scores if score.probability is not None]
        is_scored = len(known) == len(scores)
        details = [
            {
                "text": self._name(score.token),
                "p": score.probability,
                "rank": score.rank,
                "others": [[self._name(token), p] for token, p in score.alternatives],
            }
            for score in scores
        ]
        return touchable(span.text, colour_of(float(np.prod(known))) if is_scored else "unscored", details)

    def _name(self, token: int) -> str:
        """A token by itself: its characters, or its bytes where they are none."""
        spelled = self._speller.bytes_of(token)
        if spelled is None:
            text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            return visible(text or self._tokenizer.convert_ids_to_tokens(token))
        try:
            return visible(spelled.decode("utf-8"))
        except UnicodeDecodeError:
            return f"{'byte' if len(spelled) == 1 else 'bytes'} {spelled.hex(' ')}"


def colour_of(probability: float) -> str:
    """The class of a probability's colour."""
    return f"s{next(i for i, (least, _) in enumerate(PROBABILITY_STEPS) if probability >= least)}"


def colour_of_share(share: float) -> str:
    """The class of the colour of a share of the attention."""
    return f"s{next(i for i, (most, _) in enumerate(ATTENTION_STEPS) if share < most)}"


def colour_of_gain(bits: float) -> str:
    """The class of the colour of a difference: of the first model from g0 to g1, of the second to g4."""
    return f"g{sum(bits < least for least in (3.0, 1.0, -1.0, -3.0))}"


def touchable(text: str, colour: str, details: Any) -> str:
    """A span of the text that says more when it is touched."""
    data = escape(json.dumps(details, ensure_ascii=False), quote=True)
    shown = escape(text, quote=False).replace("\n", "<b></b>\n")  # a sign of the style, and no text
    return f'<span class="token {colour}" tabindex="0" data-tokens="{data}">{shown}</span>'


def plain(text: str) -> str:
    """Text with nothing in it that HTML would read."""
    return escape(text)


def visible(text: str) -> str:
    """White space by its signs, as a token alone is named."""
    return text.translate(_VISIBLE) or "nothing"


def note(text: str) -> str:
    """A remark in plain words."""
    return f'<p class="note">{escape(text)}</p>'


def legend(title: str, steps: Sequence[tuple[float, str]]) -> str:
    """What each colour means."""
    items = "".join(f'<li><i class="s{i}"></i>{words}</li>' for i, (_, words) in enumerate(steps))
    return f'<div class="legend"><span>{title}</span><ul>{items}</ul></div>'


def facts(model: LanguageModel) -> str:
    """A model in a line."""
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
    """Heat map, size and memory of a recurrent layer; the first `n_before` states are not of the text."""
    h_TR = states.h_TR[n_before:].numpy()
    order = np.arange(h_TR.shape[1])
    sorting = ""
    if states.memory_R is not None:
        order = states.memory_R.argsort(descending=True).numpy()
        sorting = ", the longest memory at the top"
    size_T = states.size_T[n_before:].numpy()
    parts = [
        f"<h4>The state after each of {len(h_TR):,} tokens</h4>",
        f'<div class="axis" data-columns="{columns_of(spans)}">',
        heat_map(h_TR.T[order], f"state of {len(order)} units over {len(h_TR)} tokens", is_signed=True),
        f"</div>{key_of(float(np.abs(h_TR).max()), is_signed=True)}",
        note(f"A column is a token, a row one of {len(order)} units{sorting}."),
        f"<h4>Its size</h4>{curve(size_T, 'root mean square of the state over the tokens')}",
        note(
            f"Root mean square over the units after each token. {100 * states.saturated:.1f} % of all values "
            "lie beyond ±0.95."
        ),
        _memory_view(states.memory_R.numpy()) if states.memory_R is not None else note(_NO_GATE),
    ]
    return "".join(parts)


def _memory_view(memory_R: np.ndarray) -> str:
    drawn = curve(np.sort(memory_R), "memory of each unit in tokens, sorted", is_log=True)
    said = (
        f"Tokens until a unit's state would have shrunk to 1/e by its gates in this text, from the shortest "
        f"to the longest: half of the units below {np.median(memory_R):.1f}, one in ten above "
        f"{np.quantile(memory_R, 0.9):.1f}."
    )
    return f"<h4>How long each unit remembers</h4>{drawn}{note(said)}"


def attention_view(weights_HT: np.ndarray, spans: Sequence[Span], n_before: int) -> str:
    """Where the last token looks: the text by the mean over heads, and each head by itself."""
    on_text_HT = weights_HT[:, n_before:]
    n_heads, n_tokens = on_text_HT.shape
    chips = []
    for span in spans:
        share_H = on_text_HT[:, span.first : span.stop].sum(axis=1)
        share = float(share_H.mean())
        details = {"text": visible(span.text), "share": share, "heads": share_H.tolist()}
        chips.append(touchable(span.text, colour_of_share(share), details))
    parts = [
        f'<h4>Where the last token looks</h4><div class="written">{"".join(chips)}</div>',
        legend("Share of the attention", ATTENTION_STEPS),
        f"<h4>{f'Each of {n_heads} heads' if n_heads > 1 else 'Its one head'}</h4>",
        f'<div class="axis heads" data-columns="{columns_of(spans)}">',
        heat_map(on_text_HT, f"attention of {n_heads} heads on {n_tokens} tokens", is_signed=False),
        f"</div>{key_of(float(on_text_HT.max()), is_signed=False)}",
    ]
    if n_before:
        on_start = 100 * weights_HT[:, :n_before].sum(axis=1).mean()
        parts.append(note(f"{on_start:.1f} % of the attention is on the start of the text, left of these."))
    return "".join(parts)


def columns_of(spans: Sequence[Span]) -> str:
    """The characters at each column of a picture over tokens, for an attribute."""
    names = [visible(span.text) for span in spans for _ in range(span.stop - span.first)]
    return escape(json.dumps(names, ensure_ascii=False), quote=True)


def scores_view(scores: Sequence[tuple[str, TextScore]]) -> str:
    """Bits per byte of one text under each model, and the difference of two."""
    most = max(score.bits_per_byte for _, score in scores) or 1.0
    parts = [_score(name, score, score.bits_per_byte / most) for name, score in scores]
    parts = [f'<div class="scores">{"".join(parts)}</div>']
    if len(scores) == 2:
        (better, a), (other, b) = sorted(scores, key=lambda pair: pair[1].bits_per_byte)
        gap = b.bits_per_byte - a.bits_per_byte
        parts.append(note(f"{better} needs {gap:.3f} bits per byte less than {other} for this text."))
        parts.append(_gains_view(*scores))
    if any(score.n_scored < score.n_tokens for _, score in scores):
        parts.append(note("A model without a start token cannot score the first token: it is left out."))
    return "".join(parts)


def _gains_view(first: tuple[str, TextScore], second: tuple[str, TextScore]) -> str:
    """The text, coloured by which of two models finds each piece likelier."""
    (name_a, a), (name_b, b) = first, second
    chips = []
    for text, bits_a, bits_b in shared_pieces(a, b):
        details = {"text": visible(text), "bits": [[name_a, bits_a], [name_b, bits_b]]}
        chips.append(touchable(text, colour_of_gain(bits_b - bits_a), details))
    items = "".join(
        f'<li><i class="g{i}"></i>{escape(words)}</li>'
        for i, words in enumerate(
            (
                f"{name_a} by over 3 bits",
                "by over 1",
                "about the same",
                "by over 1",
                f"{name_b} by over 3 bits",
            )
        )
    )
    return (
        f'<div class="model"><h4>Who finds it likelier</h4><div class="written">{"".join(chips)}</div>'
        f'<div class="legend"><ul>{items}</ul></div></div>'
    )


def _score(name: str, score: TextScore, share: float) -> str:
    return (
        f'<div class="score"><h4>{escape(name)}</h4>'
        f'<p class="figure">{score.bits_per_byte:.3f}<small>bits per byte</small></p>'
        f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'
        f'<p class="facts">{score.bits:,.0f} bits · {score.n_bytes:,} bytes · {score.n_tokens:,} tokens · '
        f"{score.n_bytes / score.n_tokens:.2f} bytes per token</p></div>"
    )


_NO_GATE = "An Elman cell has no gate that keeps its state, and so no time that a unit remembers."
