"""The clock and the steps that end a run, and the learning rate schedule that follows from them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hf_genlm.training.processes import broadcast_time, count


@dataclass
class Budget:
    """The clock of a run, and the share of the run that is done: that of the steps or, with `seconds`, that
    of the time, whichever is larger."""

    steps: int = 10**9
    seconds: float | None = None
    spent_s: float = 0.0  # before `start`, by the part of the run that is resumed
    clock: Callable[[], float] = field(default=lambda: time.monotonic(), repr=False)  # in seconds
    _started: float | None = field(default=None, repr=False)
    _last_step_s: float = field(default=0.0, repr=False)
    _last_time: float = field(default=0.0, repr=False)
    _agreed: float | None = field(default=None, repr=False)  # time that all processes last agreed on

    def start(self) -> None:
        """Start the clock, which is monotonic."""
        self.agree()
        self._last_time = self._now()
        self._started = self._last_time - self.spent_s

    def agree(self) -> None:
        """Read the clock of the first process in all processes, which must call this together. Until the next
        call the clock stands still, so that all processes decide alike."""
        if count() > 1:
            self._agreed = broadcast_time(self.clock())

    def note_step(self) -> None:
        """Record the time of a step that has ended."""
        now = self._now()
        self._last_step_s, self._last_time = now - self._last_time, now

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, validation and saving included."""
        return self.spent_s if self._started is None else self._now() - self._started

    def _now(self) -> float:
        return self.clock() if self._agreed is None else self._agreed

    def progress(self, step: float) -> float:
        """Share of the run that is done after `step` steps, from 0 to 1."""
        by_clock = 0.0 if self.seconds is None else self.elapsed_s / self.seconds
        return min(1.0, max(by_clock, step / self.steps))

    def is_spent(self, step: int) -> bool:
        """True if stopping now lands nearer the budget than one more step."""
        if self.seconds is None or step >= self.steps:
            return step >= self.steps
        return self.elapsed_s + self._last_step_s / 2 >= self.seconds

    def left_s(self, step: int) -> float:
        """Seconds to the end, by the time limit or at the speed so far."""
        done = step / self.steps
        by_pace = self.elapsed_s * (1 - done) / done if done else math.inf
        by_clock = math.inf if self.seconds is None else self.seconds - self.elapsed_s
        return max(0.0, min(by_pace, by_clock))


def trapezoid(
    progress: float, warmup: float, decay: float, step: float = 0.0, warmup_steps: int | None = None
) -> float:
    """Learning rate relative to its peak, at a `progress` from 0 to 1: linear up over the first `warmup`,
    flat, linear down to 0 over the last `decay` (Hägele et al., 2024, arXiv:2405.18392). The way up takes
    `warmup_steps` at least; `step` counts them."""
    up = progress / warmup if warmup > 0 else 1.0
    up = min(up, step / warmup_steps) if warmup_steps else up
    down = (1.0 - progress) / decay if decay > 0 else 1.0
    return max(0.0, min(1.0, up, down))
