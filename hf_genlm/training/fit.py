"""Fit the model: run Trainer with our callbacks, validate and sample along the way, and return the model."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments

from hf_genlm.config.settings import Pace, Settings
from hf_genlm.errors import Stopped, UserError
from hf_genlm.evaluation.aggregation import Window
from hf_genlm.evaluation.languages import count_documents
from hf_genlm.evaluation.likelihood import measure_likelihood
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.files import append_file, note_no_space
from hf_genlm.memory import check_sizes, keeping_memory
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.packed_stream import PackedStream
from hf_genlm.text.packing import DocumentWindows, collate
from hf_genlm.training.budget import Budget
from hf_genlm.training.callbacks import (
    BudgetCallback,
    CheckpointCallback,
    Diverged,
    FrozenRowsCallback,
    LogCallback,
    MilestoneCallback,
    ThreadsCallback,
    ValidationCallback,
    WordRate,
    milestone_name,
    read_milestones,
    write_samples,
)
from hf_genlm.training.carried_state import StateCallback
from hf_genlm.training.checkpoints import Checkpoint, StopRequest, write_model
from hf_genlm.training.corpus import Rows, StreamCallback, StreamedCorpus, TokenizedCorpus
from hf_genlm.training.counting import NgramCounts
from hf_genlm.training.optimizer import OptimizerFactory
from hf_genlm.training.private import DrawnSteps, PrivateState, PrivateTrainer, unwrap_batch
from hf_genlm.training.processes import LostProcess, detect_lost_process, from_first, load_whole_models
from hf_genlm.training.trainer import BudgetTrainer

_PARTIAL_VALIDATION_TOKENS = 16_384
_SAMPLE_TOKENS = 64
_PROMPT_TOKENS = 256


@dataclasses.dataclass
class Job:
    """Everything that a training needs besides the model."""

    rows: Rows
    corpus: TokenizedCorpus | StreamedCorpus
    settings: Settings
    budget: Budget
    arguments: TrainingArguments
    carried: StateCallback | None = None  # of training.carry_state
    words: WordRate | None = None  # of training.milestone_words
    frozen_rows: torch.Tensor | None = None  # (V,) rows of the embedding that keep their vectors
    private: PrivateState | None = None  # of a run with a guarantee for each document
    threads: ThreadsCallback | None = None  # of a run on a CPU
    counts: NgramCounts | None = None  # that the model holds, in the first process
    leave_one_out: bool = False  # a word of the training text finds its own count in the model

    @property
    def pace(self) -> Pace:
        """Tokens by step; of a private run, as many as its documents have on average."""
        training, rows = self.settings.training, self.rows
        if isinstance(rows, DocumentWindows):
            return Pace(rows.n_rows, training.rows_per_step, max(1, rows.n_targets))
        n_rows = rows.n_rows if self.carried is None else len(self.carried.sampler)
        n_targets = None if self.carried or isinstance(rows, PackedStream) else rows.n_targets
        return Pace(n_rows, training.rows_per_step, training.max_seq_length - 1, n_targets)

    def reached(self, step: int) -> dict[str, float]:
        """Position in the training, for events between its steps."""
        return {"seen_tokens": self.pace.tokens(step), "elapsed_s": round(self.budget.elapsed_s, 3)}


def fit(
    run: RunFolder,
    model: GenLMForCausalLM,
    job: Job,
    begin: Checkpoint | None,
    stop: StopRequest,
    lr_scale: float = 1.0,
) -> GenLMForCausalLM | None:
    """Train `model`, from the checkpoint `begin` if there is one; `lr_scale` multiplies all learning rates.

    Returns:
        The trained model, whole, in the first process; None in the others.

    Raises:
        Stopped: `stop` was asked for; a checkpoint was written.
        Diverged: the loss became infinite or NaN.
    """
    training, budget = job.settings.training, job.budget
    if begin is not None:
        budget.seconds, budget.steps = begin.progress.seconds, begin.progress.steps
        budget.spent_s = max(budget.spent_s, begin.progress.elapsed_s)

    def on_whole_model(act: Callable[[GenLMForCausalLM], None]) -> None:
        whole = trainer.whole_model()
        from_first(lambda: act(whole))  # type: ignore[arg-type]

    rows: Rows | DrawnSteps = job.rows
    make_trainer: Callable[..., BudgetTrainer] = BudgetTrainer
    if job.private is not None:
        assert isinstance(job.rows, DocumentWindows)
        rows = DrawnSteps(job.rows, job.private)
        make_trainer = functools.partial(PrivateTrainer, job.private, training.batch_size)
        # the clock depends on the drawn documents: rate and end follow the steps that were accounted for
        budget.seconds, budget.steps = None, job.private.guarantee.steps
    trainer = make_trainer(
        run=run, budget=budget, recipe=training, carried=job.carried, lr_scale=lr_scale,
        was_stopped=lambda: stop.is_made, leave_one_out=job.leave_one_out,
        is_rate_halved=lr_scale < 1 or (begin is not None and begin.progress.is_rate_halved), model=model,
        args=job.arguments, train_dataset=rows,
        data_collator=collate if job.private is None else unwrap_batch,
        optimizer_cls_and_kwargs=(OptimizerFactory, {"recipe": training}),
        callbacks=_callbacks(run, job, on_whole_model, lambda: trainer.is_stopped(), is_retry=lr_scale < 1),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.saved_step = None if begin is None else begin.progress.step
    with keeping_memory(), _resuming(begin, trainer):
        trainer.train(resume_from_checkpoint=None if begin is None else str(begin.path))
    step, seconds = trainer.state.global_step, budget.elapsed_s
    if not budget.is_spent(step):  # only a stop request ends a run early
        run.log("stopped", step=step, checkpoint=trainer.saved_step)
        raise Stopped(str(run.path), trainer.saved_step)
    whole = trainer.whole_model()
    load_whole_models()
    if whole is None:
        return None
    whole.config.use_cache = True  # Trainer turned it off for training
    sample(run, job, whole, step)
    run.log(
        "trained",
        steps=step,
        tokens=job.pace.tokens(step),
        epochs=job.pace.epochs(step),
        seconds=round(seconds, 2),
        tokens_per_s=round(job.pace.tokens(step) / seconds),
    )
    return whole


@contextlib.contextmanager
def _resuming(begin: Checkpoint | None, trainer: BudgetTrainer) -> Iterator[None]:
    """Name the checkpoint in an error that is raised before the first step after it.

    Trainer and torch read its files; one that does not fit raises anything, a state of the optimizer only in
    the step that uses it.

    Raises:
        UserError: the training cannot begin from the checkpoint.
    """
    try:
        if begin is not None:
            check_sizes(begin.path)
            state = TrainerState.load_from_json(str(begin.path / "trainer_state.json"))
            if state.global_step != begin.progress.step:
                raise ValueError("trainer_state.json is of another step")
            for name, value in vars(TrainerState()).items():
                kind = (int, float) if type(value) in (int, float) else type(value)
                if value is not None and not isinstance(getattr(state, name), kind):
                    raise ValueError(f"{name} in trainer_state.json is not of its type")
        with detect_lost_process():
            yield
    except (UserError, Diverged, LostProcess, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if begin is None or trainer.state.global_step > begin.progress.step:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the run cannot be resumed from {str(begin.path)!r} ({reason}): remove this folder, and the run "
            "resumes from the checkpoint before, or from its beginning"
        ) from error


def _callbacks(
    run: RunFolder,
    job: Job,
    on_whole_model: Callable[[Callable[[GenLMForCausalLM], None]], None],
    is_stopped: Callable[[], bool],
    is_retry: bool,
) -> list[TrainerCallback]:
    """Callbacks in the order in which Trainer calls them. `on_whole_model` calls its argument with the model
    in the first process; all processes call it."""
    settings, budget = job.settings, job.budget
    training = settings.training
    validate = functools.partial(_validate_and_sample, run, job)
    save = functools.partial(_save_milestone, run, job)
    found: list[TrainerCallback] = [
        BudgetCallback(budget),  # first: the others read its clock
        LogCallback(run, budget, job.pace, training.logging_steps),
        ValidationCallback(
            budget, training.num_validations, lambda _, step: on_whole_model(lambda m: validate(m, step))
        ),
    ]
    if job.threads is not None:
        found.append(job.threads)
    if job.frozen_rows is not None:
        found.append(FrozenRowsCallback(job.frozen_rows, settings.vectors.unfreeze_step))
    if isinstance(job.rows, PackedStream):
        found.append(StreamCallback(job.rows, training.rows_per_step))
    if job.words is not None:
        words = read_milestones(training.milestone_words)
        found.append(
            MilestoneCallback(
                run, budget, job.pace, job.words, words,
                lambda _, n_words, step: on_whole_model(lambda m: save(m, n_words, step)),
                is_retry=is_retry,
            )
        )  # fmt: skip
    every_s = 60 * training.save_minutes
    # last: a checkpoint holds the states of the callbacks before it
    return [*found, CheckpointCallback(budget, every_s, training.save_steps, is_stopped)]


def _save_milestone(run: RunFolder, job: Job, model: GenLMForCausalLM, words: int, step: int) -> None:
    """Write the model to milestones/, ready to generate."""
    folder = run.milestones / milestone_name(words)
    folder.parent.mkdir(exist_ok=True)
    uses_cache, model.config.use_cache = model.config.use_cache, True
    failure = write_model(model, job.corpus.tokenizer, folder)
    model.config.use_cache = uses_cache
    if failure is None:
        run.log("milestone", step=step, words=words, folder=folder.name)
    else:
        run.log("note", message=f"{folder.name} was not written: {failure}; training continues")


def _validate_and_sample(run: RunFolder, job: Job, model: GenLMForCausalLM, step: int) -> None:
    """Measure the model on a part of the validation split, and write samples."""
    reached = job.reached(step)
    found = likelihood_of(model, job.corpus, job.settings, _PARTIAL_VALIDATION_TOKENS)
    values = {m.name: round(m.value, 5) for m in found}
    spent = {} if job.private is None else {"epsilon": round(job.private.guarantee.spent(step), 4)}
    run.log("validation", step=step, **reached, partial=True, tokens=found[0].n, **values, **spent)
    sample(run, job, model, step)


def sample(run: RunFolder, job: Job, model: GenLMForCausalLM, step: int) -> None:
    """Log texts that `model` generates."""
    training = job.settings.training
    if training.num_samples == 0:
        return
    tokenizer, validation = job.corpus.tokenizer, job.corpus.validation
    prompt: list[int] = []
    if validation.targets is not None:  # of a held-out chat, as far as its first answer
        prompt = validation[0][0][: validation.targets_of(0).argmax()][-_PROMPT_TOKENS:].tolist()
    texts = write_samples(model, tokenizer, training.num_samples, _SAMPLE_TOKENS, training.seed, prompt)
    reached = job.reached(step)
    for text in texts:
        run.log("sample", step=step, **reached, prompt=tokenizer.decode(prompt), text=text)

    def note(reason: str) -> None:
        run.log("note", message=f"the samples of step {step} were not written: {reason}")

    with note_no_space(note), append_file(run.samples) as file:
        markdown = _samples_markdown(f"After step {step}, {reached['elapsed_s']:.1f} s", texts)
        file.write(markdown.encode("utf-8", "replace"))


def likelihood_of(
    model: GenLMForCausalLM,
    corpus: TokenizedCorpus | StreamedCorpus,
    settings: Settings,
    max_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_scores: Callable[[Sequence[Window], np.ndarray], None] | None = None,
) -> list[Measurement]:
    """Measure the likelihood of the validation text by the evaluation settings, and of each language in a
    full pass; see `measure_likelihood`."""
    languages = corpus.languages if max_tokens is None else {}
    evaluation = settings.evaluation
    return measure_likelihood(
        model, corpus.validation, start_id=corpus.tokenizer.bos_token_id, context=evaluation.context_length,
        stride=evaluation.stride, batch_size=evaluation.batch_size, carry_state=evaluation.carry_state,
        n_words=corpus.validation_words, max_tokens=max_tokens, parts=count_documents(languages),
        on_progress=on_progress, on_scores=on_scores,
    )  # fmt: skip


def _samples_markdown(title: str, texts: list[str]) -> str:
    """Each text in a fence longer than any run of backticks in it."""
    parts = [f"## {title}\n"]
    for text in texts:
        fence = "```"
        while fence in text:
            fence += "`"
        parts.append(f"{fence}text\n{text}\n{fence}\n")
    return "\n".join(parts) + "\n"
