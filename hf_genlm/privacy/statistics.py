"""Statistics of the attacks: 95 % intervals, ROC curves, and lower bounds on epsilon.

A lower bound on epsilon says how much privacy a training cannot have given. `one_run_bound` needs one
training with canaries that were each put in or left out by a fair coin. The canaries of a single run are not
independent, so that bounds for many independent trainings do not hold for them.
"""

import math
from collections.abc import Sequence

import numpy as np

from hf_genlm.evaluation.measurement import MIN_CASES

COVERAGE = 0.95
MAX_EPSILON = 100.0
_MIN_CANARIES_FOR_SHARES = 100  # with so many canaries, guesses about a share of them are made as well
_SHARES = (0.5, 0.2)
_NUM_BISECTIONS = 40


def clopper_pearson(hits: int, n: int, coverage: float = COVERAGE) -> tuple[float, float]:
    """The exact interval of a share of `hits` in `n` independent trials (Clopper and Pearson, 1934)."""
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(coverage, method="exact")
    return float(interval.low), float(interval.high)


def mean_interval(values: np.ndarray, high: float) -> tuple[float, float | None, tuple[float, float] | None]:
    """Mean of (n,) values from 0 to `high`, its standard error, and its interval by Student's t.

    The error is None if n = 1, the interval for fewer than `MIN_CASES`, as their spread does not give one.
    """
    from scipy.stats import sem, t

    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    stderr = float(sem(values))
    reach = float(t.ppf((1 + COVERAGE) / 2, len(values) - 1)) * stderr
    ends = max(0.0, mean - reach), min(high, mean + reach)
    return mean, stderr, ends if len(values) >= MIN_CASES else None


def auc(members: np.ndarray, others: np.ndarray) -> tuple[float, float, tuple[float, float] | None]:
    """P(a member scores higher than a non-member) + P(equal) / 2, its standard error, and its interval.

    The error is that of DeLong, DeLong and Clarke-Pearson (Biometrics 1988). It is 0 if all pairs agree; the
    interval is then the exact one of as many independent pairs as the smaller group has passages. Otherwise
    it is None if that group has fewer than `MIN_CASES`.

    Args:
        members, others: scores (n,) and (m,), n and m at least 2.
    """
    from scipy.stats import norm

    members, others = (np.asarray(scores, dtype=np.float64) for scores in (members, others))
    below, above = _share_below(members, others), 1 - _share_below(others, members)
    area = float(below.mean())
    stderr = float(np.sqrt(below.var(ddof=1) / len(members) + above.var(ddof=1) / len(others)))
    if stderr == 0.0 and area in (0.0, 1.0):
        n = min(len(members), len(others))
        return area, stderr, clopper_pearson(round(area * n), n)
    reach = float(norm.ppf((1 + COVERAGE) / 2)) * stderr
    is_known = min(len(members), len(others)) >= MIN_CASES
    return area, stderr, (max(0.0, area - reach), min(1.0, area + reach)) if is_known else None


