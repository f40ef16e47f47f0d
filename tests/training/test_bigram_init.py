"""Promise: training.init=bigrams sets embedding and head from the bigrams of the text, exactly as defined."""

import itertools
import math

import numpy as np
import pytest
import torch
from support.models import EOS, NETWORKS, VOCAB, build_model
from support.runs import losses, small_recipe

from hf_genlm.config.settle import settle
from hf_genlm.errors import UserError
from hf_genlm.model import GenLMConfig, GenLMForCausalLM
from hf_genlm.training.bigram_init import (
    PRIOR,
    calibrate_bias,
    count_bigrams,
    embed_bigrams,
    fit_head,
    init_from_bigrams,
)
from hf_genlm.training.train import train


@pytest.fixture(scope="module")
def stream() -> np.ndarray:
    """(6000,) token ids of a Markov chain: some successors of each token are likely, the rest are not."""
    random = np.random.default_rng(0)
    table = random.dirichlet(np.full(VOCAB - 1, 0.1), size=VOCAB)  # the last token never occurs
    ids = [EOS]
    while len(ids) < 6000:
        ids.append(random.choice(VOCAB - 1, p=table[ids[-1]]))
    return np.array(ids, dtype=np.uint16)


def dense_log_ratios(stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(p (V,), S (V, V)) by the definition, with each row's mean under p taken off."""
    pairs, singles = np.zeros((VOCAB, VOCAB)), np.zeros(VOCAB)
    for before, after in itertools.pairwise(stream):
        pairs[before, after] += 1
    for token in stream:
        singles[token] += 1
    p = np.maximum(singles, 0.5)
    p /= p.sum()
    prior = PRIOR * p
    # the normaliser of a row is a constant of it
    ratios = np.log((pairs + prior) / prior)
    return p, ratios - (ratios @ p)[:, None]


def build(decoder: str = "gated_linear", **overrides) -> GenLMForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "output_bias": True}
    return GenLMForCausalLM(
        GenLMConfig(decoder=decoder, tie_word_embeddings=False, initializer_range=0.2, **shape, **overrides)
    )


def loss_of(model: GenLMForCausalLM, stream: np.ndarray) -> float:
    rows = torch.from_numpy(stream[: 60 * 100].astype(np.int64)).view(60, 100)
    with torch.no_grad():
        return model.eval()(rows, labels=rows).loss.item()


def test_statistics_are_those_of_a_count_by_hand(stream):
    found = count_bigrams(stream, VOCAB)
    p, ratios = dense_log_ratios(stream)
    assert found.n_tokens == 6000
    assert found.n_bigrams == len({(int(a), int(b)) for a, b in itertools.pairwise(stream)})
    torch.testing.assert_close(found.frequencies.double(), torch.from_numpy(p), atol=1e-7, rtol=1e-5)
    unit = torch.eye(VOCAB)
    expected = torch.from_numpy(ratios)
    torch.testing.assert_close(found.times(unit).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.transposed_times(unit).double(), expected.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [4, 16])
def test_embedding_spans_the_best_approximation(stream, width):
    p, ratios = dense_log_ratios(stream)
    weighted = np.sqrt(p)[:, None] * ratios * np.sqrt(p)
    left, singular, _ = np.linalg.svd(weighted)
    statistics = count_bigrams(stream, VOCAB)
    for options, share in (({}, 0.95), ({"iterations": 60}, 0.9999)):
        table = np.sqrt(p)[:, None] * embed_bigrams(statistics, width, **options).double().numpy()
        found = table / np.linalg.norm(table, axis=0)
        assert np.square(found.T @ weighted).sum() > share * np.square(singular[:width]).sum()
    best = (left[:, :width] * singular[:width]) @ left[:, :width].T
    assert np.linalg.norm(table @ table.T - best) < 0.01 * np.linalg.norm(best)


def test_an_embedding_wider_than_the_vocabulary_has_rank_to_spare(stream):
    table = embed_bigrams(count_bigrams(stream, VOCAB), VOCAB + 20)
    assert table.shape == (VOCAB, VOCAB + 20)
    assert torch.isfinite(table).all()


def test_head_is_the_weighted_least_squares_fit(stream):
    p, ratios = dense_log_ratios(stream)
    read = np.random.default_rng(1).standard_normal((VOCAB, 12))
    inputs = np.concatenate([read, np.ones((VOCAB, 1))], axis=1) * np.sqrt(p)[:, None]
    expected, *_ = np.linalg.lstsq(inputs, ratios * np.sqrt(p)[:, None], rcond=None)
    weight, bias = fit_head(count_bigrams(stream, VOCAB), torch.from_numpy(read).float(), ridge=1e-9)
    np.testing.assert_allclose(weight.numpy(), expected[:-1].T, atol=2e-3)
    np.testing.assert_allclose(bias.numpy(), np.log(p) + expected[-1], atol=2e-3)


