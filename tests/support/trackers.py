"""Helpers shared by tests: trackers."""

from pathlib import Path


def scalars_of(folder: Path) -> dict[str, dict[int, float]]:
    """Read the scalars that TensorBoard shows of a folder: name -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: {e.step: e.value for e in found.Scalars(name)} for name in found.Tags()["scalars"]}
