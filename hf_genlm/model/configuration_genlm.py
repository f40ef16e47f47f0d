"""Configuration of a GenLM decoder: the embedding, one mixer per layer, and their shapes."""

import difflib
import sys

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

RECURRENT_MIXERS = ("elman", "gru", "lstm", "gated_linear")
ATTENTION_MIXERS = ("full_attention", "sliding_attention")
NGRAM = "ngram"  # the only layer of a decoder without a network: its state is the last words
MIXER_TYPES = (*RECURRENT_MIXERS, *ATTENTION_MIXERS, NGRAM)
POSITION_TYPES = ("rotary", "learned", "none")

# The pattern of a preset repeats and ends on the last layer: a hybrid of any depth ends with attention.
DECODERS = {
    "elman": ("elman",),
    "gru": ("gru",),
    "lstm": ("lstm",),
    "gated_linear": ("gated_linear",),
    "transformer": ("full_attention",),
    "sliding": ("sliding_attention",),
    "hybrid": ("gated_linear", "gated_linear", "full_attention"),
    "ngram": (NGRAM,),
}

_WIDTH = (1, 2**20)
# field: (minimum, maximum) unless None; an excluded 0 or 1 is replaced by a number next to it
_RANGES = {
    "vocab_size": (1, 2**31 - 1),
    "hidden_size": _WIDTH,
    "embedding_size": _WIDTH,
    "bigram_size": (1, 2**31 - 1),
    "ngram_order": (1, 6),
    "ngram_history": (2, 2**20),
    "num_hidden_layers": (1, 1000),
    "recurrent_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "mlp_rank": _WIDTH,
    "shared_layers": (1, 1000),
    "num_attention_heads": _WIDTH,
    "num_key_value_heads": _WIDTH,
    "head_dim": _WIDTH,
    "sliding_window": (2, 2**31 - 1),
    "max_position_embeddings": (1, 2**31 - 1),
    "rms_norm_eps": (1e-30, 1.0),
    "dropout": (0.0, 1.0 - 1e-6),
    "attention_dropout": (0.0, 1.0 - 1e-6),
    "final_logit_softcapping": (1e-6, 1e30),
    "initializer_range": (0.0, 1e3),
}
_ROPE_WORDS = ("rope_type", "type", "truncate")  # rope_parameters that are not numbers

# PEFT's tables TRANSFORMERS_MODELS_TO_<kind>_MODULES_MAPPING, in which a method finds its default modules
_PEFT_PREFIX, _PEFT_SUFFIX = "TRANSFORMERS_MODELS_TO_", "_MODULES_MAPPING"
_INPUT_PROJECTIONS = ["in_proj", "value_proj", "q_proj", "v_proj"]  # every mixer has one
_PEFT_MODULES: dict[str, list[str]] = {
    "LNTUNING_TARGET": ["mixer_norm", "mlp_norm", "norm"],
    "IA3_FEEDFORWARD": [],
}

# transformers chooses caches and masks by these names; cache_genlm.py registers "genlm_linear_attention"
_LAYER_TYPE_OF = dict.fromkeys((*RECURRENT_MIXERS, NGRAM), "genlm_linear_attention") | {
    name: name for name in ATTENTION_MIXERS
}


