"""One training: what Trainer is given, what is seen and written while it goes on, and what comes of it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from hf_genlm.config.recipe import Recipe, TrainingRecipe
from hf_genlm.errors import Stopped
from hf_genlm.evaluation.aggregation import Window
from hf_genlm.evaluation.languages import count_documents
from hf_genlm.evaluation.likelihood import measure_likelihood
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.files import append_file, note_no_space
from hf_genlm.memory import keeping_memory
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.languages import BalancedRows
from hf_genlm.text.packed_stream import PackedStream
from hf_genlm.text.packing import DocumentWindows, PackedRows, collate
from hf_genlm.training.budget import Budget
from hf_genlm.training.callbacks import (
    BudgetCallback,
    CheckpointCallback,
    FrozenRowsCallback,
    LogCallback,
    MilestoneCallback,
    Pace,
    ThreadsCallback,
    ValidationCallback,
    WordRate,
    milestone_name,
    read_milestones,
    write_samples,
)
from hf_genlm.training.carried_state import StateCallback
from hf_genlm.training.checkpoints import Checkpoint, StopRequest, write_model
from hf_genlm.training.optimizer import OptimizerFactory
from hf_genlm.training.private_step import DrawnSteps, PrivateState, PrivateTrainer, unwrap_batch
from hf_genlm.training.processes import from_first, load_whole
from hf_genlm.training.streamed import StreamCallback, StreamedCorpus
from hf_genlm.training.tokenized import TokenizedCorpus
from hf_genlm.training.trainer import BudgetTrainer

_PARTIAL_VALIDATION_TOKENS = 16_384
_SAMPLE_TOKENS = 64
_VALIDATIONS = 4
_SHORT_S = 29.0  # planning has taken its part of half a minute


Rows = PackedRows | BalancedRows | PackedStream | DocumentWindows


@dataclasses.dataclass
class Job:
    """What a run trains on, and how."""

    rows: Rows
    corpus: TokenizedCorpus | StreamedCorpus
    recipe: Recipe
    budget: Budget
    arguments: TrainingArguments
    carried: StateCallback | None = None  # of training.carry_state
    words: WordRate | None = None  # of training.milestone_words
    frozen_rows: torch.Tensor | None = None  # (V,) rows of the embedding that keep their vectors
    private: PrivateState | None = None  # with a guarantee for each document

    @property
    def pace(self) -> Pace:
        """Steps as tokens; of a private run, as many as its documents have on average."""
        training = self.recipe.training
        if isinstance(self.rows, DocumentWindows):
            return Pace(
                self.rows.n_rows,
                training.batch_size * training.gradient_accumulation_steps,
                max(1, self.rows.n_targets),
            )
        n_rows = self.rows.n_rows if self.carried is None else len(self.carried.sampler)
        return Pace(
            n_rows, training.batch_size * training.gradient_accumulation_steps, training.max_seq_length - 1
        )


def fit(
    run: RunFolder,
    model: GenLMForCausalLM,
    job: Job,
    begin: Checkpoint | None,
    stop: StopRequest,
    lr_scale: float = 1.0,
) -> GenLMForCausalLM | None:
    """Train `model`, from the checkpoint `begin` on if there is one; `lr_scale` multiplies all rates.

    Returns:
        the trained model, whole, in the first process; None in the others.

    Raises:
        Stopped: `stop` was asked for; a checkpoint was written.
        Diverged: the loss became infinite or NaN.
    """
    training, budget = job.recipe.training, job.budget
    if begin is not None:
        budget.seconds, budget.steps = begin.progress.seconds, begin.progress.steps
        budget.spent_s = max(budget.spent_s, begin.progress.elapsed_s)

    def validate(model: GenLMForCausalLM, step: int) -> None:
        whole = trainer.whole_model()
        from_first(lambda: _validate_and_sample(run, whole, job, step))

    def save(model: GenLMForCausalLM, words: int, step: int) -> None:
        whole = trainer.whole_model()
        from_first(lambda: _save_milestone(run, whole, job, words, step))

    trainer = _trainer_of(job)(
        run=run,
        budget=budget,
        recipe=training,
        carried=job.carried,
        lr_scale=lr_scale,
        was_stopped=lambda: stop.is_made,
        is_rate_halved=lr_scale < 1 or (begin is not None and begin.progress.is_rate_halved),
        model=model,
        args=job.arguments,
        train_dataset=job.rows if job.private is None else DrawnSteps(job.rows, job.private),
        data_collator=collate if job.private is None else unwrap_batch,
        optimizer_cls_and_kwargs=(OptimizerFactory, {"recipe": training}),
        callbacks=[
            *_callbacks(run, job, validate),
            *_milestone_callbacks(run, job, save, is_retry=lr_scale < 1),
            _checkpoint_callback(job, lambda: trainer.is_stopped()),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.saved_step = None if begin is None else begin.progress.step
    with keeping_memory(), stop.deferred():
        trainer.train(resume_from_checkpoint=None if begin is None else str(begin.path))
    step, seconds = trainer.state.global_step, budget.elapsed_s
    if not budget.is_spent(step):  # the one other thing that ends it
        run.log("stopped", step=step, checkpoint=trainer.saved_step)
        raise Stopped(str(run.path), trainer.saved_step)
    whole = trainer.whole_model()
    load_whole()
    if whole is None:
        return None
    whole.config.use_cache = True  # Trainer turned it off for training
    _sample(run, whole, job, step)
    _log_end(run, job, step, seconds)
    return whole


def _trainer_of(job: Job) -> Callable[..., BudgetTrainer]:
    if job.private is None:
        return BudgetTrainer
    return functools.partial(PrivateTrainer, job.private, job.recipe.training.batch_size)


def _log_end(run: RunFolder, job: Job, step: int, seconds: float) -> None:
    run.log(
        "trained",
        steps=step,
        tokens=job.pace.tokens(step),
        epochs=job.pace.epochs(step),
        seconds=round(seconds, 2),
        tokens_per_s=round(job.pace.tokens(step) / seconds),
    )


def _callbacks(
    run: RunFolder, job: Job, validate: Callable[[GenLMForCausalLM, int], None]
) -> list[TrainerCallback]:
    training, budget = job.recipe.training, job.budget
    release = job.recipe.vectors.unfreeze_step
    watching = [ThreadsCallback(run, budget.step_s)] if budget.step_s is not None else []
    freezing = [FrozenRowsCallback(job.frozen_rows, release)] if job.frozen_rows is not None else []
    streaming = [StreamCallback(job.rows, job.pace.rows_per_step)] if job.recipe.corpus.stream else []
    return [
        BudgetCallback(budget),  # first: the others read its clock
        LogCallback(run, budget, job.pace, training.logging_steps),
        ValidationCallback(budget, _validations(training, budget), validate),
        *watching,
        *freezing,
        *streaming,
    ]


def _milestone_callbacks(
    run: RunFolder, job: Job, save: Callable[[GenLMForCausalLM, int, int], None], is_retry: bool
) -> list[TrainerCallback]:
    if job.words is None:
        return []
    words = read_milestones(job.recipe.training.milestone_words)
    return [MilestoneCallback(run, job.budget, job.pace, job.words, words, save, is_retry)]


def _checkpoint_callback(job: Job, was_stopped: Callable[[], bool]) -> CheckpointCallback:
    """The last of all: what it lets Trainer write is to hold what the others did."""
    training = job.recipe.training
    every_s, every_steps = 60 * training.save_minutes, training.save_steps
    return CheckpointCallback(job.budget, every_s, every_steps, was_stopped)


def _save_milestone(run: RunFolder, model: GenLMForCausalLM, job: Job, words: int, step: int) -> None:
    """Write the model into milestones/, ready to generate."""
    folder = run.milestones / milestone_name(words)
    folder.parent.mkdir(exist_ok=True)
    uses_cache, model.config.use_cache = model.config.use_cache, True
    failure = write_model(model, job.corpus.tokenizer, folder)
    model.config.use_cache = uses_cache
    if failure is None:
        run.log("milestone", step=step, words=words, folder=folder.name)
    else:
        run.log("note", message=f"{folder.name} was not written: {failure}; training continues")


def _validate_and_sample(run: RunFolder, model: GenLMForCausalLM, job: Job, step: int) -> None:
    """Measure the model on a part of the validation split, and let it write."""
    reached = _reached(job, step)
    found = likelihood_of(model, job.corpus, job.recipe, _PARTIAL_VALIDATION_TOKENS)
    values = {m.name: round(m.value, 5) for m in found}
    spent = {} if job.private is None else {"epsilon": round(job.private.guarantee.spent(step), 4)}
    run.log("validation", step=step, **reached, partial=True, tokens=found[0].n, **values, **spent)
    _sample(run, model, job, step)


def _sample(run: RunFolder, model: GenLMForCausalLM, job: Job, step: int) -> None:
    training = job.recipe.training
    if training.num_samples == 0:
        return
    texts = write_samples(model, job.corpus.tokenizer, training.num_samples, _SAMPLE_TOKENS, training.seed)
    reached = _reached(job, step)
    for text in texts:
        run.log("sample", step=step, **reached, prompt="", text=text)

    def note(reason: str) -> None:
        run.log("note", message=f"the samples of step {step} were not written: {reason}")

    with note_no_space(note), append_file(run.samples) as file:
        markdown = _samples_markdown(f"After step {step}, {reached['elapsed_s']:.1f} s", texts)
        file.write(markdown.encode("utf-8", "replace"))


def _reached(job: Job, step: int) -> dict[str, float]:
    """How far the training has come, for what is seen between its steps."""
    return {"seen_tokens": job.pace.tokens(step), "elapsed_s": round(job.budget.elapsed_s, 3)}


def _validations(training: TrainingRecipe, budget: Budget) -> int:
    """How many there are: a run of seconds has no time for them."""
    if training.num_validations is not None:
        return training.num_validations
    is_short = budget.seconds is not None and budget.seconds < _SHORT_S
    return 0 if is_short else _VALIDATIONS


def likelihood_of(
    model: GenLMForCausalLM,
    corpus: TokenizedCorpus | StreamedCorpus,
    recipe: Recipe,
    max_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_scores: Callable[[Sequence[Window], np.ndarray], None] | None = None,
) -> list[Measurement]:
    """The likelihood of the validation text, as the recipe says, and of each language in a full pass; see
    `measure_likelihood`."""
    languages = corpus.languages if max_tokens is None else {}
    return measure_likelihood(
        model,
        corpus.validation,
        start_id=corpus.tokenizer.bos_token_id,
        context=recipe.evaluation.context_length,
        stride=recipe.evaluation.stride,
        batch_size=recipe.evaluation.batch_size,
        carry_state=recipe.evaluation.carry_state,
        n_words=corpus.validation_words,
        max_tokens=max_tokens,
        parts=count_documents(languages),
        on_progress=on_progress,
        on_scores=on_scores,
    )


def _samples_markdown(title: str, texts: list[str]) -> str:
    """Each text in a fence longer than any run of backticks in it."""
    parts = [f"## {title}\n"]
    for text in texts:
        fence = "```"
        while fence in text:
            fence += "`"
        parts.append(f"{fence}text\n{text}\n{fence}\n")
    return "\n".join(parts) + "\n"
