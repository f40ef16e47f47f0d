"""Promise: a state, mask or position of other rows than the batch is refused before a kernel reads it, by
every mixer and in the words of an attention model; nothing is computed from it, no memory is corrupted."""

import multiprocessing
import os

import pytest
import torch
from support.models import STACKS, build_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from hf_genlm.decoding import FastGenerator
from hf_genlm.model import RECURRENT_MIXERS, CarriedState
from hf_genlm.model.cache_genlm import CACHE

# torch's messages of keys that do not fit, which a Llama gives, and ours
ATTENTION = r"Sizes of tensors must match.* Expected size|index_copy_\(\)|shape mismatch: value tensor"
ROWS = [(1, 3), (3, 1), (3, 2), (2, 33)]
HAS_STATES = [name for name, stack in STACKS.items() if set(stack["mixer_types"]) & set(RECURRENT_MIXERS)]


def ids(n_rows: int, n_tokens: int) -> torch.Tensor:
    return torch.randint(2, 61, (n_rows, n_tokens), generator=torch.Generator().manual_seed(n_rows))


def cache_of(model, n_rows: int, is_static: bool = False):
    """The cache after five tokens of so many rows."""
    cache = StaticCache(model.config, max_cache_len=40) if is_static else DynamicCache(config=model.config)
    return model(ids(n_rows, 5), past_key_values=cache, use_cache=True).past_key_values


def contents(cache) -> list[torch.Tensor]:
    found = []
    for layer in cache.layers:
        states = [*getattr(layer, "recurrent_states", {}).values(), getattr(layer, "keys", None)]
        found += [state.clone() for state in states if state is not None]
    return found


def check_rows(model, cached: int, given: int, n_tokens: int, is_static: bool) -> None:
    with pytest.raises(RuntimeError, match=ATTENTION):
        model(ids(given, n_tokens), past_key_values=cache_of(model, cached, is_static), use_cache=True)


@pytest.mark.parametrize("n_tokens", [1, 4])
@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize(("cached", "given"), ROWS)
def test_a_cache_of_other_rows_is_refused(model, cached, given, is_static, n_tokens):
    """`model` is each mixer of the table by itself, and mixtures."""
    check_rows(model, cached, given, n_tokens, is_static)


def test_that_is_the_message_of_a_llama():
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4
    )
    for is_static in (False, True):
        for cached, given in ROWS:
            check_rows(LlamaForCausalLM(config).eval(), cached, given, 4, is_static)


@pytest.mark.parametrize("padded", [False, True])
def test_nothing_was_written_into_a_refused_cache(model, padded):
    cache = cache_of(model, 2)
    before = contents(cache)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, : 6 if padded else 0] = 0
    with pytest.raises(RuntimeError, match=ATTENTION):
        model(ids(3, 4), attention_mask=mask, past_key_values=cache, use_cache=True)
    assert all(map(torch.equal, before, contents(cache)))
    model(ids(2, 4), past_key_values=cache, use_cache=True)  # and it is still good for its own rows


