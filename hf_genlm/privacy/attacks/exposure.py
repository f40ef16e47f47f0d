"""Exposure: how far the model prefers the secret that was planted to others that could have been.

A canary's exposure is log2 |R| - log2 of its rank among all secrets R of its frame, ordered by their loss:
minus log2 of the chance that a random one is at least as likely (Carlini, Liu, Erlingsson, Kos and Song, The
Secret Sharer, USENIX Security 2019, sections 4.2 and 4.3). By rank, it is taken among `N_REFERENCES` random
secrets, so that it is at most log2 of one more; extrapolated, from a skew-normal distribution fitted to the
losses of those, at most log2 |R|.

The null. For a model that has not seen it, the rank is uniform, and exposure is exponential with mean log2 e
= 1.44 bits (a little less by rank: `null_mean`), not 0; the p-value is that of the sum over canaries.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.privacy.attacks.epsilon import one_run_bound
from hf_genlm.privacy.attacks.intervals import mean_interval
from hf_genlm.privacy.subject import Audited, Evidence, Findings, Progress
from hf_genlm.text.canaries import BITS, Canaries, Canary, draw_secret

N_REFERENCES = 511  # by rank at most 9 bits
_LEAST_REFERENCES = 63  # at most 6 bits, where there are many canaries
_MOST_TEXTS = 1 << 15  # of all canaries, beyond the least
SPLIT = "canaries"
_MOST_SKEW = 0.99  # of a skew-normal distribution is 0.9953


@dataclass(frozen=True)
class CanaryLosses:
    """Nats of each candidate's text (C,), and of the same text about other secrets (C, M)."""

    candidates: tuple[Canary, ...]
    own: np.ndarray
    others: np.ndarray

    @property
    def by_rank(self) -> np.ndarray:
        """Exposure (C,) in bits among the references and the canary itself, in the middle of ties."""
        better = (self.others < self.own[:, None]).sum(axis=1)
        ties = (self.others == self.own[:, None]).sum(axis=1)
        return np.log2(self.others.shape[1] + 1) - np.log2(1 + better + ties / 2)

    @property
    def extrapolated(self) -> np.ndarray:
        """Exposure (C,) in bits by a skew-normal distribution, at most that of the secret's space."""
        found = [skew_normal_exposure(own, others) for own, others in zip(self.own, self.others, strict=True)]
        return np.minimum(found, BITS)

    @property
    def surprise(self) -> np.ndarray:
        """(C,): by how many standard deviations of the references each canary is likelier than their mean."""
        spread = self.others.std(axis=1)
        gap = self.others.mean(axis=1) - self.own
        return np.divide(gap, spread, out=np.zeros_like(gap), where=spread > 0)


def losses_of(
    audited: Audited,
    canaries: Canaries,
    n_references: int | None = None,
    on_progress: Progress | None = None,
) -> CanaryLosses:
    """Score every candidate, planted or not, and `n_references` other secrets in its frame (None:
    `N_REFERENCES`, fewer of many candidates)."""
    if n_references is None:
        of_each = _MOST_TEXTS // max(1, len(canaries.candidates)) - 1
        n_references = min(N_REFERENCES, max(_LEAST_REFERENCES, of_each))
    texts = []
    for number, canary in enumerate(canaries.candidates):
        others = (draw_secret(canaries.seed, "reference", number, i) for i in range(n_references))
        texts += [canary.text, *(canary.with_secret(secret) for secret in others)]
    scores = audited.score_texts(texts, on_progress)
    nats = -np.array([each.log_p.sum() for each in scores]).reshape(-1, n_references + 1)
    return CanaryLosses(canaries.candidates, nats[:, 0], nats[:, 1:])


def measure_canaries(audited: Audited, evidence: Evidence, on_progress: Progress | None) -> Findings:
    """Exposure by repetitions, 0 for the candidates that were left out, and what epsilon cannot have been."""
    assert evidence.canaries is not None
    losses = losses_of(audited, evidence.canaries, on_progress=on_progress)
    return Findings([*exposure_of(losses), *bounds_of(losses, evidence.delta)])


