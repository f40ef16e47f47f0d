"""What a person can mend or has asked for; everything else that is raised is a fault of ours."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input that cannot be used. The message is one line: the value, the rule, the remedy.

    The command line prints it and exits 2, without a traceback.
    """


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
