"""Checkpoints: written aside, flushed to disk, hashed, renamed; and the signals that ask for the last one.

checkpoints/checkpoint-1200/ holds Trainer's files and manifest.json: the progress of the run, and the size
and sha256 of every file. A checkpoint is complete or absent, whenever the process is killed.
"""

import contextlib
import dataclasses
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_genlm.errors import Stopped, UserError
from hf_genlm.files import atomic_folder, note_no_space, read, read_text, sha256_of, sync_folder, write_json
from hf_genlm.run_schemas import Count, Time

_PREFIX = "checkpoint-"  # as Trainer names them
_PENDING = ".part"  # the folder in which a checkpoint is written
_MANIFEST = "manifest.json"
_PICKLE = "training_args.bin"  # written by Trainer; nothing here reads it
# classes that DeepSpeed pickles beside tensors and numbers; its reader executes whatever else a file names
_DEEPSPEED_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run that neither Trainer's files nor the recipe hold."""

    step: Count
    elapsed_s: Time  # of training
    seconds: Time | None  # of the budget, without the planning
    steps: Count  # of the budget
    is_rate_halved: bool = False  # after the loss became NaN or infinite


@dataclasses.dataclass(frozen=True)
class Manifest(Progress):
    """manifest.json of a checkpoint: size in bytes and SHA-256 of each file."""

    files: dict[str, tuple[Count, str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, and the progress of its run."""

    path: Path
    progress: Progress


def pending_folder(folder: Path) -> Path:
    """Return the folder in which Trainer writes the next `checkpoint-N` of `folder`."""
    return folder / _PENDING


def remove_pending(folder: Path) -> None:
    """Remove what a killed run had begun to write."""
    shutil.rmtree(pending_folder(folder), ignore_errors=True)


def commit_checkpoint(folder: Path, progress: Progress, total_limit: int) -> None:
    """Make the pending files a checkpoint of `folder`, then remove all but the `total_limit` newest.

    Raises:
        OSError: no space; the earlier checkpoints are as they were.
    """
    written = pending_folder(folder) / f"{_PREFIX}{progress.step}"
    (written / _PICKLE).unlink(missing_ok=True)
    files = sorted(path for path in written.rglob("*") if path.is_file())
    hashes = {path.relative_to(written).as_posix(): [path.stat().st_size, sha256_of(path)] for path in files}
    write_json(written / _MANIFEST, {**dataclasses.asdict(progress), "files": hashes})
    sync_folder(written)
    final = folder / written.name
    shutil.rmtree(final, ignore_errors=True)
    written.rename(final)
    remove_pending(folder)
    sync_folder(folder)  # the new name is on disk before an old checkpoint is removed
    for path in _list_checkpoints(folder)[:-total_limit]:
        shutil.rmtree(path)


def newest_checkpoint(folder: Path, note: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
    """Return the newest checkpoint whose files have the sizes and hashes of its manifest, if there is one.

    Newer, damaged ones are renamed to `damaged-checkpoint-N`, so that they do not count as one of the newest;
    `note` receives a message about each.

    Raises:
        UserError: the checkpoint would execute code.
    """
    for path in reversed(_list_checkpoints(folder)):
        try:
            manifest = read(path / _MANIFEST, Manifest)
            if not manifest.files:
                raise ValueError(f"{_MANIFEST} names no files")
            for name, (n_bytes, sha256) in manifest.files.items():
                if (path / name).stat().st_size != n_bytes or sha256_of(path / name) != sha256:
                    raise ValueError(f"{name} is not what was written")
        except (OSError, ValueError) as error:
            note(f"{path.name} is damaged and not used: {error}")
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            continue
        refuse_code(path)
        return Checkpoint(path, manifest)
    return None


def refuse_code(checkpoint: Path) -> None:
    """Refuse a checkpoint that would execute code when DeepSpeed or FSDP reads it. Nothing is unpickled here.

    Raises:
        UserError: a DeepSpeed file names a class or function that DeepSpeed does not write, or there are
            shards of FSDP, whose reader executes whatever they name.
    """
    for file in checkpoint.rglob("*"):
        if file.name == ".metadata" or file.suffix == ".distcp":
            raise UserError(
                f"{file} is a shard of FSDP, whose reader executes what it names: the run cannot be resumed; "
                "start it again with fsdp_state_dict_type: FULL_STATE_DICT"
            )
    latest = checkpoint / "latest"  # written by DeepSpeed: the name of the folder of its files
    if not latest.is_file():
        return
    folder = (checkpoint / read_text(latest).strip()).resolve()
    if folder.parent != checkpoint.resolve():
        raise UserError(f"{latest} names {folder}, a place outside the checkpoint: the run cannot be resumed")
    for file in sorted(folder.glob("*.pt")):
        try:
            named = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        except Exception as error:  # a file that torch cannot even scan
            raise UserError(f"{file} is not as DeepSpeed writes it: the run cannot be resumed") from error
        if named - _DEEPSPEED_CLASSES:
            raise UserError(
                f"{file} would execute {', '.join(sorted(named - _DEEPSPEED_CLASSES))}, which DeepSpeed does "
                "not write: the run cannot be resumed"
            )


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """Write a model folder, complete or absent: weights, config, tokenizer, and the code that loads them
    without this package.

    Returns:
        why there is none, where the disk was full; else None.
    """
    failures: list[str] = []
    with note_no_space(failures.append), atomic_folder(folder) as written:
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
    return failures[0] if failures else None


class StopRequest:
    """SIGINT, SIGTERM and SIGHUP as a request to stop; one that is ignored, as under nohup, stays ignored.

    Within `handled`, the first signal raises Stopped for the run in `folder`; within `deferred` it only sets
    `is_made`. Further signals change nothing, so that a second Ctrl-C costs no checkpoint. Python delivers
    signals to the main thread: in another thread, signals are not handled.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.is_made = False
        self._is_deferred = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals, and restore the former handlers at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = [signal.signal(number, self._receive) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the caller end by itself soon after `is_made`, else raise Stopped at the end.

        Raises:
            Stopped: the request was made, and the block has ended as without it.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.is_made:
            raise Stopped(self.folder, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_new, self.is_made = not self.is_made, True
        if is_new and not self._is_deferred:
            raise Stopped(self.folder, None)


def _list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    numbered = [
        (int(path.name.removeprefix(_PREFIX)), path)
        for path in folder.iterdir()
        if path.name.startswith(_PREFIX) and path.name.removeprefix(_PREFIX).isdecimal()
    ]
    return [path for _, path in sorted(numbered)]
