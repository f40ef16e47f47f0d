"""Capabilities of an installation, and the cost of a model before any training: `hf-genlm doctor`.

A model is built on the meta device, where tensors have shapes but no memory, and its modules are counted.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import nn
from transformers import TrainingArguments

from hf_genlm.card.wording import part_names, part_of, parts_of
from hf_genlm.config.recipe import Recipe, TokenizerRecipe
from hf_genlm.config.settle import settle, settle_reading
from hf_genlm.errors import install_command
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.model.attention_genlm import GenLMAttention
from hf_genlm.model.ngram_genlm import NgramContext
from hf_genlm.run_folder import describe_environment
from hf_genlm.text.tokenizer import load_tokenizer
from hf_genlm.training.check import read_facts
from hf_genlm.training.counting import MAX_ORDER
from hf_genlm.training.trainer import computes_bfloat16

# float32 weights, their gradients, and the two moments of AdamW
TRAINING_BYTES_PER_PARAMETER = 16
_LAST_TOKEN_BYTES = 4  # float32, as the other states

# optional extra of the package -> what it is for; the package's metadata states its distributions
PURPOSES = {
    "zstd": "sources compressed as .zst",
    "documents": "PDF and Word files",
    "vectors": "fastText's .bin files of word vectors",
    "gpu": "faster kernels on CUDA",
    "eval": "hf-genlm evaluate --tasks",
    "mauve": "MAUVE of samples",
    "serve": "hf-genlm serve and chat",
    "track": "training.report_to",
    "privacy": "training with a guarantee, scrubbed text",
    "space": "the demo of hf-genlm space",
    "export": "hf-genlm export",
    "test": "the tests, lint and types",
}


@dataclass(frozen=True)
class Extra:
    """An optional part of the installation; it is complete if nothing is `missing`."""

    name: str
    purpose: str
    missing: list[str]  # distributions

    @property
    def command(self) -> str:
        """The command that installs it, that of the tests from a clone of the repository."""
        return "pip install '.[test]'" if self.name == "test" else install_command(self.name)


@dataclass(frozen=True)
class Installation:
    """Versions and devices of this machine, and what training would use."""

    environment: dict[str, Any]  # as `describe_environment` returns it
    devices: list[str]
    training_device: str
    n_training_gpus: int  # in this process; `train` refuses more than one
    is_bfloat16_native: bool
    extras: list[Extra]

    @property
    def training_dtype(self) -> str:
        """The dtype that training.dtype=auto stands for, but for narrow decoders on a CPU."""
        return "bfloat16" if self.is_bfloat16_native else "float32"

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the derived values by name."""
        commands = [{**asdict(extra), "command": extra.command} for extra in self.extras]
        return {**asdict(self), "extras": commands, "training_dtype": self.training_dtype}


@dataclass(frozen=True)
class PartCost:
    """Cost of one part of a model over all its layers. Bytes are per sequence."""

    name: str  # as on the model card
    n_layers: int  # layers with this mixer; 0 for other parts
    n_parameters: int
    flops_per_token: float  # of the forward pass, averaged over a row as long as the context
    state_bytes: int  # constant in the number of tokens
    cache_bytes_per_token: int
    cache_tokens: int | None  # maximal number of cached tokens; None: all tokens

    def memory_bytes(self, n_tokens: int) -> int:
        """Return the bytes of state and cache after `n_tokens` (at least 1) tokens."""
        kept = n_tokens if self.cache_tokens is None else min(n_tokens, self.cache_tokens)
        return self.state_bytes + self.cache_bytes_per_token * kept


