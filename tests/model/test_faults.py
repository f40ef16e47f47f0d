"""Promise: the contract tests notice the faults that they are for, in the statement that is meant to.

Each test puts one fault in and asserts which statement of tests/support/contracts.py fails.
"""

import functools

import pytest
import torch
from support import contracts
from support.contracts import assert_caught
from support.models import build_model
from transformers import PreTrainedModel

from hf_genlm.model import GenLMForCausalLM, GenLMModel, GenLMPreTrainedModel, recurrence_genlm
from hf_genlm.model.bigram_genlm import GenLMBigramEmbedding
from hf_genlm.model.cache_genlm import RecurrentStateLayer
from hf_genlm.model.recurrence_genlm import RecurrentMixer, TimeLayout

RECURRENT = ["gru", "gated_linear", "hybrid", "bigram"]
GREEDY = "assert torch.equal(cached, plain)"
BEAMS = "assert torch.equal(cached, generate(model, tokens, use_cache=False"
PADDED = "assert torch.equal(row[12:]"
LOOKUP = "assert torch.equal(by_lookup, expected)"
RESET = "assert torch.equal(cached, generate(model, prompt))"
PACKED = "torch.testing.assert_close(packed.logits[0], alone"


def do_nothing(*args, **kwargs) -> None:
    """A method that forgot its work."""


@pytest.fixture(params=RECURRENT)
def recurrent(request):
    """A model with recurrent states."""
    return build_model(request.param)


def test_beams_whose_states_stay_in_their_rows(recurrent, tokens, monkeypatch):
    monkeypatch.setattr(RecurrentStateLayer, "reorder_cache", do_nothing)
    assert_caught(contracts.check_beam_search, recurrent, tokens, at=BEAMS)


def test_states_that_keep_rejected_drafts(recurrent, tokens, monkeypatch):
    monkeypatch.setattr(RecurrentStateLayer, "crop", do_nothing)
    assert_caught(contracts.check_rejected_drafts, recurrent, tokens, at=LOOKUP)


def test_states_that_read_padding(recurrent, tokens, monkeypatch):
    init = TimeLayout.__init__
    monkeypatch.setattr(
        TimeLayout, "__init__", lambda self, valid=None, document=None: init(self, None, document)
    )
    assert_caught(contracts.check_left_padded_batch, recurrent, tokens, at=PADDED)


def test_packed_documents_that_share_a_state(recurrent, tokens, monkeypatch):
    init = TimeLayout.__init__
    monkeypatch.setattr(
        TimeLayout, "__init__", lambda self, valid=None, document=None: init(self, valid, None)
    )
    assert_caught(contracts.check_packed_row, recurrent, tokens, at=PACKED)


def test_states_that_are_not_read_from_the_cache(recurrent, tokens, monkeypatch):
    monkeypatch.setattr(RecurrentStateLayer, "update_recurrent_state", do_nothing)
    assert_caught(contracts.check_greedy_search, recurrent, tokens, at=GREEDY)


def test_states_that_survive_a_reset(recurrent, tokens, monkeypatch):
    monkeypatch.setattr(RecurrentStateLayer, "reset", do_nothing)
    assert_caught(contracts.check_static_cache_after_reset, recurrent, tokens, at=RESET)


@pytest.mark.parametrize(
    ("method", "check", "at"),
    [
        ("reorder_cache", contracts.check_beam_search, BEAMS),
        ("crop", contracts.check_rejected_drafts, LOOKUP),
        ("reset", contracts.check_static_cache_after_reset, RESET),
        ("update_recurrent_state", contracts.check_greedy_search, GREEDY),
    ],
)
def test_a_cache_that_loses_the_last_token_of_pairs(method, check, at, tokens, monkeypatch):
    whole = getattr(RecurrentStateLayer, method)

    def faulty(self, *args, **kwargs):
        token = self.recurrent_states[2]
        if method == "update_recurrent_state" and args[1:2] == (2,):
            return None
        before = None if token is None else token.clone()
        result = whole(self, *args, **kwargs)
        if token is not None and method != "update_recurrent_state":
            self.recurrent_states[2] = before
            self.has_previous_state[2] = True
        return result

    monkeypatch.setattr(RecurrentStateLayer, method, faulty)
    assert_caught(check, build_model("bigram"), tokens, at=at)


