"""The programs that a step can be: the module itself, a trace of it, or compiled, once for each shape."""

import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_genlm.decoding.step import DecodeStep, StepState
from hf_genlm.errors import UserError
from hf_genlm.files import atomic_path
from hf_genlm.model import GenLMConfig
from hf_genlm.text.cache import cache_folder

Program = Callable[..., torch.Tensor]  # (token, position, slot, *buffers) to logits
Inputs = Sequence[torch.Tensor]

# what changes no instruction of a step
_NOT_SHAPE = {
    "architectures", "auto_map", "transformers_version", "dtype", "use_cache", "initializer_range",
    "dropout", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id",
}  # fmt: skip


def as_module(step: DecodeStep, inputs: Inputs) -> Program:
    """The step as Python runs it: the definition of the others."""
    return step


def traced(step: DecodeStep, inputs: Inputs) -> Program:
    """The operations of one run, without the Python around them. For any number of slots and rows."""
    copies = [tensor.clone() for tensor in inputs]  # tracing runs the step, which writes to them
    with warnings.catch_warnings():
        # every Python value that a trace would keep is one that the number of slots and rows does not change
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.jit.trace(lambda *tensors: step(*tensors), tuple(copies), check_trace=False)


def compiled(step: DecodeStep, inputs: Inputs) -> Program:
    """Generated code: on a CPU a library in `program_file`, which all models of one shape share, made where
    there is none (tens of seconds); elsewhere by torch.compile with the graphs of CUDA, in this process.

    Raises:
        UserError: there is no C++ compiler.
    """
    if inputs[0].device.type != "cpu":
        for tensor in inputs[1:]:
            torch._dynamo.mark_static_address(tensor)
        return torch.compile(step, mode="reduce-overhead", fullgraph=True)
    file = program_file(step, inputs)
    if not file.is_file():
        _compile_to(file, step, inputs)
    library = torch._inductor.aoti_load_package(str(file))
    weights = _weights(step)
    return _Library(library, {name: weights[name].detach() for name in library.get_constant_fqns()})


class _Library:
    """Generated code and the weights that it reads, which it does not own.

    They are those of the model itself, not copies: what trains them changes what the program computes.
    """

    def __init__(self, library: Any, weights: dict[str, torch.Tensor]):
        self._library, self._weights = library, weights
        library.load_constants(weights, check_full_update=True, user_managed=True)

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        # by its loader: the library itself would read how its arguments are laid out at each call
        return self._library.loader.run(list(tensors))[0]


PROGRAMS: dict[str, Callable[[DecodeStep, Inputs], Program]] = {
    "module": as_module,
    "traced": traced,
    "compiled": compiled,
}


def program_file(step: DecodeStep, inputs: Inputs) -> Path:
    """Where the library of this step is kept in the cache: a name for all that its instructions depend on."""
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
    return cache_folder() / f"step-{digest[:24]}.pt2"


def _shape_of(config: GenLMConfig) -> dict:
    return {name: value for name, value in config.to_dict().items() if name not in _NOT_SHAPE}


def _sources() -> list[Path]:
    package = Path(__file__).parent.parent
    return sorted([*package.glob("model/*.py"), package / "decoding" / "step.py"])


def _processor() -> str:
    """Its instructions: a home folder may be shared by machines of different kinds."""
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
    _check_compiler()
    copies = [tensor.clone() for tensor in inputs]
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, about itself
        program = torch.export.export(
            step,
            tuple(copies),
            # (token, position, slot, buffers): only full attention has more slots as it goes on
            dynamic_shapes=(
                None,
                None,
                None,
                tuple({0: dynamic} if grows else None for grows in _grows(step)),
            ),
            strict=False,
        )
        with atomic_path(file) as part:
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(part),
                inductor_configs={"aot_inductor.package_constants_in_so": False},
            )


def _grows(step: DecodeStep) -> list[bool]:
    return StepState(step.config, torch.empty(0), 1, 1).grows


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "a compiled program needs a C++ compiler, such as g++: install one, or generate by a traced one"
        ) from error
