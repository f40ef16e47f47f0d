"""What happens between the steps of Trainer's loop: the end, the log, validation and samples."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from hf_genlm.run_folder import RunFolder
from hf_genlm.training.budget import Budget
from hf_genlm.training.processes import draw_apart

_LOG_EVERY_S = 0.5
_LINES = 2000  # a log is to be read and drawn, however long its run was
_LARGEST_PART = 0.1
_SAVING_SHARE = 50  # times what a saving takes lie between two
_SLOW, _SLOW_STEPS = 3.0, 5  # times the planned step, that many steps in a row


@dataclass(frozen=True)
class Pace:
    """How many tokens `step` optimizer steps have trained on."""

    n_rows: int | None  # of one pass over the text; None: not known
    rows_per_step: int
    targets_per_row: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return -(-self.n_rows // self.rows_per_step)

    def epochs(self, step: int) -> float | None:
        """Passes over the rows so far; None: not known."""
        return None if self.n_rows is None else round(step / self.steps_per_epoch, 3)

    def tokens(self, step: int) -> int:
        """Predicted tokens so far, repeats counted; the padding of a corpus's last row is counted too."""
        if self.n_rows is None:  # no pass ends with a smaller step
            return step * self.rows_per_step * self.targets_per_row
        epochs, rest = divmod(step, self.steps_per_epoch)
        rows = epochs * self.n_rows + min(rest * self.rows_per_step, self.n_rows)
        return rows * self.targets_per_row


class BudgetCallback(TrainerCallback):
    """Starts the clock and stops the loop when the budget is spent."""

    def __init__(self, budget: Budget):
        self.budget = budget

    def on_train_begin(self, args, state, control, **kwargs):
        draw_apart()
        self.budget.start()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.budget.agree()  # before the next learning rate is read off

    def on_step_end(self, args, state, control, **kwargs):
        self.budget.note_step()
        if self.budget.is_spent(state.global_step):
            control.should_training_stop = True


class ThreadsCallback(TrainerCallback):
    """Goes on by one thread where the steps take many times as long as they did in the planning.

    Something else has taken a core then, and every operation of several threads waits for it. What happens
    between the steps is not counted.
    """

    def __init__(self, run: RunFolder, step_s: float):
        self.run, self.step_s = run, step_s
        self._began = 0.0
        self._slow = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        is_slow = time.monotonic() - self._began > _SLOW * self.step_s
        self._slow = self._slow + 1 if is_slow else 0
        if self._slow >= _SLOW_STEPS and torch.get_num_threads() > 1:
            torch.set_num_threads(1)
            self.run.log("threads", step=state.global_step, threads=1)


