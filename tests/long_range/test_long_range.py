"""Promise: who remembers how far is measured on rows that hold the answers, and told from the numbers."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_genlm.cli.main import main
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import Measurement, read_measurements
from hf_genlm.long_range import measure_range
from hf_genlm.long_range.report import Outcome, over_seeds, sentence
from hf_genlm.long_range.tasks import (
    IGNORED,
    N_COPIED,
    N_DIGITS,
    N_FILLERS,
    N_KEYS,
    N_SYMBOLS,
    N_VALUES,
    PASSKEY_DIGITS,
    TASKS,
    measure_task,
)
from hf_genlm.long_range.training import TaskRun, draw_size, train_on_task

pytestmark = pytest.mark.usefixtures("drawn")


def solve_recall(row):
    """{position: (answer, distance)} by reading the row as a person would."""
    pairs, answers, read_at = {}, {}, {}
    n_pairs = len(row) // 3
    for at in range(0, 2 * n_pairs, 2):
        assert row[at] not in pairs, "a key stands for two values"
        assert 0 <= row[at] < N_KEYS <= row[at + 1] < N_KEYS + N_VALUES
        pairs[row[at]], read_at[row[at]] = row[at + 1], at
    assert len(set(pairs.values())) == n_pairs
    for at in range(2 * n_pairs, 3 * n_pairs):
        answers[at] = pairs[row[at]], at - read_at[row[at]]
    assert sorted(row[2 * n_pairs :]) == sorted(pairs), "each key is asked once"
    return answers


def solve_copy(row):
    blank, mark = N_SYMBOLS, N_SYMBOLS + 1
    places = [at for at, token in enumerate(row) if token < N_SYMBOLS]
    marks = [at for at, token in enumerate(row) if token == mark]
    assert len(places) == len(marks) == N_COPIED
    assert marks == list(range(len(row) - N_COPIED, len(row)))
    assert set(row) <= {*range(N_SYMBOLS), blank, mark}
    return {mark: (row[at], mark - at) for mark, at in zip(marks, places, strict=True)}


def solve_passkey(row):
    hidden, asked = (at for at, token in enumerate(row) if token == N_DIGITS + N_FILLERS)
    assert asked == len(row) - PASSKEY_DIGITS
    digits = row[hidden + 1 : hidden + 1 + PASSKEY_DIGITS]
    assert all(digit < N_DIGITS for digit in digits)
    assert row[asked + 1 :] == digits[:-1]
    rest = row[:hidden] + row[hidden + 1 + PASSKEY_DIGITS : asked]
    assert all(N_DIGITS <= token < N_DIGITS + N_FILLERS for token in rest)
    return {asked + i: (digit, asked - hidden - 1) for i, digit in enumerate(digits)}


SOLVERS = {"recall": solve_recall, "copy": solve_copy, "passkey": solve_passkey}


class Solver(torch.nn.Module):
    """Answers every row by `solve`, or always with the same `guess(row)`."""

    def __init__(self, task, solve=None, guess=None):
        super().__init__()
        self.task, self.solve, self.guess = task, solve, guess
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, self.task.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            if self.solve:
                for at, (answer, _) in self.solve(ids).items():
                    logits[row, at, answer] = 1
            else:
                logits[row, :, self.guess(ids)] = 1
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("size_rank", [0, -1])
@pytest.mark.parametrize("name", TASKS)
def test_rows_are_as_a_person_would_solve_them(name, size_rank):
    task = TASKS[name]
    size = task.sizes[size_rank]
    batch = task.batch(np.random.default_rng(3), 20, size)
    assert batch.inputs.shape == (20, task.n_tokens(size))
    for ids, targets, distances in zip(*(part.tolist() for part in batch), strict=True):
        solved = SOLVERS[name](ids)
        assert solved == {
            at: (target, distances[at]) for at, target in enumerate(targets) if target != IGNORED
        }
    assert batch.inputs.max() < task.vocab_size
    again = task.batch(np.random.default_rng(3), 20, size)
    other = task.batch(np.random.default_rng(4), 20, size)
    assert all((a == b).all() for a, b in zip(batch, again, strict=True))
    assert (batch.inputs != other.inputs).any(axis=1).all()


@pytest.mark.parametrize("name", TASKS)
def test_the_smallest_rows_are_whole_and_others_refused(name):
    task = TASKS[name]
    for size in task.limits[:1]:
        for ids in task.batch(np.random.default_rng(0), 50, size).inputs.tolist():
            SOLVERS[name](ids)
    with pytest.raises(UserError, match=str(task.limits[0])):
        task.batch(np.random.default_rng(0), 1, task.limits[0] - 1)


@pytest.mark.parametrize("name", TASKS)
def test_who_knows_is_right_and_distances_part_the_questions(name):
    task = TASKS[name]
    size = task.sizes[0]
    found = measure_task(Solver(task, solve=SOLVERS[name]), task, [size], n_rows=10)
    assert {m.value for m in found} == {1.0}
    whole, *parts = found
    assert whole.name == f"{name}_accuracy/{size}_{task.size_name}"
    assert whole.n == sum(part.n for part in parts)
    batch = task.batch(np.random.default_rng([0, size]), 10, size)
    for part in parts:
        first, last = map(int, part.name.split("/distance_")[1].split("-"))
        within = (batch.distances >= first) & (batch.distances <= last) & (batch.targets != IGNORED)
        assert part.n == within.sum()


def test_who_guesses_among_what_was_shown_is_right_by_chance():
    recall = TASKS["recall"]
    for size in (4, 64):
        found = measure_task(Solver(recall, guess=lambda ids: ids[1]), recall, [size], n_rows=5)[0]
        assert found.value == recall.chance(size)  # each value is asked once: no luck in it
    for name in ("copy", "passkey"):
        task = TASKS[name]
        found = measure_task(Solver(task, guess=lambda ids: 3), task, [64], n_rows=400)[0]
        assert abs(found.value - task.chance(64)) < 4 * found.stderr


def test_the_curriculum_opens_every_size_for_as_long_then_all():
    generator = np.random.default_rng(0)
    shares = np.arange(0, 1, 0.01)
    drawn = [draw_size((4, 8, 16, 32, 64), share, generator) for share in shares]
    assert drawn[:50] == [4] * 10 + [8] * 10 + [16] * 10 + [32] * 10 + [64] * 10
    assert set(drawn[50:]) == {4, 8, 16, 32, 64}


def accuracy(run: TaskRun) -> tuple[float, float]:
    """(of the largest size, its chance)"""
    task = TASKS[run.task]
    model = train_on_task(run).model
    return measure_task(model, task, run.sizes[-1:])[0].value, task.chance(run.sizes[-1])


def test_attention_learns_to_recall_pairs_and_elman_does_not():
    run = TaskRun("recall", "transformer", seed=0, sizes=(2, 4, 8), steps=100, tokens_per_step=1536)
    found, chance = accuracy(run)
    assert found >= 0.9, found
    found, _ = accuracy(replace(run, decoder="elman"))
    assert found < 2 * chance, found


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["transformer", "hybrid", "elman"])
def test_attention_and_hybrid_recall_64_pairs_and_elman_does_not(decoder):
    found, chance = accuracy(TaskRun("recall", decoder, seed=0, sizes=TASKS["recall"].sizes))
    assert found < 2 * chance if decoder == "elman" else found >= 0.9, found


def test_the_same_run_gives_the_same_weights():
    run = TaskRun("copy", "hybrid", seed=1, sizes=(32,), steps=3, tokens_per_step=64, hidden_size=16)
    first, again = (train_on_task(run).model.state_dict() for _ in range(2))
    other = train_on_task(replace(run, seed=2)).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def outcome(decoder: str, seed: int, values: dict[int, float]) -> Outcome:
    def measured(name, value):
        return Measurement(name, value, "fraction", 10, 0.1, "made", True)

    measurements = []
    for size, value in values.items():
        measurements.append(measured(f"recall_accuracy/{size}_pairs", value))
        measurements.append(measured(f"recall_accuracy/{size}_pairs/distance_1-16", value))
    chance = tuple(1 / size for size in values)
    return Outcome(
        "recall", decoder, seed, 0.003, "pairs", tuple(values), chance, ("x",), 5, 2, 1.0, tuple(measurements)
    )


def test_means_and_errors_over_seeds_and_what_is_remembered():
    outcomes = [
        outcome("lstm", 0, {4: 1.0, 8: 0.9, 16: 0.3}),
        outcome("lstm", 1, {4: 1.0, 8: 0.96, 16: 0.1}),
        outcome("lstm", 2, {4: 1.0, 8: 0.87, 16: 0.2}),
        outcome("gru", 0, {4: 0.5, 8: 0.95, 16: 0.95}),
    ]
    found = {m.name: m for m in over_seeds(outcomes)}
    at_16 = found["recall_accuracy/lstm/16_pairs"]
    assert (at_16.value, at_16.n) == (pytest.approx(0.2), 30)
    assert at_16.stderr == pytest.approx(0.1 / math.sqrt(3))
    assert found["recall_accuracy/lstm/8_pairs/distance_1-16"].value == pytest.approx(0.91)
    assert found["recall_remembered/lstm"].value == 8
    assert found["recall_remembered/gru"].value == 0, "what is forgotten at 4 is not remembered at 8"
    assert found["recall_accuracy/gru/4_pairs"].stderr is None


def test_sentences_follow_the_numbers():
    known, unknown = {64: 1.0}, {64: 0.02}
    able = [outcome("transformer", 0, known), outcome("hybrid", 0, known)]
    unable = [outcome("elman", 0, unknown)]
    assert sentence(able + unable, "recall", 64) == (
        "Recall of 64 pairs: transformer (1.00) and hybrid (1.00) reach an accuracy of 0.9; "
        "elman (0.02) does not. Chance is 0.02."
    )
    assert sentence(unable, "recall", 64) == (
        "Recall of 64 pairs: elman (0.02) does not reach an accuracy of 0.9. Chance is 0.02."
    )
    turned = [outcome("elman", 0, known), outcome("transformer", 0, unknown), outcome("gru", 0, unknown)]
    assert sentence(turned, "recall", 64) == (
        "Recall of 64 pairs: elman (1.00) reaches an accuracy of 0.9; transformer (0.02) and gru (0.02) "
        "do not. Chance is 0.02."
    )


VERB = (
    "range --decoders elman,hybrid --tasks recall,copy --recall-pairs 2,4 --lengths 32 --width 16 "
    "--rates 0.003"
)


def test_the_verb_writes_a_report_and_trains_nothing_twice(tmp_path, capsys):
    arguments = [*VERB.split(), "--seeds", "2", "--steps", "2", "--out", str(tmp_path)]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "Recall of 4 pairs: elman (" in told
    assert "Copy of 32 tokens: " in told
    assert len(list((tmp_path / "runs").iterdir())) == 8
    measured = {m.name: m for m in read_measurements(tmp_path / "range.json")}
    kept = [json.loads((tmp_path / f"runs/recall-elman-{seed}-0.003.json").read_text()) for seed in (0, 1)]
    values = [run["outcome"]["measurements"][0]["value"] for run in kept]
    assert measured["recall_accuracy/elman/2_pairs"].value == pytest.approx(sum(values) / 2)
    page, plain = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    for words in ("Recall of 4 pairs", "chance", "elman", "gated_linear, full_attention"):
        assert words in page
        assert words.replace("_", "&#95;") in plain or words in plain
    assert (tmp_path / "plots/range.png").read_bytes().startswith(b"\x89PNG")

    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    assert main(arguments) == 0
    assert capsys.readouterr().out == told
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()} == before
    arguments[arguments.index("--steps") + 1] = "3"
    assert main(arguments) == 2
    assert "was trained with other settings" in capsys.readouterr().err


def test_other_seeds_use_the_best_learning_rate_of_the_first(tmp_path):
    """elman: no rate solves the task, the second is best; gru: the first rate solves it."""
    accuracies = {("elman", 0.1): 0.1, ("elman", 0.2): 0.3, ("elman", 0.3): 0.2, ("gru", 0.1): 0.95}
    trained = []

    def train(run, on_progress):
        trained.append((run.decoder, run.seed, run.learning_rate))
        made = outcome(run.decoder, run.seed, {4: accuracies[run.decoder, run.learning_rate]})
        return replace(made, learning_rate=run.learning_rate)

    options = {"decoders": ["elman", "gru"], "tasks": ["recall"], "recall_pairs": [4], "seeds": 2}
    rates = (0.1, 0.2, 0.3)
    found = measure_range(tmp_path, **options, learning_rates=rates, train=train)
    first = [("elman", 0, 0.1), ("elman", 0, 0.2), ("elman", 0, 0.3), ("gru", 0, 0.1)]
    assert trained == [*first, ("elman", 1, 0.2), ("gru", 1, 0.1)]
    assert [(o.decoder, o.learning_rate) for o in found.outcomes] == [("elman", 0.2), ("gru", 0.1)] * 2
    measured = {m.name: m.value for m in read_measurements(tmp_path / "range.json")}
    assert measured["recall_accuracy/elman/4_pairs"] == 0.3
    trained.clear()
    (tmp_path / "runs/recall-gru-1-0.1.json").unlink()
    measure_range(tmp_path, **options, learning_rates=rates, train=train)
    assert trained == [("gru", 1, 0.1)], "only what is missing is trained"
    command = (tmp_path / "report.md").read_text()
    assert (
        "hf-genlm range --decoders elman,gru --tasks recall --recall-pairs 4 --steps 400 --seeds 2" in command
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--decoders lstn", "did you mean 'lstm'?"),
        ("--tasks recal", "did you mean 'recall'?"),
        ("--recall-pairs 4,500", "1..128"),
        ("--lengths 8", "32..1048576"),
        ("--recall-pairs 4,x", "whole number"),
        ("--decoders ,", "no decoder is named"),
        ("--minutes 0", "more than 0"),
        ("--rates 0", "more than 0"),
        ("--decoders transformer --width 7", "head_dim must be even"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(words, said, tmp_path, capsys):
    assert main(["range", "--out", str(tmp_path), *words.split()]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
