"""Promise: counts inside a network are mixed with what it predicts, exactly, and leave one out."""

import functools

import pytest
import torch
import torch.nn.functional as F
from support.kneser_ney import p_without
from support.models import EOS, STACKS, VOCAB, build_model, count_random_text, random_text
from support.runs import small_recipe

from hf_genlm.card import write_card
from hf_genlm.config.recipe import Recipe, load_recipe
from hf_genlm.config.settings import Facts
from hf_genlm.config.settle import settle
from hf_genlm.decoding import FastGenerator
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.exporting.targets import network_of
from hf_genlm.extension import extend
from hf_genlm.model import GenLMConfig, GenLMForCausalLM, GenLMForSequenceClassification, ngram_genlm
from hf_genlm.model.loss_genlm import cap_logits
from hf_genlm.run_folder import RunFolder
from hf_genlm.training import counting
from hf_genlm.training.check import check
from hf_genlm.training.corpus import prepare_corpus
from hf_genlm.training.train import train

WITH_COUNTS = [name for name, stack in STACKS.items() if "ngram_order" in stack]


@pytest.fixture(params=WITH_COUNTS)
def model(request):
    return build_model(request.param)


def counted_rows(n_rows: int = 12, n_tokens: int = 24) -> torch.Tensor:
    """Beginnings of documents of the text that `build_model` counts, (rows, tokens)."""
    text = torch.from_numpy(random_text())
    starts = (text == EOS).nonzero().squeeze(1)
    return torch.stack([text[start : start + n_tokens] for start in starts[:n_rows].tolist()])


def test_it_predicts_the_gated_sum_of_both(model, tokens):
    logits = model(tokens).logits.double()
    assert (logits.exp().sum(-1) - 1).abs().max() < 1e-5
    network = network_of(model)
    out = model.model(tokens)
    mixture = model.mixture
    counted, features = mixture.ngrams.of_contexts(out.contexts)
    units = mixture.of_state(out.last_hidden_state)
    if mixture.history is None:
        gate = mixture.gates(units, features)[0]
    else:
        repeated, more = mixture.history.of_contexts(out.contexts.flatten(0, 1), VOCAB)
        more = more.view(*tokens.shape, -1)
        gate, share = mixture.gates(units, torch.cat([features, more], dim=-1))
        counted = (1 - share[..., None]) * counted + share[..., None] * repeated.view_as(counted)
        assert share.std() > 0.01
    gate = torch.sigmoid(gate)[..., None]
    expected = gate * network(tokens).logits.softmax(-1) + (1 - gate) * counted
    torch.testing.assert_close(logits.exp().float(), expected, rtol=1e-4, atol=1e-8)
    assert gate.std() > 0.01


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("max_entries", [None, 900])
def test_a_counted_word_does_not_find_its_own_count(order, max_entries):
    counts = count_random_text(order, max_entries=max_entries)
    config = GenLMConfig(
        decoder="transformer", hidden_size=8, vocab_size=VOCAB, ngram_order=order, ngram_sizes=counts.sizes
    )
    model = GenLMForCausalLM(config).eval()
    counts.fill(model)
    rows = counted_rows(4)
    words = F.pad(rows, (0, 1), value=-100)[:, 1:]
    contexts = model.model(rows).contexts
    log_p, _ = model.mixture.ngrams.of_words(contexts, words, leave_one_out=True)
    for row, found in zip(rows.tolist(), log_p.exp().tolist(), strict=True):
        for t in range(0, 23, 3):
            expected = p_without(counts, row[max(0, t + 2 - order) : t + 1], row[t + 1])
            assert found[t] == pytest.approx(expected, rel=2e-4, abs=1e-8)
    with_it, _ = model.mixture.ngrams.of_words(contexts, words)
    assert with_it[:, :-1].sum() > log_p[:, :-1].sum()
    whole = model.mixture.ngrams(contexts)[:, :-1]
    torch.testing.assert_close(with_it[:, :-1], whole.gather(2, words[:, :-1, None]).squeeze(2))


