"""Differentially private training: what a step draws, its noisy gradient, the Trainer, and the guarantee.

DP-SGD (Abadi et al., 2016, arXiv:1607.00133): each document is drawn with the same probability, its gradient
is clipped to the clip norm, and the sum gets noise and is divided by the number of documents that are drawn
on average.

Shapes: B documents that a step draws, T tokens of a window, V vocabulary.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Sampler, SequentialSampler

from hf_genlm.config.recipe import TrainingRecipe
from hf_genlm.config.settings import Settings, TrainingSettings
from hf_genlm.errors import UserError
from hf_genlm.files import read_json, write_bytes, write_json
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.privacy.mechanism import (
    KEY_BYTES,
    NOISES,
    Guarantee,
    draw_documents,
    draw_offsets,
    plan_guarantee,
)
from hf_genlm.privacy.per_example import PerExampleGradients
from hf_genlm.run_folder import RunFolder
from hf_genlm.run_schemas import GuaranteeFile
from hf_genlm.text.packing import IGNORED, DocumentWindows, collate
from hf_genlm.training.optimizer import OptimizerFactory
from hf_genlm.training.trainer import BudgetTrainer, precision_of

STATE_FILE = "privacy_state.json"
_IDS_AT_ONCE = 1 << 22
# fields of `training` that a resumed run may change
_WITHOUT_EFFECT = dict.fromkeys(
    ("save_minutes", "save_steps", "save_total_limit", "milestone_words", "logging_steps", "report_to")
)


@dataclass(frozen=True)
class PrivateState:
    """State that a private run must not lose: its guarantee, and the key that all of its randomness follows
    from.

    The key is in checkpoints alone, which are removed when the run is done: it would allow to subtract the
    noise. `fingerprint` binds the key to the text and the settings that it is used for.
    """

    guarantee: Guarantee
    key: bytes
    fingerprint: str = ""

    def bound_to(self, windows: DocumentWindows, settings: Settings) -> "PrivateState":
        """This state, for these documents and settings alone: the difference of two steps of other documents
        with the same noise would be exact.

        Raises:
            UserError: it is bound to others.
        """
        digest = hashlib.sha256(windows.documents.offsets.tobytes())
        for start in range(0, windows.documents.n_tokens, _IDS_AT_ONCE):
            digest.update(windows.documents.ids[start : start + _IDS_AT_ONCE].tobytes())
        windows.documents.release()
        for section in (
            settings.model,
            settings.training.model_copy(update=_WITHOUT_EFFECT),
            settings.privacy,
        ):
            digest.update(section.model_dump_json().encode())
        found = digest.hexdigest()
        if self.fingerprint not in ("", found):
            raise UserError(
                "the noise of this run was drawn for another text, tokenizer or recipe, and cannot protect "
                "this one: bring them back, or start a new run"
            )
        return replace(self, fingerprint=found)

    def save(self, folder: Path) -> None:
        """Write it to a checkpoint, readable by its owner alone."""
        content = {
            "guarantee": asdict(self.guarantee),
            "key": self.key.hex(),
            "fingerprint": self.fingerprint,
        }
        write_bytes(folder / STATE_FILE, json.dumps(content, indent=2).encode() + b"\n", mode=0o600)

    @classmethod
    def load(cls, folder: Path, steps: int) -> "PrivateState":
        """Read it from a checkpoint of a run of `steps` in all.

        Raises:
            UserError: it is missing, or the noise was chosen for fewer steps.
        """
        try:
            content = read_json(folder / STATE_FILE)
            key, fingerprint = bytes.fromhex(content["key"]), content.get("fingerprint", "")
            state = cls(Guarantee(**content["guarantee"]), key, fingerprint)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{str(folder)!r} holds no {STATE_FILE} that can be used: without what was spent there is no "
                "guarantee; start a new run"
            ) from error
        if len(state.key) != KEY_BYTES or steps > state.guarantee.steps:
            raise UserError(
                f"{str(folder)!r} has noise for {state.guarantee.steps} steps, and the run would make "
                f"{steps}: the guarantee would not hold; start a new run"
            )
        return state


class DrawnSteps(Dataset):
    """Batches of documents by step: item k has the windows (B, T) that step k draws; B can be 0."""

    def __init__(self, windows: DocumentWindows, state: PrivateState):
        self.windows, self.state = windows, state

    def __len__(self) -> int:
        return self.state.guarantee.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        if not 0 <= step < len(self):
            raise IndexError(step)
        key, rate = self.state.key, self.state.guarantee.sampling_rate
        drawn = draw_documents(key, step, self.windows.n_rows, rate)
        return collate(self.windows.take(drawn, draw_offsets(key, step, len(drawn))))


def unwrap_batch(steps: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collate a batch of one step: the step itself."""
    (step,) = steps
    return step


