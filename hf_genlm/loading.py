"""Any causal language model by its name, without executing what lies beside it."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from hf_genlm.errors import UserError, without_secrets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(name: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Model and tokenizer of a run folder, a model folder or a Hub id; no code from there is executed."""
    source = source_of(name)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_genlm.model  # noqa: F401  registers the Auto classes

    try:
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged folder raises anything, from KeyError to the Rust libraries' own
        reason = without_secrets(" ".join(str(error).split()))[:500] or type(error).__name__
        raise UserError(f"cannot load {name!r}: {reason}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def source_of(name: str) -> str:
    """The model folder of a run, or the model folder or Hub id itself."""
    path = Path(name)
    source = str(path / "model") if (path / "model" / "config.json").is_file() else name
    if path.exists() and not (Path(source) / "config.json").is_file():
        if (path / "recipe.yaml").is_file():
            raise UserError(
                f"the run in {name!r} has no model yet: go on with hf-genlm train --resume --out "
                f"{shlex.quote(name)}, or name one of its milestones/"
            )
        raise UserError(f"{name!r} holds no model: neither it nor its model/ has a config.json")
    if path.exists() and not any(Path(source).glob("*.safetensors")):
        raise UserError(
            f"{name!r} has no weights in model.safetensors, and no others are read, since a pickle can run "
            "code: load the model where you trust it, and save_pretrained it again"
        )
    if not path.exists() and name.count("/") != 1:
        raise UserError(f"no model at {name!r}: name a run folder, a model folder or a Hub id")
    return source


def hub_id_of(name: str) -> str | None:
    """The Hub id of a model; of one on this disk, that of the model it was made of, if the card there says
    so."""
    if not Path(name).exists():
        return name
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    card = Path(source_of(name)) / "README.md"
    try:
        stated = (metadata_load(card) or {}).get("base_model") if card.is_file() else None
    except (YAMLError, ValueError, AttributeError):  # a card is anyone's text
        return None
    if isinstance(stated, list):
        stated = stated[0] if stated else None
    return stated if isinstance(stated, str) else None
