"""Promise: a decoder of n-gram counts is a model like any other, with the probabilities of its table."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import contracts
from support.kneser_ney import p_of_table
from support.models import EOS, VOCAB, build_ngram
from support.runs import SMALL, small_recipe
from transformers import AutoModelForCausalLM

from hf_genlm.card import write_card
from hf_genlm.card.privacy import describe_audit
from hf_genlm.comparison import compare
from hf_genlm.config.recipe import Recipe, load_recipe
from hf_genlm.config.settle import settle
from hf_genlm.decoding import FastGenerator
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.exporting.targets import EXPORTS, export_model
from hf_genlm.loading import load
from hf_genlm.model import (
    CarriedState,
    GenLMConfig,
    GenLMForCausalLM,
    GenLMForSequenceClassification,
    GenLMForTokenClassification,
    GenLMModel,
)
from hf_genlm.privacy.audit import audit, count_stored_text
from hf_genlm.run_folder import RunFolder
from hf_genlm.space.files.demo import scoring
from hf_genlm.space.files.demo.layers import list_layers
from hf_genlm.space.files.demo.models import LanguageModel
from hf_genlm.text.store import Document
from hf_genlm.text.tokenizer import train_tokenizer
from hf_genlm.training import counting
from hf_genlm.training.check import check
from hf_genlm.training.corpus import prepare_corpus
from hf_genlm.training.counting import measure_counts
from hf_genlm.training.train import train

ORDERS = [1, 2, 4, 6]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("max_entries", [None, 700, 1])
def test_probabilities_are_those_of_the_table_and_sum_to_one(order, max_entries):
    model, counts = build_ngram(order, max_entries)
    rows = torch.randint(0, VOCAB, (4, 24), generator=torch.Generator().manual_seed(0))
    rows[:2] = torch.from_numpy(np.random.default_rng(3).zipf(1.3, (2, 24)) % (VOCAB - 2) + 2)
    rows[:, 0] = EOS
    logits = model(rows, use_cache=False).logits.double()
    assert (logits.exp().sum(-1) - 1).abs().max() < 1e-5
    for row, found in zip(rows[1:3].tolist(), logits[1:3], strict=True):
        for t in range(24):
            expected = p_of_table(counts, row[max(0, t + 2 - order) : t + 1])
            np.testing.assert_allclose(found[t].exp().numpy(), expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    "check",
    [contracts.check_greedy_search, contracts.check_beam_search, contracts.check_left_padded_batch,
     contracts.check_rejected_drafts, contracts.check_static_cache_after_reset, contracts.check_packed_row],
    ids=lambda check: check.__name__,
)  # fmt: skip
@pytest.mark.parametrize("order", ORDERS)
def test_it_keeps_the_contracts_of_a_decoder(check, order, tokens):
    check(build_ngram(order)[0], tokens)


@pytest.mark.parametrize("order", ORDERS)
def test_chunks_of_a_text_and_carried_rows_equal_the_whole(order, tokens):
    model, _ = build_ngram(order)
    whole = model(tokens, use_cache=False).logits
    cache, parts = None, []
    for chunk in tokens.split([1, 5, 2, 4], dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert cache.get_seq_length() == 12
    carried, positions = CarriedState(), torch.arange(12).expand(3, -1)
    halves = [
        model(tokens[:, at], position_ids=positions[:, at], past_key_values=carried).logits
        for at in (slice(0, 7), slice(7, 12))
    ]
    assert torch.equal(torch.cat(halves, 1), whole)
    restarted = model(tokens[:, 7:], position_ids=positions[:, :5], past_key_values=carried).logits
    assert torch.equal(restarted, model(tokens[:, 7:], use_cache=False).logits)


def test_padding_inside_a_row_is_passed_over(tokens):
    model, _ = build_ngram()
    mask = torch.ones_like(tokens)
    mask[:, [2, 3, 7]] = 0
    kept = model(tokens[:, mask[0].bool()], use_cache=False).logits
    assert torch.equal(model(tokens, attention_mask=mask, use_cache=False).logits[:, mask[0].bool()], kept)


@pytest.mark.parametrize(
    "options",
    [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0.3}, {"typical_p": 0.8},
     {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"num_beams": 3}, {"prefill_chunk_size": 4}],
    ids=str,
)  # fmt: skip
def test_every_way_to_sample_works(options, tokens):
    model, _ = build_ngram()
    made = []
    for use_cache in (True, "prefill_chunk_size" in options):
        torch.manual_seed(0)
        made.append(model.generate(tokens, do_sample=True, max_new_tokens=9, use_cache=use_cache, **options))
    assert torch.equal(*made)
    fast = FastGenerator(model)
    assert torch.equal(
        fast.generate(tokens, do_sample=False, max_new_tokens=9),
        model.generate(tokens, do_sample=False, max_new_tokens=9),
    )
    assert fast.plain_because == "it looks its counts up"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_saves_and_loads(dtype, tokens, tmp_path):
    model, _ = build_ngram()
    model.save_pretrained(tmp_path / "first")
    loaded = GenLMForCausalLM.from_pretrained(tmp_path / "first", dtype=dtype)
    if dtype is torch.float32:
        loaded.save_pretrained(tmp_path / "second")
        assert contracts.files_of(tmp_path / "first") == contracts.files_of(tmp_path / "second")
    difference = loaded(tokens).logits - model(tokens).logits
    assert difference.abs().max() <= (0 if dtype is torch.float32 else 0.05)
    assert loaded.num_parameters() == sum(tensor.numel() for tensor in model.state_dict().values())


def test_the_same_tokens_without_this_package(tmp_path):
    model, _ = build_ngram(5)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, transformers\n"
        "sys.modules['hf_genlm'] = None\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained('.', trust_remote_code=True)\n"
        "print(model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=64, do_sample=False,"
        " eos_token_id=None).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    expected = model.generate(
        torch.tensor([[1, 5, 9]]), max_new_tokens=64, do_sample=False, eos_token_id=None
    )
    assert done.stdout.split("\n")[-2] == str(expected.tolist())


def test_what_needs_a_network_is_refused_by_name(tokens, tmp_path):
    model, _ = build_ngram()
    for kind in (GenLMModel, GenLMForSequenceClassification, GenLMForTokenClassification):
        with pytest.raises(ValueError, match="an n-gram model is a table of counts"):
            kind(model.config)
    with pytest.raises(TypeError, match="Old embeddings"):
        model.resize_token_embeddings(70)
    with pytest.raises(IndexError):
        model(torch.tensor([[VOCAB]]))
    for to in EXPORTS:
        with pytest.raises(UserError, match=r"table of n-gram counts, which no other program reads"):
            export_model(model, None, to, tmp_path / "out")
    for fields in (
        {"mixer_types": ["ngram", "gru"]}, {"mixer_types": ["gru", "ngram"]}, {"ngram_order": 7},
        {"ngram_order": 3, "ngram_sizes": [1]}, {"ngram_order": 2, "ngram_sizes": [-1]},
        {"vocab_size": 2**25}, {"bigram_size": 8},
    ):  # fmt: skip
        with pytest.raises(Exception, match=r"ngram|n-gram"):
            GenLMConfig(**{"mixer_types": ["ngram"], **fields})


@pytest.mark.parametrize(
    ("stated", "words"),
    [("model.size=tiny", "--size is for a network"), ("privacy.epsilon=8", "keep the text word for word")],
)
def test_a_recipe_that_counts_cannot_follow_is_refused(stated, words):
    with pytest.raises(UserError, match=words):
        check(load_recipe(None, ["model.decoder=ngram", stated]))


def test_a_run_counts_evaluates_exactly_and_says_what_it_did(text_folder, tmp_path):
    heard = {}
    recipe = small_recipe(text_folder, "model.decoder=ngram", "training.num_samples=1")
    run = train(recipe, tmp_path / "run", lambda event, fields: heard.update({event: fields}))
    config = GenLMConfig.from_pretrained(run.model)
    assert heard["counted"]["order"] == config.ngram_order
    assert heard["counted"]["entries"] == sum(config.ngram_sizes[1:])
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert heard["model"]["parameters"] == model.num_parameters()
    values = {m.name: m for m in read_measurements(run.evaluation)}
    assert values["bits_per_byte"].value < 8
    settled = load_recipe(run.recipe)
    assert settled.model.ngram_order == config.ngram_order
    assert settle(settled).evaluation.carry_state
    write_card(run)
    card = (run.model / "README.md").read_text()
    assert "The n-grams of" in card
    assert "| optimizer |" not in card
    assert "shares the weights" not in card
    assert "holds pieces of its training text" in card
    stored = f"{sum(config.ngram_sizes[1:]):,} n-grams of"
    assert stored in card
    found = audit(run.path, limit=2, attacks="extraction")
    assert found.measurements[0].value == sum(config.ngram_sizes[1:])
    assert stored in describe_audit(read_measurements(run.audit))[0]
    assert count_stored_text(GenLMConfig()).measurements == []
    again = train(settled, tmp_path / "again")
    weights = [folder.model / "model.safetensors" for folder in (run, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    with pytest.raises(UserError, match="--from is for a network"):
        check(load_recipe(None, [f"model.init_from={run.path}"]))


def test_a_stream_is_counted_and_a_comparison_takes_counts(text_folder, tmp_path):
    streamed = train(
        small_recipe(text_folder, "model.decoder=ngram", "corpus.stream=true", "model.ngram_order=3"),
        tmp_path / "streamed",
    )
    assert GenLMConfig.from_pretrained(streamed.model).ngram_order == 3
    found = compare(
        str(text_folder), decoders=["ngram", "gru"], steps=2, seeds=1, out=tmp_path / "both",
        assignments=["tokenizer.vocab_size=400"],
    )  # fmt: skip
    counted = next(each for each in found.results.candidates if each.name == "ngram")
    assert math.isfinite(counted.mean.value)
    assert counted.parameters == counted.runs[0].parameters > 10_000


def test_the_demo_shows_it(text_folder, tmp_path):
    run = train(small_recipe(text_folder, "model.decoder=ngram"), tmp_path / "run")
    shown = LanguageModel("counts", *load(run.path))
    assert scoring.score_text(shown, "Some words of a text.").bits > 0
    ids, _ = scoring.encode_prompt(shown, "Some")
    assert list(scoring.generate(shown, ids, scoring.Sampling(max_new_tokens=5)))
    assert list_layers(shown) == []


def test_the_hidden_states_are_the_last_words(tokens):
    model, _ = build_ngram(4)
    embedded, contexts = model(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(embedded[..., 0], tokens + 1.0)
    assert contexts[0, 5].tolist() == [tokens[0, t].item() + 1 for t in (3, 4, 5)]
    assert contexts[0, 0].tolist() == [0, 0, tokens[0, 0].item() + 1]


def test_the_start_of_the_tables_is_uniform():
    model = GenLMForCausalLM(GenLMConfig(decoder="ngram", vocab_size=7, ngram_order=3))
    assert torch.allclose(model(torch.tensor([[1, 2, 3]])).logits.exp(), torch.tensor(1 / 7))
    assert Recipe().model.decoder != "ngram"


def test_a_network_is_shown_beside_counts(text_folder, tmp_path, monkeypatch):
    heard = {}
    monkeypatch.setattr(counting, "_SHARE_OF_TIME", 1e9)

    def listen(event, fields):
        heard[event] = fields

    run = train(small_recipe(text_folder), tmp_path / "run", listen)
    assert heard["counts"]["order"] == 5
    write_card(run)
    bits = heard["counts"]["bits_per_byte"]
    shown = f"counts of 5-grams of the same tokens, smoothed by Kneser-Ney, need {bits:.3f}"
    assert shown in (run.model / "README.md").read_text()
    counted = train(
        small_recipe(text_folder, "model.decoder=ngram", "model.ngram_order=5"), tmp_path / "counted"
    )
    values = {m.name: m.value for m in read_measurements(counted.evaluation)}
    assert values["bits_per_byte"] == pytest.approx(heard["counts"]["bits_per_byte"], abs=2e-5)


@pytest.mark.parametrize("kind", ["private", "stream", "chats"])
def test_no_counts_are_shown_of_a_private_text_a_stream_or_chats(kind, text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "_SHARE_OF_TIME", 1e9)
    sources, stated = tmp_path / "texts.jsonl", ["tokenizer.vocab_size=270", "training.steps=2"]
    if kind == "stream":
        sources, stated = text_folder, [*stated, "corpus.stream=true"]
    elif kind == "chats":
        chats = [[("user", f"{i} and {i}?"), ("assistant", f"That is {2 * i}.")] for i in range(30)]
        lines = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    else:  # at least 1,000 documents, and a vocabulary of public text
        lines = [{"text": f"{i} times {i % 7} is {i * (i % 7)}."} for i in range(1200)]
        documents = [Document("what everyone may read, 0123456789 times. " * 20, "public")]
        tokenizer = train_tokenizer(documents, load_recipe(None, stated[:1]).tokenizer, 1000)
        tokenizer.save_pretrained(tmp_path / "public")
        stated = ["training.steps=2", "privacy.epsilon=8", f"tokenizer.path={tmp_path / 'public'}"]
    if kind != "stream":
        sources.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    recipe = load_recipe(None, [*SMALL[1:], f"corpus.sources={sources}", *stated])
    logged = {event["event"] for event in train(recipe, tmp_path / "run").read_log()}
    assert "evaluated" in logged
    assert "counts" not in logged


def test_counts_beside_a_network_take_little_of_its_time_and_memory(text_folder, tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path / "run")
    corpus = prepare_corpus(run, small_recipe(text_folder))
    share = (corpus.n_tokens + corpus.validation.n_tokens) / 1_000_000 / 0.03  # seconds of training
    for seconds, is_shown in ((0.9 * share, False), (1.1 * share, True)):
        measure_counts(run, corpus, seconds)
        assert ("counts" in {event["event"] for event in run.read_log()}) is is_shown
    n_tokens = corpus.n_tokens + corpus.validation.n_tokens
    for most, is_shown in ((n_tokens - 1, False), (n_tokens, True)):
        monkeypatch.setattr(counting, "_MAX_COMPARED", most)
        other = RunFolder.create(tmp_path / str(most))
        measure_counts(other, corpus, 1e9)
        assert ("counts" in {event["event"] for event in other.read_log()}) is is_shown
