"""Promise: an audit finds what a model kept of its training text, finds nothing where there is nothing, and
its statistics are exact."""

import json
import math
import random
import re
import shutil
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from support.dp_audit import many_runs_bound
from support.models import build_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_genlm.card.privacy import describe_audit, privacy_section
from hf_genlm.cli.main import main
from hf_genlm.config.recipe import CorpusRecipe, PrivacyRecipe, Recipe, load_recipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import Measurement, read_measurements
from hf_genlm.files import read, read_json, write_json
from hf_genlm.privacy import exposure, statistics
from hf_genlm.privacy.exposure import CanaryLosses, null_p_value, skew_normal_exposure
from hf_genlm.privacy.extraction import count_copies, count_matched_tokens
from hf_genlm.privacy.membership import SCORES, Passages
from hf_genlm.privacy.target import Passage, Span, TargetModel, draw_spans, passage_of
from hf_genlm.report.curves import CURVES_FILE, write_curves
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.canaries import BITS, Canaries, check_canaries, draw_canaries, plant
from hf_genlm.text.corpus import count_text, read_corpus
from hf_genlm.text.encoding import TokenizedDocuments
from hf_genlm.training.check import check
from hf_genlm.training.corpus import prepare_corpus

pytestmark = pytest.mark.usefixtures("drawn")

START = 1


def null_mean(num_references: int = exposure.N_REFERENCES) -> float:
    """Mean exposure in bits of a rank that is uniform over 1 .. n + 1: log2 e for large n."""
    n = num_references + 1
    return math.log2(n) - math.lgamma(n + 1) / math.log(2) / n


def made_text(folder, n_documents: int, seed: int = 0):
    """Documents of 40 words each, drawn from 150 made ones: neither split knows anything of the other."""
    draw = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bcdfghklmnprstv" for vowel in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(150)]
    folder.mkdir()
    for i in range(n_documents):
        (folder / f"{i:03}.txt").write_text(" ".join(draw.choices(words, k=40)) + ".\n")
    return folder


