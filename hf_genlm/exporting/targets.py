"""The formats that a model can be exported to, and the export: check, write aside, read back, rename."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.exporting import gguf_file, onnx_step
from hf_genlm.exporting.layouts import LAYOUTS, convert, misfits_of
from hf_genlm.exporting.misfits import Misfit, refuse
from hf_genlm.exporting.onnx_runner import OnnxRunner
from hf_genlm.exporting.page import write_page
from hf_genlm.files import atomic_folder, require_new_folder
from hf_genlm.model import GenLMForCausalLM

# what every export is compared on: words, code, scripts, and what tokenizers cut in their own ways
TEXTS = (
    "Once upon a time there was a king who had 3 daughters, and it's said that they'd all left by 1812.",
    "def mean(values):\n    # of 12\n    if not values:\n\treturn None\n\n    return sum(values) / 2.5e-3\n",
    "Größe, naïveté — «où êtes-vous?»  Ελληνικά, кириллица. 日本語のテキスト、中文。",
    "नमस्ते दुनिया, مرحبا بالعالم, 안녕하세요; ١٢٣ १२३ Ⅷ½ \U0001f469\u200d\U0001f467",
    "\u200b\u00a0\r\n\r\n  ...!?  \t\tend \n",
)
_MOST_TOKENS = 64  # of each of them
# logits of float32 that differ by more come of a fault of ours, not of rounding
_MOST_DIFFERENCE = 1e-2

ReadLogits = Callable[[torch.Tensor], torch.Tensor]  # (T,) ids to (T, V)


@dataclass(frozen=True)
class Target:
    """One format."""

    purpose: str
    dtypes: tuple[str, ...]  # of the weights; the first one unless another is asked for
    libraries: tuple[str, ...]  # modules of the extra [export]
    misfits: Callable[[GenLMForCausalLM, PreTrainedTokenizerBase, str], list[Misfit]]
    write: Callable[[GenLMForCausalLM, PreTrainedTokenizerBase, Path, str], None]
    read_back: Callable[[Path, GenLMForCausalLM, str], ReadLogits]


@dataclass(frozen=True)
class Comparison:
    """The export beside its model, on `TEXTS`."""

    n_texts: int
    n_tokens: int
    largest_difference: float  # of a logit
    n_same_choice: int  # tokens after which both hold the same token for the likeliest


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    word: str,
    out: Path,
    dtype: str | None = None,
    card: Path | None = None,
) -> Comparison:
    """Write `model` in the format `word` to the new folder `out`, and compare what was written with it.

    Args:
        dtype: of the weights, one of the target's; None: float32.
        card: the README.md of the model, to go with it.

    Raises:
        UserError: an unknown format or dtype, a model that is none of ours or does not fit, a library that is
            not installed, a folder that holds something.
    """
    target = target_of(word, dtype)
    dtype = dtype or target.dtypes[0]
    if type(model) is not GenLMForCausalLM:
        raise UserError(
            f"the model is a {type(model).__name__}, not one of this package: its own library exports it, "
            "transformers by transformers.exporters, llama.cpp by convert_hf_to_gguf.py"
        )
    model = model.cpu().float()
    refuse(word, target.misfits(model, tokenizer, dtype))
    require_new_folder(out)
    with atomic_folder(out) as aside:
        target.write(model, tokenizer, aside, dtype)
        found = compare(model, tokenizer, target.read_back(aside, model, dtype))
        if dtype == "float32" and found.largest_difference > _MOST_DIFFERENCE:
            raise RuntimeError(f"the export's logits differ from the model's by {found.largest_difference:g}")
        write_page(aside, word, model.config, tokenizer, dtype, found, card)
    return found


def target_of(word: str, dtype: str | None) -> Target:
    """The row of `EXPORTS`.

    Raises:
        UserError: an unknown format or dtype, or a library that is not installed.
    """
    if word not in EXPORTS:
        raise UserError(f"unknown --to {word!r}{did_you_mean(word, EXPORTS)}")
    target = EXPORTS[word]
    if dtype is not None and dtype not in target.dtypes:
        raise UserError(f"--dtype {dtype!r} is none that --to {word} writes: {', '.join(target.dtypes)}")
    missing = [name for name in target.libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to {word} needs {' and '.join(missing)}: pip install 'hf_genlm[export]'")
    return target


@torch.no_grad()
def compare(model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerBase, read: ReadLogits) -> Comparison:
    """`read`, what an export computes, beside `model` on the first tokens of each of `TEXTS`."""
    differences, n_same, n_tokens = [0.0], 0, 0
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    most = min(_MOST_TOKENS, model.config.max_position_embeddings)
    for text in TEXTS:
        ids = torch.tensor((start + tokenizer(text, add_special_tokens=False).input_ids)[:most])
        expected, got = model(ids[None]).logits[0], read(ids)
        differences.append(float((got - expected).abs().max()))
        n_same += int((got.argmax(-1) == expected.argmax(-1)).sum())
        n_tokens += len(ids)
    return Comparison(len(TEXTS), n_tokens, max(differences), n_same)


def _layout_target(word: str, purpose: str) -> Target:
    layout = LAYOUTS[word]

    def misfits(model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerBase, dtype: str) -> list[Misfit]:
        return misfits_of(model, layout)

    def write(model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str) -> None:
        convert(model, layout).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def read_back(folder: Path, model: GenLMForCausalLM, dtype: str) -> ReadLogits:
        return _by_transformers(layout.model_class.from_pretrained(folder).eval())

    return Target(purpose, ("float32",), (), misfits, write, read_back)


def _by_transformers(model: PreTrainedModel) -> ReadLogits:
    return lambda ids: model(ids[None]).logits[0]


def _read_gguf(folder: Path, model: GenLMForCausalLM, dtype: str) -> ReadLogits:
    return _by_transformers(gguf_file.read_back(folder, model, dtype))


def _read_onnx(folder: Path, model: GenLMForCausalLM, dtype: str) -> ReadLogits:
    runner = OnnxRunner(folder)

    def read(ids: torch.Tensor) -> torch.Tensor:
        runner.reset()
        return torch.stack([torch.from_numpy(runner.read(token)) for token in ids.tolist()])

    return read


EXPORTS = {
    "llama": _layout_target("llama", "a Llama of transformers, which vLLM and others read"),
    "qwen3": _layout_target("qwen3", "a Qwen3 of transformers: normalised queries and keys, windows"),
    "gguf": Target(
        "a file for llama.cpp",
        tuple(gguf_file.DTYPES),
        ("gguf",),
        gguf_file.misfits_of_gguf,
        gguf_file.write_gguf,
        _read_gguf,
    ),
    "onnx": Target(
        "a decoding step with its state, for onnxruntime",
        ("float32",),
        ("onnxscript", "onnxruntime"),
        onnx_step.misfits_of_onnx,
        onnx_step.write_onnx,
        _read_onnx,
    ),
}
