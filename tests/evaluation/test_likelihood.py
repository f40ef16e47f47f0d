"""The promise: every token of held-out text is scored exactly once, and no figure depends on the batching."""

import copy
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_genlm.errors import UserError
from hf_genlm.evaluation.likelihood import make_windows, measure_likelihood, select_windows
from hf_genlm.evaluation.measurement import (
    Measurement,
    bootstrap_sums,
    percentile_interval,
    ratio_stderr,
    read_measurements,
    update_measurements,
    write_measurements,
)
from hf_genlm.text.store import Document, TextStore, as_documents

START, VOCAB, CONTEXT = 0, 29, 12


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Two threads on tensors of this size only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module", params=["gpt2", "lstm", "gated_linear", "hybrid", "sliding"])
def any_model(request, model):
    """GPT-2 of transformers and models of ours: recurrent, attending and both."""
    if request.param == "gpt2":
        return model
    from hf_genlm.model import GenLMConfig, GenLMForCausalLM

    torch.manual_seed(0)
    config = GenLMConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        decoder=request.param,
        max_position_embeddings=16,
        initializer_range=0.4,
    )
    return GenLMForCausalLM(config).eval()


def make_documents(count: int, longest: int, seed: int = 0) -> list[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, size=count)
    return [
        (rng.integers(1, VOCAB, size=n).astype(np.int32), int(n + rng.integers(0, 3 * n + 1)))
        for n in lengths
    ]


@torch.no_grad()
def reference_nats(model, ids, context: int, stride: int) -> list[float]:
    """In float64, from the definition: one forward pass per prediction, no batch, no padding."""
    model = copy.deepcopy(model).double().eval()
    text, nats = [START, *map(int, ids)], []
    for t in range(1, len(text)):
        # the window that scores token t begins at the smallest multiple of stride from which t is in reach
        begin = max(0, math.ceil((t - context) / stride)) * stride
        if stride == context:  # lm-eval's windows: the last one is full
            begin = max(0, min(begin, len(ids) - context))
        logits = model(torch.tensor([text[begin:t]]), use_cache=False).logits[0, -1]
        nats.append(-float(logits.log_softmax(-1)[text[t]]))
    return nats


def by_name(found: list[Measurement]) -> dict[str, Measurement]:
    assert len({m.name for m in found}) == len(found)
    return {m.name: m for m in found}


def measure(model, documents, **options) -> dict[str, Measurement]:
    return by_name(measure_likelihood(model, documents, **{"start_id": START, "context": CONTEXT, **options}))


class CountingModel(torch.nn.Module):
    """Unigram logits that name the token; counts what it is asked and refuses masks and caches."""

    def __init__(self, logits_V: torch.Tensor):
        super().__init__()
        self.logits_V = torch.nn.Parameter(logits_V)
        self.config = SimpleNamespace(vocab_size=len(logits_V))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids, use_cache):
        assert use_cache is False
        assert torch.is_inference_mode_enabled()
        assert not self.training
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.logits_V.expand(*input_ids.shape, -1))


