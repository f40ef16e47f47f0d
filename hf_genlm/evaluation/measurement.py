"""A measurement: a number with its unit, count, standard error and better direction; and statistical errors.

Sources: Cochran, Sampling Techniques, 3rd ed., 1977, ch. 6 (ratios over clusters); Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, ch. 6 and 13 (percentile intervals) and ch. 11 (jackknife).
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_genlm.files import parse, read, write_json
from hf_genlm.run_schemas import MeasurementRecord, MeasurementsFile

NUM_RESAMPLES = 2000
CONFIDENCE_LEVEL = 0.95
MIN_CASES = 5  # independent values from which on an interval is estimated from their spread
_HEAD = ("measurement", "value", "std. error", "95 % interval", "unit", "n", "split")
# measurements NAME/CODE of which only languages have one
_OF_LANGUAGES = {"bits_per_byte", "bits_per_sentence", "bytes_per_token", "tokens_per_sentence"}
AT_MILESTONE = "@"  # between the name of a measurement and that of a milestone
STORED = "stored_ngrams"  # STORED/N: in a model's tables of counts, of up to N tokens


@dataclass(frozen=True)
class Measurement:
    """One measured number.

    `n` counts what the value is an average over, in the denominator of `unit` (tokens for "nats/token").
    `stderr` is the standard error of `value` in the same unit, `interval` its 95 % confidence interval; both
    are None if unknown.
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
        """Convert to JSON types. JSON has no infinity: a number that is not finite becomes None, and an
        interval with such an end is left out, as is one that is None."""
        content = asdict(self)
        for key in ("value", "stderr"):
            if content[key] is not None and not math.isfinite(content[key]):
                content[key] = None
        ends = content.pop("interval")
        return content if ends is None or not np.isfinite(ends).all() else {**content, "interval": list(ends)}

    @classmethod
    def from_json(cls, content: Any) -> "Measurement":
        """Make a measurement of what `to_json` returns; a value of None becomes NaN.

        Raises:
            UserError: a field is missing, unknown or of another type.
        """
        return cls._of(parse(json.dumps(content), MeasurementRecord, "a measurement"))

    @classmethod
    def _of(cls, record: MeasurementRecord) -> "Measurement":
        fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        return cls(**{**fields, "value": math.nan if record.value is None else record.value})


def figures(number: float | None, stderr: float | None = None) -> str:
    """Write `number` to the second digit of its standard error, or to four digits without one."""
    if number is None or not math.isfinite(number):
        return "unknown"
    scale = abs(stderr) if stderr and math.isfinite(stderr) else abs(number) / 100
    if not scale:
        return "0"
    decimals = 1 - math.floor(math.log10(scale))
    if not -12 < decimals < 9:
        return f"{number:.3g}"
    return f"{round(number, decimals) + 0.0:,.{max(0, decimals)}f}"


def tabulate(measurements: Sequence[Measurement]) -> list[tuple[list[str], list[list[str]]]]:
    """Tables of measurements for people: (head, rows of cells) each, without empty columns.

    The first has a row for each measurement; then one has a row for each language, and one for each
    milestone. Measurements of a milestone on a part of a text or suite are left out.
    """
    names = (m.name.partition("/") for m in measurements)
    languages = {code for name, _, code in names if code and name in _OF_LANGUAGES}
    rows: list[list[str]] = []
    by_part: dict[str, dict[str, dict[str, str]]] = {"language": {}, "milestone": {}}
    for m in measurements:
        whole, _, milestone = m.name.partition(AT_MILESTONE)
        name, _, part = whole.partition("/")
        value, error = figures(m.value, m.stderr), m.stderr is not None and figures(m.stderr, m.stderr)
        if milestone or part in languages:
            if not (milestone and part):
                row = by_part["milestone" if milestone else "language"].setdefault(milestone or part, {})
                row[name] = f"{value} ± {error}" if error else value
        else:
            ends = ", ".join(figures(end, m.stderr) for end in m.interval or ())
            shown = (f"± {error}" if error else "", f"[{ends}]" if ends else "")
            rows.append([m.name, value, *shown, m.unit, f"{m.n:,}", m.split])
    used = [i for i in range(len(_HEAD)) if any(row[i] for row in rows)]
    tables = [([_HEAD[i] for i in used], [[row[i] for i in used] for row in rows])] if rows else []
    for kind, parts in by_part.items():
        columns = list(dict.fromkeys(column for cells in parts.values() for column in cells))
        body = [[part, *(cells.get(column, "") for column in columns)] for part, cells in parts.items()]
        tables += [([kind, *columns], body)] if body else []
    return tables


