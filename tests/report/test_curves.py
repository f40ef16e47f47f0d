"""Promise: what happened in a run can be seen: in a log that stays small, in pictures and in trackers."""

import math
import re
import signal
import socket
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from support.runs import SMALL
from support.trackers import scalars_of

from hf_genlm.cli.main import main
from hf_genlm.config.recipe import Recipe, load_recipe
from hf_genlm.config.settings import Pace
from hf_genlm.errors import Stopped, UserError
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.report.curves import (
    curves_of,
    describe_curves,
    draw_curves,
    first_samples,
    running_median,
    smoothed,
    write_curves,
)
from hf_genlm.report.figures import escape_label
from hf_genlm.run_folder import RunFolder
from hf_genlm.training import trackers
from hf_genlm.training.budget import Budget
from hf_genlm.training.callbacks import LogCallback
from hf_genlm.training.trackers import tracking
from hf_genlm.training.train import train

pytestmark = pytest.mark.usefixtures("drawn")

ARGUMENTS = [part for assignment in SMALL for part in ("--set", assignment)]


def step(number: int, **fields) -> dict:
    event = {
        "event": "step",
        "step": number,
        "loss": 6.0 - number / 10,
        "learning_rate": 1e-3,
        "grad_norm": 1.5,
    }
    return {**event, "tokens": 100 * number, "tokens_per_s": 50, "elapsed_s": 2.0 * number, **fields}


def validation(number: int) -> dict:
    seen = {"seen_tokens": 100 * number, "elapsed_s": 2.0 * number}
    return {
        "event": "validation",
        "step": number,
        "bits_per_byte": 3.0 - number / 10,
        "nats_per_token": 5.0,
        **seen,
    }


EVALUATED = {"event": "evaluated", "measurements": [{"name": "bits_per_byte", "value": 1.25}]}
STARTED = {"event": "started"}


def lines_of(figure, panel: str) -> dict[str, tuple[list, list]]:
    """The lines of the panel whose title begins so, by their labels."""
    (axes,) = (axes for axes in figure.axes if axes.get_title(loc="left").startswith(panel))
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


# the log


@pytest.mark.parametrize("n_steps", [100, 20_000])
def test_a_log_does_not_grow_with_its_run_and_its_losses_are_the_mean_of_all_steps(n_steps, tmp_path):
    told = []
    run = RunFolder.create(tmp_path / "run", lambda event, fields: told.append(fields))
    log = LogCallback(run, Budget(steps=n_steps), Pace(None, 4, 16), every_steps=1)
    state = SimpleNamespace(global_step=0, log_history=[])
    log.on_train_begin(None, state, None)
    true_losses = np.random.default_rng(0).normal(3, 1, n_steps)
    for number, loss in enumerate(true_losses, 1):
        control = SimpleNamespace(should_log=False)
        state.global_step = number
        log.on_step_end(None, state, control)
        assert control.should_log
        state.log_history.append(loss)
        log.on_log(None, state, control, logs={"loss": loss, "learning_rate": 0.1, "grad_norm": math.inf})
        assert state.log_history == []
    events = run.read_log()
    assert len(told) == n_steps
    assert len(events) <= 2001
    assert len(events) == n_steps or len(events) >= 1900
    assert events[0]["step"] == 1
    assert events[-1]["step"] == n_steps
    bounds = [0, *(event["step"] for event in events)]
    for event, first, last in zip(events, bounds, bounds[1:], strict=False):
        assert event["loss"] == pytest.approx(true_losses[first:last].mean(), abs=1e-9)
        assert event["tokens"] == last * 64
        assert event["grad_norm"] is None


