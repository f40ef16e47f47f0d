"""The optimizer of a recipe: AdamW, SGD, or Muon for the matrices of the layers with AdamW for the rest.

`Trainer(optimizer_cls_and_kwargs=(OptimizerFactory, {"recipe": ...}))` calls `OptimizerFactory()(model,
recipe)` once the model is on its device. A new optimizer is a new row of OPTIMIZERS.

Muon makes the momentum of a matrix orthogonal before it is added, so that every direction its gradients point
in moves by the same amount (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/).

Shapes: N matrices, R rows, C columns.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.optim.adamw import adamw as adamw_step

from hf_genlm.errors import UserError
from hf_genlm.model.bigram_genlm import GenLMBigramEmbedding
from hf_genlm.model.ngram_genlm import GenLMMixture

# hyperparameters of a parameter group of Muon that the group does not state, by its `method`
DEFAULTS: dict[str, dict[str, Any]] = {
    "muon": {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "n_matrices": 1, "iterations": 3},
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "fused": True},
}
# (a, b, c) of x <- a x + b (x x^T) x + c (x x^T)^2 x: does not converge, but comes near 1 in few iterations
_QUINTIC = (3.4445, -4.7750, 2.0315)
_MIN_NORM = 1e-12  # a zero gradient stays zero


class OptimizerRecipe(Protocol):
    """The fields of section `training` that an optimizer reads."""

    optimizer: str
    learning_rate: Any
    embedding_lr_ratio: Any
    matrix_lr_ratio: float
    weight_decay: Any
    embedding_decay_ratio: float
    bigram_decay_ratio: float
    adam_beta1: float
    adam_beta2: float


class Roles(NamedTuple):
    """The trainable parameters of a model by their role."""

    matrices: list[nn.Parameter]  # of the layers
    tables: list[nn.Parameter]  # embeddings and head
    bigrams: list[nn.Parameter]  # the bigram embedding
    rest: list[nn.Parameter]  # biases, norms and the gate of counts


def split_by_role(model: nn.Module) -> Roles:
    """Assign each trainable parameter to one role."""
    roles = Roles([], [], [], [])
    role_of: dict[int, list[nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is getattr(model, "lm_head", None):
            role = roles.bigrams if isinstance(module, GenLMBigramEmbedding) else roles.tables
            role_of |= {id(parameter): role for parameter in module.parameters()}
        elif isinstance(module, GenLMMixture):
            role_of |= {id(parameter): roles.rest for parameter in module.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            role = roles.rest if parameter.ndim < 2 else role_of.get(id(parameter), roles.matrices)
            role.append(parameter)
    return roles


def adamw(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101); biases and norms do not decay."""
    matrices, tables, bigrams, rest = split_by_role(model)
    decay, table_lr = recipe.weight_decay, recipe.learning_rate * recipe.embedding_lr_ratio
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay},
        {"params": tables, "weight_decay": decay * recipe.embedding_decay_ratio, "lr": table_lr},
        {"params": bigrams, "weight_decay": decay * recipe.bigram_decay_ratio, "lr": table_lr},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        fused=True,
    )


