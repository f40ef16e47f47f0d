"""Cache layer for a recurrent state in transformers' caches; the state that training carries between rows.

transformers' own linear-attention layer does not return a state without a convolution, does not count tokens
and cannot roll back; this layer does all three.
"""

import torch
from transformers import cache_utils, masking_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    LinearAttentionLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

# transformers' name of a cache as an argument and in an output: "cache" from 5.24 on
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def read_states(cache, layer_idx: int, slots, shape: tuple[int, int]) -> list[torch.Tensor] | None:
    """Read the states in `slots` of a layer, each of `shape` (batch, width); None: the cache has none yet.

    Kernels read and write memory by the shape of the batch: this is the one place where a mixer gets a state.

    Raises:
        RuntimeError: a state has another shape, as of a cache of other rows or of another model.
        ValueError: the layer of the cache has keys and values, as in prefix tuning.
    """
    layers = cache.layers if isinstance(cache, Cache) else []
    if layers and not isinstance(layers[layer_idx], LinearAttentionLayer):
        raise ValueError(
            f"layer {layer_idx} is recurrent, and the cache has keys and values for it: give a cache of this "
            "model; of PEFT, use LoRA or prompt tuning, not prefix tuning or cartridges"
        )
    states = [cache.get_recurrent_state(layer_idx, slot) for slot in slots]
    if states[0] is None:
        return None
    for state in states:
        found = (0, 0) if state is None else state.shape
        if found != shape:
            raise_size_mismatch(found, shape)
    return states


def raise_size_mismatch(cached, given) -> None:
    """Raise RuntimeError as torch.cat does for cached keys that do not fit the batch."""
    raise RuntimeError(
        f"Sizes of tensors must match. Expected size {list(given)} but got size {list(cached)} in the cache: "
        "give the cache of these rows and of this model, or none"
    )


