"""What a differentially private run promises (Dwork and Roth, 2014; for gradients: Abadi et al., 2016,
arXiv:1607.00133), and the noise that this takes.

Two texts that differ by one document give any model, and anything that is made of it, with chances that
differ by a factor of at most e^epsilon, but for a chance of delta.
"""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_genlm.config.recipe import PrivacyRecipe
from hf_genlm.errors import UserError

UNIT = "one document of the training text, there or not"
ACCOUNTANT = "privacy loss random variables (Gopi et al., 2021), by Opacus"
LEAST_DOCUMENTS = 1000
_DELTA_POWER = -1.1
_LEAST_DELTA = 1e-12  # that float64 can account for
_TOLERANCE = 0.005  # of epsilon, which the noise may fall short of
_EPSILON_ERROR = 0.004  # of epsilon, that the accountant may be wrong by; it adds this
_LEAST_EPSILON = 1e-9
_LEAST_NOISE, _MOST_NOISE = 0.1, 1e4
# few, as they only say where to look; the highest are those of a small epsilon
_ORDERS = (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
_HALVINGS = 10  # of the logarithm of that range
COVERED = [
    "the weights of the model, and whatever is made of them: samples, exports, models that are trained on",
    "the models of checkpoints, together with the last one",
]
NOT_COVERED = [
    "the validation text and every figure of it: in evaluation.json, on the card and in the log",
    "the losses of training in log.jsonl and in the pictures drawn of it: without noise",
    "what an audit measures: it reads the training text",
    "what is counted of the text: its documents, bytes and tokens, and the hashes in corpus.json",
    "the number of documents, which the sampling rate, delta, and the size and steps of a planned run follow",
    "other runs over the same text: those by which the settings were chosen spend as much again",
    "a person of whom several documents speak: the guarantee is for each document by itself",
    "the time that the training took, and whether it came to its end",
]


@dataclass(frozen=True)
class Guarantee:
    """A run of at most `steps` noisy steps. `epsilon` is what all of them spend, at this `delta`."""

    epsilon: float
    delta: float
    sampling_rate: float  # probability with which a step draws a document
    noise_multiplier: float  # deviation of the noise, in parts of the clip norm
    clip_norm: float
    batch_size: int  # documents that a step draws on average
    steps: int
    is_noise_secure: bool

    def spent(self, steps: int) -> float:
        """Epsilon after so many steps."""
        return epsilon_of(self.noise_multiplier, self.sampling_rate, steps, self.delta)

    def to_json(self, steps: int, not_covered: list[str]) -> dict[str, Any]:
        """What privacy.json says after so many steps; `not_covered` by this run, besides what never is."""
        return {
            "epsilon": math.ceil(self.spent(steps) * 1e4) / 1e4,  # a bound is rounded upwards
            "delta": self.delta,
            "unit": UNIT,
            "sampling_rate": self.sampling_rate,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
            "steps": steps,
            "accountant": ACCOUNTANT,
            "noise": "SHAKE-256" if self.is_noise_secure else "Philox, by a secret key",
            "covered": COVERED,
            "not_covered": NOT_COVERED + not_covered,
        }


def guarantee_of(privacy: PrivacyRecipe, n_documents: int, batch_size: int, steps: int) -> Guarantee:
    """The least noise for the epsilon of a recipe.

    Args:
        batch_size: documents that a step draws on average.

    Raises:
        UserError: too few documents, a delta that means nothing for so many, or an epsilon that no noise
            reaches.
    """
    epsilon = privacy.epsilon
    assert epsilon is not None
    delta = delta_of(privacy, n_documents)
    if batch_size > n_documents:
        raise UserError(
            f"a step draws {batch_size} documents, and the training text has {n_documents}: lower "
            "training.batch_size or training.gradient_accumulation_steps"
        )
    rate = batch_size / n_documents
    noise = noise_multiplier_of(epsilon, delta, rate, steps)
    spent = epsilon_of(noise, rate, steps, delta)
    return Guarantee(
        spent, delta, rate, noise, privacy.clip_norm, batch_size, steps, is_noise_secure=privacy.secure_noise
    )


def delta_of(privacy: PrivacyRecipe, n_documents: int) -> float:
    """The recipe's delta, or n^-1.1.

    Raises:
        UserError: too few documents, or a delta of 1 / n and more: a mechanism that publishes one of the
            documents as it stands would satisfy it; or one that is too small to be counted.
    """
    if n_documents < LEAST_DOCUMENTS:
        raise UserError(
            f"--epsilon protects each document, and the training text has {n_documents:,}, less than "
            f"{LEAST_DOCUMENTS:,}: give each person's text as a file or a .jsonl record of its own"
        )
    if privacy.delta is None:
        return float(f"{n_documents**_DELTA_POWER:.2g}")
    if privacy.delta >= 1 / n_documents:
        raise UserError(
            f"--delta {privacy.delta:g} would allow that one of the {n_documents:,} documents is published "
            f"as it stands: it must be less than {1 / n_documents:.1e}"
        )
    if privacy.delta < _LEAST_DELTA:
        raise UserError(
            f"--delta {privacy.delta:g} is lost in rounding: it must be at least {_LEAST_DELTA:g}"
        )
    return privacy.delta


def noise_multiplier_of(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The least noise whose `steps` spend at most `epsilon`, to half a percent of it.

    By regula falsi (the Illinois form) on the logarithms of both, which lie close to a line.

    Raises:
        UserError: it is beyond all use.
    """
    aim = (1 - _TOLERANCE / 2) * epsilon

    def excess(log_noise: float) -> float:
        spent = epsilon_of(math.exp(log_noise), rate, steps, delta)
        return math.log(max(spent, _LEAST_EPSILON) / aim)

    (low, above), (high, below) = _bracket(excess, math.log(_noise_by_moments(epsilon, delta, rate, steps)))
    if not above > 0 >= below:
        raise UserError(
            f"--epsilon {epsilon:g} in {steps:,} steps that draw {rate:.2g} of the documents each: no useful "
            "noise gives it; change --epsilon, or lower --steps or the batch"
        )
    while True:
        middle = low + (high - low) * above / (above - below)
        found = excess(middle)
        if abs(found) < _TOLERANCE / 2:
            return math.exp(middle)
        if found > 0:
            low, above, below = middle, found, below / 2
        else:
            high, below, above = middle, found, above / 2


def _bracket(
    excess: Callable[[float], float], start: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Two places with what they are in excess by, the first one above nothing unless that is out of range."""
    here, width = (start, excess(start)), 0.1
    direction = 1 if here[1] > 0 else -1
    while True:
        place = here[0] + direction * width
        there = (place, excess(place))
        is_outside = not math.log(_LEAST_NOISE) < place < math.log(_MOST_NOISE)
        if (there[1] > 0) != (here[1] > 0) or is_outside:
            return (here, there) if direction == 1 else (there, here)
        here, width = there, 2 * width


def _noise_by_moments(epsilon: float, delta: float, rate: float, steps: int) -> float:
    low, high = math.log(_LEAST_NOISE), math.log(_MOST_NOISE)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_enough = epsilon_by_moments(math.exp(middle), rate, steps, delta) <= epsilon
        low, high = (low, middle) if is_enough else (middle, high)
    return math.exp(high)


@functools.lru_cache(maxsize=256)
def epsilon_of(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon of so many steps of the Poisson-sampled Gaussian mechanism: an upper bound, by Opacus."""
    if steps == 0:
        return 0.0
    from opacus.accountants import PRVAccountant

    rough = epsilon_by_moments(noise_multiplier, rate, steps, delta)
    error = max(1e-4, _EPSILON_ERROR * rough)
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # logarithms of 0 in branches that are not taken
        found = accountant.get_epsilon(delta, eps_error=error)
    return float(found)


def epsilon_by_moments(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """As `epsilon_of`, by Renyi divergences: a looser bound."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another order of the divergence could be better
        return float(accountant.get_epsilon(delta, alphas=_ORDERS))


def check_installed() -> None:
    """
    Raises:
        UserError: Opacus is not there.
    """
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise UserError("--epsilon needs Opacus: pip install 'hf_genlm[privacy]'") from error
