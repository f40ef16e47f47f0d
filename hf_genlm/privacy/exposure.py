"""Exposure: how much the model prefers the planted secret to other secrets of the same form.

The exposure of a canary is log2 |R| - log2(its rank by loss among all secrets R of its frame), that is minus
log2 of the chance that a random secret is at least as likely (Carlini, Liu, Erlingsson, Kos and Song, The
Secret Sharer, USENIX Security 2019, sections 4.2 and 4.3). By rank it is taken among `N_REFERENCES` random
secrets, so it is at most log2(N_REFERENCES + 1); extrapolated from a skew-normal distribution fitted to their
losses, it is at most log2 |R|.

Null hypothesis: for a model that has not seen the canary the rank is uniform, and exposure is exponential
with mean log2 e = 1.44 bits (a little less by rank), not 0. The p-value is that of the sum over
canaries.

Shapes: C canaries, M reference secrets.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.privacy.statistics import mean_interval, one_run_bound
from hf_genlm.privacy.target import Evidence, Findings, Progress, TargetModel
from hf_genlm.text.canaries import BITS, Canaries, Canary, draw_secret

N_REFERENCES = 511  # at most 9 bits by rank
_MIN_REFERENCES = 63  # at most 6 bits, if there are many canaries
_MAX_TEXTS = 1 << 15  # of all canaries together, unless `_MIN_REFERENCES` needs more
SPLIT = "canaries"
_MAX_SHAPE = 28.0  # of a skew-normal distribution: a skewness of 0.99, where the limit is 0.9953


@dataclass(frozen=True)
class CanaryLosses:
    """Loss in nats of each candidate's text (C,), and of that text with other secrets (C, M)."""

    candidates: tuple[Canary, ...]
    own: np.ndarray
    others: np.ndarray

    @property
    def by_rank(self) -> np.ndarray:
        """Exposure (C,) in bits among the references and the canary itself; a tie takes its middle rank."""
        better = (self.others < self.own[:, None]).sum(axis=1)
        ties = (self.others == self.own[:, None]).sum(axis=1)
        return np.log2(self.others.shape[1] + 1) - np.log2(1 + better + ties / 2)

    @property
    def extrapolated(self) -> np.ndarray:
        """Exposure (C,) in bits by a skew-normal distribution, at most the bits of a secret."""
        found = [skew_normal_exposure(own, others) for own, others in zip(self.own, self.others, strict=True)]
        return np.minimum(found, BITS)

    @property
    def surprise(self) -> np.ndarray:
        """(C,) distance of each canary's loss below the mean of its references, in their deviations."""
        std = self.others.std(axis=1)
        gap = self.others.mean(axis=1) - self.own
        return np.divide(gap, std, out=np.zeros_like(gap), where=std > 0)


def score_canaries(
    target: TargetModel, canaries: Canaries, on_progress: Progress | None = None
) -> CanaryLosses:
    """Score every candidate, planted or not, and the same text with `N_REFERENCES` other secrets, or fewer if
    there are many candidates."""
    per_candidate = _MAX_TEXTS // max(1, len(canaries.candidates)) - 1
    num_references = min(N_REFERENCES, max(_MIN_REFERENCES, per_candidate))
    texts = []
    for number, canary in enumerate(canaries.candidates):
        others = (draw_secret(canaries.seed, "reference", number, i) for i in range(num_references))
        texts += [canary.text, *(canary.with_secret(secret) for secret in others)]
    scores = target.score_texts(texts, on_progress)
    nats = -np.array([each.log_p.sum() for each in scores]).reshape(-1, num_references + 1)
    return CanaryLosses(canaries.candidates, nats[:, 0], nats[:, 1:])


def measure_canaries(target: TargetModel, evidence: Evidence, on_progress: Progress | None) -> Findings:
    """Measure the exposure of the canaries, and a lower bound on epsilon."""
    assert evidence.canaries is not None
    losses = score_canaries(target, evidence.canaries, on_progress=on_progress)
    return Findings([*measure_exposure(losses), *measure_epsilon(losses, evidence.delta)])


def measure_exposure(losses: CanaryLosses) -> list[Measurement]:
    """`exposure/k`, `exposure_extrapolated/k` and `exposure_p_value/k` of the canaries planted k times; k = 0
    are the candidates that were left out."""
    groups = defaultdict(list)
    for i, canary in enumerate(losses.candidates):
        groups[canary.repetitions if canary.is_planted else 0].append(i)
    kinds = {"exposure": losses.by_rank, "exposure_extrapolated": losses.extrapolated}
    highest = {"exposure": math.log2(losses.others.shape[1] + 1), "exposure_extrapolated": float(BITS)}
    found = []
    for count, group in sorted(groups.items()):
        n = len(group)
        for name, exposure in kinds.items():
            value, stderr, interval = mean_interval(exposure[group], highest[name])
            found.append(Measurement(f"{name}/{count}", value, "bits", n, stderr, SPLIT, False, interval))
        p = null_p_value(kinds["exposure"][group])
        found.append(Measurement(f"exposure_p_value/{count}", p, "probability", n, None, SPLIT, True))
    return found


def measure_epsilon(losses: CanaryLosses, delta: float) -> list[Measurement]:
    """`epsilon_lower_bound/k` of the candidates for k repetitions, each at a confidence of 95 %."""
    found = []
    for count in sorted({canary.repetitions for canary in losses.candidates}):
        group = [i for i, canary in enumerate(losses.candidates) if canary.repetitions == count]
        is_in = [losses.candidates[i].is_planted for i in group]
        bound = one_run_bound(losses.surprise[group], is_in, delta, repetitions=count)
        name = f"epsilon_lower_bound/{count}"
        found.append(Measurement(name, bound, "epsilon", len(group), None, SPLIT, False))
    return found


def null_p_value(exposures: Sequence[float] | np.ndarray) -> float:
    """P(the exposures of as many unseen canaries add up to at least as much).

    ln 2 times an exposure is exponential under the null hypothesis, so their sum has a gamma distribution
    (Fisher's method of combining the p-values 2^-exposure); by rank the result is a little too large.
    """
    from scipy.stats import gamma

    return float(gamma.sf(math.log(2) * float(np.sum(exposures)), len(exposures)))


def skew_normal_exposure(own: float, others: np.ndarray) -> float:
    """- log2 P(loss <= own) under the skew-normal distribution with mean, variance and skewness of `others`.

    Fitted by the method of moments (Azzalini, The Skew-Normal and Related Families, 2014, section 3.1).
    """
    from scipy.stats import skewnorm

    if others.std() == 0.0:
        return 1.0 if own == others[0] else (math.inf if own < others[0] else 0.0)
    shape, loc, scale = skewnorm.fit(others, method="mm")
    if abs(shape) > _MAX_SHAPE:  # losses can be more skewed than any skew-normal distribution
        shape, loc, scale = skewnorm.fit(others, f0=math.copysign(_MAX_SHAPE, shape), method="mm")
    return -float(skewnorm.logcdf(own, shape, loc, scale)) / math.log(2)