@dataclass(frozen=True)
class ModelCost:
    """Cost of a model, by part and in total."""

    hidden_size: int
    mixer_types: list[str]  # of each layer with its own parameters
    layer_runs: int  # times that each of these layers runs for one token
    vocab_size: int
    is_vocab_size_assumed: bool
    is_size_assumed: bool
    context: int  # tokens
    dtype: str  # of the keys and values; states are float32
    n_trained: int  # parameters that training changes; those of a table of counts are not
    weight_bytes: int  # of all parameters; of a table of counts, at most
    parts: list[PartCost]

    @property
    def n_parameters(self) -> int:
        """Number of parameters; a tied head adds none."""
        return sum(part.n_parameters for part in self.parts)

    @property
    def flops_per_token(self) -> float:
        """FLOPs of the forward pass per token, averaged over a row as long as the context."""
        return sum(part.flops_per_token for part in self.parts)

    @property
    def training_flops_per_token(self) -> float:
        """FLOPs of forward and backward pass; the backward pass takes twice as many as the forward pass."""
        return 3 * self.flops_per_token

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent states of one sequence."""
        return sum(part.state_bytes for part in self.parts)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, before any window is full."""
        return sum(part.cache_bytes_per_token for part in self.parts)

    @property
    def training_bytes(self) -> int:
        """Bytes of weights, gradients and AdamW's moments in float32, without activations."""
        return TRAINING_BYTES_PER_PARAMETER * self.n_trained

    def memory_bytes(self, n_tokens: int) -> int:
        """Return the bytes of state and cache of one sequence after `n_tokens` (at least 1) tokens."""
        return sum(part.memory_bytes(n_tokens) for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the derived values by name."""
        names = ("n_parameters", "flops_per_token", "training_flops_per_token", "state_bytes",
                 "cache_bytes_per_token", "training_bytes")  # fmt: skip
        totals = {name: getattr(self, name) for name in names}
        return {**asdict(self), **totals, "memory_bytes_at_context": self.memory_bytes(self.context)}


def describe_installation() -> Installation:
    """Describe versions, devices and extras, and what `train` would use."""
    arguments = TrainingArguments(output_dir="unused", report_to="none")  # chooses the device, writes nothing
    return Installation(
        environment=describe_environment(),
        devices=_devices(),
        training_device=arguments.device.type,
        n_training_gpus=arguments.n_gpu,
        is_bfloat16_native=computes_bfloat16(),
        extras=list_extras(),
    )


def list_extras(find_version: Callable[[str], str] = metadata.version) -> list[Extra]:
    """List the extras of this package with the distributions that are missing; none if it is not installed.

    Args:
        find_version: returns the version of a distribution, or raises `PackageNotFoundError`.
    """
    try:
        extras = metadata.metadata("hf_genlm").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []
    names = sorted(extras, key=[*PURPOSES, *extras].index)
    return [Extra(name, PURPOSES.get(name, ""), _missing("hf_genlm", name, find_version)) for name in names]


def _missing(distribution: str, extra: str, find_version: Callable[[str], str]) -> list[str]:
    """Distributions of an extra that are not installed, those of the extras that it names included."""
    found = []
    for line in metadata.requires(distribution) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue  # required without the extra, or not on this machine
        try:
            find_version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(requirement.name)
        else:
            for inner in sorted(requirement.extras):
                found += _missing(requirement.name, inner, find_version)
    return found


def describe_model(recipe: Recipe) -> ModelCost:
    """Compute the cost of the model that `train` would build from `recipe`.

    An open vocabulary size is that of the tokenizer that the recipe names, or else 4,096, since `train`
    chooses it by the text, which is not read here. An open size is `tiny`, since `train` chooses it by its
    time. Tables of counts have as many entries as they may have.

    Raises:
        UserError: `train` would refuse the recipe for its model or vocabulary.
    """
    is_ngram = recipe.model.is_ngram
    is_size_assumed = not is_ngram and recipe.model.size is None and recipe.model.hidden_size is None
    facts = read_facts(recipe)
    vocab_size = _vocab_size_of(settle_reading(recipe, facts).tokenizer)
    facts = replace(facts, vocab_size=vocab_size)
    settings = settle(recipe, facts)
    if settings.architecture.holds_counts and facts.base is None:
        # the largest tables are those with every entry at the lowest level: contexts of others
        order = MAX_ORDER if is_ngram else settings.architecture.ngram_order or 1
        order = recipe.model.ngram_order or order
        sizes = (settings.architecture.vocab_size, settings.model.ngram_entries or 0, *[0] * order)
        settings = settle(recipe, replace(facts, ngram_sizes=sizes[:order]))
    config = settings.architecture
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
        n_trained=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        weight_bytes=sum(weight.nbytes for weight in model.parameters()),
        parts=count_parts(model, config.max_position_embeddings),
    )


def count_parts(model: GenLMForCausalLM, context: int) -> list[PartCost]:
    """List the parts of `model` (on any device) with their costs in a row of `context` tokens."""
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
    if model.model.ngram_context is not None:
        state_bytes[part_of("mixture.ngrams", words)] += model.model.ngram_context.width * _LAST_TOKEN_BYTES
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
    """Count the floating-point operations of one forward pass over a row of `context` tokens, by part.

    Every nn.Linear, the head included, takes 2 x in x out per token. Attention takes 4 x heads x head_dim for
    every pair of a token and a token visible to it. Lookups and elementwise operations (norms, activations,
    gates, rotations, softmax) are not counted.
    """
    words = _stored_mixers(model)
    runs = model.config.shared_layers
    flops: Counter[str] = Counter()
    for name, module in model.named_modules():
        n_runs = runs if name.startswith("model.layers.") else 1
        if isinstance(module, nn.Linear):
            flops[part_of(name, words)] += 2 * module.in_features * module.out_features * context * n_runs
        elif isinstance(module, GenLMAttention):
            width = model.config.num_attention_heads * module.head_dim  # type: ignore[operator]
            flops[part_of(name, words)] += 4 * width * visible_pairs(context, module.sliding_window) * n_runs
    if model.model.reads_out:
        # the head's input is projected back through W; no module stands for this
        flops[part_of("model.embed_proj", words)] += 2 * model.model.embed_proj.weight.numel() * context
    return flops


def visible_pairs(n_tokens: int, window: int | None = None) -> int:
    """Count the pairs of a token and a visible token, itself included, in a causal row of `n_tokens`.

    `window` is the number of tokens visible to a token; None: all tokens before it, n (n + 1) / 2 pairs.
    """
    most = n_tokens if window is None else min(window, n_tokens)
    return most * (most + 1) // 2 + (n_tokens - most) * most


def _state_bytes(mixer: nn.Module, model: GenLMForCausalLM) -> int:
    """Return the bytes of the recurrent state of one sequence."""
    if isinstance(mixer, GenLMAttention):
        return 0
    if isinstance(mixer, NgramContext):
        return mixer.width * torch.float32.itemsize
    token = torch.empty(1, 1, model.config.hidden_size, dtype=model.dtype, device="meta")
    return sum(state.nbytes for state in mixer.initial_states(token))  # type: ignore[operator]


def _cache_bytes(mixer: nn.Module, model: GenLMForCausalLM) -> int:
    """Return the bytes of the key and the value of one token."""
    if not isinstance(mixer, GenLMAttention):
        return 0
    return 2 * model.config.num_key_value_heads * mixer.head_dim * model.dtype.itemsize  # type: ignore[operator]


def _cache_tokens(mixer: nn.Module) -> int | None:
    """Return the maximal number of tokens whose keys and values are kept: window - 1; None: all."""
    window = getattr(mixer, "sliding_window", None)
    return None if window is None else window - 1


def _stored_mixers(model: GenLMForCausalLM) -> list[str]:
    """List the mixer of each layer with its own parameters."""
    return [model.config.mixer_types[layer.mixer.layer_idx] for layer in model.model.layers]  # type: ignore[index]


def _vocab_size_of(recipe: TokenizerRecipe) -> int | None:
    """Return the size as stated, or of the tokenizer that the recipe names, or None."""
    if recipe.vocab_size is None and recipe.path is not None:
        return len(load_tokenizer(recipe.path))
    return recipe.vocab_size


def _devices() -> list[str]:
    """Describe every device that torch can compute on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    if accelerator.type != "cuda":
        return [accelerator.type, "cpu"]
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    gpus = [f"cuda:{i}, {gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" for i, gpu in enumerate(found)]
    return [*gpus, "cpu"]
