"""Muon for the matrices of the layers and AdamW for the rest, as one optimizer.

The momentum of a matrix is made orthogonal before it is added: every direction that its gradients point in
moves by the same amount (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/).

Shapes: N matrices, R rows, C columns.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw

from hf_genlm.errors import UserError

# what a group may leave out, by its `method`
DEFAULTS: dict[str, dict[str, Any]] = {
    "muon": {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "n_matrices": 1, "iterations": 3},
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "fused": True},
}
# (a, b, c) of x <- a x + b (x x^T) x + c (x x^T)^2 x: not a limit but a quick way to singular values near 1
_QUINTIC = (3.4445, -4.7750, 2.0315)
_LEAST_NORM = 1e-12  # a gradient of zeros stays one


class Muon(torch.optim.Optimizer):
    """Each parameter group names its `method`, "muon" or "adamw", and what differs from DEFAULTS.

    A group of "muon" holds matrices, each of which may be `n_matrices` stacked by rows, such as the gates of
    a cell: they are made orthogonal one by one, in so many `iterations`. Its momentum is Nesterov's and its
    weight decay decoupled. Three iterations instead of five: see recipes/LOG.md.

    Under DistributedDataParallel every process makes the same step from the averaged gradients. A matrix of
    which a process holds only a part (FSDP, ZeRO) is refused.

    Raises:
        ValueError: an unknown method.
        UserError: at `step`, for a sharded matrix.
    """

    def __init__(self, params: list[dict[str, Any]]):
        super().__init__(params, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with the DEFAULTS of the method."""
        method = param_group.get("method")
        if method not in DEFAULTS:
            raise ValueError(f"a parameter group has the method {method!r}; known: {', '.join(DEFAULTS)}")
        super().add_param_group({**DEFAULTS[method], **param_group})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient; the value of `closure`, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        steps = {"muon": self._step_muon, "adamw": self._step_adamw}
        for group in self.param_groups:
            steps[group["method"]](group, [p for p in group["params"] if p.grad is not None])
        return loss

    def _step_muon(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        batches = defaultdict(list)  # what can be multiplied at once: the weights and their directions
        for parameter in parameters:
            _refuse_sharded(parameter)
            state, beta = self.state[parameter], group["momentum"]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - beta)
            stacked = (group["n_matrices"], -1)
            weight_NRC = parameter.unflatten(0, stacked)
            wide_NRC = _as_wide(parameter.grad.lerp(momentum, beta).unflatten(0, stacked))
            batches[wide_NRC.shape[1:], wide_NRC.device, wide_NRC.dtype].append((weight_NRC, wide_NRC))
        for batch in batches.values():
            weights, directions = zip(*batch, strict=True)
            orthogonal = orthogonalize(torch.cat(directions), group["iterations"])
            each_NRC = orthogonal.split([len(weight) for weight in weights])
            for weight_NRC, wide_NRC in zip(weights, each_NRC, strict=True):
                rate = group["lr"] * step_scale(*weight_NRC.shape[1:])
                weight_NRC.mul_(1 - group["lr"] * group["weight_decay"])
                _as_wide(weight_NRC).sub_(wide_NRC, alpha=rate)

    def _step_adamw(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    step=torch.zeros((), dtype=torch.float32, device=parameter.device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalize(matrices_NRC: torch.Tensor, iterations: int) -> torch.Tensor:
    """Each with its singular values brought near 1, by a quintic Newton-Schulz iteration; those that are
    below 1 / 3.4 ** iterations of the norm stay smaller.

    Wide matrices cost less than tall ones: all products are over R x R. In bfloat16 where a GPU computes it,
    else in float32 at least.
    """
    norms = torch.linalg.matrix_norm(matrices_NRC, keepdim=True).clamp(min=_LEAST_NORM)
    x_NRC = (matrices_NRC / norms).to(_dtype_of_products(matrices_NRC))
    is_very_wide = x_NRC.shape[-1] > 2 * x_NRC.shape[-2]
    # bfloat16 would lose the small singular values, which the Gram matrix squares
    iterate = _iterate_on_gram if is_very_wide and x_NRC.dtype != torch.bfloat16 else _iterate
    return iterate(x_NRC, iterations).to(matrices_NRC.dtype)


def _iterate(x_NRC: torch.Tensor, iterations: int) -> torch.Tensor:
    a, b, c = _QUINTIC
    for _ in range(iterations):
        gram_NRR = x_NRC @ x_NRC.mT
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, factor_NRR, x_NRC, beta=a)
    return x_NRC


def _iterate_on_gram(x_NRC: torch.Tensor, iterations: int) -> torch.Tensor:
    """The same, through the columns at the beginning and the end alone: every x is a polynomial in the first
    Gram matrix, times the first x."""
    a, b, c = _QUINTIC
    gram_NRR = x_NRC @ x_NRC.mT
    product_NRR = torch.eye(x_NRC.shape[-2], dtype=x_NRC.dtype, device=x_NRC.device).expand_as(gram_NRR)
    for _ in range(iterations):
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        factor_NRR.diagonal(dim1=-2, dim2=-1).add_(a)
        product_NRR = factor_NRR @ product_NRR
        gram_NRR = factor_NRR @ gram_NRR @ factor_NRR
    return product_NRR @ x_NRC


def step_scale(rows: int, columns: int) -> float:
    """What an orthogonal matrix is multiplied by, as in Jordan et al.: every entry of the step then has the
    root mean square 1 / sqrt(columns), and the best rate changes little with the width.

    Measured against 0.2 sqrt(max(rows, columns)) (Liu et al., 2025, arXiv:2502.16982) in recipes/LOG.md.
    """
    return max(1.0, rows / columns) ** 0.5


def _as_wide(matrices_NRC: torch.Tensor) -> torch.Tensor:
    return matrices_NRC.mT if matrices_NRC.shape[-2] > matrices_NRC.shape[-1] else matrices_NRC


def _dtype_of_products(tensor: torch.Tensor) -> torch.dtype:
    if tensor.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.promote_types(tensor.dtype, torch.float32)


def _refuse_sharded(matrix: torch.Tensor) -> None:
    if matrix.ndim != 2 or hasattr(matrix, "full_tensor"):
        raise UserError(
            f"training.optimizer 'muon' needs whole matrices, and one of shape {tuple(matrix.shape)} is "
            "sharded or flattened: train by data parallelism alone (DDP), or with --set "
            "training.optimizer=adamw"
        )
