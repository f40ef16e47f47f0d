"""Promise: what the plain Trainer offers works for our classes as for its own; no loss is shifted wrongly."""

import pytest
import torch
import torch.nn.functional as F
from support.models import STACKS, build_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto import modeling_auto


def rows_of(n: int = 16, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (n,), generator=generator).tolist()
    return [{"input_ids": torch.randint(2, 61, (length,), generator=generator)} for length in lengths]


class Collator(DataCollatorForLanguageModeling):
    """transformers' own, without a tokenizer to ask: right padding, -100 at padding."""

    def __init__(self):
        pass

    def __call__(self, rows):
        ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], True)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer_of(model, folder, **arguments) -> Trainer:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True,
                "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(folder, **{**settings, **arguments}),
        train_dataset=rows_of(),
        eval_dataset=rows_of(seed=1),
        data_collator=Collator(),
    )


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
    """The test above can fail: a name that is not in the table is smoothed on unshifted labels."""
    monkeypatch.delitem(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "genlm")
    with pytest.raises(AssertionError):
        test_label_smoothing_is_shifted("gru", tmp_path)


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
    """Rows of unequal length: only a loss over num_items_in_batch adds up."""
    weights = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = build_model(stack)
        trainer = trainer_of(
            model, tmp_path, optim="sgd", learning_rate=0.05, train_sampling_strategy="sequential",
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*weights, atol=2e-5, rtol=1e-4)


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
    assert min(losses) < losses[-1]
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