class PrivateTrainer(BudgetTrainer):
    """BudgetTrainer with private steps: a batch of Trainer's is everything that one step draws."""

    def __init__(self, private: PrivateState, rows_at_once: int, **kwargs: Any):
        self.private, self.rows_at_once = private, rows_at_once
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        assert isinstance(self.train_dataset, DrawnSteps)
        return SequentialSampler(self.train_dataset)

    def _save_states(self, folder: Path) -> None:
        self.private.save(folder)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Write each parameter's private gradient; return the mean loss of the documents."""
        assert self.state.global_step < self.private.guarantee.steps, "no more steps than were accounted for"
        model.train()
        with self.compute_loss_context_manager():
            return private_gradient(
                model,
                self._prepare_inputs(inputs),
                self.private,
                self.state.global_step,
                self.recipe,
                self.rows_at_once,
            )


def private_gradient(
    model: GenLMForCausalLM,
    inputs: dict[str, torch.Tensor],
    private: PrivateState,
    step: int,
    recipe: TrainingRecipe,
    rows_at_once: int,
) -> torch.Tensor:
    """Write the noisy mean of the clipped gradients of `inputs`, each (B, T), to each parameter's `.grad`.

    Returns:
        The mean loss of the B documents; 0 where there are none.
    """
    guarantee = private.guarantee
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shapes = [tuple(parameter.shape) for parameter in parameters]
    make_noise = NOISES[guarantee.is_noise_secure]
    totals = make_noise(private.key, step, shapes, parameters[0].device)
    for total in totals:
        total.mul_(guarantee.noise_multiplier * guarantee.clip_norm)
    n_rows, loss_sum = len(inputs["input_ids"]), torch.zeros((), device=parameters[0].device)
    for start in range(0, n_rows, rows_at_once):
        rows = {name: values[start : start + rows_at_once] for name, values in inputs.items()}
        loss_sum += add_clipped(model, _trimmed(rows), totals, guarantee.clip_norm, recipe)
    for parameter, total in zip(parameters, totals, strict=True):
        parameter.grad = total.div_(guarantee.batch_size).to(parameter.dtype)
    return loss_sum / max(1, n_rows)


def add_clipped(
    model: GenLMForCausalLM,
    rows: dict[str, torch.Tensor],
    totals: list[torch.Tensor],
    clip_norm: float,
    recipe: TrainingRecipe,
) -> torch.Tensor:
    """Add each row's gradient, clipped to `clip_norm`, to `totals`; return the summed losses."""
    for parameter in model.parameters():
        parameter.grad = None
    with PerExampleGradients(model) as gradients:
        losses_B = document_losses(model, rows, recipe)
    losses_B.sum().backward()
    norms_B = gradients.squared_norms().sqrt()
    weights_B = (clip_norm / norms_B.clamp_min(torch.finfo(norms_B.dtype).tiny)).clamp(max=1)
    for total, found in zip(totals, gradients.weighted_sum(weights_B), strict=True):
        if found is not None:
            total.add_(found)
    return losses_B.detach().sum()


