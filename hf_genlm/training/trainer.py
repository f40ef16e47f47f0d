"""Trainer as a run uses it: its arguments, a rate that follows the budget, and what happens between steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.evaluation.likelihood import measure_likelihood
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.memory import keeping_memory
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.recipe import Recipe, TrainingRecipe
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.packed_stream import PackedStream
from hf_genlm.text.packing import PackedRows, collate
from hf_genlm.training.budget import Budget, trapezoid
from hf_genlm.training.callbacks import (
    BudgetCallback,
    HoldRowsCallback,
    LogCallback,
    MilestoneCallback,
    Pace,
    ThreadsCallback,
    write_samples,
)
from hf_genlm.training.optimizer import OptimizerFactory
from hf_genlm.training.streamed import StreamCallback, StreamedCorpus
from hf_genlm.training.tokenized import TokenizedCorpus

_PARTIAL_VALIDATION_TOKENS = 16_384
_SAMPLE_TOKENS = 64
_VALIDATIONS = 4
_SHORT_S = 29.0  # planning has taken its part of half a minute


def fit(
    run: RunFolder,
    model: GenLMForCausalLM,
    rows: PackedRows | PackedStream,
    corpus: TokenizedCorpus | StreamedCorpus,
    recipe: Recipe,
    budget: Budget,
    arguments: TrainingArguments,
    held: torch.Tensor | None = None,
) -> None:
    """Train `model` in place; the rows `held` (V,) of its embedding as the vectors section says."""
    training = recipe.training
    pace = Pace(rows.n_rows, training.batch_size * training.accumulation, training.row_length - 1)

    def sample(model: GenLMForCausalLM, step: int) -> None:
        if training.samples == 0:
            return
        texts = write_samples(model, corpus.tokenizer, training.samples, _SAMPLE_TOKENS, training.seed)
        for text in texts:
            run.log("sample", step=step, prompt="", text=text)
        with run.samples.open("a", encoding="utf-8") as file:
            file.write(_samples_markdown(step, texts))

    def look(model: GenLMForCausalLM, step: int) -> None:
        found = likelihood_of(model, corpus, recipe, _PARTIAL_VALIDATION_TOKENS)
        values = {m.name: round(m.value, 5) for m in found}
        run.log("validation", step=step, partial=True, tokens=found[0].n, **values)
        sample(model, step)

    watching = [ThreadsCallback(run, budget.step_s)] if budget.step_s is not None else []
    holding = [HoldRowsCallback(held, recipe.vectors.release_step)] if held is not None else []
    streaming = [StreamCallback(rows, pace.rows_per_step)] if isinstance(rows, PackedStream) else []
    trainer = BudgetTrainer(
        budget=budget,
        recipe=training,
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        optimizer_cls_and_kwargs=(OptimizerFactory, {"recipe": training}),
        callbacks=[
            BudgetCallback(budget),
            LogCallback(run, budget, pace),
            MilestoneCallback(budget, _validations(training, budget), look),
            *watching,
            *holding,
            *streaming,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    with keeping_memory():
        trainer.train()
    step, seconds = trainer.state.global_step, budget.elapsed_s
    model.config.use_cache = True  # Trainer turned it off for training
    sample(model, step)
    run.log(
        "trained",
        steps=step,
        tokens=pace.tokens(step),
        epochs=pace.epochs(step),
        seconds=round(seconds, 2),
        tokens_per_s=round(pace.tokens(step) / seconds),
    )


class BudgetTrainer(Trainer):
    """Trainer with the learning rate tied to the budget: it reaches 0 when the time or the steps are up."""

    def __init__(self, budget: Budget, recipe: TrainingRecipe, **kwargs: Any):
        self.budget, self.recipe = budget, recipe
        super().__init__(**kwargs)

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


def _validations(training: TrainingRecipe, budget: Budget) -> int:
    """How many there are: a run of seconds has no time for them."""
    if training.validations is not None:
        return training.validations
    is_short = budget.seconds is not None and budget.seconds < _SHORT_S
    return 0 if is_short else _VALIDATIONS


def likelihood_of(
    model: GenLMForCausalLM,
    corpus: TokenizedCorpus | StreamedCorpus,
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
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulation,
        learning_rate=training.learning_rate,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        bf16=use_bf16,
        torch_compile_backend=training.compile,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},  # of a stream, each process takes its rows by itself
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        raise UserError(
            f"{arguments.n_gpu} GPUs in one process would train by nn.DataParallel, slowly and inexactly: "
            "set CUDA_VISIBLE_DEVICES=0, or start `accelerate launch -m hf_genlm train`"
        )
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
