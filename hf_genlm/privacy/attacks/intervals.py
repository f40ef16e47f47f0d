"""Shares and areas with their 95 % intervals, exact where they can be."""

import numpy as np

COVERAGE = 0.95


def clopper_pearson(hits: int, n: int, coverage: float = COVERAGE) -> tuple[float, float]:
    """The exact interval of a share of `hits` in `n` independent trials.

    Source: Clopper and Pearson, The use of confidence or fiducial limits illustrated in the case of the
    binomial, Biometrika 1934.
    """
    from scipy.stats import beta

    tail = (1 - coverage) / 2
    low = beta.ppf(tail, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(1 - tail, hits + 1, n - hits) if hits < n else 1.0
    return float(low), float(high)


def mean_interval(values: np.ndarray) -> tuple[float, float | None, tuple[float, float] | None]:
    """Mean (n,), its standard error, and its interval by Student's t; None of a single value."""
    from scipy.stats import t

    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    stderr = float(values.std(ddof=1) / np.sqrt(len(values)))
    reach = float(t.ppf((1 + COVERAGE) / 2, len(values) - 1)) * stderr
    return mean, stderr, (mean - reach, mean + reach)


def auc(members: np.ndarray, others: np.ndarray) -> tuple[float, float, tuple[float, float]]:
    """P(a member scores higher than another) + P(as high) / 2, its standard error, and its interval.

    The error is that of DeLong, DeLong and Clarke-Pearson (Biometrics 1988), from the share of others below
    each member and the share of members above each other. Where all pairs agree it is 0, and the interval is
    the exact one of as many pairs without a common text: of the smaller group.

    Args:
        members, others: scores (n,) and (m,), n and m at least 2.
    """
    from scipy.stats import norm

    members, others = (np.asarray(scores, dtype=np.float64) for scores in (members, others))
    below, above = _shares_below(members, others), 1 - _shares_below(others, members)
    area = float(below.mean())
    stderr = float(np.sqrt(below.var(ddof=1) / len(members) + above.var(ddof=1) / len(others)))
    if stderr == 0.0 and area in (0.0, 1.0):
        n = min(len(members), len(others))
        return area, stderr, clopper_pearson(round(area * n), n)
    reach = float(norm.ppf((1 + COVERAGE) / 2)) * stderr
    return area, stderr, (max(0.0, area - reach), min(1.0, area + reach))


def roc(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(false positive rates, true positive rates) of every threshold `score >= t`, from (0, 0) to (1, 1)."""
    thresholds = np.unique(np.concatenate([members, others]))[::-1]
    rates = [
        1 - np.searchsorted(np.sort(scores), thresholds, side="left") / len(scores)
        for scores in (others, members)
    ]
    return np.concatenate([[0.0], rates[0]]), np.concatenate([[0.0], rates[1]])


def hits_at(members: np.ndarray, others: np.ndarray, rate: float) -> int:
    """How many members score higher than all but the share `rate` of the others."""
    n_allowed = int(rate * len(others) + 1e-9)
    threshold = np.sort(others)[::-1][n_allowed]
    return int((np.asarray(members) > threshold).sum())


def _shares_below(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of `others` below each score (n,), as high counting half."""
    ordered = np.sort(others)
    left, right = (np.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    return (left + right) / (2 * len(others))
