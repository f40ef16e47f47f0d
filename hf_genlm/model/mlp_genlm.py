"""The MLP of a layer: what happens over the width, at each token by itself."""

from functools import partial

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_genlm import GenLMConfig
from .initialization_genlm import start_isometric, start_near_zero


class GenLMLowRankLinear(nn.Module):
    """x A B, with A (in_features x rank) and B (rank x out_features), in place of one full matrix: fewer
    parameters and multiplications while rank < in * out / (in + out)."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.reduce_proj = nn.Linear(in_features, rank, bias=False)
        self.expand_proj = nn.Linear(rank, out_features, bias=False)
        self.reduce_proj.start = start_isometric
        self.expand_proj.start = start_isometric

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.expand_proj(self.reduce_proj(hidden_states))


class GenLMMLP(nn.Module):
    """down(act(up(x))); with the default squared ReLU that of So et al., 2021 (arXiv:2109.08668)."""

    def __init__(self, config: GenLMConfig):
        super().__init__()
        wide, narrow, rank = config.intermediate_size, config.hidden_size, config.mlp_rank
        if rank is None:
            self.up_proj = nn.Linear(narrow, wide, bias=False)
            self.down_proj = last = nn.Linear(wide, narrow, bias=False)
        else:
            self.up_proj = GenLMLowRankLinear(narrow, wide, rank)
            self.down_proj = GenLMLowRankLinear(wide, narrow, rank)
            last = self.down_proj.expand_proj
        last.start = partial(start_near_zero, config=config)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))
