"""Trainer as a run uses it: its arguments, a rate that follows the budget, and what happens between steps."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_genlm.errors import Stopped, UserError, did_you_mean
from hf_genlm.evaluation.likelihood import measure_likelihood
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.memory import keeping_memory
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.recipe import Recipe, TrainingRecipe
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.packing import PackedRows, collate
from hf_genlm.training.budget import Budget, trapezoid
from hf_genlm.training.callbacks import (
    BudgetCallback,
    CheckpointCallback,
    Diverged,
    HoldRowsCallback,
    LogCallback,
    MilestoneCallback,
    Pace,
    ThreadsCallback,
    write_samples,
)
from hf_genlm.training.checkpoints import Checkpoint, Progress, clear_parts, full_disk_as, part_of, seal
from hf_genlm.training.optimizer import OptimizerFactory
from hf_genlm.training.processes import (
    RowsAndBlank,
    SharedOrder,
    all_of,
    count,
    from_first,
    is_first,
    is_sharded,
    rows_of_each,
    shard_on_cpu,
)
from hf_genlm.training.signals import StopRequest
from hf_genlm.training.tokenized import TokenizedCorpus

_PARTIAL_VALIDATION_TOKENS = 16_384
_SAMPLE_TOKENS = 64
_VALIDATIONS = 4
_SHORT_S = 29.0  # planning has taken its part of half a minute


@dataclasses.dataclass
class Job:
    """What a run trains on, and how. `held` (V,): the rows of the embedding that keep their vectors."""

    rows: PackedRows
    corpus: TokenizedCorpus
    recipe: Recipe
    budget: Budget
    arguments: TrainingArguments
    held: torch.Tensor | None = None

    @property
    def pace(self) -> Pace:
        """Steps as tokens."""
        training = self.recipe.training
        return Pace(len(self.rows), training.batch_size * training.accumulation, training.row_length - 1)


def fit(
    run: RunFolder,
    model: GenLMForCausalLM,
    job: Job,
    begin: Checkpoint | None,
    stop: StopRequest,
    rate_scale: float = 1.0,
) -> GenLMForCausalLM | None:
    """Train `model`, from the checkpoint `begin` on if there is one, at `rate_scale` of its rate.

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

    def look(model: GenLMForCausalLM, step: int) -> None:
        whole = trainer.whole_model()
        from_first(lambda: _look(run, whole, job, step))

    watching = [ThreadsCallback(run, budget.step_s)] if budget.step_s is not None else []
    release = job.recipe.vectors.release_step
    holding = [HoldRowsCallback(job.held, release)] if job.held is not None else []
    every_s = 60 * training.checkpoint_minutes
    trainer = BudgetTrainer(
        run=run,
        budget=budget,
        recipe=training,
        rate_scale=rate_scale,
        is_rate_halved=rate_scale < 1 or (begin is not None and begin.progress.is_rate_halved),
        model=model,
        args=job.arguments,
        train_dataset=job.rows,
        data_collator=collate,
        optimizer_cls_and_kwargs=(OptimizerFactory, {"recipe": training}),
        callbacks=[
            BudgetCallback(budget),
            LogCallback(run, budget, job.pace),
            MilestoneCallback(budget, _validations(training, budget), look),
            *watching,
            *holding,
            CheckpointCallback(budget, every_s, training.checkpoint_steps, lambda: stop.is_made),
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
    if whole is None:
        return None
    whole.config.use_cache = True  # Trainer turned it off for training
    _sample(run, whole, job, step)
    run.log(
        "trained",
        steps=step,
        tokens=job.pace.tokens(step),
        epochs=round(step / job.pace.steps_per_epoch, 3),
        seconds=round(seconds, 2),
        tokens_per_s=round(job.pace.tokens(step) / seconds),
    )
    return whole


class BudgetTrainer(Trainer):
    """Trainer with the learning rate tied to the budget: it reaches 0 when the time or the steps are up.

    Its checkpoints are those of checkpoints.py; on a full disk one is missed, and the run goes on.
    """

    def __init__(
        self,
        run: RunFolder,
        budget: Budget,
        recipe: TrainingRecipe,
        rate_scale: float = 1.0,
        is_rate_halved: bool = False,
        **kwargs: Any,
    ):
        self.run, self.budget, self.recipe = run, budget, recipe
        self.rate_scale, self.is_rate_halved = rate_scale, is_rate_halved
        self.saved_step: int | None = None
        super().__init__(**kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Over the rows; several processes share a blank one behind them that fills the last step."""
        if count() > 1 and not isinstance(self.train_dataset, RowsAndBlank):
            self.train_dataset = RowsAndBlank(self.train_dataset)
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if count() == 1:
            return super()._get_train_sampler(train_dataset)
        n_rows = len(self.train_dataset) - 1
        return SharedOrder(
            n_rows, self.recipe.batch_size, self.args.seed, epoch=lambda: int(self.state.epoch or 0)
        )

    def whole_model(self) -> GenLMForCausalLM | None:
        """In the first process the model with all of its weights: itself, or where it is sharded a copy. All
        processes must call this; the others get None."""
        model: Any = self.model
        if not is_sharded():
            return model if is_first() else None
        weights = self.accelerator.get_state_dict(self.model_wrapped)
        if not is_first():
            return None
        config = copy.deepcopy(model.config)
        whole = GenLMForCausalLM.from_pretrained(None, config=config, state_dict=weights)
        whole.to(self.args.device)
        return whole

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As Trainer's, at `rate_scale` of the recipe's rates."""
        optimizer = super().create_optimizer(model)
        for group in optimizer.param_groups:
            group["lr"] *= self.rate_scale
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        for group in self.optimizer.param_groups:
            group["lr"] *= self.rate_scale
            group["initial_lr"] *= self.rate_scale
        self.lr_scheduler.base_lrs = [rate * self.rate_scale for rate in self.lr_scheduler.base_lrs]

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(part_of(self.run.checkpoints))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step, folder = self.state.global_step, self.run.checkpoints
        failures: list[str] = []
        self._check_finite(model)
        from_first(lambda: clear_parts(folder))
        with full_disk_as(failures.append):
            super()._save_checkpoint(model, trial)
        budget = self.budget
        progress = Progress(step, budget.elapsed_s, budget.seconds, budget.steps, self.is_rate_halved)

        def finish() -> str | None:
            with full_disk_as(failures.append):
                if not failures:
                    seal(folder, progress, keep=self.recipe.checkpoints_kept)
            return failures[0] if failures else None

        if not all_of(not failures):
            failures = failures or ["another process had no space"]
        failure = from_first(finish)
        if failure is None:
            self.saved_step = step
            self.run.log("checkpoint", step=step)
        else:
            self.run.log("note", message=f"no checkpoint after step {step}: {failure}; training goes on")

    def _check_finite(self, model: torch.nn.Module) -> None:
        """A checkpoint is one to go back to."""
        values = [self._tr_loss, *(getattr(p, "_local_tensor", p) for p in model.parameters())]
        if not all_of(all(bool(torch.isfinite(value).all()) for value in values)):
            raise Diverged(self.state.global_step)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        def share(step: int) -> float:
            progress = self.budget.progress(step + 0.5)
            return trapezoid(progress, self.recipe.warmup_fraction, self.recipe.decay_fraction)

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss without logits, which nothing here reads, and with the recipe's own terms."""
        terms = {"label_smoothing": self.recipe.label_smoothing, "z_loss": self.recipe.z_loss}
        return super().compute_loss(model, {**inputs, "skip_logits": True, **terms}, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: transformers' estimate walks all parameters at every step and is wrong for tied heads."""
        return 0


def _look(run: RunFolder, model: GenLMForCausalLM, job: Job, step: int) -> None:
    """Measure the model on a part of the validation split, and let it write."""
    found = likelihood_of(model, job.corpus, job.recipe, _PARTIAL_VALIDATION_TOKENS)
    values = {m.name: round(m.value, 5) for m in found}
    run.log("validation", step=step, partial=True, tokens=found[0].n, **values)
    _sample(run, model, job, step)


def _sample(run: RunFolder, model: GenLMForCausalLM, job: Job, step: int) -> None:
    training = job.recipe.training
    if training.samples == 0:
        return
    texts = write_samples(model, job.corpus.tokenizer, training.samples, _SAMPLE_TOKENS, training.seed)
    for text in texts:
        run.log("sample", step=step, prompt="", text=text)

    def note(reason: str) -> None:
        run.log("note", message=f"the samples of step {step} were not written: {reason}")

    with full_disk_as(note), run.samples.open("a", encoding="utf-8") as file:
        file.write(_samples_markdown(step, texts))


def _validations(training: TrainingRecipe, budget: Budget) -> int:
    """How many there are: a run of seconds has no time for them."""
    if training.validations is not None:
        return training.validations
    is_short = budget.seconds is not None and budget.seconds < _SHORT_S
    return 0 if is_short else _VALIDATIONS


def likelihood_of(
    model: GenLMForCausalLM,
    corpus: TokenizedCorpus,
    recipe: Recipe,
    max_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    return measure_likelihood(
        model,
        corpus.validation,
        start_id=corpus.tokenizer.bos_token_id,
        context=recipe.evaluation.context,
        stride=recipe.evaluation.stride,
        batch_size=recipe.evaluation.batch_size,
        max_tokens=max_tokens,
        on_progress=on_progress,
    )


def training_arguments_of(run: RunFolder, training: TrainingRecipe, budget: Budget) -> TrainingArguments:
    use_bf16 = {"auto": computes_bfloat16(), "bfloat16": True, "float32": False}.get(training.dtype)
    if use_bf16 is None:
        raise UserError(f"unknown training.dtype {training.dtype!r}; known: auto, bfloat16, float32")
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=budget.steps,
        per_device_train_batch_size=rows_of_each(training.batch_size, training.accumulation),
        gradient_accumulation_steps=training.accumulation,
        learning_rate=training.learning_rate,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        bf16=use_bf16,
        torch_compile_backend=training.compile,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:
        raise UserError(
            f"{arguments.n_gpu} GPUs in one process would train by nn.DataParallel, slowly and inexactly: "
            f"--processes {arguments.n_gpu} for all of them, or --processes 1 for the first"
        )
    shard_on_cpu()
    return arguments


def check_compiler(backend: str | None) -> None:
    if backend is not None and backend not in torch.compiler.list_backends(exclude_tags=()):
        known = torch.compiler.list_backends()
        raise UserError(f"unknown training.compile {backend!r}{did_you_mean(backend, known)}")


def computes_bfloat16() -> bool:
    """Whether the device multiplies bfloat16 natively; emulated on a CPU it can be 100 times slower."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _samples_markdown(step: int, texts: list[str]) -> str:
    """Each text in a fence longer than any run of backticks in it."""
    parts = [f"## After step {step}\n"]
    for text in texts:
        fence = "```"
        while fence in text:
            fence += "`"
        parts.append(f"{fence}text\n{text}\n{fence}\n")
    return "\n".join(parts) + "\n"
