"""A measurement: a number that knows its unit, its count, its standard error and its better direction."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.files import write_json


@dataclass(frozen=True)
class Measurement:
    """One measured number.

    `n` counts what the value is an average over, in the denominator of `unit` (tokens for "nats/token").
    `stderr` is the standard error of `value` in the same unit, `interval` the two ends of its 95 % interval;
    None where they cannot be known.
    """

    name: str
    value: float
    unit: str
    n: int
    stderr: float | None
    split: str
    higher_is_better: bool
    interval: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields by name, `interval` only where there is one. JSON has no infinity: a number that is not
        finite becomes None, and an interval with such an end is left out."""
        content = asdict(self)
        for key in ("value", "stderr"):
            if content[key] is not None and not math.isfinite(content[key]):
                content[key] = None
        ends = content.pop("interval")
        return content if ends is None or not np.isfinite(ends).all() else {**content, "interval": list(ends)}

    @classmethod
    def from_json(cls, content: Any) -> "Measurement":
        """The inverse of `to_json`; a value of None is read as nan, and an interval may be missing.

        Raises:
            UserError: a field is missing, unknown or of another type.
        """
        names = {field.name for field in fields(cls)} - {"interval"}
        if not isinstance(content, dict) or set(content) - {"interval"} != names:
            raise UserError(
                f"a measurement holds exactly {', '.join(sorted(names))}, and may hold an interval, "
                f"not {content!r}"
            )
        try:
            return cls(
                name=_of_type(str, content["name"]),
                value=math.nan if content["value"] is None else float(content["value"]),
                unit=_of_type(str, content["unit"]),
                n=_of_type(int, content["n"]),
                stderr=None if content["stderr"] is None else float(content["stderr"]),
                split=_of_type(str, content["split"]),
                higher_is_better=_of_type(bool, content["higher_is_better"]),
                interval=_ends_of(content.get("interval")),
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"{content!r} is not a measurement: {error}") from error


def write_measurements(path: str | Path, measurements: Iterable[Measurement]) -> None:
    """Write `{"measurements": [...]}`."""
    write_json(path, {"measurements": [measurement.to_json() for measurement in measurements]})


def read_measurements(path: str | Path) -> list[Measurement]:
    """The measurements of a file that `write_measurements` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{str(path)!r} is damaged: {error}") from error
    listed = content.get("measurements") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise UserError(f"{str(path)!r} is damaged: it must hold a list under 'measurements'")
    try:
        return [Measurement.from_json(item) for item in listed]
    except UserError as error:
        raise UserError(f"{str(path)!r} is damaged: {error}") from error


def update_measurements(path: str | Path, measurements: Iterable[Measurement]) -> None:
    """Write `measurements` to a file, in place of those of the same name and split; its others stay.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(path)
    kept = read_measurements(path) if path.is_file() else []
    write_measurements(path, {(m.name, m.split): m for m in [*kept, *measurements]}.values())


def ratio_stderr(numerators: Iterable[float], denominators: Iterable[float]) -> float | None:
    """Standard error of R = sum(y) / sum(x) over n clusters i with totals y_i and x_i.

    By linearisation (the delta method), with no correction for a finite population:
    sqrt(n / (n - 1) * sum_i (y_i - R x_i)^2) / sum(x). Source: Cochran, Sampling Techniques, 3rd ed., 1977,
    ch. 6. Clusters may differ in size; what goes on inside a cluster needs no independence.

    Returns:
        The standard error in the unit of R; None for fewer than two clusters.
    """
    y = np.asarray(list(numerators), dtype=np.float64)
    x = np.asarray(list(denominators), dtype=np.float64)
    assert y.shape == x.shape, f"{len(y)} numerators for {len(x)} denominators"
    if len(x) < 2:
        return None
    residuals = y - (y.sum() / x.sum()) * x
    return float(np.sqrt(len(x) / (len(x) - 1) * np.square(residuals).sum()) / x.sum())


def _ends_of(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = _of_type(list, value)
    return float(low), float(high)


def _of_type(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} should be of type {kind.__name__}")
    return value
