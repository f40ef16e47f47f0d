"""Entry point of the command line.

Exit codes: 0 done; 2 the input cannot be used, and one line on stderr names the value, the rule and the
remedy; 1 a fault of this package, with a traceback; 130 Ctrl-C; 141 the reader of the output has ended.
"""

import errno
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

# isort: off
from hf_genlm.cli import train, evaluate, models, inspect  # noqa: F401  the order of the help

# isort: on
from hf_genlm.cli.display import print_traceback, say
from hf_genlm.cli.launch import complain, is_first, is_launched
from hf_genlm.cli.options import WORDS, app, explain_usage_error
from hf_genlm.errors import Stopped, UserError, quiet_libraries
from hf_genlm.run_folder import n_cores

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
    try:
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
    except Stopped as stopped:
        if is_first():
            reached = (
                "before its first checkpoint" if stopped.step is None else f"after step {stopped.step:,}"
            )
            command = f"hf-genlm train --resume --out {shlex.quote(str(stopped.folder))}"
            say(f"stopped {reached}; to continue:", command, is_error=True)
        return 0
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            complain(str(UserError(f"{str(error.filename)[:60]!r}... is too long for the name of a file")))
            return 2
        if not isinstance(error, BrokenPipeError) or not _has_lost_reader():
            raise
        return _ENDED_BY_SIGPIPE
    except KeyboardInterrupt:
        if not is_launched():  # otherwise the launcher prints it
            complain("stopped")
        return 130


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


def _has_lost_reader() -> bool:
    """Return True if the reader of the output has ended; nothing more is written to it then."""
    try:
        say()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _set_environment() -> None:
    """Silence the libraries in this process and those that it starts: this command shows its own progress."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
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