def test_no_gate_sees_a_context_that_only_the_word_itself_has():
    model = build_model("counts")
    rows = counted_rows()
    words = F.pad(rows, (0, 1), value=-100)[:, 1:]
    contexts = model.model(rows).contexts
    _, without = model.mixture.ngrams.of_words(contexts, words, leave_one_out=True)
    _, with_it = model.mixture.ngrams.of_words(contexts, words)
    is_known = slice(3, None, 3)  # of the contexts of two words
    assert with_it[:, 1:-1, is_known].min() == 1
    assert without[:, 1:-1, is_known].mean() < 0.9


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_its_loss_and_gradients_are_those_of_the_definition(share, smoothing, softcap, tokens):
    model = build_model("counts", final_logit_softcapping=softcap).double()
    model.mixture.ngrams.float()
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]

    loss = model(
        tokens, labels=tokens, skip_logits=True, network_share=share, label_smoothing=smoothing, z_loss=0.01
    ).loss
    states, targets = model.model(tokens).last_hidden_state, tokens[:, 1:].flatten()
    network = cap_logits(model.lm_head(states), softcap)[:, :-1].flatten(0, 1)
    own = F.cross_entropy(network, targets, label_smoothing=smoothing)
    own = own + 0.01 * network.logsumexp(-1).square().mean()
    together = F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), targets)
    torch.testing.assert_close(loss, together, rtol=1e-6, atol=1e-7)
    for found, wanted in zip(gradients(loss), gradients(share * own + (1 - share) * together), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("skip_logits", [True, False])
def test_any_training_loop_trains_the_network_itself_too(model, tokens, skip_logits):
    """In training mode a share of the gradients comes from the network's own loss; the value does not."""
    share = Recipe().training.network_share  # the default of `train`

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        loss = model(tokens, labels=tokens, skip_logits=skip_logits).loss
        return loss.detach(), torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]

    value, together = run()
    states = model.model(tokens).last_hidden_state
    own = F.cross_entropy(model.lm_head(states)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    own = torch.autograd.grad(own, model.model.embed_tokens.weight)[0]
    model.train()
    assert run()[0] == value
    torch.testing.assert_close(run()[1], share * own + (1 - share) * together, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(run()[1], together, rtol=1e-2, atol=1e-4)


def test_words_before_a_chunk_a_beam_or_a_fast_step_are_remembered(model, tokens):
    whole = model(tokens).logits
    cache, parts = None, []
    for chunk in tokens.split([1, 5, 2, 4], dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens, use_cache=False).logits, whole, rtol=1e-4, atol=1e-4)
    fast = FastGenerator(model, program="traced")
    for ids in (tokens, tokens[:1]):
        made = fast.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=None)
        assert torch.equal(made, model.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=None))
    assert fast.plain_because is None


def test_new_tokens_have_no_counts_and_change_none(model, tokens, tmp_path):
    before = model(tokens).logits
    model.resize_token_embeddings(VOCAB + 3)
    after = model(tokens).logits
    assert after.shape[-1] == VOCAB + 3
    counted, _ = model.mixture.ngrams.of_contexts(model.model(tokens).contexts)
    assert counted.shape[-1] == VOCAB
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after[..., :VOCAB])
    model.save_pretrained(tmp_path)
    assert torch.equal(GenLMForCausalLM.from_pretrained(tmp_path)(tokens).logits, after)
    assert torch.isfinite(model(torch.full_like(tokens, VOCAB + 2)).logits).all()


def test_a_classifier_takes_the_network_and_says_nothing_of_the_counts(model, tokens, tmp_path, caplog):
    model.save_pretrained(tmp_path)
    classifier = GenLMForSequenceClassification.from_pretrained(tmp_path)
    assert "mixture" not in caplog.text
    assert classifier(tokens).logits.shape == (3, 2)


@pytest.mark.parametrize(
    ("stated", "order"),
    [("model.dropout=0", 5), ("model.ngram_order=3", 3), ("model.ngram_order=0", None),
     ("model.embedding_size=16", None), ("privacy.epsilon=8", None), ("corpus.stream=true", None)],
)  # fmt: skip
def test_a_network_has_counts_unless_the_recipe_speaks_against_them(stated, order):
    settings = settle(load_recipe(None, [stated]))
    assert settings.architecture.ngram_order == order
    assert settings.model.ngram_order == (order or 0)
    sharded = settle(load_recipe(None, [stated]), Facts(is_sharded=True))
    assert sharded.model.ngram_order == (3 if order == 3 else 0)  # check() refuses what is stated


