"""The optimizer of a recipe, built where Trainer wants it built.

`Trainer(optimizer_cls_and_kwargs=(OptimizerFactory, {"recipe": ...}))` calls `OptimizerFactory()(model,
recipe)` once the model lies where it will be trained. A new optimizer is a new row of OPTIMIZERS.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from hf_genlm.config.recipe import TrainingRecipe
from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.model.bigram_genlm import GenLMBigramEmbedding
from hf_genlm.training.muon import Muon


def adamw(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101); biases and norms do not decay."""
    matrices, tables, pairs, rest = split_by_role(model)
    decay, rate_of_tables = recipe.weight_decay, recipe.learning_rate * recipe.embedding_lr_ratio
    groups: list[dict] = [
        {"params": matrices, "weight_decay": decay},
        {"params": tables, "weight_decay": decay * recipe.embedding_decay_ratio, "lr": rate_of_tables},
        {"params": pairs, "weight_decay": decay * recipe.bigram_decay_ratio, "lr": rate_of_tables},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        fused=True,
    )


def muon(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """Muon for the matrices of the layers, gate by gate; AdamW for embeddings, head, biases and norms."""
    matrices, tables, pairs, rest = split_by_role(model)
    decay, rate_of_tables = recipe.weight_decay, recipe.learning_rate * recipe.embedding_lr_ratio
    others = {"method": "adamw", "betas": (recipe.adam_beta1, recipe.adam_beta2), "lr": rate_of_tables}
    ours = {"method": "muon", "lr": recipe.learning_rate * recipe.matrix_lr_ratio, "weight_decay": decay}
    groups: list[dict] = [
        # first: the log shows the rate of the first group as the learning rate
        {**others, "params": rest, "lr": recipe.learning_rate},
        {**others, "params": tables, "weight_decay": decay * recipe.embedding_decay_ratio},
        {**others, "params": pairs, "weight_decay": decay * recipe.bigram_decay_ratio},
    ]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    stacked = {id(linear.weight): getattr(linear, "n_matrices", 1) for linear in linears}
    for n_matrices in sorted(set(stacked.values())):
        group = [matrix for matrix in matrices if stacked.get(id(matrix), 1) == n_matrices]
        groups.append({**ours, "params": group, "n_matrices": n_matrices})
    return Muon([group for group in groups if group["params"]])


def sgd(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """Stochastic gradient descent with `beta1` as momentum: the update that private training began with."""
    decayed, tables, pairs, rest = split_by_role(model)
    groups: list[dict] = [
        {"params": [*decayed, *tables, *pairs], "weight_decay": recipe.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.adam_beta1)


OPTIMIZERS: dict[str, Callable[[nn.Module, TrainingRecipe], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
    "sgd": sgd,
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


class Roles(NamedTuple):
    """The trainable parameters of a model."""

    matrices: list[nn.Parameter]  # of the layers
    tables: list[nn.Parameter]  # embeddings and head
    pairs: list[nn.Parameter]  # the embedding of token pairs
    rest: list[nn.Parameter]  # biases and norms


def split_by_role(model: nn.Module) -> Roles:
    """Each trainable parameter in the one role that it has."""
    roles = Roles([], [], [], [])
    role_of: dict[int, list[nn.Parameter]] = {}
    for module in model.modules():
        is_table = isinstance(module, nn.Embedding) or module is getattr(model, "lm_head", None)
        if is_table:
            role = roles.pairs if isinstance(module, GenLMBigramEmbedding) else roles.tables
            role_of |= {id(parameter): role for parameter in module.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            role = roles.rest if parameter.ndim < 2 else role_of.get(id(parameter), roles.matrices)
            role.append(parameter)
    return roles
