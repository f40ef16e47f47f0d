"""Errors that a person can fix or has asked for. Any other exception is a fault of this package."""

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable

# regular expressions of access tokens and keys: hidden in messages, scrubbed from text, refused in a push
HUB = r"(?<!\w)hf_[A-Za-z0-9]{20,}"
GITHUB_FINE_GRAINED = r"(?<!\w)github_pat_[A-Za-z0-9_]{22,}"
GOOGLE = r"(?<!\w)AIza[A-Za-z0-9_-]{35}"
BEGIN_OF_PRIVATE_KEY = r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
END_OF_PRIVATE_KEY = BEGIN_OF_PRIVATE_KEY.replace("BEGIN", "END")

# access tokens of the Hub; logins before the host of an address
_SECRETS = (re.compile(HUB), re.compile(r"(?<=://)[^/\s@'\"]+(?=@)"))
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """End of a message: `; did you mean 'lstm'?` if one of `known` is similar, else a list of all."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}"
