"""The README.md of an export: what it is, how to run it, and how near it is to its model."""

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import PreTrainedTokenizerBase

from hf_genlm.files import copy_file, write_text
from hf_genlm.model import GenLMConfig
from hf_genlm.run_folder import describe_environment

if TYPE_CHECKING:
    from hf_genlm.exporting.targets import Comparison

CARD_OF_MODEL = "model_card.md"
_KEPT = ("license", "language", "datasets", "model_name")  # of what the model's card says of it
_LIBRARY = {"llama": "transformers", "qwen3": "transformers", "gguf": "llama.cpp", "onnx": "onnxruntime"}


def write_page(
    folder: Path,
    target: str,
    config: GenLMConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    found: "Comparison",
    card: Path | None,
) -> None:
    """README.md in `folder`, and the model's own card beside it, where there is one."""
    from jinja2 import Environment, StrictUndefined

    facts = {}
    if card is not None and card.is_file():
        copy_file(card, folder / CARD_OF_MODEL)
        facts = facts_of(card)
    template = resources.files("hf_genlm.exporting").joinpath("page_template.md").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    metadata = {
        **facts,
        "library_name": _LIBRARY[target],
        "pipeline_tag": "text-generation",
        "tags": ["hf-genlm"],
    }
    page = environment.from_string(template).render(
        metadata=yaml.safe_dump(metadata, allow_unicode=True, sort_keys=False).strip(),
        name=facts.get("model_name", "A small language model"),
        target=target,
        dtype=dtype,
        weights=next((file.name for file in folder.glob("*.gguf")), None),
        config=config,
        mixers=list(dict.fromkeys(config.mixer_types)),
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        found=found,
        card=CARD_OF_MODEL if (folder / CARD_OF_MODEL).is_file() else None,
        version=describe_environment()["packages"]["hf_genlm"] or "",
    )
    write_text(folder / "README.md", page)


def facts_of(card: Path) -> dict[str, Any]:
    """What the head of a model card says that holds for every form of the model."""
    from huggingface_hub import ModelCard

    data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    return {name: data[name] for name in _KEPT if name in data}
