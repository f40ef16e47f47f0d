"""Promise: classification heads train with the plain Trainer, whichever side the padding is on."""

import pytest
import torch
from support.models import EOS, PAD, STACKS, build_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from hf_genlm.model import GenLMConfig, GenLMForSequenceClassification, GenLMForTokenClassification


def with_head(folder, head, stack, **overrides):
    """A model with `head` on the weights of a language model, as a user loads it."""
    build_model(stack).save_pretrained(folder)
    torch.manual_seed(0)
    return head.from_pretrained(folder, num_labels=3, **overrides).eval()


@pytest.mark.parametrize("stack", STACKS)
def test_one_score_a_row_whatever_the_padding(stack, tokens, tmp_path):
    model = with_head(tmp_path, AutoModelForSequenceClassification, stack)
    assert type(model) is GenLMForSequenceClassification
    alone = torch.cat([model(row[None, :n]).logits for row, n in zip(tokens, (4, 12, 7), strict=True)])
    assert alone.shape == (3, 3)
    for side in ("left", "right"):
        batch = torch.full_like(tokens, PAD)
        for i, n in enumerate((4, 12, 7)):
            batch[i, 12 - n :] = tokens[i, :n] if side == "left" else PAD
            if side == "right":
                batch[i, :n], batch[i, n:] = tokens[i, :n], PAD
        mask = (batch != PAD).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        together = model(batch, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stack", STACKS)
def test_one_score_a_token(stack, tokens, tmp_path):
    model = with_head(tmp_path, AutoModelForTokenClassification, stack)
    assert type(model) is GenLMForTokenClassification
    out = model(tokens, labels=tokens % 3)
    assert out.logits.shape == (3, 12, 3)
    expected = torch.nn.functional.cross_entropy(out.logits.view(-1, 3), (tokens % 3).view(-1))
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("head", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_plain_trainer_learns_labels_and_the_result_loads(head, tmp_path):
    """Rows that hold a 5 against rows that do not: solved from scratch, and the saved model repeats it."""
    model = with_head(tmp_path / "lm", head, ["gated_linear", "full_attention"])
    per_token = head is AutoModelForTokenClassification
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(6, 61, (64, 8), generator=generator)
    rows[::2, 4] = 5
    labels = (rows == 5).long() if per_token else (rows == 5).any(1).long()
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    arguments = TrainingArguments(
        tmp_path / "out", max_steps=30, learning_rate=1e-2, per_device_train_batch_size=16, use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / "out")
    loaded = head.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(loaded(rows).logits, model.eval()(rows).logits)
    accuracy = (loaded(rows).logits.argmax(-1) == labels).float().mean()
    assert accuracy > 0.95
    assert EOS not in rows


@pytest.mark.parametrize("head", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_gradient_accumulation_equals_one_batch(head, tmp_path):
    """Four batches of unequal numbers of labels accumulate to the gradient of all of them at once."""
    build_model(["gru"]).save_pretrained(tmp_path / "lm")
    rows = torch.randint(6, 61, (8, 6), generator=torch.Generator().manual_seed(0))
    labels = rows % 3
    labels[:3, 1:] = -100
    if head is AutoModelForSequenceClassification:
        labels = labels[:, 0]
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        config = GenLMConfig.from_pretrained(tmp_path / "lm", num_labels=3)
        config.classifier_dropout = 0.0
        model = head.from_pretrained(tmp_path / "lm", config=config)
        arguments = TrainingArguments(
            tmp_path / "out", max_steps=1, learning_rate=1.0, lr_scheduler_type="constant", optim="sgd",
            max_grad_norm=0.0, per_device_train_batch_size=batch_size, use_cpu=True, disable_tqdm=True,
            gradient_accumulation_steps=accumulation, save_strategy="no", logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        results.append((trainer.state.log_history[0]["loss"], model.state_dict()))
    (loss, weights), (accumulated_loss, accumulated) = results
    assert accumulated_loss == pytest.approx(loss, rel=1e-3)
    for name, weight in weights.items():
        torch.testing.assert_close(accumulated[name], weight, atol=1e-6, rtol=1e-4)
