"""Trainer with a budget: learning rate by progress, exact batches over processes, atomic checkpoints."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_genlm.config.settings import TrainingSettings
from hf_genlm.errors import UserError
from hf_genlm.files import note_no_space
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.languages import BalancedRows
from hf_genlm.training.budget import Budget, trapezoid
from hf_genlm.training.callbacks import Diverged
from hf_genlm.training.carried_state import StateCallback
from hf_genlm.training.checkpoints import Progress, commit_checkpoint, pending_folder, remove_pending
from hf_genlm.training.processes import (
    PaddedRows,
    PaddedSampler,
    allow_fsdp_on_cpu,
    count,
    from_first,
    is_first,
    is_sharded,
    is_true_in_all,
    rows_per_process,
)

_MIN_BFLOAT16_WIDTH = 96  # of a decoder on a CPU


class BudgetTrainer(Trainer):
    """Trainer whose learning rate follows the budget: it reaches 0 when the time or the steps are up.

    `carried`, where recurrent states are carried, also gives the order of the rows. Checkpoints are those of
    checkpoints.py; on a full disk one is left out, and training continues. `lr_scale` multiplies every
    learning rate, also after a resumption, and `is_rate_halved` is noted in the checkpoints. `leave_one_out`:
    the model holds counts of the rows.
    """

    def __init__(
        self,
        run: RunFolder,
        budget: Budget,
        recipe: TrainingSettings,
        carried: StateCallback | None = None,
        lr_scale: float = 1.0,
        is_rate_halved: bool = False,
        was_stopped: Callable[[], bool] = lambda: False,
        leave_one_out: bool = False,
        **kwargs: Any,
    ):
        self.run, self.budget, self.recipe, self.carried = run, budget, recipe, carried
        self.lr_scale, self.is_rate_halved, self.leave_one_out = lr_scale, is_rate_halved, leave_one_out
        self.saved_step: int | None = None
        self._was_stopped = was_stopped
        super().__init__(**kwargs)
        if carried is not None:
            self.add_callback(carried)

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the rows; several processes also read the blank row that fills up a step."""
        if count() > 1 and not isinstance(self.train_dataset, (PaddedRows, IterableDataset)):
            self.train_dataset = PaddedRows(self.train_dataset)
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.carried is not None:
            return self.carried.sampler
        is_shared = isinstance(self.train_dataset, PaddedRows)
        rows: Any = getattr(self.train_dataset, "rows", self.train_dataset)  # without the blank one
        draw = rows.order if isinstance(rows, BalancedRows) else None
        if not is_shared and draw is None:
            return super()._get_train_sampler(train_dataset)
        n_at_once = self.recipe.batch_size if is_shared else 1
        return PaddedSampler(len(rows), n_at_once, self.args.seed, lambda: int(self.state.epoch or 0), draw)

    def is_stopped(self) -> bool:
        """Return True if a process was asked to stop. Every process must call it, after the same step."""
        return not is_true_in_all(not self._was_stopped())

    def whole_model(self) -> GenLMForCausalLM | None:
        """Return the model with all of its weights in the first process, None in the others.

        A sharded model is copied. Every process must call it.
        """
        model: Any = self.model
        if not is_sharded():
            return model if is_first() else None
        weights = self.accelerator.get_state_dict(self.model_wrapped)
        if not is_first():
            return None
        whole = GenLMForCausalLM(copy.deepcopy(model.config))  # from_pretrained would shard it under ZeRO-3
        whole.load_state_dict(weights)
        whole.to(self.args.device)  # type: ignore[arg-type]
        return whole

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with `lr_scale` times the learning rates of the recipe."""
        optimizer = super().create_optimizer(model)
        for group in optimizer.param_groups:
            group["lr"] *= self.lr_scale
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.carried is not None:
            model_config: Any = self.model.config  # type: ignore[union-attr]
            self.carried.load(resume_from_checkpoint, model_config)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        assert self.optimizer is not None
        assert isinstance(self.lr_scheduler, LambdaLR)
        for group in self.optimizer.param_groups:
            group["lr"] *= self.lr_scale
            group["initial_lr"] *= self.lr_scale
        self.lr_scheduler.base_lrs = [rate * self.lr_scale for rate in self.lr_scheduler.base_lrs]

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(pending_folder(self.run.checkpoints))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step, folder = self.state.global_step, self.run.checkpoints
        failures: list[str] = []
        self._check_finite(model)
        from_first(lambda: remove_pending(folder))
        with note_no_space(failures.append):
            super()._save_checkpoint(model, trial)
            self._save_states(pending_folder(folder) / f"{PREFIX_CHECKPOINT_DIR}-{step}")
        budget = self.budget
        progress = Progress(step, budget.elapsed_s, budget.seconds, budget.steps, self.is_rate_halved)

        def finish() -> str | None:
            with note_no_space(failures.append):
                if not failures:
                    commit_checkpoint(folder, progress, total_limit=self.recipe.save_total_limit)
            return failures[0] if failures else None

        if not is_true_in_all(not failures):
            failures = failures or ["another process had no space"]
        failure = from_first(finish)
        if failure is None:
            self.saved_step = step
            self.run.log("checkpoint", step=step)
        else:
            self.run.log("note", message=f"no checkpoint after step {step}: {failure}; training continues")

    def _save_states(self, folder: Path) -> None:
        """Write what a checkpoint holds besides Trainer's files."""
        if self.carried is not None:
            self.carried.save(folder)

    def _check_finite(self, model: torch.nn.Module) -> None:
        """Refuse to save a state from which nothing can be resumed."""
        values = [self._tr_loss, *(getattr(p, "_local_tensor", p) for p in model.parameters())]
        if not is_true_in_all(all(bool(torch.isfinite(value).all()) for value in values)):
            raise Diverged(self.state.global_step)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        def share(step: int) -> float:
            at, recipe = step + 0.5, self.recipe
            progress = self.budget.progress(at)
            return trapezoid(progress, recipe.warmup_ratio, recipe.decay_ratio, at, recipe.warmup_steps)

        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = LambdaLR(optimizer, share)
        return self.lr_scheduler

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss without logits, which nothing here reads, with the terms of the recipe."""
        if self.carried is not None and model.training:
            inputs = self.carried.add_states(inputs)
        terms = {
            "label_smoothing": self.recipe.label_smoothing_factor,
            "z_loss": self.recipe.z_loss,
            "network_share": self.recipe.network_share,
            "leave_one_out": self.leave_one_out,
        }
        return super().compute_loss(model, {**inputs, "skip_logits": True, **terms}, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: transformers' estimate is slow, and wrong for tied heads."""
        return 0


