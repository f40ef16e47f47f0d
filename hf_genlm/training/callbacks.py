"""Callbacks of the training loop: budget, log, validation, milestones, checkpoints, frozen rows, threads."""

import copy
import math
import re
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME

from hf_genlm.config.settings import Pace
from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.files import write_text
from hf_genlm.model.bundle import bundle
from hf_genlm.run_folder import RunFolder
from hf_genlm.training.budget import Budget
from hf_genlm.training.processes import from_first, offset_seed

_EVENT_S = 0.5  # between two `step` events
_MAX_LINES = 2000  # of `step` events in the log of a run, however long
_MAX_VALIDATION_SHARE = 0.1  # of the time that is left
_SAVING_INTERVAL = 50  # times the duration of a save lie between two
_SLOW_FACTOR, _SLOW_STEPS = 3.0, 5  # so many steps in a row took so many times the usual step
_USUAL_STEPS = 50  # whose median is the usual step
_TRIAL_STEPS, _TRIAL_GAIN = 3, 1.2  # of another number of threads: steps, and times as fast that it must be
_TRIAL_EVERY_S, _TRIAL_INTERVAL = 10.0, 50  # seconds, and times its own duration, to the next trial
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
# words after which BabyLM evaluates: every million to 10 M, every ten to 100 M, every hundred to 1,000 M
SCHEDULES = {"babylm": tuple(n * unit * 10**6 for unit in (1, 10, 100) for n in range(1, 11))}


