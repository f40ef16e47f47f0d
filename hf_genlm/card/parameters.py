"""The parts of a model by name, and where its parameters are: counted in the header of its safetensors file,
without reading a weight."""

import math
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from hf_genlm.errors import UserError

_MIXER = "mixer"
# The first of these words in a tensor's dotted name says which part it belongs to.
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
_OTHER = "other"


class Part(NamedTuple):
    """One row of the table: a kind of part, and how many tensors and parameters of it are stored."""

    name: str
    n_tensors: int
    n_parameters: int


def read_sizes(path: Path) -> dict[str, int]:
    """The number of parameters in each tensor of a safetensors file, by name. A tied tensor is stored once.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{str(path)!r} cannot be read as safetensors ({error}): 'train' writes it"
        ) from error


def parts_of(sizes: dict[str, int], mixer_types: list[str]) -> list[Part]:
    """The tensors of `read_sizes` added up by part, in the order in which the model computes them.

    `mixer_types` is the mixer's word for each layer that is stored.
    """
    counts: dict[str, list[int]] = {}
    for name, size in sizes.items():
        counts.setdefault(part_of(name, mixer_types), []).append(size)
    return [
        Part(part, len(counts[part]), sum(counts[part])) for part in part_names(mixer_types) if part in counts
    ]


def part_names(mixer_types: list[str]) -> list[str]:
    """Every part that a model of these mixers can have, in the order in which it computes them."""
    order = [*_PART_OF.values(), _OTHER]
    at = order.index(_MIXER)
    order[at : at + 1] = [f"{_MIXER} {kind}" for kind in mixer_types]
    return list(dict.fromkeys(order))


def part_of(name: str, mixer_types: list[str]) -> str:
    """The part that a tensor or module belongs to, by its dotted name in the model."""
    words = name.split(".")
    part = next((_PART_OF[word] for word in words if word in _PART_OF), _OTHER)
    if part != _MIXER:
        return part
    return f"{_MIXER} {mixer_types[int(words[words.index('layers') + 1])]}"