def document_losses(
    model: GenLMForCausalLM, rows: dict[str, torch.Tensor], recipe: TrainingRecipe
) -> torch.Tensor:
    """(B,) the mean loss over the labels of each row, in nats, with label smoothing and z-loss."""
    labels_BT = rows["labels"][:, 1:]
    outputs = model(rows["input_ids"], position_ids=rows["position_ids"], use_cache=False)
    logits_BVT = outputs.logits[:, :-1].float().mT
    losses_BT = F.cross_entropy(
        logits_BVT,
        labels_BT,
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=recipe.label_smoothing_factor,
    )
    is_label_BT = labels_BT != IGNORED
    if recipe.z_loss:
        losses_BT = losses_BT + recipe.z_loss * logits_BVT.logsumexp(1).square() * is_label_BT
    return losses_BT.sum(1) / is_label_BT.sum(1).clamp_min(1)


def _trimmed(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the columns in which no row has a label."""
    n_tokens = int((rows["labels"] != IGNORED).sum(1).max())
    return {name: values[:, :n_tokens] for name, values in rows.items()}


def measure_private_step(model: GenLMForCausalLM, settings: Settings) -> float:
    """Seconds of a step on random windows that are all full."""
    training, privacy = settings.training, settings.privacy
    optimizer = OptimizerFactory()(model, training)
    n_drawn = training.rows_per_step
    shape = (n_drawn, training.max_seq_length)
    tokens = torch.randint(0, model.config.vocab_size, shape, device=model.device)
    positions = torch.arange(training.max_seq_length, device=model.device).expand_as(tokens)
    inputs = {"input_ids": tokens, "position_ids": positions, "labels": tokens}
    rate, noise = 1.0, 1.0
    guarantee = Guarantee(1.0, 0.5, rate, noise, privacy.clip_norm, n_drawn, 1, privacy.secure_noise)
    private = PrivateState(guarantee, bytes(KEY_BYTES))

    def step() -> float:
        start = time.perf_counter()
        with precision_of(model, training):
            private_gradient(model, inputs, private, 0, training, training.batch_size).item()
        optimizer.step()
        return time.perf_counter() - start

    step()  # the first is slower
    return min(step(), step())


def trainer_settings(training: TrainingSettings) -> TrainingSettings:
    """Settings for Trainer's own loop: its batch is one step, and it clips nothing but single documents."""
    changes = {"batch_size": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    return training.model_copy(update=changes)


def begin_private(run: RunFolder, settings: Settings, n_documents: int) -> PrivateState:
    """Choose the noise of a new run, and draw its key.

    Raises:
        UserError: as `plan_guarantee`.
    """
    length, n_drawn = settings.length, settings.training.rows_per_step
    if length.step_s is not None:
        times = length.max_steps * n_drawn / n_documents
        message = (
            f"with noise, a step takes {1000 * length.step_s:.0f} ms: the run makes "
            f"{length.max_steps:,} steps, however long they take, which draw each document {times:.2g} times "
            "on average"
        )
        run.log("note", message=message)
    run.tell("progress", task="choosing the noise", done=0, total=None)
    guarantee = plan_guarantee(settings.privacy, n_documents, n_drawn, length.max_steps)
    run.log("guarantee", **asdict(guarantee))
    return PrivateState(guarantee, os.urandom(KEY_BYTES))


def write_guarantee(run: RunFolder, private: PrivateState, settings: Settings, device: str = "cpu") -> None:
    """Write privacy.json, after all steps were made on a type of `device`."""
    not_covered = []
    if sum(event["event"] == "guarantee" for event in run.read_log()) > 1:
        not_covered.append("what log.jsonl tells of a beginning that was lost before its first checkpoint")
    if settings.corpus.damaged == "skip":
        not_covered.append("which files were left out: one damaged record takes those beside it along")
    if settings.model.init_from is not None:
        not_covered.append("the training text of the model that it continues from")
    if settings.tokenizer.path is not None:
        not_covered.append("the text that its tokenizer was learned from")
    elif not (settings.corpus.sources or settings.corpus.languages):
        not_covered.append("the vocabulary, which was learned from the same text, as everyone has it")
    write_json(run.privacy, private.guarantee.to_json(not_covered, device), GuaranteeFile)