@pytest.mark.parametrize(
    ("ignored", "check", "at"),
    [
        ("valid", contracts.check_left_padded_batch, PADDED),
        ("starts", contracts.check_packed_row, PACKED),
    ],
)
def test_pairs_across_padding_and_document_starts(ignored, check, at, tokens, monkeypatch):
    embed = GenLMBigramEmbedding.forward

    def faulty(self, input_ids, layout, past_key_values=None):
        seen = TimeLayout(layout.valid, layout.document)
        setattr(seen, ignored, None)
        return embed(self, input_ids, seen, past_key_values)

    monkeypatch.setattr(GenLMBigramEmbedding, "forward", faulty)
    assert_caught(check, build_model("bigram"), tokens, at=at)


@pytest.fixture
def dirty_memory(monkeypatch):
    """Uninitialised memory holds sevens: it must not be right by chance."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(7))


def test_rotary_buffers_that_are_not_restored(tokens, tmp_path, monkeypatch, dirty_memory):
    model = build_model("full_attention")
    contracts.check_reload_is_bit_equal(model, tokens, tmp_path)
    restore = PreTrainedModel._init_weights

    def faulty(self, module):
        if "Rotary" not in type(module).__name__:
            restore(self, module)

    monkeypatch.setattr(PreTrainedModel, "_init_weights", faulty)
    at = "assert torch.equal(logits, model(tokens, use_cache=False).logits)"
    assert_caught(contracts.check_reload_is_bit_equal, model, tokens, tmp_path, at=at)


def test_missing_weights_that_nothing_initialises(tmp_path, monkeypatch, dirty_memory):
    contracts.check_missing_weights("gru", tmp_path)
    monkeypatch.setattr(GenLMPreTrainedModel, "_init_weights", do_nothing)
    assert_caught(contracts.check_missing_weights, "gru", tmp_path, at="assert 0 < fresh.std() < 1")


def test_a_folder_that_names_one_auto_class(tmp_path, monkeypatch):
    monkeypatch.setattr(GenLMForCausalLM, "save_pretrained", PreTrainedModel.save_pretrained)
    at = "assert set(auto_map) == "
    assert_caught(contracts.check_saves_are_equal, build_model("gru"), tmp_path, at=at)


def test_a_fused_kernel_that_reads_past_an_adapter(tokens, monkeypatch):
    """A kernel cannot read the weights of peft's layers."""
    pytest.importorskip("peft", reason="peft is not installed: pip install '.[test]'")
    monkeypatch.setattr(recurrence_genlm, "is_plain_linear", lambda module: True)
    at = "gradients = torch.autograd.grad(loss, adapters)"
    assert_caught(contracts.check_lora, build_model("lstm"), tokens, at=at, error=RuntimeError)


def test_a_loss_that_ignores_the_items_in_the_batch(tmp_path, monkeypatch):
    forward = GenLMForCausalLM.forward

    @functools.wraps(forward)
    def faulty(self, *args, num_items_in_batch=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GenLMForCausalLM, "forward", faulty)
    at = "torch.testing.assert_close(*weights"
    assert_caught(contracts.check_gradient_accumulation, "gru", tmp_path, at=at)


def test_a_model_that_breaks_the_graph(tokens, monkeypatch):
    forward = RecurrentMixer.forward

    def faulty(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return forward(self, *args, **kwargs)

    torch._dynamo.reset()
    monkeypatch.setattr(RecurrentMixer, "forward", faulty)
    assert_caught(
        contracts.check_training_is_one_graph,
        *("gated_linear", False, tokens),
        at="loss = run(**inputs).loss",
        error=torch._dynamo.exc.Unsupported,
    )


def test_positions_that_begin_anew_at_every_step(tokens, monkeypatch):
    """Without a count of earlier tokens every new query is rotated as if it were the first."""
    forward = GenLMModel.forward

    def faulty(self, *args, position_ids=None, **kwargs):
        ids = kwargs.get("input_ids")
        return forward(self, *args, position_ids=torch.arange(ids.shape[1])[None], **kwargs)

    monkeypatch.setattr(GenLMModel, "forward", faulty)
    assert_caught(contracts.check_greedy_search, build_model("full_attention"), tokens, at=GREEDY)
