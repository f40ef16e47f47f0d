"""One token through the model's own forward, over state that lives in buffers of the caller.

Nothing of the model is written a second time: the step is a copy of its module tree that shares its
parameters, with each Linear in the form that suits one token.

Shapes: B batch, S slots for keys and values, K key-value heads, H head_dim, R recurrent_size.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_genlm.model import MIXERS, GenLMConfig, GenLMForCausalLM
from hf_genlm.model.bigram_genlm import LAST_TOKEN_SLOT
from hf_genlm.model.configuration_genlm import RECURRENT_MIXERS

MOVING_ROTATIONS = ("dynamic", "longrope")  # their frequencies depend on how long the text is
SLOTS_AT_ONCE = 64  # attention sees a multiple of so many slots: few shapes, little in vain


@dataclass(frozen=True)
class Slots:
    """How the state of one layer is kept: a name for each buffer, and what is in it."""

    kind: str  # "full_attention", "sliding_attention" or "recurrent"
    states: tuple[int, ...] = ()  # the slots of a recurrent state


def slots_of(config: GenLMConfig) -> list[Slots]:
    """One for each layer."""
    found = []
    for layer, mixer in enumerate(config.mixer_types):
        if mixer not in RECURRENT_MIXERS:
            found.append(Slots(mixer))
            continue
        recurrent: Any = MIXERS[mixer]
        states = tuple(range(recurrent.n_states))
        if layer == 0 and config.bigram_size is not None:
            states = (*states, LAST_TOKEN_SLOT)
        found.append(Slots("recurrent", states))
    return found


class StepCache:
    """What the mixers ask of a cache, over buffers that are written in place."""

    def __init__(self, layers: list[Slots], buffers: Iterator[torch.Tensor], at: dict[str, torch.Tensor]):
        self.layers = layers
        self._at = at
        self._kept: list[Any] = []
        for slots in layers:
            names = slots.states or ("keys", "values")
            self._kept.append({name: next(buffers) for name in names})

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, K, 1, H) of one token to all (B, K, S, H)."""
        kept, at = self._kept[layer], self._at[self.layers[layer].kind]
        kept["keys"].index_copy_(0, at, key.permute(2, 0, 1, 3))
        kept["values"].index_copy_(0, at, value.permute(2, 0, 1, 3))
        return kept["keys"].permute(1, 2, 0, 3), kept["values"].permute(1, 2, 0, 3)

    def get_recurrent_state(self, layer: int, slot: int = 0) -> torch.Tensor:
        """(B, R)."""
        return self._kept[layer][slot]

    def update_recurrent_state(self, state: torch.Tensor, layer: int, slot: int = 0, **kwargs: Any) -> None:
        """Keep (B, R)."""
        self._kept[layer][slot].copy_(state)

    def is_recording_past(self, layer: int) -> bool:
        """Never: nothing is taken back."""
        return False