@pytest.mark.parametrize(
    ("stated", "words"),
    [(["privacy.epsilon=8", "model.ngram_order=3"], "counts keep the text word for word"),
     (["model.decoder=ngram", "model.ngram_order=0"], "at least 1 token")],
)  # fmt: skip
def test_a_recipe_that_counts_cannot_follow_is_refused(stated, words):
    with pytest.raises(UserError, match=words):
        check(load_recipe(None, stated))


def test_counts_help_the_network_and_go_with_its_model(text_folder, tmp_path):
    heard, bits = {}, {}
    for order in (0, 3):
        recipe = small_recipe(text_folder, f"model.ngram_order={order}")
        run = train(recipe, tmp_path / str(order), lambda event, fields: heard.update({event: fields}))
        bits[order] = next(m.value for m in read_measurements(run.evaluation) if m.name == "bits_per_byte")
    assert bits[3] < bits[0] - 0.1
    assert heard["counted"]["order"] == 3
    model = GenLMForCausalLM.from_pretrained(run.model)
    assert model.config.ngram_order == 3
    assert heard["model"]["parameters"] == model.num_parameters()
    assert heard["model"]["of_counts"] == sum(table.numel() for table in model.mixture.ngrams.parameters())
    write_card(run)
    card = (run.model / "README.md").read_text()
    assert "`n-gram counts`" in card
    assert "| looks for repeated words in | the last 1,024 tokens |" in card
    extended = extend(str(run.path), [str(text_folder)], n_new_tokens=5, out=tmp_path / "extended")
    assert GenLMForCausalLM.from_pretrained(extended.path).config.ngram_sizes == model.config.ngram_sizes


def test_a_model_in_half_precision_keeps_its_tables(tokens, tmp_path):
    model = build_model("counts")
    model.save_pretrained(tmp_path)
    loaded = GenLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, table in [*model.mixture.ngrams.named_parameters(), ("theta", model.mixture.history.theta)]:
        kept = loaded.mixture.history if name == "theta" else loaded.mixture.ngrams
        assert torch.equal(kept.get_parameter(name), table), name
    assert loaded(tokens).logits.dtype == torch.bfloat16
    difference = (loaded(tokens).logits - model(tokens).logits).abs()
    assert difference.mean() < 0.05
    assert difference.max() < 0.6  # beside a history; 0.3 without one, whose gate this random one exaggerates


def test_many_logits_are_mixed_a_few_rows_at_a_time(model, tokens, monkeypatch):
    with torch.no_grad():
        whole = model(tokens).logits
        monkeypatch.setattr(ngram_genlm, "_MAX_PROBABILITIES", 5 * VOCAB)
        torch.testing.assert_close(model(tokens).logits, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens).logits, whole, rtol=1e-5, atol=1e-5)


def test_a_static_cache_passes_over_padding(model):
    tokens = counted_rows(3, 12)  # what padding hides has been counted
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    mask[2, :11] = 0  # fewer words than a context has
    asked = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None,
             "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    static = model.generate(tokens, cache_implementation="static", disable_compile=True, **asked)
    dynamic = model.generate(tokens, **asked)
    for found, expected in zip(static.logits, dynamic.logits, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("share", "leave_one_out"), [(2.0, True), (0.75, True), (0.25, False)])
def test_one_is_left_out_where_most_of_the_text_was_counted(
    share, leave_one_out, text_folder, tmp_path, monkeypatch
):
    run = RunFolder.create(tmp_path / "run")
    recipe = small_recipe(text_folder)
    corpus = prepare_corpus(run, recipe)
    most = int(share * corpus.n_tokens)
    monkeypatch.setattr(counting, "MAX_BESIDE_NETWORK", most)
    monkeypatch.setattr(counting, "stream_of", functools.partial(counting.stream_of, block=256))
    counts = counting.count_corpus(run, corpus, settle(recipe, Facts(vocab_size=len(corpus.tokenizer))))
    assert counts.leave_one_out is leave_one_out
    assert 0.9 * min(share, 1) * corpus.n_tokens < counts.n_tokens < min(most, corpus.n_tokens) * 1.02 + 256
