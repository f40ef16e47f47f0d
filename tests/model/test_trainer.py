"""Promise: the plain Trainer works for our classes; every loss is on correctly shifted labels."""

import pytest
import torch
import torch.nn.functional as F
from support import contracts
from support.contracts import Collator, rows_of, trainer_of
from support.models import STACKS, build_model
from transformers import TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto import modeling_auto


def smoothed(model, batch, epsilon: float) -> torch.Tensor:
    """Label smoothing by torch's own cross-entropy, on labels shifted here."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, label_smoothing=epsilon)


@pytest.mark.parametrize("stack", STACKS)
def test_label_smoothing_is_shifted(stack, tmp_path):
    model = build_model(stack)
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=0.1)
    batch = Collator()(rows_of(4))
    expected = smoothed(model, batch, 0.1)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)


def test_label_smoothing_needs_the_table_of_names(tmp_path, monkeypatch):
    """A class that is not in transformers' table is smoothed on labels that are not shifted."""
    monkeypatch.delitem(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "genlm")
    model = build_model("gru")
    batch = Collator()(rows_of(4))
    loss = trainer_of(model, tmp_path, label_smoothing_factor=0.1).compute_loss(model, dict(batch))
    assert (loss - smoothed(model, batch, 0.1)).abs() > 0.01


def test_our_loss_is_the_one_that_trainer_counts_shifted_labels_for():
    model = build_model("gru")
    assert model.loss_type == "ForCausalLM"
    assert model.loss_function is ForCausalLMLoss
    batch = Collator()(rows_of(4))
    loss = model(**batch).loss
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(**batch, shift_labels=shifted).loss, expected)


@pytest.mark.parametrize("stack", STACKS)
def test_accumulated_steps_equal_one_large_batch(stack, tmp_path):
    contracts.check_gradient_accumulation(stack, tmp_path)


def test_noise_on_embeddings_while_training_and_none_after(tmp_path):
    model = build_model("gated_linear")
    noisy = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            ids = torch.arange(2, 10)[None]
            embed = model.get_input_embeddings()
            noisy.append(not torch.equal(embed(ids), F.embedding(ids, embed.weight)))

    trainer = trainer_of(model, tmp_path, neftune_noise_alpha=5.0)
    trainer.add_callback(Watch())
    trainer.train()
    assert noisy == [True] * 4
    ids = torch.arange(2, 10)[None]
    embed = model.train().get_input_embeddings()
    assert torch.equal(embed(ids), F.embedding(ids, embed.weight))


@pytest.mark.parametrize("stack", STACKS)
def test_the_best_model_is_loaded_at_the_end(stack, tmp_path):
    """A rate that ruins the model after the first look: an earlier checkpoint must come back."""
    model = build_model(stack)
    trainer = trainer_of(
        model, tmp_path, learning_rate=1.0, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1] or model.mixture is not None  # counts stay good
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_batch_size_is_found_and_rows_are_grouped_by_length(tmp_path):
    model = build_model("hybrid")
    seen = []

    class TooLarge(torch.nn.Module):
        def __call__(self, module, args, kwargs):
            seen.append(len(kwargs["input_ids"]))
            if len(kwargs["input_ids"]) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(TooLarge(), with_kwargs=True)
    trainer = trainer_of(
        model, tmp_path, per_device_train_batch_size=16, auto_find_batch_size=True,
        train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4
    assert seen[0] == 16
    assert 1 <= seen[-1] <= 4
