"""Promise: torch.compile takes the whole model in one graph, for training and for decoding."""

import pytest
import torch
from support.models import SHALLOW, build_model
from transformers import CompileConfig

BACKEND = (
    "aot_eager"  # traces as the default does and generates no code: a break is found in a tenth of the time
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def gradients(model, run, **inputs) -> list[torch.Tensor]:
    loss = run(**inputs).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stack", SHALLOW)
def test_training_is_one_graph(stack, packed, tokens):
    model = build_model(SHALLOW[stack]).train()
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    if packed:
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in (4, 5, 3)]).repeat(3, 1)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    for got, expected in zip(
        gradients(model, compiled, **inputs), gradients(model, model, **inputs), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("stack", SHALLOW)
def test_decoding_is_one_graph(stack, tokens):
    model, plain = build_model(SHALLOW[stack]), build_model(SHALLOW[stack])
    everywhere = CompileConfig(backend=BACKEND, mode=None, fullgraph=True)
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
        gradients(model, compiled, **inputs), gradients(model, model, **inputs), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
