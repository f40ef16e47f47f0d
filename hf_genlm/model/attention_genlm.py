"""Causal attention to all earlier tokens or to a sliding window of them; positions, learned or rotary (Su et
al., 2021, arXiv:2104.09864) with every scaling of transformers.

Shapes: B batch, T tokens, S cached and new tokens, N heads, K key-value heads, H head_dim.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_genlm import CACHE, raise_size_mismatch
from .configuration_genlm import GenLMConfig
from .initialization_genlm import start_near_zero

# True if attention functions, not layers, write the pages of continuous batching (transformers before 5.24)
_FUNCTIONS_WRITE_PAGES = CACHE == "past_key_values"


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


class GenLMAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245), with `qk_norm` on normalised queries
    and keys (Henry et al., 2020, arXiv:2010.04245). Full and sliding attention differ only in their mask."""

    def __init__(self, config: GenLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        is_sliding = config.mixer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if is_sliding else None
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.out_proj = nn.Linear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=False
        )
        self.out_proj.start = partial(start_near_zero, config=config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map (B, T, hidden_size) to (B, T, hidden_size); also returns the weights (B, N, T, S) or None.

        Args:
            position_embeddings: cosines and sines of the rotary positions, each (B, T, H).
            layer_idx: index of the layer in the cache; None: that of the weights, which layers may share.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q_BNTH = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        k_BKTH = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        v_BKTH = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if self.config.qk_norm:
            q_BNTH = F.rms_norm(q_BNTH, (self.head_dim,), eps=self.config.rms_norm_eps)
            k_BKTH = F.rms_norm(k_BKTH, (self.head_dim,), eps=self.config.rms_norm_eps)
        if position_embeddings is not None:
            q_BNTH = apply_rotary(q_BNTH, *position_embeddings)
            k_BKTH = apply_rotary(k_BKTH, *position_embeddings)
        at = self.layer_idx if layer_idx is None else layer_idx
        k_BKSH, v_BKSH = k_BKTH, v_BKTH
        if past_key_values is not None:
            k_BKSH, v_BKSH = past_key_values.update(k_BKTH, v_BKTH, at)
            if k_BKSH.shape[0] != k_BKTH.shape[0]:  # a full static window takes one row for many
                raise_size_mismatch(k_BKSH.shape, k_BKTH.shape)
        module = self
        if "cache" in kwargs:  # the pages of continuous batching
            if _FUNCTIONS_WRITE_PAGES:
                module = self._with_layer_idx(at)
            else:
                k_BKSH, v_BKSH = kwargs.pop("cache").update(k_BKTH, v_BKTH, at, kwargs=kwargs)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        mixed_BTNH, weights = attend(
            module,
            q_BNTH,
            k_BKSH,
            v_BKSH,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.out_proj(mixed_BTNH.reshape(*hidden_states.shape[:-1], -1)), weights

    def _with_layer_idx(self, layer_idx: int) -> "GenLMAttention":
        """A view of this module with another `layer_idx`, by which continuous batching finds its pages."""
        view = copy.copy(self)
        view.layer_idx = layer_idx
        return view


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(Q K^T scaling + mask) V: the reference of every fused implementation.

    Args:
        query: (B, N, T, H).
        key, value: (B, K, S, H).
        attention_mask: added to the scores, (B, 1, T, S).

    Returns:
        (B, T, N, H) and the weights (B, N, T, S).
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores_BNTS = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BNTS = scores_BNTS + attention_mask
    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    weights_BNTS = F.softmax(scores_BNTS, dim=-1, dtype=softmax_dtype).to(query.dtype)
    weights_BNTS = F.dropout(weights_BNTS, p=dropout, training=module.training)
    return (weights_BNTS @ value).transpose(1, 2).contiguous(), weights_BNTS
