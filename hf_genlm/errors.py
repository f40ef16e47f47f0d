"""Errors that a person can fix or has asked for, and messages of libraries that no person can act on.

Any other exception is a fault of this package.
"""

import contextlib
import difflib
import logging
import os
import re
import shlex
import signal
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

# regular expressions of access tokens and keys: hidden in messages, scrubbed from text, refused in a push
HUB = r"(?<!\w)hf_[A-Za-z0-9]{20,}"
GITHUB_FINE_GRAINED = r"(?<!\w)github_pat_[A-Za-z0-9_]{22,}"
GOOGLE = r"(?<!\w)AIza[A-Za-z0-9_-]{35}"
BEGIN_OF_PRIVATE_KEY = r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
END_OF_PRIVATE_KEY = BEGIN_OF_PRIVATE_KEY.replace("BEGIN", "END")

# access tokens of the Hub; logins before the host of an address
_SECRETS = (re.compile(HUB), re.compile(r"(?<=://)[^/\s@'\"]+(?=@)"))
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# libraries whose warnings are about their own code
_LIBRARIES = (
    "torch",
    "torch.utils._pytree",
    "torchao",
    "transformers",
    "accelerate",
    "matplotlib",
    "datasets",
)
_JOINERS = "\u00ad\u200c\u200d"
_MIN_SECRET = 8  # characters of a variable's value; a shorter value occurs in any text


class UserError(ValueError):
    """Input that cannot be used. The message is one line: the value, the rule, the remedy.

    The command line prints the message without a traceback and exits with 2. Access tokens in the message are
    masked, and unprintable characters such as line ends are escaped.
    """

    def __init__(self, message: str):
        super().__init__(escape_controls(without_secrets(message)))


class NoSource(UserError):
    """No text source exists at `word`."""

    def __init__(self, word: str, message: str):
        super().__init__(message)
        self.word = word


def utf8_name(path: str | os.PathLike[str]) -> str:
    """Return the name of a file or folder to write.

    Raises:
        UserError: it is not UTF-8, which the libraries that write tokenizers and weights need.
    """
    name = os.fspath(path)
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{name!r} is not a name in UTF-8: name another folder") from error
    return name


def is_control(character: str) -> bool:
    """True for what moves a terminal's cursor, reorders or hides text: control and format characters,
    surrogates, line and paragraph separators. Letters need the joiners and soft hyphens, which are not."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS


def escape_controls(text: str, keep: str = "") -> str:
    r"""Write control characters, except those in `keep`, as `\x1b` or `\u202e`."""
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if is_control(c) and c not in keep else c for c in text
    )


def without_secrets(text: str) -> str:
    """Replace every access token of the Hub, and every login in an address, by `***`."""
    for pattern in _SECRETS:
        text = pattern.sub("***", text)
    for name in _TOKEN_VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= _MIN_SECRET:
            text = text.replace(value, "***")
    return text


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a training, whose run folder is complete: `--resume` continues it.

    `folder` is the run folder, `step` the step of its last checkpoint (None: there is no checkpoint yet).
    """

    def __init__(self, folder: str, step: int | None):
        super().__init__(folder, step)
        self.folder, self.step = folder, step


@contextlib.contextmanager
def handled_signals(names: Iterable[str], act: Callable[[int], NoReturn]) -> Iterator[None]:
    """Call `act`, which raises, at the first signal of those named; ignore more of them until the end.

    A signal that is ignored, as under nohup, stays ignored. Signals are handled in the main thread only.
    """
    before: dict[int, Any] = {}

    def handle(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        act(number)

    try:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name, None) for name in names):
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    before[number] = signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """End of a message: `; did you mean 'lstm'?` if one of `known` is similar, else a list of all."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}"


def install_command(extra: str) -> str:
    """The command that installs the libraries of an extra of this package: in any folder, and without a
    package index that has this package. A comment of the shell names the extra."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        stated = metadata.requires("hf_genlm") or []
    except metadata.PackageNotFoundError:  # it runs from a folder
        return f"pip install '.[{extra}]'"
    needed = []
    for library in map(Requirement, stated):
        marker, names = library.marker, ",".join(library.extras)
        if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            needed.append(f"{library.name}{f'[{names}]' if names else ''}{library.specifier}")
    return f"{shlex.join(['pip', 'install', *needed])}  # the extra [{extra}]"


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the warnings of torch, transformers and their like, and the bars of transformers, in the block.

    An import of transformers imports torchao, which prints a line for each of its programs that does not fit
    this machine. A logger whose level a person has set, as by TRANSFORMERS_VERBOSITY=info, keeps it.
    """
    by_default = (logging.NOTSET, logging.WARNING)
    levels = {each: each.level for each in map(logging.getLogger, _LIBRARIES) if each.level in by_default}
    transformers = sys.modules.get("transformers.utils.logging")
    bars = transformers if transformers and transformers.is_progress_bar_enabled() else None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="|".join(_LIBRARIES))
            for logger in levels:
                logger.setLevel(logging.ERROR)
            if bars:
                bars.disable_progress_bar()
            yield
    finally:
        if bars:
            bars.enable_progress_bar()
        for logger, level in levels.items():
            if logger.level == logging.ERROR:  # an import in the block may have set its own level
                logger.setLevel(level)
