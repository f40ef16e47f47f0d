"""A recurrent cell whose gradient is known at every step: what a fused kernel keeps to itself.

A cell is element by element but for one product, v_t = U h_{t-1} + c. So all of its derivatives are diagonal
and are taken for all steps at once, by autograd from the cell's own definition; what is left to do step by
step is one product and a few sums.

Shapes: B rows, T steps, R recurrent_size, G gates, S states.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_genlm.model.recurrence_genlm import ElmanCell, GRUCell, LSTMCell
from hf_genlm.model.scan_genlm import scan_steps

Step = Callable[..., tuple[torch.Tensor, ...]]
# the kernel that a cell calls: the cell's definition, which asks nothing of the cell itself
CELLS: dict[Any, Step] = {
    torch.rnn_tanh: ElmanCell.step,
    torch.gru: GRUCell.step,
    torch.lstm: LSTMCell.step,
}


def follow_recurrence(
    step: Step,
    u_BTG: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    states: Sequence[torch.Tensor],
    note: Callable[[torch.Tensor, torch.Tensor], None],
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The recurrence over u = in_proj(x) (B, T, G R), differentiable by u.

    Args:
        weight, bias: U (G R, R) and c (G R,), whose gradients `note(dv, h)` can make: dv (B, T, G R) is that
            of v, and h (B, T, R) the states that U was multiplied with.
        states: each (B, R), constants.

    Returns:
        outputs (B, T, R), and the last states.
    """
    outputs, *last = _Recurrence.apply(u_BTG, step, weight, bias, tuple(states), note)
    return outputs, last


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u_BTG, step, weight, bias, states, note):
        def advance(states, inputs):
            return step(None, inputs[0], torch.addmm(bias, states[0], weight.t()), states)

        last, history = scan_steps(advance, states, [u_BTG])
        ctx.step, ctx.note = step, note
        ctx.save_for_backward(u_BTG, weight, bias, *history)
        ctx.mark_non_differentiable(*last)
        return history[0][:, 1:], *last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_outputs, *_):
        with torch.autocast(d_outputs.device.type, enabled=False):  # as the forward pass of a kernel is
            return _Recurrence._backward(ctx, d_outputs)

    @staticmethod
    def _backward(ctx, d_outputs):
        u_BTG, weight, bias, *history = ctx.saved_tensors
        before = [states[:, :-1] for states in history]
        v_BTG = torch.nn.functional.linear(before[0], weight, bias)
        by_u, by_v, by_state = _derivatives(ctx.step, u_BTG, v_BTG, before)
        grown = [torch.zeros_like(states[:, 0]) for states in before]  # gradients of the states after a step
        du, dv = torch.empty_like(u_BTG), torch.empty_like(v_BTG)
        for t in reversed(range(u_BTG.shape[1])):
            grown[0] = grown[0] + d_outputs[:, t]
            grown_BSR = torch.stack(grown, dim=1)
            du[:, t] = (by_u[:, t] * grown_BSR[:, :, None]).sum(1).flatten(1)
            dv[:, t] = (by_v[:, t] * grown_BSR[:, :, None]).sum(1).flatten(1)
            through = (by_state[:, t] * grown_BSR[:, :, None]).sum(1)
            grown = list(through.unbind(1))
            grown[0] = torch.addmm(grown[0], dv[:, t], weight)
        ctx.note(dv, before[0].contiguous())
        return du, None, None, None, None, None


def _derivatives(
    step: Step, u_BTG: torch.Tensor, v_BTG: torch.Tensor, before: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each new state by u and v (B, T, S, G, R), and by each state before (B, T, S, S, R)."""
    with torch.enable_grad():
        inputs = [values.detach().requires_grad_() for values in (u_BTG, v_BTG, *before)]
        u, v, *states = (values.flatten(0, 1) for values in inputs)
        after = step(None, u, v, tuple(states))
        found = [
            torch.autograd.grad(
                state.sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for state in after
        ]
    n_units = before[0].shape[-1]
    by_u, by_v = (
        torch.stack([each[i].unflatten(-1, (-1, n_units)) for each in found], dim=2) for i in (0, 1)
    )
    by_state = torch.stack([torch.stack(each[2:], dim=2) for each in found], dim=2)
    return by_u, by_v, by_state
