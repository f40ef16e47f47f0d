"""Recurrences over the time axis: any step by step, linear ones in the form that is fastest on the device.

Shapes: B batch, T tokens, R recurrent_size.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F


def scan_steps(advance: Callable, states: tuple[torch.Tensor, ...], inputs: Sequence[torch.Tensor]):
    """Compute all states s_t = advance(s_{t-1}, inputs at t).

    Args:
        advance: maps states, each (B, R), and the list of `inputs` at one step to new states.
        inputs: each (B, T, ...).

    Returns:
        the last states, each (B, R), and the history of each (B, 1 + T, R), beginning with the given one.
    """
    if torch.compiler.is_exporting() and inputs[0].shape[1] != 1:
        return _exportable_scan(advance, states, inputs)
    history = [states]
    for t in range(inputs[0].shape[1]):
        history.append(advance(history[-1], [x[:, t] for x in inputs]))
    return history[-1], [torch.stack(slot, dim=1) for slot in zip(*history, strict=True)]


def _exportable_scan(advance, states, inputs):
    """One loop in the graph, not T copies of the step, so that an exported program accepts any length."""
    from torch._higher_order_ops.scan import scan

    def step(states, inputs):
        states = advance(tuple(states), inputs)
        return [state.clone() for state in states], [state.clone() for state in states]

    last, outputs = scan(step, [state.clone() for state in states], list(inputs), dim=1)
    history = [torch.cat([first[:, None], rest], dim=1) for first, rest in zip(states, outputs, strict=True)]
    return tuple(last), history


def linear_scan(decay: torch.Tensor, new: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """h_t = decay_t * h_{t-1} + new_t for all t, (B, T, R), from `decay`, `new` (B, T, R) and h_0 (B, R)."""
    if new.shape[1] == 1:
        return decay * initial[:, None] + new
    if torch.compiler.is_exporting():
        _, (history,) = scan_steps(lambda h, x: (x[0] * h[0] + x[1],), (initial,), [decay, new])
        return history[:, 1:]
    return _LinearScan.apply(decay, new, initial)


class _LinearScan(torch.autograd.Function):
    """Linear recurrence whose gradient is the same recurrence backwards: g_t = grad_t + decay_{t+1} g_{t+1};
    d new = g, d decay_t = g_t h_{t-1}, d initial = decay_1 g_1.
    """

    @staticmethod
    def forward(ctx, decay, new, initial):
        h = _scan(decay, new, initial)
        ctx.save_for_backward(decay, h, initial)
        return h

    @staticmethod
    def backward(ctx, grad):
        decay, h, initial = ctx.saved_tensors
        following = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
        g = _scan(following, grad, torch.zeros_like(initial), backwards=True)
        before = torch.cat([initial[:, None], h[:, :-1]], dim=1)
        return g * before, g, decay[:, 0] * g[:, 0]


def _scan(decay: torch.Tensor, new: torch.Tensor, initial: torch.Tensor, backwards: bool = False):
    """Choose the form: on CPUs the sequential one, which has the least work; else few dependent steps."""
    if new.device.type == "cpu" and not torch.compiler.is_compiling():
        return _sequential_scan(decay, new, initial, backwards)
    is_for_kernel = new.is_cuda and new.dtype == torch.float32 and not torch.compiler.is_compiling()
    scan = fused_scan if is_for_kernel and _fla_kernel() is not None else _chunked_scan
    if backwards:
        return scan(decay.flip(1), new.flip(1), initial).flip(1)
    return scan(decay, new, initial)


def fused_scan(decay: torch.Tensor, new: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """`linear_scan` by flash-linear-attention's kernel of HGRN (Qin et al., 2023, arXiv:2311.04823).

    The kernel takes the logarithm of the decay, so a decay of 0 is replaced by the smallest normal number.
    """
    least = torch.finfo(decay.dtype).tiny
    h, _ = _fla_kernel()(new.contiguous(), decay.clamp(min=least).log().contiguous(), initial.contiguous())
    return h


@functools.cache
def _fla_kernel() -> Callable | None:
    try:
        from fla.ops.hgrn import fused_recurrent_hgrn
    except ImportError:
        return None
    return fused_recurrent_hgrn


def _sequential_scan(decay, new, state, backwards=False):
    h = torch.empty_like(new)
    steps = list(zip(decay.unbind(1), new.unbind(1), h.unbind(1), strict=True))
    for decay_t, new_t, h_t in reversed(steps) if backwards else steps:
        state = torch.addcmul(new_t, decay_t, state, out=h_t)
    return h


def _chunked_scan(decay: torch.Tensor, new: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """Solve chunks in parallel, then join them: about 2 sqrt(T) dependent steps instead of T."""
    n_rows, n_tokens, width = new.shape
    length = max(1, round(n_tokens**0.5))
    missing = -n_tokens % length
    if missing:
        decay, new = F.pad(decay, (0, 0, 0, missing)), F.pad(new, (0, 0, 0, missing))
    decay = decay.reshape(n_rows, -1, length, width)
    local = new.reshape(n_rows, -1, length, width).clone()
    reach = decay.clone()  # the product of decays from the chunk's start
    for t in range(1, length):
        local[:, :, t].addcmul_(decay[:, :, t], local[:, :, t - 1])
        reach[:, :, t].mul_(reach[:, :, t - 1])
    carried = [initial]
    for chunk in range(local.shape[1] - 1):
        carried.append(torch.addcmul(local[:, chunk, -1], reach[:, chunk, -1], carried[-1]))
    h = local.addcmul_(reach, torch.stack(carried, dim=1).unsqueeze(2))
    return h.view(n_rows, -1, width)[:, :n_tokens]