def _default_num_heads(hidden_size: int) -> int:
    """The largest divisor of `hidden_size` that gives at least 64 columns to a head; 1 below 128."""
    max_heads = max(1, hidden_size // 64)
    return next(heads for heads in range(max_heads, 0, -1) if hidden_size % heads == 0)


def mixers_of(decoder: str, num_hidden_layers: int) -> list[str]:
    """The mixer of each layer of the preset `decoder`.

    Raises:
        ValueError: an unknown preset.
    """
    if decoder not in DECODERS:
        raise ValueError(f"unknown decoder {decoder!r}; known: {', '.join(DECODERS)}")
    pattern = DECODERS[decoder]
    return [pattern[(layer - num_hidden_layers) % len(pattern)] for layer in range(num_hidden_layers)]


@strict
class GenLMConfig(PreTrainedConfig):
    r"""
    The layers are given by `mixer_types`, or by a preset: `GenLMConfig(decoder="lstm", num_hidden_layers=4)`.

    Args:
        vocab_size: tokens in the vocabulary, V.
        hidden_size: width of the residual stream, d.
        embedding_size: width r of the embedding table E (V x r). When it differs from `hidden_size`, the word
            embedding is E W + b with W (r x d); when it is None or equal, E alone.
        embedding_projection: force (True) or forbid (False) E W + b; None follows from `embedding_size`.
        bigram_size: rows of a hashed table of vectors of width d, one for each pair of a token and its
            predecessor, added to the embedding; None: no such table. Needs a recurrent first layer, whose
            cache keeps the last token.
        ngram_order: n of n-grams, whose counts predict beside the network, or alone (mixer ngram, whose
            `hidden_size`, the words of its state, follows from it); None: no counts.
        ngram_history: last tokens of the text being read that are searched for what followed the same words,
            beside a network and its counts; None: no search.
        ngram_sizes: tokens that were in the vocabulary when they were counted, and numbers of stored n-grams
            of 2, 3, ... n tokens.
        mixer_types: per layer one of elman, gru, lstm, gated_linear, full_attention, sliding_attention; or
            ngram alone.
        num_hidden_layers: number of layers; None: that of `mixer_types`, or 4.
        shared_layers: number of layers that share each set of weights: the first `num_hidden_layers` /
            `shared_layers` layers run `shared_layers` times, in order, each time with its own state or cache.
        recurrent_size: width of a recurrent state; None: `hidden_size`.
        num_attention_heads: of the attention mixers; None: about one per 64 columns of `hidden_size`.
        num_key_value_heads: None: `num_attention_heads`.
        head_dim: None: `hidden_size` / `num_attention_heads`.
        sliding_window: tokens that a sliding_attention layer attends to, the current one included.
        qk_norm: normalise queries and keys in attention.
        intermediate_size: width of the MLP; None: 4 * `hidden_size`, or 8/3 of it, rounded up to a multiple
            of 32, for a gated MLP, which has three matrices instead of two.
        gated_mlp: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
        mlp_rank: rank of the MLP's matrices, each a product of two; None: full matrices.
        hidden_act: activation of the MLP, a name of transformers ("relu2" is the squared ReLU).
        position_type: rotary (attention layers only), learned (added to the embedding) or none.
        rope_parameters: base and scaling of the rotary positions, as in transformers.
        max_position_embeddings: maximum context in tokens; a hard limit for learned positions only.
        dropout: on the embedding and the output of every mixer and MLP, in training.
        output_bias: add a bias to the logits.
        final_logit_softcapping: bound c of the logits, c tanh(logits / c); None: unbounded.
        tie_word_embeddings: the head is E, through W if there is one.
        initializer_range: standard deviation of new weights.

    An unknown key is kept as an attribute, as in every config of transformers, unless it resembles a field.

    Raises:
        ValueError, TypeError, StrictDataclassError: a value outside its range, with the range. The last, of
            huggingface_hub, means another type, or has the ValueError as its cause.
    """

    model_type = "genlm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    write_code = None  # bundle.write_bundle, except in a copy from the Hub, which is bundled already

    vocab_size: int = 4096
    hidden_size: int = 256
    embedding_size: int | None = None
    embedding_projection: bool | None = None
    bigram_size: int | None = None
    ngram_order: int | None = None
    ngram_history: int | None = None
    ngram_sizes: list[int] | None = None
    mixer_types: list[str] | None = None
    num_hidden_layers: int | None = None
    shared_layers: int = 1
    recurrent_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    qk_norm: bool = True
    intermediate_size: int | None = None
    gated_mlp: bool = False
    mlp_rank: int | None = None
    hidden_act: str = "relu2"
    position_type: str = "rotary"
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0
    output_bias: bool = False
    final_logit_softcapping: float | None = None
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        decoder = kwargs.pop("decoder", None)
        rope_parameters = kwargs.pop("rope_parameters", None)
        _check_rope(rope_parameters)
        self._refuse_misspellings(kwargs)
        self.validate_ranges()  # before sizes are derived
        if self.mixer_types is None:
            n_layers = self.num_hidden_layers or (1 if decoder == NGRAM else 4)
            self.mixer_types = mixers_of(decoder or "gated_linear", n_layers)
        elif decoder is not None:
            raise ValueError("give mixer_types or decoder, not both")
        if self.num_hidden_layers is None:
            self.num_hidden_layers = len(self.mixer_types)
        if self.holds_counts:
            self.ngram_order = self.ngram_order or 5
            self.ngram_sizes = self.ngram_sizes or [self.vocab_size] + [1] * (self.ngram_order - 1)
        if self.is_ngram:
            self._set_ngram()
        if self.recurrent_size is None:
            self.recurrent_size = self.hidden_size
        if self.intermediate_size is None:
            gated = 32 * -(-self.hidden_size // 12)
            self.intermediate_size = gated if self.gated_mlp else 4 * self.hidden_size
        if self.num_attention_heads is None:
            self.num_attention_heads = _default_num_heads(self.hidden_size)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.sliding_window is None and "sliding_attention" in self.mixer_types:
            self.sliding_window = max(2, self.max_position_embeddings // 4)
        self.validate_layer_type()  # before transformers reads layer_types
        if self.has_rotary_positions:  # not a field: without rotary positions it has no meaning
            self.rope_parameters = rope_parameters
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """Save as PreTrainedConfig does; a model's code, which transformers has copied, becomes two files."""
        super().save_pretrained(save_directory, **kwargs)
        if self.write_code is not None:
            self.write_code(save_directory)

    def to_dict(self) -> dict:
        """The fields. PEFT reads `model_type` here, by which it then looks up default modules: it is imported
        at this moment, before or after the model was built."""
        constants = sys.modules.get("peft.utils.constants")
        for name, modules in ({} if constants is None else vars(constants)).items():
            if name.startswith(_PEFT_PREFIX) and name.endswith(_PEFT_SUFFIX):
                kind = name.removeprefix(_PEFT_PREFIX).removesuffix(_PEFT_SUFFIX)
                modules.setdefault(self.model_type, _PEFT_MODULES.get(kind, _INPUT_PROJECTIONS))
        return super().to_dict()

    @property
    def layer_types(self) -> list[str]:
        """transformers' name of each layer, by which it chooses the cache layer and the mask.

        `assistant_early_exit` of generate sets a smaller `num_hidden_layers` while it drafts.
        """
        return [_LAYER_TYPE_OF[mixer] for mixer in self.mixer_types[: self.num_hidden_layers]]

    @layer_types.setter
    def layer_types(self, value):
        raise AttributeError("layer_types follows from mixer_types: set that")

    @property
    def is_ngram(self) -> bool:
        """True for a decoder of counts, without a network."""
        return self.mixer_types[0] == NGRAM

    @property
    def holds_counts(self) -> bool:
        """True for a model with tables of n-grams, which keep pieces of the training text word for word."""
        return self.is_ngram or self.ngram_order is not None

    def _set_ngram(self):
        """Set the fields that follow from the order, and those that only a network reads to what they say."""
        self.hidden_size = max(1, self.ngram_order - 1)
        self.num_attention_heads = self.num_key_value_heads = self.head_dim = 1
        self.position_type, self.dropout, self.tie_word_embeddings = "none", 0.0, False

    @property
    def is_recurrent(self) -> bool:
        """True if a state of fixed size is all that passes from token to token, in a text of any length."""
        are_recurrent = all(mixer in (*RECURRENT_MIXERS, NGRAM) for mixer in self.mixer_types)
        return are_recurrent and self.position_type != "learned"

    @property
    def num_distinct_layers(self) -> int:
        """Number of layers with their own weights."""
        return self.num_hidden_layers // self.shared_layers

    @property
    def has_embedding_projection(self) -> bool:
        """True if the word embedding is E W + b."""
        if self.embedding_projection is not None:
            return self.embedding_projection
        return self.embedding_width != self.hidden_size

    @property
    def has_rotary_positions(self) -> bool:
        """True if any layer rotates its queries and keys."""
        return self.position_type == "rotary" and any(mixer in ATTENTION_MIXERS for mixer in self.mixer_types)

    @property
    def embedding_width(self) -> int:
        """Columns r of the embedding table."""
        return self.embedding_size or self.hidden_size

    def validate_layer_type(self):
        """Check that each layer has a known mixer; replaces transformers' check of its own layer types."""
        unknown = [mixer for mixer in self.mixer_types if mixer not in MIXER_TYPES]
        if unknown:
            raise ValueError(f"unknown mixer {unknown[0]!r}; known: {', '.join(MIXER_TYPES)}")
        if not self.mixer_types or self.num_hidden_layers != len(self.mixer_types):
            raise ValueError(
                f"num_hidden_layers ({self.num_hidden_layers}) must be the number of mixer_types "
                f"({len(self.mixer_types)}), at least 1"
            )

    def validate_sharing(self):
        """Check that layers that share weights have the same mixer."""
        if self.shared_layers < 1 or self.num_hidden_layers % self.shared_layers != 0:
            raise ValueError(
                f"shared_layers ({self.shared_layers}) must divide the number of layers "
                f"({self.num_hidden_layers})"
            )
        for layer, mixer in enumerate(self.mixer_types):
            first = layer % self.num_distinct_layers
            if mixer != self.mixer_types[first]:
                raise ValueError(
                    f"with shared_layers {self.shared_layers}, layer {layer} ({mixer}) would have the "
                    f"weights of layer {first} ({self.mixer_types[first]}): the mixers must repeat every "
                    f"{self.num_distinct_layers} layers"
                )

    def validate_shapes(self):
        """Check that heads divide widths."""
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.embedding_projection is False and self.embedding_width != self.hidden_size:
            raise ValueError(
                f"embedding_size ({self.embedding_size}) other than hidden_size ({self.hidden_size}) needs "
                "embedding_projection"
            )

    def validate_ranges(self):
        """Check that numbers are finite and in their ranges, and token ids not negative."""
        for name, (minimum, maximum) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not minimum <= value <= maximum:
                raise ValueError(f"{name} must be at least {minimum:,} and at most {maximum:,}, not {value}")
        if len(self.mixer_types or ()) > _RANGES["num_hidden_layers"][1]:
            raise ValueError(f"mixer_types must name at most {_RANGES['num_hidden_layers'][1]:,} layers")
        ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        for token_id in (*ids, self.bos_token_id, self.pad_token_id):
            if token_id is not None and not 0 <= token_id < 2**31:
                raise ValueError(f"a token id must be from 0 to 2,147,483,647, not {token_id}")

    def validate_activation(self):
        """Check that the activation is known."""
        from transformers.activations import ACT2FN

        if self.hidden_act not in ACT2FN:
            raise ValueError(f"unknown hidden_act {self.hidden_act!r}; known: {', '.join(ACT2FN)}")

    def validate_bigrams(self):
        """Check that a model with bigrams has a recurrent first layer."""
        if self.bigram_size is not None and self.mixer_types[0] not in RECURRENT_MIXERS:
            raise ValueError(
                f"bigram_size needs a first layer that keeps the last token in its state, one of "
                f"{', '.join(RECURRENT_MIXERS)}, not {self.mixer_types[0]}"
            )

    def validate_ngram(self):
        """Check that an n-gram layer is the only one, and that its tables and word numbers can exist."""
        if NGRAM in self.mixer_types and len(self.mixer_types) > 1:
            raise ValueError("an ngram layer is a decoder of its own: mixer_types must name no other layer")
        if self.ngram_history is not None and (self.is_ngram or not self.holds_counts):
            raise ValueError("ngram_history stands beside a network and its counts: give ngram_order")
        if not self.holds_counts:
            return
        sizes = self.ngram_sizes
        if len(sizes) != self.ngram_order or not all(0 <= size < 2**31 for size in sizes):
            raise ValueError(
                f"ngram_sizes must hold {self.ngram_order} numbers, of n-grams of 1 to {self.ngram_order} "
                f"tokens, each from 0 to 2,147,483,647, not {sizes}"
            )
        least = self.vocab_size if self.is_ngram else 1  # a network can get tokens that were not counted
        if not least <= sizes[0] <= self.vocab_size:
            raise ValueError(
                f"ngram_sizes[0] ({sizes[0]:,}) must be from {least:,} to vocab_size ({self.vocab_size:,})"
            )
        if self.vocab_size > 2**24:  # numbers of words are kept in float32
            raise ValueError(f"an n-gram model holds at most 16,777,216 tokens, not {self.vocab_size:,}")
        if not self.is_ngram:
            return
        if self.bigram_size is not None or self.output_bias or self.final_logit_softcapping is not None:
            raise ValueError("an n-gram model has no bigram_size, output_bias or final_logit_softcapping")

    def validate_positions(self):
        """Check that the position type is known."""
        if self.position_type not in POSITION_TYPES:
            known = ", ".join(POSITION_TYPES)
            raise ValueError(f"unknown position_type {self.position_type!r}; known: {known}")

    def validate_rope(self):
        """Check the rotary parameters, ours first and then transformers', if they are used."""
        self.validate_shapes()
        if not self.has_rotary_positions:
            return
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even with rotary positions, not {self.head_dim}")
        _check_rope(self.rope_parameters)
        try:
            super().validate_rope()
        except KeyError as error:  # transformers' error for a missing parameter of this rope_type
            raise ValueError(f"rope_parameters: {error.args[0]}") from error

    def _refuse_misspellings(self, keys):
        """Refuse a key that resembles a field, since it would be ignored."""
        for key in keys:
            near = difflib.get_close_matches(key, GenLMConfig.__annotations__, n=1, cutoff=0.9)
            if near:
                raise ValueError(f"unknown key {key!r}; did you mean {near[0]!r}?")
            if callable(getattr(type(self), key, None)):
                raise ValueError(f"{key!r} is a method of the config, not a key")


def _check_rope(rope_parameters):
    """Check for a known rope_type, and finite numbers above 0 or lists of them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if not isinstance(rope_parameters, dict | None):
        raise TypeError(f"rope_parameters must be a dict, not {rope_parameters!r}")
    given = rope_parameters or {}
    known = ("default", *ROPE_INIT_FUNCTIONS)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in known:
        raise ValueError(f"unknown rope_type {kind!r}; known: {', '.join(known)}")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("rope_parameters: partial_rotary_factor must be 1: whole heads are rotated")
    for name, value in given.items():
        for number in value if isinstance(value, list) else [value]:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if name not in _ROPE_WORDS and not (is_number and 0 < number < 1e30):
                raise ValueError(f"rope_parameters: {name} must be a finite number above 0, not {number!r}")


__all__ = ["DECODERS", "GenLMConfig", "mixers_of"]
