"""Promise: an audit of the private step refutes the stated epsilon if the step leaks, and only then."""

import math

import numpy as np
import pytest
from support.dp_audit import audit_step, gaussian_epsilon, mu_lower_bound

from hf_genlm.privacy.mechanism import NOISES, compute_epsilon
from hf_genlm.training import private

pytest.importorskip("opacus")
N = 200  # releases with the canary, and as many without
add_clipped = private.add_clipped


def scaled(factor: float):
    return {
        kind: lambda *args, draw=draw: [part * factor for part in draw(*args)]
        for kind, draw in NOISES.items()
    }


def clipping_at(clip_norm: float):
    def add(model, rows, totals, stated, recipe):
        return add_clipped(model, rows, totals, clip_norm, recipe)

    return add


@pytest.mark.parametrize("is_noise_secure", [False, True])
def test_the_stated_epsilon_stands_and_the_audit_is_near_it(is_noise_secure):
    found = audit_step(N, is_noise_secure)
    print(found)
    assert found.gradient_norm > 10 * 0.02, "the canary is clipped"
    assert not found.is_refuted
    assert found.lower_bound > 0.3 * found.claimed, "a weak audit would let everything pass"


# leak -> patch of hf_genlm.training.private
LEAKS = {
    "clip ignored": ("add_clipped", clipping_at(math.inf)),
    "clip at a constant": ("add_clipped", clipping_at(1.0)),
    "clip at twice the norm": ("add_clipped", clipping_at(0.04)),
    "noise halved": ("NOISES", scaled(0.5)),
    "no noise": ("NOISES", scaled(0.0)),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_planted_leak_is_refuted_at_95_percent(leak, monkeypatch):
    name, fault = LEAKS[leak]
    monkeypatch.setattr(private, name, fault)
    found = audit_step(N, is_noise_secure=False)
    print(leak, found)
    assert found.is_refuted, found


def test_the_bound_errs_no_more_often_than_stated_and_is_tight():
    """Projections of a Gaussian mechanism: mu = 1 / sigma, as drawn by numpy."""
    generator = np.random.default_rng(0)
    for mu in (0.5, 1.0, 3.0):
        missed = (generator.normal(mu, 1, (100, 1000)) <= mu / 2).sum(1)
        alarms = (generator.normal(0, 1, (100, 1000)) > mu / 2).sum(1)
        bounds = np.array(
            [mu_lower_bound(1000, int(m), 1000, int(a)) for m, a in zip(missed, alarms, strict=True)]
        )
        assert (bounds > mu).mean() <= 0.05
        assert bounds.mean() > mu - 0.25
    assert gaussian_epsilon(1.0) == pytest.approx(compute_epsilon(1.0, 1.0, 1, 1e-5), rel=0.01)
