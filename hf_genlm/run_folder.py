"""The run folder: paths and log of one run. All verbs read and write a run through it.

RUN/ recipe.yaml  environment.json  corpus.json  log.jsonl  tokenizer/  checkpoints/
     vectors.json (with word vectors)  languages.json (with named languages)
     evaluation.json  evaluation_blocks.npy (likelihood by blocks of text)
     privacy.json (the guarantee, with privacy.epsilon)  canaries.json (never pushed)  audit.json
     samples.md  model/ (exactly what is pushed)  plots/  milestones/ (models at given numbers of words)
     tensorboard/  .lock (held by the process that trains)
"""

import contextlib
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from hf_genlm.errors import UserError, utf8_name
from hf_genlm.files import (
    WriteError,
    append_file,
    is_private_name,
    parse,
    read_bytes,
    read_text,
    refuse_links_out,
    remove_private,
)
from hf_genlm.memory import check_values
from hf_genlm.run_schemas import EVENTS, Event

Listener = Callable[[str, dict[str, Any]], None]
STORE = "HF_GENLM_STORE"  # file through which the processes of our launcher find each other
SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MILESTONE = re.compile(r"chck_([0-9]{1,15})([KM]?)")  # as training.callbacks.milestone_name writes it
# all that a run killed at its start leaves; sources and validation hold texts that were given in Python
_BEGINNING = {".lock", "log.jsonl", "sources.jsonl", "validation.jsonl"}


class RunFolder:
    """Paths of one run, and its log.

    `listener(event, fields)` receives all events, `followers` receive those that are logged.
    """

    def __init__(self, path: str | Path, listener: Listener | None = None):
        self.path = Path(path)
        self.listener = listener
        self.followers: list[Listener] = []
        self._is_log_cut = False  # by a full disk, in the middle of a line

    recipe = property(lambda self: self.path / "recipe.yaml")
    environment = property(lambda self: self.path / "environment.json")
    corpus = property(lambda self: self.path / "corpus.json")
    vectors = property(lambda self: self.path / "vectors.json")
    languages = property(lambda self: self.path / "languages.json")
    log_file = property(lambda self: self.path / "log.jsonl")
    tokenizer = property(lambda self: self.path / "tokenizer")
    checkpoints = property(lambda self: self.path / "checkpoints")
    evaluation = property(lambda self: self.path / "evaluation.json")
    blocks = property(lambda self: self.path / "evaluation_blocks.npy")
    privacy = property(lambda self: self.path / "privacy.json")
    canaries = property(lambda self: self.path / "canaries.json")
    audit = property(lambda self: self.path / "audit.json")
    samples = property(lambda self: self.path / "samples.md")
    model = property(lambda self: self.path / "model")
    milestones = property(lambda self: self.path / "milestones")
    tensorboard = property(lambda self: self.path / "tensorboard")
    lock_file = property(lambda self: self.path / ".lock")
    shared = property(lambda self: self.path / "shared")  # while several processes start

    @classmethod
    def create(cls, path: str | Path, listener: Listener | None = None) -> "RunFolder":
        """Make the folder of a new run.

        Raises:
            UserError: the folder holds files already, a link leads out of it, or it cannot be written.
        """
        run = cls(utf8_name(path), listener)
        try:
            if run.path.is_dir() and not all(
                path.name in _BEGINNING or is_private_name(path) for path in run.path.iterdir()
            ):
                is_run, is_done = run.recipe.exists(), run.model.is_dir()
                go_on = ", or continue it with train --resume" if is_run and not is_done else ""
                raise UserError(
                    f"--out {str(path)!r} already holds {'a run' if is_run else 'files'}: name a new folder, "
                    f"or remove it{go_on}"
                )
            run.path.mkdir(parents=True, exist_ok=True)
            if not os.access(run.path, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
            refuse_links_out(run.path)
            with append_file(run.log_file):
                pass
        except OSError as error:
            raise UserError(
                f"--out {str(path)!r} cannot be written ({error.strerror}): name a writable folder"
            ) from error
        return run

    @classmethod
    def open(cls, path: str | Path, listener: Listener | None = None) -> "RunFolder":
        """Open the folder of an existing run.

        Raises:
            UserError: there is no run, a link leads out of it, or a file stands where a folder belongs.
        """
        run = cls(path, listener)
        if not run.recipe.is_file():
            why = "it holds no recipe.yaml" if run.path.exists() else "it does not exist"
            raise UserError(f"{str(path)!r} is not a run folder: {why}; 'train --out' writes one")
        refuse_links_out(run.path)
        plots = (run.path / "plots", run.model / "plots")
        for folder in (run.tokenizer, run.checkpoints, run.model, run.milestones, *plots):
            if os.path.lexists(folder) and not folder.is_dir():
                raise UserError(f"{str(folder)!r} is no folder: remove it")
        return run

    def discard(self) -> None:
        """Remove the folder of a run that failed before training."""
        shutil.rmtree(self.path.resolve())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder while a process trains in it; the lock ends with the process.

        Raises:
            UserError: another process holds the lock, or it is no file that can be opened.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.lock_file)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(
                f"another process is training in {str(self.path)!r}: wait for it, or name another --out"
            ) from error
        except OSError as error:
            raise UserError(
                f"{str(self.lock_file)!r} cannot be locked ({error.strerror}): remove it, or make its folder "
                "writable"
            ) from error
        try:
            for folder in (self.path, self.model, self.milestones):
                remove_private(folder)
            yield
        finally:
            lock.release()

    def is_locked(self) -> bool:
        """Return True if a process is training in this folder."""
        from filelock import FileLock, Timeout

        if self.lock_file.is_symlink() or not self.lock_file.is_file():
            return False
        try:
            with FileLock(self.lock_file, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # a folder that is only readable
            return False

    def log(self, event: str, **fields: Any) -> None:
        """Append an event to log.jsonl, with `time` in seconds since 1970; send it to listener and followers.

        If the line cannot be written, as on a full disk, the run continues and the listener gets a note.
        """
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}, ensure_ascii=False)
        try:
            with append_file(self.log_file) as file:
                file.write((f"\n{line}\n" if self._is_log_cut else f"{line}\n").encode("utf-8", "replace"))
            self._is_log_cut = False
        except WriteError as error:
            self._is_log_cut = True
            self.tell("note", message=f"{self.log_file.name} was not written: {error.reason}")
        self.tell(event, **fields)
        for follower in self.followers:
            follower(event, fields)

    def tell(self, event: str, **fields: Any) -> None:
        """Send an event to the listener without logging it: progress that is of no use afterwards."""
        if self.listener is not None:
            self.listener(event, fields)

    def read_log(self) -> list[dict[str, Any]]:
        """Read all logged events, oldest first. Lines that a kill or a full disk cut off are left out.

        Raises:
            UserError: a line is not an event, or a field is missing or has another type.
        """
        if not self.log_file.exists():
            return []
        events: list[dict[str, Any]] = []
        content = read_bytes(self.log_file).decode("utf-8", "replace")
        check_values(content, self.log_file)
        for number, text in enumerate(io.StringIO(content, newline="\n"), 1):
            try:
                event = json.loads(text)
            except (ValueError, RecursionError):
                continue
            place = f"{self.log_file}:{number}"
            kind = parse(text, Event, place).event
            if kind in EVENTS:
                parse(text, EVENTS[kind], place)
            events.append(event)
        return events

    def list_milestones(self) -> list[Path]:
        """Folders of the models after given numbers of words, in ascending order."""
        units = {"": 1, "K": 10**3, "M": 10**6}
        matches = ((_MILESTONE.fullmatch(path.name), path) for path in self.milestones.glob("chck_*"))
        found = {path: int(name[1]) * units[name[2]] for name, path in matches if name and path.is_dir()}
        return sorted(found, key=lambda path: found[path])

    def has_stopped(self) -> bool:
        """True if the last logged event is that a signal ended the training."""
        events = self.read_log()
        return bool(events) and events[-1]["event"] == "stopped"

    def end_log_line(self) -> None:
        """Let the next event begin a new line if a kill cut the last line off."""
        with append_file(self.log_file) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                self._is_log_cut = file.read(1) != b"\n"


