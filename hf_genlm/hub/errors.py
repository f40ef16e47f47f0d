"""What went wrong with a request to the Hub, in words that say what to do."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator

from hf_genlm.errors import UserError, without_secrets

_DEFAULT_WAIT_S = 10  # where the Hub asks to wait and does not say how long
# by the status of the answer
REMEDIES = {
    401: "the Hub does not know the access token: `hf auth login` with one that may write",
    403: "the access token may not write there: `hf auth login` with one that may",
    404: "it is not there, or the access token may not see it: check OWNER/NAME, and `hf auth login`",
    409: "somebody else changed it at the same time",
    412: "somebody else changed it at the same time",
    413: "it is more than the Hub takes at once",
    429: "the Hub takes no more requests for now",
}
_SERVER_REMEDY = "the Hub has trouble of its own"
NETWORK_REMEDY = "the connection failed"
_ADDRESS = re.compile(r"\S+://\S+")


class PushFailed(UserError):
    """What the same push gets over, once its reason is gone."""


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def status_of(error: BaseException) -> int | None:
    """Of the answer that led to it, if any."""
    statuses = (getattr(getattr(cause, "response", None), "status_code", None) for cause in _chain(error))
    return next((status for status in statuses if status is not None), None)


def reason_of(error: BaseException, status: int | None) -> str | None:
    """In words; None: a fault of ours. What uploads large files raises a RuntimeError."""
    from huggingface_hub.errors import HTTPError

    if status is not None:
        said = " ".join(str(error).split())[:300]
        remedy = REMEDIES.get(status, _SERVER_REMEDY if status >= 500 else said)
        return f"{remedy} (HTTP status {status})"
    if isinstance(error, PermissionError) and type(error).__module__ == "hf_xet":
        return REMEDIES[401]
    if any(isinstance(c, (HTTPError, ConnectionError, TimeoutError, RuntimeError)) for c in _chain(error)):
        return f"{NETWORK_REMEDY} ({without_secrets(' '.join(str(error).split()))[:200]})"
    return None


def wait_asked(error: BaseException) -> float:
    """Seconds that the answer names, as its Retry-After does."""
    responses = [response for cause in _chain(error) if (response := getattr(cause, "response", None))]
    asked = responses[0].headers.get("Retry-After", "") if responses else ""
    return float(asked) if asked.isdecimal() else _DEFAULT_WAIT_S


@contextlib.contextmanager
def telling_retries(note: Callable[[str], None]) -> Iterator[None]:
    """Tell `note` what huggingface_hub tries again, without addresses: those of large files are signed."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    handler = logging.Handler()
    handler.emit = lambda record: note(_ADDRESS.sub("the Hub", record.getMessage()))  # type: ignore[method-assign]
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