def test_generate_takes_no_cache_of_other_rows(model):
    for generator in (model, FastGenerator(model)):
        with pytest.raises(RuntimeError, match=ATTENTION):
            generator.generate(ids(3, 8), **{CACHE: cache_of(model, 1)}, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("name", HAS_STATES)
@pytest.mark.parametrize(
    "change",
    [
        lambda state: state[:, :1].expand(-1, 64),
        lambda state: state[:, : state.shape[1] // 2],
        lambda state: state[None],
        lambda state: state[0],
        lambda state: state.new_zeros(0),
    ],
    ids=["wide", "narrow", "another dimension", "no rows", "empty"],
)
def test_a_state_of_another_shape_is_refused(name, change):
    model = build_model(name)
    cache = cache_of(model, 2)
    for layer in cache.layers:
        for slot, state in getattr(layer, "recurrent_states", {}).items():
            layer.recurrent_states[slot] = None if state is None else change(state)
    for n_tokens in (1, 4):
        with pytest.raises(RuntimeError, match=ATTENTION):
            model(ids(2, n_tokens), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("mixer", RECURRENT_MIXERS)
def test_a_state_is_read_in_the_dtype_of_the_model(mixer):
    """As attention reads keys; the kernels of LSTMs know no other."""
    model = build_model(mixer)
    expected = model(ids(2, 4), past_key_values=cache_of(model, 2), use_cache=True).logits
    for dtype in (torch.float16, torch.float64):
        cache = cache_of(model, 2)
        for layer in cache.layers:
            for slot, state in layer.recurrent_states.items():
                layer.recurrent_states[slot] = None if state is None else state.to(dtype)
        found = model(ids(2, 4), past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("mixer", RECURRENT_MIXERS)
def test_a_cache_of_another_model_is_refused(mixer):
    model = build_model(mixer)
    for other in (
        build_model([mixer] * 2, hidden_size=64),
        build_model(["full_attention"] * 2),
        build_model([mixer]),
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            model(ids(2, 4), past_key_values=cache_of(other, 2), use_cache=True)
    with pytest.raises(RuntimeError, match="no keys and values"):
        build_model("full_attention")(ids(2, 4), past_key_values=cache_of(model, 2), use_cache=True)


def test_a_state_without_its_second_part_is_refused():
    with pytest.raises(RuntimeError, match=ATTENTION):
        build_model("lstm")(ids(2, 4), past_key_values=cache_of(build_model("gru"), 2), use_cache=True)


@pytest.mark.parametrize("name", HAS_STATES)
@pytest.mark.parametrize(("cached", "given"), ROWS)
def test_a_carried_state_of_other_rows_is_refused(name, cached, given):
    model, carried = build_model(name), CarriedState()
    positions = torch.arange(4)[None] + 1
    model(ids(cached, 4), position_ids=positions, past_key_values=carried)
    before = {key: state.clone() for key, state in carried.states.items()}
    for at in (positions, positions % 3):  # in the middle of a document, and with one that begins
        with pytest.raises(RuntimeError, match=ATTENTION):
            model(ids(given, 4), position_ids=at, past_key_values=carried)
    assert all(torch.equal(before[key], state) for key, state in carried.states.items())


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (2, 3), (2, 0)])
@pytest.mark.parametrize("first", [0, 1])
def test_a_mask_of_other_rows_or_too_few_tokens_is_refused(model, shape, first):
    mask = torch.ones(shape, dtype=torch.long)
    mask[:1, :1] = first
    for given in (mask, dict.fromkeys(set(model.config.layer_types), mask)):
        with pytest.raises(ValueError, match=r"attention_mask is .*, and the tokens \[2, 4\]"):
            model(ids(2, 4), attention_mask=given)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 4, 4), (4,)])
@pytest.mark.parametrize("stack", [*RECURRENT_MIXERS, "hybrid"])
def test_a_mask_that_a_recurrent_layer_cannot_follow_is_refused(stack, shape):
    with pytest.raises(ValueError, match=f"attention_mask has {len(shape)} dimensions"):
        build_model(stack)(ids(2, 4), attention_mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[-1e9, 0, 0, 0], [0, 0, 0, 0]]),
        torch.tensor([[float("-inf"), 0, 0, 0]] * 2, dtype=torch.float16),
        torch.tensor([[1, 1, 2, 2]] * 2),
        torch.tensor([[float("nan"), 1, 1, 1]] * 2),
        torch.tensor([[-1, 0, 0, 0]] * 2),
    ],
    ids=["added", "added in half precision", "numbers of documents", "nan", "negative"],
)
@pytest.mark.parametrize("stack", [*RECURRENT_MIXERS, "hybrid"])
def test_a_mask_of_other_values_than_0_and_1_is_refused(stack, mask):
    """A mask to add to scores is 0 where it means a token."""
    model = build_model(stack)
    for given in (mask, dict.fromkeys(set(model.config.layer_types), mask)):
        with pytest.raises(ValueError, match=r"attention_mask holds .* a recurrent layer cannot follow"):
            model(ids(2, 4), attention_mask=given)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float64])
