"""Promise: the loss that never holds all logits is the loss, and so are its gradients."""

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model

from hf_genlm.model import loss_genlm

HEADS = {
    "tied": {},
    "factorised": {"embedding_size": 8},
    "untied_with_bias": {"tie_word_embeddings": False, "output_bias": True},
}


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setattr(loss_genlm, "_ROWS", 5)


def reference(model, tokens, labels, items=None) -> torch.Tensor:
    """Cross-entropy of all logits in float64, where transformers' own goes down to float32."""
    logits = model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / (items or (labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("items", [None, 100])
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_without_logits_equal_those_with_them(head, items, tokens):
    model = build_model(["gru", "full_attention"], **HEADS[head]).double().train()
    labels = tokens.clone()
    labels[:, :3], labels[1, 7:] = -100, -100
    counted = None if items is None else torch.tensor(items)
    out = model(tokens, labels=labels, skip_logits=True, use_cache=False, num_items_in_batch=counted)
    assert out.logits is None
    losses = [out.loss, reference(model, tokens, labels, items)]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(*losses, atol=1e-12, rtol=1e-10)
    for without, with_logits in zip(*gradients, strict=True):
        torch.testing.assert_close(without, with_logits, atol=1e-12, rtol=1e-8)
    plain = model.float()(tokens, labels=labels, use_cache=False, num_items_in_batch=counted).loss
    torch.testing.assert_close(plain, losses[0].float())


def test_labels_that_are_shifted_already_are_taken_as_they_are(tokens):
    model = build_model(["gru"]).double()
    shifted = F.pad(tokens, (0, 1), value=-100)[:, 1:]
    loss = model(tokens, labels=tokens, shift_labels=shifted, skip_logits=True).loss
    torch.testing.assert_close(loss, reference(model, tokens, tokens))


def test_logits_are_there_whenever_there_are_no_labels(tokens):
    assert build_model(["gru"])(tokens, skip_logits=True).logits.shape == (3, 12, 61)
