"""States of recurrent layers, and attention weights.

Shapes: T tokens, R units of a state, H heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from .models import LanguageModel

_ATTENTION = "attention"  # suffix of the names of attention mixers
_GATE_PROJECTIONS = {"gated_linear": "forget_proj", "gru": "in_proj", "lstm": "in_proj"}  # of forget gates


@dataclass(frozen=True)
class Layer:
    """A layer that can be shown; `index` counts all layers from 0."""

    index: int
    mixer: str

    @property
    def is_attention(self) -> bool:
        return self.mixer.endswith(_ATTENTION)

    @property
    def label(self) -> str:
        """Name in the menu."""
        return f"Layer {self.index + 1}, {self.mixer.replace('_', ' ')}"


@dataclass(frozen=True)
class States:
    """State of a recurrent layer after each token, and the memory length of each unit in tokens."""

    h_TR: torch.Tensor
    memory_R: torch.Tensor | None  # None: the cell has no forget gate

    @property
    def rms_T(self) -> torch.Tensor:
        """Root mean square over the units."""
        return self.h_TR.square().mean(dim=1).sqrt()

    @property
    def saturated_fraction(self) -> float:
        """Fraction of values with an absolute value above 0.95."""
        return float((self.h_TR.abs() > 0.95).float().mean())


def list_layers(model: LanguageModel) -> list[Layer]:
    """Layers of a GenLM decoder, none if it counts; of another model those that return attention weights."""
    if model.mixers is not None:
        return [Layer(i, mixer) for i, mixer in enumerate(model.mixers) if mixer != "ngram"]
    with torch.inference_mode():
        output = model.module(input_ids=model.tensor([0]), output_attentions=True)
    attentions = getattr(output, "attentions", None) or ()
    return [Layer(i, _ATTENTION) for i, weights in enumerate(attentions) if weights is not None]


@torch.inference_mode()
def last_token_attention(model: LanguageModel, ids: list[int], layer: Layer) -> torch.Tensor:
    """Attention weights (H, T) of the last token on every token, itself included; each head sums to 1."""
    weights = model.module(input_ids=model.tensor(ids), output_attentions=True).attentions
    position = layer.index
    if model.mixers is not None:  # only attention layers return weights
        position = sum(mixer.endswith(_ATTENTION) for mixer in model.mixers[: layer.index])
    return weights[position][0, :, -1].float().cpu()


@torch.inference_mode()
def recurrent_states(model: LanguageModel, ids: list[int], layer: Layer) -> States:
    """States of a recurrent layer after each token, as the cache holds them."""
    decoder = model.module.model
    mixer = decoder.layers[layer.index % len(decoder.layers)].mixer
    run = layer.index // len(decoder.layers)  # shared weights run several times
    projection = getattr(mixer, _GATE_PROJECTIONS.get(layer.mixer, "out_proj"))
    projected: list[torch.Tensor] = []
    hook = projection.register_forward_hook(lambda *call: projected.append(call[-1]))
    try:
        cache = DynamicCache(config=model.module.config)
        cache.activate_past_recording()
        decoder(input_ids=model.tensor(ids), past_key_values=cache, use_cache=True)
    finally:
        hook.remove()
    recorded: Any = cache.layers[layer.index]
    past_TR = recorded.past_states[0][0].float()  # 1 + T states, the initial one first
    memory = None
    if layer.mixer in _GATE_PROJECTIONS:
        kept_TR = _kept_fraction(layer.mixer, mixer, projected[run][0].float(), past_TR[:-1])
        memory = memory_length(kept_TR).cpu()
    return States(past_TR[1:].cpu(), memory)


def memory_length(kept_TR: torch.Tensor) -> torch.Tensor:
    """Tokens after which a unit's state would shrink to 1/e, (R,): -1 / mean over T of ln(kept fraction)."""
    return -1 / kept_TR.clamp(min=1e-30, max=1 - 1e-6).log().mean(dim=0)


def _kept_fraction(kind: str, mixer: Any, u_TG: torch.Tensor, h_TR: torch.Tensor) -> torch.Tensor:
    """Fraction of its state that a cell keeps at each token, (T, R): the output of its forget gate.

    It is sigmoid(forget_proj(x)) of a gated linear recurrence, and of an LSTM or GRU the second gate of
    sigmoid(in_proj(x) + rec_proj(h)): f or z. `u_TG` is the projection of x, `h_TR` the states before x.
    """
    if kind == "gated_linear":
        return torch.sigmoid(u_TG)
    u_TG = u_TG + mixer.rec_proj(h_TR.to(mixer.rec_proj.weight.dtype)).float()
    return torch.sigmoid(u_TG.chunk({"gru": 3, "lstm": 4}[kind], dim=-1)[1])
