"""Recurrent mixers: Elman, GRU and LSTM cells, and a gated linear recurrence.

Each has one definition (`step`, or the recurrence solved by `linear_scan`) and a fast path over the same
parameters. The state is read from the cache and written to it, in float32 at least; padding keeps it and the
start of a packed document resets it.

Shapes: B batch, T tokens, D hidden_size, R recurrent_size, G gates.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers.cache_utils import Cache

from .cache_genlm import read_states
from .configuration_genlm import GenLMConfig
from .initialization_genlm import (
    start_near_zero,
    start_orthogonal,
    start_remembering,
    start_with_spread_memories,
)
from .layout_genlm import Segments, TimeLayout
from .scan_genlm import linear_scan, scan_steps

# PackedSequence skips the padding of short segments, but is several times slower per token for Elman and GRU:
# it is used if rows padded to the longest segment would hold more than so many times the tokens
_MAX_PADDED_RATIO = 3.0
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class RecurrentMixer(nn.Module):
    """Base class: read the state, `run` the recurrence, write the state."""

    n_states = 1

    def __init__(self, config: GenLMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.recurrent_size = config.recurrent_size
        self.out_proj = nn.Linear(config.recurrent_size, config.hidden_size, bias=False)
        self.out_proj.start = partial(start_near_zero, config=config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: TimeLayout | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """Map (B, T, D) to (B, T, D); the second item is None in place of attention weights.

        Args:
            layout: padding and packed documents; None: each row is one document.
            layer_idx: index of the layer in the cache; None: that of the weights, which layers may share.
        """
        states, recording = None, False
        at = self.layer_idx if layer_idx is None else layer_idx
        if past_key_values is not None:
            shape = (hidden_states.shape[0], self.recurrent_size)
            states = read_states(past_key_values, at, range(self.n_states), shape)
            recording = past_key_values.is_recording_past(at)
        if states is None:
            states = self.initial_states(hidden_states)
        else:
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            states = tuple(state.to(dtype, copy=True) for state in states)
        mixed_BTR, states, past = self.run(hidden_states, layout or TimeLayout(), states, recording)
        if past_key_values is not None:
            for slot, state in enumerate(states):
                past_key_values.update_recurrent_state(
                    state,
                    at,
                    slot,
                    n_tokens=hidden_states.shape[1],
                    past_states=past[slot] if past else None,
                )
        return self.out_proj(mixed_BTR.to(hidden_states.dtype)), None

    def initial_states(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Zeros, (B, R) for each state."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return tuple(x.new_zeros(x.shape[0], self.recurrent_size, dtype=dtype) for _ in range(self.n_states))

    def run(self, x, layout, states, recording):
        """Compute the recurrence over inputs x (B, T, D).

        Returns:
            outputs (B, T, R); the last states, each (B, R); if recording, the history of each state
            (B, 1 + T, R), before the first and after each token, else None.
        """
        raise NotImplementedError


class ClassicCell(RecurrentMixer):
    """h_t = cell(in_proj(x_t), rec_proj(h_{t-1})), with torch's fused kernels where they apply."""

    n_gates = 1
    remembering_gate: int | None = None  # its bias is initialised to 1, so that the state is kept

    def __init__(self, config: GenLMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        width = self.n_gates * config.recurrent_size
        self.in_proj = nn.Linear(config.hidden_size, width)
        self.in_proj.start = partial(start_remembering, n_gates=self.n_gates, gate=self.remembering_gate)
        # only the GRU needs a second bias: its reset gate scales the recurrent product with that bias
        self.rec_proj = nn.Linear(config.recurrent_size, width, bias=self.n_gates == 3)
        self.rec_proj.start = partial(start_orthogonal, n_gates=self.n_gates)
        # Muon must treat these as one matrix per gate, not as the stack that the kernels need
        self.in_proj.n_matrices = self.rec_proj.n_matrices = self.n_gates

    def step(
        self, u: torch.Tensor, v: torch.Tensor, states: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """New states from u = in_proj(x_t) and v = rec_proj(h_{t-1}), both (B, G * R)."""
        raise NotImplementedError

    def kernel(self, *args):
        """torch's fused kernel of this cell."""
        raise NotImplementedError

    def run(self, x, layout, states, recording):
        stepwise = x.shape[1] == 1 or recording or torch.compiler.is_compiling()
        # a kernel reads the weights directly: no adapters, no quantisers, no half precision on CPUs
        if stepwise or self.in_proj.weight.dtype.itemsize < 4 or not self._owns_plain_projections():
            return self.run_stepwise(x, layout, states, recording)
        if layout.is_plain:
            outputs, states = self._run_kernel(x, states)
            return outputs, states, None
        if layout.valid is not None and not layout.valid.any():
            return x.new_zeros(*x.shape[:2], self.recurrent_size), states, None
        return (*self._run_segments(x, layout.segments, states), None)

    def _owns_plain_projections(self) -> bool:
        return is_plain_linear(self.in_proj) and is_plain_linear(self.rec_proj)

    def run_stepwise(self, x, layout, states, recording=False):
        """`run` by the definition, one token after the other."""
        inputs = [self.in_proj(x)]
        inputs += [mask for mask in (layout.starts, layout.valid) if mask is not None]

        def advance(states, inputs):
            u, *masks = inputs
            before = states
            if layout.starts is not None:
                states = tuple(state * ~masks[0][:, None] for state in states)
            states = self.step(u, self.rec_proj(states[0].to(x.dtype)), states)
            if layout.valid is not None:
                is_token = masks[-1][:, None]
                states = tuple(torch.where(is_token, *pair) for pair in zip(states, before, strict=True))
            return states

        states, history = scan_steps(advance, states, inputs)
        outputs = history[0][:, 1:]
        if layout.valid is not None:
            outputs = outputs * layout.valid[..., None]  # zeros at padding, as in the fused path
        return outputs, states, history if recording else None

    def _run_kernel(self, x, states, lengths=None):
        """Run rows (S, L, D) from states (S, R) by the fused kernel; with `lengths`, as a PackedSequence."""
        x = x.to(self.in_proj.weight.dtype)
        zero_bias = self.in_proj.bias.new_zeros(self.in_proj.bias.shape)
        rec_bias = zero_bias if self.rec_proj.bias is None else self.rec_proj.bias
        weights = [self.in_proj.weight, self.rec_proj.weight, self.in_proj.bias, rec_bias]
        states = tuple(state[None] for state in states)
        if lengths is None:
            given = states if self.n_states > 1 else states[0]
            with torch.autocast(x.device.type, enabled=False):
                outputs, *states = self.kernel(x, given, weights, True, 1, 0.0, self.training, False, True)
            return outputs, tuple(state[0] for state in states)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states = tuple(state.index_select(1, packed.sorted_indices) for state in states)
        given = states if self.n_states > 1 else states[0]
        with torch.autocast(x.device.type, enabled=False):
            data, *states = self.kernel(
                packed.data, packed.batch_sizes, given, weights, True, 1, 0.0, self.training, False
            )
        outputs, _ = pad_packed_sequence(packed._replace(data=data), batch_first=True)
        return outputs, tuple(state[0].index_select(0, packed.unsorted_indices) for state in states)

    def _run_segments(self, x, segments: Segments, states):
        n_rows, n_tokens = x.shape[:2]
        x_SLD = x.flatten(0, 1)[segments.tokens[segments.grid]]
        begin = tuple(state[segments.row] * segments.continues[:, None] for state in states)
        # only the packed form returns the c of an LSTM where a short segment ends
        is_sparse = segments.grid.numel() > _MAX_PADDED_RATIO * len(segments.tokens)
        if self.n_states > 1 or is_sparse:
            outputs_SLR, end = self._run_kernel(x_SLD, begin, segments.lengths)
        else:
            outputs_SLR, _ = self._run_kernel(x_SLD, begin)
            last = (segments.lengths - 1)[:, None, None].expand(-1, 1, self.recurrent_size)
            end = (outputs_SLR.gather(1, last).squeeze(1),)
        outputs = outputs_SLR.new_zeros(n_rows * n_tokens, self.recurrent_size)
        outputs = outputs.index_copy(0, segments.tokens, outputs_SLR[segments.filled])
        is_last = torch.diff(segments.row, append=segments.row.new_full((1,), n_rows)) != 0
        states = tuple(
            state.index_copy(0, segments.row[is_last], after[is_last].to(state.dtype))
            for state, after in zip(states, end, strict=True)
        )
        return outputs.view(n_rows, n_tokens, -1), states


class ElmanCell(ClassicCell):
    """h_t = tanh(W x_t + b + U h_{t-1}) (Elman, 1990, Finding structure in time)."""

    def step(self, u, v, states):
        return (torch.tanh((u + v).to(states[0].dtype)),)

    def kernel(self, *args):
        return torch.rnn_tanh(*args)


class GRUCell(ClassicCell):
    """The gated recurrent unit (Cho et al., 2014, arXiv:1406.1078), in torch's form and gate order r, z, n:
    h_t = (1 - z) * tanh(W_n x + b_n + r * (U_n h + c_n)) + z * h_{t-1}."""

    n_gates = 3
    remembering_gate = 1

    def step(self, u, v, states):
        (h,) = states
        u_r, u_z, u_n = u.to(h.dtype).chunk(3, dim=-1)
        v_r, v_z, v_n = v.to(h.dtype).chunk(3, dim=-1)
        reset, update = torch.sigmoid(u_r + v_r), torch.sigmoid(u_z + v_z)
        candidate = torch.tanh(u_n + reset * v_n)
        return (candidate + update * (h - candidate),)

    def kernel(self, *args):
        return torch.gru(*args)


class LSTMCell(ClassicCell):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997) with a forget gate (Gers et al., 2000), in
    torch's gate order i, f, g, o: c_t = f * c_{t-1} + i * tanh(g), h_t = o * tanh(c_t)."""

    n_gates = 4
    n_states = 2
    remembering_gate = 1

    def step(self, u, v, states):
        _, c = states
        i, f, g, o = (u + v).to(c.dtype).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def kernel(self, *args):
        return torch.lstm(*args)


class GatedLinearRecurrence(RecurrentMixer):
    """h_t = f_t * h_{t-1} + (1 - f_t) * v_t with f_t = sigmoid(W_f x_t + b_f), v_t = W_v x_t; output h_t *
    silu(W_g x_t).

    Gates depend only on the input, so training and prefill solve all steps in parallel (Martin and Cundy,
    2018, arXiv:1709.04057; gating by Qin et al., 2023, arXiv:2311.04823).
    """

    def __init__(self, config: GenLMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.value_proj = nn.Linear(config.hidden_size, config.recurrent_size, bias=False)
        self.forget_proj = nn.Linear(config.hidden_size, config.recurrent_size)
        self.forget_proj.start = start_with_spread_memories
        self.gate_proj = nn.Linear(config.hidden_size, config.recurrent_size, bias=False)

    def run(self, x, layout, states, recording):
        (h,) = states
        forget = torch.sigmoid(self.forget_proj(x).to(h.dtype))
        new = (1 - forget) * self.value_proj(x).to(h.dtype)
        if layout.starts is not None:
            forget = forget.masked_fill(layout.starts[..., None], 0.0)
        if layout.valid is not None:
            is_padding = ~layout.valid[..., None]
            forget, new = forget.masked_fill(is_padding, 1.0), new.masked_fill(is_padding, 0.0)
        h_BTR = linear_scan(forget, new, h)
        history = [torch.cat([h[:, None], h_BTR], dim=1)] if recording else None
        return h_BTR.to(x.dtype) * F.silu(self.gate_proj(x)), (h_BTR[:, -1],), history


def is_plain_linear(module: nn.Module) -> bool:
    """True if a module computes its weight and bias alone: no adapter, quantiser, hook or offloading."""
    return (
        type(module) is nn.Linear
        and type(module.weight) in (nn.Parameter, torch.Tensor)  # a quantiser may use its own tensor class
        and "forward" not in module.__dict__
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and not _has_any_global_hook()
    )
