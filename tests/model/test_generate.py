"""Promise: generate gives the same tokens with a cache as without one, for every way to generate."""

import pytest
import torch
from accelerate.big_modeling import (
    _attach_context_parallel_hooks,
    _refuse_recurrent_layers_under_sequence_parallelism,
)
from support import contracts
from support.contracts import N_NEW, generate
from support.models import PAD, READS_WORDS, STACKS, build_model
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

from hf_genlm.decoding import FastGenerator
from hf_genlm.model import RECURRENT_MIXERS
from hf_genlm.model.cache_genlm import CACHE

TAKES_EMBEDDINGS = [stack for stack, config in STACKS.items() if not READS_WORDS & set(config)]


def test_greedy_search_equals_that_without_cache(model, tokens):
    contracts.check_greedy_search(model, tokens)


def test_beam_search_equals_that_without_cache(model, tokens):
    contracts.check_beam_search(model, tokens)


def test_left_padded_batch_equals_single_prompts(model, tokens):
    contracts.check_left_padded_batch(model, tokens)


def test_sampling_is_repeatable_and_returns_several(model, tokens):
    rows = []
    for _ in range(2):
        torch.manual_seed(3)
        rows.append(generate(model, tokens, do_sample=True, num_return_sequences=3))
    assert torch.equal(*rows)
    assert rows[0].shape == (9, 12 + N_NEW)
    torch.manual_seed(3)
    assert torch.equal(
        generate(model, tokens, do_sample=True, num_return_sequences=3, use_cache=False), rows[0]
    )


def test_static_cache_equals_dynamic(model, tokens):
    assert torch.equal(generate(model, tokens, cache_implementation="static"), generate(model, tokens))


def test_prefill_in_chunks_equals_prefill_at_once(model, tokens):
    assert torch.equal(generate(model, tokens, prefill_chunk_size=5), generate(model, tokens))


@pytest.mark.parametrize("start", ["own", "empty"])
def test_continuing_from_a_cache_equals_starting_over(model, tokens, start):
    cache = DynamicCache(config=model.config) if start == "own" else DynamicCache()
    first = model.generate(
        tokens, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    more = torch.cat([first, tokens[:, :3]], dim=1)
    mask = torch.ones_like(more)  # a generated pad token is no padding, as generate would take it to be
    again = generate(model, more, attention_mask=mask)
    assert torch.equal(generate(model, more, attention_mask=mask, past_key_values=cache), again)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_accepted_by_either_name(model, tokens, name):
    """Before and from transformers 5.24 on."""
    cache = DynamicCache(config=model.config)
    first = model(tokens[:, :5], use_cache=True, **{name: cache})
    assert first[CACHE] is cache
    logits = torch.cat([first.logits, model(tokens[:, 5:], **{name: cache}).logits], dim=1)
    torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, atol=1e-5, rtol=1e-5)


def test_rejected_drafts_are_taken_back(model, tokens):
    contracts.check_rejected_drafts(model, tokens)


@pytest.mark.parametrize("stack", TAKES_EMBEDDINGS)
def test_embeddings_in_place_of_ids(stack, tokens):
    model = build_model(stack)
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(generate(model, None, inputs_embeds=embeds), generate(model, tokens)[:, 12:])


def test_beam_sampling_equals_beam_sampling_without_cache(model, tokens):
    rows = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        rows.append(
            generate(model, tokens, do_sample=True, num_beams=3, num_return_sequences=2, use_cache=use_cache)
        )
    assert torch.equal(*rows)
    assert rows[0].shape == (6, 12 + N_NEW)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_every_output_is_available(model, tokens, num_beams):
    model.set_attn_implementation("eager")
    asked = dict.fromkeys(
        ["output_scores", "output_logits", "output_hidden_states", "output_attentions"], True
    )
    out = generate(model, tokens, num_beams=num_beams, return_dict_in_generate=True, **asked)
    layer_types = model.config.layer_types
    n_attention = sum("linear" not in layer_type for layer_type in layer_types)
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == len(out.attentions) == N_NEW
    assert {len(step) for step in out.hidden_states} == {len(layer_types) + 1}
    assert {len(step) for step in out.attentions} == {n_attention}
    assert out.hidden_states[0][0].shape == (3 * num_beams, 12, 32)
    assert out.hidden_states[-1][-2].shape == (3 * num_beams, 1, 32)
    # the last is what the head reads, which is h W^T for a head that is tied through W (as in OPT)
    assert out.hidden_states[-1][-1].shape == (3 * num_beams, 1, model.lm_head.in_features)
    assert len(out.past_key_values) == len(layer_types) + (model.mixture is not None)
    assert out.past_key_values.get_seq_length() == 12 + N_NEW - 1


def test_eager_attention_generates_the_same_as_sdpa(model, tokens):
    texts = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        texts.append(generate(model, tokens))
    assert torch.equal(*texts)


