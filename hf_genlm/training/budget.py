"""What ends a run, the learning rate that follows from it, and the shapes that a size stands for."""

import copy
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hf_genlm.config.recipe import ModelRecipe, Recipe, TrainingRecipe
from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.model import DECODERS, mixers_of
from hf_genlm.model.configuration_genlm import RECURRENT_MIXERS
from hf_genlm.training.private import prefer_private
from hf_genlm.training.processes import clock_of_first, count


@dataclass(frozen=True)
class Shape:
    """Width and depth of the decoder, and the rows that train it well."""

    hidden_size: int
    num_hidden_layers: int
    max_seq_length: int
    batch_size: int


SIZES = {
    "tiny": Shape(hidden_size=192, num_hidden_layers=3, max_seq_length=128, batch_size=16),
    "small": Shape(hidden_size=384, num_hidden_layers=6, max_seq_length=256, batch_size=32),
    "base": Shape(hidden_size=768, num_hidden_layers=12, max_seq_length=512, batch_size=32),
}
_BIGRAM_SIZE = 16_384  # a gated linear recurrence gains by the pairs, a cell does not (recipes/LOG.md)
_RECURRENT_CONTEXT = 256  # tokens
INITS = ("bigrams", "random")
DEFAULT_MINUTES = 3.0
# AdamW's best peak for a width of 256, measured (recipes/LOG.md); it falls with the root of the width
_LEARNING_RATE_AT_256 = 3e-3
_LEAST_DECAY, _MOST_DECAY = 0.1, 6.0
_MEMORY_PASSES = 0.63  # that AdamW's memory of a weight holds, once decay is in full
_ALL_DUE = 4.0  # passes
_LARGEST_STEPS = 10**9
_LARGEST_SIZE = 1e12  # parameters


