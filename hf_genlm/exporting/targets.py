"""Export formats (`EXPORTS`), and the export itself: check, write to a private folder, read back, compare.

A new format is a new row of `EXPORTS`.
"""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hf_genlm.exporting.gguf_file as gguf_file
import hf_genlm.exporting.onnx_step as onnx_step
from hf_genlm.errors import UserError, did_you_mean, install_command
from hf_genlm.exporting.layouts import LAYOUTS, convert, find_misfits
from hf_genlm.exporting.onnx_runner import OnnxRunner
from hf_genlm.files import atomic_folder, copy_file, require_new_folder, write_text
from hf_genlm.loading import card_fields
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.report import document
from hf_genlm.run_folder import describe_environment
from hf_genlm.text.encoding import encode_texts

# texts for the comparison: prose, code, several scripts, and characters that tokenizers split differently
TEXTS = (
    "Once upon a time there was a king who had 3 daughters, and it's said that they'd all left by 1812.",
    "def mean(values):\n    # of 12\n    if not values:\n\treturn None\n\n    return sum(values) / 2.5e-3\n",
    "Größe, naïveté — «où êtes-vous?»  Ελληνικά, кириллица. 日本語のテキスト、中文。",
    "नमस्ते दुनिया, مرحبا بالعالم, 안녕하세요; ١٢٣ १२३ Ⅷ½ \U0001f469\u200d\U0001f467",
    "\u200b\u00a0\r\n\r\n  ...!?  \t\tend \n",
)
_MAX_TOKENS = 64  # of each text
_MAX_DIFFERENCE = 1e-2  # of float32 logits; more is a fault of the export, not rounding
CARD_OF_MODEL = "model_card.md"  # the model's own card in the folder of an export
_CARD_FIELDS = ("license", "language", "datasets", "model_name")  # of the model's card, true of every format

ReadLogits = Callable[[torch.Tensor], torch.Tensor]  # (T,) ids to (T, V)


@dataclass(frozen=True)
class Target:
    """A format: its weights' dtypes (the first is the default), the library that reads it, the modules of the
    extra [export] that it needs, and its three functions."""

    dtypes: tuple[str, ...]
    read_by: str
    needs: tuple[str, ...]
    find_misfits: Callable[[GenLMForCausalLM, PreTrainedTokenizerBase, str], list[str]]
    write: Callable[[GenLMForCausalLM, PreTrainedTokenizerBase, Path, str], None]
    read_back: Callable[[Path, GenLMForCausalLM, str], ReadLogits]


@dataclass(frozen=True)
class Comparison:
    """Logits of an export compared with those of its model on `TEXTS`."""

    n_texts: int
    n_tokens: int
    largest_difference: float  # of a logit
    n_same_choice: int  # tokens after which both have the same most likely token
    leaves_out_counts: bool = False  # of n-grams: the export is the model's network alone, compared with that


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    to: str,
    output_dir: Path,
    dtype: str | None = None,
    card: Path | None = None,
) -> Comparison:
    """Write `model` in the format `to` to the new folder `output_dir`, and compare its logits.

    Counts beside a network fit into no format: the network alone is written, and compared with itself.

    Args:
        dtype: of the weights, one that the format has; None: float32.
        card: the README.md of the model, which is copied if it exists.

    Raises:
        UserError: an unknown format or dtype, a model that is not a GenLM or does not fit, a library that is
            not installed, a folder that already holds files.
    """
    target = select_target(to, dtype)
    dtype = dtype or target.dtypes[0]
    if not isinstance(model, GenLMForCausalLM):
        raise UserError(
            f"the model is a {type(model).__name__}, not one of this package: its own library exports it, "
            "transformers by transformers.exporters, llama.cpp by convert_hf_to_gguf.py"
        )
    if model.config.is_ngram:
        raise UserError(
            "the model is a table of n-gram counts, which no other program reads: its own folder loads with "
            "transformers alone"
        )
    leaves_out_counts = model.config.holds_counts
    if leaves_out_counts:
        model = network_of(model)
    model.cpu().float()
    if misfits := target.find_misfits(model, tokenizer, dtype):
        raise UserError(f"--to {to} cannot give the logits of this model: {'; '.join(misfits)}")
    require_new_folder(output_dir)
    with atomic_folder(output_dir) as folder:
        target.write(model, tokenizer, folder, dtype)
        found = compare_logits(model, tokenizer, target.read_back(folder, model, dtype))
        found = replace(found, leaves_out_counts=leaves_out_counts)
        if dtype == "float32" and found.largest_difference > _MAX_DIFFERENCE:
            raise RuntimeError(f"the export's logits differ from the model's by {found.largest_difference:g}")
        fields: dict[str, Any] = {}
        if card is not None and card.is_file():
            copy_file(card, folder / CARD_OF_MODEL)
            fields = {name: value for name, value in card_fields(card).items() if name in _CARD_FIELDS}
        _write_page(folder, to, model, tokenizer, dtype, found, fields)
    return found