@pytest.mark.parametrize("assistant", ["same", "other"])
def test_assisted_decoding_gives_the_scores_of_greedy_search(model, tokens, assistant):
    draft = model if assistant == "same" else build_model(["lstm", "full_attention"], seed=9)
    draft.generation_config.num_assistant_tokens = 2
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    asked = {"return_dict_in_generate": True, "output_scores": True}
    expected = generate(model, tokens[:1], **asked)
    assisted = generate(model, tokens[:1], assistant_model=draft, **asked)
    assert torch.equal(assisted.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(assisted.scores), torch.stack(expected.scores), atol=1e-4, rtol=1e-4
    )
    assert generate(model, tokens[:1], assistant_model=draft, do_sample=True).shape == (1, 12 + N_NEW)


@pytest.mark.parametrize("stack", TAKES_EMBEDDINGS)
def test_continuing_from_embeddings_and_their_cache(stack, tokens):
    model = build_model(stack)
    embed = model.get_input_embeddings()
    embeds = embed(tokens)
    whole = generate(model, None, inputs_embeds=embeds)
    first = generate(model, None, inputs_embeds=embeds, max_new_tokens=4, return_dict_in_generate=True)
    more = torch.cat([embeds, embed(first.sequences)], dim=1)
    rest = generate(
        model, None, inputs_embeds=more, past_key_values=first.past_key_values, max_new_tokens=N_NEW - 4
    )
    assert torch.equal(torch.cat([first.sequences, rest], dim=1), whole)


def test_a_static_cache_can_be_reset_and_used_again(model, tokens):
    contracts.check_static_cache_after_reset(model, tokens)


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("stack", STACKS)
def test_a_cache_that_was_reset_takes_a_batch_of_any_size(stack, is_static):
    """Static keys keep their rows, as in every model of transformers; recurrent states and others do not."""
    model = build_model(stack)
    has_static_keys = is_static and "attention" in str(model.config.mixer_types)
    cache = StaticCache(model.config, max_cache_len=16) if is_static else DynamicCache(config=model.config)
    for n_rows in (2, 2) if has_static_keys else (2, 5, 1, 3):
        for n_tokens in (4, 1):
            rows = torch.randint(2, 61, (n_rows, 8), generator=torch.Generator().manual_seed(n_rows))
            expected = model(rows[:, : 4 + n_tokens], use_cache=False).logits[:, -1]
            model(rows[:, :4], past_key_values=cache, use_cache=True)
            more = model(rows[:, 4 : 4 + n_tokens], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(more.logits[:, -1], expected, atol=1e-5, rtol=1e-4)
            assert cache.get_seq_length() == 4 + n_tokens
            cache.reset()


@pytest.mark.parametrize("mixer", RECURRENT_MIXERS)
def test_a_cache_that_was_reset_keeps_its_memory_or_takes_another_dtype(mixer, tokens):
    model, cache = build_model(mixer), StaticCache(build_model(mixer).config, max_cache_len=16)
    addresses = []
    for _ in range(2):
        model(tokens, past_key_values=cache, use_cache=True)
        addresses.append(cache.layers[0].recurrent_states[0].data_ptr())
        cache.reset()
    assert addresses[0] == addresses[1]
    model.double()(tokens, past_key_values=cache, use_cache=True)
    assert cache.layers[0].recurrent_states[0].dtype == torch.float64


@pytest.mark.parametrize("stack", STACKS)
def test_drafts_of_the_first_layers_give_the_same_tokens(stack, tokens):
    model = build_model(stack)
    expected = generate(model, tokens[:1])
    assert torch.equal(generate(model, tokens[:1], assistant_early_exit=1), expected)
    assert torch.equal(generate(model, tokens[:1]), expected)
    fast = FastGenerator(model)
    fast.generate(tokens[:1], max_new_tokens=3, do_sample=False, assistant_early_exit=1)
    assert "assisted" in fast.plain_because


@pytest.mark.parametrize(
    ("mixer", "shared_layers"),
    [
        ("full_attention", 2),
        ("sliding_attention", 1),
        pytest.param("full_attention", 1, marks=pytest.mark.slow),
        pytest.param("sliding_attention", 2, marks=pytest.mark.slow),
    ],
)
def test_continuous_batching_of_attention_equals_one_by_one(mixer, shared_layers, tokens):
    model = build_model(mixer, shared_layers=shared_layers)
    prompts = [tokens[0].tolist(), tokens[1, :5].tolist()]
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # else it takes most of the memory
    answers = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=small)
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        expected = generate(model, torch.tensor([prompt]), max_new_tokens=4)[0, len(prompt) :]
        assert answer.generated_tokens == expected.tolist()


def test_features_without_support_for_recurrent_states_are_refused_by_name():
    model = build_model("hybrid")
    with pytest.raises(ValueError, match="genlm_linear_attention"):
        model.generate_batch([[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=2))
    with pytest.raises(ValueError, match="genlm_linear_attention"):
        _attach_context_parallel_hooks(model)
    with pytest.raises(ValueError, match="genlm_linear_attention"):
        _refuse_recurrent_layers_under_sequence_parallelism(model)
    assert not model.supports_context_parallel
