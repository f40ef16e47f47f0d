"""Next-token loss L = - sum_t log P(w_t | w_<t), from all logits or without storing them all at once.

Shapes: B batch, T tokens, N rows (B * T), V vocabulary, R inputs of the head.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .recurrence_genlm import is_plain_linear

# logits stored at once by the loss without logits; chosen by recipes/benchmarks/loss_memory.py
MAX_LOGITS_AT_ONCE = 1 << 24
# of the network's own loss in the gradients beside counts, if training does not say another
NETWORK_SHARE = 0.25


class Counted(NamedTuple):
    """Predictions beside a network, and the gate of their mixture g p + (1 - g) q with its p."""

    gate: torch.Tensor  # (B, T) logit of g
    log_q: torch.Tensor  # (B, T) log q of the next token
    network_share: float = 0.0  # of the network's own loss in the gradients; the rest is the mixture's


def cap_logits(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118, section 2), or unchanged if None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def causal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Next-token loss of all logits, with two terms that transformers' ForCausalLMLoss lacks.

    Args:
        logits: (B, T, V), after `cap_logits`.
        labels: (B, T), not shifted; or `shift_labels`: (B, T), already shifted.
        label_smoothing: share of the target spread evenly over the vocabulary (Szegedy et al., 2015,
            arXiv:1512.00567).
        z_loss: weight of log^2 of the normaliser, to keep it near 1 (PaLM, arXiv:2204.02311, section 5).
        num_items_in_batch: divisor of the sum; None: the number of labels.

    Returns:
        the loss in nats.
    """
    targets = _targets(logits, labels, shift_labels, ignore_index)
    logits_NV = logits.flatten(0, -2)
    logits_NV = logits_NV.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(
        logits_NV, targets, reduction="sum", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    if z_loss:
        log_normalizers = torch.logsumexp(logits_NV, dim=-1).masked_fill(targets == ignore_index, 0.0)
        total = total + z_loss * log_normalizers.square().sum()
    return _per_item(total, targets, num_items_in_batch, ignore_index)


def causal_loss_without_logits(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    counted: Counted | None = None,
    **kwargs,
) -> torch.Tensor:
    """`causal_loss` of cap_logits(states @ weight.T + bias), computed for a few rows of logits at a time.

    Args:
        states: (B, T, R).
        weight, bias: (V, R) and (V,), or None.
        counted: the counts that these logits are mixed with.
        others: as in `causal_loss`.

    Returns:
        the loss in nats; its gradients equal those of `causal_loss` up to rounding. Differentiable once.
    """
    targets = _targets(states, labels, shift_labels, ignore_index)
    terms = _Terms(softcap, label_smoothing, z_loss, ignore_index, torch.is_grad_enabled())
    is_for_liger = states.is_cuda and states.dtype != torch.float64 and not torch.compiler.is_compiling()
    if counted is not None:
        gate, log_q = counted.gate.flatten(), counted.log_q.flatten()
        terms = terms._replace(network_share=counted.network_share)
        total = _HeadLoss.apply(states.flatten(0, -2), weight, bias, targets, terms, gate, log_q)
    elif is_for_liger and _liger_kernel():
        total = liger_loss(states.flatten(0, -2), weight, bias, targets, terms)
    else:
        total = _HeadLoss.apply(states.flatten(0, -2), weight, bias, targets, terms)
    return _per_item(total, targets, num_items_in_batch, ignore_index)


class _Terms(NamedTuple):
    softcap: float | None
    label_smoothing: float
    z_loss: float
    ignore_index: int
    needs_grad: bool
    network_share: float = 1.0  # of the network's own loss in the gradients, beside that of its mixture


class _HeadLoss(torch.autograd.Function):
    """Loss of a head summed over rows; the gradients are computed in the forward pass, chunk by chunk.

    With u = W x + b, l = c tanh(u / c), p = softmax(l), z = logsumexp(l), target y and smoothing s:

        loss      = z - (1 - s) l_y - s mean(l) + k z^2
        dloss/dl  = (1 + 2 k z) p - (1 - s) [y] - s / V
        dl/du     = 1 - (l / c)^2

    With counts, q their probability of y, and a gate g = sigmoid(a), the loss is the mixture's,
    -log(g p_y + (1 - g) q), of which the network has the part r = g p_y / (g p_y + (1 - g) q). The gradients
    are those above by a share n, and by the share 1 - n those of the mixture:

        dmixture/dl = r (p - [y]),   dmixture/da = g - r,   dmixture/dlog q = r - 1
    """

    @staticmethod
    def forward(ctx, states, weight, bias, targets, terms, gate=None, log_q=None):
        dtype = torch.promote_types(states.dtype, torch.float32)
        inputs = (states, weight, bias, gate, log_q)
        are_needed = (*ctx.needs_input_grad[:3], *(ctx.needs_input_grad[5:] or (False, False)))
        needed = [terms.needs_grad and needs for needs in are_needed]
        grads = [torch.zeros_like(t, dtype=dtype) if n else None for t, n in zip(inputs, needed, strict=True)]
        total = torch.zeros((), dtype=dtype, device=states.device)
        states, weight, bias = _as_autocast(states, weight, bias)
        n_rows = min(len(targets), max(1, MAX_LOGITS_AT_ONCE // weight.shape[0]))
        buffer = torch.empty(n_rows, weight.shape[0], dtype=dtype, device=states.device)  # new memory is slow
        for start in range(0, len(targets), n_rows):
            rows = slice(start, start + n_rows)
            logits = buffer[: len(targets[rows])]
            if weight.dtype == dtype:
                torch.mm(states[rows], weight.t(), out=logits)
            else:
                logits.copy_(states[rows] @ weight.t())
            if bias is not None:
                logits.add_(bias)
            beside = None if gate is None else (gate[rows], log_q[rows])
            losses, of_beside = _rows_loss(logits, targets[rows], terms, gradient=any(needed), beside=beside)
            total += losses
            grad = logits.to(weight.dtype)  # `_rows_loss` has overwritten them
            if needed[0]:
                grads[0][rows] = grad @ weight
            if needed[1] and weight.dtype == dtype:
                grads[1].addmm_(grad.t(), states[rows])
            elif needed[1]:
                grads[1] += grad.t() @ states[rows]
            if needed[2]:
                grads[2] += logits.sum(0)
            for index in (3, 4):
                if needed[index]:
                    grads[index][rows] = of_beside[index - 3]
        grads = [None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)]
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total):
        grads = [None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors]
        return (*grads[:3], None, None, *grads[3:])[: len(ctx.needs_input_grad)]


def liger_loss(states, weight, bias, targets, terms: _Terms) -> torch.Tensor:
    """`_HeadLoss` by Liger's kernels (Hsu et al., 2024, arXiv:2410.10989), in fewer passes over memory.

    Raises:
        IndexError: a target beyond the vocabulary, at which the kernels would write past their logits.
    """
    is_outside = ((targets < 0) | (targets >= len(weight))) & (targets != terms.ignore_index)
    if is_outside.any():
        raise IndexError(f"Target {int(targets[is_outside][0])} is out of bounds.")
    return _liger_kernel()(
        states,
        weight,
        targets,
        bias,
        ignore_index=terms.ignore_index,
        lse_square_scale=terms.z_loss,
        label_smoothing=terms.label_smoothing,
        reduction="sum",
        softcap=terms.softcap,
        accum_dtype=torch.float32,
    )


@functools.cache
def _liger_kernel() -> Callable | None:
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return None
    return liger_fused_linear_cross_entropy


def _as_autocast(*tensors):
    """Cast to the dtype of autocast if it is enabled, which does not act inside a Function."""
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return [t if t is None else t.to(dtype) for t in tensors]


def _rows_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    terms: _Terms,
    gradient: bool,
    beside: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Sum the loss of these rows; if `beside` holds a gate (N,) and log q (N,), its gradients by these.

    `logits` (N, V) are overwritten, with `gradient` by their gradient.
    """
    softcap, label_smoothing, z_loss, ignore_index, _, share = terms
    counted = targets != ignore_index
    index = targets.masked_fill(~counted, 0)[:, None]
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = 1 - logits.square() if gradient else None
        logits.mul_(softcap)
    hits = logits.gather(1, index).squeeze(1)
    mean = logits.mean(-1) if label_smoothing else 0.0
    largest = logits.amax(-1)
    torch.softmax(logits, dim=-1, out=logits)
    normalizer = largest - logits.amax(-1).log()  # logsumexp without computing the exponentials again
    losses = normalizer - (1 - label_smoothing) * hits - label_smoothing * mean + z_loss * normalizer.square()
    # the gradient by the logits is of_p p - of_target [y] - label_smoothing * share / V
    of_p, of_target, of_beside = 1 + 2 * z_loss * normalizer, torch.full_like(hits, 1 - label_smoothing), None
    if beside is not None:
        gate, log_q = beside
        of_network = F.logsigmoid(gate) + hits - normalizer
        mixed = torch.logaddexp(of_network, F.logsigmoid(-gate) + log_q)
        part = (1 - share) * (of_network - mixed).exp()  # of the network, r
        losses = -mixed
        of_p, of_target = share * of_p + part, share * of_target + part
        of_gate = (1 - share) * torch.sigmoid(gate) - part
        of_beside = of_gate.masked_fill(~counted, 0.0), (part - (1 - share)).masked_fill(~counted, 0.0)
    if gradient:
        logits.mul_((of_p * counted)[:, None])
        if label_smoothing:
            logits.sub_((share * label_smoothing / logits.shape[1] * counted)[:, None])
        logits.scatter_add_(1, index, -(of_target * counted)[:, None])
        if slope is not None:
            logits.mul_(slope)
    return losses.masked_fill(~counted, 0.0).sum(), of_beside


def is_plain_head(head: torch.nn.Module) -> bool:
    """True if a loss may read the weight of a head instead of calling it.

    FSDP gathers that weight with the embedding's, so its own two hooks on the head change nothing.
    """
    if type(head).__name__ == "FSDPLinear":
        n_hooks = len(head._forward_hooks), len(head._forward_pre_hooks)
        return n_hooks == (1, 1) and type(head.weight) is torch.nn.Parameter
    return is_plain_linear(head)


def with_gradient(value: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """`value`, to which the gradients of `added` are added."""
    return value + (added - added.detach())


def shift(labels, shift_labels=None, ignore_index=-100, **kwargs) -> torch.Tensor:
    """(B, T) the next token of each token; given ones as they are."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels


def _targets(values, labels, shift_labels, ignore_index):
    """(N,) the next token of each row."""
    targets = shift(labels, shift_labels, ignore_index).reshape(-1).to(values.device)
    n_rows, n_targets = math.prod(values.shape[:-1]), targets.shape[0]
    if n_targets != n_rows:  # torch's own message
        raise ValueError(f"Expected input batch_size ({n_rows}) to match target batch_size ({n_targets}).")
    return targets


def _per_item(total, targets, num_items_in_batch, ignore_index):
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device).clamp(
            min=1
        )  # rows of a chat may have no label
    return total / num_items_in_batch


def divide_by_num_items(forward: Callable) -> Callable:
    """Wrap a head's forward: divide its sum of losses by `num_items_in_batch`, if given, as Trainer expects.

    transformers' classification heads accept that argument and ignore it: gradient accumulation over n
    batches then gives n times the loss.
    """

    @functools.wraps(forward)
    def divided(self, *args, labels=None, num_items_in_batch=None, **kwargs):
        outputs = forward(self, *args, labels=labels, **kwargs)
        if labels is None or num_items_in_batch is None:
            return outputs
        scale = (labels != -100).sum() / num_items_in_batch
        if isinstance(outputs, tuple):
            return (outputs[0] * scale, *outputs[1:])
        outputs.loss = outputs.loss * scale
        return outputs

    return divided
