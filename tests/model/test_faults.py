"""Promise: the contract tests see what they are there for: with each of these faults put in, one fails."""

import functools

import pytest
import test_compile
import test_generate
import test_hub_round_trip
import test_mixers
import test_peft
import test_trainer
import torch
from support.models import build_model
from transformers import PreTrainedModel

from hf_genlm.model import GenLMForCausalLM, GenLMModel, GenLMPreTrainedModel, recurrence_genlm
from hf_genlm.model.bigram_genlm import GenLMBigramEmbedding
from hf_genlm.model.cache_genlm import RecurrentStateLayer
from hf_genlm.model.recurrence_genlm import RecurrentMixer, TimeLayout

RECURRENT = ["gru", "gated_linear", "hybrid", "bigram"]


def ignore(*args, **kwargs) -> None:
    """What a method does that forgot to."""


def fails(check, *args) -> None:
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check(*args)


@pytest.fixture(params=RECURRENT)
def faulty(request):
    """A model whose states something goes wrong with."""
    return build_model(request.param)


def test_states_left_in_their_rows_by_beam_search(faulty, tokens, monkeypatch):
    monkeypatch.setattr(RecurrentStateLayer, "reorder_cache", ignore)
    fails(test_generate.test_beam_search_equals_beam_search_without_cache, faulty, tokens)


def test_rejected_drafts_kept_in_the_state(faulty, tokens, monkeypatch):
    monkeypatch.setattr(RecurrentStateLayer, "crop", ignore)
    fails(test_generate.test_rejected_drafts_are_taken_back, faulty, tokens)


def test_padding_that_feeds_the_state(faulty, tokens, monkeypatch):
    start = TimeLayout.__init__
    monkeypatch.setattr(
        TimeLayout, "__init__", lambda self, valid=None, document=None: start(self, None, document)
    )
    fails(test_generate.test_left_padded_batch_equals_single_prompts, faulty, tokens)


def test_packed_documents_that_share_a_state(faulty, tokens, monkeypatch):
    start = TimeLayout.__init__
    monkeypatch.setattr(
        TimeLayout, "__init__", lambda self, valid=None, document=None: start(self, valid, None)
    )
    fails(test_mixers.test_packed_row_equals_its_documents_apart, faulty, tokens)


def test_a_state_that_is_not_read_back(faulty, tokens, monkeypatch):
    monkeypatch.setattr(RecurrentStateLayer, "update_recurrent_state", ignore)
    fails(test_generate.test_greedy_equals_greedy_without_cache, faulty, tokens)


def test_a_state_that_survives_a_reset(faulty, tokens, monkeypatch):
    monkeypatch.setattr(RecurrentStateLayer, "reset", ignore)
    fails(test_generate.test_a_static_cache_can_be_reset_and_used_again, faulty, tokens)


@pytest.mark.parametrize(
    ("method", "check"),
    [
        ("reorder_cache", test_generate.test_beam_search_equals_beam_search_without_cache),
        ("crop", test_generate.test_rejected_drafts_are_taken_back),
        ("reset", test_generate.test_a_static_cache_can_be_reset_and_used_again),
        ("update_recurrent_state", test_generate.test_greedy_equals_greedy_without_cache),
    ],
)
def test_a_last_token_that_is_forgotten(method, check, tokens, monkeypatch):
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
    fails(check, build_model("bigram"), tokens)


@pytest.mark.parametrize(
    ("blind_to", "check"),
    [
        ("valid", test_generate.test_left_padded_batch_equals_single_prompts),
        ("starts", test_mixers.test_packed_row_equals_its_documents_apart),
    ],
)
def test_pairs_across_what_parts_them(blind_to, check, tokens, monkeypatch):
    embed = GenLMBigramEmbedding.forward

    def blind(self, input_ids, layout, past_key_values=None):
        seen = TimeLayout(layout.valid, layout.document)
        setattr(seen, blind_to, None)
        return embed(self, input_ids, seen, past_key_values)

    monkeypatch.setattr(GenLMBigramEmbedding, "forward", blind)
    fails(check, build_model("bigram"), tokens)


@pytest.fixture
def dirty_memory(monkeypatch):
    """Memory that nobody has written holds sevens: garbage must not be right by chance."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(7))


def test_rotary_buffers_that_are_not_restored(tokens, tmp_path, monkeypatch, dirty_memory):
    model = build_model("full_attention")
    test_hub_round_trip.test_weights_return_bit_equal(model, tokens, tmp_path)
    restore = PreTrainedModel._init_weights

    def forgetful(self, module):
        if "Rotary" not in type(module).__name__:
            restore(self, module)

    monkeypatch.setattr(PreTrainedModel, "_init_weights", forgetful)
    fails(test_hub_round_trip.test_weights_return_bit_equal, model, tokens, tmp_path)


def test_missing_weights_that_nothing_initialises(tmp_path, monkeypatch, dirty_memory):
    test_hub_round_trip.test_missing_weights_are_initialised_and_present_ones_kept("gru", tmp_path)
    monkeypatch.setattr(GenLMPreTrainedModel, "_init_weights", ignore)
    fails(test_hub_round_trip.test_missing_weights_are_initialised_and_present_ones_kept, "gru", tmp_path)


def test_a_folder_that_names_one_auto_class(tmp_path, monkeypatch):
    monkeypatch.setattr(GenLMForCausalLM, "save_pretrained", PreTrainedModel.save_pretrained)
    fails(test_hub_round_trip.test_two_saves_give_the_same_files, build_model("gru"), tmp_path)


def test_a_fused_kernel_that_reads_past_an_adapter(tokens, monkeypatch):
    pytest.importorskip("peft", reason="peft is not installed: pip install 'hf_genlm[test]'")
    monkeypatch.setattr(recurrence_genlm, "is_plain_linear", lambda module: True)
    with pytest.raises((AssertionError, RuntimeError, AttributeError)):
        test_peft.test_lora_changes_trains_and_merges(build_model("lstm"), tokens)


def test_a_loss_that_ignores_the_items_in_the_batch(tmp_path, monkeypatch):
    forward = GenLMForCausalLM.forward

    @functools.wraps(forward)
    def own_mean(self, *args, num_items_in_batch=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GenLMForCausalLM, "forward", own_mean)
    fails(test_trainer.test_accumulated_steps_equal_one_large_batch, "gru", tmp_path)


def test_a_model_that_breaks_the_graph(tokens, monkeypatch):
    run = RecurrentMixer.forward

    def breaking(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return run(self, *args, **kwargs)

    torch._dynamo.reset()
    monkeypatch.setattr(RecurrentMixer, "forward", breaking)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        test_compile.test_training_is_one_graph("gated_linear", False, tokens)


def test_positions_that_start_over_at_every_step(tokens, monkeypatch):
    """Without a count of earlier tokens every new query is turned as if it were the first."""
    forward = GenLMModel.forward

    def forgetful(self, *args, position_ids=None, **kwargs):
        ids = kwargs.get("input_ids")
        return forward(self, *args, position_ids=torch.arange(ids.shape[1])[None], **kwargs)

    monkeypatch.setattr(GenLMModel, "forward", forgetful)
    fails(test_generate.test_greedy_equals_greedy_without_cache, build_model("full_attention"), tokens)