def training_arguments_of(
    run: RunFolder, training: TrainingSettings, budget: Budget, hidden_size: int
) -> TrainingArguments:
    """Return Trainer's arguments for a resolved recipe of a decoder of this width; the batch size is this
    process's share.

    Raises:
        UserError: a batch that the processes cannot share, or several GPUs in one process.
    """
    use_bf16 = uses_bfloat16(training, hidden_size)
    n_rows = rows_per_process(training.batch_size, training.gradient_accumulation_steps)
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=budget.steps,
        per_device_train_batch_size=n_rows,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        bf16=use_bf16,
        use_cpu=use_bf16 and not torch.accelerator.is_available(),  # else bfloat16 would need a GPU
        torch_compile_backend=training.torch_compile_backend,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},  # each process takes its own rows of a stream
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # no buffer of a model changes in training
    )
    if arguments.n_gpu > 1:
        raise UserError(
            f"{arguments.n_gpu} GPUs in one process would train by nn.DataParallel, slowly and inexactly: "
            f"--processes {arguments.n_gpu} for all of them, or --processes 1 for the first"
        )
    allow_fsdp_on_cpu()
    return arguments


def computes_bfloat16() -> bool:
    """Return True if the device multiplies bfloat16 natively, a CPU by its matrix units (AMX): emulation on a
    CPU can be 100 times slower."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def uses_bfloat16(training: TrainingSettings, hidden_size: int) -> bool:
    """Return True if the steps of a decoder of this width run under bfloat16 autocast. On a CPU the casts of
    a narrow one take as long as its faster products save (recipes/LOG.md)."""
    if training.dtype != "auto":
        return training.dtype == "bfloat16"
    is_wide = torch.accelerator.is_available() or hidden_size >= _MIN_BFLOAT16_WIDTH
    return is_wide and computes_bfloat16()


def precision_of(model: GenLMForCausalLM, training: TrainingSettings) -> torch.autocast:
    """Return the context in which Trainer runs the forward passes of `model`, for a measured step."""
    is_bfloat16 = uses_bfloat16(training, model.config.hidden_size)
    return torch.autocast(model.device.type, torch.bfloat16, enabled=is_bfloat16)