class RecurrentStateLayer(LinearAttentionLayer, CacheLayerMixin, DummyLayer):
    """State of one recurrent layer: slot 0 is h, slot 1 is c of an LSTM, each (batch, recurrent_size).
    Slot 2 of the first layer of a model with bigrams is the last token + 1, (batch, 1).

    While `record_past` is set (assisted decoding), the states after each token since the last `crop` are
    kept, (batch, 1 + tokens, recurrent_size), so that rejected tokens can be rolled back.

    It is a CacheLayerMixin because it counts tokens, and a DummyLayer because it has no keys: the size of a
    mask then comes from a later attention layer.
    """

    # one name for all recurrences; accelerate refuses sequence parallelism for names with linear_attention
    _layer_type = "genlm_linear_attention"
    is_compileable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs):
        LinearAttentionLayer.__init__(self, number_of_states=3)
        self.keys = self.values = None
        self.is_initialized = False
        # a tensor, since a Python number would be a constant for torch.compile and torch.export
        self.cumulative_length = torch.tensor(0, dtype=torch.int64)
        self.past_states: dict[int, torch.Tensor | None] = dict.fromkeys(range(3))

    def update_recurrent_state(self, recurrent_states, state_idx=0, n_tokens=1, past_states=None, **kwargs):
        """Store the state after `n_tokens` more tokens.

        Args:
            recurrent_states: (batch, recurrent_size).
            past_states: (batch, 1 + n_tokens, recurrent_size), the state before the first and after each of
                them; required while recording.
        """
        stored = self.recurrent_states[state_idx]
        if not self.has_previous_state[state_idx] and stored is not None:  # after a reset
            kinds = [(state.shape, state.dtype, state.device) for state in (stored, recurrent_states)]
            self.is_recurrent_states_initialized[state_idx] = kinds[0] == kinds[1]
        if not self.is_recurrent_states_initialized[state_idx]:
            self._set_device_of(recurrent_states)
        super().update_recurrent_state(recurrent_states, state_idx=state_idx)
        self.has_previous_state[state_idx] = True
        if state_idx == 0:
            self.cumulative_length.add_(n_tokens)
        if self.record_past:
            kept = self.past_states[state_idx]
            self.past_states[state_idx] = (
                past_states if kept is None else torch.cat([kept, past_states[:, 1:]], dim=1)
            )
        return self.recurrent_states[state_idx]

    def _set_device_of(self, state: torch.Tensor) -> None:
        self.dtype, self.device, self.batch_size = state.dtype, state.device, state.shape[0]
        if not self.is_initialized:
            self.cumulative_length = self.cumulative_length.to(state.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.cumulative_length)
            self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Raise RuntimeError: a recurrent layer has no keys and values."""
        raise RuntimeError("a recurrent layer has no keys and values; use update_recurrent_state")

    def get_seq_length(self):
        """Number of tokens seen so far."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int):
        """(tokens seen including this query, offset 0) of the padding mask."""
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    @property
    def is_croppable(self) -> bool:
        """True while the past is recorded: only then can a state be rolled back."""
        return self.record_past

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back the last `-tokens_to_remove` tokens (a negative number, as transformers passes it).

        Raises:
            RuntimeError: the past of so many tokens was not recorded, or the number is positive.
        """
        if not self.record_past:
            raise RuntimeError("crop needs activate_past_recording() before the tokens that it removes")
        if tokens_to_remove > 0:
            raise RuntimeError("a recurrent layer is cropped by a negative number: the tokens to remove")
        for slot, past in self.past_states.items():
            if past is None:
                continue
            kept = past.shape[1] + tokens_to_remove
            if kept < 1:
                raise RuntimeError(
                    f"cannot remove {-tokens_to_remove} tokens: {past.shape[1] - 1} are recorded"
                )
            self.past_states[slot] = past[:, kept - 1 : kept]
            self.recurrent_states[slot].copy_(past[:, kept - 1])
        self.cumulative_length.add_(tokens_to_remove)

    def reset(self) -> None:
        """Set the states to zero in place, so that the tensors keep their addresses."""
        LinearAttentionLayer.reset(self)
        self.cumulative_length.zero_()
        self.past_states = dict.fromkeys(self.past_states)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace row i by row beam_idx[i]."""
        self._map_rows(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map_rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`."""
        self._map_rows(lambda state: state[indices])

    def _map_rows(self, rows) -> None:
        for states in (self.recurrent_states, self.past_states):
            for slot, state in states.items():
                if state is not None:
                    states[slot] = rows(state)
        if self.recurrent_states[0] is not None:
            self.batch_size = self.recurrent_states[0].shape[0]

    def offload(self) -> None:
        """Do nothing: states are small and stay on their device."""

    def prefetch(self) -> None:
        """Do nothing: states are never offloaded."""


class LastWordsLayer(RecurrentStateLayer):
    """The last words of each row, behind the states of the layers.

    Transformers makes a cache with a layer for each of the network. This one joins a cache with the first
    tokens, and keeps the past from then on where the others can be cropped unasked.
    """

    _layer_type = "genlm_last_words"

    @classmethod
    def index_in(cls, cache, n_layers: int) -> int:
        """The index of this layer in `cache`, which gets one if it has none; `n_layers` without layers."""
        if not isinstance(cache, Cache) or not cache.layers:
            return n_layers
        if not isinstance(cache.layers[-1], cls):
            layer = cls()
            layer.record_past = isinstance(cache, DynamicCache) and cache.is_croppable
            cache.layers.append(layer)
        return len(cache.layers) - 1


def suit_prompt_methods(model, inputs: dict, attention_mask) -> dict:
    """The inputs of a step of generate in the form that PEFT's prompt methods can extend.

    These look for the cache under the name `past_key_values`, and otherwise give the prompt again before
    every new token. They extend a mask (B, past + T), and cut the tokens after a cache to the last one.

    Raises:
        ValueError: several tokens after a cache, where a prompt method is active.
    """
    if CACHE in inputs:
        inputs["past_key_values"] = inputs.pop(CACHE)
    replaced = vars(model).get("prepare_inputs_for_generation")  # PEFT puts its own method here
    outer = getattr(replaced, "__self__", None)
    if not getattr(getattr(outer, "active_peft_config", None), "is_prompt_learning", False):
        return inputs
    cache, input_ids = inputs.get("past_key_values"), inputs.get("input_ids")
    if cache is not None and cache.get_seq_length() and input_ids is not None and input_ids.shape[1] > 1:
        raise ValueError(
            "PEFT's prompt methods give a cache one token at a time: generate without drafts "
            "(assistant_model, prompt_lookup_num_tokens, assistant_early_exit) and prefill_chunk_size"
        )
    if "attention_mask" in inputs:
        inputs["attention_mask"] = attention_mask
    return inputs


class CarriedState(Cache):
    """The recurrent states at the end of a batch of rows, for the rows that continue them.

    `model(rows, position_ids=..., past_key_values=carried)` begins with the states that the previous call
    stored, at first zeros, and resets them wherever a position is 0, the start of a document. No gradient
    passes between calls: truncated backpropagation through time (Williams and Peng, 1990). Attention layers
    store nothing and attend within each row.
    """

    def __init__(self):
        super().__init__(layers=[])
        # by layer and slot, each (batch, recurrent_size)
        self.states = dict[tuple[int, int], torch.Tensor]()

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The state with which a layer begins; None: zeros."""
        return self.states.get((layer_idx, state_idx))

    def update_recurrent_state(self, recurrent_states, layer_idx: int, state_idx: int = 0, **kwargs):
        """Store a state (batch, recurrent_size) without its gradient."""
        self.states[layer_idx, state_idx] = recurrent_states.detach().clone()

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """Return the given keys and values: there are no earlier ones."""
        return key_states, value_states

    def is_recording_past(self, layer_idx: int) -> bool:
        """False: a carried state cannot be rolled back."""
        return False

    def check(self, position_ids, attention_mask, is_checkpointing: bool) -> None:
        """Check the other arguments of a forward pass with a carried state.

        Raises:
            ValueError: no position_ids, an attention_mask, or gradient checkpointing.
        """
        if position_ids is None or attention_mask is not None:
            raise ValueError(
                "a CarriedState needs position_ids, 0 where a document starts, and no attention_mask"
            )
        if is_checkpointing:
            raise ValueError(
                "gradient checkpointing runs each layer again, after its CarriedState was updated: turn one "
                "of them off"
            )


# The base class registers the layer for DynamicCache; StaticCache and the masks have separate tables.
cache_utils.STATIC_LAYER_TYPE_MAPPING[RecurrentStateLayer._layer_type] = RecurrentStateLayer
masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[RecurrentStateLayer._layer_type] = (
    masking_utils.create_recurrent_attention_mask
)