class FollowedRun(RunFolder):
    """The folder of a run that another process of the same training writes. All writers do nothing."""

    def discard(self) -> None:
        """Do nothing: the first process does it."""

    def log(self, event: str, **fields: Any) -> None:
        """Do nothing: the first process does it."""

    def tell(self, event: str, **fields: Any) -> None:
        """Do nothing: the first process does it."""


def launched_as() -> tuple[int, int]:
    """Rank of this process, and the number of processes that a launcher has started: (0, 1) without one.

    Variables that an ended launcher left in the environment are removed, unless they are complete: torch,
    Accelerate and transformers read them too.
    """
    rank, world, port = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    has_meeting_place = STORE in os.environ or (port.isdecimal() and "MASTER_ADDR" in os.environ)
    if rank.isdecimal() and world.isdecimal() and int(rank) < int(world) and has_meeting_place:
        is_sharded = any(os.environ.get(name, "").lower() == "true" for name in SHARDING)
        if int(world) > 1 or is_sharded:
            return int(rank), int(world)
    for name in _OF_LAUNCHERS:
        os.environ.pop(name, None)
    return 0, 1


def is_watched() -> bool:
    """Return True if a launcher of torch started this process, which ends all processes if one is lost."""
    return STORE in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def describe_environment() -> dict[str, Any]:
    """Collect versions and machine for environment.json, without host names or paths."""
    packages = (
        "hf_genlm",
        "torch",
        "transformers",
        "tokenizers",
        "datasets",
        "accelerate",
        "safetensors",
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": n_cores(),
        "packages": {name: _version(name) for name in packages},
        "implementation": sys.implementation.name,
    }


def n_cores() -> int:
    """Cores that this process may use: by its affinity, and by the CPU quota of its container, rounded up."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min([n, *_cpu_quotas()])))


def _cpu_quotas(groups: str = "/proc/self/cgroup", mounts: str = "/sys/fs/cgroup") -> Iterator[float]:
    """CPU quotas of this process's control groups (cgroups v1 and v2) and of those above them, in cores."""
    lines = read_text(groups).splitlines() if os.path.exists(groups) else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        for group in (PurePath(path), *PurePath(path).parents):
            for mount in (controllers, "cpu") if controllers else ("", "unified"):
                with contextlib.suppress(UserError, ValueError, ZeroDivisionError):  # not there, or no quota
                    found = [read_text(f"{mounts}/{mount}{group}/{name}") for name in names]
                    quota, period = map(int, " ".join(found).split())
                    if quota > 0:
                        yield quota / period


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_step(fields: dict[str, Any]) -> str:
    """`step 40 of 200  loss 5.345  3,252 tokens/s  0:11 left`; `of about 200` in a run that time ends."""
    left_s, step, done = int(fields["left_s"]), fields["step"], fields["progress"]
    of = (
        f" of {fields['steps']:,}" if fields.get("steps") else f" of about {step / done:,.0f}" if done else ""
    )
    return (
        f"step {step:,}{of}  loss {fields['loss']:.3f}  {fields['tokens_per_s']:,} tokens/s  "
        f"{left_s // 60}:{left_s % 60:02d} left"
    )