class Diverged(ArithmeticError):
    """The loss or a weight became NaN or infinite; `step` is the number of optimizer steps."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class BudgetCallback(TrainerCallback):
    """Starts the clock of the budget, and stops the loop when the budget is spent."""

    def __init__(self, budget: Budget):
        self.budget = budget

    def on_train_begin(self, args, state, control, **kwargs):
        offset_seed()
        self.budget.start()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.budget.agree()  # before the next learning rate is read

    def on_step_end(self, args, state, control, **kwargs):
        self.budget.note_step()
        if self.budget.is_spent(state.global_step):
            control.should_training_stop = True


class ThreadsCallback(TrainerCallback):
    """Measures the number of threads again while the run trains: `most`, or one on a busy machine.

    There every operation of several threads waits for the last of them. One thread is tried after steps that
    took several times as long as those before, and `most` from time to time while one is used; the number
    that makes faster steps is kept. An idle machine tries nothing, since the number of threads changes how
    sums are rounded. Time between the steps is not counted. A stated number is kept; every number is logged.
    """

    def __init__(self, run: RunFolder, most: int, is_stated: bool = False):
        self.run, self.most, self.is_stated = run, most, is_stated
        self._began = self._next_s = 0.0
        self._n_slow = 0
        self._usual: deque[float] = deque(maxlen=_USUAL_STEPS)  # seconds of the last steps
        self._trial: list[float] | None = None  # seconds of steps by the other number of threads

    def on_train_begin(self, args, state, control, **kwargs):
        self._next_s = time.perf_counter() + _TRIAL_EVERY_S
        self._log(state)

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_stated:
            return
        now = time.perf_counter()
        step_s = now - self._began
        if self._trial is not None:
            self._judge(step_s, now, state)
            return
        usual_s = statistics.median(self._usual) if len(self._usual) >= _SLOW_STEPS else math.inf
        self._n_slow = self._n_slow + 1 if step_s > _SLOW_FACTOR * usual_s else 0
        self._usual.append(step_s)
        is_slow = self._n_slow >= _SLOW_STEPS and torch.get_num_threads() > 1
        if is_slow or (torch.get_num_threads() < self.most and now >= self._next_s):
            self._usual = deque(list(self._usual)[-_SLOW_STEPS:], maxlen=_USUAL_STEPS)
            self._trial, self._n_slow = [], 0
            self._exchange()

    def _judge(self, step_s: float, now: float, state: TrainerState) -> None:
        """Keep the threads of the trial, or return to the others."""
        assert self._trial is not None
        self._trial.append(step_s)
        before_s = statistics.median(self._usual)
        if len(self._trial) < _TRIAL_STEPS and step_s < _SLOW_FACTOR * before_s:
            return
        self._next_s = now + max(_TRIAL_EVERY_S, _TRIAL_INTERVAL * sum(self._trial))
        if before_s > _TRIAL_GAIN * min(self._trial):
            self._usual = deque(self._trial, maxlen=_USUAL_STEPS)
            self._log(state)
        else:
            self._exchange()
        self._trial = None

    def _exchange(self) -> None:
        torch.set_num_threads(1 if torch.get_num_threads() > 1 else self.most)

    def _log(self, state: TrainerState) -> None:
        self.run.log("threads", step=state.global_step, threads=torch.get_num_threads(), most=self.most)


@dataclass
class _Point:
    """State of a run at a `step` event, and the sums of losses and seconds of the steps since."""

    step: int
    tokens: int
    elapsed_s: float
    progress: float
    loss_sum: float = 0.0
    seconds: float = 0.0


class LogCallback(TrainerCallback):
    """Sends `step` events to the listener, and writes at most 2,000 of them to the log.

    An event comes about twice a second, or every `every_steps` steps. Written are the first, the last, and
    those before which a 2,000th part of the run was done since the one before; each resumption adds one. The
    loss of an event is the mean over the steps since the event before it, in the log since the one written
    before; so is the speed, without what ran between the steps, as a validation.

    Raises:
        Diverged: the loss is NaN or infinite.
    """

    def __init__(self, run: RunFolder, budget: Budget, pace: Pace, every_steps: int | None = None):
        self.run, self.budget, self.pace, self.every_steps = run, budget, pace, every_steps
        self._sent = self._written = self._now = _Point(0, 0, 0.0, 0.0)
        self._began_s = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._sent = self._at(state.global_step)
        self._written = copy.copy(self._sent)
        self._began_s = self._sent.elapsed_s

    def on_step_end(self, args, state, control, **kwargs):
        now = self._now = self._at(state.global_step)
        if self.every_steps is None:
            is_due = now.elapsed_s - self._sent.elapsed_s >= _EVENT_S
        else:
            is_due = now.step % self.every_steps == 0
        if is_due or self._is_end(now.step):
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history.clear()  # Trainer keeps all of it, and writes it to each checkpoint
        if "loss" not in logs:
            return  # Trainer's own summary at the end
        if not math.isfinite(logs["loss"]):
            raise Diverged(state.global_step)
        now = self._now
        for point in (self._sent, self._written):
            point.loss_sum += logs["loss"] * (now.step - self._sent.step)
            point.seconds += now.elapsed_s - self._began_s
        if now.progress - self._written.progress >= 1 / _MAX_LINES or self._is_end(now.step):
            self.run.log("step", **self._fields(now, self._written, logs))
            self._written = copy.copy(now)
        else:
            self.run.tell("step", **self._fields(now, self._sent, logs))
        self._sent, self._began_s = now, self.budget.elapsed_s

    def _at(self, step: int) -> _Point:
        return _Point(step, self.pace.tokens(step), self.budget.elapsed_s, self.budget.progress(step))

    def _is_end(self, step: int) -> bool:
        return step == 1 or self.budget.is_spent(step)

    def _fields(self, now: _Point, since: _Point, logs: dict[str, float]) -> dict[str, float | None]:
        grad_norm = logs.get("grad_norm", math.nan)
        return {
            "step": now.step,
            "steps": self.budget.steps if self.budget.seconds is None else None,
            "loss": since.loss_sum / (now.step - since.step),
            "learning_rate": logs["learning_rate"],
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens": now.tokens,
            "tokens_per_s": round((now.tokens - since.tokens) / max(since.seconds, 1e-9)),
            "elapsed_s": round(now.elapsed_s, 3),
            "progress": round(now.progress, 5),
            "left_s": round(min(self.budget.left_s(now.step), 1e9), 1),
        }


class FrozenRowsCallback(TrainerCallback):
    """Keeps the rows `frozen_rows` (V,) of the embedding, to the end or through step `unfreeze_step`.

    A hook zeroes their gradients before clipping and optimizer see them, and after each step their values are
    restored, as weight decay changes them. The hook is removed at the end.
    """

    def __init__(self, frozen_rows: torch.Tensor, unfreeze_step: int | None = None):
        self.frozen_rows, self.unfreeze_step = frozen_rows, unfreeze_step
        self._hook: RemovableHandle | None = None
        self._values: torch.Tensor | None = None  # of the rows, while they are frozen

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self._is_over(state.global_step):
            return
        weight = model.get_input_embeddings().weight
        self.frozen_rows = self.frozen_rows.to(weight.device)
        self._values = weight.detach()[self.frozen_rows].clone()
        self._hook = weight.register_hook(lambda grad: grad.masked_fill(self.frozen_rows[:, None], 0.0))

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self._values is not None:
            model.get_input_embeddings().weight[self.frozen_rows] = self._values

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
    """Asks for a checkpoint when one is due; after a signal, for the last checkpoint and the end.

    `was_stopped` returns the same in all processes.
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
        elif self.every_steps is not None:
            control.should_save = self.every_steps > 0 and state.global_step % self.every_steps == 0
        else:
            interval_s = max(self.every_s, _SAVING_INTERVAL * self._took_s)
            control.should_save = self._began_s - self._saved_s >= interval_s

    def on_save(self, args, state, control, **kwargs):
        self.budget.agree()
        self._saved_s = self.budget.elapsed_s
        self._took_s = self._saved_s - self._began_s


