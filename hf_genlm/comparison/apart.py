"""A function in a process of its own: nothing that ran before it holds memory or threads, and its crash ends
it alone."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hf_genlm.errors import UserError
from hf_genlm.files import append_file
from hf_genlm.run_folder import Listener

_PRELOADED = ["hf_genlm.training.train", "hf_genlm.card"]
_GPU_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/kfd"))


class Crashed(RuntimeError):
    """The process ended without an answer, or by an exception that is a fault of ours; the message says how
    in one line, `details` in full."""

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


def run_apart(function: Callable[..., Any], *arguments: Any, listener: Listener, messages: Path) -> Any:
    """`function(*arguments, listener=...)` in a process of its own, which ends when this one does.

    What it tells its listener is told to `listener` here; what it prints is appended to the file `messages`.
    Ctrl-C here is SIGTERM there, and its end is waited for.

    Returns:
        What the function returns; it and the arguments must be picklable.

    Raises:
        UserError: as the function did.
        Crashed: it raised something else, or the process died.
        KeyboardInterrupt: the function was told to stop, and has.
    """
    context = _context()
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(there, str(messages), function, arguments))
    with _stderr_to(messages):  # libraries have much to say while they are imported
        child.start()
    there.close()
    try:
        kind, answer = _hear_out(here, listener)
    except EOFError:
        child.join()
        kind, answer = "died", None
    except BaseException:
        child.terminate()
        raise
    finally:
        here.close()
        child.join()
    if kind == "refused":
        raise UserError(answer)
    if kind == "crashed":
        raise Crashed(answer.strip().splitlines()[-1], answer)
    if kind == "died":
        raise Crashed(_how_it_died(child))
    if kind == "stopped":
        raise KeyboardInterrupt
    return answer


def _context() -> Any:
    """Processes that are forked from one which has imported everything, on a CPU of Linux; elsewhere a fresh
    interpreter each, since a GPU's driver and Apple's libraries do not survive a fork."""
    can_fork = sys.platform == "linux" and not any(driver.exists() for driver in _GPU_DRIVERS)
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload(_PRELOADED)
    return context


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Within, what this process starts writes its errors to the end of a file."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with append_file(path) as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _hear_out(pipe: Connection, listener: Listener) -> tuple[str, Any]:
    """Pass on what is told, up to the answer."""
    while True:
        kind, content = pipe.recv()
        if kind != "told":
            return kind, content
        listener(*content)


def _how_it_died(child: BaseProcess) -> str:
    code = child.exitcode or 0
    if code >= 0:
        return f"its process ended with exit code {code}"
    hint = ", as the system does where memory is short" if -code == signal.SIGKILL else ""
    return f"its process was ended by {signal.Signals(-code).name}{hint}"


def _serve(pipe: Connection, messages: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the new process."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C of the terminal is for the parent alone
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]  # a run trains on one GPU
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with append_file(messages) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)

    def tell(event: str, fields: dict[str, Any]) -> None:
        _send(pipe, ("told", (event, fields)))

    answer: tuple[str, Any]
    try:
        answer = "done", function(*arguments, listener=tell)
    except UserError as error:
        answer = "refused", str(error)
    except KeyboardInterrupt:
        answer = "stopped", None
    except Exception:
        answer = "crashed", traceback.format_exc()
    _send(pipe, answer)


def _send(pipe: Connection, content: Any) -> None:
    try:
        pipe.send(content)
    except OSError:  # nobody listens any more
        return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
