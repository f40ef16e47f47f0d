"""Build a browser demo (Gradio) of one or two models as a folder: a Hugging Face Space.

The folder runs without this package. A model is either included (`models/NAME`) or named by its Hub id and
commit. Code that lies beside weights is never run: for a GenLM the folder holds the code of this package, in
`genlm/`.
"""

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from hf_genlm.config.recipe import CardRecipe, load_recipe
from hf_genlm.errors import UserError, install_command, without_secrets
from hf_genlm.files import (
    atomic_folder,
    copy_file,
    read_json,
    read_text,
    require_new_folder,
    write_json,
    write_text,
)
from hf_genlm.hub.manifest import MODEL_FILES, POINTERS, ModelSource, build_manifest, check_findings
from hf_genlm.loading import source_of
from hf_genlm.report.document import fenced_blocks
from hf_genlm.run_folder import RunFolder

DEFAULT_PORT = 7860
_EXAMPLE_WIDTH = 32  # characters
_PINNED = ("gradio", "torch", "transformers")  # required at the versions installed here
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Space:
    """A built demo."""

    folder: Path
    sizes: dict[str, int]  # bytes by relative path, of all files that a push sends

    @property
    def push_commands(self) -> list[str]:
        """Commands that create a Space on the Hub and upload the folder."""
        return [
            "hf repos create OWNER/SPACE --type space --space-sdk gradio",
            f"hf upload OWNER/SPACE {shlex.quote(str(self.folder))} . --type space",
        ]


@dataclass(frozen=True)
class DemoModel:
    """A model of the demo, included in the folder unless `repo_id` names it on the Hub."""

    name: str
    included: ModelSource | None  # None: on the Hub
    repo_id: str | None
    revision: str | None  # commit on the Hub
    license: str | None
    is_genlm: bool

    @property
    def source(self) -> str:
        """Hub id, or path within the demo."""
        return self.repo_id or f"models/{self.name}"


def build_space(
    models: Sequence[str | Path],
    output_dir: str | Path,
    *,
    repo_ids: Sequence[str] = (),
    title: str | None = None,
    examples: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> Space:
    """Write the demo of one model, or of two side by side, into a new folder.

    Args:
        models: run folders, model folders or Hub ids.
        repo_ids: Hub id of each model, to name it there; default: include the files of local models.
        title: default: the names of the models.
        examples: texts to try on the pages that write and measure. Default: beginnings of the samples of a
            run.
        allow: findings in the files of a model that may leave, as `tokenizer_config.json:home-path`.

    Raises:
        UserError: a model is missing or its files hold something that must not be published, `output_dir`
            holds files or cannot be written, or a library of the demo is not installed.
    """
    out = Path(output_dir)
    if not 1 <= len(models) <= 2:
        raise UserError(f"the demo shows one model or two side by side, not {len(models)}")
    if repo_ids and len(repo_ids) != len(models):
        raise UserError(f"--repo-id is given {len(repo_ids)} times for {len(models)} models: once for each")
    require_new_folder(out)
    shown: list[DemoModel] = []
    given_ids: Sequence[str | None] = repo_ids or [None] * len(models)
    for model, repo_id in zip(models, given_ids, strict=True):
        shown.append(_find_model(str(model), repo_id, {other.name for other in shown}))
    requirements = "".join(f"{name}=={_version(name)}\n" for name in _PINNED)
    title = title or " and ".join(each.name for each in shown)
    entries = [{"name": each.name, "source": each.source, "revision": each.revision} for each in shown]
    included = [each.included for each in shown if each.included is not None]
    check_findings([build_manifest(source, MODEL_FILES) for source in included], allow)
    with (
        resources.as_file(resources.files("hf_genlm.space").joinpath("files")) as files,
        atomic_folder(out) as folder,
    ):
        for path in sorted(files.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                copy_file(path, folder / path.relative_to(files))
        for each in shown:
            if each.included is not None:
                _include(each.included.folder, folder / each.source)
        if any(each.is_genlm for each in shown):
            with resources.as_file(resources.files("hf_genlm").joinpath("model")) as code:
                for path in code.glob("*.py"):
                    copy_file(path, folder / "genlm" / path.name)
        shown_examples = [*examples] or [text for model in models for text in _beginnings(Path(model))]
        write_json(folder / "space.json", {"title": title, "models": entries, "examples": shown_examples})
        write_text(folder / "requirements.txt", requirements)
        write_text(folder / "README.md", _readme(title, shown))
    paths = sorted(path for path in out.rglob("*") if path.is_file())
    return Space(out, {path.relative_to(out).as_posix(): path.stat().st_size for path in paths})


def run_space(folder: str | Path, port: int = DEFAULT_PORT) -> int:
    """Serve a built demo on this machine until Ctrl-C, in its own process; return the exit code."""
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port)}
    command = [sys.executable, str(Path(folder) / "app.py")]
    if os.name != "posix":
        return subprocess.run(command, env=environment, check=False).returncode
    # Ctrl-C interrupts only this process, which ends the demo: while it imports, it would print a traceback
    ignore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    return subprocess.run(command, env=environment, check=False, preexec_fn=ignore).returncode


