"""Execute the runs of a comparison, each in a process of its own, in a folder that can be resumed.

DIR/ compare.yaml (the plan)  prepared.json  finished.json (hashes of finished runs)  log.jsonl
     corpus.json  tokenizer/  runs/CANDIDATE-seedN/ (run folders)  messages.txt (output of the libraries)
     comparison.json  report.html  report.md  plots/*.png

A process of its own starts with free memory and no threads of an earlier run, and its crash ends only that
run. It is a multiprocessing.Process with a pipe: concurrent.futures and loky neither forward events while a
function runs nor say which signal killed its process.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock

from hf_genlm.comparison.plan import Plan, Run
from hf_genlm.config.recipe import Recipe
from hf_genlm.errors import UserError, handled_signals
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.files import append_file, read, read_json, refuse_links_out, sha256_of, write_json, write_text
from hf_genlm.run_folder import Listener, RunFolder
from hf_genlm.run_schemas import CorpusFile, FinishedFile, PreparedCandidate, PreparedFile
from hf_genlm.text.corpus import changed_text

# files of a finished run whose hashes are checked: the sources of its results, and its weights
_HASHED = (
    "log.jsonl",
    "recipe.yaml",
    "evaluation_blocks.npy",
    "model/config.json",
    "model/model.safetensors",
)
_LOCK_TIMEOUT_S = 60  # a run whose parent process was killed ends within it
_PRELOADED = ["hf_genlm.training.train", "hf_genlm.card"]
_GPU_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/kfd"))


class ComparisonFolder(RunFolder):
    """Paths of a comparison, and its log."""

    plan = property(lambda self: self.path / "compare.yaml")
    prepared = property(lambda self: self.path / "prepared.json")
    finished = property(lambda self: self.path / "finished.json")
    messages = property(lambda self: self.path / "messages.txt")
    results = property(lambda self: self.path / "comparison.json")
    plots = property(lambda self: self.path / "plots")

    def forward(self, event: str, fields: dict[str, Any]) -> None:
        """Pass an event of a run on to the listener."""
        self.tell(event, **fields)

    def run(self, run: Run) -> RunFolder:
        """The folder of one run."""
        return RunFolder(self.path / "runs" / run.name)

    @classmethod
    def open_or_create(
        cls, path: str | Path, plan: Plan, listener: Listener | None = None
    ) -> "ComparisonFolder":
        """Open the folder in which `plan` began, or create a new one.

        Raises:
            UserError: it holds something else, or a comparison with another plan.
        """
        folder = cls(path, listener)
        if folder.plan.is_file():
            refuse_links_out(folder.path)
            plan.check_same(Plan.read(folder.plan), folder.path)
            return folder
        cls.create(path, listener)
        return folder


def run_all(folder: ComparisonFolder, plan: Plan) -> dict[str, str]:
    """Train the runs that are missing in `folder`, which is locked meanwhile.

    Finished runs are kept if their files are unchanged. An interrupted run resumes from its checkpoint if it
    has a budget of steps or tokens, since it reaches the same weights. With a time budget it starts again:
    the time lost since its last checkpoint and for a second start would be missing.

    Returns:
        The reason by name of each run that failed.

    Raises:
        UserError: the plan cannot be carried out, or a finished run was changed since.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; the same call continues.
    """
    with folder.locked(), handled_signals(("SIGINT", "SIGTERM", "SIGHUP"), _interrupt):
        if not folder.plan.is_file():
            write_text(folder.plan, plan.to_yaml())
        prepared = _load_or_prepare(folder, plan)
        failed: dict[str, str] = {}
        runs = plan.runs()
        for number, run in enumerate(runs, start=1):
            event = {"run": run.name, "number": number, "of": len(runs)}
            if _is_finished(folder, run):
                folder.tell("kept", **event)
                continue
            folder.log("run", **event)
            of_candidate = prepared[run.candidate]
            text = folder.path / of_candidate.text
            own = {"tokenizer.path": str(text / "tokenizer"), "tokenizer.vocab_size": None}
            recipe = plan.recipe(run.candidate, {**of_candidate.fields, **own}, run.seed)
            path = folder.run(run).path
            try:
                run_in_process(
                    train_run, recipe, path, plan.has_time_budget,
                    listener=folder.forward, messages=folder.messages,
                )  # fmt: skip
            except (UserError, ProcessCrash) as error:
                failed[run.name] = str(error)
                folder.log("failed", **event, reason=str(error), details=getattr(error, "details", ""))
                continue
            changed = changed_text(
                read_json(text / "corpus.json", CorpusFile), read_json(folder.run(run).corpus, CorpusFile)
            )
            if changed is not None:
                shutil.rmtree(path)
                raise UserError(
                    f"{changed[0]} has changed since this comparison began (changed: {changed[1]}), and "
                    f"{run.name} was trained on another: restore the text, or compare in another --out"
                )
            hashes = {name: sha256_of(path / name) for name in _HASHED}
            write_json(folder.finished, {**_finished_hashes(folder), run.name: hashes})
            bits = {m.name: m.value for m in read_measurements(folder.run(run).evaluation)}["bits_per_byte"]
            folder.log("finished", **event, bits_per_byte=round(bits, 5))
    return failed


def train_run(recipe: Recipe, path: Path, has_time_budget: bool, listener: Listener) -> None:
    """Train one run and write its card: a new run, or the rest of an interrupted one."""
    from hf_genlm.card import write_card
    from hf_genlm.training.train import train

    run = RunFolder(path)
    if path.is_dir():
        with FileLock(run.lock_file, timeout=_LOCK_TIMEOUT_S):
            pass
    resume = run.recipe.is_file() and (run.model.is_dir() or not has_time_budget)
    if not resume:
        shutil.rmtree(path, ignore_errors=True)
    write_card(train(Recipe() if resume else recipe, path, listener, resume=resume))


def _prepare(plan: Plan, path: Path, listener: Listener) -> dict[str, dict[str, Any]]:
    """Import the preparation, and with it torch, only in the process that runs it."""
    from hf_genlm.comparison.prepare import prepare

    return prepare(plan, path, listener)


def _load_or_prepare(folder: ComparisonFolder, plan: Plan) -> dict[str, PreparedCandidate]:
    if not folder.prepared.is_file():
        try:
            found = run_in_process(
                _prepare, plan, folder.path, listener=folder.forward, messages=folder.messages
            )
        except UserError:
            folder.discard()
            raise
        except ProcessCrash as error:
            raise RuntimeError(error.details or str(error)) from error
        write_json(folder.prepared, found, PreparedFile)
    return read_prepared(folder, plan)


def read_prepared(folder: ComparisonFolder, plan: Plan) -> dict[str, PreparedCandidate]:
    """Read prepared.json: settings and size of each candidate.

    Raises:
        UserError: the file is missing, damaged, or of other candidates.
    """
    prepared = read(folder.prepared, PreparedFile)
    if prepared.keys() != plan.candidates.keys():
        raise UserError(
            f"{str(folder.prepared)!r} is of the candidates {', '.join(prepared)}, not of "
            f"{', '.join(plan.candidates)}: name another --out"
        )
    return prepared


def _is_finished(folder: ComparisonFolder, run: Run) -> bool:
    """True if the run is finished and unchanged.

    Raises:
        UserError: it was finished, and was changed since.
    """
    hashes = _finished_hashes(folder)
    path = folder.run(run).path
    if run.name not in hashes or not path.is_dir():
        return False
    for name, sha256 in hashes[run.name].items():
        if not (path / name).is_file() or sha256_of(path / name) != sha256:
            raise UserError(
                f"{str(path / name)!r} is not the file of {str(folder.finished)!r}, one of them was changed: "
                f"restore it, or remove {str(path)!r} to train that run again"
            )
    return True


def _finished_hashes(folder: ComparisonFolder) -> dict[str, dict[str, str]]:
    return read_json(folder.finished, FinishedFile) if folder.finished.is_file() else {}


def _interrupt(number: int) -> NoReturn:
    raise KeyboardInterrupt  # the run that is interrupted writes its checkpoint meanwhile


class ProcessCrash(RuntimeError):
    """A process died, or raised an exception that is not a UserError; `details` has the traceback."""

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


def run_in_process(function: Callable[..., Any], *arguments: Any, listener: Listener, messages: Path) -> Any:
    """Call `function(*arguments, listener=...)` in a new process, which ends when this one does.

    Events are forwarded to `listener`; what the process prints is appended to the file `messages`. Ctrl-C
    here sends SIGTERM there, and waits for its end.

    Returns:
        The result of the function; it and the arguments must be picklable.

    Raises:
        UserError: the function raised it.
        ProcessCrash: it raised another exception, or the process died.
        KeyboardInterrupt: the function was interrupted, and has ended.
    """
    # Fork from a server that has imported everything: a run starts 6 s earlier than by spawn. GPU drivers and
    # Apple's libraries do not survive a fork.
    can_fork = sys.platform == "linux" and not any(driver.exists() for driver in _GPU_DRIVERS)
    context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(sender, str(messages), function, arguments))
    with _starting(messages):
        child.start()
    sender.close()
    kind: str = "died"
    content: Any = None
    try:
        while kind not in ("returned", "refused", "crashed", "interrupted"):
            kind, content = receiver.recv()
            if kind == "event":
                listener(*content)
    except EOFError:
        kind = "died"
    except BaseException:
        child.terminate()
        child.join(_LOCK_TIMEOUT_S)
        child.kill()
        raise
    finally:
        receiver.close()
        child.join()
    if kind == "refused":
        raise UserError(content)
    if kind == "crashed":
        raise ProcessCrash(content.strip().splitlines()[-1], content)
    if kind == "interrupted":
        raise KeyboardInterrupt
    if kind == "died":
        code = child.exitcode or 0
        if code >= 0:
            raise ProcessCrash(f"its process ended with exit code {code}")
        hint = ", as the system does when memory is short" if -code == signal.SIGKILL else ""
        raise ProcessCrash(f"its process was ended by {signal.Signals(-code).name}{hint}")
    return content


@contextlib.contextmanager
def _starting(messages: Path) -> Iterator[None]:
    """Start processes that append to a file what libraries print to stderr while they are imported.

    Python then does not import modules of the current folder, which may be a stranger's.
    """
    sys.stderr.flush()
    before, path = os.dup(2), os.environ.get("PYTHONSAFEPATH")
    try:
        with append_file(messages) as file:
            os.dup2(file.fileno(), 2)
        os.environ["PYTHONSAFEPATH"] = "1"
        yield
    finally:
        os.environ["PYTHONSAFEPATH"] = path or ""
        os.dup2(before, 2)
        os.close(before)


def _serve(sender: Connection, messages: str, function: Callable[..., Any], arguments: tuple) -> None:
    """Call the function in the new process, and send its events and its result."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C of the terminal is for the parent only
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]  # a run trains on one GPU
    with append_file(messages) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    from hf_genlm.training.processes import end_after

    parent = multiprocessing.parent_process()
    assert parent is not None
    end_after(parent.join)

    def send(kind: str, content: Any) -> None:
        with contextlib.suppress(OSError):  # the parent has closed its end
            sender.send((kind, content))

    try:
        send("returned", function(*arguments, listener=lambda *event: send("event", event)))
    except UserError as error:
        send("refused", str(error))
    except KeyboardInterrupt:
        send("interrupted", None)
    except Exception:
        send("crashed", traceback.format_exc())
