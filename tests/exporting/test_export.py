"""Promise: every kind of model leaves PyTorch: as a program for any length, and as ONNX for a step."""

import copy

import pytest
import torch
from support.models import PAD, SHALLOW, build_model
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def inputs_of(n_rows: int, n_tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The first row begins with three tokens of padding."""
    ids = torch.randint(2, 61, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", SHALLOW)
def test_exported_program_takes_any_length(kind):
    model = build_model(SHALLOW[kind])
    exported = DynamoExporter().export(model, inputs_of(2, 7), config=DynamoConfig(dynamic=True))
    for n_rows, n_tokens in ((2, 7), (3, 13)):
        inputs = inputs_of(n_rows, n_tokens, seed=1)
        expected = model(**inputs).logits
        torch.testing.assert_close(exported(**inputs).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", SHALLOW)
def test_decode_step_runs_in_onnxruntime_with_its_state(kind):
    """One step from the state of a prompt: logits and state are those of the model."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install '.[test]'")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install '.[test]'")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = build_model(SHALLOW[kind])
    prompt = torch.randint(2, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    cache = model(prompt, use_cache=True).past_key_values

    def step() -> dict:
        position = torch.full((2, 1), 7)  # as generate gives it
        return {"input_ids": prompt[:, :1], "position_ids": position, "past_key_values": copy.deepcopy(cache)}

    got = OnnxExporter().export(model, step(), config=OnnxConfig())(**step())
    expected = model(**step())
    torch.testing.assert_close(got["logits"], expected.logits, atol=1e-4, rtol=1e-3)
    layer, moved = expected.past_key_values.layers[0], got["past_key_values"].layers[0]
    if layer.keys is None:
        torch.testing.assert_close(moved.recurrent_states[0], layer.recurrent_states[0], atol=1e-4, rtol=1e-3)
        assert not torch.equal(moved.recurrent_states[0], cache.layers[0].recurrent_states[0])
    else:
        kept = layer.keys.shape[2]  # the exporter keeps the keys before a sliding window too
        torch.testing.assert_close(moved.keys[:, :, -kept:], layer.keys, atol=1e-4, rtol=1e-3)
