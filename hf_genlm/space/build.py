"""A Gradio demo of one or two models as a folder, a Hugging Face Space: `hf-genlm space RUN --out DIR`.

The folder stands alone. A model is either carried in it (`models/NAME`) or named by its id on the Hub. A
carried GenLM gets the code of this package, not what lies beside its weights, which is never executed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from hf_genlm.config.recipe import load_recipe
from hf_genlm.config.sections import CardRecipe
from hf_genlm.errors import UserError, without_secrets
from hf_genlm.files import atomic_folder, copy_file, write_json, write_text
from hf_genlm.hub.manifest import LOADED
from hf_genlm.loading import source_of
from hf_genlm.run_folder import RunFolder, read_json

MODEL_TYPE = "genlm"
_PINNED = ("gradio", "torch", "transformers")  # at the versions that the folder was written with
# what `save_pretrained` writes for the two classes that the demo loads
_AUTO_MAP = {
    "AutoConfig": "configuration_genlm.GenLMConfig",
    "AutoModelForCausalLM": "modeling_genlm.GenLMForCausalLM",
}
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ShownModel:
    """A model of the demo. It is carried where `repo_id` does not name it on the Hub."""

    name: str
    folder: Path | None  # where it lies on this machine, if it does
    repo_id: str | None
    license: str | None
    is_genlm: bool

    @property
    def source(self) -> str:
        """Where the demo finds it: on the Hub, or in its own folder."""
        return self.repo_id or f"models/{self.name}"


def shown_model(name: str, repo_id: str | None = None) -> ShownModel:
    """The model of a run folder, a model folder or a Hub id `name`.

    Args:
        repo_id: where it lies, or will lie, on the Hub, to be named instead of carried.

    Raises:
        UserError: there is no model, or the id is none.
    """
    if repo_id is not None and not _REPO_ID.fullmatch(repo_id):
        raise UserError(f"--repo-id {repo_id!r} is no id of the Hub: write it as OWNER/NAME")
    source = Path(source_of(name))
    if not source.is_dir():
        is_genlm = _type_of(_config_on_hub(name)) == MODEL_TYPE
        return ShownModel(name.split("/")[1], None, repo_id or name, None, is_genlm)
    run = RunFolder(name)
    card = load_recipe(run.recipe).card if run.recipe.is_file() else CardRecipe()
    is_genlm = _type_of(source / "config.json") == MODEL_TYPE
    return ShownModel(card.name or _folder_name(Path(name)), source, repo_id, card.license, is_genlm)


def write_space(out: str | Path, models: Sequence[ShownModel], title: str | None = None) -> list[Path]:
    """Write the folder.

    Returns:
        The paths of its files, in order: all that a push of the folder sends.

    Raises:
        UserError: `out` holds files or cannot be written; the demo's libraries are not installed.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {str(out)!r} already holds files: name a new folder, or remove it")
    requirements = "".join(f"{name}=={_version(name)}\n" for name in _PINNED)
    models = _told_apart(models)
    title = title or " and ".join(model.name for model in models)
    with atomic_folder(out) as folder:
        _copy_demo(folder)
        for model in models:
            if model.repo_id is None and model.folder is not None:
                _carry(model.folder, folder / model.source, model.is_genlm)
        write_json(folder / "space.json", {"title": title, "models": [_entry(model) for model in models]})
        write_text(folder / "requirements.txt", requirements)
        write_text(folder / "README.md", _readme(title, models))
    return sorted(path for path in out.rglob("*") if path.is_file())


def _copy_demo(out: Path) -> None:
    with resources.as_file(resources.files("hf_genlm.space").joinpath("files")) as folder:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                copy_file(path, out / path.relative_to(folder))


def _carry(folder: Path, to: Path, is_genlm: bool) -> None:
    """The files that load a model, and for a GenLM the code of this package that does; anything else stays
    where it is."""
    to.mkdir(parents=True)
    for pattern in LOADED:
        for path in folder.glob(pattern):
            copy_file(path, to / path.name)
    config = read_json(to / "config.json")
    config.pop("auto_map", None)  # may name any file
    if is_genlm:
        config["auto_map"] = _AUTO_MAP
        with resources.as_file(resources.files("hf_genlm").joinpath("model")) as code:
            for path in code.glob("*_genlm.py"):
                copy_file(path, to / path.name)
    write_json(to / "config.json", config)


def _entry(model: ShownModel) -> dict[str, Any]:
    """A model as the demo's `load_models` reads it."""
    return {"name": model.name, "source": model.source, "has_own_code": model.is_genlm}


def _readme(title: str, models: Sequence[ShownModel]) -> str:
    """The page of the Space in the Hub's form: its settings, and what it is."""
    from huggingface_hub import SpaceCardData

    licenses = {model.license for model in models}
    data = SpaceCardData(
        title=title,
        emoji="📖",
        colorFrom="green",
        colorTo="blue",
        sdk="gradio",
        sdk_version=_version("gradio"),
        app_file="app.py",
        pinned=False,
        license=licenses.pop() if len(licenses) == 1 else None,
        models=[model.repo_id for model in models if model.repo_id] or None,
        short_description="A small language model, token by token",
    )
    shown = "\n".join(f"- {_described(model)}" for model in models)
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {title}\n\nWhat a small language model writes, how likely it found "
        "every token, what its layers hold, and how many bits it needs per byte of a text.\n\n"
        f"{shown}\n\nOn a machine of your own: `pip install -r requirements.txt`, then `python app.py`.\n"
    )


def _described(model: ShownModel) -> str:
    if model.repo_id:
        return f"[{model.repo_id}](https://huggingface.co/{model.repo_id})"
    return f"{model.name}, in `{model.source}`"


def _told_apart(models: Sequence[ShownModel]) -> list[ShownModel]:
    """With names that can be folders and differ."""
    names: list[str] = []
    for model in models:
        name = re.sub(r"[^\w.-]+", "-", model.name).strip(".-") or "model"
        names.append(f"{name}-{len(names) + 1}" if name in names else name)
    return [replace(model, name=name) for model, name in zip(models, names, strict=True)]


def _folder_name(path: Path) -> str:
    """Of the run, where it is the model folder in one."""
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def _type_of(config: Path) -> str | None:
    return read_json(config).get("model_type")


def _config_on_hub(repo_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, "config.json"))
    except Exception as error:  # of the network, the disk or the Hub
        reason = without_secrets(" ".join(str(error).split()))[:300]
        raise UserError(f"no config.json of {repo_id!r} from the Hub: {reason}") from error


def _version(package: str) -> str:
    """Without its local part, as +cpu, which the package index does not know.

    Raises:
        UserError: it is not installed.
    """
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError as error:
        raise UserError(f"the demo needs {package}: pip install 'hf_genlm[space]'") from error
