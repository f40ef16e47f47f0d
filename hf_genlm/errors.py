"""The one error that is the person's to mend; everything else that is raised is a fault of ours."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input that cannot be used. The message is one line: the value, the rule, the remedy.

    The command line prints it and exits 2, without a traceback.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'lstm'?` for a near word of `known`, otherwise the whole list of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}"
