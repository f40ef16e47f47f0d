"""What a person can mend or has asked for; everything else that is raised is a fault of ours."""

import difflib
import os
import re
from collections.abc import Iterable

# regular expressions of access tokens and keys: hidden in messages, scrubbed from text, refused in a push
HUB = r"(?<!\w)hf_[A-Za-z0-9]{20,}"
GITHUB_FINE_GRAINED = r"(?<!\w)github_pat_[A-Za-z0-9_]{22,}"
GOOGLE = r"(?<!\w)AIza[A-Za-z0-9_-]{35}"
BEGIN_OF_PRIVATE_KEY = r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
END_OF_PRIVATE_KEY = BEGIN_OF_PRIVATE_KEY.replace("BEGIN", "END")

# an access token of the Hub; a login in front of the host of an address
_SECRETS = (re.compile(HUB), re.compile(r"(?<=://)[^/\s@'\"]+(?=@)"))
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_LEAST_SECRET = 8  # characters of a variable's value: a shorter one would be found in any text


class UserError(ValueError):
    """Input that cannot be used. The message is one line: the value, the rule, the remedy.

    The command line prints it and exits 2, without a traceback. Access tokens in it are blotted out, and
    what is no printable character, as a line end, is written as its escape.
    """

    def __init__(self, message: str):
        super().__init__(_printable(without_secrets(message)))


class NoSource(UserError):
    """There is nothing at `word`, where text was to be read."""

    def __init__(self, word: str, message: str):
        super().__init__(message)
        self.word = word


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def without_secrets(text: str) -> str:
    """`text` with `***` for every access token of the Hub and every login in an address."""
    for pattern in _SECRETS:
        text = pattern.sub("***", text)
    for name in _TOKEN_VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= _LEAST_SECRET:
            text = text.replace(value, "***")
    return text


class Stopped(KeyboardInterrupt):
    """A run that Ctrl-C or SIGTERM ended, whole on disk: `--resume` goes on with it.

    `folder` is its run folder, `step` the last step of its checkpoint (None: it had none yet).
    """

    def __init__(self, folder: str, step: int | None):
        super().__init__(folder, step)
        self.folder, self.step = folder, step


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'lstm'?` for a near word of `known`, otherwise the whole list of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}"
