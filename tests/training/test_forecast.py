"""Promise: a run with a time limit says what it will reach, and what more time would."""

import math
from dataclasses import replace

import pytest
from support.runs import SMALL, small_recipe

from hf_genlm.card import write_card
from hf_genlm.cli.display import Display
from hf_genlm.config.recipe import load_recipe
from hf_genlm.config.settings import Facts, Settings
from hf_genlm.config.settle import settle
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.run_folder import RunFolder
from hf_genlm.training import counting
from hf_genlm.training.forecast import CURVES, LONGER, Curve, Training, log_forecast
from hf_genlm.training.train import train

CURVE = Curve(floor=0.5, gap=0.5, rate=0.25)
TRAINING = Training(tokens=1e5, weights=1e6, curve=CURVE, epochs=0.1, max_tokens=1e8)


def test_the_formula_by_hand():
    assert TRAINING.level == pytest.approx(0.5 + 0.5 * 10**-0.25)
    # counts of 2 bits: a floor of 1, of which 0.8 bits are left, and four times the time is 4^1.15 times C
    assert TRAINING.continued(1.8, 2.0, 4) == pytest.approx(1 + 0.8 * 4 ** (-0.25 * 1.15))


def test_counts_that_are_not_known_follow_from_the_result():
    assert TRAINING.continued(2 * TRAINING.level, None, 4) == TRAINING.continued(2 * TRAINING.level, 2.0, 4)


