"""One decoding step, its state, and its forms: module, trace, or compiled library.

The step is the model's own forward for one token, with its state in buffers of the caller: a copy of the
model's module tree that shares its parameters, with each Linear in the form that suits one token. No part of
the model is implemented twice.

Shapes: B batch, S slots for keys and values, K key-value heads, H head_dim, R recurrent_size.
"""

import copy
import hashlib
import json
import platform
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hf_genlm.errors import UserError
from hf_genlm.files import (
    atomic_path,
    cache_folder,
    find_open_path,
    program_folder,
    use_private_compiler_caches,
)
from hf_genlm.model import MIXERS, GenLMConfig, GenLMForCausalLM
from hf_genlm.model.bigram_genlm import LAST_TOKEN_SLOT
from hf_genlm.model.configuration_genlm import RECURRENT_MIXERS

MOVING_ROTATIONS = ("dynamic", "longrope")  # their frequencies depend on the length of the text
SLOTS_AT_ONCE = 64  # attention reads a multiple of so many slots: few shapes, little wasted work

Program = Callable[..., torch.Tensor]  # (token, position, slot, *buffers) -> logits
Inputs = Sequence[torch.Tensor]

# config fields that do not change the instructions of a step
_NOT_SHAPE = {
    "architectures", "auto_map", "transformers_version", "dtype", "use_cache", "initializer_range",
    "dropout", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id",
    "ngram_sizes", "ngram_history",
}  # fmt: skip


@dataclass(frozen=True)
class Slots:
    """Buffers of the state of one layer."""

    kind: str  # "full_attention", "sliding_attention" or "recurrent"
    states: tuple[int, ...] = ()  # the slots of a recurrent state


def slots_of(config: GenLMConfig) -> list[Slots]:
    """The slots of each layer."""
    found = []
    for layer, mixer in enumerate(config.mixer_types or ()):
        if mixer not in RECURRENT_MIXERS:
            found.append(Slots(mixer))
            continue
        recurrent: Any = MIXERS[mixer]
        states = tuple(range(recurrent.n_states))
        if layer == 0 and config.bigram_size is not None:
            states = (*states, LAST_TOKEN_SLOT)
        found.append(Slots("recurrent", states))
    return found


