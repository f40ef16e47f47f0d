"""What an installation can do, and what a model will cost before any training. Run it with `hf-genlm doctor
[--parameters]`.

A model is built on the meta device, where tensors have shapes and no memory, and its modules are counted.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from hf_genlm import serving
from hf_genlm.card.parameters import part_names, part_of, parts_of
from hf_genlm.config.recipe import Recipe, TokenizerRecipe
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.model.attention_genlm import GenLMAttention
from hf_genlm.run_folder import describe_environment
from hf_genlm.text.tokenizer import load_tokenizer
from hf_genlm.training.budget import resolve
from hf_genlm.training.configure import build_config, mixer_types_of
from hf_genlm.training.trainer import computes_bfloat16
from hf_genlm.training.word_vectors import adopt_dimension

ASSUMED_VOCAB_SIZE = 4096
# float32 weights, their gradients, and the two moments of AdamW
TRAINING_BYTES_PER_PARAMETER = 16
_LAST_TOKEN_BYTES = 4  # float32, as the other states

# optional extra of the package: what it is for, and the distributions that it installs
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "zstd": ("sources compressed as .zst", ("zstandard",)),
    "vectors": ("fastText's .bin files of word vectors", ("gensim",)),
    "gpu": ("faster kernels on CUDA", ("liger-kernel", "fla-core")),
    "eval": ("hf-genlm evaluate --tasks", ("lm_eval",)),
    "mauve": ("MAUVE of samples", ("mauve-text",)),
    "serve": ("hf-genlm serve and chat", serving.LIBRARIES),
    "track": ("training.report_to", ("tensorboard", "trackio")),
    "privacy": (
        "training with a guarantee, and scrubbed text",
        ("opacus", "datasketch", "detect-secrets", "phonenumbers"),
    ),
    "space": ("the demo of hf-genlm space", ("gradio",)),
    "export": ("hf-genlm export", ("onnxscript", "onnxruntime", "gguf")),
    "test": (
        "the tests, lint and types",
        (
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "zstandard",
            "gensim",
            "tensorboard",
            "trackio",
            *serving.LIBRARIES,
            "parameterized",
            "nltk",
            "mauve-text",
            "peft",
            "trl",
            "torchao",
            "lm_eval",
            "onnxscript",
            "onnxruntime",
            "liger-kernel",
            "fla-core",
            "gguf",
            "opacus",
            "datasketch",
            "detect-secrets",
            "phonenumbers",
            "dp-accounting",
            "gradio",
            "playwright",
        ),
    ),
}


@dataclass(frozen=True)
class Extra:
    """An optional part of the installation; it is whole when nothing is `missing`."""

    name: str
    purpose: str
    missing: list[str]  # distributions

    @property
    def command(self) -> str:
        """What installs it."""
        return f"pip install 'hf_genlm[{self.name}]'"


@dataclass(frozen=True)
class Installation:
    """What this machine and the packages on it can do."""

    environment: dict[str, Any]  # as `describe_environment` gives it
    devices: list[str]
    training_device: str
    n_training_gpus: int  # in this process: `train` refuses more than one
    is_bfloat16_native: bool
    extras: list[Extra]

    @property
    def training_dtype(self) -> str:
        """What training.dtype=auto computes in."""
        return "bfloat16" if self.is_bfloat16_native else "float32"

    def to_json(self) -> dict[str, Any]:
        """The fields and what follows from them, by name."""
        commands = [{**asdict(extra), "command": extra.command} for extra in self.extras]
        return {**asdict(self), "extras": commands, "training_dtype": self.training_dtype}


@dataclass(frozen=True)
class PartCost:
    """One part of a model, all its layers together. Bytes are those of one sequence."""

    name: str  # as on the model card
    n_layers: int  # of a mixer: the layers that hold it; else 0
    n_parameters: int
    flops_per_token: float  # forward, the mean over a row as long as the context
    state_bytes: int  # the same after any number of tokens
    cache_bytes_per_token: int
    cache_tokens: int | None  # the most tokens that are kept; None: all of them

    def memory_bytes(self, n_tokens: int) -> int:
        """State and cache after `n_tokens` tokens, at least 1."""
        kept = n_tokens if self.cache_tokens is None else min(n_tokens, self.cache_tokens)
        return self.state_bytes + self.cache_bytes_per_token * kept


@dataclass(frozen=True)
class ModelCost:
    """A model part by part, and in all."""

    hidden_size: int
    mixer_types: list[str]  # of each layer that has parameters of its own
    layer_runs: int  # times that each of them runs for one token
    vocab_size: int
    is_vocab_size_assumed: bool
    is_size_assumed: bool
    context: int  # tokens
    dtype: str  # of the keys and values; states are float32
    parts: list[PartCost]

    @property
    def n_parameters(self) -> int:
        """All that are trained; a tied head has none of its own."""
        return sum(part.n_parameters for part in self.parts)

    @property
    def flops_per_token(self) -> float:
        """Of the forward pass, the mean over a row as long as the context."""
        return sum(part.flops_per_token for part in self.parts)

    @property
    def training_flops_per_token(self) -> float:
        """Forward, and a backward pass of twice as much: for the inputs, and for the weights."""
        return 3 * self.flops_per_token

    @property
    def state_bytes(self) -> int:
        """Of one sequence, after any number of tokens."""
        return sum(part.state_bytes for part in self.parts)

    @property
    def cache_bytes_per_token(self) -> int:
        """Of one sequence, while no window is full."""
        return sum(part.cache_bytes_per_token for part in self.parts)

    @property
    def training_bytes(self) -> int:
        """Weights, gradients and AdamW's moments in float32; activations come on top."""
        return TRAINING_BYTES_PER_PARAMETER * self.n_parameters

    def memory_bytes(self, n_tokens: int) -> int:
        """State and cache of one sequence after `n_tokens` tokens, at least 1."""
        return sum(part.memory_bytes(n_tokens) for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """The fields and what follows from them, by name."""
        names = ("n_parameters", "flops_per_token", "training_flops_per_token", "state_bytes",
                 "cache_bytes_per_token", "training_bytes")  # fmt: skip
        totals = {name: getattr(self, name) for name in names}
        return {**asdict(self), **totals, "memory_bytes_at_context": self.memory_bytes(self.context)}


def describe_installation() -> Installation:
    """Versions, devices and extras, and what `train` would make of them."""
    arguments = TrainingArguments(output_dir="unused", report_to="none")  # Trainer's choice; writes nothing
    return Installation(
        environment=describe_environment(),
        devices=_devices(),
        training_device=arguments.device.type,
        n_training_gpus=arguments.n_gpu,
        is_bfloat16_native=computes_bfloat16(),
        extras=[
            Extra(name, purpose, [package for package in packages if not _is_installed(package)])
            for name, (purpose, packages) in EXTRAS.items()
        ],
    )


def describe_model(recipe: Recipe) -> ModelCost:
    """The cost of the model that `train` would make of `recipe`.

    A vocabulary that the recipe leaves open is that of the tokenizer it names, else 4,096 tokens are assumed:
    `train` chooses it by the size of the text, which is not read here. A size that is left open is `tiny`:
    `train` chooses it by its time.

    Raises:
        UserError: a recipe that `train` would refuse for its model or vocabulary.
    """
    is_size_assumed = recipe.model.size is None and recipe.model.hidden_size is None
    recipe = resolve(recipe)
    if recipe.model.embedding_size is None:
        adopt_dimension(recipe)
    config = build_config(recipe, mixer_types_of(recipe))
    vocab_size = _vocab_size_of(recipe.tokenizer)
    config.vocab_size = ASSUMED_VOCAB_SIZE if vocab_size is None else vocab_size
    with torch.device("meta"):
        model = GenLMForCausalLM(config)
    return ModelCost(
        hidden_size=config.hidden_size,
        mixer_types=_stored_mixers(model),
        layer_runs=config.shared_layers,
        vocab_size=config.vocab_size,
        is_vocab_size_assumed=vocab_size is None,
        is_size_assumed=is_size_assumed,
        context=config.max_position_embeddings,
        dtype=str(model.dtype).removeprefix("torch."),
        parts=count_parts(model, config.max_position_embeddings),
    )


def count_parts(model: GenLMForCausalLM, context: int) -> list[PartCost]:
    """The parts of `model`, on any device, with what they cost in a row of `context` tokens."""
    words = _stored_mixers(model)
    runs = model.config.shared_layers
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    n_parameters = {part.name: part.n_parameters for part in parts_of(sizes, words)}
    flops = count_flops(model, context)
    mixers: dict[str, list[nn.Module]] = {part: [] for part in part_names(words)}
    for index, layer in enumerate(model.model.layers):
        mixers[part_of(f"layers.{index}.mixer", words)].append(layer.mixer)
    state_bytes = {part: runs * sum(_state_bytes(mixer, model) for mixer in mixers[part]) for part in mixers}
    if model.model.embed_bigrams is not None:
        state_bytes[part_of("model.embed_bigrams", words)] += _LAST_TOKEN_BYTES
    return [
        PartCost(
            name=part,
            n_layers=len(mixers[part]),
            n_parameters=n_parameters.get(part, 0),
            flops_per_token=flops[part] / context,
            state_bytes=state_bytes[part],
            cache_bytes_per_token=runs * sum(_cache_bytes(mixer, model) for mixer in mixers[part]),
            cache_tokens=next((_cache_tokens(mixer) for mixer in mixers[part]), None),
        )
        for part in mixers
        if part in n_parameters or part in flops
    ]


def count_flops(model: GenLMForCausalLM, context: int) -> Counter[str]:
    """Floating-point operations of one forward pass over a row of `context` tokens, by part.

    They are 2 x in x out a token for every nn.Linear, the head included, and for attention those of scores
    and values, 4 x heads x head_dim for every pair of a token and a token it sees. Lookups and elementwise
    work (norms, activations, gates, rotations, softmax) are not counted.
    """
    words = _stored_mixers(model)
    runs = model.config.shared_layers
    flops: Counter[str] = Counter()
    for name, module in model.named_modules():
        n_runs = runs if name.startswith("model.layers.") else 1
        if isinstance(module, nn.Linear):
            flops[part_of(name, words)] += 2 * module.in_features * module.out_features * context * n_runs
        elif isinstance(module, GenLMAttention):
            width = model.config.num_attention_heads * module.head_dim
            flops[part_of(name, words)] += 4 * width * visible_pairs(context, module.sliding_window) * n_runs
    if model.model.reads_out:
        # what the head reads goes back through W, which no module of its own says
        flops[part_of("model.embed_proj", words)] += 2 * model.model.embed_proj.weight.numel() * context
    return flops


def visible_pairs(n_tokens: int, window: int | None = None) -> int:
    """Pairs of a token and a token that it sees, itself included, in a causal row of `n_tokens`.

    `window` is the most tokens that one sees; None: all before it, n (n + 1) / 2 pairs.
    """
    most = n_tokens if window is None else min(window, n_tokens)
    return most * (most + 1) // 2 + (n_tokens - most) * most


def _state_bytes(mixer: nn.Module, model: GenLMForCausalLM) -> int:
    """Of the recurrent state of one sequence."""
    if isinstance(mixer, GenLMAttention):
        return 0
    token = torch.empty(1, 1, model.config.hidden_size, dtype=model.dtype, device="meta")
    return sum(state.nbytes for state in mixer.initial_states(token))


def _cache_bytes(mixer: nn.Module, model: GenLMForCausalLM) -> int:
    """Of the key and the value of one token."""
    if not isinstance(mixer, GenLMAttention):
        return 0
    return 2 * model.config.num_key_value_heads * mixer.head_dim * model.dtype.itemsize


def _cache_tokens(mixer: nn.Module) -> int | None:
    """The most tokens whose keys and values are kept: what the next token sees beside itself; None: all."""
    window = getattr(mixer, "sliding_window", None)
    return None if window is None else window - 1


def _stored_mixers(model: GenLMForCausalLM) -> list[str]:
    """The mixer's word for each layer that has parameters of its own."""
    return [model.config.mixer_types[layer.mixer.layer_idx] for layer in model.model.layers]


def _vocab_size_of(recipe: TokenizerRecipe) -> int | None:
    """As given, or of the tokenizer that the recipe names, or None."""
    if recipe.vocab_size is None and recipe.path is not None:
        return len(load_tokenizer(recipe.path))
    return recipe.vocab_size


def _devices() -> list[str]:
    """Every device that torch can compute on, in words."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    if accelerator.type != "cuda":
        return [accelerator.type, "cpu"]
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    gpus = [f"cuda:{i}, {gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" for i, gpu in enumerate(found)]
    return [*gpus, "cpu"]


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
