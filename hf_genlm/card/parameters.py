"""Parameters of a model by part."""

from collections.abc import Sequence
from typing import NamedTuple

_MIXER = "mixer"
_OTHER = "other"
# the first of these words in the dotted name of a tensor -> the part that it belongs to
_PART_OF = {
    "embed_tokens": "token embedding",
    "embed_proj": "embedding projection",
    "embed_bigrams": "bigram embedding",
    "embed_positions": "position embedding",
    "mixer": _MIXER,
    "mixer_norm": "norms",
    "mlp_norm": "norms",
    "norm": "norms",
    "mlp": "MLP",
    "lm_head": "output head",
}


class Part(NamedTuple):
    """One row of the table: a kind of part, and the stored tensors and parameters of it."""

    name: str
    n_tensors: int
    n_parameters: int


def parts_of(sizes: dict[str, int], mixer_types: Sequence[str]) -> list[Part]:
    """Sum the sizes of a model's tensors by part, in the order in which the model computes the parts.

    `mixer_types` holds the mixer of each stored layer.
    """
    counts: dict[str, list[int]] = {}
    for name, size in sizes.items():
        counts.setdefault(part_of(name, mixer_types), []).append(size)
    return [
        Part(part, len(counts[part]), sum(counts[part])) for part in part_names(mixer_types) if part in counts
    ]


def part_names(mixer_types: Sequence[str]) -> list[str]:
    """Every part that a model of these mixers can have, in the order in which it computes them."""
    order = [*_PART_OF.values(), _OTHER]
    at = order.index(_MIXER)
    order[at : at + 1] = [f"{_MIXER} {kind}" for kind in mixer_types]
    return list(dict.fromkeys(order))


def part_of(name: str, mixer_types: Sequence[str]) -> str:
    """The part that a tensor or module belongs to, by its dotted name; `other` for an unknown name."""
    words = name.split(".")
    part = next((_PART_OF[word] for word in words if word in _PART_OF), _OTHER)
    if part != _MIXER:
        return part
    layer = words[words.index("layers") + 1] if "layers" in words[:-1] else ""
    is_known = layer.isdecimal() and int(layer) < len(mixer_types)
    return f"{_MIXER} {mixer_types[int(layer)]}" if is_known else _OTHER