def _share_below(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of `others` below each score (n,); equal ones count half."""
    ordered = np.sort(others)
    left, right = (np.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    return (left + right) / (2 * len(others))


def roc(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(false, true positive rates) of every threshold `score >= t`, from (0, 0) to (1, 1)."""
    thresholds = np.unique(np.concatenate([members, others]))[::-1]
    rates = [
        1 - np.searchsorted(np.sort(scores), thresholds, side="left") / len(scores)
        for scores in (others, members)
    ]
    return np.concatenate([[0.0], rates[0]]), np.concatenate([[0.0], rates[1]])


def count_hits_at(members: np.ndarray, others: np.ndarray, rate: float) -> int:
    """Count the members that score higher than all but the share `rate` of the non-members."""
    num_allowed = int(rate * len(others) + 1e-9)
    threshold = np.sort(others)[::-1][num_allowed]
    return int((np.asarray(members) > threshold).sum())


def p_value_of_guesses(n: int, num_guesses: int, num_correct: int, epsilon: float, delta: float) -> float:
    """An upper bound on P(at least `num_correct` of `num_guesses` are right) under (epsilon, delta)-privacy.

    n canaries were each put in or left out by a fair coin; the guesses use only what the training gave, and
    abstain from the other canaries. With W ~ Binomial(num_guesses, e^eps / (1 + e^eps)) the bound is
    P[W >= v] + 2 n delta max_i P[v - i <= W < v] / i over i = 1 .. v. Source: Steinke, Nasr and Jagielski,
    Privacy auditing with one (1) training run, NeurIPS 2023, theorem 5.2 (counts m, r, v).
    """
    from scipy.stats import binom

    assert 0 <= num_correct <= num_guesses <= n
    accuracy = 1 / (1 + math.exp(-epsilon))
    p = float(binom.sf(num_correct - 1, num_guesses, accuracy))
    if delta and num_correct:
        below = binom.pmf(np.arange(num_correct - 1, -1, -1), num_guesses, accuracy)
        p += 2 * n * delta * float((np.cumsum(below) / np.arange(1, num_correct + 1)).max())
    return min(p, 1.0)


def one_run_bound(
    scores: Sequence[float] | np.ndarray,
    is_in: Sequence[bool] | np.ndarray,
    delta: float,
    repetitions: int = 1,
) -> float:
    """The largest epsilon that is refuted at a confidence of 95 %; 0 if none is.

    One guess per canary: it was put in if its score lies above `otsu_threshold`. With at least 100 canaries,
    also guesses about the outer shares of the scores alone, each family at its part of the error
    (Bonferroni). No guess depends on the coins.

    Args:
        scores: (n,), high if the training seems to have seen a canary.
        is_in: (n,), the coins.
        delta: of the guarantee that is tested.
        repetitions: copies of a canary that was put in. The bound is on the epsilon of one copy: k copies
            are private by k epsilon and delta (e^(k epsilon) - 1) / (e^epsilon - 1) (group privacy).
    """
    scores_C, coins_C = np.asarray(scores, dtype=np.float64), np.asarray(is_in, dtype=bool)
    n, order = len(coins_C), np.argsort(scores_C, kind="stable")
    guesses = [(order, scores_C[order] > otsu_threshold(scores_C))]
    for share in _SHARES if n >= _MIN_CANARIES_FOR_SHARES else ():
        num_each = int(share * n / 2)
        outer = np.concatenate([order[:num_each], order[len(order) - num_each :]])
        guesses.append((outer, np.arange(2 * num_each) >= num_each))
    error = (1 - COVERAGE) / len(guesses)
    return max(
        _largest_refuted(n, len(which), int((coins_C[which] == guess).sum()), delta, repetitions, error)
        for which, guess in guesses
    )


def otsu_threshold(scores: np.ndarray) -> float:
    """The threshold of scores (n,) with the least variance on its two sides (Otsu, 1979); the highest score
    if all are equal."""
    ordered = np.sort(scores)
    n = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)
    between = n * (len(ordered) - n) * (sums[:-1] / n - (sums[-1] - sums[:-1]) / (len(ordered) - n)) ** 2
    if not len(between) or not between.max() > 0:
        return float(ordered[-1])
    split = int(between.argmax())
    return float((ordered[split] + ordered[split + 1]) / 2)


def _largest_refuted(
    n: int, num_guesses: int, num_correct: int, delta: float, repetitions: int, error: float
) -> float:
    """The largest epsilon of one copy whose p-value is at most `error`, by bisection from below."""

    def p_value(epsilon: float) -> float:
        exponent = repetitions * epsilon
        if epsilon == 0:
            growth = float(repetitions)
        else:  # the sum of e^(i epsilon) over i < repetitions
            growth = math.expm1(exponent) / math.expm1(epsilon) if exponent < 700 else math.inf
        return p_value_of_guesses(n, num_guesses, num_correct, exponent, min(1.0, delta * growth))

    low, high = 0.0, MAX_EPSILON
    if p_value(low) > error:
        return 0.0
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle) <= error else (low, middle)
    return low