@pytest.mark.parametrize(
    ("longest", "stride"), [(9, None), (12, None), (50, None), (50, 1), (50, 5), (50, 12)]
)
def test_equals_the_definition_in_float64(any_model, longest, stride):
    documents = make_documents(6, longest)
    nats = [reference_nats(any_model, ids, CONTEXT, stride or CONTEXT // 2) for ids, _ in documents]
    total, tokens = math.fsum(x for row in nats for x in row), sum(map(len, nats))
    n_bytes = sum(size for _, size in documents)
    found = measure(any_model, documents, stride=stride)
    assert found["nats_per_token"].value == pytest.approx(total / tokens, rel=1e-6)
    assert found["perplexity"].value == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["bits_per_byte"].value == pytest.approx(total / math.log(2) / n_bytes, rel=1e-6)
    assert [found[name].n for name in found] == [tokens, tokens, n_bytes, tokens, tokens, tokens]


def test_a_document_that_fits_is_one_plain_cross_entropy(model):
    ids = np.arange(1, CONTEXT + 1)
    inputs = torch.tensor([[START, *ids[:-1]]])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(inputs).logits[0], torch.tensor(ids))
    assert measure(model, [(ids, 30)])["nats_per_token"].value == pytest.approx(float(expected), rel=1e-6)


def test_no_measurement_depends_on_the_batch_size(any_model):
    documents = make_documents(25, 30)
    one = measure(any_model, documents, batch_size=1)
    for options in (
        {"batch_size": 3},
        {"batch_size": 64},
        {"batch_size": 64, "max_logits": 3 * CONTEXT * VOCAB},
    ):
        other = measure(any_model, documents, **options)
        for name, expected in one.items():
            assert other[name].value == pytest.approx(expected.value, rel=1e-6)
            assert other[name].stderr == pytest.approx(expected.stderr, rel=1e-5)


def test_order_of_documents_changes_nothing(model):
    documents = make_documents(30, 30)
    assert measure(model, documents[::-1])["bits_per_byte"].value == pytest.approx(
        measure(model, documents)["bits_per_byte"].value, rel=1e-6
    )


@pytest.mark.parametrize("stride", [1, 5, 6, 12])
def test_every_token_is_scored_once_with_enough_before_it(stride):
    lengths = [0, 1, 11, 12, 13, 100]
    scored: dict[tuple[int, int], int] = {}
    for window in make_windows(lengths, CONTEXT, stride):
        assert window.stop - window.start <= CONTEXT
        for target in range(window.first, window.stop):
            scored[window.document, target] = scored.get((window.document, target), 0) + 1
            assert window.start == 0 or target - window.start >= CONTEXT - stride
    assert scored == {(d, t): 1 for d, length in enumerate(lengths) for t in range(length)}


def test_sums_of_an_instrumented_model_name_each_token_once():
    # log P(token k) = -k up to a constant that all tokens share: the sum of nats is the sum of scored ids
    logits = -torch.arange(VOCAB, dtype=torch.float32)
    model = CountingModel(logits)
    documents = make_documents(25, 60, seed=3)
    found = measure(model, documents, batch_size=4)
    ids = np.concatenate([ids for ids, _ in documents])
    constant = float(logits.double().logsumexp(0))
    assert found["nats_per_token"].value == pytest.approx(constant + ids.mean(), rel=1e-6)
    assert found["top1_accuracy"].value == pytest.approx((ids == 0).mean())
    assert found["top5_accuracy"].value == pytest.approx((ids < 5).mean())
    assert max(rows for rows, _ in model.shapes) == 4
    assert max(length for _, length in model.shapes) == CONTEXT


@pytest.mark.parametrize("windows", [1, 2, 5])
def test_max_logits_bounds_every_batch(windows):
    model = CountingModel(torch.zeros(VOCAB))
    measure(model, make_documents(10, 60), batch_size=64, max_logits=windows * CONTEXT * VOCAB)
    assert windows * CONTEXT - CONTEXT < max(rows * length for rows, length in model.shapes)
    assert max(rows * length for rows, length in model.shapes) <= windows * CONTEXT


def test_a_window_beyond_max_logits_is_read_alone():
    model = CountingModel(torch.zeros(VOCAB))
    measure(model, make_documents(2, 60), max_logits=1)
    assert {rows for rows, _ in model.shapes} == {1}


def test_ties_count_against_the_model():
    found = measure(CountingModel(torch.zeros(VOCAB)), make_documents(5, 20))
    assert found["nats_per_token"].value == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert found["top1_accuracy"].value == found["top5_accuracy"].value == 0.0


def test_empty_documents_contribute_nothing(model):
    documents = make_documents(30, 20)
    padded = [(np.array([], dtype=np.int32), 7), *documents, (np.array([], dtype=np.int32), 0)]
    assert measure(model, padded) == measure(model, documents)


def test_units_splits_and_directions(model):
    found = measure(model, make_documents(4, 20), split="test")
    assert {m.split for m in found.values()} == {"test"}
    assert {name: (m.unit, m.higher_is_better) for name, m in found.items()} == {
        "nats_per_token": ("nats/token", False),
        "perplexity": ("1", False),
        "bits_per_byte": ("bits/byte", False),
        "top1_accuracy": ("fraction", True),
        "top5_accuracy": ("fraction", True),
        "calibration_error": ("fraction", False),
    }


@pytest.mark.parametrize("training", [True, False])
def test_modes_of_all_modules_are_restored(model, training):
    model.train(training)
    model.transformer.h[0].train(not training)  # a part that its owner keeps in another mode
    before = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    measure(model, make_documents(2, 9))
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), random_state)
    model.eval()