@pytest.mark.parametrize("curve", CURVES.values())
@pytest.mark.parametrize("epochs", [None, 0.1, 1.5, 6])
def test_more_time_is_never_worse_and_less_of_it_gains_less(curve, epochs):
    training = replace(TRAINING, curve=curve, epochs=epochs)
    found = [training.continued(1.9, 2.0, times) for times in (1, 1.5, 2, 4, 100)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(1.9)
    assert found[-1] > curve.floor * 2
    assert training.continued(0.5, 2.0, 4) == 0.5  # below the floor already


def test_what_is_read_again_gains_less_from_the_third_epoch_on():
    gains = [1.8 - replace(TRAINING, epochs=n).continued(1.8, 2.0, 4) for n in (None, 0.9, 1.1, 2, 6)]
    assert gains[0] == gains[1] > gains[2] > gains[3] == gains[4] > 0


def test_a_text_that_was_read_as_often_as_it_may_be_gains_nothing_by_time():
    done = replace(TRAINING, tokens=1e6, epochs=8, max_tokens=1e6)
    assert done.useful_times == 1
    assert replace(done, tokens=5e5, epochs=4).useful_times == 2
    # 6e6 tokens are three for each of 2e6 weights: six times the tokens, and twice the weights
    assert replace(done, max_tokens=6e6).useful_times == LONGER
    assert replace(done, max_tokens=6e6, tokens=4e6).useful_times == pytest.approx(3)
    assert replace(done, max_tokens=None).useful_times == LONGER  # a stream


def settings_of(*stated: str, n_tokens: int = 10**9) -> Settings:
    facts = Facts(vocab_size=400, train_tokens=n_tokens, train_targets=(n_tokens,), step_s=0.1)
    return settle(load_recipe(None, [*SMALL[:-2], "training.steps=null", *stated]), facts)


def bits(value: float) -> list[Measurement]:
    return [Measurement("bits_per_byte", value, "bits/byte", 100, None, "validation", False)]


@pytest.fixture
def run(tmp_path) -> RunFolder:
    run = RunFolder.create(tmp_path / "run")
    run.log("counts", order=5, bits_per_byte=2.0)
    return run


def forecasts_of(run: RunFolder) -> list[dict]:
    return [event for event in run.read_log() if event["event"] == "forecast"]


def test_what_a_log_says_before_and_after_a_run(run):
    settings = settings_of("training.minutes=1", "model.ngram_history=0")
    log_forecast(run, settings)
    run.log("trained", steps=600, tokens=150_000, epochs=0.001, seconds=60.0, tokens_per_s=2500)
    log_forecast(run, settings, bits(1.7))
    before, after = forecasts_of(run)
    weights = 32 * (400 + 12 * 32 * 2)
    planned = Training(settings.length.pace.tokens(600), weights, CURVES["counts"], 0.001)
    assert before["expected"] == pytest.approx(2 * planned.level, abs=1e-3)
    assert before["bits_per_byte"] < before["expected"]
    assert (after["expected"], after["times"]) == (None, 4)
    trained = replace(planned, tokens=150_000)
    assert after["bits_per_byte"] == pytest.approx(trained.continued(1.7, 2.0, 4), abs=1e-3)


def test_what_a_history_reaches_goes_on_from_its_own_result(run):
    settings = settings_of("training.minutes=1")
    run.log("trained", steps=600, tokens=150_000, epochs=0.001, seconds=60.0, tokens_per_s=2500)
    log_forecast(run, settings, bits(1.1))
    weights = 32 * (400 + 12 * 32 * 2)
    trained = Training(150_000, weights, CURVES["history"], 0.001)
    said = forecasts_of(run)[0]["bits_per_byte"]
    assert said == pytest.approx(trained.continued(1.1, None, 4), abs=1e-3)
    assert 1.0 < said < 1.09  # though the counts need 2 bits


@pytest.mark.parametrize(("share", "times"), [(1, None), (0.9, None), (0.5, 2), (0.01, 4)])
def test_a_small_text_bounds_the_time_by_what_was_trained(share, times, run):
    settings = settings_of("training.minutes=1", n_tokens=10_000)
    n_tokens = settings.length.pace.tokens(settings.length.max_steps) * share
    run.log("trained", steps=9, tokens=int(n_tokens), epochs=8 * share, seconds=60.0, tokens_per_s=9)
    log_forecast(run, settings, bits(1.7))
    assert forecasts_of(run)[0]["times"] == (times and pytest.approx(times, abs=0.01))


@pytest.mark.parametrize(
    ("stated", "measured"),
    [
        (["training.minutes=1", "model.ngram_order=0"], []),  # the level of a network alone is not known
        (["training.minutes=1"], []),  # nor that of a history
        (["training.steps=9"], bits(1.7)),
        (["training.minutes=1"], bits(math.nan)),
    ],
)
def test_nothing_is_said_that_is_not_known(stated, measured, run):
    log_forecast(run, settings_of(*stated), measured)
    assert forecasts_of(run) == []


def test_the_lines_say_it(run, capsys):
    display = Display()
    display.hear("forecast", {"expected": 1.804, "times": 4.0, "bits_per_byte": 1.701})
    display.hear("forecast", {"expected": None, "times": 2.31, "bits_per_byte": 1.68})
    display.hear("forecast", {"expected": None, "times": None, "bits_per_byte": 1.68})
    first, second, third = capsys.readouterr().err.splitlines()
    assert "1.80 bits per byte" in first
    assert "4 times the time: about 1.70" in first
    assert "2.3 times the time: about 1.68" in second
    assert "training.max_epochs" in third


def test_a_run_says_what_more_time_would_reach_on_its_card_too(text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "_SHARE_OF_TIME", 1e9)
    heard = []
    recipe = small_recipe(text_folder, "training.steps=null", "training.minutes=0.01")
    run = train(recipe, tmp_path / "run", lambda event, fields: heard.append(event))
    assert heard.index("counts") < heard.index("step") < heard.index("forecast", heard.index("evaluated"))
    assert heard.count("counts") == 1
    after = forecasts_of(run)[-1]
    assert after["times"] is not None
    write_card(run)
    assert f"about {after['bits_per_byte']:.2f} bits per byte are forecast" in (
        run.model / "README.md"
    ).read_text(encoding="utf-8")
