"""The command line: reads arguments and calls a verb.

    hf-genlm train [SOURCE ...]          hf-genlm generate MODEL [PROMPT]    hf-genlm card RUN
    hf-genlm tokenizer SOURCE ...        hf-genlm serve MODEL                hf-genlm plot RUN ...
    hf-genlm extend MODEL SOURCE ...     hf-genlm chat MODEL                 hf-genlm push RUN OWNER/NAME
    hf-genlm evaluate MODEL [SOURCE ...] hf-genlm space MODEL [MODEL]        hf-genlm export MODEL
    hf-genlm audit RUN                   hf-genlm compare [SOURCE ...]       hf-genlm range
    hf-genlm doctor

Exit codes: 0 done; 2 the input cannot be used, one line on stderr says why; 1 a fault of ours, with a
traceback.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module

from hf_genlm.cli.arguments import build_parser
from hf_genlm.cli.launch import complain, is_first, is_launched
from hf_genlm.errors import Stopped, UserError

# verb -> the module of hf_genlm.cli and the function that takes the parsed options
_VERBS = {
    "train": ("train", "run"),
    "tokenizer": ("tokenizer", "run"),
    "extend": ("extend", "run"),
    "evaluate": ("evaluate", "run"),
    "audit": ("audit", "run"),
    "compare": ("compare", "run"),
    "range": ("range", "run"),
    "generate": ("generate", "run"),
    "export": ("export", "run"),
    "serve": ("serve", "serve_model"),
    "chat": ("serve", "chat_with_model"),
    "card": ("card", "run"),
    "push": ("push", "run"),
    "plot": ("plot", "run"),
    "space": ("space", "run"),
    "doctor": ("doctor", "run"),
}

_ENDED_BY_SIGPIPE = 128 + 13  # what a shell says of a command that `| head` ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    try:
        options = build_parser().parse_args(arguments)
        _quiet_libraries()
        options.arguments = sys.argv[1:] if arguments is None else list(arguments)
        module, function = _VERBS[options.verb]
        code = getattr(import_module(f"hf_genlm.cli.{module}"), function)(options) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        complain(str(error))
        return 2
    except Stopped as stopped:
        if is_first():
            _say_how_to_go_on(stopped)
        return 0
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return _ENDED_BY_SIGPIPE
    except KeyboardInterrupt:
        if not is_launched():  # else the launcher says it
            complain("stopped")
        return 130


def _nobody_reads() -> bool:
    """True if the reader of what is printed has ended; then nothing more is written to it."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _say_how_to_go_on(stopped: Stopped) -> None:
    reached = "before its first checkpoint" if stopped.step is None else f"after step {stopped.step:,}"
    print(f"stopped {reached}; to go on:", file=sys.stderr)
    print(f"hf-genlm train --resume --out {shlex.quote(str(stopped.folder))}", file=sys.stderr)


def _quiet_libraries() -> None:
    """Our own bars and messages instead of those of the libraries underneath."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    for library in ("torch", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate|matplotlib")


if __name__ == "__main__":
    sys.exit(main())