def test_the_bias_makes_each_token_as_likely_as_it_is_frequent(stream):
    statistics = count_bigrams(stream, VOCAB)
    read = embed_bigrams(statistics, 32)
    weight, bias = fit_head(statistics, read)
    p, errors = statistics.frequencies, []
    for found in (bias, calibrate_bias(p, read, weight, bias)):
        predicted = p @ torch.softmax(read @ weight.T + found, dim=-1)
        errors.append((p * (p / predicted).log()).sum().item())
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("decoder", NETWORKS)
@pytest.mark.parametrize("overrides", [{}, {"embedding_size": 24}, {"bigram_size": 64}], ids=str)
def test_loss_begins_near_that_of_a_bigram_model(stream, decoder, overrides):
    if "bigram_size" in overrides and decoder in ("transformer", "sliding"):
        pytest.skip("a bigram embedding needs a recurrent first layer")
    model = build(decoder, **overrides)
    p = np.bincount(stream, minlength=VOCAB) / len(stream)
    entropy_of_one = -(p[p > 0] * np.log(p[p > 0])).sum()
    before = loss_of(model, stream)
    assert before > entropy_of_one  # new, it knows less than how often each token occurs
    init_from_bigrams(model, stream, keep_embedding=False)
    p, ratios = dense_log_ratios(stream)
    rows = np.log(p) + ratios
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    bigram = -rows[stream[:-1].astype(int), stream[1:].astype(int)].mean()
    assert loss_of(model, stream) < bigram + 0.5 * (entropy_of_one - bigram)


def test_a_given_embedding_is_kept(stream):
    model = build()
    given = model.model.embed_tokens.weight.clone()
    before = loss_of(model, stream)
    init_from_bigrams(model, stream, keep_embedding=True)
    assert torch.equal(model.model.embed_tokens.weight, given)
    assert loss_of(model, stream) < before - 1.0


def test_initialization_is_deterministic_and_leaves_the_random_state(stream):
    models = []
    for seed in (1, 2):
        model = build()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        init_from_bigrams(model, stream, keep_embedding=False)
        assert torch.equal(torch.get_rng_state(), state)
        models.append(model)
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)
    assert models[0].training


def test_a_tied_head_is_refused(stream):
    with pytest.raises(ValueError, match="not tied"):
        init_from_bigrams(build_model(["gru"]), stream, keep_embedding=False)


@pytest.mark.parametrize(
    ("assignments", "tied", "start", "bias"),
    [
        ([], False, "bigrams", True),
        (["model.embedding_size=8"], True, "random", False),
        (["model.tie_word_embeddings=true"], True, "random", False),
        (["training.init=random"], False, "random", False),
        (["model.embedding_size=8", "model.tie_word_embeddings=false"], False, "bigrams", True),
        (["model.output_bias=false"], False, "bigrams", False),
    ],
    ids=str,
)
def test_init_tied_head_and_output_bias_follow_from_each_other(text_folder, assignments, tied, start, bias):
    recipe = settle(small_recipe(text_folder, *assignments))
    assert (recipe.model.tie_word_embeddings, recipe.training.init, recipe.model.output_bias) == (
        tied,
        start,
        bias,
    )


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["training.init=bigram"], "did you mean 'bigrams'"),
        (["training.init=bigrams", "model.tie_word_embeddings=true"], "fits the head to the text"),
    ],
)
def test_contradictions_are_named(text_folder, assignments, message):
    with pytest.raises(UserError, match=message):
        settle(small_recipe(text_folder, *assignments))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_first_steps_do_not_undo_the_start(text_folder, tmp_path, optimizer):
    """Adam's first steps know only the sign of a gradient: at the full rate, the loss rises by a nat here."""
    recipe = small_recipe(
        text_folder, "model.hidden_size=64", "training.batch_size=32", "training.steps=60",
        "training.logging_steps=1", "training.num_validations=0", f"training.optimizer={optimizer}",
        "training.warmup_steps=40", "model.ngram_order=0",
    )  # fmt: skip
    curve = losses(train(recipe, tmp_path / "run"))
    mean = curve[0]
    for loss in curve[: len(curve) // 5]:
        mean = 0.7 * mean + 0.3 * loss
        assert mean <= curve[0] + 0.02  # the noise of a batch
    assert curve[-1] < curve[0] - 0.3


def test_warm_up_by_steps_follows_the_start_and_can_be_stated(text_folder):
    for assignments, steps in (([], 10), (["training.init=random"], 0), (["training.warmup_steps=3"], 3)):
        assert settle(small_recipe(text_folder, *assignments)).training.warmup_steps == steps


def test_a_run_starts_below_its_random_twin(text_folder, tmp_path):
    first, stated = {}, ("training.steps=2", "model.ngram_order=0")
    for start in ("bigrams", "random"):
        run = train(small_recipe(text_folder, f"training.init={start}", *stated), tmp_path / start)
        log = run.read_log()
        first[start] = next(event["loss"] for event in log if event["event"] == "step")
        assert any(event["event"] == "bigrams" for event in log) == (start == "bigrams")
    assert first["random"] > math.log(400) - 0.5
    assert first["bigrams"] < first["random"] - 1.0