def test_mode_is_restored_after_an_error():
    model = CountingModel(torch.full((VOCAB,), math.nan)).train()
    with pytest.raises(UserError, match="diverged"):
        measure(model, make_documents(2, 9))
    assert model.training


class TestPartial:
    def test_is_the_full_pass_when_it_covers_all(self, model):
        documents = make_documents(30, 30)
        assert measure(model, documents, max_tokens=10**9) == measure(model, documents)

    @pytest.mark.parametrize("max_tokens", [1, 100, 1000])
    def test_scores_just_enough_and_repeats(self, model, max_tokens):
        documents = make_documents(60, 60)
        found = measure(model, documents, max_tokens=max_tokens)
        assert max_tokens <= found["nats_per_token"].n < max_tokens + CONTEXT
        assert measure(model, documents, max_tokens=max_tokens, batch_size=2)[
            "perplexity"
        ].value == pytest.approx(found["perplexity"].value, rel=1e-6)

    def test_windows_score_as_in_the_full_pass(self, model):
        """The parts of one long document, each scored by the definition, make up the figure."""
        documents = [*make_documents(1, 1, seed=5), (np.tile(np.arange(1, VOCAB), 6), 300)]
        windows = make_windows([len(ids) for ids, _ in documents], CONTEXT, CONTEXT // 2)
        chosen = select_windows(windows, 40)
        assert chosen != windows[: len(chosen)], "the part is spread, not the beginning"
        nats = [reference_nats(model, ids, CONTEXT, CONTEXT // 2) for ids, _ in documents]
        parts = [x for w in chosen for x in nats[w.document][w.first : w.stop]]
        found = measure(model, documents, max_tokens=40)
        assert found["nats_per_token"].value == pytest.approx(np.mean(parts), rel=1e-6)
        bytes_per_token = sum(size for _, size in documents) / sum(len(ids) for ids, _ in documents)
        assert found["bits_per_byte"].value == pytest.approx(
            np.mean(parts) / math.log(2) / bytes_per_token, rel=1e-6
        )
        assert found["bits_per_byte"].n == round(len(parts) * bytes_per_token)

    def test_lies_near_the_full_pass(self, model):
        documents = make_documents(120, 60)
        full, part = measure(model, documents), measure(model, documents, max_tokens=900)
        for name, whole in full.items():
            assert abs(part[name].value - whole.value) < 4 * part[name].stderr, name


class TestIntervals:
    def test_are_percentiles_of_ratios_over_drawn_documents(self):
        logits = torch.linspace(2, -2, VOCAB)
        nats_of = -logits.double().log_softmax(0).numpy()
        documents = make_documents(80, 40)
        words = np.arange(1, 81)
        found = measure(CountingModel(logits), documents, n_words=words)
        nats = np.array([nats_of[ids].sum() for ids, _ in documents])
        tokens = np.array([len(ids) for ids, _ in documents])
        sizes = np.array([size for _, size in documents])
        hits = np.array([(ids < 5).sum() for ids, _ in documents])
        draws = np.random.default_rng(1).integers(0, 80, size=(20000, 80))
        drawn = {
            "nats_per_token": nats[draws].sum(1) / tokens[draws].sum(1),
            "perplexity": np.exp(nats[draws].sum(1) / tokens[draws].sum(1)),
            "bits_per_byte": nats[draws].sum(1) / math.log(2) / sizes[draws].sum(1),
            "word_perplexity": np.exp(nats[draws].sum(1) / words[draws].sum(1)),
            "top5_accuracy": hits[draws].sum(1) / tokens[draws].sum(1),
        }
        for name, values in drawn.items():
            expected = np.quantile(values, [0.025, 0.975])
            assert found[name].interval == pytest.approx(tuple(expected), abs=0.15 * values.std()), name

    def test_are_always_the_same_and_hold_the_value(self, model):
        documents = make_documents(25, 30)
        found = measure(model, documents)
        again = measure(model, documents)
        for name, one in found.items():
            assert one.interval == again[name].interval
            assert one.interval[0] < one.value < one.interval[1]

    def test_hold_the_mean_of_all_text_as_often_as_they_say(self):
        """Of 400 samples of 40 documents each, 95 % do, but for chance and the few clusters."""
        generator = np.random.default_rng(0)
        means = generator.normal(3.0, 1.0, size=(400, 40))
        tokens = generator.integers(50, 150, size=(400, 40))
        hits = 0
        for mean, n in zip(means, tokens, strict=True):
            sums = bootstrap_sums(np.stack([mean * n, n], axis=1), num_resamples=1000)
            low, high = percentile_interval(sums[:, 0] / sums[:, 1], 40)
            hits += low <= 3.0 <= high
        assert 0.90 <= hits / 400 <= 0.97

    @pytest.mark.parametrize("max_draws", [1, 60, 30 * 63])
    def test_do_not_depend_on_the_number_of_clusters_drawn_at_once(self, max_draws):
        sums = np.random.default_rng(0).normal(size=(30, 2))
        whole = bootstrap_sums(sums, num_resamples=64)
        assert whole.shape == (64, 2)
        assert whole.mean(axis=0) == pytest.approx(sums.sum(axis=0), abs=4.0)
        assert np.allclose(bootstrap_sums(sums, num_resamples=64, max_draws=max_draws), whole)

    def test_are_unknown_for_one_cluster(self, model):
        assert {m.interval for m in measure(model, [(np.array([3]), 1)]).values()} == {None}


class TestCalibration:
    def naive(self, probabilities: np.ndarray, targets: np.ndarray) -> float:
        """Guo et al., 2017, eq. 3, from all probabilities at once."""
        confidence = probabilities.max(axis=1)
        hits = probabilities.argmax(axis=1) == targets
        error = 0.0
        for k in range(15):
            chosen = (confidence > k / 15) & (confidence <= (k + 1) / 15)
            if chosen.any():
                error += chosen.mean() * abs(hits[chosen].mean() - confidence[chosen].mean())
        return error

    @pytest.mark.parametrize("batch_size", [1, 7])
    def test_equals_the_definition(self, any_model, batch_size):
        documents = make_documents(30, CONTEXT)
        probabilities, targets = [], []
        with torch.no_grad():
            for ids, _ in documents:
                inputs = torch.tensor([[START, *map(int, ids[:-1])]])
                probabilities.append(any_model(inputs, use_cache=False).logits[0].softmax(-1).numpy())
                targets.append(ids)
        expected = self.naive(np.concatenate(probabilities), np.concatenate(targets))
        found = measure(any_model, documents, batch_size=batch_size)["calibration_error"]
        assert expected > 0.01
        assert found.value == pytest.approx(expected, rel=1e-5)

    def test_is_nothing_where_confidence_is_what_happens(self):
        """A model that gives one token 3/4, which is right three times out of four."""
        logits = torch.full((VOCAB,), math.log(0.25 / (VOCAB - 1)))
        logits[3] = math.log(0.75)
        ids = np.tile([3, 3, 3, 4], 3)
        found = measure(CountingModel(logits), [(ids, 12)] * 20)
        assert found["calibration_error"].value == pytest.approx(0.0, abs=1e-6)
        always = measure(CountingModel(logits), [(np.full(8, 3), 8)] * 20)
        assert always["calibration_error"].value == pytest.approx(0.25, abs=1e-6)
        assert always["calibration_error"].stderr == pytest.approx(0.0, abs=1e-6)


class TestWords:
    def test_perplexity_is_that_of_the_words_of_all_documents(self, model):
        documents = make_documents(25, 20)
        words = np.arange(1, 26)
        found = measure(model, documents, n_words=words)
        nats = found["nats_per_token"].value * found["nats_per_token"].n
        assert found["word_perplexity"].value == pytest.approx(math.exp(nats / words.sum()), rel=1e-9)
        assert found["word_perplexity"].n == words.sum()
        assert "word_perplexity" not in measure(model, documents)
        assert list(found)[:-1] == list(measure(model, documents)), "and nothing else changes"

    def test_are_counted_as_lm_eval_counts_them(self):
        texts = [
            "a",
            " a b ",
            "one two\n\nthree  four\tfive",
            "\u3000no\u00a0break \x1d",
            "x" * 30 + " " * 30,
        ]
        documents = [Document(text, "x") for text in texts]
        counted = as_documents(documents, TextStore(chunk_bytes=8)).count_words()  # longer ones in parts
        assert counted.tolist() == [len(re.split(r"\s+", text)) for text in texts]


class TestStandardError:
    def test_is_that_of_a_bootstrap_over_documents(self):
        logits = torch.linspace(2, -2, VOCAB)  # a unigram model: the nats of a document are a sum in numpy
        nats_of = -logits.double().log_softmax(0).numpy()
        documents = make_documents(80, 40)
        found = measure(CountingModel(logits), documents)
        nats = np.array([nats_of[ids].sum() for ids, _ in documents])
        tokens = np.array([len(ids) for ids, _ in documents])
        sizes = np.array([size for _, size in documents])
        hits = np.array([(ids < 5).sum() for ids, _ in documents])
        draws = np.random.default_rng(0).integers(0, 80, size=(8000, 80))
        per_token = nats[draws].sum(1) / tokens[draws].sum(1)
        per_byte = nats[draws].sum(1) / math.log(2) / sizes[draws].sum(1)
        assert found["nats_per_token"].stderr == pytest.approx(per_token.std(), rel=0.05)
        assert found["bits_per_byte"].stderr == pytest.approx(per_byte.std(), rel=0.05)
        assert found["perplexity"].stderr == pytest.approx(np.exp(per_token).std(), rel=0.08)
        top5 = hits[draws].sum(1) / tokens[draws].sum(1)
        assert found["top5_accuracy"].stderr == pytest.approx(top5.std(), rel=0.05)

    def test_windows_are_the_clusters_of_few_documents(self, model):
        (ids, size) = (np.tile(np.arange(1, VOCAB), 4), 280)
        found = measure(model, [(ids, size)])
        nats = np.array(reference_nats(model, ids, CONTEXT, 6))
        parts = [nats[w.first : w.stop] for w in make_windows([len(ids)], CONTEXT, 6)]
        expected = ratio_stderr([p.sum() for p in parts], [len(p) for p in parts])
        assert found["nats_per_token"].stderr == pytest.approx(expected, rel=1e-4)
        assert found["bits_per_byte"].stderr == pytest.approx(
            expected / math.log(2) * len(ids) / size, rel=1e-4
        )

    def test_is_unknown_for_one_cluster(self, model):
        assert {m.stderr for m in measure(model, [(np.array([3]), 1)]).values()} == {None}

    def test_of_a_mean_is_the_textbook_one(self):
        y = np.random.default_rng(1).normal(size=50)
        assert ratio_stderr(y, np.ones(50)) == pytest.approx(y.std(ddof=1) / math.sqrt(50))
        assert ratio_stderr([2.0, 4.0, 6.0], [1, 2, 3]) == pytest.approx(0.0, abs=1e-12)
        assert ratio_stderr([1.0], [1.0]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context_length = 1"),
        ({"stride": 0}, "stride = 0"),
        ({"stride": CONTEXT + 1}, "stride = 13"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"max_tokens": 0}, "max_tokens = 0"),
    ],
)
def test_wrong_input_is_named(model, options, message):
    with pytest.raises(UserError, match=message):
        measure(model, make_documents(1, 5), **options)


@pytest.mark.parametrize("documents", [[], [(np.array([], dtype=np.int32), 0)]])
def test_nothing_to_score_is_named(model, documents):
    with pytest.raises(UserError, match="no token to score"):
        measure(model, documents)


def test_progress_reaches_its_total(model):
    seen: list[tuple[int, int]] = []
    found = measure(model, make_documents(9, 30), batch_size=2, on_progress=lambda *at: seen.append(at))
    assert seen == sorted(seen)
    assert seen[-1] == (found["nats_per_token"].n,) * 2


class TestFile:
    def test_round_trip(self, model, tmp_path):
        found = measure_likelihood(model, make_documents(3, 9), start_id=START, context=CONTEXT)
        write_measurements(tmp_path / "evaluation.json", found)
        assert read_measurements(tmp_path / "evaluation.json") == found
        assert list(json.loads((tmp_path / "evaluation.json").read_text())) == ["measurements"]
        assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]

    def test_without_intervals_is_what_it_was(self, tmp_path):
        """Files that were written before there were any are read, and none is written where there is none."""
        plain = Measurement("perplexity", 3.0, "1", 3, 0.5, "validation", False)
        write_measurements(tmp_path / "e.json", [plain])
        (content,) = json.loads((tmp_path / "e.json").read_text())["measurements"]
        assert set(content) == {"name", "value", "unit", "n", "stderr", "split", "higher_is_better"}
        assert read_measurements(tmp_path / "e.json") == [plain]

    def test_an_update_replaces_what_has_the_same_name_and_split(self, tmp_path):
        def measured(name: str, value: float, split: str) -> Measurement:
            return Measurement(name, value, "1", 3, 0.5, split, False, (value - 1, value + 1))

        old = [measured("a", 1, "x"), measured("b", 2, "x"), measured("a", 3, "y")]
        update_measurements(tmp_path / "e.json", old)
        update_measurements(tmp_path / "e.json", [measured("b", 5, "x"), measured("c", 6, "x")])
        expected = [old[0], measured("b", 5, "x"), old[2], measured("c", 6, "x")]
        assert read_measurements(tmp_path / "e.json") == expected

    @pytest.mark.parametrize("interval", ["3", "[1]", '[1, "x"]', "[1, 2, 3]"])
    def test_a_damaged_interval_is_named(self, tmp_path, interval):
        content = Measurement("p", 3.0, "1", 3, None, "v", False).to_json() | {
            "interval": json.loads(interval)
        }
        (tmp_path / "e.json").write_text(json.dumps({"measurements": [content]}))
        with pytest.raises(UserError, match=r"e\.json"):
            read_measurements(tmp_path / "e.json")

    def test_what_is_not_finite_stays_json(self, tmp_path):
        write_measurements(
            tmp_path / "e.json", [Measurement("perplexity", math.inf, "1", 3, None, "validation", False)]
        )
        json.loads((tmp_path / "e.json").read_text(), parse_constant=lambda word: pytest.fail(word))
        assert math.isnan(read_measurements(tmp_path / "e.json")[0].value)

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", '{"measurements": 3}', '{"measurements": [{"name": "x"}]}', "\xff\xfe"]
    )
    def test_damage_is_named(self, tmp_path, content):
        (tmp_path / "e.json").write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match=r"e\.json"):
            read_measurements(tmp_path / "e.json")

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_measurements(tmp_path / "none.json")
