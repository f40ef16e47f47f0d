"""Helpers shared by tests: an audit of the private step, by a canary whose gradient is known.

Many releases of the same step with fresh keys, with and without one document, whose gradient is longer than
the clip norm. The adversary sees every noisy gradient and knows that of the canary (white box), and guesses
from the projection on it, which is the most powerful test of a Gaussian release. The exact intervals of the
error rates bound the parameter mu of Gaussian differential privacy from below, and mu gives epsilon. Source:
Nasr, Hayes, Steinke, Balle, Tramer, Jagielski, Carlini and Terzis, Tight auditing of differentially private
machine learning, USENIX Security 2023, section 4.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from scipy.stats import norm
from support.models import build_model

from hf_genlm.config.recipe import TrainingRecipe
from hf_genlm.privacy.mechanism import Guarantee, compute_epsilon
from hf_genlm.privacy.statistics import clopper_pearson
from hf_genlm.training.private import PrivateState, document_losses, private_gradient

CONFIDENCE = 0.95
DELTA = 1e-5


@dataclass(frozen=True)
class Verdict:
    """Result of an audit: a smaller epsilon than `lower_bound` is refuted at `CONFIDENCE`."""

    claimed: float
    lower_bound: float
    gradient_norm: float  # of the canary, before clipping

    @property
    def is_refuted(self) -> bool:
        return self.lower_bound > self.claimed


def gaussian_epsilon(mu: float, delta: float = DELTA) -> float:
    """The epsilon of mu-Gaussian differential privacy (Dong, Roth and Su, 2022, corollary 1)."""

    def delta_of(epsilon: float) -> float:
        first, second = -epsilon / mu + mu / 2, -epsilon / mu - mu / 2
        return float(norm.cdf(first)) - math.exp(epsilon + float(norm.logcdf(second)))

    low, high = 0.0, 500.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return low


def mu_lower_bound(num_in: int, num_missed: int, num_out: int, num_alarms: int) -> float:
    """The largest mu that is refuted: both error rates at the upper end of their exact intervals, at half of
    the error each."""
    missed = clopper_pearson(num_missed, num_in, CONFIDENCE)[1]
    alarms = clopper_pearson(num_alarms, num_out, CONFIDENCE)[1]
    return max(0.0, float(norm.ppf(1 - alarms) - norm.ppf(missed)))


def many_runs_bound(
    num_in: int,
    true_positives: int,
    num_out: int,
    false_positives: int,
    delta: float,
    confidence: float = CONFIDENCE,
) -> float:
    """The largest epsilon refuted by independent trainings, `num_in` with an example, `num_out` without it.

    Both error rates are taken at the worse end of their exact intervals, at half of the error each, in
    ln((1 - delta - FNR) / FPR) and with the roles exchanged. Source: Jagielski, Ullman and Oprea, Auditing
    differentially private machine learning, NeurIPS 2020; Nasr et al., Adversary instantiation, S&P 2021.
    """
    false_negative_rate = clopper_pearson(num_in - true_positives, num_in, confidence)[1]
    false_positive_rate = clopper_pearson(false_positives, num_out, confidence)[1]
    bounds = [0.0]
    for one, other in (
        (false_negative_rate, false_positive_rate),
        (false_positive_rate, false_negative_rate),
    ):
        if 1 - delta - one > 0 and other > 0:
            bounds.append(math.log((1 - delta - one) / other))
    return max(bounds)


def audit_step(
    n: int, is_noise_secure: bool, clip_norm: float = 0.02, noise_multiplier: float = 1.0
) -> Verdict:
    """Audit `private_gradient` by `n` releases with the canary and `n` without."""
    claimed = compute_epsilon(noise_multiplier, 1.0, 1, DELTA)
    guarantee = Guarantee(claimed, DELTA, 1.0, noise_multiplier, clip_norm, 1, 1, is_noise_secure)
    recipe = TrainingRecipe()
    model = build_model("gated_linear", hidden_size=8)
    canary = {"input_ids": torch.arange(2, 8)[None], "position_ids": torch.arange(6)[None]}
    canary["labels"] = canary["input_ids"]
    nothing = {name: values[:0] for name, values in canary.items()}
    document_losses(model, canary, recipe).sum().backward()
    gradient = _flat(model)
    direction = gradient / gradient.norm()

    def count_above(inputs: dict[str, torch.Tensor], label: str) -> int:
        count = 0
        for i in range(n):
            state = PrivateState(guarantee, hashlib.sha256(f"{label} {i}".encode()).digest())
            private_gradient(model, inputs, state, 0, recipe, 1)
            # the threshold was fixed beforehand: half of the clip norm
            count += float(_flat(model) @ direction) * guarantee.batch_size > clip_norm / 2
        return count

    mu = mu_lower_bound(n, n - count_above(canary, "in"), n, count_above(nothing, "out"))
    return Verdict(claimed, gaussian_epsilon(mu) if mu else 0.0, float(gradient.norm()))


def _flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()
