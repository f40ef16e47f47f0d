"""Entry point of the command line.

Exit codes: 0 done; 2 the input cannot be used, and one line on stderr names the value, the rule and the
remedy; 1 a fault of this package, with a traceback; 130 Ctrl-C; 141 the reader of the output has ended.
"""

import codecs
import errno
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

# isort: off
from hf_genlm.cli import train, evaluate, models, inspect  # noqa: F401  the order of the help

# isort: on
from hf_genlm.cli.display import prepare_streams, print_traceback, say
from hf_genlm.cli.launch import complain, is_first, is_launched
from hf_genlm.cli.options import WORDS, app, explain_usage_error
from hf_genlm.errors import Stopped, UserError, quiet_libraries
from hf_genlm.files import WriteError
from hf_genlm.run_folder import n_cores

_OF_THE_DISK = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_ENDED_BY_SIGPIPE = 128 + 13  # the exit code that a shell reports for it
_COMPLETION = "_HF_GENLM_COMPLETE"  # set by the shell's completion script


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> int:
    if version:
        from hf_genlm import __version__

        say(f"hf-genlm {__version__}")
    elif ctx.invoked_subcommand is None:
        ctx.get_help()  # printed by typer
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if arguments is None:
        _use_utf8()
    prepare_streams()
    try:
        _forget_launcher(words)
        if _COMPLETION in os.environ:
            return typer.main.get_command(app).main(words, prog_name="hf-genlm", complete_var=_COMPLETION)
        sys.excepthook = print_traceback
        _set_environment()
        with quiet_libraries():
            code = _run(words) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        complain(str(error))
        return 2
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            complain(str(UserError(f"{str(error.filename)[:60]!r}... is too long for the name of a file")))
            return 2
        if error.errno in _OF_THE_DISK or "usable temporary directory" in str(error):
            complain(str(WriteError(error.filename or "the folder of temporary files, TMPDIR", error)))
            return 2
        if error.errno not in (errno.EPIPE, errno.EIO) or not _has_lost_reader():
            raise
        return _ENDED_BY_SIGPIPE
    except KeyboardInterrupt as error:
        return _end_stopped(error)
    finally:
        if arguments is None:  # this process ends now, whatever comes
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_stopped(error: BaseException | None) -> int:
    """Print that the verb was stopped, and how to continue a training; returns the exit code.

    A second Ctrl-C may have come while the first one ended the training.
    """
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    if error is None:
        if not is_launched():  # otherwise the launcher prints it
            complain("stopped")
        return 130
    if is_first():
        reached = "" if error.step is None else f" after step {error.step:,}"
        command = f"hf-genlm train --resume --out {shlex.quote(str(error.folder))}"
        say(f"stopped{reached}; to continue:", command, is_error=True)
    return 0


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Parse a command line without running it: the verb's parameters by name, and `verb`.

    Raises:
        UserError: an unknown verb or option, or a value that does not fit.
    """
    record: dict[str, Any] = {}
    _run(list(words), record)
    return record


def _run(words: list[str], record: dict[str, Any] | None = None) -> Any:
    command: Any = typer.main.get_command(app)
    try:
        with command.make_context("hf-genlm", list(words), obj=record) as context:
            context.meta[WORDS] = words
            return command.invoke(context)
    except typer.Exit as end:  # after --help
        return end.exit_code
    except typer.TyperException as error:
        raise explain_usage_error(error) from error


def _use_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale has another encoding, as LC_ALL=C may.

    Names of files are UTF-8 to the libraries, and so is the text that is generated.
    """
    if os.name != "posix" or sys.getfilesystemencoding() == "utf-8" or not sys.executable:
        return
    if sys.stdout is not None and "ascii" not in codecs.lookup(sys.stdout.encoding).name:
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _forget_launcher(words: list[str]) -> None:
    """Remove the variables that an ended launcher has left; only `train` runs as one of several processes."""
    world = os.environ.get("WORLD_SIZE", "1")
    if words[:1] != ["train"]:
        os.environ.pop("WORLD_SIZE", None)
    elif not is_launched() and world != "1":
        complain(f"WORLD_SIZE={world!r} is ignored: a launcher sets RANK, MASTER_ADDR and MASTER_PORT too")
    is_launched()


def _has_lost_reader() -> bool:
    """Return True if the reader or the terminal of the output is gone; nothing is written to it then."""
    try:
        say()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _set_environment() -> None:
    """Silence the libraries in this process and those that it starts: this command shows its own progress."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's is inherited by its shell, and may not be installed here
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # no frames of bars in a file
    if n_cores() < (os.cpu_count() or 1):  # torch knows no quota of a container
        os.environ.setdefault("OMP_NUM_THREADS", str(n_cores()))


if __name__ == "__main__":
    sys.exit(main())
