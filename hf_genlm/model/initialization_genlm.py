"""Initialisations of a Linear or an Embedding other than the default normal draw.

A layer sets `linear.start = start_...`; GenLMPreTrainedModel._init_weights calls it after the normal draw.
Each function writes a whole tensor through transformers' `init`, which does not overwrite loaded weights.
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from .configuration_genlm import GenLMConfig


def start_near_zero(linear: nn.Linear, config: GenLMConfig) -> None:
    """A tenth of GPT-2's deviation (Radford et al., 2019) for a projection into the residual stream, so that
    each layer begins near the identity (Zhang et al., 2019, arXiv:1901.09321)."""
    std = 0.1 * config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    init.normal_(linear.weight, mean=0.0, std=std)


def start_at_zero(table: nn.Embedding) -> None:
    """Zeros, for a table that is added to another embedding."""
    init.zeros_(table.weight)


def start_isometric(linear: nn.Linear) -> None:
    """Orthogonal, scaled so that the output has the root mean square of the input, for a factor of a product
    of two matrices (Saxe et al., 2013, arXiv:1312.6120). With normal factors training is far slower."""
    weight = torch.empty_like(linear.weight)
    torch.nn.init.orthogonal_(weight, gain=max(1.0, linear.out_features / linear.in_features) ** 0.5)
    init.copy_(linear.weight, weight)


def start_orthogonal(linear: nn.Linear, n_gates: int) -> None:
    """Orthogonal recurrent weights for each gate (Saxe et al., 2013, arXiv:1312.6120)."""
    weight = torch.empty_like(linear.weight)
    for gate in weight.chunk(n_gates):
        torch.nn.init.orthogonal_(gate)
    init.copy_(linear.weight, weight)


def start_remembering(linear: nn.Linear, n_gates: int, gate: int | None) -> None:
    """A bias of 1 for the gate that keeps the state, 0 for the others (Jozefowicz et al., 2015)."""
    bias = torch.zeros_like(linear.bias)
    if gate is not None:
        bias.chunk(n_gates)[gate].fill_(1.0)
    init.copy_(linear.bias, bias)


def start_with_spread_memories(linear: nn.Linear) -> None:
    """Forget-gate biases for memories of 1 to 128 tokens, evenly spaced in their logarithm (chrono
    initialisation; Tallec and Ollivier, 2018, arXiv:1804.11188)."""
    tokens = torch.logspace(0, 7, linear.out_features, base=2.0, device=linear.bias.device)
    init.copy_(linear.bias, torch.log(tokens))  # sigmoid(log n) = n / (n + 1)
