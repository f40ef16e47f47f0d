"""The Poisson-sampled Gaussian mechanism of DP-SGD: its guarantee, its sampling and its noise.

Guarantee (Dwork and Roth, 2014; for gradients Abadi et al., 2016, arXiv:1607.00133): for two training texts
that differ by one document, the probabilities of any resulting model, and of anything computed from it,
differ by a factor of at most e^epsilon, up to an additional probability of delta.

Randomness: everything follows from a secret key of 256 bits and the number of the step, by SHAKE-256 (FIPS
202). So a resumed run draws what an uninterrupted one draws, and nobody without the key knows what was drawn.
"""

import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_genlm.config.recipe import PrivacyRecipe
from hf_genlm.errors import UserError, install_command

UNIT = "one document of the training text, there or not"
ACCOUNTANT = "privacy loss random variables (Gopi et al., 2021), by Opacus"
MIN_DOCUMENTS = 1000
KEY_BYTES = 32
_DELTA_POWER = -1.1
_MIN_DELTA = 1e-12  # smaller values are below the precision of the accountant in float64
_TOLERANCE = 0.005  # relative: epsilon may remain below the one asked for by this much
_EPSILON_ERROR = 0.004  # relative error bound of the accountant, which adds it to epsilon
_MIN_EPSILON = 1e-9
_MIN_NOISE, _MAX_NOISE = 0.1, 1e4
# few orders, since the Renyi bound only starts the search; the highest ones serve a small epsilon
_ORDERS = (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
_NUM_BISECTIONS = 10  # of the logarithm of the range of noise
_CHUNK_SIZE = 1 << 20  # numbers of secure noise computed at once
_NUM_SUMMANDS = 4  # Gaussians that are added up to one
# (is on a GPU, is secure) -> the generator of the noise, as privacy.json names it
_GENERATORS = {
    (False, False): "Philox, by a secret key",
    (False, True): "SHAKE-256",
    (True, False): "ChaCha20, by a secret key",
    (True, True): "ChaCha20, by a secret key, sums of four",
}
COVERED = [
    "the weights of the model, and everything computed from them: samples, exports, further trained models",
    "the models of checkpoints, together with the last one",
]
# every output of a run that is exact; none of them is shown on the card, unless card.private_figures is true
NOT_COVERED = [
    "the validation text and every measurement on it: in evaluation.json, evaluation_blocks.npy, "
    "languages.json and the log",
    "the rest of log.jsonl, and plots/, tensorboard/ and other trackers that show it: training losses, "
    "counts and times are without noise",
    "the spans of the samples that occur in the text: evaluate --suite samples reads the training text for "
    "them, if card.private_figures is true",
    "audit.json, canaries.json and the pictures of an audit: it reads the training text",
    "corpus.json and recipe.yaml: names and hashes of files, counts of documents, bytes and tokens",
    "sources.jsonl, validation.jsonl and the cache of encoded texts: the text itself",
    "checkpoints/, which hold the key of the noise until the run is done",
    "what the commands print, and a card with card.private_figures",
    "the number of documents, which determines the sampling rate, delta, and size and steps of a planned run",
    "other runs over the same text: those by which the settings were chosen spend as much again",
    "a person in several documents: the guarantee is for each document by itself",
    "the duration of the training, also in samples.md, and whether it came to its end",
]


@dataclass(frozen=True)
class Guarantee:
    """The guarantee of a run of at most `steps` noisy steps, which spend `epsilon` in all at this `delta`."""

    epsilon: float
    delta: float
    sampling_rate: float  # probability with which a step draws a document
    noise_multiplier: float  # standard deviation of the noise in units of the clip norm
    clip_norm: float
    batch_size: int  # documents that a step draws on average
    steps: int
    is_noise_secure: bool

    def spent(self, steps: int) -> float:
        """Epsilon after `steps` steps."""
        return compute_epsilon(self.noise_multiplier, self.sampling_rate, steps, self.delta)

    def to_json(self, not_covered: list[str], device: str = "cpu") -> dict[str, Any]:
        """Content of privacy.json on a type of `device`; `not_covered` is added to what no run covers."""
        return {
            "epsilon": math.ceil(self.spent(self.steps) * 1e4) / 1e4,  # an upper bound is rounded upwards
            "delta": self.delta,
            "unit": UNIT,
            "sampling_rate": self.sampling_rate,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
            "steps": self.steps,
            "accountant": ACCOUNTANT,
            "noise": _GENERATORS[device == "cuda", self.is_noise_secure],
            "covered": COVERED,
            "not_covered": NOT_COVERED + not_covered,
        }


def plan_guarantee(privacy: PrivacyRecipe, num_documents: int, batch_size: int, steps: int) -> Guarantee:
    """Choose the least noise for the epsilon of a recipe.

    Args:
        batch_size: documents that a step draws on average.

    Raises:
        UserError: too few documents, a delta without meaning for so many, or an epsilon out of reach.
    """
    epsilon = privacy.epsilon
    assert epsilon is not None
    delta = choose_delta(privacy, num_documents)
    if batch_size > num_documents:
        raise UserError(
            f"a step draws {batch_size} documents, and the training text has {num_documents}: lower "
            "training.batch_size or training.gradient_accumulation_steps"
        )
    rate = batch_size / num_documents
    noise = find_noise_multiplier(epsilon, delta, rate, steps)
    spent = compute_epsilon(noise, rate, steps, delta)
    return Guarantee(
        spent, delta, rate, noise, privacy.clip_norm, batch_size, steps, is_noise_secure=privacy.secure_noise
    )


def choose_delta(privacy: PrivacyRecipe, num_documents: int) -> float:
    """The recipe's delta, or n^-1.1 for n documents.

    Raises:
        UserError: too few documents; a delta of 1 / n or more, which a mechanism that publishes one random
            document would satisfy; or one too small for the accountant.
    """
    if num_documents < MIN_DOCUMENTS:
        raise UserError(
            f"--epsilon protects each document, and the training text has {num_documents:,}, less than "
            f"{MIN_DOCUMENTS:,}: give each person's text as a file or a .jsonl record of its own"
        )
    if privacy.delta is None:
        return float(f"{num_documents**_DELTA_POWER:.2g}")
    if privacy.delta >= 1 / num_documents:
        raise UserError(
            f"--delta {privacy.delta:g} would allow publishing one of the {num_documents:,} documents "
            f"verbatim: it must be less than {1 / num_documents:.1e}"
        )
    if privacy.delta < _MIN_DELTA:
        raise UserError(f"--delta {privacy.delta:g} is lost in rounding: it must be at least {_MIN_DELTA:g}")
    return privacy.delta


def find_noise_multiplier(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The least noise multiplier whose `steps` spend at most `epsilon`, to half a percent of epsilon.

    Regula falsi (Illinois variant) on the logarithms of noise and epsilon, which lie close to a line: it
    takes a few seconds, a third of Opacus' bisection, and stays near the bound for a small epsilon, too.

    Raises:
        UserError: no noise in the useful range reaches epsilon.
    """
    target = (1 - _TOLERANCE / 2) * epsilon

    def excess(log_noise: float) -> float:
        spent = compute_epsilon(math.exp(log_noise), rate, steps, delta)
        return math.log(max(spent, _MIN_EPSILON) / target)

    (low, above), (high, below) = _find_bracket(excess, math.log(_bound_noise(epsilon, delta, rate, steps)))
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


def _bound_noise(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """A sufficient noise multiplier by the looser Renyi bound, by bisection."""
    low, high = math.log(_MIN_NOISE), math.log(_MAX_NOISE)
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        is_enough = compute_renyi_epsilon(math.exp(middle), rate, steps, delta) <= epsilon
        low, high = (low, middle) if is_enough else (middle, high)
    return math.exp(high)


def _find_bracket(
    excess: Callable[[float], float], start: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Two points (x, excess(x)) in the order of x whose excess differs in sign, if the range has such."""
    here, width = (start, excess(start)), 0.1
    direction = 1 if here[1] > 0 else -1
    while True:
        place = here[0] + direction * width
        there = (place, excess(place))
        is_outside = not math.log(_MIN_NOISE) < place < math.log(_MAX_NOISE)
        if (there[1] > 0) != (here[1] > 0) or is_outside:
            return (here, there) if direction == 1 else (there, here)
        here, width = there, 2 * width


@functools.lru_cache(maxsize=256)
def compute_epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon of `steps` steps of the Poisson-sampled Gaussian mechanism: an upper bound, by Opacus."""
    if steps == 0:
        return 0.0
    from opacus.accountants import PRVAccountant

    rough = compute_renyi_epsilon(noise_multiplier, rate, steps, delta)
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # logarithms of 0 in branches that are not taken
        return float(accountant.get_epsilon(delta, eps_error=max(1e-4, _EPSILON_ERROR * rough)))


def compute_renyi_epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon as by `compute_epsilon`, from Renyi divergences: a looser bound."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another order of the divergence could be better
        return float(accountant.get_epsilon(delta, alphas=_ORDERS))


def check_installed() -> None:
    """Refuse a private run without Opacus.

    Raises:
        UserError: Opacus is not installed.
    """
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise UserError(f"--epsilon needs Opacus: {install_command('privacy')}") from error


def draw_documents(key: bytes, step: int, num_documents: int, rate: float) -> np.ndarray:
    """(k,) numbers of the documents of a step: Poisson sampling, each independently with chance `rate`."""
    if rate >= 1:
        return np.arange(num_documents)
    words = _random_words(key, step, "documents", num_documents)
    return np.flatnonzero(words < np.uint64(rate * 2.0**64))


def draw_offsets(key: bytes, step: int, count: int) -> np.ndarray:
    """(count,) uniform uint64 that decide where in its document each window begins."""
    return _random_words(key, step, "windows", count)


def draw_fast_noise(
    key: bytes, step: int, shapes: Sequence[tuple[int, ...]], device: torch.device
) -> list[torch.Tensor]:
    """Standard Gaussians of `shapes`: on a GPU from ChaCha20; else by Philox with a key of 128 bits, which is
    statistically sound but not cryptographic."""
    if device.type == "cuda":
        return draw_gaussians(key, step, shapes, device, 1, chacha20_words)
    numbers = np.random.Generator(np.random.Philox(key=_random_words(key, step, "noise", 2)))
    return [torch.from_numpy(numbers.standard_normal(shape, dtype=np.float32)).to(device) for shape in shapes]


def draw_secure_noise(
    key: bytes, step: int, shapes: Sequence[tuple[int, ...]], device: torch.device
) -> list[torch.Tensor]:
    """Standard Gaussians of `shapes` from ChaCha20 on a GPU, else from SHAKE-256.

    Each is the sum of four, halved: the last bits of the result then reveal nothing about the value that the
    noise was added to (Holohan and Braghin, 2021, arXiv:2107.10138).
    """
    draw_words = chacha20_words if device.type == "cuda" else shake256_words
    return draw_gaussians(key, step, shapes, device, _NUM_SUMMANDS, draw_words)


def draw_gaussians(
    key: bytes,
    step: int,
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    num_summands: int,
    draw_words: Callable[..., torch.Tensor],
) -> list[torch.Tensor]:
    """Sums of `num_summands` Gaussians, scaled to variance 1, by the transform of Box and Muller (1958).

    `draw_words(key, step, chunk, count, device)` gives uniform int64, of which 53 bits are used.
    """
    sizes = [math.prod(shape) for shape in shapes]
    flat = torch.empty(sum(sizes), device=device)
    for chunk, start in enumerate(range(0, len(flat), _CHUNK_SIZE)):
        count = min(_CHUNK_SIZE, len(flat) - start)
        n = num_summands * count
        words = draw_words(key, step, chunk, n + n % 2, device)
        uniform = ((words >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)  # more than 0
        first, second = uniform.view(2, -1)
        radius, angle = first.log().mul_(-2).sqrt_(), second * (2 * math.pi)
        gaussians = torch.cat([radius * angle.cos(), radius * angle.sin()])[:n]
        summed = gaussians.view(num_summands, count).sum(0)
        flat[start : start + count] = summed.div_(math.sqrt(num_summands))
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


def shake256_words(key: bytes, step: int, chunk: int, count: int, device: torch.device) -> torch.Tensor:
    """(count,) uniform int64 of a chunk of secure noise, from SHAKE-256."""
    words = _random_words(key, step, f"secure noise {chunk}", count)
    return torch.from_numpy(words.view(np.int64).copy()).to(device)


def chacha20_words(key: bytes, step: int, chunk: int, count: int, device: torch.device) -> torch.Tensor:
    """(count,) uniform int64 of a chunk of noise, from ChaCha20 on `device`, with a key of its own."""
    of_chunk = _random_words(key, step, f"ChaCha20 {chunk}", KEY_BYTES // 8).tobytes()
    return chacha20_stream(of_chunk, 2 * count, device).view(torch.int64)


def chacha20_stream(key: bytes, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(count,) int32: the key stream of ChaCha20 (RFC 8439, section 2.3) for a key of 32 bytes, from block 0
    of the nonce 0."""
    blocks = torch.arange(-(-count // 16), dtype=torch.int32, device=device)
    words = torch.frombuffer(bytearray(b"expand 32-byte k" + key), dtype=torch.int32).to(device)
    begin = [row[:, None].expand(4, len(blocks)) for row in words.view(3, 4)]
    begin.append(torch.cat([blocks[None], blocks.new_zeros(3, len(blocks))]))  # counter and nonce
    a, b, c, d = begin
    for _ in range(10):
        for shift in (1, -1):  # a round over columns, then one over diagonals
            a = a + b
            d = _rotate(d ^ a, 16)
            c = c + d
            b = _rotate(b ^ c, 12)
            a = a + b
            d = _rotate(d ^ a, 8)
            c = c + d
            b = _rotate(b ^ c, 7)
            b, c, d = b.roll(-shift, 0), c.roll(2, 0), d.roll(shift, 0)
    mixed = torch.cat([after + before for after, before in zip((a, b, c, d), begin, strict=True)])
    return mixed.t().flatten()[:count]


def _rotate(words: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Rotate each int32 of `words` to the left."""
    return (words << n_bits) | ((words >> (32 - n_bits)) & (2**n_bits - 1))


# Guarantee.is_noise_secure -> the source of noise
NOISES: dict[bool, Callable[..., list[torch.Tensor]]] = {False: draw_fast_noise, True: draw_secure_noise}


def _random_words(key: bytes, step: int, purpose: str, count: int) -> np.ndarray:
    """(count,) uniform uint64, independent of those of any other step or purpose."""
    assert len(key) == KEY_BYTES
    text = key + step.to_bytes(8, "little") + purpose.encode()
    return np.frombuffer(hashlib.shake_256(text).digest(8 * count), dtype="<u8")
