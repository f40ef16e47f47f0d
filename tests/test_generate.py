"""Promise: transformers' generate cannot tell our recurrent states from its own caches."""

import pytest
import torch
from conftest import EOS, PAD, STACKS, build_model
from transformers import DynamicCache

N = 9


def generate(model, prompt, **options):
    return model.generate(
        prompt, **{"max_new_tokens": N, "do_sample": False, "eos_token_id": None, **options}
    )


def test_greedy_equals_greedy_without_cache(model, tokens):
    assert torch.equal(generate(model, tokens), generate(model, tokens, use_cache=False))


def test_beam_search_equals_beam_search_without_cache(model, tokens):
    options = {"num_beams": 4, "num_return_sequences": 2, "eos_token_id": EOS}
    assert torch.equal(
        generate(model, tokens, **options), generate(model, tokens, use_cache=False, **options)
    )


def test_beam_search_needs_the_reordering(tokens, monkeypatch):
    """The test above can fail: with states left in their rows the beams differ."""
    from hf_genlm.model.cache_genlm import RecurrentStateLayer

    model = build_model(STACKS["gru"])
    right = generate(model, tokens, num_beams=4)
    monkeypatch.setattr(RecurrentStateLayer, "reorder_cache", lambda self, beam_idx: None)
    assert not torch.equal(generate(model, tokens, num_beams=4), right)


def test_left_padded_batch_equals_single_prompts(model, tokens):
    prompts = [tokens[0, :3], tokens[1], tokens[2, :7]]
    batch = torch.stack([torch.nn.functional.pad(p, (12 - len(p), 0), value=PAD) for p in prompts])
    together = generate(model, batch, attention_mask=(batch != PAD).long())
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row[12:], generate(model, prompt[None])[0, len(prompt) :])


def test_sampling_is_repeatable_and_returns_several(model, tokens):
    rows = []
    for _ in range(2):
        torch.manual_seed(3)
        rows.append(generate(model, tokens, do_sample=True, num_return_sequences=3))
    assert torch.equal(*rows)
    assert rows[0].shape == (9, 12 + N)
    torch.manual_seed(3)
    assert torch.equal(
        generate(model, tokens, do_sample=True, num_return_sequences=3, use_cache=False), rows[0]
    )


def test_static_cache_equals_dynamic(model, tokens):
    assert torch.equal(generate(model, tokens, cache_implementation="static"), generate(model, tokens))


def test_prefill_in_chunks_equals_prefill_at_once(model, tokens):
    assert torch.equal(generate(model, tokens, prefill_chunk_size=5), generate(model, tokens))


@pytest.mark.parametrize("start", ["own", "empty"])
def test_going_on_from_a_cache_equals_starting_over(model, tokens, start):
    cache = DynamicCache(config=model.config) if start == "own" else DynamicCache()
    first = model.generate(
        tokens, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    more = torch.cat([first, tokens[:, :3]], dim=1)
    mask = torch.ones_like(more)  # a generated pad token is no padding, as generate would take it to be
    again = generate(model, more, attention_mask=mask)
    assert torch.equal(generate(model, more, attention_mask=mask, past_key_values=cache), again)


def test_rejected_drafts_are_taken_back(model, tokens):
    """Prompt lookup and a draft model propose wrong tokens; the text must be that of greedy search."""
    prompt = tokens[:1].repeat(1, 2)
    expected = generate(model, prompt, max_new_tokens=20)
    assert torch.equal(generate(model, prompt, max_new_tokens=20, prompt_lookup_num_tokens=3), expected)
    draft = build_model(["gru"], seed=5)
    assert torch.equal(generate(model, prompt, max_new_tokens=20, assistant_model=draft), expected)


def test_embeddings_in_place_of_ids(model, tokens):
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(generate(model, None, inputs_embeds=embeds), generate(model, tokens)[:, 12:])
