"""Promise: the texts that are measured are draws from the model, and the numbers are those of these texts."""

import math
import random

import numpy as np
import pytest
import torch
from support.models import build_model
from transformers import GPT2Config, GPT2LMHeadModel

from hf_genlm.config.recipe import TokenizerRecipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation import samples as samples_module
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.evaluation.samples import (
    cut_references,
    last_hidden_states,
    mauve_score,
    measure_samples,
    sample_texts,
)
from hf_genlm.evaluation.text_statistics import (
    distinct_n,
    measure_overlap,
    repetition,
    self_bleu,
    split_words,
)
from hf_genlm.text.store import Document, as_documents
from hf_genlm.text.tokenizer import train_tokenizer

TEXT = "The cat sat on the mat. A dog saw the cat, and the cat saw a dog; then both ran away.\n" * 20
STACKS = ["gated_linear", "hybrid", "gpt2"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document(TEXT, "text")], TokenizerRecipe(vocab_size=280), len(TEXT))


@pytest.fixture(scope="module")
def models(tokenizer):
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    gpt2 = GPT2LMHeadModel(GPT2Config(**size, **special, initializer_range=0.5)).eval()
    ours = {
        name: build_model(name, vocab_size=len(tokenizer), **special) for name in STACKS if name != "gpt2"
    }
    return {**ours, "gpt2": gpt2}


@pytest.fixture(params=STACKS)
def model(request, models):
    return models[request.param]


def greedy(model, tokenizer, prompt: str, count: int) -> str:
    """The likeliest tokens, from the whole text each time."""
    begun = [tokenizer.bos_token_id, *tokenizer(prompt).input_ids]
    ids = list(begun)
    for _ in range(count):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(begun) :], skip_special_tokens=True)


@torch.no_grad()
def test_greedy_texts_are_the_likeliest_tokens_after_each_prompt(model, tokenizer):
    prompts = ["The cat", "A dog saw", ""]
    texts = sample_texts(model, tokenizer, count=5, max_new_tokens=8, temperature=0, prompts=prompts)
    assert texts == [greedy(model, tokenizer, prompts[i % 3], 8) for i in range(5)]


@torch.no_grad()
def test_draws_follow_the_whole_distribution_of_the_model(model, tokenizer):
    """One token each, against the probabilities: transformers' own default would leave 50 of them."""
    count, start = 4000, torch.tensor([[tokenizer.bos_token_id]])
    for temperature in (1.0, 3.0):
        texts = sample_texts(model, tokenizer, count=count, max_new_tokens=1, temperature=temperature)
        p = torch.softmax(model(start).logits[0, -1].double() / temperature, dim=-1)
        p[tokenizer.eos_token_id] += p[tokenizer.pad_token_id]  # both give an empty text
        expected: dict[str, float] = {}
        for i, share in enumerate(p.tolist()):
            text = tokenizer.decode([i], skip_special_tokens=True)
            expected[text] = expected.get(text, 0) + (0 if i == tokenizer.pad_token_id else share)
        for text, share in expected.items():
            spread = math.sqrt(share * (1 - share) / count)
            assert abs(texts.count(text) / count - share) < 5 * spread + 1 / count, text


def test_settings_of_the_model_and_random_states_stay_out_of_it(model, tokenizer):
    options = {"count": 6, "max_new_tokens": 12, "seed": 3}
    before = sample_texts(model, tokenizer, **options)
    assert sample_texts(model, tokenizer, **{**options, "seed": 4}) != before
    own = model.generation_config
    model.train()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    try:
        model.generation_config = type(own)(top_k=1, repetition_penalty=5.0, do_sample=True, max_length=3)
        given = model.generation_config
        assert sample_texts(model, tokenizer, **options) == before
        assert model.generation_config is given
        assert model.training
    finally:
        model.generation_config = own
        model.eval()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


