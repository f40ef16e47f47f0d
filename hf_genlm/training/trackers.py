"""Trackers of `training.report_to`, on this machine alone: they receive what is written to log.jsonl.

Trainer's own integrations would receive only what Trainer logs: neither tokens and seconds, nor the
validations, nor the figures of the finished model.
"""

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from hf_genlm.config.recipe import Recipe
from hf_genlm.errors import UserError, did_you_mean, install_command
from hf_genlm.run_folder import Listener, RunFolder
from hf_genlm.training.processes import is_first

_PREFIXES = {"step": "train", "validation": "validation"}
_FLUSH_S = 10
# variables by which trackio sends to a Space, a server, a data set, a bucket or a webhook
_SENDING = re.compile(r"TRACKIO_\w*(SPACE|SERVER|DATASET|BUCKET|WEBHOOK|TOKEN|URL)")
_NO_CURVE = {"step", "steps", "partial", "progress", "left_s"}


class Tracker(Protocol):
    """Interface of a tracker: it receives the events of a run."""

    def rewind(self, step: int) -> None:
        """Discard the steps after `step`, which are trained again."""

    def add(self, step: int, numbers: dict[str, float], text: str | None) -> None:
        """Add points to curves, and a text that the model generated."""

    def close(self) -> None:
        """Write what is buffered; no event follows."""


class TensorBoard:
    """Event files in tensorboard/ of the run folder; steps that a run repeats are hidden in its curves."""

    def __init__(self, run: RunFolder, recipe: Recipe, is_resuming: bool):
        self._folder = str(run.tensorboard)
        self._writer = self._open()
        self._writer.add_text("recipe", f"```yaml\n{recipe.to_yaml()}```", 0)

    def _open(self, **options: Any) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder, flush_secs=_FLUSH_S, **options)

    def rewind(self, step: int) -> None:
        """See `Tracker`."""
        self._writer.close()
        self._writer = self._open(purge_step=step + 1)

    def add(self, step: int, numbers: dict[str, float], text: str | None) -> None:
        """See `Tracker`."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        if text is not None:
            self._writer.add_text("sample", f"```text\n{text}\n```", step)

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class Trackio:
    """A run of the project `hf_genlm` in trackio's store on this machine, named as the run folder."""

    def __init__(self, run: RunFolder, recipe: Recipe, is_resuming: bool):
        import trackio

        self._trackio = trackio
        with contextlib.redirect_stdout(io.StringIO()):  # only the command line prints
            self._run = trackio.init(
                project="hf_genlm",
                name=run.path.resolve().name,
                config=recipe.model_dump(),
                resume="allow" if is_resuming else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def rewind(self, step: int) -> None:
        """Do nothing: trackio keeps everything, and the curves have the repeated steps twice."""

    def add(self, step: int, numbers: dict[str, float], text: str | None) -> None:
        """See `Tracker`."""
        words = {} if text is None else {"sample": text}
        self._run.log({**numbers, **words}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


TRACKERS: dict[str, Callable[[RunFolder, Recipe, bool], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """
    Raises:
        UserError: an unknown tracker, one that is not installed, or one that the environment tells to send.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"unknown training.report_to {name!r}{did_you_mean(name, TRACKERS)}")
        if find_spec(name) is None:
            raise UserError(
                f"training.report_to = {name} needs {name}, which is not installed: "
                + install_command("track")
            )
        sending = [variable for variable in sorted(os.environ) if _SENDING.match(variable)]
        if name == "trackio" and sending:
            raise UserError(
                f"training.report_to = trackio keeps a run on this machine, and {sending[0]} sends it to a "
                f"server: unset {', '.join(sending)}"
            )


@contextlib.contextmanager
def tracking(run: RunFolder, recipe: Recipe, is_resuming: bool) -> Iterator[None]:
    """Send what `run` logs meanwhile to the trackers of the recipe."""
    names = recipe.training.report_to if is_first() else []
    trackers = [TRACKERS[name](run, recipe, is_resuming) for name in names]
    run.followers = [_follower(tracker) for tracker in trackers]
    try:
        yield
    finally:
        run.followers = []
        for tracker in trackers:
            tracker.close()


def _follower(tracker: Tracker) -> Listener:
    reached = 0  # the step of events that name none

    def follow(event: str, fields: dict[str, Any]) -> None:
        nonlocal reached
        if event in ("resumed", "diverged"):
            tracker.rewind(fields.get("back_to", fields["step"]))
        reached = fields.get("step", reached)
        numbers = curve_points(event, fields)
        text = fields["text"] if event == "sample" else None
        if numbers or text is not None:
            tracker.add(reached, numbers, text)

    return follow


def curve_points(event: str, fields: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of an event that make curves, by names such as `train/loss`."""
    if event == "evaluated":
        return {f"final/{measured['name']}": measured["value"] for measured in fields["measurements"]}
    if event not in _PREFIXES:
        return {}
    return {
        f"{_PREFIXES[event]}/{name}": value
        for name, value in fields.items()
        if value is not None and name not in _NO_CURVE
    }