def test_the_log_of_a_resumed_run_gets_no_more_than_its_share(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    log = LogCallback(run, Budget(steps=100_000), Pace(None, 4, 16), every_steps=1)
    state = SimpleNamespace(global_step=90_000, log_history=[])
    log.on_train_begin(None, state, None)
    for number in range(90_001, 100_001):
        state.global_step = number
        log.on_step_end(None, state, SimpleNamespace())
        log.on_log(None, state, None, logs={"loss": 1.0, "learning_rate": 0.1})
    assert 190 <= len(run.read_log()) <= 201


def test_the_speed_is_that_of_the_steps_without_what_runs_between_them(tmp_path):
    """Steps of a second; after the second one, half a minute of validation; no event but of 2 and 4."""
    now = 0.0
    run = RunFolder.create(tmp_path / "run")
    budget = Budget(steps=4, clock=lambda: now)
    budget.start()
    log = LogCallback(run, budget, Pace(None, 4, 16))
    state = SimpleNamespace(global_step=0, log_history=[])
    log.on_train_begin(None, state, None)
    for number in (1, 2, 3, 4):
        now += 1.0
        state.global_step = number
        log.on_step_end(None, state, SimpleNamespace())
        now += 30.0 if number == 2 else 0.0
        if number % 2 == 0:
            log.on_log(None, state, None, logs={"loss": 1.0, "learning_rate": 0.1})
    events = run.read_log()
    assert [(e["step"], e["elapsed_s"], e["tokens_per_s"]) for e in events] == [(2, 2.0, 64), (4, 34.0, 64)]


# from events to curves


def test_the_curves_of_a_plain_log():
    curves = curves_of([STARTED, *(step(n) for n in (1, 2, 3)), validation(3), EVALUATED])
    assert [event["step"] for event in curves.steps] == [1, 2, 3]
    assert curves.final == {"bits_per_byte": 1.25, "step": 3, "elapsed_s": 6.0, "seen_tokens": 300}
    assert (curves.abandoned, curves.breaks) == ([], [])


@pytest.mark.parametrize(
    ("again", "kept", "given_up"),
    [
        (STARTED, [1, 2, 5], [1, 2, 3, 4]),
        ({"event": "resumed", "step": 3}, [1, 2, 3, 1, 2, 5], [4]),
        ({"event": "diverged", "step": 5, "back_to": 2, "learning_rate": 1e-3}, [1, 2, 1, 2, 5], [3, 4]),
    ],
)
def test_what_a_run_went_back_behind_is_no_part_of_its_curve(again, kept, given_up):
    before = [
        STARTED,
        *(step(n) for n in (1, 2, 3, 4)),
        validation(4),
        {"event": "sample", "step": 4, "text": "x"},
    ]
    curves = curves_of([*before, again, *(step(n) for n in (1, 2, 5))])
    assert [event["step"] for event in curves.steps] == kept
    assert [event["step"] for event in curves.abandoned[0]] == given_up
    assert (curves.validations, curves.samples) == ([], [])
    assert len(curves.breaks) == (again is not STARTED)


def test_means_and_medians():
    values = np.array([4.0, 2.0, 6.0, 1.0])
    kept = 0.5**25
    mean = [
        sum(kept ** (i - j) * values[j] for j in range(i + 1)) / sum(kept**j for j in range(i + 1))
        for i in range(4)
    ]
    assert smoothed(values) == pytest.approx(mean)
    assert smoothed(np.full(500, 3.0)) == pytest.approx(3.0)
    assert np.std(smoothed(np.tile([1.0, 3.0], 500))) < 0.1
    dips = np.full(40, 7.0)
    dips[[5, 20, 39]] = 0.0
    assert running_median(dips).tolist() == [7.0] * 40


def test_the_first_texts_of_at_most_eight_steps():
    events = [{"event": "sample", "step": n, "text": f"{n} {i}"} for n in range(1, 31) for i in range(2)]
    found = first_samples(curves_of(events))
    assert len(found) == 8
    assert (found[0]["text"], found[-1]["text"]) == ("1 0", "30 0")
    assert first_samples(curves_of([])) == []


# pictures, read back before they are saved


def test_what_is_drawn_is_what_was_logged():
    curves = curves_of([*(step(n) for n in range(1, 41)), validation(10), validation(20), EVALUATED])
    figure = draw_curves([curves])
    loss = [6.0 - n / 10 for n in range(1, 41)]
    lines = lines_of(figure, "Loss")
    assert lines["training"] == (list(range(1, 41)), loss)
    assert lines["training, smoothed"][0] == list(range(1, 41))
    assert lines["validation, a part of it"] == ([10, 20], [5.0, 5.0])
    assert [axes.get_xlabel() for axes in figure.axes] == ["optimizer steps"] * 5
    units = ["nats per token", "bits per byte", "learning rate", "L2 norm", "tokens per second"]
    assert [axes.get_ylabel() for axes in figure.axes] == units
    bits = lines_of(figure, "Held-out text")
    assert bits == {"a part of it": ([10, 20], [2.0, 1.0]), "all of it, at the end": ([40], [1.25])}
    assert list(lines_of(figure, "Learning rate").values()) == [(list(range(1, 41)), [1e-3] * 40)]
    assert list(lines_of(figure, "Gradient norm").values()) == [(list(range(1, 41)), [1.5] * 40)] * 2
    assert next(iter(lines_of(figure, "Speed").values())) == (list(range(1, 41)), [50] * 40)
    text = describe_curves(curves)
    for word in (
        "40 steps",
        "4,000 tokens",
        "80 s",
        "from 5.90 to",
        "from 2.000 to 1.000 at 2 points",
        "0.001",
    ):
        assert word in text


def test_a_run_of_three_steps_without_validations():
    figure = draw_curves([curves_of([step(1), step(2), step(3)])])
    assert not any(title.startswith("Held-out") for title in titles(figure))
    assert len(figure.axes) == 4
    (axes,) = (axes for axes in figure.axes if axes.get_title(loc="left").startswith("Loss"))
    (line,) = axes.lines
    assert (line.get_label(), line.get_marker()) == ("training", "o"), "three points are seen as points"
    assert list(line.get_ydata()) == pytest.approx([5.9, 5.8, 5.7])
    one = draw_curves([curves_of([step(1, grad_norm=None)])])
    assert not any(title.startswith("Gradient") for title in titles(one)), "no axes without anything on them"


def test_a_resumed_run_and_one_that_left_the_numbers():
    again = {"event": "diverged", "step": 4, "back_to": 2, "learning_rate": 5e-4}
    curves = curves_of([*(step(n) for n in (1, 2, 3, 4)), again, *(step(n, loss=1.0) for n in (3, 4, 5))])
    figure = draw_curves([curves])
    lines = lines_of(figure, "Loss")
    assert lines["abandoned"] == ([3, 4], [pytest.approx(5.7), 5.6])
    assert lines["training"] == ([1, 2, 3, 4, 5], [5.9, 5.8, 1.0, 1.0, 1.0])
    assert "went back to step 2" in describe_curves(curves)
    (axes,) = (axes for axes in figure.axes if axes.get_title(loc="left").startswith("Learning rate"))
    assert [2, 2] in [list(line.get_xdata()) for line in axes.lines]


def test_the_first_steps_of_a_long_run_do_not_flatten_the_others():
    events = [step(n, loss=9.0 if n < 5 else 3.0 - n / 1000) for n in range(1, 1001)]
    figure = draw_curves([curves_of(events)])
    assert 3.0 < figure.axes[0].get_ylim()[1] < 4.0


def test_several_runs_in_one_picture():
    labels = ["a $x_1$ b", "_c"]
    runs = [curves_of([step(n, loss=5.0 + i) for n in (1, 2)], label) for i, label in enumerate(labels)]
    figure = draw_curves(runs)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [escape_label(label) for label in labels]
    lines = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[5.0, 5.0], [6.0, 6.0]]
    assert lines[0].get_color() != lines[1].get_color()
    figure.canvas.draw()  # no formula is read into a name


