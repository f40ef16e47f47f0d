"""An embedding of token pairs: what the token before says about this one, at the price of a table look-up.

Shapes: B batch, T tokens, H rows of the table, D hidden_size.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache

from .configuration_genlm import GenLMConfig
from .initialization_genlm import start_at_zero
from .layout_genlm import TimeLayout

LAST_TOKEN_SLOT = 2  # of the first layer's state in the cache: beside h and c
_LAYER = 0
# A pair's row is (a * before + b * token) mod p mod H: two pairs meet with probability 1 / H over the draw of
# a and b below the prime p (Carter and Wegman, 1979). 64 bits hold the products of ids below 2^31.
_PRIME = 2**31 - 1
_OF_BEFORE, _OF_TOKEN = 1_640_531_513, 734_025_817


class GenLMBigramEmbedding(nn.Embedding):
    """A vector for each pair (w_{t-1}, w_t), hashed to H rows, to be added to the embedding of w_t.

    The pair is that of a document: the token before its first one is none, and padding is skipped. Starts at
    zero. (Hashed n-gram tables go back to Mikolov et al., 2011, Strategies for training large scale neural
    network language models.)
    """

    def __init__(self, config: GenLMConfig):
        super().__init__(config.bigram_size, config.hidden_size)
        self.start = start_at_zero

    def forward(
        self, input_ids: torch.LongTensor, layout: TimeLayout, past_key_values: Cache | None = None
    ) -> torch.Tensor:
        """(B, T) tokens to (B, T, D); the last token is read from the cache and left there."""
        tokens = input_ids + 1  # 0 is no token, as in a cache that was reset
        seen, recording = None, False
        if past_key_values is not None:
            seen = past_key_values.get_recurrent_state(_LAYER, LAST_TOKEN_SLOT)
            recording = past_key_values.is_recording_past(_LAYER)
        seen = torch.zeros_like(tokens[:, :1]) if seen is None else seen.to(tokens.dtype)
        last = torch.cat([seen, tokens], dim=1)  # (B, 1 + T): the last token before the first, after each
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