def write_measurements(path: str | Path, measurements: Iterable[Measurement]) -> None:
    """Write `{"measurements": [...]}`."""
    write_json(path, {"measurements": [measurement.to_json() for measurement in measurements]})


def read_measurements(path: str | Path) -> list[Measurement]:
    """Read a file of `write_measurements`.

    Raises:
        UserError: the file is missing or damaged.
    """
    return [Measurement._of(record) for record in read(path, MeasurementsFile).measurements]


def update_measurements(path: str | Path, measurements: Iterable[Measurement]) -> None:
    """Merge `measurements` into a file: those with the same name and split are replaced.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(path)
    present = read_measurements(path) if path.is_file() else []
    write_measurements(path, {(m.name, m.split): m for m in [*present, *measurements]}.values())


class Statistic(NamedTuple):
    """A value over `n` items without a name and unit yet; `stderr` is None if unknown."""

    value: float
    n: int
    stderr: float | None


def mean_statistic(values: np.ndarray) -> Statistic:
    """Mean of independent `values` (M,), M > 0."""
    stderr = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Statistic(float(values.mean()), len(values), stderr)


def to_results(statistics: Mapping[str, Statistic | None]) -> dict[str, float | None]:
    """Convert to `NAME` and `NAME_stderr`, as metrics of the library evaluate return them."""
    values = {name: None if found is None else found.value for name, found in statistics.items()}
    errors = {f"{name}_stderr": None if found is None else found.stderr for name, found in statistics.items()}
    return values | errors


def ratio_stderr(numerators: Iterable[float], denominators: Iterable[float]) -> float | None:
    """Standard error of R = sum(y) / sum(x) over n clusters i with totals y_i and x_i.

    By linearization (the delta method), without finite-population correction (Cochran, ch. 6):
    sqrt(n / (n - 1) * sum_i (y_i - R x_i)^2) / sum(x). Clusters may differ in size, and the items within a
    cluster may depend on each other.

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


def jackknife_stderr(leave_one_out: np.ndarray) -> float:
    """Jackknife standard error of a statistic from its values (M,) without each of M > 1 clusters.

    sqrt((M - 1) / M * sum_i (t_i - mean t)^2) (Efron and Tibshirani, ch. 11).
    """
    m = len(leave_one_out)
    return float(np.sqrt((m - 1) / m * np.square(leave_one_out - leave_one_out.mean()).sum()))


def bootstrap_sums(
    sums_NK: np.ndarray, num_resamples: int = NUM_RESAMPLES, seed: int = 0, max_draws: int = 1 << 22
) -> np.ndarray:
    """Column sums of N clusters drawn with replacement out of N.

    All K columns of a resample have the same clusters, so the ratio of two columns is a resampled ratio. The
    same `seed` and N always draw the same clusters. (scipy.stats.bootstrap resamples one statistic at a time
    and holds all draws in memory.)

    Args:
        sums_NK: totals of each cluster.
        max_draws: clusters drawn at once, 8 bytes each. Changes no result beyond the rounding of float64.

    Returns:
        (num_resamples, K) float64.
    """
    sums_NK = np.asarray(sums_NK, dtype=np.float64)
    n = len(sums_NK)
    generator = np.random.default_rng(seed)
    rows_at_once = max(1, max_draws // n)
    resampled = []
    for first in range(0, num_resamples, rows_at_once):
        rows = min(rows_at_once, num_resamples - first)
        drawn = generator.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        counts_RN = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        resampled.append(counts_RN @ sums_NK)
    return np.concatenate(resampled)


def percentile_interval(values_R: np.ndarray, n_cases: int) -> tuple[float, float] | None:
    """The middle 95 % of values (R,) resampled from `n_cases` cases; None for fewer than `MIN_CASES`."""
    if n_cases < MIN_CASES:
        return None
    low, high = np.quantile(values_R, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return float(low), float(high)
