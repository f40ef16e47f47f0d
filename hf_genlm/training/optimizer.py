"""The optimizer of a recipe, built where Trainer wants it built.

`Trainer(optimizer_cls_and_kwargs=(OptimizerFactory, {"recipe": ...}))` calls `OptimizerFactory()(model,
recipe)` once the model lies where it will be trained. A new optimizer is a new row of OPTIMIZERS.
"""

from collections.abc import Callable

import torch
from torch import nn

from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.recipe import TrainingRecipe


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


OPTIMIZERS: dict[str, Callable[[nn.Module, TrainingRecipe], torch.optim.Optimizer]] = {"adamw": adamw}


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
