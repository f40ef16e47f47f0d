"""What goes on inside a decoder: the states of its recurrent layers, and where its attention layers look.

Shapes: T tokens, R units of a state, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from .models import LanguageModel

_ATTENTION = "attention"  # the end of the words of attention layers


@dataclass(frozen=True)
class Layer:
    """One layer that can be looked into. `place` is its number among all, from 0."""

    place: int
    mixer: str
    is_attention: bool

    @property
    def label(self) -> str:
        """As it is chosen by."""
        return f"Layer {self.place + 1}, {self.mixer.replace('_', ' ')}"


@dataclass(frozen=True)
class States:
    """A recurrent layer's state after each token, and what became of it."""

    h_TR: torch.Tensor
    memory_R: torch.Tensor | None  # tokens; None: a cell without a gate that keeps the state

    @property
    def size_T(self) -> torch.Tensor:
        """Root mean square over the units."""
        return self.h_TR.square().mean(dim=1).sqrt()

    @property
    def saturated(self) -> float:
        """Share of the values beyond 0.95 in size."""
        return float((self.h_TR.abs() > 0.95).float().mean())


def layers_of(model: LanguageModel) -> list[Layer]:
    """All layers of our decoders; of another model those that give attention weights."""
    if model.mixers is not None:
        return [Layer(i, mixer, mixer.endswith(_ATTENTION)) for i, mixer in enumerate(model.mixers)]
    with torch.inference_mode():
        output = model.module(input_ids=model.tensor([0]), output_attentions=True)
    attentions = getattr(output, "attentions", None) or ()
    return [Layer(i, _ATTENTION, True) for i, weights in enumerate(attentions) if weights is not None]


@torch.inference_mode()
def attention_of(model: LanguageModel, ids: list[int], layer: Layer) -> torch.Tensor:
    """(H, T): how much each head looks from the last token at each, itself included; a head's sum is 1."""
    weights = model.module(input_ids=model.tensor(ids), output_attentions=True).attentions
    before = [mixer for mixer in (model.mixers or [])[: layer.place] if mixer.endswith(_ATTENTION)]
    at = layer.place if model.mixers is None else len(before)
    return weights[at][0, :, -1].float().cpu()


@torch.inference_mode()
def states_of(model: LanguageModel, ids: list[int], layer: Layer) -> States:
    """The states that the cache held after each token."""
    config = model.module.config
    decoder = model.module.model
    mixer = decoder.layers[layer.place % len(decoder.layers)].mixer
    run = layer.place // len(decoder.layers)  # weights that several layers share run several times
    gate = _KEPT_SHARE.get(layer.mixer)
    projection = getattr(mixer, gate.projection) if gate else mixer.out_proj
    projected: list[torch.Tensor] = []
    hook = projection.register_forward_hook(lambda *call: projected.append(call[-1]))
    try:
        cache = DynamicCache(config=config)
        cache.activate_past_recording()
        decoder(input_ids=model.tensor(ids), past_key_values=cache, use_cache=True)
    finally:
        hook.remove()
    kept: Any = cache.layers[layer.place]
    past_TR = kept.past_states[0][0].float()  # 1 + T: the one before the first too
    memory = None
    if gate is not None:
        kept_TR = gate.share(mixer, projected[run][0].float(), past_TR[:-1])
        memory = memory_of(kept_TR).cpu()
    return States(past_TR[1:].cpu(), memory)


def memory_of(kept_TR: torch.Tensor) -> torch.Tensor:
    """Tokens after which a unit's state would have shrunk to 1/e, (R,): -1 / mean over T of ln(share)."""
    return -1 / kept_TR.clamp(min=1e-30, max=1 - 1e-6).log().mean(dim=0)


@dataclass(frozen=True)
class _Gate:
    """The share of its state that a cell keeps, from the output of its module `projection` for x and its
    states before x."""

    projection: str
    share: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def _of_cell(n_gates: int) -> _Gate:
    """Gate 1 of a cell whose gates are sigmoid(in_proj(x) + rec_proj(h)): f of an LSTM, z of a GRU."""

    def share(mixer, u_TG, h_TR):
        v_TG = mixer.rec_proj(h_TR.to(mixer.rec_proj.weight.dtype)).float()
        return torch.sigmoid(u_TG.chunk(n_gates, dim=-1)[1] + v_TG.chunk(n_gates, dim=-1)[1])

    return _Gate("in_proj", share)


_KEPT_SHARE = {
    "gated_linear": _Gate("forget_proj", lambda mixer, u_TR, h_TR: torch.sigmoid(u_TR)),
    "gru": _of_cell(3),
    "lstm": _of_cell(4),
}
