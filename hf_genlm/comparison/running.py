"""The runs of a comparison, one after another, each in a process of its own, in a folder that can be gone on
with.

DIR/ compare.yaml (the plan)  prepared.json  finished.json (hashes of what is done)  log.jsonl
     corpus.json  tokenizer/  runs/CANDIDATE-seedN/ (run folders)  messages.txt (what the libraries said)
     comparison.json  report.html  report.md  plots/*.png
"""

import contextlib
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock

from hf_genlm.comparison.apart import Crashed, run_apart
from hf_genlm.comparison.plan import Plan, Run
from hf_genlm.config.recipe import Recipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.files import read_json, refuse_links_out, sha256_of, write_json, write_text
from hf_genlm.run_folder import Listener, RunFolder
from hf_genlm.text.corpus import changed_text

# what the numbers of a finished run are read from, and its weights
_KEPT = ("log.jsonl", "recipe.yaml", "evaluation_blocks.npy", "model/config.json", "model/model.safetensors")
_LAST_MOMENTS_S = 60  # of a run whose parent was killed


class ComparisonFolder(RunFolder):
    """Paths of a comparison, and its log."""

    plan = property(lambda self: self.path / "compare.yaml")
    prepared = property(lambda self: self.path / "prepared.json")
    finished = property(lambda self: self.path / "finished.json")
    messages = property(lambda self: self.path / "messages.txt")
    results = property(lambda self: self.path / "comparison.json")
    plots = property(lambda self: self.path / "plots")

    def hear(self, event: str, fields: dict[str, Any]) -> None:
        """Pass on what a run tells."""
        self.tell(event, **fields)

    def run(self, run: Run) -> RunFolder:
        """The folder of one training."""
        return RunFolder(self.path / "runs" / run.name)

    @classmethod
    def of(cls, path: str | Path, plan: Plan, listener: Listener | None = None) -> "ComparisonFolder":
        """The folder of `plan`: a new one, or the one in which it was begun.

        Raises:
            UserError: it holds something else, or a comparison that began otherwise.
        """
        folder = cls(path, listener)
        if folder.plan.is_file():
            refuse_links_out(folder.path)
            plan.check_same(Plan.read(folder.plan), folder.path)
            return folder
        return cls.create(path, listener)  # type: ignore[return-value]


def run_all(folder: ComparisonFolder, plan: Plan) -> dict[str, str]:
    """Train what is missing in `folder`, which this process holds meanwhile.

    What is finished is kept, if it is as it was. A run that was broken off goes on from its checkpoint where
    steps or tokens end it, since it comes to the same weights. By the clock it begins again: what its last
    checkpoint lost and a second start would be missing from its time.

    Returns:
        By the name of a run that failed: why.

    Raises:
        UserError: the plan cannot be carried out, or what is finished was changed since.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the same call goes on.
    """
    with folder.locked(), _sigterm_as_interrupt():
        if not folder.plan.is_file():
            write_text(folder.plan, plan.to_yaml())
        prepared = _prepare(folder, plan)
        failed: dict[str, str] = {}
        runs = plan.runs()
        for number, run in enumerate(runs, start=1):
            where = {"run": run.name, "number": number, "of": len(runs)}
            if _is_kept(folder, run):
                folder.tell("kept", **where)
                continue
            folder.log("run", **where)
            try:
                _train_apart(folder, plan, run, prepared[run.candidate])
            except (UserError, Crashed) as error:
                failed[run.name] = str(error)
                folder.log("failed", **where, reason=str(error), details=getattr(error, "details", ""))
                continue
            _check_text(folder, run, prepared[run.candidate])
            _keep(folder, run)
            bits = {m.name: m.value for m in read_measurements(folder.run(run).evaluation)}["bits_per_byte"]
            folder.log("finished", **where, bits_per_byte=round(bits, 5))
    return failed


def prepared_of(folder: ComparisonFolder) -> dict[str, dict[str, Any]]:
    """What `prepare` found, by candidate."""
    return read_json(folder.prepared)


def _prepare(folder: ComparisonFolder, plan: Plan) -> dict[str, dict[str, Any]]:
    if not folder.prepared.is_file():
        try:
            found = run_apart(
                _prepare_here, plan, folder.path, listener=folder.hear, messages=folder.messages
            )
        except UserError:
            folder.discard()
            raise
        except Crashed as error:
            raise RuntimeError(error.details or str(error)) from error
        write_json(folder.prepared, found)
    return prepared_of(folder)


def _train_apart(folder: ComparisonFolder, plan: Plan, run: Run, prepared: dict[str, Any]) -> None:
    own = {
        "tokenizer.path": str(folder.path / prepared["text"] / "tokenizer"),
        "tokenizer.vocab_size": None,
    }
    recipe = plan.recipe(run.candidate, {**prepared["fields"], **own}, run.seed)
    path = folder.run(run).path
    run_apart(_train_here, recipe, path, plan.is_by_clock, listener=folder.hear, messages=folder.messages)


def _prepare_here(plan: Plan, path: Path, listener: Listener) -> dict[str, dict[str, Any]]:
    """In a process of its own: this one never loads torch."""
    from hf_genlm.comparison.prepare import prepare

    return prepare(plan, path, listener)


def _train_here(recipe: Recipe, path: Path, is_by_clock: bool, listener: Listener) -> None:
    """As `_prepare_here`: a new run, or the rest of one."""
    from hf_genlm.card import write_card
    from hf_genlm.training.train import train

    run = RunFolder(path)
    if path.is_dir():
        with FileLock(run.lock_file, timeout=_LAST_MOMENTS_S):
            pass
    goes_on = run.recipe.is_file() and (run.model.is_dir() or not is_by_clock)
    if not goes_on:
        shutil.rmtree(path, ignore_errors=True)
    write_card(train(Recipe() if goes_on else recipe, path, listener, resume=goes_on))


def _is_kept(folder: ComparisonFolder, run: Run) -> bool:
    """True if the run is finished.

    Raises:
        UserError: it was, and is not as it was.
    """
    finished = _finished(folder)
    path = folder.run(run).path
    if run.name not in finished or not path.is_dir():
        return False
    for name, sha256 in finished[run.name].items():
        if not (path / name).is_file() or sha256_of(path / name) != sha256:
            raise UserError(
                f"{str(path / name)!r} is not as this comparison left it: bring it back, or remove "
                f"{str(path)!r}, and that run is done again"
            )
    return True


def _keep(folder: ComparisonFolder, run: Run) -> None:
    path = folder.run(run).path
    hashes = {name: sha256_of(path / name) for name in _KEPT}
    write_json(folder.finished, {**_finished(folder), run.name: hashes})


def _finished(folder: ComparisonFolder) -> dict[str, dict[str, str]]:
    return read_json(folder.finished) if folder.finished.is_file() else {}


def _check_text(folder: ComparisonFolder, run: Run, prepared: dict[str, Any]) -> None:
    """
    Raises:
        UserError: the text has changed since the comparison began.
    """
    before, now = read_json(folder.path / prepared["text"] / "corpus.json"), read_json(folder.run(run).corpus)
    changed = changed_text(before, now)
    if changed is not None:
        shutil.rmtree(folder.run(run).path)
        raise UserError(
            f"{changed[0]} has changed since this comparison began (changed: {changed[1]}), and {run.name} "
            "was trained on another: bring the text back, or compare anew in another --out"
        )


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
