"""Norm and MLP of a layer, applied to each token separately."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .configuration_genlm import GenLMConfig
from .initialization_genlm import start_isometric, start_near_zero


class GenLMRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 at least (Zhang, Sennrich, 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        normed = F.rms_norm(hidden_states.to(dtype), self.weight.shape, eps=self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)


class GenLMLowRankLinear(nn.Module):
    """x A B, with A (in_features x rank) and B (rank x out_features), instead of one full matrix: fewer
    parameters and multiplications if rank < in * out / (in + out)."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.reduce_proj = nn.Linear(in_features, rank, bias=False)
        self.expand_proj = nn.Linear(rank, out_features, bias=False)
        self.reduce_proj.start = start_isometric
        self.expand_proj.start = start_isometric

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.expand_proj(self.reduce_proj(hidden_states))


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2 with the gradient 2 relu(x), in half of the passes over memory that autograd needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return F.relu(x).square_()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return F.relu(x).mul(grad).mul_(2)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2 (So et al., 2021, arXiv:2109.08668)."""
    if torch.compiler.is_compiling():  # a compiler fuses the passes
        return F.relu(x).square()
    return _SquaredReLU.apply(x)


class GenLMMLP(nn.Module):
    """down(act(up(x))), or, gated, down(act(gate(x)) * up(x)) (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, config: GenLMConfig):
        super().__init__()
        wide, narrow, rank = config.intermediate_size, config.hidden_size, config.mlp_rank
        if rank is None:
            linear, last = partial(nn.Linear, bias=False), "down_proj"
        else:
            linear, last = partial(GenLMLowRankLinear, rank=rank), "down_proj.expand_proj"
        self.gate_proj = linear(narrow, wide) if config.gated_mlp else None
        self.up_proj = linear(narrow, wide)
        self.down_proj = linear(wide, narrow)
        self.get_submodule(last).start = partial(start_near_zero, config=config)
        self.act_fn = squared_relu if config.hidden_act == "relu2" else ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, T, hidden_size) to (B, T, hidden_size)."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
