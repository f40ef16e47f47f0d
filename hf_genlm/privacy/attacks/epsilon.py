"""Lower bounds on epsilon: how much privacy a training cannot have given, by what was guessed of it.

One training is enough where many canaries were each put in or left out by a coin of its own (`one_run_bound`,
what `hf-genlm audit` uses). `many_runs_bound` is for independent trainings with and without one example; the
canaries of a single run are not independent, and it does not hold for them.
"""

import math
from collections.abc import Sequence

import numpy as np

from hf_genlm.privacy.attacks.intervals import clopper_pearson

CONFIDENCE = 0.95
MOST_EPSILON = 100.0
_MANY = 100  # canaries from which on shares of them are guessed about, too
_SHARES = (0.5, 0.2)
_HALVINGS = 40


def p_value_of_guesses(n: int, n_guesses: int, n_correct: int, epsilon: float, delta: float) -> float:
    """The most likely that at least `n_correct` of `n_guesses` are right under (epsilon, delta)-privacy.

    n canaries were each put in or left out by a fair coin; the guesses come from what the training gave, the
    others were abstained from. With W ~ Binomial(n_guesses, e^eps / (1 + e^eps)) it is P[W >= v] + 2 n delta
    max_i P[v - i <= W < v] / i over i = 1 .. v. Source: Steinke, Nasr and Jagielski, Privacy auditing with
    one (1) training run, NeurIPS 2023, theorem 5.2 (there m, r, v for the three counts).
    """
    from scipy.stats import binom

    assert 0 <= n_correct <= n_guesses <= n
    accuracy = 1 / (1 + math.exp(-epsilon))
    p = float(binom.sf(n_correct - 1, n_guesses, accuracy))
    if delta and n_correct:
        below = binom.pmf(np.arange(n_correct - 1, -1, -1), n_guesses, accuracy)
        p += 2 * n * delta * float((np.cumsum(below) / np.arange(1, n_correct + 1)).max())
    return min(p, 1.0)


def one_run_bound(
    scores: Sequence[float] | np.ndarray,
    is_in: Sequence[bool] | np.ndarray,
    delta: float,
    repetitions: int = 1,
    confidence: float = CONFIDENCE,
) -> float:
    """The largest epsilon that is refuted at `confidence`; 0 where none is.

    Guesses about all canaries, that those whose scores are above `two_groups` were put in and the others left
    out; of `_MANY` canaries also about the outer shares of the scores alone, each at a part of the error
    (Bonferroni). No guess depends on what the coins said.

    Args:
        scores: (n,), high where the training seems to have seen a canary; from the model, not the coins.
        is_in: (n,), the coins.
        delta: of the guarantee that is put to the test.
        repetitions: times that a canary was put in. The bound is on the epsilon of one copy: k copies are
            private by k epsilon and delta (e^(k epsilon) - 1) / (e^epsilon - 1) (group privacy).
    """
    scores_C, coins_C = np.asarray(scores, dtype=np.float64), np.asarray(is_in, dtype=bool)
    n, order = len(coins_C), np.argsort(scores_C, kind="stable")
    guesses = [(order, scores_C[order] > two_groups(scores_C))]
    guesses += [_about_the_outer(order, int(share * n / 2)) for share in _SHARES if n >= _MANY]
    error = (1 - confidence) / len(guesses)
    bounds = [0.0]
    for about, guess in guesses:
        n_correct = int((coins_C[about] == guess).sum())
        bounds.append(_largest_refuted(n, len(about), n_correct, delta, repetitions, error))
    return max(bounds)


def _about_the_outer(order: np.ndarray, n_each: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last of `order`, and the guess that the last were put in."""
    return np.concatenate([order[:n_each], order[len(order) - n_each :]]), np.arange(2 * n_each) >= n_each


def two_groups(scores: np.ndarray) -> float:
    """The threshold between scores (n,) with the least variance on its two sides (Otsu 1979), the highest
    score where all are alike."""
    ordered = np.sort(scores)
    n = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)
    between = n * (len(ordered) - n) * (sums[:-1] / n - (sums[-1] - sums[:-1]) / (len(ordered) - n)) ** 2
    if not len(between) or not between.max() > 0:
        return float(ordered[-1])
    split = int(between.argmax())
    return float((ordered[split] + ordered[split + 1]) / 2)


def _largest_refuted(
    n: int, n_guesses: int, n_correct: int, delta: float, repetitions: int, error: float
) -> float:
    def p_value(epsilon: float) -> float:
        of_copies = delta * _growth(epsilon, repetitions)
        return p_value_of_guesses(n, n_guesses, n_correct, repetitions * epsilon, min(1.0, of_copies))

    low, high = 0.0, MOST_EPSILON
    if p_value(low) > error:
        return 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle) <= error else (low, middle)
    return low


def _growth(epsilon: float, repetitions: int) -> float:
    """(e^(k epsilon) - 1) / (e^epsilon - 1), the sum of e^(i epsilon) over i < k."""
    if epsilon == 0:
        return float(repetitions)
    exponent = repetitions * epsilon
    return math.expm1(exponent) / math.expm1(epsilon) if exponent < 700 else math.inf


def many_runs_bound(
    n_in: int,
    true_positives: int,
    n_out: int,
    false_positives: int,
    delta: float,
    confidence: float = CONFIDENCE,
) -> float:
    """The largest epsilon that independent trainings refute, n_in with an example and n_out without it.

    Both rates of error are taken at the end of their exact intervals (Clopper and Pearson) that is worse for
    the bound, at half of the error each, in ln((1 - delta - FNR) / FPR) and with the roles changed. Source:
    Jagielski, Ullman and Oprea, Auditing differentially private machine learning, NeurIPS 2020; Nasr et al.,
    Adversary instantiation, S&P 2021.
    """
    sure = clopper_pearson(n_in - true_positives, n_in, confidence)[1]  # of missing it
    false = clopper_pearson(false_positives, n_out, confidence)[1]
    bounds = [0.0]
    for one, other in ((sure, false), (false, sure)):
        if 1 - delta - one > 0 and other > 0:
            bounds.append(math.log((1 - delta - one) / other))
    return max(bounds)
