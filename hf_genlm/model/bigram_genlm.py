"""Embedding of words through a projection, and of bigrams (pairs of a token and its predecessor).

Shapes: B batch, T tokens, H rows of the table, D hidden_size.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache_genlm import read_states
from .configuration_genlm import GenLMConfig
from .initialization_genlm import start_at_zero
from .layout_genlm import TimeLayout

LAST_TOKEN_SLOT = 2  # slot of the first layer's cache for the last token; 0 and 1 are h and c
_LAYER = 0
# A pair's row is (a * before + b * token) mod p mod H: two pairs collide with probability 1 / H over the draw
# of a and b below the prime p (Carter and Wegman, 1979). 64 bits hold the products of ids below 2^31.
_PRIME = 2**31 - 1
_OF_BEFORE, _OF_TOKEN = 1_640_531_513, 734_025_817


class GenLMWordEmbedding(nn.Module):
    """E w W + b of tokens, as one module."""

    def __init__(self, table: nn.Embedding, projection: nn.Module):
        super().__init__()
        self.table = table
        self.projection = projection
        self.num_embeddings = table.num_embeddings

    @property
    def weight(self) -> torch.Tensor:
        """The table E, which holds the device and the dtype."""
        return self.table.weight

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        return self.projection(self.table(input_ids))


class GenLMBigramEmbedding(nn.Embedding):
    """A vector for each pair (w_{t-1}, w_t), hashed to H rows, which is added to the embedding of w_t.

    Pairs stay inside a document, whose first token has no predecessor, and skip padding. Initialised to zero.
    A token's input is the sum of two vectors: attribution reads the outputs of `embed_tokens` and of this
    module by hooks (captum's LayerIntegratedGradients takes both), as `inputs_embeds` name no pair.
    Source of hashed n-gram tables: Mikolov et al., 2011, Strategies for training large scale neural network
    language models.
    """

    def __init__(self, config: GenLMConfig):
        super().__init__(config.bigram_size, config.hidden_size)
        self.start = start_at_zero

    def forward(
        self, input_ids: torch.LongTensor, layout: TimeLayout, past_key_values: Cache | None = None
    ) -> torch.Tensor:
        """Map tokens (B, T) to (B, T, D); the last token is read from the cache and written to it."""
        tokens = input_ids + 1  # 0 means no token, as in a cache after its reset
        states, recording = None, False
        if past_key_values is not None:
            states = read_states(past_key_values, _LAYER, (LAST_TOKEN_SLOT,), (tokens.shape[0], 1))
            recording = past_key_values.is_recording_past(_LAYER)
        seen = torch.zeros_like(tokens[:, :1]) if states is None else states[0].to(tokens.dtype)
        last = torch.cat([seen, tokens], dim=1)  # (B, 1 + T): the last token before the row, after each token
        if layout.valid is not None:
            last = last.gather(1, layout.last_valid)
        if past_key_values is not None:
            past_key_values.update_recurrent_state(
                last[:, -1:].float(),
                _LAYER,
                LAST_TOKEN_SLOT,
                past_states=last[..., None].float() if recording else None,
            )
        before = last[:, :-1]
        if layout.starts is not None:
            before = before.masked_fill(layout.starts, 0)
        return super().forward((_OF_BEFORE * before + _OF_TOKEN * tokens) % _PRIME % self.num_embeddings)
