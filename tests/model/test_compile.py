"""Promise: torch.compile takes the whole model in one graph, for training and for decoding."""

import pytest
import torch
from support import contracts
from support.contracts import loss_and_gradients
from support.models import SHALLOW, build_model
from transformers import CompileConfig


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stack", SHALLOW)
def test_training_is_one_graph(stack, packed, tokens):
    contracts.check_training_is_one_graph(stack, packed, tokens)


@pytest.mark.parametrize("stack", SHALLOW)
def test_decoding_is_one_graph(stack, tokens):
    model, plain = build_model(SHALLOW[stack]), build_model(SHALLOW[stack])
    everywhere = CompileConfig(backend=contracts.COMPILER, mode=None, fullgraph=True)
    everywhere._compile_all_devices = True  # generate compiles on accelerators only, unless told
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    got = model.generate(tokens, cache_implementation="static", compile_config=everywhere, **options)
    assert model._compiled_call is not None
    assert torch.equal(got, plain.generate(tokens, **options))


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["gated_linear", "full_attention", "hybrid"])
def test_generated_code_trains_alike(stack, tokens):
    model = build_model(stack).train()
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    compiled = torch.compile(model, fullgraph=True)
    for got, expected in zip(
        loss_and_gradients(model, compiled, **inputs), loss_and_gradients(model, model, **inputs), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
