"""Promise: per-example gradients equal those of batches of one example, for every kind of model."""

import pytest
import torch
import torch.nn.functional as F
from support.models import STACKS, build_model

from hf_genlm.privacy.per_example import PerExampleGradients

VARIANTS = {
    **{
        name: (name, {}) for name, stack in STACKS.items() if "ngram_order" not in stack
    },  # not for private text
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
def test_gradients_equal_those_of_batches_of_one(variant, tokens):
    stack, overrides = VARIANTS[variant]
    model = build_model(stack, **overrides)
    tokens = tokens.clone()
    tokens[1, 6] = tokens[1, 3]  # one token twice
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


class DividedLinear(torch.nn.Module):
    """A linear layer, and a scale by an operation that has no handler."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = torch.nn.Linear(4, 3), torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) / self.scale


def test_an_operation_without_a_handler_is_refused():
    model = DividedLinear()
    with PerExampleGradients(model) as gradients:
        losses = model(torch.ones(2, 5, 4)).sum((1, 2))
    losses.sum().backward()
    with pytest.raises(RuntimeError, match="1 parameters were used by an operation that HANDLERS lacks"):
        gradients.squared_norms()


def test_norms_under_autocast_equal_those_of_the_summed_gradients(tokens):
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