def _find_model(name: str, repo_id: str | None, taken: set[str]) -> DemoModel:
    """Find a run folder, model folder or Hub id; the model's name is not in `taken` and can be a folder's."""
    if repo_id is not None and not _REPO_ID.fullmatch(repo_id):
        raise UserError(f"--repo-id {repo_id!r} is not a Hub id: write OWNER/NAME")
    source = Path(source_of(name))
    found = ModelSource.find(source) if source.is_dir() else None
    if found is not None:
        recipe = RunFolder(name).recipe
        card = load_recipe(recipe).card if recipe.is_file() else CardRecipe()
        path = Path(name).resolve()
        shown = card.name or (path.parent.name if path.name == "model" else path.name)
        license = card.license
    else:
        shown, license, repo_id = name.split("/")[1], None, repo_id or name
    config = source / "config.json" if repo_id is None else _download_config(repo_id)
    revision = None if repo_id is None else config.parent.name  # the cache of the Hub has a folder a commit
    shown = re.sub(r"[^\w.-]+", "-", shown).strip(".-") or "model"
    shown = f"{shown}-{len(taken) + 1}" if shown in taken else shown
    is_genlm = read_json(config, dict).get("model_type") == "genlm"
    return DemoModel(shown, found if repo_id is None else None, repo_id, revision, license, is_genlm)


def _beginnings(path: Path) -> list[str]:
    """Return the first words of the last two texts that a run has generated; none of other models."""
    samples = RunFolder(path).samples
    texts = fenced_blocks(read_text(samples)) if samples.is_file() else []
    starts = (textwrap.shorten(text, _EXAMPLE_WIDTH, placeholder="") or text.strip() for text in texts[-2:])
    return [start[:_EXAMPLE_WIDTH] for start in starts if start]


def _include(source: Path, target: Path) -> None:
    """Copy the data files that load a model, without what names code in them; nothing else is copied."""
    for path in sorted({path for pattern in MODEL_FILES for path in source.glob(pattern)}):
        copy_file(path, target / path.name)
    for path in target.glob("*config.json"):
        write_json(
            path, {name: value for name, value in read_json(path, dict).items() if name not in POINTERS}
        )


def _readme(title: str, models: Sequence[DemoModel]) -> str:
    """Return the README of a Space: front matter and a description."""
    from huggingface_hub import SpaceCardData

    licenses = {model.license for model in models}
    front_matter = SpaceCardData(
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
    items = "\n".join(
        f"- [{model.repo_id}](https://huggingface.co/{model.repo_id})"
        if model.repo_id
        else f"- {model.name}, in `{model.source}`"
        for model in models
    )
    return (
        f"---\n{front_matter.to_yaml()}\n---\n\n# {title}\n\nText that a small language model generates, the "
        "probability of every token, the states of its layers, and the bits per byte it needs for a text.\n\n"
        f"{items}\n\nTo run it on your machine: `pip install -r requirements.txt`, then `python app.py`.\n"
    )


def _download_config(repo_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, "config.json"))
    except Exception as error:  # of the network, the disk or the Hub
        reason = without_secrets(" ".join(str(error).split()))[:300]
        raise UserError(
            f"no config.json of {repo_id!r} from the Hub; push the model first: {reason}"
        ) from error


def _version(package: str) -> str:
    """Return the installed version without its local part, such as +cpu, which the package index lacks.

    Raises:
        UserError: it is not installed.
    """
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError as error:
        raise UserError(f"the demo needs {package}: {install_command('space')}") from error