class StepCache:
    """The part of a cache that the mixers use, over buffers that are written in place."""

    def __init__(self, layers: list[Slots], buffers: Iterator[torch.Tensor], at: dict[str, torch.Tensor]):
        self.layers = layers
        self._at = at
        self._states: list[Any] = []
        for slots in layers:
            names = slots.states or ("keys", "values")
            self._states.append({name: next(buffers) for name in names})

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values (B, K, 1, H) of one token; return all of them (B, K, S, H)."""
        state, at = self._states[layer], self._at[self.layers[layer].kind]
        state["keys"].index_copy_(0, at, key.permute(2, 0, 1, 3))
        state["values"].index_copy_(0, at, value.permute(2, 0, 1, 3))
        return state["keys"].permute(1, 2, 0, 3), state["values"].permute(1, 2, 0, 3)

    def get_recurrent_state(self, layer: int, slot: int = 0) -> torch.Tensor:
        """The recurrent state (B, R)."""
        return self._states[layer][slot]

    def update_recurrent_state(self, state: torch.Tensor, layer: int, slot: int = 0, **kwargs: Any) -> None:
        """Write the recurrent state (B, R)."""
        self._states[layer][slot].copy_(state)

    def is_recording_past(self, layer: int) -> bool:
        """Always False: no token is removed again."""
        return False


class DecodeStep(nn.Module):
    """Module that computes the logits of the next token from one token and the state in `buffers`.

    Args:
        row_sums: express matrix products as products and sums, from which a compiler makes loops that suit
            one row; otherwise torch's kernels are called.
        int8: round matrices to 8-bit integers with a scale for each row.
    """

    def __init__(self, model: GenLMForCausalLM, row_sums: bool = False, int8: bool = False):
        super().__init__()
        shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
        shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
        self.model = copy.deepcopy(model, memo=shared)
        if self.model.mixture is not None:  # counts are looked up outside of the step
            self.model.lm_head = _HeadAndGate(self.model.lm_head, self.model.mixture.of_state)
            self.model.mixture = self.model.model.ngram_context = None  # type: ignore[assignment]
        self.form = {"row_sums": row_sums, "int8": int8}
        self.layer_slots = slots_of(model.config)
        self.config = model.config
        self._window: Any = model.config.sliding_window  # None without sliding layers
        if int8:
            _replace_linears(self.model, Int8Linear, suits=lambda linear: linear.in_features % 32 == 0)
        elif row_sums:
            _replace_linears(self.model, RowSums)
        self.model.config._attn_implementation = "sdpa"
        self.model.eval()

    def forward(
        self, token: torch.Tensor, position: torch.Tensor, slot: torch.Tensor, *buffers: torch.Tensor
    ) -> torch.Tensor:
        """Compute the logits (B, V) after `token`, and write its state into `buffers`.

        Of a model with counts: the logits of its network, and behind them its part of the gate's units.

        Args:
            token: (B, 1).
            position: (B, 1), without padding; incremented in place.
            slot: (1,), number of tokens so far including padding; incremented in place.
            buffers: of `StepState.buffers`; written in place.
        """
        given, at = iter(buffers), {}
        masks: dict[str, torch.Tensor | None] = {}
        for kind in _attention_kinds(self.config):
            seen = next(given)
            at[kind] = slot % self._window if kind == "sliding_attention" else slot
            seen.index_copy_(0, at[kind], torch.ones_like(seen[:1]))
            masks[kind] = seen.t()[:, None, None]
        masks |= dict.fromkeys(set(self.config.layer_types) - set(masks))
        logits = self.model(
            input_ids=token,
            attention_mask=masks,
            position_ids=position,
            past_key_values=StepCache(self.layer_slots, given, at),
            use_cache=True,
        ).logits
        position.add_(1)
        slot.add_(1)
        return logits[:, -1]


class _HeadAndGate(nn.Module):
    """The head and the gate's units of the state, side by side: (..., D) to (..., V + units)."""

    def __init__(self, head: nn.Module, of_state: nn.Module):
        super().__init__()
        self.head, self.of_state = head, of_state

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.head(states), self.of_state(states)], dim=-1)


