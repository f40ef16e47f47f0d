"""Positions: learned, or rotary (Su et al., 2021, arXiv:2104.09864) with every scaling of transformers."""

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .configuration_genlm import GenLMConfig


class GenLMPositionEmbedding(nn.Embedding):
    """A learned vector for each position."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Map positions (B, T) to (B, T, hidden_size).

        Raises:
            IndexError: a position without a vector (on a GPU, torch's assertion).
        """
        try:
            return super().forward(position_ids)
        except IndexError as error:
            raise IndexError(
                f"positions {int(position_ids.min())} to {int(position_ids.max())} were given, and the model "
                f"has learned 0 to {self.num_embeddings - 1}: give at most {self.num_embeddings} tokens, the "
                "generated ones included"
            ) from error


class GenLMRotaryEmbedding(nn.Module):
    """Cosines and sines of the angles by which queries and keys are rotated."""

    inv_freq: torch.Tensor

    def __init__(self, config: GenLMConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        rope_init_fn = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        # PreTrainedModel._init_weights restores both after a load from the meta device
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: GenLMConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Frequencies theta^(-2i/head_dim), i = 0 .. head_dim/2 - 1, and a scaling of 1."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map positions (B, T) to cosines and sines (B, T, head_dim) in the dtype of `x`."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        return (
            (angles.cos() * self.attention_scaling).to(x.dtype),
            (angles.sin() * self.attention_scaling).to(x.dtype),
        )


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate (batch, heads, tokens, head_dim) by cosines and sines (batch, tokens, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
