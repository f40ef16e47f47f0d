"""Ctrl-C and SIGTERM: the end of a run that loses nothing."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from hf_genlm.errors import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Within `heard`, a signal raises `Stopped` for the run in `folder`; within `deferred`, it is noted in
    `is_made`, and only a second one raises.

    Python gives signals to the main thread alone: called from another one, nothing is heard.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.is_made = False
        self._is_deferred = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Take the signals, and give them back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = [signal.signal(number, self._hear) for number in _SIGNALS]
        try:
            yield
        finally:
            for number, handler in zip(_SIGNALS, before, strict=True):
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """For what ends by itself soon after `is_made`."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.is_made or not self._is_deferred:
            raise Stopped(self.folder, None)
        self.is_made = True