class StepState:
    """Buffers of one generation: keys and values (S, B, K, H), slots in use (S, B), recurrent states (B, R).

    A sliding layer has as many slots as its window, and overwrites the oldest.
    """

    def __init__(self, config: GenLMConfig, like: torch.Tensor, n_rows: int, n_slots: int):
        """Allocate buffers for `n_rows` rows and `n_slots` slots, with the dtype and device of `like`."""
        self.config, self.n_slots = config, max(n_slots, 1)
        sizes: Any = config  # a built config has no None where a layer reads it
        heads = (n_rows, sizes.num_key_value_heads, sizes.head_dim)
        state_dtype = torch.promote_types(like.dtype, torch.float32)

        def n_of(kind: str) -> int:
            return sizes.sliding_window if kind == "sliding_attention" else self.n_slots

        self.grows: list[bool] = []
        self._whole: list[torch.Tensor] = []
        for kind in _attention_kinds(config):
            self._add(like.new_zeros(n_of(kind), n_rows, dtype=torch.bool), kind == "full_attention")
        for slots in slots_of(config):
            for state in slots.states:
                width = 1 if state == LAST_TOKEN_SLOT else sizes.recurrent_size
                self._add(like.new_zeros(n_rows, width, dtype=state_dtype), False)
            if slots.kind != "recurrent":
                for _ in ("keys", "values"):
                    self._add(like.new_zeros(n_of(slots.kind), *heads), slots.kind == "full_attention")

    def _add(self, buffer: torch.Tensor, grows: bool) -> None:
        self._whole.append(buffer)
        self.grows.append(grows)

    def buffers(self, n_tokens: int) -> list[torch.Tensor]:
        """The buffers for a step after which there are `n_tokens`; enlarge them if necessary."""
        n_used = -(-n_tokens // SLOTS_AT_ONCE) * SLOTS_AT_ONCE
        if n_used > self.n_slots and any(self.grows):
            self.n_slots = max(n_used, 2 * self.n_slots)
            for i, (buffer, grows) in enumerate(zip(self._whole, self.grows, strict=True)):
                if grows:
                    larger = buffer.new_zeros(self.n_slots, *buffer.shape[1:])
                    larger[: len(buffer)] = buffer
                    self._whole[i] = larger
        return [b[:n_used] if grows else b for b, grows in zip(self._whole, self.grows, strict=True)]

    def fill(self, cache: Any, valid: torch.Tensor) -> None:
        """Copy transformers' `cache` after a prompt, whose mask is `valid` (B, T)."""
        n_tokens = valid.shape[1]
        given = iter(self._whole)
        for _ in _attention_kinds(self.config):
            self._write(next(given), valid.t(), n_tokens)
        for slots, layer in zip(slots_of(self.config), cache.layers, strict=False):  # without the last words
            for state in slots.states:
                next(given).copy_(layer.recurrent_states[state])
            if slots.kind != "recurrent":
                for tensor in (layer.keys, layer.values):
                    self._write(next(given), tensor.permute(2, 0, 1, 3), n_tokens)

    @staticmethod
    def _write(buffer: torch.Tensor, rows: torch.Tensor, n_tokens: int) -> None:
        """Write the last of `rows`, which end at token `n_tokens`, into the slots of their tokens."""
        rows = rows[-len(buffer) :]
        at = torch.arange(n_tokens - len(rows), n_tokens, device=rows.device) % len(buffer)
        buffer[at] = rows.to(buffer.dtype)


class RowSums(nn.Module):
    """Linear as products and sums, for a compiler: for one token, limited by memory bandwidth only.

    The rows are split into four chunks so that four sums run in parallel instead of waiting for each
    addition.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer: (..., in) to (..., out)."""
        parts = [(x.unsqueeze(-2) * rows).sum(-1) for rows in self.weight.chunk(4)]
        y = torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """Linear with 8-bit weights, a scale for each row, and bfloat16 inputs."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1).clamp(min=1e-12) / 127
        weight = (linear.weight.detach() / scale[:, None]).round().to(torch.int8)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer: (..., in) to (..., out)."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _replace_linears(
    module: nn.Module, form: type[nn.Module], suits: Callable[[nn.Linear], bool] = lambda linear: True
) -> None:
    for name, child in module.named_children():
        if name == "embed_proj":  # the model reads its weight, for a head that is tied through it
            continue
        if type(child) is nn.Linear:
            if suits(child):
                setattr(module, name, form(child))
        else:
            _replace_linears(child, form, suits)


def _attention_kinds(config: GenLMConfig) -> list[str]:
    return [kind for kind in ("full_attention", "sliding_attention") if kind in (config.mixer_types or ())]


def as_module(step: DecodeStep, inputs: Inputs) -> Program:
    """The step as Python runs it: the reference of the others."""
    return step


def traced(step: DecodeStep, inputs: Inputs) -> Program:
    """Trace the step: its operations without Python, for any number of slots and rows."""
    copies = [tensor.clone() for tensor in inputs]  # tracing runs the step, which writes to them
    with warnings.catch_warnings():
        # the Python values that the trace makes constant do not depend on the number of slots and rows
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.jit.trace(lambda *tensors: step(*tensors), tuple(copies), check_trace=False)


def compiled(step: DecodeStep, inputs: Inputs) -> Program:
    """Compile the step.

    On a CPU into the library `program_file`, which all models of one shape share (tens of seconds once); on
    other devices by torch.compile with CUDA graphs, for this process.

    Raises:
        UserError: there is no C++ compiler, or another user could have put a program into the cache.
    """
    use_private_compiler_caches()
    if inputs[0].device.type != "cpu":
        for tensor in inputs[1:]:
            torch._dynamo.mark_static_address(tensor)
        return torch.compile(step, mode="reduce-overhead", fullgraph=True)
    file = program_file(step, inputs)
    program_folder()
    if not has_program(file):
        _compile_to(file, step, inputs)
    library = torch._inductor.aoti_load_package(str(file))
    weights = _weights(step)
    return _Library(library, {name: weights[name].detach() for name in library.get_constant_fqns()})


class _Library:
    """Compiled library and the weights that it reads.

    The weights are those of the model, not copies: training them changes what the program computes.
    """

    def __init__(self, library: Any, weights: dict[str, torch.Tensor]):
        self._library, self._weights = library, weights
        library.load_constants(weights, check_full_update=True, user_managed=True)

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        # by its loader: the library itself would parse the layout of its arguments at each call
        return self._library.loader.run(list(tensors))[0]


PROGRAMS: dict[str, Callable[[DecodeStep, Inputs], Program]] = {
    "module": as_module,
    "traced": traced,
    "compiled": compiled,
}


def program_file(step: DecodeStep, inputs: Inputs) -> Path:
    """Path of the step's library in the cache; the name is a hash of all that its instructions depend on."""
    decided = {
        "config": _shape_of(step.config),
        "form": step.form,
        "sources": [hashlib.sha256(file.read_bytes()).hexdigest() for file in _sources()],
        "tensors": [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in _weights(step).items()],
        "rows": len(inputs[0]),
        "versions": [torch.__version__, transformers.__version__],
        "machine": [_processor(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
    }
    digest = hashlib.sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / "programs" / f"step-{digest[:24]}.pt2"


def has_program(file: Path) -> bool:
    """True if there is a whole program that no other user could have written."""
    if not file.is_file() or any(map(find_open_path, (file, file.parent))):
        return False
    try:
        with zipfile.ZipFile(file) as archive:  # torch compares no checksum, and executes the rest
            return archive.testzip() is None
    except Exception:  # a damaged archive raises anything
        return False


def _shape_of(config: GenLMConfig) -> dict:
    return {name: value for name, value in config.to_dict().items() if name not in _NOT_SHAPE}


def _sources() -> list[Path]:
    package = Path(__file__).parent.parent
    return sorted([*package.glob("model/*.py"), package / "decoding" / "step.py"])


def _processor() -> str:
    """Instruction set of the CPU: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _weights(step: DecodeStep) -> dict[str, torch.Tensor]:
    return dict(step.named_parameters(remove_duplicate=False)) | dict(
        step.named_buffers(remove_duplicate=False)
    )


def _compile_to(file: Path, step: DecodeStep, inputs: Inputs) -> None:
    check_compiler()
    copies = [tensor.clone() for tensor in inputs]
    dynamic = torch.export.Dim.DYNAMIC
    grows_of = StepState(step.config, torch.empty(0), 1, 1).grows
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, about itself
        program = torch.export.export(
            step,
            tuple(copies),
            # (token, position, slot, buffers): only the slots of full attention grow
            dynamic_shapes=(None, None, None, tuple({0: dynamic} if grows else None for grows in grows_of)),
            strict=False,
        )
        with atomic_path(file) as part:
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(part),
                inductor_configs={"aot_inductor.package_constants_in_so": False},
            )
            part.chmod(0o600)


def check_compiler() -> None:
    """Check that there is a C++ compiler.

    Raises:
        UserError: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "a compiled program needs a C++ compiler, such as g++: install one, or use the traced program"
        ) from error