def exposure_of(losses: CanaryLosses) -> list[Measurement]:
    """`exposure/k`, `exposure_extrapolated/k` and `exposure_p_value/k` of the canaries planted k times."""
    by_count = defaultdict(list)
    for i, canary in enumerate(losses.candidates):
        by_count[canary.repetitions if canary.is_planted else 0].append(i)
    kinds = {"exposure": losses.by_rank, "exposure_extrapolated": losses.extrapolated}
    found = []
    for count in sorted(by_count):
        for name, exposure in kinds.items():
            chosen = exposure[by_count[count]]
            value, stderr, interval = mean_interval(chosen)
            found.append(
                Measurement(f"{name}/{count}", value, "bits", len(chosen), stderr, SPLIT, False, interval)
            )
        by_rank = losses.by_rank[by_count[count]]
        found.append(
            Measurement(
                f"exposure_p_value/{count}",
                null_p_value(by_rank),
                "probability",
                len(by_rank),
                None,
                SPLIT,
                True,
            )
        )
    return found


def bounds_of(losses: CanaryLosses, delta: float) -> list[Measurement]:
    """`epsilon_lower_bound/k` of the candidates for k repetitions, at a confidence of 95 % each."""
    found = []
    for count in sorted({canary.repetitions for canary in losses.candidates}):
        chosen = [i for i, canary in enumerate(losses.candidates) if canary.repetitions == count]
        is_in = [losses.candidates[i].is_planted for i in chosen]
        bound = one_run_bound(losses.surprise[chosen], is_in, delta, repetitions=count)
        found.append(
            Measurement(f"epsilon_lower_bound/{count}", bound, "epsilon", len(chosen), None, SPLIT, False)
        )
    return found


def null_mean(n_references: int = N_REFERENCES) -> float:
    """Mean exposure in bits of a rank that is uniform over 1 .. n + 1: log2 e for many."""
    n = n_references + 1
    return math.log2(n) - math.lgamma(n + 1) / math.log(2) / n


def null_p_value(exposures: Sequence[float] | np.ndarray) -> float:
    """The chance that exposures of as many canaries that nobody saw add up to at least as much.

    ln 2 times an exposure is exponential then, and the sum of n has a gamma distribution (Fisher's method of
    combining p-values, which 2^-exposure are); by rank it is a little too large.
    """
    from scipy.stats import gamma

    return float(gamma.sf(math.log(2) * float(np.sum(exposures)), len(exposures)))


def skew_normal_exposure(own: float, others: np.ndarray) -> float:
    """- log2 P(loss <= own) under the skew-normal distribution with mean, variance and skewness of `others`.

    Its parameters by the method of moments (Azzalini, The Skew-Normal and Related Families, 2014, section
    3.1); the chance in its tail by an integral of the density relative to its end, so that it does not
    vanish.
    """
    from scipy.integrate import quad
    from scipy.special import log_ndtr
    from scipy.stats import skew

    spread = float(others.std())
    if spread == 0.0:
        return 1.0 if own == others[0] else (math.inf if own < others[0] else 0.0)
    skewness = float(np.clip(skew(others), -_MOST_SKEW, _MOST_SKEW))
    part = abs(skewness) ** (2 / 3)
    size = math.sqrt(math.pi / 2 * part / (part + ((4 - math.pi) / 2) ** (2 / 3)))
    slant = math.copysign(min(size, 1 - 1e-9), skewness)  # delta
    scale = spread / math.sqrt(1 - 2 * slant**2 / math.pi)
    z = (own - float(others.mean())) / scale + slant * math.sqrt(2 / math.pi)
    shape = slant / math.sqrt(1 - slant**2)

    def log_density(x: float) -> float:
        return math.log(2 / math.pi) / 2 - x * x / 2 + float(log_ndtr(shape * x))  # log(2 phi(x) Phi(a x))

    end = log_density(z)
    if z > 0:  # most of the chance lies below
        above, _ = quad(lambda x: math.exp(log_density(x)), z, z + 40, limit=200)
        return -math.log1p(-min(above, 1 - 1e-300)) / math.log(2) if above < 1 else 0.0
    below, _ = quad(lambda x: math.exp(log_density(z - x) - end), 0, 40, limit=200)
    return -(end + math.log(below)) / math.log(2)