SMALL = [
    "tokenizer.vocab_size=300",
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.bigram_size=0",
    "training.max_seq_length=64",
    "training.batch_size=16",
    "training.num_validations=0",
    "training.num_samples=0",
    "training.learning_rate=0.01",
    "training.init=random",
    "corpus.validation_fraction=0.4",
]
SETTINGS = [word for assignment in SMALL for word in ("--set", assignment)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return made_text(tmp_path_factory.mktemp("made") / "text", 70)


@pytest.fixture(scope="module")
def overtrained(text, tmp_path_factory) -> RunFolder:
    """Some 40 passes over a small text, with canaries, and audited by the command line."""
    out = tmp_path_factory.mktemp("run") / "run"
    command = ["train", str(text), "--canaries", "1,32", "--steps", "200", "--out", str(out), *SETTINGS]
    # a network by itself: what tables of counts store is told without an attack
    alone = ["--set", "training.weight_decay=0", "--set", "model.ngram_order=0"]
    assert main([*command, *alone]) == 0
    assert main(["audit", str(out)]) == 0
    return RunFolder(out)


@pytest.fixture(scope="module")
def fresh(overtrained, tmp_path_factory) -> RunFolder:
    """The same run, its weights as before the first step."""
    out = tmp_path_factory.mktemp("fresh") / "run"
    shutil.copytree(overtrained.path, out)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    torch.manual_seed(0)
    type(model)(model.config).save_pretrained(out / "model")
    assert main(["audit", str(out)]) == 0
    return RunFolder(out)


def measured(run: RunFolder) -> dict[str, Measurement]:
    """By name; those of the held-out text behind `held_out:`."""
    found = read_measurements(run.audit)
    return {f"held_out:{m.name}" if m.split == "validation" else m.name: m for m in found}


# what an audit finds


def test_an_overtrained_model_gives_itself_away(overtrained):
    found = measured(overtrained)
    most = math.log2(exposure.N_REFERENCES + 1)
    assert found["exposure/32"].value == pytest.approx(most, abs=0.1)
    assert found["exposure_extrapolated/32"].value > 30  # of 39.9 that the secrets have
    assert found["exposure_p_value/32"].value < 1e-6
    assert found["canaries_extracted/32"].value >= 0.8
    assert found["canaries_extracted/0"].value == 0.0
    assert 0.01 < found["exposure_p_value/0"].value < 0.99
    areas = {name: m for name, m in found.items() if name.startswith("membership_auc/")}
    assert max(m.value for name, m in areas.items() if "blind" not in name) > 0.9
    for name in ("blind_zlib", "blind_tokens"):  # the splits themselves are alike
        low, high = areas[f"membership_auc/{name}"].interval
        assert low < 0.5 < high
    assert (
        found["extraction_10_tokens/prefix_10"].value
        >= found["held_out:extraction_10_tokens/prefix_10"].value
    )


def test_a_fresh_model_gives_nothing_away(fresh):
    found = measured(fresh)
    for count in (0, 1, 32):
        low, high = found[f"exposure/{count}"].interval
        assert low < null_mean() < high, count
        assert 0.01 < found[f"exposure_p_value/{count}"].value < 0.99
        assert found[f"canaries_extracted/{count}"].value == 0.0
    for name in (name for name in SCORES if name != "reference"):
        low, high = found[f"membership_auc/{name}"].interval
        assert low < 0.5 < high, name
    assert found["extraction_50_tokens/prefix_10"].value == 0.0
    assert found["epsilon_lower_bound/1"].value == found["epsilon_lower_bound/32"].value == 0.0


def test_the_card_and_the_terminal_say_it(overtrained, fresh, capsys):
    said = " ".join(describe_audit(read_measurements(overtrained.audit)))
    assert "the model memorised them" in said
    assert "no sign that it memorised them" in " ".join(describe_audit(read_measurements(fresh.audit)))
    card = (overtrained.model / "README.md").read_text()
    assert "## Privacy" in card
    assert "No privacy audit was made" not in card
    assert "membership&#95;auc" not in card
    assert "| exposure/32 |" in card
    assert "(plots/audit.png)" in card
    assert (overtrained.model / "plots" / "audit.png").read_bytes().startswith(b"\x89PNG")
    planted = read_json(overtrained.corpus)["canaries"]
    assert f"copies of {planted['planted']} canaries" in card


def test_no_secret_leaves_the_run_folder(overtrained):
    canaries = read(overtrained.canaries, Canaries)
    published = [file for file in overtrained.model.rglob("*") if file.is_file()]
    published += [overtrained.corpus, overtrained.audit, overtrained.recipe]
    assert overtrained.canaries.name not in {file.name for file in published[:-3]}
    for file in published:
        content = file.read_bytes()
        assert not [c for c in canaries.candidates if c.secret.encode() in content], file


def test_the_same_audit_twice_is_the_same(overtrained, tmp_path, capsys):
    before = read_json(overtrained.audit)["measurements"]
    capsys.readouterr()
    attacks = ["--attacks", "membership,extraction"]
    assert main(["audit", str(overtrained.path), *attacks, "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)["measurements"]
    names = ("membership", "extraction", "canaries_extracted", "stored_ngrams")
    key = lambda m: (m["name"], m["split"])  # noqa: E731
    assert sorted(printed, key=key) == sorted((m for m in before if m["name"].startswith(names)), key=key)
    assert (tmp_path / "audit.json").is_file()


def test_a_model_that_is_not_ours_with_another_as_reference(overtrained, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(overtrained.model)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=96)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    sides = [made_text(tmp_path / name, 25, seed) for seed, name in enumerate(("train", "held_out"), 1)]
    words = ["--trained-on", str(sides[0]), "--held-out", str(sides[1]), "--reference", str(overtrained.path)]
    assert main(["audit", str(tmp_path / "gpt2"), *words, "--limit", "10"]) == 0
    out = capsys.readouterr().out
    assert "membership_auc/reference" in out
    assert re.search(r" 20  \w", out)
    assert "exposure" not in out


MISTAKES = {
    "no text": (["gpt2-like/model"], "by --trained-on"),
    "one side": (["RUN", "--trained-on", "x.txt"], "belong together"),
    "an unknown attack": (["RUN", "--attacks", "memebership"], "did you mean 'membership'"),
    "no passage": (["RUN", "--limit", "0"], "whole number above 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input_is_one_line_and_exit_2(mistake, overtrained, capsys):
    words, said = MISTAKES[mistake]
    assert main(["audit", *(str(overtrained.path) if word == "RUN" else word for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_another_text_is_refused(overtrained, text, tmp_path, capsys):
    shutil.copytree(overtrained.path, tmp_path / "run")
    shutil.copytree(text, tmp_path / "text")
    changed = tmp_path / "text" / "003.txt"
    changed.write_text(changed.read_text().upper())
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml", [f"corpus.sources={tmp_path / 'text'}"])
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    assert main(["audit", str(tmp_path / "run")]) == 2
    assert "has changed since it was trained" in capsys.readouterr().err


# canaries


def test_canaries_stand_in_the_training_text_alone(text, tmp_path):
    privacy = PrivacyRecipe(canaries=[1, 4], canaries_each=10)
    corpus = read_corpus(CorpusRecipe(sources=[str(text)]))
    before = [document.text for document in corpus.train]
    canaries = plant(corpus, privacy)
    assert canaries == draw_canaries([1, 4], 10, 0)
    assert canaries.candidates != draw_canaries([1, 4], 10, 1).candidates
    train = [document.text for document in corpus.train]
    held = "".join(document.text for document in corpus.validation)
    planted = [canary for canary in canaries.candidates if canary.is_planted]
    assert 0 < len(planted) < 20
    for canary in canaries.candidates:
        assert train.count(canary.text) == (canary.repetitions if canary.is_planted else 0)
        assert canary.secret not in held
    texts = {canary.text for canary in planted}
    assert [document for document in train if document not in texts] == before
    places = [i for i, document in enumerate(train) if document in texts]
    assert places[0] < len(train) / 3
    assert places[-1] > 2 * len(train) / 3
    of_train = corpus.report["train"]
    assert of_train == count_text(corpus.train)
    assert of_train["bytes"] == sum(len(document.encode()) for document in train)
    assert corpus.report["canaries"]["documents"] == sum(canary.repetitions for canary in planted)
    ids = prepare_corpus(
        RunFolder.create(tmp_path / "run"),
        load_recipe(None, [f"corpus.sources={text}", "privacy.canaries=1,4", "privacy.canaries_each=10"]),
    )
    assert len(ids.train) == len(train)
    assert ids.tokenizer.decode(ids.train[places[0]][0]) == train[places[0]]
    assert read_json(tmp_path / "run" / "corpus.json")["train"]["sha256"] == of_train["sha256"]


def test_the_coins_are_fair():
    candidates = draw_canaries([1, 2], 2000, 7).candidates
    n_planted = sum(canary.is_planted for canary in candidates)
    assert stats.binomtest(n_planted, 4000).pvalue > 0.01
    digits = [int(d) for canary in candidates for d in canary.secret.replace(" ", "")]
    assert stats.chisquare(np.bincount(digits, minlength=10)).pvalue > 0.01
    assert len({canary.prefix for canary in candidates}) == 4000
    assert pytest.approx(12 * math.log2(10)) == BITS


@pytest.mark.parametrize(
    ("privacy", "corpus", "words"),
    [
        ({"canaries": [1]}, {"stream": True}, "corpus.stream"),
        ({"canaries": [1]}, {"languages": {"fra": ["x"]}}, "corpus.languages"),
        ({"canaries": [4, 4]}, {}, "once"),
        ({"canaries": [1, 2, 3, 4, 5, 6], "canaries_each": 10_000}, {}, "too many"),
    ],
)
def test_canaries_that_cannot_be_planted_are_refused(privacy, corpus, words):
    with pytest.raises(UserError, match=words):
        check_canaries(PrivacyRecipe(**privacy), CorpusRecipe(**corpus))


def test_train_asks_for_that_check():
    recipe = Recipe(corpus=CorpusRecipe(stream=True), privacy=PrivacyRecipe(canaries=[1]))
    with pytest.raises(UserError, match=r"privacy\.canaries"):
        check(recipe)


# statistics


def test_exposure_by_rank_is_exact():
    others = np.array([[5.0, 6.0, 7.0], [5.0, 6.0, 7.0], [6.0, 6.0, 6.0]])
    losses = CanaryLosses((), np.array([4.0, 6.5, 6.0]), others)
    assert losses.by_rank.tolist() == [2.0, 2 - math.log2(3), 2 - math.log2(2.5)]
    assert losses.surprise.tolist() == pytest.approx([2 / math.sqrt(2 / 3), -0.5 / math.sqrt(2 / 3), 0.0])


def test_the_null_of_exposure_is_that_of_a_uniform_rank():
    n = 63
    exact = sum(math.log2((n + 1) / rank) for rank in range(1, n + 2)) / (n + 1)
    assert null_mean(n) == pytest.approx(exact, rel=1e-12)
    assert null_mean(10**9) == pytest.approx(math.log2(math.e), abs=1e-6)
    drawn = -np.log2(np.random.default_rng(0).uniform(size=(4000, 5)))
    p_values = [null_p_value(row) for row in drawn]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert null_p_value([3.0]) == pytest.approx(2**-3)


@pytest.mark.parametrize("shape", [-4.0, 0.0, 3.0])
def test_extrapolated_exposure_is_the_tail_of_a_skew_normal(shape):
    """Moments of a large sample give its parameters back; 1e-6 of it lies below the last point."""
    true = stats.skewnorm(shape, loc=50, scale=4)
    others = true.ppf((np.arange(50_000) + 0.5) / 50_000)
    for chance in (0.9, 0.5, 0.05, 1e-6):
        found = skew_normal_exposure(float(true.ppf(chance)), others)
        assert found == pytest.approx(-math.log2(chance), rel=0.02)


@pytest.mark.parametrize("shape", [-4.0, 0.0, 3.0])
def test_extrapolated_exposure_is_accurate_down_to_the_space_of_secrets(shape):
    """The tail as an integral of the fitted density relative to its end, which does not underflow."""
    others = stats.skewnorm(shape, loc=50, scale=4).rvs(511, random_state=1)
    fitted = stats.skewnorm(*stats.skewnorm.fit(others, method="mm"))
    bits = []
    for distance in (0, 2, 4, 6, 8):
        own = float(others.mean() - distance * others.std())
        end = fitted.logpdf(own)
        relative, _ = quad(lambda x, own=own, end=end: math.exp(fitted.logpdf(own - x) - end), 0, 160)
        bits.append(-(end + math.log(relative)) / math.log(2))
        assert skew_normal_exposure(own, others) == pytest.approx(bits[-1], rel=1e-5)
    assert bits[-1] > 0.65 * BITS


def test_extrapolated_exposure_of_odd_samples():
    """More skewed than any skew-normal distribution, of one value, or far below all references."""
    skewed = np.random.default_rng(0).exponential(size=511)
    assert stats.skew(skewed) > 1
    for sample in (skewed, -skewed):
        found = [skew_normal_exposure(own, sample) for own in np.quantile(sample, [0.9, 0.5, 0.1])]
        assert 0 < found[0] < found[1] < found[2] < 10
    one = np.full(9, 5.0)
    assert [skew_normal_exposure(own, one) for own in (4.0, 5.0, 6.0)] == [math.inf, 1.0, 0.0]
    losses = CanaryLosses((), np.array([-1e6]), skewed[None])
    assert losses.extrapolated.tolist() == [BITS]


def test_clopper_pearson_is_the_exact_binomial_interval():
    """Each end gives exactly 2.5 % to at least as extreme a count; ends at 0 and n are 0 and 1."""
    for hits, n in ((0, 7), (3, 7), (7, 7), (12, 400)):
        low, high = statistics.clopper_pearson(hits, n)
        assert stats.binom.sf(hits - 1, n, low) == pytest.approx(0.025) if hits else low == 0
        assert stats.binom.cdf(hits, n, high) == pytest.approx(0.025) if hits < n else high == 1


def test_auc_and_its_error_are_those_of_all_pairs():
    generator = np.random.default_rng(1)
    members, others = generator.normal(0.7, 1, 40).round(1), generator.normal(0, 1, 30).round(1)
    pairs = np.array([[(m > o) + (m == o) / 2 for o in others] for m in members])
    area, stderr, (low, high) = statistics.auc(members, others)
    assert area == pytest.approx(pairs.mean())
    assert area == pytest.approx(stats.mannwhitneyu(members, others).statistic / pairs.size)
    wanted = math.sqrt(pairs.mean(1).var(ddof=1) / 40 + pairs.mean(0).var(ddof=1) / 30)
    assert stderr == pytest.approx(wanted)
    assert (high - low) / 2 == pytest.approx(1.959964 * stderr)
    assert statistics.auc(members + 100, others)[2] == pytest.approx(
        (0.05 / 2) ** (1 / 30) * np.array([1, 0]) + [0, 1]
    )
    fpr, tpr = statistics.roc(members, others)
    assert np.trapezoid(tpr, fpr) == pytest.approx(area)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)


def test_the_interval_of_auc_covers():
    generator = np.random.default_rng(2)
    true = stats.norm.cdf(1 / math.sqrt(2))
    hits = 0
    for _ in range(400):
        low, high = statistics.auc(generator.normal(1, 1, 60), generator.normal(0, 1, 60))[2]
        hits += low < true < high
    assert stats.binomtest(hits, 400, 0.95).pvalue > 0.01


def test_members_found_at_a_rate_of_false_alarms():
    others = np.arange(200.0)  # 1 %: two may be above the threshold
    assert statistics.count_hits_at(np.array([196.5, 197.0, 197.5, 198.5, 500.0]), others, 0.01) == 3
    assert statistics.count_hits_at(np.array([199.0, 199.5]), others, 0.001) == 1


# the lower bound on epsilon


def p_value_as_printed(m: int, r: int, v: int, eps: float, delta: float) -> float:
    """Theorem 5.2 term by term, with sums of the binomial's own coefficients."""
    q = math.exp(eps) / (math.exp(eps) + 1)
    pmf = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    beta = sum(pmf[v:])
    alpha = max((2 / i * sum(pmf[v - i : v]) for i in range(1, v + 1)), default=0.0)
    return min(1.0, beta + alpha * m * delta)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-2])
def test_the_p_value_is_that_of_the_theorem(delta):
    for m, r, v, eps in (
        (8, 8, 8, 0.0),
        (8, 8, 6, 1.0),
        (100, 40, 37, 2.0),
        (100, 100, 55, 0.1),
        (50, 20, 0, 1.0),
    ):
        found = statistics.p_value_of_guesses(m, r, v, eps, delta)
        assert found == pytest.approx(p_value_as_printed(m, r, v, eps, delta), rel=1e-9)


def test_the_bound_is_where_the_p_value_is_the_error():
    coins = np.arange(60) % 2 == 0
    bound = statistics.one_run_bound(coins * 10.0, coins, delta=1e-6)
    assert p_value_as_printed(60, 60, 60, bound, 1e-6) == pytest.approx(0.05, rel=1e-6)
    assert statistics.one_run_bound(coins * 10.0, ~coins, delta=1e-6) == 0.0
    assert statistics.one_run_bound(np.zeros(60), coins, delta=1e-6) == 0.0
    of_four = statistics.one_run_bound(coins * 10.0, coins, delta=0.0, repetitions=4)
    assert of_four == pytest.approx(statistics.one_run_bound(coins * 10.0, coins, delta=0.0) / 4)
    assert statistics.one_run_bound(coins * 10.0, coins, delta=1e-4, repetitions=4) < of_four


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Of one answer with noise of `sigma` times what an example changes (Balle, Wang, ICML 2018, eq. 6)."""

    def delta_of(eps: float) -> float:
        a, b = 1 / (2 * sigma) - eps * sigma, -1 / (2 * sigma) - eps * sigma
        return stats.norm.cdf(a) - math.exp(eps) * stats.norm.cdf(b)

    low, high = 0.0, 200.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return low


def test_the_bound_of_a_private_mechanism_stays_below_its_epsilon():
    """Each canary is answered by 1 or 0 and noise: the more of it, the lower the bound; never above the truth
    more often than 5 % of the time."""
    generator, delta, means = np.random.default_rng(3), 1e-5, []
    for sigma in (4.0, 1.0, 0.3):
        true, bounds = gaussian_epsilon(sigma, delta), []
        for _ in range(30):
            coins = generator.integers(0, 2, 400) == 1
            bounds.append(statistics.one_run_bound(coins + generator.normal(0, sigma, 400), coins, delta))
        n_above = sum(bound > true for bound in bounds)
        assert stats.binom.sf(n_above - 1, 30, 0.05) > 0.01, sigma
        means.append(np.mean(bounds))
    assert means[0] < means[1] < means[2]
    assert means[1] > 0.3
    assert means[2] > 3.0


def test_randomised_response_reaches_the_error_of_the_bound():
    """Where the theorem is tight the bound must be above the truth about as often as it may be."""
    generator, true = np.random.default_rng(4), 1.0
    above = 0
    for _ in range(300):
        coins = generator.integers(0, 2, 90) == 1
        told = coins ^ (generator.uniform(size=90) > 1 / (1 + math.exp(-true)))
        above += statistics.one_run_bound(told.astype(float), coins, delta=0.0) > true
    assert 0.01 < above / 300 <= 0.07


def test_the_bound_of_many_runs():
    """All of 1000 found, none of 1000 mistaken: ln of what the exact intervals leave."""
    edge = 1 - 0.025 ** (1 / 1000)
    assert many_runs_bound(1000, 1000, 1000, 0, 0.0) == pytest.approx(math.log((1 - edge) / edge))
    assert many_runs_bound(1000, 500, 1000, 500, 0.0) == 0.0
    generator, sigma, delta = np.random.default_rng(5), 1.0, 1e-5
    for _ in range(20):
        hits = [int((generator.normal(mean, sigma, 2000) > 1.5).sum()) for mean in (1, 0)]
        assert many_runs_bound(2000, hits[0], 2000, hits[1], delta) <= gaussian_epsilon(sigma, delta)


# what the model says of passages


@pytest.fixture(scope="module")
def stack():
    return build_model("hybrid")


def target_of(model, batch_size: int = 32) -> TargetModel:
    """A target whose texts begin with `START`; it encodes no text."""
    tokenizer = SimpleNamespace(bos_token_id=START, eos_token_id=START)
    return TargetModel(model, tokenizer, context=64, batch_size=batch_size)


def test_scores_are_those_of_a_softmax(stack):
    generator = np.random.default_rng(0)
    passages = [
        Passage(generator.integers(2, 61, n), first) for n, first in ((7, 1), (12, 5), (3, 2), (12, 1))
    ]
    found = target_of(stack, batch_size=3).score(passages)
    for passage, scores in zip(passages, found, strict=True):
        with torch.no_grad():
            logits = stack(input_ids=torch.from_numpy(passage.ids)[None]).logits[0].double()
        for i, t in enumerate(range(passage.first, len(passage.ids))):
            p = (logits[t - 1] - logits[t - 1].logsumexp(0)).exp().numpy()
            log_p = np.log(p)
            mean = (p * log_p).sum()
            assert scores.log_p[i] == pytest.approx(log_p[passage.ids[t]], abs=1e-5)
            assert scores.mean[i] == pytest.approx(mean, abs=1e-5)
            assert scores.std[i] == pytest.approx(math.sqrt((p * (log_p - mean) ** 2).sum()), abs=1e-5)
            assert scores.is_argmax[i] == (p.argmax() == passage.ids[t])
        assert len(scores.log_p) == len(passage.ids) - passage.first


def documents_of(*texts) -> TokenizedDocuments:
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
    ids = np.concatenate([np.asarray(text, dtype=np.uint16) for text in texts])
    return TokenizedDocuments(ids, offsets, np.diff(offsets))


def test_extraction_is_what_greedy_decoding_writes(stack):
    """Of its own greedy text all is extracted, up to the token that was changed, and by generate too."""
    prompt = torch.tensor([[START, 5, 9, 30]])
    text = stack.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 1:].numpy()
    changed = text.copy()
    changed[10] = 2 + (changed[10] - 1) % 59
    other = np.random.default_rng(0).integers(2, 61, 15)
    documents = documents_of(text, changed, other)
    spans = [Span(i, 5, 15) for i in range(3)]
    found = count_matched_tokens(target_of(stack), documents, spans, prefix=5)
    written = [
        stack.generate(
            torch.tensor([[START, *ids[:5].tolist()]]), max_new_tokens=10, do_sample=False, eos_token_id=None
        )[0, 6:].numpy()
        for ids in (text, changed, other)
    ]
    wanted = [
        next((i for i in range(10) if ids[5 + i] != new[i]), 10)
        for ids, new in zip((text, changed, other), written, strict=True)
    ]
    assert found.tolist() == wanted
    assert found[:2].tolist() == [10, 5]


def test_passages_begin_with_the_start_token_at_the_beginning_alone():
    documents = documents_of(np.arange(10, 30), np.arange(40, 50))
    assert passage_of(documents, Span(0, 4, 8), START, num_before=4) == (
        pytest.approx([START, *range(10, 18)]),
        5,
    )
    assert passage_of(documents, Span(0, 6, 8), START, num_before=4) == (pytest.approx([*range(12, 18)]), 4)
    assert passage_of(documents, Span(1, 0, 3), START) == (pytest.approx([START, 40, 41, 42]), 1)
    assert passage_of(documents, Span(0, 8, 12), START) == (pytest.approx([18, 19, 20, 21]), 1)


def test_places_are_drawn_once_a_document_or_without_overlap():
    many = documents_of(*(np.zeros(n) for n in range(1, 61)))
    spans = draw_spans(many, 8, 30, seed=0)
    assert len({span.document for span in spans}) == len(spans) == 30
    assert all(span.stop <= span.document + 1 and span.stop - span.start == 8 for span in spans)
    few = documents_of(np.zeros(100), np.zeros(50))
    spans = draw_spans(few, 8, 1000, seed=0)
    assert [(span.document, span.start) for span in spans] == [
        (d, 8 * i) for d, n in ((0, 12), (1, 6)) for i in range(n)
    ]
    assert draw_spans(few, 8, 5, seed=0) == draw_spans(few, 8, 5, seed=0) != draw_spans(few, 8, 5, seed=1)


def test_copies_are_counted_inside_documents():
    run = [3, 4, 5, 6]
    documents = documents_of([9, *run, 8, *run], run[:2], run[2:], [7] * 30, [*run, 2], [1, *run])
    spans = [Span(0, 1, 5), Span(3, 5, 9), Span(0, 0, 4), Span(5, 1, 5)]
    texts = [documents[i][0].tolist() for i in range(len(documents))]
    wanted = [
        sum(
            text[i : i + 4] == texts[t.document][t.start : t.stop]
            for text in texts
            for i in range(len(text) - 3)
        )
        for t in spans
    ]
    for chunk_size in (16, 1000):
        assert count_copies(documents, spans, chunk_size).tolist() == wanted == [4, 27, 1, 4]


def test_membership_scores_are_as_their_papers_say(stack):
    generator = np.random.default_rng(0)
    ids = [generator.integers(2, 61, 11) for _ in range(4)]
    scores = target_of(stack).score([Passage(np.concatenate([[START], each]), 1) for each in ids])
    texts = [f"text number {i}, and é" * (i + 1) for i in range(4)]
    passages = Passages(texts, ids, scores, np.array([True, True, False, False]), np.array([9.0, 8, 7, 6]))
    found = {name: score_of(passages) for name, score_of in SCORES.items()}
    for i, one in enumerate(scores):
        n_bytes = len(texts[i].encode())
        packed = len(zlib.compress(texts[i].encode(), 9))
        lowest = sorted(one.log_p)[:2]  # 20 % of 11
        relative = sorted((one.log_p - one.mean) / one.std)[:2]
        assert found["loss"][i] == pytest.approx(sum(one.log_p) / 11)
        assert found["zlib"][i] == pytest.approx(sum(one.log_p) / packed)
        assert found["min_k"][i] == pytest.approx(sum(lowest) / 2)
        assert found["min_k_plus_plus"][i] == pytest.approx(sum(relative) / 2)
        assert found["reference"][i] == pytest.approx((passages.reference_nats[i] + sum(one.log_p)) / n_bytes)
        assert found["blind_zlib"][i] == pytest.approx(-packed / n_bytes)


def test_a_blind_attack_sees_that_splits_differ():
    """Members of tokens below 30, others above: what the text alone tells is said."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(low, low + 28, 12) for low in (2, 30) for _ in range(20)]
    passages = Passages([""] * 40, ids, [], np.repeat([True, False], 20), None)
    scores = SCORES["blind_tokens"](passages)
    assert statistics.auc(scores[:20], scores[20:])[0] == 1.0
    said = describe_audit(
        [
            Measurement("membership_auc/loss", 0.9, "auc", 40, 0.01, "x", False, (0.8, 1.0)),
            Measurement("membership_auc/blind_tokens", 1.0, "auc", 40, 0.01, "x", False, (0.9, 1.0)),
        ]
    )
    assert "the splits themselves differ" in said[0]


def test_a_guarantee_stands_on_the_card(overtrained, tmp_path):
    shutil.copytree(overtrained.path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    guarantee = {
        "epsilon": 3.98, "delta": 1e-5, "unit": "document", "sampling_rate": 0.1, "noise_multiplier": 1.1,
        "clip_norm": 1.0, "steps": 100, "accountant": "prv", "covered": ["weights"],
        "not_covered": ["tokenizer", "this card"],
    }  # fmt: skip
    write_json(run.privacy, guarantee)
    section = privacy_section(run)
    assert "epsilon = 3.98 at delta = 1e-05 for each document" in section
    assert "It does not cover: tokenizer; this card." in section
    assert "3.98 that the accountant states" in section
    (run.model / CURVES_FILE).unlink(missing_ok=True)
    assert write_curves(run) == run.path / CURVES_FILE
    assert not (run.model / CURVES_FILE).exists(), "exact losses do not leave with the model"


@pytest.mark.slow
def test_a_guarantee_of_epsilon_4_holds_against_the_audit(tmp_path):
    """Text and canaries of the same kind, trained privately: what an audit finds falls to the null, and what
    it refutes stays below what the accountant states."""
    pytest.importorskip("opacus")
    if not hasattr(PrivacyRecipe(), "epsilon"):
        pytest.skip("privacy.epsilon is no field of a recipe")
    source, out = made_text(tmp_path / "text", 1800), tmp_path / "run"
    command = ["train", str(source), "--canaries", "1", "--steps", "60", "--epsilon", "4", "--delta", "1e-4"]
    assert main([*command, "--set", "privacy.canaries_each=100", "--out", str(out), *SETTINGS]) == 0
    assert main(["audit", str(out)]) == 0
    run = RunFolder(out)
    found = measured(run)
    spent = read_json(run.privacy)["epsilon"]
    assert 0 < spent <= 4.0
    assert read_json(run.audit)["made_with"]["delta"] == 1e-4
    assert found["exposure_p_value/1"].value > 0.001
    # the noise is another in each run: limits of one in a thousand, on both sides
    null = {"exposure/1": null_mean()} | {
        f"membership_auc/{name}": 0.5 for name in SCORES if name != "reference"
    }
    for name, value in null.items():
        assert abs(found[name].value - value) < 3.3 * found[name].stderr, (name, found[name])
    assert found["canaries_extracted/1"].value == 0.0
    print(spent, *(f"{name} {found[name].value:.3f}" for name in (*null, "epsilon_lower_bound/1")))
    assert found["epsilon_lower_bound/1"].value <= spent
