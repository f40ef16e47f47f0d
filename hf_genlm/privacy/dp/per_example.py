"""What each example of a batch gives to the gradient: its length, and weighted sums, without holding it.

Ghost clipping (Li et al., 2022, arXiv:2110.05679) with book-keeping (Bu et al., 2023, arXiv:2210.00038): the
gradient of a matrix is a sum over time of outer products, of the gradient of what the matrix gave and of what
it read. Their inner products give the length of the sum, and one multiplication its weighted sum over the
batch. All uses of a parameter are one list, so a table that is the head too, a factorised one and shared
layers are as exact as any.

Shapes: B examples, T places in time (of all uses of a parameter, one behind the other), O what a matrix
gives, I what it reads.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_genlm.privacy.dp.recurrence import CELLS, Step, follow_recurrence


class Outer(NamedTuple):
    """A use of a matrix (O, I): its gradient is the sum over time of left_t right_t^T."""

    left: torch.Tensor  # (B, T, O); or (B, T) int64: the rows of a table that were read
    right: torch.Tensor  # (B, T, I)

    @property
    def is_lookup(self) -> bool:
        """True if `left` tells rows of a table."""
        return not self.left.is_floating_point()


class PerExampleGradients(TorchFunctionMode):
    """Stands around the forward pass of a batch; after the backward pass it knows the gradients.

        with PerExampleGradients(model) as gradients:
            losses_B = ...
        losses_B.sum().backward()
        norms_B = gradients.squared_norms().sqrt()
        sums = gradients.weighted_sum((clip / norms_B).clamp(max=1))

    No `.grad` is written. A use of a parameter that is not known here (`FOLLOWED`) would write one, and
    `squared_norms` refuses then: no parameter is left out silently. Lengths and sums are taken in float32
    under autocast too: one that is rounded to bfloat16 would bound nothing.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._ids = {id(parameter) for parameter in self.parameters}
        self._turned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # a view keeps its id while it lives
        self._outer: dict[int, list[Outer]] = defaultdict(list)
        self._vectors: dict[int, torch.Tensor] = {}  # (B, O) of what is added or multiplied

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        follow = FOLLOWED.get(func)
        if follow is not None:
            return follow(self, *args, **(kwargs or {}))
        if func in CELLS:
            return self._recurrence(CELLS[func], *args)
        return func(*args, **(kwargs or {}))

    def squared_norms(self) -> torch.Tensor:
        """(B,) squared lengths of the examples' gradients over all parameters.

        Raises:
            RuntimeError: a parameter was used in a way that is not followed.
        """
        missed = [parameter for parameter in self.parameters if parameter.grad is not None]
        if missed:
            raise RuntimeError(f"a use of {len(missed)} parameters is none that FOLLOWED knows")
        with self._in_float32():
            of_matrices = [_squared_norms(uses) for uses in self._outer.values()]
        of_vectors = [vectors.square().sum(-1) for vectors in self._vectors.values()]
        return torch.stack(of_matrices + of_vectors).sum(0).clamp_min(0)

    def weighted_sum(self, weights: torch.Tensor) -> list[torch.Tensor | None]:
        """For each of `parameters` the gradients summed with `weights` (B,); None where it was not used."""
        with self._in_float32():
            return [self._sum_of(parameter, weights) for parameter in self.parameters]

    def _in_float32(self) -> torch.autocast:
        return torch.autocast(self.parameters[0].device.type, enabled=False)

    def _sum_of(self, parameter: nn.Parameter, weights_B: torch.Tensor) -> torch.Tensor | None:
        if id(parameter) in self._vectors:
            return (weights_B @ self._vectors[id(parameter)]).view_as(parameter)
        uses = self._outer.get(id(parameter))
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

    def _follows(self, value: Any) -> bool:
        return id(value) in self._ids

    def _on_gradient(self, output: torch.Tensor, note: Callable[[torch.Tensor], None]) -> torch.Tensor:
        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(lambda gradient: note(gradient.detach().float()))
        return output

    def _note_outer(self, parameter: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        self._outer[id(parameter)].append(Outer(left, right))

    def _note_vector(self, parameter: torch.Tensor, vectors_BO: torch.Tensor) -> None:
        before = self._vectors.get(id(parameter))
        self._vectors[id(parameter)] = vectors_BO if before is None else before + vectors_BO

    def _linear(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        view, parameter = self._turned.get(id(weight), (None, weight))
        follows_weight, follows_bias = self._follows(parameter), self._follows(bias)
        if not (follows_weight or follows_bias):
            return F.linear(input, weight, bias)
        output = F.linear(
            input,
            weight.detach() if follows_weight else weight,
            bias.detach() if bias is not None and follows_bias else bias,
        )
        read = input.detach()

        def note(gradient: torch.Tensor) -> None:
            gave = _over_time(gradient)
            if follows_weight:
                pair = (gave, _over_time(read.float()))
                self._note_outer(parameter, *(pair if view is None else pair[::-1]))
            if bias is not None and follows_bias:
                self._note_vector(bias, gave.sum(1))

        return self._on_gradient(output, note)

    def _embedding(
        self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if not self._follows(weight):
            return F.embedding(input, weight, *args, **kwargs)
        output = F.embedding(input, weight.detach(), *args, **kwargs)
        return self._on_gradient(output, lambda gradient: self._note_outer(weight, input, gradient))

    def _multiply(self, first: Any, second: Any) -> torch.Tensor:
        scale, values = (first, second) if self._follows(first) else (second, first)
        if not self._follows(scale):
            return torch.mul(first, second)
        read = values.detach()

        def note(gradient: torch.Tensor) -> None:
            self._note_vector(scale, _over_time(gradient * read).sum(1))

        return self._on_gradient(torch.mul(scale.detach(), values), note)

    def _turn(self, matrix: torch.Tensor) -> torch.Tensor:
        view = matrix.t()
        if self._follows(matrix):
            view = matrix.detach().t()
            self._turned[id(view)] = (view, matrix)
        return view

    def _recurrence(self, step: Step, x: torch.Tensor, given: Any, weights: list, *args: Any) -> tuple:
        """A kernel's (outputs, *last states), of rows that are one document each."""
        in_weight, rec_weight, in_bias, rec_bias = weights
        states = [state[0] for state in (given if isinstance(given, tuple) else (given,))]
        u_BTG = self._linear(x, in_weight, in_bias)

        def note(dv_BTG: torch.Tensor, h_BTR: torch.Tensor) -> None:
            self._note_outer(rec_weight, dv_BTG, h_BTR)
            if self._follows(rec_bias):
                self._note_vector(rec_bias, dv_BTG.sum(1))

        outputs, last = follow_recurrence(step, u_BTG, rec_weight.detach(), rec_bias.detach(), states, note)
        return outputs, *(state[None] for state in last)


# what a model may do with a parameter
FOLLOWED: dict[Any, Callable] = {
    F.linear: PerExampleGradients._linear,
    F.embedding: PerExampleGradients._embedding,
    torch.Tensor.mul: PerExampleGradients._multiply,
    torch.Tensor.t: PerExampleGradients._turn,
}


def _over_time(values: torch.Tensor) -> torch.Tensor:
    """(B, ..., O) to (B, T, O)."""
    return values.reshape(len(values), -1, values.shape[-1])


def _squared_norms(uses: list[Outer]) -> torch.Tensor:
    """(B,) squared lengths of the sum of all uses of a matrix."""
    dense = _joined([use for use in uses if not use.is_lookup])
    looked_up = _joined([use for use in uses if use.is_lookup])
    if looked_up is None:
        assert dense is not None
        return _of_dense(*dense)
    ids_BT, right_BTI = looked_up
    is_same_BTT = ids_BT[:, :, None] == ids_BT[:, None, :]
    total = (is_same_BTT * (right_BTI @ right_BTI.mT)).sum((1, 2))
    if dense is not None:
        left_BSO, right_BSI = dense
        at_ids_BST = left_BSO.gather(2, ids_BT[:, None, :].expand(-1, left_BSO.shape[1], -1))
        total = total + _of_dense(*dense) + 2 * (at_ids_BST * (right_BSI @ right_BTI.mT)).sum((1, 2))
    return total


def _of_dense(left_BTO: torch.Tensor, right_BTI: torch.Tensor) -> torch.Tensor:
    n_times, n_out, n_in = left_BTO.shape[1], left_BTO.shape[2], right_BTI.shape[2]
    if n_times * (n_out + n_in) < n_out * n_in:
        return ((left_BTO @ left_BTO.mT) * (right_BTI @ right_BTI.mT)).sum((1, 2))
    return (left_BTO.mT @ right_BTI).square().sum((1, 2))


def _joined(uses: list[Outer]) -> Outer | None:
    if len(uses) < 2:
        return uses[0] if uses else None
    return Outer(*(torch.cat(parts, dim=1) for parts in zip(*uses, strict=True)))