@dataclass
class Budget:
    """The share of a run that is done: the larger one of steps and, when `seconds` is given, of the clock."""

    steps: int = _LARGEST_STEPS
    seconds: float | None = None
    step_s: float | None = None  # what the planning saw a step take
    spent_s: float = 0.0  # before `start`, by a run that this one goes on from
    clock: Callable[[], float] = field(default=lambda: time.monotonic(), repr=False)  # in seconds
    _started: float | None = field(default=None, repr=False)
    _last_step_s: float = field(default=0.0, repr=False)
    _last_time: float = field(default=0.0, repr=False)
    _agreed: float | None = field(default=None, repr=False)  # of several processes: what the clock says

    def start(self) -> None:
        """Begin the clock, which no change of the time of day moves."""
        self.agree()
        self._last_time = self._now()
        self._started = self._last_time - self.spent_s

    def agree(self) -> None:
        """Several processes read the clock of the first one, which stands still until they agree again: so
        they decide alike. All of them must call this together."""
        if count() > 1:
            self._agreed = clock_of_first(self.clock())

    def note_step(self) -> None:
        """A step has ended."""
        now = self._now()
        self._last_step_s, self._last_time = now - self._last_time, now

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far."""
        return self.spent_s if self._started is None else self._now() - self._started

    def _now(self) -> float:
        return self.clock() if self._agreed is None else self._agreed

    def progress(self, step: float) -> float:
        """The share done after `step` steps, 0 to 1."""
        by_clock = 0.0 if self.seconds is None else self.elapsed_s / self.seconds
        return min(1.0, max(by_clock, step / self.steps))

    def is_spent(self, step: int) -> bool:
        """True if another step would overshoot by more than half of itself."""
        if self.seconds is None or step >= self.steps:
            return step >= self.steps
        return self.elapsed_s + self._last_step_s / 2 >= self.seconds

    def left_s(self, step: int) -> float:
        """Seconds to the end, by the clock or at the pace so far."""
        done = step / self.steps
        by_pace = self.elapsed_s * (1 - done) / done if done else math.inf
        by_clock = math.inf if self.seconds is None else self.seconds - self.elapsed_s
        return max(0.0, min(by_pace, by_clock))


def budget_of(recipe: TrainingRecipe, tokens_per_step: int) -> Budget:
    """The budget that `minutes`, `steps` or `tokens` of a resolved recipe states.

    Raises:
        UserError: more than one of them, or one that is not positive.
    """
    stated = {
        name: getattr(recipe, name)
        for name in ("minutes", "steps", "tokens")
        if getattr(recipe, name) is not None
    }
    if len(stated) > 1:
        raise UserError(f"{' and '.join('--' + name for name in stated)} both end the run: give one of them")
    for name, value in stated.items():
        if value <= 0:
            raise UserError(f"--{name} {value:g} must be more than 0")
    if recipe.steps is not None:
        return Budget(steps=recipe.steps)
    if recipe.tokens is not None:
        return Budget(steps=math.ceil(recipe.tokens / tokens_per_step))
    return Budget(seconds=60 * recipe.minutes)


def trapezoid(progress: float, warmup: float, decay: float) -> float:
    """The share of the peak rate: up over `warmup`, flat, down to 0 over the last `decay` of the run
    (Hägele et al., 2024, arXiv:2405.18392)."""
    up = progress / warmup if warmup > 0 else 1.0
    down = (1.0 - progress) / decay if decay > 0 else 1.0
    return max(0.0, min(1.0, up, down))


def decay_for(passes: float, steps_of_a_pass: float, learning_rate: float) -> float:
    """The weight decay that keeps a text from being learned by heart (measured: recipes/LOG.md).

    AdamW forgets what a weight was with a time constant of 1 / (learning rate x decay) steps, which is best
    stated in passes over the text (Wang and Aitchison, 2024, arXiv:2405.13698). A text that is read once or
    twice needs hardly any; all of it is due from the fourth pass on.
    """
    full = 1 / (learning_rate * _MEMORY_PASSES * steps_of_a_pass)
    share = min(1.0, max(0.0, (passes - 1) / (_ALL_DUE - 1)))
    return float(f"{min(_MOST_DECAY, max(_LEAST_DECAY, share * full)):.2g}")


def resolve(recipe: Recipe, shape: Shape | None = None) -> Recipe:
    """A copy of `recipe` in which every shape and rate that was left open is chosen.

    `shape` is what the size stands for where the recipe has none.

    Raises:
        UserError: an unknown size or decoder, a number outside its rule, or fields that contradict each
            other.
    """
    if recipe.model.mixers is None and recipe.model.decoder not in DECODERS:
        raise UserError(
            f"unknown --decoder {recipe.model.decoder!r}{did_you_mean(recipe.model.decoder, DECODERS)}"
        )
    resolved = copy.deepcopy(recipe)
    model, training = resolved.model, resolved.training
    if (training.minutes, training.steps, training.tokens) == (None, None, None):
        training.minutes = DEFAULT_MINUTES
    if resolved.privacy.epsilon is not None:
        prefer_private(resolved)
    if model.mixers is not None:
        _adopt_mixers(model, model.mixers)
    sizes = (model.hidden_size, model.num_hidden_layers, training.max_seq_length, training.batch_size)
    if model.size is not None or (shape is None and None in sizes):
        model.size = model.size or "tiny"
        shape = _shape_of(model.size)
    if shape is not None:
        model.hidden_size = model.hidden_size or shape.hidden_size
        model.num_hidden_layers = model.num_hidden_layers or shape.num_hidden_layers
        training.max_seq_length = training.max_seq_length or shape.max_seq_length
        training.batch_size = training.batch_size or shape.batch_size
    is_narrow = model.embedding_size is not None  # the person wants few parameters
    mixers = model.mixers or mixers_of(model.decoder, model.num_hidden_layers)
    if model.bigram_size is None:
        model.bigram_size = _BIGRAM_SIZE if mixers[0] == "gated_linear" and not is_narrow else 0
    if model.tie_word_embeddings is None:
        # vectors of words are a poor head (recipes/LOG.md)
        model.tie_word_embeddings = is_narrow and recipe.vectors.path is None
    if training.init is None:
        training.init = "random" if model.tie_word_embeddings else "bigrams"
    if training.embedding_lr_ratio is None:
        training.embedding_lr_ratio = 1.0 if training.init == "bigrams" else 2.0
    if model.output_bias is None:
        model.output_bias = training.init == "bigrams"
    if training.learning_rate is None:
        training.learning_rate = float(f"{_LEARNING_RATE_AT_256 * (256 / model.hidden_size) ** 0.5:.2g}")
    is_recurrent = all(mixer in RECURRENT_MIXERS for mixer in mixers)
    _settle_carrying(resolved, mixers)
    if resolved.evaluation.context_length is None:
        # a state goes on beyond the rows it was trained on, attention does not
        least = _RECURRENT_CONTEXT if is_recurrent else 0
        resolved.evaluation.context_length = max(training.max_seq_length, least)
    resolved.evaluation.stride = resolved.evaluation.stride or max(1, resolved.evaluation.context_length // 2)
    if resolved.evaluation.stride > resolved.evaluation.context_length:
        raise UserError(
            f"evaluation.stride = {resolved.evaluation.stride}: it must lie in 1.."
            f"{resolved.evaluation.context_length}, which is evaluation.context_length"
        )
    if training.init not in INITS:
        raise UserError(f"unknown training.init {training.init!r}{did_you_mean(training.init, INITS)}")
    if training.init == "bigrams" and model.tie_word_embeddings:
        raise UserError(
            "training.init = 'bigrams' fits the head to the text, and model.tie_word_embeddings makes it the "
            "embedding: set one of them otherwise"
        )
    return resolved


def _settle_carrying(resolved: Recipe, mixers: list[str]) -> None:
    """Choose `evaluation.carry_state` where it was left open.

    Raises:
        UserError: a decoder whose layers keep no state, or, for evaluation, not states alone.
    """
    attending = [mixer for mixer in mixers if mixer not in RECURRENT_MIXERS]
    training, evaluation = resolved.training, resolved.evaluation
    if training.carry_state and len(attending) == len(mixers):
        raise UserError(
            f"training.carry_state = true: {attending[0]} layers keep no state that a row could pass on to "
            "the next; choose a decoder with recurrent layers, or set it to false"
        )
    bounded = "learned positions" if resolved.model.position_type == "learned" else None
    bounded = f"{attending[0]} layers" if attending else bounded
    if evaluation.carry_state is None:
        evaluation.carry_state = training.carry_state and bounded is None
    if evaluation.carry_state and bounded is not None:
        raise UserError(
            f"evaluation.carry_state = true: {bounded} do not reach back to the start of a document of any "
            "length; choose a decoder of recurrent layers alone, or set it to false"
        )


def _adopt_mixers(model: ModelRecipe, mixers: list[str]) -> None:
    """The depth is that of the mixers."""
    most = 1000
    if not 1 <= len(mixers) <= most:
        raise UserError(f"model.mixers names {len(mixers)} layers: name from 1 to {most:,}, or a --decoder")
    if model.num_hidden_layers not in (None, len(mixers)):
        raise UserError(
            f"model.num_hidden_layers = {model.num_hidden_layers}, and model.mixers names {len(mixers)}: "
            "leave one of them out"
        )
    model.num_hidden_layers = len(mixers)


def _shape_of(size: str) -> Shape:
    if size in SIZES:
        return SIZES[size]
    number = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([KMB])", size, flags=re.IGNORECASE | re.ASCII)
    if number is None:
        raise UserError(
            f"unknown --size {size!r}{did_you_mean(size, SIZES)}, or a parameter count such as 30M"
        )
    target = float(number[1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[number[2].upper()]
    if not 1 <= target <= _LARGEST_SIZE:
        raise UserError(f"--size {size!r}: from 1 to {_LARGEST_SIZE:,.0f} parameters, such as 30M")
    # a layer holds about 12 d^2 parameters; depth grows with width as in the named sizes (d = 64 per layer)
    width = max(64, 64 * round((target / 12 * 64) ** (1 / 3) / 64))
    layers = max(1, round(target / (12 * width**2)))
    return Shape(width, layers, *_rows_of(width))


def _rows_of(width: int) -> tuple[int, int]:
    nearest = min(SIZES.values(), key=lambda shape: abs(math.log(shape.hidden_size / width)))
    return nearest.max_seq_length, nearest.batch_size
