"""Load a causal language model of a run folder, a model folder or the Hub without executing its code."""

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_genlm.errors import UserError, quiet_libraries, without_secrets
from hf_genlm.files import read, read_text, refuse_links_out, use_private_compiler_caches
from hf_genlm.memory import check_sizes
from hf_genlm.run_schemas import GenerationConfigFile, TokenizerConfigFile, TokenizerFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(name: "str | os.PathLike[str]") -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load model and tokenizer of a run folder, a model folder or a Hub id.

    The model is in eval mode, and on the GPU if there is one.

    Only safetensors weights are read, and no code that lies beside them is executed.

    Raises:
        UserError: there is no model, its weights are not safetensors, or it cannot be loaded.
    """
    source = source_of(name)
    use_private_compiler_caches()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_genlm.model  # noqa: F401  registers the Auto classes

    with quiet_libraries(), loading_errors(name):
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer  # type: ignore[arg-type]


@contextlib.contextmanager
def loading_errors(name: "str | os.PathLike[str]") -> Iterator[None]:
    """Raise a UserError that names the model for any error in the block, a panic of a Rust library included.

    A damaged folder raises errors of every type.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if isinstance(error, UserError) or not (is_panic or isinstance(error, Exception)):
            raise
        reason = without_secrets(" ".join(str(error).split()))[:500] or type(error).__name__
        if "trust_remote_code" in reason:
            reason = "it needs code of its own, which is not run here"
        raise UserError(f"cannot load {os.fspath(name)!r}: {reason}") from error


def check_files(folder: Path) -> None:
    """Check types that transformers does not check before it reads a model folder.

    Raises:
        UserError: a folder has the name of a file, or a field has another type.
    """
    schemas = {
        "generation_config.json": GenerationConfigFile,
        "tokenizer_config.json": TokenizerConfigFile,
        "tokenizer.json": TokenizerFile,
    }
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.suffix in (".json", ".jinja", ".safetensors", ".md"):
            raise UserError(f"{str(path)!r} is a folder: a file belongs there")
        if path.name in schemas:
            read(path, schemas[path.name])


def source_of(name: "str | os.PathLike[str]") -> str:
    """Resolve a run folder, a model folder or a Hub id to what `from_pretrained` takes.

    Raises:
        UserError: there is no model at `name`, its weights are not safetensors, it is an adapter, or a link
            leads out of it.
    """
    name = os.fspath(name)
    path = Path(name)
    source = str(path / "model") if (path / "model" / "config.json").is_file() else name
    if path.exists() and not (Path(source) / "config.json").is_file():
        if (path / "recipe.yaml").is_file():
            raise UserError(
                f"the run in {name!r} has no model yet: resume it with hf-genlm train --resume --out "
                f"{shlex.quote(name)}, or name one of its milestones/"
            )
        raise UserError(f"{name!r} holds no model: neither it nor its model/ has a config.json")
    if path.exists():
        refuse_links_out(path if (path / "recipe.yaml").is_file() else source)
    if path.exists() and not any(Path(source).glob("*.safetensors")):
        raise UserError(
            f"{name!r} has no weights in model.safetensors, and other formats can execute code: load the "
            "model where you trust it and save it again with save_pretrained"
        )
    if not path.exists() and name.count("/") != 1:
        raise UserError(f"no model at {name!r}: name a run folder, a model folder or a Hub id")
    if _has_adapter(source):
        raise UserError(
            f"{name!r} has an adapter_config.json, which names another model to load: where you trust both, "
            "merge the adapter by PEFT's merge_and_unload, and save the result with save_pretrained"
        )
    if path.exists():
        check_sizes(source)
        check_files(Path(source))
    return source


def names_of(name: str) -> set[str]:
    """Names that people have for the model at `name`: its run, its folder, and the last part of the run's."""
    path = Path(name)
    if not path.exists():
        return {name, path.name}
    run = path.parent if path.name == "model" else path
    runs = run, Path(os.path.abspath(run))
    return {name, *map(str, runs), *(str(each / "model") for each in runs), runs[1].name}


def _has_adapter(source: str) -> bool:
    """True if a model folder or Hub id has an adapter_config.json; False if the Hub cannot be asked."""
    if Path(source).exists():
        return (Path(source) / "adapter_config.json").exists()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return bool(hf_hub_download(source, "adapter_config.json"))
    except (HfHubHTTPError, OSError, ValueError):
        return False


def hub_id_of(name: "str | os.PathLike[str]") -> str | None:
    """Return the Hub id of a model; for a local model, the `base_model` of its card, or None without one."""
    if not Path(name).exists():
        return os.fspath(name)
    stated = card_fields(Path(source_of(name)) / "README.md").get("base_model")
    if isinstance(stated, list):
        stated = stated[0] if stated else None
    return stated if isinstance(stated, str) else None


def card_fields(card: Path) -> dict[str, Any]:
    """Front matter of a model card; empty for a card without any, or whose text is not that of a card."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK
    from yaml import YAMLError, safe_load

    try:
        found = REGEX_YAML_BLOCK.search(read_text(card).lstrip("\ufeff")) if card.is_file() else None
        fields = safe_load(found.group(2)) if found else None
    except (UserError, YAMLError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