def test_several_runs_are_drawn_over_tokens_and_in_one_unit():
    events = [step(1), step(2, tokens=800), {**validation(2), "seen_tokens": 800}]
    runs = [curves_of(events, label) for label in "ab"]
    same = draw_curves(runs)
    assert {axes.get_xlabel() for axes in same.axes} == {"tokens trained on"}
    assert same.axes[0].get_ylabel() == "nats per token"
    runs[1].vocabulary = "another"
    runs[1].validations = [{**runs[1].validations[0], "bits_per_byte": 2.5}]  # 5 nats per token
    figure = draw_curves(runs)
    assert figure.axes[0].get_ylabel() == "bits per byte"
    lines = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines[::2]] == [
        pytest.approx([v * f for v in (5.9, 5.8)]) for f in (0.56, 0.5)
    ]
    assert [list(line.get_xdata()) for line in lines[1::2]] == [[800], [800]]
    unknown = curves_of([step(1), step(2)], "c")
    draw_curves([*runs, unknown]).canvas.draw()  # its loss has no place here, and the picture stays


@pytest.mark.parametrize("value", [0.0, 1e-3, 5.0])
@pytest.mark.parametrize("n_steps", [1, 2, 40])
def test_equal_values_have_a_readable_axis(value, n_steps):
    events = [
        step(n, loss=value, learning_rate=value, grad_norm=value, tokens_per_s=value)
        for n in range(1, n_steps + 1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_curves([curves_of(events)])
        figure.canvas.draw()
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert low <= value <= high or axes.get_yscale() == "log"
        assert 0.01 * max(value, 1e-9) < high - low, "an axis of a width, not of rounding errors"


# from the command line to the card


@pytest.fixture(scope="module")
def tracked(text_folder, tmp_path_factory):
    """A run with two validations and two samples at each, and TensorBoard's files."""
    out = tmp_path_factory.mktemp("runs") / "tracked"
    more = ("training.num_validations=2", "training.num_samples=2", "training.report_to=tensorboard")
    settings = [word for setting in more for word in ("--set", setting)]
    assert main(["train", str(text_folder), "--out", str(out), *ARGUMENTS, *settings]) == 0
    return RunFolder.open(out)


def test_the_card_shows_the_picture_that_lies_beside_it(tracked):
    card = (tracked.model / "README.md").read_text(encoding="utf-8")
    ((alternative, path),) = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", card)
    assert (tracked.model / path).read_bytes() == (tracked.path / "plots/curves.png").read_bytes()
    assert (tracked.model / path).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert alternative.startswith("Curves of 30 steps")
    samples = [event for event in tracked.read_log() if event["event"] == "sample"]
    assert [event["step"] for event in samples] == [10, 10, 20, 20, 30, 30]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (?:<code>|`)", card, flags=re.MULTILINE)
    assert [int(row[0]) for row in rows] == [10, 20, 30]
    headings = re.findall(
        r"^## After step (\d+), ([\d.]+) s$", tracked.samples.read_text(), flags=re.MULTILINE
    )
    assert [int(n) for n, _ in headings] == [10, 20, 30]
    assert [float(s) for _, s in headings] == [pytest.approx(e["elapsed_s"], abs=0.06) for e in samples[::2]]


def test_validations_know_where_they_stand(tracked):
    events = tracked.read_log()
    steps = {event["step"]: event for event in events if event["event"] == "step"}
    found = [event for event in events if event["event"] == "validation"]
    assert [event["step"] for event in found] == [10, 20]
    for event in found:
        assert event["seen_tokens"] == steps[event["step"]]["tokens"]
        before, after = (steps[event["step"] + n]["elapsed_s"] for n in (0, 1))
        assert before <= event["elapsed_s"] < after, "it stands where it began"
    drawn = lines_of(draw_curves([curves_of(events)] * 2), "Loss")["validation, a part of it"]
    assert drawn == ([e["seen_tokens"] for e in found], [e["nats_per_token"] for e in found])


def test_plot_draws_a_run_again_and_several_over_one_another(tracked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture = tracked.path / "plots/curves.png"
    first = picture.read_bytes()
    picture.unlink()
    assert main(["plot", str(tracked.path)]) == 0
    assert capsys.readouterr().out.strip() == str(picture)
    assert picture.read_bytes() == first, "the same log gives the same picture"
    assert main(["plot", str(tracked.path), str(tracked.path)]) == 0
    assert (tmp_path / "curves.png").read_bytes() != first
    assert main(["plot", str(tracked.path), "--out", "deep/one.png"]) == 0
    assert (tmp_path / "deep/one.png").is_file()


def test_plot_refuses_what_has_no_curve(tmp_path, capsys):
    run = RunFolder.create(tmp_path / "run")
    run.recipe.write_text(Recipe().to_yaml())
    assert main(["plot", str(run.path)]) == 2
    assert "holds no training step" in capsys.readouterr().err
    assert main(["plot", str(tmp_path)]) == 2
    assert write_curves(run) is None


def test_a_run_that_was_stopped_has_its_picture_too(text_folder, tmp_path, capsys, monkeypatch):
    log = RunFolder.log

    def log_and_stop(self, event, **fields):
        log(self, event, **fields)
        if event == "checkpoint" and fields["step"] == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunFolder, "log", log_and_stop)
    out = tmp_path / "run"
    every = ["--set", "training.save_steps=5"]
    assert main(["train", str(text_folder), "--out", str(out), *ARGUMENTS, *every]) == 0
    assert capsys.readouterr().err.splitlines()[-2].startswith("stopped after step")
    assert (out / "plots/curves.png").is_file()
    assert not (out / "model").exists()


# trackers


def test_tensorboard_has_every_number_of_the_log(tracked):
    found = scalars_of(tracked.tensorboard)
    events = tracked.read_log()
    steps = [event for event in events if event["event"] == "step"]
    for name in ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "elapsed_s"):
        assert found[f"train/{name}"] == {e["step"]: pytest.approx(e[name], rel=1e-6) for e in steps}, name
    bits = {e["step"]: pytest.approx(e["bits_per_byte"]) for e in events if e["event"] == "validation"}
    assert found["validation/bits_per_byte"] == bits
    final = {m.name: m.value for m in read_measurements(tracked.evaluation)}
    assert {name for name in found if name.startswith("final/")} == {f"final/{name}" for name in final}
    assert found["final/perplexity"] == {30: pytest.approx(final["perplexity"], rel=1e-6)}


def test_a_resumed_run_hides_what_it_went_back_behind(text_folder, tmp_path):
    recipe = load_recipe(
        None,
        [
            *SMALL,
            f"corpus.sources={text_folder}",
            "training.steps=12",
            "training.num_validations=0",
            "training.num_samples=0",
            "training.save_steps=5",
            "training.report_to=tensorboard",
        ],
    )

    def fail_at_8(event, fields):
        if event == "step" and fields["step"] == 8:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(recipe, tmp_path / "run", fail_at_8)
    run = train(recipe, tmp_path / "run", resume=True)
    curves = curves_of(run.read_log())
    assert [event["step"] for event in curves.steps] == list(range(1, 13))
    assert [[event["step"] for event in events] for events in curves.abandoned] == [[6, 7, 8]]
    losses = scalars_of(run.tensorboard)["train/loss"]
    assert losses == {e["step"]: pytest.approx(e["loss"], rel=1e-6) for e in curves.steps}


def test_trackio_has_the_numbers_in_its_store_without_a_network(tmp_path, monkeypatch, capsys):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    def refuse(*args):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in [name for name in sys.modules if name.partition(".")[0] == trackio.__name__]:
        if hasattr(sys.modules[name], "TRACKIO_DIR"):
            monkeypatch.setattr(sys.modules[name], "TRACKIO_DIR", tmp_path / "store")
    recipe = Recipe()
    recipe.training.report_to = ["trackio"]
    run = RunFolder.create(tmp_path / "run")
    with tracking(run, recipe, is_resuming=False):
        run.log("step", step=1, loss=2.5, learning_rate=0.1, grad_norm=None, tokens=64, left_s=3.0)
        run.tell("step", step=2, loss=9.0)
        run.log("sample", step=2, prompt="", text="once")
        run.log("evaluated", measurements=[{"name": "bits_per_byte", "value": 1.5}])
    with tracking(run, recipe, is_resuming=True):
        run.log("step", step=3, loss=2.0)
    assert list((tmp_path / "store").glob("hf_genlm*"))
    kept = [
        {name: value for name, value in log.items() if "/" in name or name in ("step", "sample")}
        for log in SQLiteStorage.get_logs("hf_genlm", "run")
    ]
    assert kept == [
        {"step": 1, "train/loss": 2.5, "train/learning_rate": 0.1, "train/tokens": 64},
        {"step": 2, "sample": "once"},
        {"step": 2, "final/bits_per_byte": 1.5},
        {"step": 3, "train/loss": 2.0},
    ]
    assert SQLiteStorage.get_runs("hf_genlm") == ["run"], "it went on with the same"
    assert capsys.readouterr().out == ""


def test_a_tracker_that_is_not_there_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    recipe = load_recipe(None, ["training.report_to=trackio", "corpus.sources=no/such/folder"])
    with pytest.raises(UserError, match=r"needs trackio.*pip install .*trackio>="):
        train(recipe, tmp_path / "run")
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        load_recipe(None, ["training.report_to=tensorbord"])


def test_a_signal_closes_the_trackers(text_folder, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(trackers.TensorBoard, "close", lambda self: closed.append(self._writer.close()))
    recipe = load_recipe(
        None,
        [*SMALL, f"corpus.sources={text_folder}", "training.report_to=tensorboard", "training.num_samples=0"],
    )

    def stop(event, fields):
        if event == "step" and fields["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        train(recipe, tmp_path / "run", stop)
    assert len(closed) == 1
    assert 3 in scalars_of(tmp_path / "run" / "tensorboard")["train/loss"]