class DecodeStep(nn.Module):
    """Logits of the next token from one token, all state in `buffers`, which are written in place.

    Args:
        row_sums: matrix products written as products and sums, which a compiler makes loops of that suit one
            row; otherwise as calls of torch's kernels.
        int8: matrices as 8-bit integers with a scale for each row, the nearest to the given ones.
    """

    def __init__(self, model: GenLMForCausalLM, row_sums: bool = False, int8: bool = False):
        super().__init__()
        shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
        shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
        self.model = copy.deepcopy(model, memo=shared)
        self.form = {"row_sums": row_sums, "int8": int8}
        self.layer_slots = slots_of(model.config)
        self.config = model.config
        if int8:
            _replace_linears(self.model, Int8Linear, suits=lambda linear: linear.in_features % 32 == 0)
        elif row_sums:
            _replace_linears(self.model, RowSums)
        self.model.config._attn_implementation = "sdpa"
        self.model.eval()

    def forward(
        self, token: torch.Tensor, position: torch.Tensor, slot: torch.Tensor, *buffers: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            token: (B, 1).
            position: (B, 1), padding not counted; 1 is added in place.
            slot: (1,), tokens so far, padding counted; 1 is added in place.
            buffers: as `StepState.buffers` gives them.

        Returns:
            (B, V).
        """
        given, at, masks = iter(buffers), {}, {}
        for kind in _attention_kinds(self.config):
            seen = next(given)
            at[kind] = slot % self.config.sliding_window if kind == "sliding_attention" else slot
            seen.index_copy_(0, at[kind], torch.ones_like(seen[:1]))
            masks[kind] = seen.t()[:, None, None]
        masks |= dict.fromkeys(set(self.config.layer_types) - set(masks))
        logits = self.model(
            input_ids=token,
            attention_mask=masks,
            position_ids=position,
            past_key_values=StepCache(self.layer_slots, given, at),
            use_cache=True,
        ).logits
        position.add_(1)
        slot.add_(1)
        return logits[:, -1]


class StepState:
    """The buffers of one generation: keys and values (S, B, K, H), which slots hold a token (S, B), and
    recurrent states (B, R). A sliding layer has as many slots as its window and uses them in turn."""

    def __init__(self, config: GenLMConfig, like: torch.Tensor, n_rows: int, n_slots: int):
        """For `n_rows`, and at first `n_slots` of attention; `like` gives the dtype and device."""
        self.config, self.n_slots = config, max(n_slots, 1)
        heads = (n_rows, config.num_key_value_heads, config.head_dim)
        state_dtype = torch.promote_types(like.dtype, torch.float32)

        def n_of(kind: str) -> int:
            return config.sliding_window if kind == "sliding_attention" else self.n_slots

        self.grows: list[bool] = []
        self._whole: list[torch.Tensor] = []
        for kind in _attention_kinds(config):
            self._keep(like.new_zeros(n_of(kind), n_rows, dtype=torch.bool), kind == "full_attention")
        for slots in slots_of(config):
            for state in slots.states:
                width = 1 if state == LAST_TOKEN_SLOT else config.recurrent_size
                self._keep(like.new_zeros(n_rows, width, dtype=state_dtype), False)
            if slots.kind != "recurrent":
                for _ in ("keys", "values"):
                    self._keep(like.new_zeros(n_of(slots.kind), *heads), slots.kind == "full_attention")

    def _keep(self, buffer: torch.Tensor, grows: bool) -> None:
        self._whole.append(buffer)
        self.grows.append(grows)

    def buffers(self, n_tokens: int) -> list[torch.Tensor]:
        """For a step that makes `n_tokens` in all, its own included; more slots where they are needed."""
        n_used = -(-n_tokens // SLOTS_AT_ONCE) * SLOTS_AT_ONCE
        if n_used > self.n_slots and any(self.grows):
            self.n_slots = max(n_used, 2 * self.n_slots)
            for i, (buffer, grows) in enumerate(zip(self._whole, self.grows, strict=True)):
                if grows:
                    larger = buffer.new_zeros(self.n_slots, *buffer.shape[1:])
                    larger[: len(buffer)] = buffer
                    self._whole[i] = larger
        return [b[:n_used] if grows else b for b, grows in zip(self._whole, self.grows, strict=True)]

    def fill(self, cache: Any, valid: torch.Tensor) -> None:
        """Take over transformers' `cache` after a prompt, whose mask is `valid` (B, T)."""
        n_tokens = valid.shape[1]
        given = iter(self._whole)
        for _ in _attention_kinds(self.config):
            self._write(next(given), valid.t(), n_tokens)
        for slots, layer in zip(slots_of(self.config), cache.layers, strict=True):
            for state in slots.states:
                next(given).copy_(layer.recurrent_states[state])
            if slots.kind != "recurrent":
                for tensor in (layer.keys, layer.values):
                    self._write(next(given), tensor.permute(2, 0, 1, 3), n_tokens)

    @staticmethod
    def _write(buffer: torch.Tensor, rows: torch.Tensor, n_tokens: int) -> None:
        """The last of `rows`, which end at token `n_tokens`, to the slots of their tokens."""
        rows = rows[-len(buffer) :]
        at = torch.arange(n_tokens - len(rows), n_tokens, device=rows.device) % len(buffer)
        buffer[at] = rows.to(buffer.dtype)


class RowSums(nn.Module):
    """A Linear as products and sums, for a compiler: for one token, as fast as memory gives the weights.

    Four sums go through the rows side by side, since each by itself would wait for its last addition.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        parts = [(x.unsqueeze(-2) * rows).sum(-1) for rows in self.weight.chunk(4)]
        y = torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """A Linear with 8-bit weights, a scale for each row, and inputs of 16 bits (bfloat16)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1).clamp(min=1e-12) / 127
        weight = (linear.weight.detach() / scale[:, None]).round().to(torch.int8)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _replace_linears(
    module: nn.Module, form: type[nn.Module], suits: Callable[[nn.Linear], bool] = lambda linear: True
) -> None:
    for name, child in module.named_children():
        if name == "embed_proj":  # the model reads its weight, for a head that is tied through it
            continue
        if type(child) is nn.Linear:
            if suits(child):
                setattr(module, name, form(child))
        else:
            _replace_linears(child, form, suits)


def _attention_kinds(config: GenLMConfig) -> list[str]:
    return [kind for kind in ("full_attention", "sliding_attention") if kind in config.mixer_types]
