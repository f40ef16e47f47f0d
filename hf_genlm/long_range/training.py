"""Train a small decoder on a synthetic task; every decoder is trained in the same way.

Rows are made as they are needed; all rows of a step have one size. Curriculum: in the first half of a run,
each size in ascending order for an equal time; in the second half, a random size per step. Batches of long
rows are smaller, so that every step reads about the same number of tokens. The loss is that of the answers
only.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import cross_entropy

from hf_genlm.config.recipe import TrainingRecipe
from hf_genlm.errors import UserError
from hf_genlm.long_range.tasks import IGNORED, TASKS, Task
from hf_genlm.model import GenLMConfig, GenLMForCausalLM
from hf_genlm.model.configuration_genlm import mixers_of
from hf_genlm.training.optimizer import OptimizerFactory

_CURRICULUM = 0.5  # part of a run in which the sizes ascend
_DECAY = 0.5  # part of a run, at its end, in which the learning rates decay to zero
_WARMUP_STEPS = 20
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class TaskRun:
    """Settings of a training run; `steps` or `minutes` ends it, whichever comes first."""

    task: str
    decoder: str
    seed: int
    sizes: tuple[int, ...]
    steps: int | None = 400
    minutes: float | None = None
    hidden_size: int = 64
    num_hidden_layers: int = 2
    tokens_per_step: int = 4096
    learning_rate: float = 3e-3  # of AdamW's part of Muon, as training.learning_rate

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise UserError("a run needs a budget: give --steps or --minutes")
        if self.minutes is not None and self.minutes <= 0:
            raise UserError(f"minutes = {self.minutes}: must be more than 0")
        if self.learning_rate <= 0:
            raise UserError(f"a rate of {self.learning_rate}: must be more than 0")

    @property
    def name(self) -> str:
        """Name of its file: task, decoder, seed, learning rate."""
        return f"{self.task}-{self.decoder}-{self.seed}-{self.learning_rate:g}"

    def to_json(self) -> dict[str, Any]:
        """The fields by name, in JSON types."""
        return {**asdict(self), "sizes": list(self.sizes)}


@dataclass(frozen=True)
class Trained:
    """A trained model in evaluation mode, and its cost."""

    model: GenLMForCausalLM
    steps: int
    seconds: float
    loss: float  # of the last step, nats per answer

    @property
    def n_parameters(self) -> int:
        """Number of parameters; shared ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def train_on_task(run: TaskRun, on_progress: Callable[[float, str], None] | None = None) -> Trained:
    """Train a model from scratch. A budget of steps gives the same weights on the same machine.

    Args:
        on_progress: called with (share of the run that is done, facts to show) at each step.
    """
    task, generator = TASKS[run.task], np.random.default_rng(run.seed)
    model = new_model(run)
    recipe = TrainingRecipe(
        learning_rate=run.learning_rate, embedding_lr_ratio=1.0, weight_decay=0.0, optimizer="muon"
    )
    optimizer = OptimizerFactory()(model, recipe)
    peaks = [group["lr"] for group in optimizer.param_groups]
    begin, steps, last_loss = time.monotonic(), 0, float("nan")
    for steps, progress in _progress(run, begin):
        size = draw_size(run.sizes, progress, generator)
        rate = min(1.0, steps / _WARMUP_STEPS, (1 - progress) / _DECAY)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        optimizer.zero_grad()
        loss, accuracy = _loss(
            model, task, size, max(1, run.tokens_per_step // task.n_tokens(size)), generator
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
        optimizer.step()
        last_loss = loss.item()
        if on_progress is not None:
            facts = f"step {steps}  {size} {task.size_name}  loss {last_loss:.3f}  accuracy {accuracy:.2f}"
            on_progress(progress, facts)
    return Trained(model.eval(), steps, time.monotonic() - begin, last_loss)


def new_model(run: TaskRun) -> GenLMForCausalLM:
    """Build a decoder preset for the task, with weights drawn from the seed.

    The embedding is not tied: a question and its answer need no similar vectors.

    Raises:
        UserError: a width or a number of layers that the decoder cannot have.
    """
    task = TASKS[run.task]
    torch.manual_seed(run.seed)
    try:
        config = GenLMConfig(
            vocab_size=task.vocab_size,
            mixer_types=mixers_of(run.decoder, run.num_hidden_layers),
            hidden_size=run.hidden_size,
            intermediate_size=2 * run.hidden_size,
            max_position_embeddings=task.n_tokens(max(run.sizes)),
            tie_word_embeddings=False,
        )
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(
            f"a {run.decoder} of width {run.hidden_size} and {run.num_hidden_layers} layers: {reason}"
        ) from error
    model = GenLMForCausalLM(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its type
    return model.train()


def draw_size(sizes: tuple[int, ...], progress: float, generator: np.random.Generator) -> int:
    """Draw the size of a step at `progress` (0 to 1) of a run, by the curriculum."""
    if progress < _CURRICULUM:
        return sizes[int(len(sizes) * progress / _CURRICULUM)]
    return sizes[generator.integers(len(sizes))]


def _progress(run: TaskRun, begin: float) -> Iterator[tuple[int, float]]:
    """Yield the number of each step, from 1, and the share of the run before it."""
    step = 0
    while True:
        by_steps = step / run.steps if run.steps else 0.0
        by_time = (time.monotonic() - begin) / (60 * run.minutes) if run.minutes else 0.0
        progress = max(by_steps, by_time)
        if progress >= 1:
            return
        step += 1
        yield step, progress


def _loss(
    model: GenLMForCausalLM, task: Task, size: int, n_rows: int, generator: np.random.Generator
) -> tuple[torch.Tensor, float]:
    """Mean loss of the answers in nats, and their accuracy. The head computes only their logits."""
    batch = task.batch(generator, n_rows, size)
    inputs_BT = torch.from_numpy(batch.inputs).to(model.device)
    targets_BT = torch.from_numpy(batch.targets).to(model.device)
    asked_BT = targets_BT != IGNORED
    hidden_BTD = model.model(input_ids=inputs_BT, use_cache=False).last_hidden_state
    logits_NV, targets_N = model.lm_head(hidden_BTD[asked_BT]), targets_BT[asked_BT]
    accuracy = (logits_NV.detach().argmax(dim=-1) == targets_N).float().mean().item()
    return cross_entropy(logits_NV, targets_N), accuracy
