"""Norms and weighted sums of the gradients of each example of a batch, without storing those gradients.

Ghost clipping (Li et al., 2022, arXiv:2110.05679) with book-keeping (Bu et al., 2023, arXiv:2210.00038): the
gradient of a matrix is a sum over time of outer products of the gradient of its output and its input. Their
inner products give the norm of the sum, and one multiplication its weighted sum over the batch. All uses of a
parameter are gathered in one list, so tied, factorised and shared layers are exact.

A fused recurrent kernel hides the states that this needs, so it is replaced by `unroll_recurrence`: a cell is
elementwise except for one product, v_t = U h_{t-1} + c. So all of its derivatives are diagonal and computed
for all steps at once, by autograd from the cell's definition; backwards through time remain one product and a
few sums per step.

Shapes: B examples, T places in time (of all uses of a parameter, concatenated), O outputs and I inputs of a
matrix, G gates, S states, R recurrent_size.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_genlm.model.recurrence_genlm import ElmanCell, GRUCell, LSTMCell
from hf_genlm.model.scan_genlm import scan_steps

CellStep = Callable[..., tuple[torch.Tensor, ...]]


class Use(NamedTuple):
    """A use of a matrix (O, I), whose gradient is the sum over time of left_t right_t^T."""

    left: torch.Tensor  # (B, T, O); or (B, T) int64: the rows of an embedding table that were read
    right: torch.Tensor  # (B, T, I)

    @property
    def is_lookup(self) -> bool:
        """True if `left` holds rows of a table."""
        return not self.left.is_floating_point()


class PerExampleGradients(TorchFunctionMode):
    """Context manager around the forward pass of a batch; after the backward pass it has the gradients.

        with PerExampleGradients(model) as gradients:
            losses_B = ...
        losses_B.sum().backward()
        norms_B = gradients.squared_norms().sqrt()
        sums = gradients.weighted_sum((clip / norms_B).clamp(max=1))

    It writes no `.grad`. An operation on a parameter without a handler (`HANDLERS`, `CELL_STEPS`) does write
    one, which `squared_norms` refuses: no parameter is left out silently. Norms and sums are computed in
    float32 under autocast too: a norm rounded to bfloat16 would bound nothing.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._ids = {id(parameter) for parameter in self.parameters}
        # id of a transposed view -> (view, parameter): the reference keeps the id from being used again
        self._transposed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._uses: dict[int, list[Use]] = defaultdict(list)
        self._vectors: dict[int, torch.Tensor] = {}  # (B, O) gradients of biases and scales

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HANDLERS:
            return HANDLERS[func](self, *args, **(kwargs or {}))
        if func in CELL_STEPS:
            return self._recurrence(CELL_STEPS[func], *args)
        return func(*args, **(kwargs or {}))

    def squared_norms(self) -> torch.Tensor:
        """(B,) squared norms of the examples' gradients over all parameters.

        Raises:
            RuntimeError: a parameter was used by an operation without a handler.
        """
        missed = [parameter for parameter in self.parameters if parameter.grad is not None]
        if missed:
            raise RuntimeError(f"{len(missed)} parameters were used by an operation that HANDLERS lacks")
        with self._in_float32():
            of_matrices = [_squared_norms(uses) for uses in self._uses.values()]
        of_vectors = [vectors.square().sum(-1) for vectors in self._vectors.values()]
        return torch.stack(of_matrices + of_vectors).sum(0).clamp_min(0)

    def weighted_sum(self, weights: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradients of each of `parameters` summed with `weights` (B,); None for an unused one."""
        with self._in_float32():
            return [self._weighted_sum_of(parameter, weights) for parameter in self.parameters]

    def _in_float32(self) -> torch.autocast:
        return torch.autocast(self.parameters[0].device.type, enabled=False)

    def _weighted_sum_of(self, parameter: nn.Parameter, weights_B: torch.Tensor) -> torch.Tensor | None:
        if id(parameter) in self._vectors:
            return (weights_B @ self._vectors[id(parameter)]).view_as(parameter)
        uses = self._uses.get(id(parameter))
        if uses is None:
            return None
        total = torch.zeros_like(parameter, dtype=torch.float32)
        for left, right in uses:
            weighted = (right * weights_B[:, None, None]).flatten(0, 1)
            if left.is_floating_point():
                total.addmm_(left.flatten(0, 1).t(), weighted)
            else:
                total.index_add_(0, left.flatten(), weighted)
        return total

    def _is_tracked(self, value: Any) -> bool:
        return id(value) in self._ids

    def _on_gradient(self, output: torch.Tensor, record: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Have `record` called with the gradient of `output` in float32 during the backward pass."""
        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(lambda gradient: record(gradient.detach().float()))
        return output

    def _add_vector(self, parameter: torch.Tensor, vectors_BO: torch.Tensor) -> None:
        before = self._vectors.get(id(parameter))
        self._vectors[id(parameter)] = vectors_BO if before is None else before + vectors_BO

    def _linear(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        view, parameter = self._transposed.get(id(weight), (None, weight))
        tracks_weight, tracks_bias = self._is_tracked(parameter), self._is_tracked(bias)
        if not (tracks_weight or tracks_bias):
            return F.linear(input, weight, bias)
        output = F.linear(
            input,
            weight.detach() if tracks_weight else weight,
            bias.detach() if bias is not None and tracks_bias else bias,
        )
        inputs = input.detach()

        def record(gradient: torch.Tensor) -> None:
            gradient_BTO = _over_time(gradient)
            if tracks_weight:
                use = Use(gradient_BTO, _over_time(inputs.float()))
                self._uses[id(parameter)].append(use if view is None else Use(use.right, use.left))
            if bias is not None and tracks_bias:
                self._add_vector(bias, gradient_BTO.sum(1))

        return self._on_gradient(output, record)

    def _embedding(
        self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if not self._is_tracked(weight):
            return F.embedding(input, weight, *args, **kwargs)
        output = F.embedding(input, weight.detach(), *args, **kwargs)
        return self._on_gradient(output, lambda gradient: self._uses[id(weight)].append(Use(input, gradient)))

    def _multiply(self, first: Any, second: Any) -> torch.Tensor:
        scale, values = (first, second) if self._is_tracked(first) else (second, first)
        if not self._is_tracked(scale):
            return torch.mul(first, second)
        inputs = values.detach()
        return self._on_gradient(
            torch.mul(scale.detach(), values),
            lambda gradient: self._add_vector(scale, _over_time(gradient * inputs).sum(1)),
        )

    def _transpose(self, matrix: torch.Tensor) -> torch.Tensor:
        if not self._is_tracked(matrix):
            return matrix.t()
        view = matrix.detach().t()
        self._transposed[id(view)] = (view, matrix)
        return view

    def _recurrence(self, step: CellStep, x: torch.Tensor, given: Any, weights: list, *args: Any) -> tuple:
        """(outputs, *last states) as the fused kernel returns them, of rows that are one document each."""
        in_weight, rec_weight, in_bias, rec_bias = weights
        states = [state[0] for state in (given if isinstance(given, tuple) else (given,))]
        u_BTG = self._linear(x, in_weight, in_bias)

        def record(dv_BTG: torch.Tensor, h_BTR: torch.Tensor) -> None:
            self._uses[id(rec_weight)].append(Use(dv_BTG, h_BTR))
            if self._is_tracked(rec_bias):
                self._add_vector(rec_bias, dv_BTG.sum(1))

        outputs, last = unroll_recurrence(step, u_BTG, rec_weight.detach(), rec_bias.detach(), states, record)
        return outputs, *(state[None] for state in last)


# the operations that a model may apply to a parameter
HANDLERS: dict[Any, Callable] = {
    F.linear: PerExampleGradients._linear,
    F.embedding: PerExampleGradients._embedding,
    torch.Tensor.mul: PerExampleGradients._multiply,
    torch.Tensor.t: PerExampleGradients._transpose,
}
# fused kernel of a cell -> definition of the cell, which does not use its first argument (self)
CELL_STEPS: dict[Any, CellStep] = {
    torch.rnn_tanh: ElmanCell.step,
    torch.gru: GRUCell.step,
    torch.lstm: LSTMCell.step,
}


def _over_time(values: torch.Tensor) -> torch.Tensor:
    """Flatten (B, ..., O) to (B, T, O)."""
    return values.reshape(len(values), -1, values.shape[-1])


def _squared_norms(uses: list[Use]) -> torch.Tensor:
    """(B,) squared norms of the sum of all uses of a matrix."""
    dense = _concatenate([use for use in uses if not use.is_lookup])
    lookup = _concatenate([use for use in uses if use.is_lookup])
    if lookup is None:
        assert dense is not None
        return _squared_norms_of_dense(*dense)
    ids_BT, right_BTI = lookup
    is_same_BTT = ids_BT[:, :, None] == ids_BT[:, None, :]
    total = (is_same_BTT * (right_BTI @ right_BTI.mT)).sum((1, 2))
    if dense is not None:
        left_BSO, right_BSI = dense
        at_ids_BST = left_BSO.gather(2, ids_BT[:, None, :].expand(-1, left_BSO.shape[1], -1))
        cross = 2 * (at_ids_BST * (right_BSI @ right_BTI.mT)).sum((1, 2))
        total = total + _squared_norms_of_dense(*dense) + cross
    return total


def _squared_norms_of_dense(left_BTO: torch.Tensor, right_BTI: torch.Tensor) -> torch.Tensor:
    """By inner products over time, or by the gradients themselves if those are smaller."""
    n_times, n_out, n_in = left_BTO.shape[1], left_BTO.shape[2], right_BTI.shape[2]
    if n_times * (n_out + n_in) < n_out * n_in:
        return ((left_BTO @ left_BTO.mT) * (right_BTI @ right_BTI.mT)).sum((1, 2))
    return (left_BTO.mT @ right_BTI).square().sum((1, 2))


def _concatenate(uses: list[Use]) -> Use | None:
    if len(uses) < 2:
        return uses[0] if uses else None
    return Use(*(torch.cat(parts, dim=1) for parts in zip(*uses, strict=True)))


def unroll_recurrence(
    step: CellStep,
    u_BTG: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    states: Sequence[torch.Tensor],
    record: Callable[[torch.Tensor, torch.Tensor], None],
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Compute the recurrence over u = in_proj(x) (B, T, G R), differentiable in u.

    Args:
        weight, bias: U (G R, R) and c (G R,). The backward pass calls `record(dv, h)`, from which their
            gradients follow: dv (B, T, G R) is the gradient of v, h (B, T, R) are the states multiplied by U.
        states: each (B, R), constants.

    Returns:
        outputs (B, T, R), and the last states.
    """
    outputs, *last = _Recurrence.apply(u_BTG, step, weight, bias, tuple(states), record)
    return outputs, last


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u_BTG, step, weight, bias, states, record):
        def advance(states, inputs):
            return step(None, inputs[0], torch.addmm(bias, states[0], weight.t()), states)

        last, history = scan_steps(advance, states, [u_BTG])
        ctx.step, ctx.record = step, record
        ctx.save_for_backward(u_BTG, weight, bias, *history)
        ctx.mark_non_differentiable(*last)
        return history[0][:, 1:], *last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_outputs, *_):
        with torch.autocast(d_outputs.device.type, enabled=False):  # as in the forward pass of a kernel
            return _Recurrence._backward(ctx, d_outputs)

    @staticmethod
    def _backward(ctx, d_outputs):
        u_BTG, weight, bias, *history = ctx.saved_tensors
        before = [states[:, :-1] for states in history]
        v_BTG = torch.nn.functional.linear(before[0], weight, bias)
        by_u, by_v, by_state = _cell_derivatives(ctx.step, u_BTG, v_BTG, before)
        d_states = [torch.zeros_like(states[:, 0]) for states in before]  # gradients of the states after t
        du, dv = torch.empty_like(u_BTG), torch.empty_like(v_BTG)
        for t in reversed(range(u_BTG.shape[1])):
            d_states[0] = d_states[0] + d_outputs[:, t]
            d_BS1R = torch.stack(d_states, dim=1)[:, :, None]
            du[:, t] = (by_u[:, t] * d_BS1R).sum(1).flatten(1)
            dv[:, t] = (by_v[:, t] * d_BS1R).sum(1).flatten(1)
            d_states = list((by_state[:, t] * d_BS1R).sum(1).unbind(1))
            d_states[0] = torch.addmm(d_states[0], dv[:, t], weight)
        ctx.record(dv, before[0].contiguous())
        return du, None, None, None, None, None


def _cell_derivatives(
    step: CellStep, u_BTG: torch.Tensor, v_BTG: torch.Tensor, before: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Derivatives of each new state by u and v, (B, T, S, G, R), and by each old state, (B, T, S, S, R)."""
    with torch.enable_grad():
        inputs = [values.detach().requires_grad_() for values in (u_BTG, v_BTG, *before)]
        u, v, *states = (values.flatten(0, 1) for values in inputs)
        found = [
            torch.autograd.grad(
                state.sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for state in step(None, u, v, tuple(states))
        ]
    n_units = before[0].shape[-1]
    by_u, by_v = (
        torch.stack([each[i].unflatten(-1, (-1, n_units)) for each in found], dim=2) for i in (0, 1)
    )
    by_state = torch.stack([torch.stack(each[2:], dim=2) for each in found], dim=2)
    return by_u, by_v, by_state