def network_of(model: GenLMForCausalLM) -> GenLMForCausalLM:
    """The network of a model with n-gram counts, alone; it shares the weights."""
    config = copy.deepcopy(model.config)
    config.ngram_order = config.ngram_sizes = config.ngram_history = None
    network = GenLMForCausalLM(config)
    kept = network.state_dict().keys()
    weights = {name: weight for name, weight in model.state_dict().items() if name in kept}
    network.load_state_dict(weights, assign=True)
    network.tie_weights()
    return network.eval()


def select_target(to: str, dtype: str | None) -> Target:
    """The row of `EXPORTS` for a format that is installed and has `dtype`.

    Raises:
        UserError: an unknown format or dtype, or a library that is not installed.
    """
    if to not in EXPORTS:
        raise UserError(f"unknown --to {to!r}{did_you_mean(to, EXPORTS)}")
    target = EXPORTS[to]
    if dtype is not None and dtype not in target.dtypes:
        raise UserError(f"--dtype {dtype!r} is none that --to {to} writes: {', '.join(target.dtypes)}")
    missing = [name for name in target.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to {to} needs {' and '.join(missing)}: {install_command('export')}")
    return target


@torch.no_grad()
def compare_logits(
    model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerBase, read: ReadLogits
) -> Comparison:
    """Compare logits given by `read`, which runs an export, with those of `model` on parts of `TEXTS`."""
    differences, n_same, n_tokens = [0.0], 0, 0
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    max_tokens = min(_MAX_TOKENS, model.config.max_position_embeddings)
    for text in TEXTS:
        ids = torch.tensor((start + encode_texts(tokenizer, [text])[0])[:max_tokens])
        expected, got = model(ids[None]).logits[0], read(ids)
        differences.append(float((got - expected).abs().max()))
        n_same += int((got.argmax(-1) == expected.argmax(-1)).sum())
        n_tokens += len(ids)
    return Comparison(len(TEXTS), n_tokens, max(differences), n_same)


def _write_page(
    folder: Path,
    to: str,
    model: GenLMForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    found: Comparison,
    fields: dict[str, Any],
) -> None:
    """Write README.md from `page_template.md`: the model, how to run it, and how near its logits are."""
    metadata = {
        **fields,
        "library_name": EXPORTS[to].read_by,
        "pipeline_tag": "text-generation",
        "tags": ["hf-genlm"],
    }
    page = document.render(
        "exporting/page_template.md",
        {},
        metadata=document.Markdown(yaml.safe_dump(metadata, allow_unicode=True, sort_keys=False).strip()),
        name=fields.get("model_name", "A small language model"),
        target=to,
        dtype=dtype,
        weights=next((file.name for file in folder.glob("*.gguf")), None),
        config=model.config,
        mixers=list(dict.fromkeys(model.config.mixer_types or [])),
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        found=found,
        card=CARD_OF_MODEL if (folder / CARD_OF_MODEL).is_file() else None,
        version=describe_environment()["packages"]["hf_genlm"] or "",
    )
    write_text(folder / "README.md", page)


def _layout_target(word: str) -> Target:
    layout = LAYOUTS[word]

    def write(model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str) -> None:
        convert(model, layout).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return Target(
        dtypes=("float32",),
        read_by="transformers",
        needs=(),
        find_misfits=lambda model, tokenizer, dtype: find_misfits(model, layout),
        write=write,
        read_back=lambda folder, model, dtype: _logits_of(layout.model_class.from_pretrained(folder).eval()),
    )


def _logits_of(model: PreTrainedModel) -> ReadLogits:
    return lambda ids: model(ids[None]).logits[0]


def _read_onnx(folder: Path, model: GenLMForCausalLM, dtype: str) -> ReadLogits:
    runner = OnnxRunner(folder)

    def read(ids: torch.Tensor) -> torch.Tensor:
        runner.reset()
        return torch.stack([torch.from_numpy(runner.read(token)) for token in ids.tolist()])

    return read


EXPORTS = {
    "llama": _layout_target("llama"),  # vLLM and others read it, too
    "qwen3": _layout_target("qwen3"),  # queries and keys are normalised; windows
    "gguf": Target(
        dtypes=tuple(gguf_file.DTYPES),
        read_by="llama.cpp",
        needs=("gguf",),
        find_misfits=gguf_file.find_gguf_misfits,
        write=gguf_file.write_gguf,
        read_back=lambda folder, model, dtype: _logits_of(gguf_file.read_back(folder, model, dtype)),
    ),
    "onnx": Target(
        dtypes=("float32",),
        read_by="onnxruntime",
        needs=("onnxscript", "onnxruntime"),
        find_misfits=onnx_step.find_onnx_misfits,
        write=onnx_step.write_onnx,
        read_back=_read_onnx,
    ),
}