@pytest.mark.parametrize("kind", ["hybrid", "gpt2"])
def test_a_model_left_in_training_mode_samples_without_dropout(kind, tokenizer):
    """Dropout would change the logits, and so the likeliest tokens."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    if kind == "gpt2":
        torch.manual_seed(0)
        dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
        size = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**size, **special, **dropout, initializer_range=0.5))
    else:
        model = build_model(kind, vocab_size=len(tokenizer), **special, dropout=0.5)
    model.train()
    ids = torch.tensor([tokenizer("The cat saw").input_ids])
    assert not torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    texts = sample_texts(model, tokenizer, count=4, max_new_tokens=16, temperature=0, prompts=["The cat"])
    assert model.training
    with torch.no_grad():
        assert set(texts) == {greedy(model.eval(), tokenizer, "The cat", 16)}


def by_name(found: list[Measurement], split: str) -> dict[str, Measurement]:
    return {m.name: m for m in found if m.split == split}


def test_numbers_are_those_of_the_texts(model, tokenizer):
    options = {"count": 8, "max_new_tokens": 24, "seed": 1}
    training = [TEXT, "nothing of it"]
    seen = []
    found = measure_samples(
        model,
        tokenizer,
        **options,
        training_texts=training,
        reference_texts=[TEXT],
        on_progress=lambda done, total: seen.append((done, total)),
    )
    samples = sample_texts(model, tokenizer, **options)
    pieces = cut_references(tokenizer, [TEXT], 8, 24)
    for split, texts in (("samples", samples), ("reference", pieces)):
        words, named = [split_words(text) for text in texts], by_name(found, split)
        shares, longest = measure_overlap(texts, training)
        expected = {
            "distinct_1": distinct_n(words, 1),
            "distinct_4": distinct_n(words, 4),
            "seq_rep_4": repetition(words, 4),
            "self_bleu_4": self_bleu(words),
            "training_overlap_1": shares[1],
            "training_overlap_4": shares[4],
        }
        for name, figure in expected.items():
            assert (named[name].value, named[name].n, named[name].stderr) == tuple(figure), name
        assert named["longest_copied_span"].value == len(longest)
        assert named["words_per_text"].value == pytest.approx(np.mean([len(text) for text in words]))
    reference = by_name(found, "reference")
    assert {reference[f"training_overlap_{n}"].value for n in (1, 2, 4, 8)} == {1.0}
    assert reference["distinct_2"].value < by_name(found, "samples")["distinct_2"].value
    generated = [done for done, total in seen if total == 8 * 24]
    assert generated == sorted(generated)
    assert (generated[0], generated[-1]) == (0, 8 * 24)
    assert seen[-1] == (2, 2)


def test_training_texts_in_a_store_are_read_like_a_list(models, tokenizer):
    options = {"count": 3, "max_new_tokens": 20}
    copied = sample_texts(models["hybrid"], tokenizer, **options)[1]
    training = [TEXT, copied, "A dog ran away.\n"]
    stored = as_documents([Document(text, "text") for text in training])
    found = [
        measure_samples(models["hybrid"], tokenizer, **options, training_texts=texts)
        for texts in (training, stored, stored.texts())
    ]
    assert found[0] == found[1]
    assert found[0] == found[2]
    longest = by_name(found[0], "samples")["longest_copied_span"]
    assert longest.value == len(split_words(copied)) > 0


def test_reference_pieces_do_not_overlap_and_are_as_long_as_samples(tokenizer):
    numbered = " ".join(f"{i}" for i in range(3000))
    pieces = cut_references(tokenizer, [numbered], 10, 20)
    assert len(pieces) == 10
    assert all(len(tokenizer(piece).input_ids) == 20 for piece in pieces)
    assert all(piece in numbered for piece in pieces)
    assert len(set(pieces)) == 10
    short = cut_references(tokenizer, ["abcdefgh"], 4, 20)
    assert "".join(short) == "abcdefgh"
    many = cut_references(tokenizer, [f"text {i}" for i in range(100)] + [" "], 10, 20)
    assert many == [f"text {i * 10}" for i in range(10)]


def test_features_are_the_hidden_states_at_the_last_token(model, tokenizer):
    ids = [tokenizer(text).input_ids for text in ("The cat", "A dog saw the cat", "")]
    start = tokenizer.bos_token_id
    found = last_hidden_states(model, ids, start)
    with torch.no_grad():
        for row, text in zip(found, ids, strict=True):
            states = model(torch.tensor([[start, *text]]), output_hidden_states=True).hidden_states
            np.testing.assert_allclose(row, states[-1][0, -1].numpy(), rtol=1e-4, atol=1e-4)


def test_mauve_tells_equal_from_different_texts(models, tokenizer):
    pytest.importorskip("mauve")
    generator = np.random.default_rng(0)
    human, same, other = (generator.normal(size=(200, 8)) + shift for shift in (0, 0, 3))
    assert mauve_score(human, human) == pytest.approx(1, abs=1e-6)
    assert mauve_score(human, same) > 0.9
    assert mauve_score(human, other) < 0.2
    texts = [f"{i} The cat saw a dog; it ran away." for i in range(20)]
    found = measure_samples(
        models["hybrid"], tokenizer, count=20, max_new_tokens=8, reference_texts=texts, mauve=True
    )
    assert 0 < found[-1].value <= 1
    assert (found[-1].name, found[-1].stderr) == ("mauve_own_features", None)


def test_mauve_without_its_package_or_texts_is_refused_before_any_work(models, tokenizer, monkeypatch):
    with pytest.raises(UserError, match="at least 20"):
        measure_samples(models["gpt2"], tokenizer, count=30, mauve=True)
    monkeypatch.setattr(samples_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .mauve-text>="):
        measure_samples(models["gpt2"], tokenizer, count=30, mauve=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1}, "count = 1"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"prompts": []}, "empty list"),
    ],
)
def test_wrong_settings_are_named(models, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        measure_samples(models["gpt2"], tokenizer, **options)