class ValidationCallback(TrainerCallback):
    """Calls `validate(model, step)` at `count` points spread evenly over the run, without its end.

    With a time budget, a point is skipped if the last call took more than a tenth of the time that is left.
    """

    def __init__(self, budget: Budget, count: int, validate: Callable[[PreTrainedModel, int], None]):
        self.budget, self.count, self.validate = budget, count, validate
        self._reached = 0
        self._took_s = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._reached = int(self.budget.progress(state.global_step) * (self.count + 1))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        reached = int(self.budget.progress(state.global_step) * (self.count + 1))
        if self._reached < reached <= self.count:
            self._reached = reached
            control.should_log = True  # so that a validation has a training loss beside it
            is_late = self.budget.seconds is not None and (
                self._took_s > _MAX_VALIDATION_SHARE * self.budget.left_s(state.global_step)
            )
            if is_late:
                return
            began = self.budget.elapsed_s
            self.validate(model, state.global_step)
            self.budget.agree()
            self._took_s = self.budget.elapsed_s - began


@dataclass(frozen=True)
class WordRate:
    """`words` of text for `tokens` predicted in it, as `Pace` counts them. Words are those of `str.split`."""

    words: int
    tokens: int

    def words_in(self, tokens: int) -> int:
        """Words seen after so many tokens: exact at the end of an epoch, a mean within it."""
        return tokens * self.words // self.tokens


def read_milestones(stated: Sequence[str]) -> list[int]:
    """Parse `training.milestone_words` into ascending numbers of words.

    Raises:
        UserError: an entry that is neither a number nor a schedule.
    """
    found: set[int] = set()
    for word in stated:
        number = re.fullmatch(r"([0-9]{1,15})([KMB]?)", word, flags=re.IGNORECASE | re.ASCII)
        if number is not None and int(number[1]) > 0:
            found.add(int(number[1]) * _UNITS[number[2].upper()])
        elif word in SCHEDULES:
            found.update(SCHEDULES[word])
        else:
            near = did_you_mean(word, SCHEDULES)
            raise UserError(f"training.milestone_words: {word!r} is no number such as 500K or 1M{near}")
    return sorted(found)


def milestone_name(words: int) -> str:
    """Folder and Hub branch of a milestone: `chck_1M`, `chck_250K`, `chck_123`."""
    unit = next(unit for unit in ("M", "K", "") if words % _UNITS[unit] == 0)
    return f"chck_{words // _UNITS[unit]}{unit}"