class Diverged(ArithmeticError):
    """The loss, or a weight, is not a finite number after `step` steps."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


@dataclass
class _Point:
    """Where a run stood at a `step` event, and the losses and seconds of the steps since, summed."""

    step: int
    tokens: int
    elapsed_s: float
    progress: float
    losses: float = 0.0
    seconds: float = 0.0


class LogCallback(TrainerCallback):
    """Tells the listener of the `step` about twice a second; some of these events stand in the log.

    They are the first, the last, and those before which a 2,000th part of the run was done since the one
    before: a log has 2,000 of them at most, and one for each time that the run was gone on with. The loss of
    an event is the mean of the steps since the one before, in the log of those since the one before there;
    so is the speed, without what ran between those steps and the event before, as a validation.

    Raises:
        Diverged: that loss is not finite.
    """

    def __init__(self, run: RunFolder, budget: Budget, pace: Pace):
        self.run, self.budget, self.pace = run, budget, pace
        self._told = self._written = self._now = _Point(0, 0, 0.0, 0.0)
        self._began_s = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._told = self._at(state.global_step)
        self._written = copy.copy(self._told)
        self._began_s = self._told.elapsed_s

    def on_step_end(self, args, state, control, **kwargs):
        now = self._now = self._at(state.global_step)
        if now.elapsed_s - self._told.elapsed_s >= _LOG_EVERY_S or self._is_end(now.step):
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history.clear()  # Trainer keeps all of it, and writes it to each checkpoint
        if "loss" not in logs:
            return  # Trainer's own summary at the end
        if not math.isfinite(logs["loss"]):
            raise Diverged(state.global_step)
        now = self._now
        for point in (self._told, self._written):
            point.losses += logs["loss"] * (now.step - self._told.step)
            point.seconds += now.elapsed_s - self._began_s
        if now.progress - self._written.progress >= 1 / _LINES or self._is_end(now.step):
            self.run.log("step", **self._fields(now, self._written, logs))
            self._written = copy.copy(now)
        else:
            self.run.tell("step", **self._fields(now, self._told, logs))
        self._told, self._began_s = now, self.budget.elapsed_s

    def _at(self, step: int) -> _Point:
        return _Point(step, self.pace.tokens(step), self.budget.elapsed_s, self.budget.progress(step))

    def _is_end(self, step: int) -> bool:
        return step == 1 or self.budget.is_spent(step)

    def _fields(self, now: _Point, since: _Point, logs: dict[str, float]) -> dict[str, float | None]:
        grad_norm = logs.get("grad_norm", math.nan)
        return {
            "step": now.step,
            "loss": since.losses / (now.step - since.step),
            "learning_rate": logs["learning_rate"],
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens": now.tokens,
            "tokens_per_s": round((now.tokens - since.tokens) / max(since.seconds, 1e-9)),
            "elapsed_s": round(now.elapsed_s, 3),
            "progress": round(now.progress, 5),
            "left_s": round(min(self.budget.left_s(now.step), 1e9), 1),
        }


class HoldRowsCallback(TrainerCallback):
    """Keeps the rows `held` (V,) of the embedding as they are, to the end or through step `unfreeze_step`.

    Their gradients are made zero as they arrive, so that neither the clipping nor the optimizer sees them,
    and what decay takes is put back after each step. Nothing of it stays on the model.
    """

    def __init__(self, held: torch.Tensor, unfreeze_step: int | None = None):
        self.held, self.unfreeze_step = held, unfreeze_step
        self._hook: RemovableHandle | None = None
        self._values: torch.Tensor | None = None  # of the held rows, while they are held

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self._is_over(state.global_step):
            return
        weight = model.get_input_embeddings().weight
        self.held = self.held.to(weight.device)
        self._values = weight.detach()[self.held].clone()
        self._hook = weight.register_hook(lambda gradient: gradient.masked_fill(self.held[:, None], 0.0))

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self._values is not None:
            model.get_input_embeddings().weight[self.held] = self._values

    def on_step_end(self, args, state, control, **kwargs):
        if self._is_over(state.global_step):
            self._release()

    def on_train_end(self, args, state, control, **kwargs):
        self._release()

    def _is_over(self, step: int) -> bool:
        return self.unfreeze_step is not None and step >= self.unfreeze_step

    def _release(self):
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._values = None


class CheckpointCallback(TrainerCallback):
    """Asks for a checkpoint when one is due, and for the last one and the end when a signal has come.

    `was_stopped` says so in all processes alike.
    """

    def __init__(
        self, budget: Budget, every_s: float, every_steps: int | None, was_stopped: Callable[[], bool]
    ):
        self.budget, self.was_stopped = budget, was_stopped
        self.every_s, self.every_steps = every_s, every_steps
        self._saved_s = self._began_s = self._took_s = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._saved_s = self.budget.elapsed_s

    def on_step_end(self, args, state, control, **kwargs):
        self._began_s = self.budget.elapsed_s
        if control.should_training_stop:
            return
        if self.was_stopped():
            control.should_save = control.should_training_stop = True
        else:
            control.should_save = self._is_due(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.budget.agree()
        self._saved_s = self.budget.elapsed_s
        self._took_s = self._saved_s - self._began_s

    def _is_due(self, step: int) -> bool:
        if self.every_steps is not None:
            return self.every_steps > 0 and step % self.every_steps == 0
        return self.budget.elapsed_s - self._saved_s >= max(self.every_s, _SAVING_SHARE * self._took_s)


class MilestoneCallback(TrainerCallback):
    """Calls `act(model, step)` at `count` points spread evenly over the run, its end left out.

    A run by the clock passes one over where the last took more than a tenth of the time that is left.
    """

    def __init__(self, budget: Budget, count: int, act: Callable[[PreTrainedModel, int], None]):
        self.budget, self.count, self.act = budget, count, act
        self._reached = 0
        self._took_s = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._reached = int(self.budget.progress(state.global_step) * (self.count + 1))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        reached = int(self.budget.progress(state.global_step) * (self.count + 1))
        if self._reached < reached <= self.count:
            self._reached = reached
            control.should_log = True  # what is measured has a loss beside it
            is_late = self.budget.seconds is not None and (
                self._took_s > _LARGEST_PART * self.budget.left_s(state.global_step)
            )
            if is_late:
                return
            began = self.budget.elapsed_s
            self.act(model, state.global_step)
            self.budget.agree()
            self._took_s = self.budget.elapsed_s - began


@torch.no_grad()
def write_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, max_new_tokens: int, seed: int
) -> list[str]:
    """`count` texts from the start of a document, temperature 0.8. Global random state is left as it was."""
    was_training = model.training
    model.eval()
    start = torch.full((count, 1), tokenizer.bos_token_id, device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        rows = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=0.8,
            max_new_tokens=max_new_tokens,
            use_cache=True,
        )
    model.train(was_training)
    return tokenizer.batch_decode(rows[:, 1:], skip_special_tokens=True)
