"""GenLM: one decoder class for recurrent, attention and hybrid language models.

    e_w = E w (+ W, b)                      word embedding (+ that of the bigram that ends in the word)
    x  <- x + mixer(norm(x))                in each layer: along time
    x  <- x + mlp(norm(x))                  and at each token
    P(w_{t+1} | w_1..w_t) = softmax(head norm(x_t))

This folder is uploaded to the Hub with every model: it imports only torch, transformers and its own files.

Shapes: B batch, T tokens.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import (
    create_causal_mask,
    create_masks_for_generate,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_genlm import GenLMAttention, GenLMPositionEmbedding, GenLMRotaryEmbedding
from .bigram_genlm import GenLMBigramEmbedding, GenLMWordEmbedding
from .cache_genlm import CACHE, CarriedState, LastWordsLayer, RecurrentStateLayer, suit_prompt_methods
from .configuration_genlm import GenLMConfig
from .initialization_genlm import start_isometric
from .layout_genlm import TimeLayout, check_shapes, number_documents
from .loss_genlm import (
    NETWORK_SHARE,
    Counted,
    cap_logits,
    causal_loss,
    causal_loss_without_logits,
    divide_by_num_items,
    is_plain_head,
    shift,
    with_gradient,
)
from .mlp_genlm import GenLMMLP, GenLMRMSNorm
from .ngram_genlm import GenLMMixture, GenLMNgramHead, GenLMNgramLayer, GenLMWordNumbers, NgramContext
from .recurrence_genlm import ElmanCell, GatedLinearRecurrence, GRUCell, LSTMCell, is_plain_linear

MIXERS = {
    "elman": ElmanCell,
    "gru": GRUCell,
    "lstm": LSTMCell,
    "gated_linear": GatedLinearRecurrence,
    "full_attention": GenLMAttention,
    "sliding_attention": GenLMAttention,
}
MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    RecurrentStateLayer._layer_type: create_recurrent_attention_mask,
}


class GenLMDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm mixer and pre-norm MLP, each with a residual connection."""

    def __init__(self, config: GenLMConfig, layer_idx: int):
        super().__init__()
        self.mixer_norm = GenLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = MIXERS[config.mixer_types[layer_idx]](config, layer_idx)
        self.mlp_norm = GenLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GenLMMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Map (B, T, hidden_size) to (B, T, hidden_size); `kwargs` are those of the mixers' forward."""
        mixed, _ = self.mixer(self.mixer_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


@dataclass
class GenLMModelOutput(BaseModelOutputWithPast):
    """Output of `GenLMModel`; `contexts` (B, T, n - 1) are the last words after each token, for counts."""

    contexts: torch.Tensor | None = None


class GenLMPreTrainedModel(PreTrainedModel):
    """Base class: loading, saving and initialisation."""

    config: GenLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GenLMDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _supports_context_parallel = False  # accelerate removes masks only from modules named self_attn
    _can_compile_fullgraph = True
    _keys_to_ignore_on_load_unexpected = [r"^mixture\."]  # a classifier has no counts
    _can_record_outputs = {"hidden_states": GradientCheckpointingLayer, "attentions": GenLMAttention}

    def save_pretrained(self, save_directory, **kwargs):
        """Save as PreTrainedModel does, with an auto_map for every Auto class that has a GenLM class.

        A head that was tied through W and is no longer tied (PEFT unties it at a merge) is saved as one map
        of h, because an untied model reads h: its weight (V, r) becomes weight W^T (V, hidden_size).
        """
        if getattr(self.base_model, "reads_out", False) and not self.config.tie_word_embeddings:
            state_dict = dict(kwargs.pop("state_dict", None) or self.state_dict())
            projection = state_dict["model.embed_proj.weight"]
            for name in ("lm_head.weight", "mixture.of_state.weight"):
                if name in state_dict:
                    state_dict[name] = state_dict[name] @ projection.t()
            kwargs["state_dict"] = state_dict
        self.config.auto_map = {
            auto.__name__: f"modeling_genlm.{model_class.__name__}"
            for auto, model_class in AUTO_CLASSES.items()
        }
        super().save_pretrained(save_directory, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        """A module by its name. PEFT asks for `embeddings.word_embeddings`, of width `hidden_size`."""
        if target == "embeddings.word_embeddings" and self.config.embedding_width != self.config.hidden_size:
            return GenLMWordEmbedding(self.base_model.embed_tokens, self.base_model.embed_proj)
        return super().get_submodule(target)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw normal weights of deviation `initializer_range`, then call a module's own `start`, if any."""
        super()._init_weights(module)
        start = getattr(module, "start", None)
        if start is not None:
            start(module)


class GenLMModel(GenLMPreTrainedModel):
    """Embedding and layers, without a head.

    In a language model whose head is tied through W (h W^T E^T), `last_hidden_state`, and so the last of
    `hidden_states`, is h W^T, of width r, as in OPT: tools that compute the loss themselves expect there the
    input of the head.
    """

    def __init__(self, config: GenLMConfig, is_under_head: bool = False):
        super().__init__(config)
        if config.is_ngram and not is_under_head:
            raise ValueError("an n-gram model is a table of counts: load it by AutoModelForCausalLM")
        self.reads_out = is_under_head and config.tie_word_embeddings and config.has_embedding_projection
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_width)
        self.embed_proj = None
        if config.has_embedding_projection:
            self.embed_proj = nn.Linear(config.embedding_width, config.hidden_size)
            self.embed_proj.start = start_isometric
        self.embed_bigrams = None
        if config.bigram_size is not None:
            self.embed_bigrams = GenLMBigramEmbedding(config)
        self.embed_positions = None
        if config.position_type == "learned":
            self.embed_positions = GenLMPositionEmbedding(config.max_position_embeddings, config.hidden_size)
        self.rotary_emb = None
        if config.has_rotary_positions:
            self.rotary_emb = GenLMRotaryEmbedding(config)
        self.embed_dropout = nn.Dropout(config.dropout)
        layer = GenLMNgramLayer if config.is_ngram else GenLMDecoderLayer
        self.layers = nn.ModuleList(layer(config, i) for i in range(config.num_distinct_layers))
        self.norm = GenLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.is_ngram:
            self.embed_tokens, self.norm = GenLMWordNumbers(config.vocab_size), nn.Identity()
        self.ngram_context = None
        if is_under_head and config.holds_counts and not config.is_ngram:
            self.ngram_context = NgramContext(config, config.num_hidden_layers)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Compute the final hidden states (B, T, hidden_size), or (B, T, embedding_width) under a tied head.

        Args:
            input_ids: (B, T) tokens; or `inputs_embeds`: (B, T, embedding_width), before W and b, or
                (B, T, hidden_size), after them.
            attention_mask: (B, past + T), 0 at padding; or a dict with one mask for each layer type.
            position_ids: (B, T) or (1, T). A step other than +1 starts a packed document if there is neither
                mask nor cache; with a `CarriedState`, position 0 starts one.
            past_key_values: keys, values and states of the earlier tokens; or a `CarriedState`, for rows of
                packed documents that begin with a state and have no keys and values of earlier tokens.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`; `inputs_embeds` for a model with
                bigrams; rows that do not suit a `CarriedState`; a mask or positions of another shape.
            RuntimeError: a cache of another number of rows, or of another model.
        """
        cache = kwargs.get("cache")
        if cache is None or isinstance(cache, Cache):  # the layers take that of continuous batching
            kwargs.pop("cache", None)
            past_key_values = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is None and (self.embed_bigrams is not None or self.ngram_context is not None):
            name = "ngram_order" if self.embed_bigrams is None else "bigram_size"
            raise ValueError(
                f"{name} needs input_ids: inputs_embeds do not identify their tokens. Of PEFT, use LoRA; "
                "prompt tuning gives inputs_embeds"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        has_states = RecurrentStateLayer._layer_type in self._layer_types
        shape = inputs_embeds.shape[:2]
        check_shapes(self.config.layer_types, has_states, shape, attention_mask, position_ids)
        is_packed = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx"))
        if is_packed and position_ids is None:
            raise ValueError("packed documents need position_ids, 0 where each starts, beside cu_seq_lens_q")
        document = self._documents(inputs_embeds.shape[0], attention_mask, past_key_values, position_ids)
        use_cache = use_cache and document is None  # packed rows cannot be continued
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if isinstance(past_key_values, DynamicCache) and len(past_key_values.layers) == 0:
            past_key_values.layers.extend(DynamicCache(config=self.config).layers)  # an empty DynamicCache()
        if position_ids is None:
            n_past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + n_past)[None]

        masks = self._masks(inputs_embeds, attention_mask, past_key_values, position_ids)
        padding = masks.get(RecurrentStateLayer._layer_type)
        layout = TimeLayout(None if padding is None else padding.bool(), document)
        hidden_states = self._embed(inputs_embeds, position_ids)
        if self.embed_bigrams is not None:
            hidden_states = hidden_states + self.embed_bigrams(input_ids, layout, past_key_values)
        hidden_states = self.embed_dropout(hidden_states)
        rotation = None if self.rotary_emb is None else self.rotary_emb(hidden_states, position_ids)
        for layer_idx, layer_type in enumerate(self.config.layer_types):
            hidden_states = self.layers[layer_idx % len(self.layers)](
                hidden_states,
                layer_idx=layer_idx,
                attention_mask=masks[layer_type],
                layout=layout,
                position_embeddings=rotation,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        contexts = None
        if self.ngram_context is not None:
            numbers = (input_ids + 1).float()[..., None]
            at = LastWordsLayer.index_in(past_key_values, self.config.num_hidden_layers)
            contexts, _ = self.ngram_context(numbers, layout, past_key_values, layer_idx=at)
        return GenLMModelOutput(
            last_hidden_state=self._read_out(self.norm(hidden_states)),
            contexts=contexts,
            **{CACHE: past_key_values},
        )

    def _documents(self, n_rows, attention_mask, past_key_values, position_ids) -> torch.Tensor | None:
        """(n_rows, T) numbers of packed documents, 0 for a continued one; None: each row is one document."""
        if isinstance(past_key_values, CarriedState):
            is_checkpointing = self.gradient_checkpointing and self.training
            past_key_values.check(position_ids, attention_mask, is_checkpointing)
            return number_documents(position_ids.expand(n_rows, -1))
        if position_ids is None or attention_mask is not None or past_key_values is not None:
            return None
        return find_packed_sequence_indices(position_ids.expand(n_rows, -1))

    def _embed(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Map (B, T, embedding_width) to (B, T, hidden_size) by W and b if present, and add positions."""
        is_mapped = self.embed_proj is None or inputs_embeds.shape[-1] != self.config.embedding_width
        hidden_states = inputs_embeds if is_mapped else self.embed_proj(inputs_embeds)
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)
        return hidden_states

    def _read_out(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, T, hidden_size) to the input of the head: h W^T if the head is tied through W."""
        if not self.reads_out:
            return hidden_states
        if is_plain_linear(self.embed_proj):
            return F.linear(hidden_states, self.embed_proj.weight.t())
        # the W of an adapter or quantiser is only known by its outputs
        unit = torch.eye(self.config.embedding_width, dtype=hidden_states.dtype, device=hidden_states.device)
        weight_rd = self.embed_proj(unit) - self.embed_proj(torch.zeros_like(unit[:1]))
        return F.linear(hidden_states, weight_rd)

    def _masks(self, inputs_embeds, attention_mask, past_key_values, position_ids) -> dict:
        """Layer type -> mask, for each layer type in use."""
        if isinstance(attention_mask, dict):
            return attention_mask
        if isinstance(past_key_values, CarriedState):
            past_key_values = None  # a carried state has no keys of earlier tokens
        return {
            layer_type: MASKS[layer_type](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: past_key_values},
            )
            for layer_type in self._layer_types
        }

    @property
    def _layer_types(self) -> set[str]:
        """transformers' name of each kind of layer, that of the last words included."""
        behind = set() if self.ngram_context is None else {RecurrentStateLayer._layer_type}
        return {*self.config.layer_types, *behind}


class GenLMForCausalLM(GenLMPreTrainedModel, GenerationMixin):
    """The language model: L = - sum_t log P(w_t | w_<t)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: GenLMConfig):
        super().__init__(config)
        self.model = GenLMModel(config, is_under_head=True)
        self.vocab_size = config.vocab_size
        head_width = config.embedding_width if config.tie_word_embeddings else config.hidden_size
        self.lm_head = nn.Linear(head_width, config.vocab_size, bias=config.output_bias)
        self.mixture = None
        if config.is_ngram:
            self.lm_head = GenLMNgramHead(config)
        elif config.holds_counts:
            self.mixture = GenLMMixture(config, head_width)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Compute logits (B, T, vocab_size) and, with `labels`, the loss.

        Args:
            labels: (B, T), not shifted; -100 is ignored. The loss in nats is the mean over labels, or their
                sum divided by `num_items_in_batch`, which Trainer passes.
            logits_to_keep: compute logits of the last so many tokens only, or at these indices; 0: all.
            skip_logits: with `labels`, return the loss without logits; in a fraction of the memory if the
                head is a plain linear map, without adapter, hook or quantiser, and `loss_function` is ours.
            label_smoothing, z_loss: terms of the loss, as in loss_genlm.causal_loss.
            network_share: beside counts, share of the network's own loss in the gradients, else it does not
                learn what they know; not in the value of the loss. In training mode 0.25, if not given.
            leave_one_out: beside counts, with `skip_logits`: no word finds its own count.
            others: as in GenLMModel.forward.
        """
        # not in the signature: Trainer takes every parameter with "label" in its name for labels
        terms = {name: kwargs.pop(name, 0.0) for name in ("label_smoothing", "z_loss")}
        share, leave_one_out = kwargs.pop("network_share", None), kwargs.pop("leave_one_out", False)
        share = NETWORK_SHARE * self.training if share is None else share
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        loss, logits = None, None
        kwargs |= terms
        is_own_loss = not hasattr(self, "_loss_function")  # set where a user assigns `loss_function`
        if labels is not None and skip_logits and is_own_loss and is_plain_head(self.lm_head):
            if self.mixture is not None:
                words = shift(labels, **kwargs)
                states = outputs.last_hidden_state
                found = self.mixture.of_words(states, outputs.contexts, words, leave_one_out)
                kwargs |= {"shift_labels": words, "counted": Counted(*found, share)}
            loss = causal_loss_without_logits(
                outputs.last_hidden_state,
                self.lm_head.weight,
                self.lm_head.bias,
                labels,
                softcap=self.config.final_logit_softcapping,
                **kwargs,
            )
        else:
            kept = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
            own = logits = cap_logits(self.lm_head(kept), self.config.final_logit_softcapping)
            if self.mixture is not None:
                logits = self.mixture(logits, kept, slice_logits_to_keep(outputs.contexts, logits_to_keep))
            if labels is not None:
                loss = self._loss(logits, labels, **kwargs)
                if self.mixture is not None and share and torch.is_grad_enabled():
                    loss = with_gradient(loss, share * (self._loss(own, labels, **kwargs) - loss))
                logits = None if skip_logits else logits
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())  # generate reads parameters
    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        """Prepare inputs as transformers does, and in the form that PEFT's prompt methods can extend."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return suit_prompt_methods(self, inputs, kwargs.get("attention_mask"))

    @staticmethod
    def create_masks_for_generate(config, **kwargs) -> dict:
        """The masks of a static cache by layer type, that of the last words of counts included."""
        masks = create_masks_for_generate(config=config, **kwargs)
        if config.holds_counts and RecurrentStateLayer._layer_type not in masks:
            masks[RecurrentStateLayer._layer_type] = create_recurrent_attention_mask(config=config, **kwargs)
        return masks

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
        """The loss by `loss_function`, which a user may replace, or by ours if it lacks a term."""
        if kwargs["label_smoothing"] or kwargs["z_loss"]:
            return causal_loss(logits, labels, **kwargs)
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)


class GenLMForSequenceClassification(GenericForSequenceClassification, GenLMPreTrainedModel):
    """Classifier of rows by their last token that is not padding, on whichever side the padding is."""

    forward = divide_by_num_items(GenericForSequenceClassification.forward)

    def __init__(self, config: GenLMConfig):
        GenLMPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = GenLMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class GenLMForTokenClassification(GenericForTokenClassification, GenLMPreTrainedModel):
    """Classifier of every token."""

    forward = divide_by_num_items(GenericForTokenClassification.forward)

    def __init__(self, config: GenLMConfig):
        GenLMPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = GenLMModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


AUTO_CLASSES = {
    AutoModel: GenLMModel,
    AutoModelForCausalLM: GenLMForCausalLM,
    AutoModelForSequenceClassification: GenLMForSequenceClassification,
    AutoModelForTokenClassification: GenLMForTokenClassification,
}
# Also needed for a copy of this file from the Hub: label smoothing and the pipelines look classes up by these
# names.
for _auto, _model_class in AUTO_CLASSES.items():
    _auto.register(GenLMConfig, _model_class, exist_ok=True)
for _names, _model_class in (
    (MODEL_MAPPING_NAMES, GenLMModel),
    (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, GenLMForCausalLM),
    (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, GenLMForSequenceClassification),
    (MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, GenLMForTokenClassification),
):
    _names[GenLMConfig.model_type] = _model_class.__name__

__all__ = [
    "GenLMForCausalLM",
    "GenLMForSequenceClassification",
    "GenLMForTokenClassification",
    "GenLMModel",
    "GenLMPreTrainedModel",
]