@pytest.mark.parametrize("stack", [*RECURRENT_MIXERS, "hybrid"])
def test_a_mask_of_0_and_1_has_any_dtype(stack, dtype):
    model, mask = build_model(stack), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    expected = model(ids(2, 4), attention_mask=mask).logits
    assert torch.equal(model(ids(2, 4), attention_mask=mask.to(dtype)).logits, expected)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[1, 1, 1, 1]] * 2, "has no dimensions"),
        (torch.tensor(1), "has 0 dimensions"),
        ({"genlm_linear_attention": torch.ones(2, 1, 4, 4), "full_attention": None}, "has 4 dimensions"),
        ({"full_attention": None}, "a dict without genlm_linear_attention"),
        ({}, "a dict without"),
    ],
)
def test_a_mask_in_a_dict_or_no_tensor_is_checked_too(mask, words):
    with pytest.raises(ValueError, match=words):
        build_model("hybrid")(ids(2, 4), attention_mask=mask)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx"])
def test_packed_documents_without_positions_are_refused(name):
    with pytest.raises(ValueError, match="position_ids, 0 where each starts"):
        build_model("gru")(ids(1, 6), **{name: torch.tensor([0, 3, 6])})


def test_attention_follows_a_mask_of_four_dimensions():
    model = build_model("full_attention")
    causal = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    torch.testing.assert_close(model(ids(2, 4), attention_mask=causal).logits, model(ids(2, 4)).logits)


@pytest.mark.parametrize("shape", [(3, 4), (1, 3), (2, 6), (1, 1), (4,), (1, 2, 4)])
def test_positions_of_another_shape_are_refused(model, shape):
    positions = torch.zeros(shape, dtype=torch.long)
    for cache in (None, CarriedState(), cache_of(model, 2)):
        with pytest.raises(ValueError, match=r"position_ids are .*, and the tokens \[2, 4\]"):
            model(ids(2, 4), position_ids=positions, past_key_values=cache)


def test_tokens_and_learned_positions_beyond_their_tables_are_refused(model):
    for token in (61, -1, 2**40):
        with pytest.raises(IndexError):
            model(torch.full((2, 4), token))
    learned = build_model(["lstm"], position_type="learned", max_position_embeddings=8)
    words = "the model has learned 0 to 7: give at most 8 tokens"
    for position in (8, -1):
        with pytest.raises(IndexError, match=words):
            learned(ids(1, 4), position_ids=torch.full((1, 4), position))
    for generator in (learned, FastGenerator(learned)):
        assert generator.generate(ids(1, 4), max_new_tokens=4, do_sample=False).shape == (1, 8)
        with pytest.raises(IndexError, match=words):
            generator.generate(ids(1, 4), max_new_tokens=8, do_sample=False, eos_token_id=None)


def test_beams_from_rows_that_do_not_exist_are_refused(model):
    for rows in ([0, 5], [0, -1]):
        with pytest.raises(IndexError):
            cache_of(model, 2).reorder_cache(torch.tensor(rows))


@pytest.mark.parametrize("mixer", RECURRENT_MIXERS)
def test_no_more_tokens_are_removed_than_were_recorded(mixer):
    model = build_model(mixer)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids(2, 5), past_key_values=cache, use_cache=True)
    for number, words in ((-6, "cannot remove 6 tokens: 5 are recorded"), (2, "negative number")):
        with pytest.raises(RuntimeError, match=words):
            cache.layers[0].crop(number)
    cache.crop(-5)


def write_beyond() -> None:
    torch.set_num_threads(1)  # a forked process has no other
    torch.manual_seed(0)
    model = build_model(["lstm"], hidden_size=256)
    for given in (2, 64, 512, 2, 1024) * 4:
        cache = model(torch.full((1, 5), 3), use_cache=True).past_key_values
        carried, positions = CarriedState(), torch.arange(4)[None] + 1
        model(torch.full((1, 4), 3), position_ids=positions, past_key_values=carried)
        for inputs in ({}, {"position_ids": positions}):
            with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
                model(torch.full((given, 4), 3), past_key_values=carried if inputs else cache, **inputs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_an_lstm_does_not_write_beyond_the_state_of_fewer_rows():
    """In a process of its own: its kernel reads and writes as many rows as the batch has."""
    process = multiprocessing.get_context("fork").Process(target=write_beyond)
    process.start()
    process.join()
    assert process.exitcode == 0
