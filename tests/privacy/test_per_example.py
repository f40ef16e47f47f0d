"""Promise: the gradient of each example is that of a batch of this example alone, whatever the model."""

import pytest
import torch
import torch.nn.functional as F
from support.models import STACKS, build_model

from hf_genlm.privacy.dp.per_example import FOLLOWED, PerExampleGradients

VARIANTS = {
    **{name: (name, {}) for name in STACKS},
    "factorised_tied": ("factorised", {"tie_word_embeddings": True}),
    "tied": ("lstm", {"tie_word_embeddings": True}),
    "learned_positions": ("gru", {"position_type": "learned"}),
    "projected": ("gated_linear", {"embedding_size": 8, "tie_word_embeddings": False}),
}


def losses_of(model, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits = model(tokens, position_ids=positions, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_examples_are_those_of_batches_of_one(variant, tokens):
    stack, overrides = VARIANTS[variant]
    model = build_model(stack, **overrides)
    tokens = tokens.clone()
    tokens[1, 6] = tokens[1, 3]  # a token that stands twice
    with PerExampleGradients(model) as gradients:
        losses = losses_of(model, tokens)
    losses.sum().backward()
    norms = gradients.squared_norms().sqrt()
    for i in range(len(tokens)):
        model.zero_grad()
        loss = losses_of(model, tokens[i : i + 1]).sum()
        loss.backward()
        assert torch.allclose(losses[i], loss, atol=1e-5)
        of_one = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        found = gradients.weighted_sum(F.one_hot(torch.tensor(i), len(tokens)).float())
        for (name, _), mine, theirs in zip(model.named_parameters(), found, of_one, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4, msg=name)
        torch.testing.assert_close(
            norms[i], torch.cat([g.flatten() for g in of_one]).norm(), rtol=1e-5, atol=0
        )


def test_a_use_that_is_not_followed_is_no_gradient_that_is_lost(monkeypatch, tokens):
    monkeypatch.delitem(FOLLOWED, torch.Tensor.mul)
    model = build_model("lstm")
    with PerExampleGradients(model) as gradients:
        losses = losses_of(model, tokens)
    losses.sum().backward()
    with pytest.raises(RuntimeError, match="a use of 5 parameters is none that FOLLOWED knows"):
        gradients.squared_norms()


def test_lengths_under_autocast_are_those_of_what_is_summed(tokens):
    model = build_model("hybrid")
    with torch.autocast("cpu", torch.bfloat16):
        with PerExampleGradients(model) as gradients:
            losses = losses_of(model, tokens)
        losses.sum().backward()
        norms = gradients.squared_norms().sqrt()
        sums = [gradients.weighted_sum(weights) for weights in torch.eye(len(tokens))]
    for norm, found in zip(norms, sums, strict=True):
        summed = torch.cat([gradient.flatten() for gradient in found]).norm()
        torch.testing.assert_close(norm, summed, rtol=1e-5, atol=0)
