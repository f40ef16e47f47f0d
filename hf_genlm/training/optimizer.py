"""The optimizer of a recipe, built where Trainer wants it built.

`Trainer(optimizer_cls_and_kwargs=(OptimizerFactory, {"recipe": ...}))` calls `OptimizerFactory()(model,
recipe)` once the model lies where it will be trained. A new optimizer is a new row of OPTIMIZERS.
"""

from collections.abc import Callable

import torch
from torch import nn

from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.recipe import TrainingRecipe
from hf_genlm.training.muon import Muon


def adamw(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101); only matrices of the layers decay."""
    matrices, tables, rest = split_by_role(model)
    groups: list[dict] = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": tables, "weight_decay": 0.0, "lr": recipe.learning_rate * recipe.embedding_rate},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        fused=True,
    )


def muon(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """Muon for the matrices of the layers, gate by gate; AdamW for embeddings, head, biases and norms."""
    matrices, tables, rest = split_by_role(model)
    others = {"method": "adamw", "betas": (recipe.beta1, recipe.beta2)}
    ours = {
        "method": "muon",
        "lr": recipe.learning_rate * recipe.matrix_rate,
        "weight_decay": recipe.weight_decay,
    }
    groups: list[dict] = [
        # first: the log shows the rate of the first group as the learning rate
        {**others, "params": rest, "lr": recipe.learning_rate},
        {**others, "params": tables, "lr": recipe.learning_rate * recipe.embedding_rate},
    ]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    stacked = {id(linear.weight): getattr(linear, "n_matrices", 1) for linear in linears}
    for n_matrices in sorted(set(stacked.values())):
        group = [matrix for matrix in matrices if stacked.get(id(matrix), 1) == n_matrices]
        groups.append({**ours, "params": group, "n_matrices": n_matrices})
    return Muon([group for group in groups if group["params"]])


OPTIMIZERS: dict[str, Callable[[nn.Module, TrainingRecipe], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
}


class OptimizerFactory:
    """What Trainer calls with the placed model."""

    def __call__(self, model: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
        return OPTIMIZERS[recipe.optimizer](model, recipe)


def check_optimizer(name: str) -> None:
    """
    Raises:
        UserError: `name` is not in OPTIMIZERS.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"unknown training.optimizer {name!r}{did_you_mean(name, OPTIMIZERS)}")


def split_by_role(
    model: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters: matrices of the layers; embeddings and head; biases and norms."""
    of_tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = getattr(model, "lm_head", None)
    of_tables |= {id(p) for p in head.parameters()} if head is not None else set()
    matrices: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            role = rest if parameter.ndim < 2 else tables if id(parameter) in of_tables else matrices
            role.append(parameter)
    return matrices, tables, rest
