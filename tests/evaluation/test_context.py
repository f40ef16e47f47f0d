"""Promise: the loss by position is that of the very tokens before each target, and scaled positions are those
that transformers gives a model made with them."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.models import EOS, VOCAB, build_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from hf_genlm.errors import UserError
from hf_genlm.evaluation.context import (
    ROPE_SCALINGS,
    measure_extrapolation,
    measure_loss_by_position,
    position_buckets,
    scaled_rope,
)
from hf_genlm.model import GenLMConfig, GenLMForCausalLM

CONTEXT = 96


def documents_of(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [(generator.integers(2, VOCAB, size=n), 3 * n) for n in lengths]


def nats(model, before, target):
    """Of one target after the tokens `before`, in a pass of its own."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before])).logits[0, -1]
    return -torch.log_softmax(logits.double(), dim=-1)[target].item()


def test_buckets_double_and_end_with_the_context():
    assert position_buckets(300) == [(1, 64), (65, 128), (129, 256), (257, 300)]
    assert position_buckets(64) == [(1, 64)]
    assert position_buckets(40) == [(1, 40)]


@pytest.mark.parametrize("stack", ["hybrid", "elman"])
def test_every_position_is_scored_given_the_tokens_before_it_alone(stack):
    model = build_model(stack)
    documents = documents_of([2 * CONTEXT + 5, CONTEXT - 1, CONTEXT])
    found = measure_loss_by_position(model, documents, EOS, CONTEXT, batch_size=2)
    by_position, gains = [], []
    for ids in (documents[0][0][:CONTEXT], documents[0][0][CONTEXT : 2 * CONTEXT], documents[2][0]):
        is_second = ids is not documents[2][0] and ids[0] == documents[0][0][CONTEXT]
        inputs = [int(documents[0][0][CONTEXT - 1]) if is_second else EOS, *ids.tolist()]
        by_position.append([nats(model, inputs[:p], inputs[p]) for p in range(1, CONTEXT + 1)])
        for p in range(3 * CONTEXT // 4 + 1, CONTEXT + 1):
            short = nats(model, inputs[CONTEXT // 2 : p], inputs[p])
            gains.append(short - by_position[-1][p - 1])
    first, second, gain = found
    table = np.array(by_position)
    assert [m.name for m in found] == [
        "nats_per_token/1-64",
        "nats_per_token/65-96",
        "nats_gain_from_2x_context",
    ]
    assert first.value == pytest.approx(table[:, :64].mean(), rel=1e-4)
    assert second.value == pytest.approx(table[:, 64:].mean(), rel=1e-4)
    assert gain.value == pytest.approx(np.mean(gains), abs=2e-5)
    assert [m.n for m in found] == [3 * 64, 3 * 32, 3 * CONTEXT // 4]
    # three windows of one size: the standard error of a mean of three numbers
    assert first.stderr == pytest.approx(table[:, :64].mean(axis=1).std(ddof=1) / np.sqrt(3), rel=1e-3)


def test_neither_the_batch_nor_the_mode_changes_a_number():
    model = build_model("hybrid").train()
    documents = documents_of([400, 30])
    told = []
    found = measure_loss_by_position(
        model, documents, EOS, 32, batch_size=5, on_progress=lambda done, total: told.append((done, total))
    )
    assert model.training
    alone = measure_loss_by_position(model, documents, EOS, 32, batch_size=1)
    assert [m.value for m in found] == pytest.approx([m.value for m in alone], rel=1e-5)
    assert told[-1] == (18, 18)  # 12 windows, and half of each once more
    assert all(before <= after for (before, _), (after, _) in pairwise(told))


def test_a_part_is_spread_over_all_windows():
    model = build_model("elman")
    documents = documents_of([320])
    part = measure_loss_by_position(model, documents, EOS, 32, max_tokens=90)[0]
    starts = [0, 4 * 32, 9 * 32]  # three of ten windows: the first, the middle, the last
    ids = documents[0][0].tolist()
    expected = []
    for start in starts:
        inputs = [ids[start - 1] if start else EOS, *ids[start : start + 32]]
        expected += [nats(model, inputs[:p], inputs[p]) for p in range(1, 33)]
    assert part.n == 96
    assert part.value == pytest.approx(np.mean(expected), rel=1e-4)


def test_twenty_documents_are_the_clusters():
    model = build_model("elman")
    documents = documents_of([64] * 20)
    values = [measure_loss_by_position(model, [document], EOS, 32)[0].value for document in documents]
    found = measure_loss_by_position(model, documents, EOS, 32)[0]
    assert found.value == pytest.approx(np.mean(values), rel=1e-5)
    assert found.stderr == pytest.approx(np.std(values, ddof=1) / np.sqrt(20), rel=1e-3)


def test_what_cannot_be_measured_is_refused():
    model = build_model("elman")
    with pytest.raises(UserError, match="no document has 64 tokens, the longest 63"):
        measure_loss_by_position(model, documents_of([63, 10]), EOS, 64)
    with pytest.raises(UserError, match="at least 8"):
        measure_loss_by_position(model, documents_of([63, 10]), EOS, 4)
    with pytest.raises(UserError, match="did you mean 'yarn'"):
        measure_extrapolation(model, documents_of([63]), EOS, scalings=["yarm"])
    learned = build_model("elman", position_type="learned", max_position_embeddings=16)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    for model in (learned, gpt2):
        with pytest.raises(UserError, match="are learned"):
            measure_extrapolation(model, documents_of([63]), EOS)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(UserError, match="give trained_length"):
        measure_extrapolation(mamba, documents_of([63]), EOS)


def twin(model, rope_parameters):
    """`model` as if it had been made with `rope_parameters`."""
    config = copy.deepcopy(model.config).to_dict() | {"rope_parameters": rope_parameters}
    made = type(model)(type(model.config)(**config))
    made.load_state_dict(model.state_dict())
    return made.eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("scaling", ROPE_SCALINGS)
@pytest.mark.parametrize("make", [lambda: build_model("hybrid", max_position_embeddings=32), llama])
def test_scaled_positions_are_those_of_a_model_made_so(make, scaling):
    model = make()
    ids = torch.randint(2, VOCAB, (2, 64), generator=torch.Generator().manual_seed(0))
    base = {**model.config.rope_parameters, "original_max_position_embeddings": 32}
    base.setdefault("rope_theta", 10000.0)
    expected = twin(model, base | ROPE_SCALINGS[scaling](2) if scaling != "none" else None)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with scaled_rope(model, scaling, 2, 32):
            scaled = model(input_ids=ids).logits
        assert torch.equal(scaled, expected(input_ids=ids).logits)
        assert torch.equal(model(input_ids=ids).logits, before)
        assert torch.equal(scaled, before) == (scaling == "none")


def test_the_frequencies_of_the_scalings():
    """Linear divides every angle by the factor, dynamic NTK the slowest alone, and leaves the quickest."""
    model = build_model("hybrid", max_position_embeddings=32)
    own = model.model.rotary_emb.inv_freq.clone()
    with scaled_rope(model, "linear", 4, 32):
        assert torch.allclose(model.model.rotary_emb.inv_freq, own / 4)
    with scaled_rope(model, "dynamic", 4, 32):
        model(input_ids=torch.zeros(1, 128, dtype=torch.long))
        scaled = model.model.rotary_emb.inv_freq
        assert scaled[0] == own[0]
        assert scaled[-1] == pytest.approx(own[-1].item() / 4, rel=1e-5)


def test_extrapolation_is_the_loss_by_position_with_each_scaling():
    model = build_model("hybrid", max_position_embeddings=32)
    documents = documents_of([300])
    told = []
    found = {
        m.name: m
        for m in measure_extrapolation(
            model, documents, EOS, factors=[2, 4], on_progress=lambda *done: told.append(done)
        )
    }
    assert set(found) == {
        f"nats_per_token/{factor}x_{name}/{bucket}"
        for name in ROPE_SCALINGS
        for factor, bucket in [(2, "1-64"), (4, "1-64"), (4, "65-128")]
    }
    for name in ROPE_SCALINGS:
        base = {**model.config.rope_parameters, "original_max_position_embeddings": 32}
        made = twin(model, base | ROPE_SCALINGS[name](4) if name != "none" else None)
        expected = measure_loss_by_position(made, documents, EOS, 128)[1]
        assert found[f"nats_per_token/4x_{name}/65-128"].value == pytest.approx(expected.value, rel=1e-5)
    assert told[-1][0] == told[-1][1]


def test_a_recurrent_decoder_has_nothing_to_scale():
    model = GenLMForCausalLM(GenLMConfig(vocab_size=VOCAB, decoder="gru", hidden_size=16, num_hidden_layers=1,
                                         max_position_embeddings=16))  # fmt: skip
    found = measure_extrapolation(model, documents_of([100]), EOS)
    assert [m.name for m in found] == ["nats_per_token/2x_none/1-32", "nats_per_token/4x_none/1-64"]