def muon(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """Muon for the matrices of the layers, gate by gate; AdamW for embeddings, head, biases and norms."""
    matrices, tables, bigrams, rest = split_by_role(model)
    decay, table_lr = recipe.weight_decay, recipe.learning_rate * recipe.embedding_lr_ratio
    others = {"method": "adamw", "betas": (recipe.adam_beta1, recipe.adam_beta2), "lr": table_lr}
    ours = {"method": "muon", "lr": recipe.learning_rate * recipe.matrix_lr_ratio, "weight_decay": decay}
    groups: list[dict[str, Any]] = [
        # first: the log shows the rate of the first group as the learning rate
        {**others, "params": rest, "lr": recipe.learning_rate},
        {**others, "params": tables, "weight_decay": decay * recipe.embedding_decay_ratio},
        {**others, "params": bigrams, "weight_decay": decay * recipe.bigram_decay_ratio},
    ]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    stacked: dict[int, int] = {id(linear.weight): getattr(linear, "n_matrices", 1) for linear in linears}
    for n_matrices in sorted(set(stacked.values())):
        group = [matrix for matrix in matrices if stacked.get(id(matrix), 1) == n_matrices]
        groups.append({**ours, "params": group, "n_matrices": n_matrices})
    return Muon([group for group in groups if group["params"]])


def sgd(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """Stochastic gradient descent with `adam_beta1` as momentum, the optimizer of DP-SGD."""
    matrices, tables, bigrams, rest = split_by_role(model)
    groups: list[dict[str, Any]] = [
        {"params": [*matrices, *tables, *bigrams], "weight_decay": recipe.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.adam_beta1)


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimizerRecipe], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
    "sgd": sgd,
}


class OptimizerFactory:
    """Builds the optimizer of a recipe for a model on its device; the class that Trainer is given."""

    def __call__(self, model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
        return OPTIMIZERS[recipe.optimizer](model, recipe)


def orthogonalize(matrices_NRC: torch.Tensor, iterations: int) -> torch.Tensor:
    """Bring the singular values of each matrix near 1, by a quintic Newton-Schulz iteration.

    Singular values below 1 / 3.4 ** iterations of the matrix norm stay smaller. All products are over R x R,
    so wide matrices cost less than tall ones. Computed in bfloat16 on a GPU that supports it, else in at
    least float32.
    """
    norms = torch.linalg.matrix_norm(matrices_NRC, keepdim=True).clamp(min=_MIN_NORM)
    x_NRC = (matrices_NRC / norms).to(_compute_dtype(matrices_NRC))
    a, b, c = _QUINTIC
    is_very_wide = x_NRC.shape[-1] > 2 * x_NRC.shape[-2]
    # bfloat16 would lose the small singular values, which the Gram matrix squares
    if is_very_wide and x_NRC.dtype != torch.bfloat16:
        # the same iteration by R x R matrices: every x is a polynomial in the Gram matrix times the first x
        gram_NRR = x_NRC @ x_NRC.mT
        product_NRR = torch.eye(x_NRC.shape[-2], dtype=x_NRC.dtype, device=x_NRC.device).expand_as(gram_NRR)
        for _ in range(iterations):
            factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
            factor_NRR.diagonal(dim1=-2, dim2=-1).add_(a)
            product_NRR = factor_NRR @ product_NRR
            gram_NRR = factor_NRR @ gram_NRR @ factor_NRR
        x_NRC = product_NRR @ x_NRC
    else:
        for _ in range(iterations):
            gram_NRR = x_NRC @ x_NRC.mT
            factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
            x_NRC = torch.baddbmm(x_NRC, factor_NRR, x_NRC, beta=a)
    return x_NRC.to(matrices_NRC.dtype)


def step_scale(rows: int, columns: int) -> float:
    """Return the factor of an orthogonal matrix in a step, as in Jordan et al.

    Every entry of the step then has the root mean square 1 / sqrt(columns), and the best learning rate
    changes little with the width. Measured against 0.2 sqrt(max(rows, columns)) (Liu et al., 2025,
    arXiv:2502.16982) in recipes/LOG.md.
    """
    return max(1.0, rows / columns) ** 0.5


class Muon(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer: each parameter group names its `method`, "muon" or "adamw".

    What a group leaves out is in DEFAULTS. A group of "muon" holds matrices, each of which may be
    `n_matrices` stacked by rows, such as the gates of a cell: they are made orthogonal one by one, by
    `orthogonalize` with `iterations`. Its momentum is Nesterov's and its weight decay decoupled. Three
    iterations instead of five: see recipes/LOG.md.

    Under DistributedDataParallel every process makes the same step from the averaged gradients. A matrix of
    which a process holds only a part (FSDP, ZeRO) is refused.

    Raises:
        ValueError: an unknown method.
        UserError: at `step`, for a sharded matrix.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        orthogonalize: Callable[[torch.Tensor, int], torch.Tensor] = orthogonalize,
    ):
        self.orthogonalize = orthogonalize
        super().__init__(params, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, with the DEFAULTS of its method."""
        method = param_group.get("method")
        if method not in DEFAULTS:
            raise ValueError(f"a parameter group has the method {method!r}; known: {', '.join(DEFAULTS)}")
        super().add_param_group({**DEFAULTS[method], **param_group})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns the value of `closure`, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        steps = {"muon": self._step_muon, "adamw": self._step_adamw}
        for group in self.param_groups:
            steps[group["method"]](group, [p for p in group["params"] if p.grad is not None])
        return loss

    def _step_muon(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        batches = defaultdict(list)  # matrices of one shape are multiplied together: (weight, direction)
        for parameter in parameters:
            _refuse_sharded(parameter)
            assert parameter.grad is not None
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
            orthogonal = self.orthogonalize(torch.cat(directions), group["iterations"])
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
        adamw_step(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
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


def _as_wide(matrices_NRC: torch.Tensor) -> torch.Tensor:
    return matrices_NRC.mT if matrices_NRC.shape[-2] > matrices_NRC.shape[-1] else matrices_NRC


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
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