class MilestoneCallback(TrainerCallback):
    """Calls `save(model, words, step)` after the first step that has seen so many words, for each of `words`.

    Milestones that exist in the run folder are not written again, except in a retry at half the learning
    rate, which removes those ahead of it. With a time budget, one is left out if writing the last one took
    more time than is left.
    """

    def __init__(
        self,
        run: RunFolder,
        budget: Budget,
        pace: Pace,
        rate: WordRate,
        words: Sequence[int],
        save: Callable[[PreTrainedModel, int, int], None],
        is_retry: bool = False,
    ):
        self.run, self.budget, self.pace, self.rate, self.save = run, budget, pace, rate, save
        self.words, self.is_retry = list(words), is_retry
        self._took_s = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        seen = self.rate.words_in(self.pace.tokens(state.global_step))
        ahead = [words for words in self.words if words > seen]
        self.words = from_first(lambda: self._missing(ahead))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        seen = self.rate.words_in(self.pace.tokens(state.global_step))
        while self.words and self.words[0] <= seen:
            words = self.words.pop(0)
            left_s = None if self.budget.seconds is None else self.budget.seconds - self.budget.elapsed_s
            if left_s is not None and self._took_s > max(0.0, left_s):
                self.run.log(
                    "note", message=f"{milestone_name(words)} was not written: no time was left for it"
                )
                continue
            control.should_log = True
            began = self.budget.elapsed_s
            self.save(model, words, state.global_step)
            self.budget.agree()
            self._took_s = self.budget.elapsed_s - began

    def on_train_end(self, args, state, control, **kwargs):
        if self.words and self.budget.is_spent(state.global_step):
            names = ", ".join(map(milestone_name, self.words[:5])) + (", .." if len(self.words) > 5 else "")
            seen = self.rate.words_in(self.pace.tokens(state.global_step))
            self.run.log(
                "note",
                message=f"milestones that were not reached: {names}; the run saw {seen:,} words. --minutes, "
                "--steps or --tokens make it longer",
            )

    def _missing(self, words: Sequence[int]) -> list[int]:
        folders = {count: self.run.milestones / milestone_name(count) for count in words}
        if self.is_retry:
            for folder in folders.values():
                shutil.rmtree(folder, ignore_errors=True)
        return [count for count, folder in folders.items() if not folder.is_dir()]


@torch.no_grad()
def write_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    max_new_tokens: int,
    seed: int,
    prompt: Sequence[int] = (),
) -> list[str]:
    """Generate `count` texts from the start of a document, or behind the tokens `prompt`, at temperature 0.8.

    The global random state is unchanged.
    """
    was_training = model.training
    model.eval()
    start = torch.tensor([[tokenizer.bos_token_id, *prompt]] * count, device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        rows = model.generate(  # type: ignore[operator]
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=0.8,
            max_new_tokens=max_new_tokens,
            use_cache=True,
        )
    model.train(was_training)
    return tokenizer.batch_decode(rows[:, start.shape[1] :], skip_special_tokens=True)


class PushWithCode(TrainerCallback):
    """Add the model's code to every push of `push_to_hub=True`, and exclude training_args.bin.

    Trainer copies config and weights of a checkpoint into the folder that it pushes, but no code, so the
    repository cannot be loaded before the last push. It also uploads its arguments as a pickle.

    Usage: `Trainer(..., callbacks=[PushWithCode()])`.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.push_to_hub:
            self.on_push_begin(args, state, control)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in bundle().items():
            write_text(folder / name, text)
        gitignore = folder / ".gitignore"  # the Hub skips the files that it names
        rules = gitignore.read_text(encoding="utf-8").splitlines() if gitignore.is_file() else []
        if TRAINING_ARGS_NAME not in rules:
            write_text(gitignore, "\n".join([*rules, TRAINING_ARGS_NAME]) + "\n")
