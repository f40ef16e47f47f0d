"""Checkpoints that are whole or not there: written aside, flushed to disk, sealed with their hashes, renamed.

checkpoints/checkpoint-1200/   what Trainer goes on from, and manifest.json: where the run stood, and the
                               size and sha256 of every file
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_genlm.errors import UserError
from hf_genlm.files import atomic_folder, note_no_space, sha256_of, sync_folder, write_json

_PREFIX = "checkpoint-"  # as Trainer names them
_PART = ".part"  # the folder in which one is written
_MANIFEST = "manifest.json"
_PICKLE = "training_args.bin"  # Trainer writes it and nothing of ours reads it
# what DeepSpeed writes beside tensors and numbers, and reads again in a way that executes what a file says
_OF_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stood: what neither Trainer's files nor the recipe say."""

    step: int
    elapsed_s: float  # of training
    seconds: float | None  # the budget's, after the planning
    steps: int  # the budget's
    is_rate_halved: bool = False  # after a loss that was not finite


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A whole one, and where the run stood."""

    path: Path
    progress: Progress


def part_of(folder: Path) -> Path:
    """Where the next checkpoint of `folder` is to be written; Trainer makes `checkpoint-N` in it."""
    return folder / _PART


def seal(folder: Path, progress: Progress, keep: int) -> None:
    """Make what lies in `part_of(folder)` a checkpoint, then remove all but the `keep` newest.

    Raises:
        OSError: no space; what was there before is as it was.
    """
    written = part_of(folder) / f"{_PREFIX}{progress.step}"
    (written / _PICKLE).unlink(missing_ok=True)
    files = sorted(path for path in written.rglob("*") if path.is_file())
    hashes = {path.relative_to(written).as_posix(): [path.stat().st_size, sha256_of(path)] for path in files}
    content = {**dataclasses.asdict(progress), "files": hashes}
    write_json(written / _MANIFEST, content)
    sync_folder(written)
    final = folder / written.name
    shutil.rmtree(final, ignore_errors=True)
    written.rename(final)
    clear_parts(folder)
    sync_folder(folder)  # the new name, before an old one goes
    for path in _by_step(folder)[:-keep]:
        shutil.rmtree(path)


def newest_checkpoint(folder: Path, note: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
    """The newest one that is as it was written. Newer ones are damaged: `note` hears of them, and they lie
    aside as `damaged-checkpoint-N` from then on, where they take no whole one's place.
    """
    found = (_verified(path, note) for path in reversed(_by_step(folder)))
    return next((checkpoint for checkpoint in found if checkpoint is not None), None)


def refuse_code(checkpoint: Path) -> None:
    """Refuse a checkpoint that would execute something where DeepSpeed reads it; here it is only looked at.

    Raises:
        UserError: a file of DeepSpeed's names more than DeepSpeed writes.
    """
    latest = checkpoint / "latest"  # names the folder of the files, and is there where DeepSpeed trains
    if not latest.is_file():
        return
    folder = (checkpoint / latest.read_text(encoding="utf-8").strip()).resolve()
    if folder.parent != checkpoint.resolve():
        raise UserError(f"{latest} names {folder}, a place outside the checkpoint: the run cannot be resumed")
    for file in sorted(folder.glob("*.pt")):
        try:
            named = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        except Exception as error:  # whatever is wrong with it, it is not one of those that are known
            raise UserError(f"{file} is not as DeepSpeed writes it: the run cannot be resumed") from error
        if named - _OF_DEEPSPEED:
            raise UserError(
                f"{file} would execute {', '.join(sorted(named - _OF_DEEPSPEED))}, which DeepSpeed does not "
                "write: the run cannot be resumed"
            )


def _verified(path: Path, note: Callable[[str], None]) -> Checkpoint | None:
    try:
        content = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        files = content.pop("files")
        progress = Progress(**content)
        for name, (n_bytes, sha256) in files.items():
            if (path / name).stat().st_size != n_bytes or sha256_of(path / name) != sha256:
                raise ValueError(f"{name} is not what was written")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        note(f"{path.name} is damaged and not used: {error}")
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        return None
    return Checkpoint(path, progress)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """Write a model folder, whole or not at all: weights, config, tokenizer and the code that loads them
    without this package. Returns why it is not there, where the disk was full."""
    failed: list[str] = []
    with note_no_space(failed.append), atomic_folder(folder) as written:
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
    return failed[0] if failed else None


def clear_parts(folder: Path) -> None:
    """Remove what a run that was killed had begun to write."""
    shutil.rmtree(part_of(folder), ignore_errors=True)


def _by_step(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    numbered = [
        (int(path.name.removeprefix(_PREFIX)), path)
        for path in folder.iterdir()
        if path.name.startswith(_PREFIX) and path.name.removeprefix(_PREFIX).isdecimal()
    ]
    return [path for _, path in sorted(numbered)]
