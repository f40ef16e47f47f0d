"""Promise: what ends a run costs no more than the steps since its last checkpoint, and resuming it comes to
the same weights."""

import contextlib
import errno
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import killing
from support.resuming import at_step, weights_of
from transformers import TrainerState

from hf_genlm.cli.main import main
from hf_genlm.config.recipe import load_recipe
from hf_genlm.errors import Stopped, UserError
from hf_genlm.run_folder import RunFolder
from hf_genlm.training.budget import Budget
from hf_genlm.training.checkpoints import (
    Progress,
    commit_checkpoint,
    newest_checkpoint,
    pending_folder,
)
from hf_genlm.training.fit import _resuming
from hf_genlm.training.train import train
from hf_genlm.training.trainer import BudgetTrainer


def recipe_of(text: Path, *settings: str):
    recipe = load_recipe(None, (*killing.SETTINGS, "training.save_steps=5", *settings))
    recipe.corpus.sources = [str(text)]
    return recipe


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    killing.write_text(path)
    return path


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> RunFolder:
    return train(recipe_of(text), tmp_path_factory.mktemp("runs") / "undisturbed")


@pytest.fixture
def stopped(text, tmp_path) -> RunFolder:
    """A run that SIGTERM ended behind its checkpoint of step 10."""
    listener = at_step(10, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped) as caught:
        train(recipe_of(text), tmp_path / "run", listener)
    assert caught.value.step == 11
    return RunFolder(tmp_path / "run")


def test_a_run_that_a_signal_ended_comes_to_the_same_weights(text, stopped, undisturbed):
    assert not stopped.model.exists()
    written = [(path.name, path.stat().st_mtime_ns) for path in sorted(stopped.tokenizer.iterdir())]
    resumed = train(recipe_of(text), stopped.path, resume=True)
    assert [(path.name, path.stat().st_mtime_ns) for path in sorted(stopped.tokenizer.iterdir())] == written
    assert weights_of(resumed) == weights_of(undisturbed)
    assert resumed.evaluation.read_bytes() == undisturbed.evaluation.read_bytes()
    assert not resumed.checkpoints.exists(), "nothing is left to resume"
    assert [e["step"] for e in resumed.read_log() if e["event"] in ("stopped", "resumed")] == [11, 11]


def test_the_command_line_exits_with_0_and_says_how_to_go_on(
    text, tmp_path, capsys, monkeypatch, undisturbed
):
    """Ctrl-C in the middle, then the command that it prints."""
    save = BudgetTrainer._save_checkpoint

    def interrupted(self, *args):
        save(self, *args)
        if self.state.global_step == 10:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(BudgetTrainer, "_save_checkpoint", interrupted)
    settings = [part for setting in killing.SETTINGS for part in ("--set", setting)]
    out = str(tmp_path / "a run")
    every = ["--set", "training.save_steps=5"]
    assert main(["train", str(text), "--out", out, *settings, *every]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[-2:] == ["stopped after step 11; to continue:", f"hf-genlm train --resume --out '{out}'"]
    assert main(["train", str(text), "--out", out]) == 2
    assert "train --resume" in capsys.readouterr().err
    assert main(["generate", out]) == 2
    message = capsys.readouterr().err
    assert "has no model yet" in message
    assert said[-1] in message
    assert main(shlex.split(said[-1])[1:]) == 0
    assert weights_of(RunFolder(out)) == weights_of(undisturbed)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_loses_nothing(kills, tmp_path):
    command = [sys.executable, killing.__file__, str(tmp_path), str(kills), "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["kills"] == kills
    assert found["equal"]


def test_a_checkpoint_is_whole_and_holds_no_pickle_of_objects(stopped):
    names = sorted(path.name for path in stopped.checkpoints.iterdir())
    assert names == ["checkpoint-10", "checkpoint-11"], "the older ones went, and no part is left"
    held = {path.name for path in (stopped.checkpoints / "checkpoint-11").iterdir()}
    assert "training_args.bin" not in held
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert name in held


def test_a_checkpoint_is_on_disk_before_it_has_its_name_and_before_an_older_one_goes(tmp_path, monkeypatch):
    """At each fsync: the path, and the checkpoints that there are."""
    folder, synced = tmp_path / "checkpoints", []
    sync = os.fsync

    def note(number: int) -> None:
        names = {path.name for path in folder.glob("checkpoint-*")}
        synced.append((Path(os.readlink(f"/proc/self/fd/{number}")), names))
        sync(number)

    def commit(step: int) -> None:
        written = pending_folder(folder) / f"checkpoint-{step}"
        (written / "deep").mkdir(parents=True)
        for name in ("weights", "deep/state"):
            (written / name).write_text(f"{name} of step {step}")
        commit_checkpoint(folder, Progress(step, 1.0, None, 20), total_limit=2)

    commit(1)
    commit(2)
    monkeypatch.setattr(os, "fsync", note)
    commit(3)
    pending = pending_folder(folder) / "checkpoint-3"
    before = {path for path, names in synced if "checkpoint-3" not in names}
    assert {pending / "weights", pending / "deep/state", pending / "deep", pending} <= before
    assert any(path.parent == pending and "manifest.json" in path.name for path in before)
    assert (folder, {"checkpoint-1", "checkpoint-2", "checkpoint-3"}) in synced
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "checkpoint-3"}


def test_a_damaged_checkpoint_is_passed_over(text, stopped, undisturbed):
    weights = stopped.checkpoints / "checkpoint-11" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    left = []

    def hear(event, fields):
        if event == "checkpoint":
            left.append(sorted(path.name for path in stopped.checkpoints.iterdir()))

    resumed = train(recipe_of(text), stopped.path, hear, resume=True)
    assert left[0] == ["checkpoint-10", "checkpoint-15", "damaged-checkpoint-11"], (
        "it takes no whole one's place"
    )
    assert [e["step"] for e in resumed.read_log() if e["event"] == "resumed"] == [10]
    assert any("checkpoint-11 is damaged" in e.get("message", "") for e in resumed.read_log())
    assert weights_of(resumed) == weights_of(undisturbed)


@pytest.mark.parametrize(
    "setting",
    ["training.learning_rate=0.5", "model.dropout=0.2", "training.steps=48", "training.minutes=5"],
)
def test_another_recipe_is_refused_by_name(setting, text, stopped):
    name = setting.partition("=")[0]
    with pytest.raises(UserError, match=name) as caught:
        train(recipe_of(text, setting), stopped.path, resume=True)
    assert "None" not in str(caught.value)
    assert ("--from continues" in str(caught.value)) == (name in ("training.steps", "training.minutes"))
    assert newest_checkpoint(stopped.checkpoints).progress.step == 11, "it is as it was"


def test_another_text_is_refused_by_name(text, tmp_path, stopped):
    before = text.read_text(encoding="utf-8")
    try:
        text.write_text(before.replace("7 times", "8 times"), encoding="utf-8")
        with pytest.raises(UserError, match=r"text\.txt"):
            train(recipe_of(text), stopped.path, resume=True)
    finally:
        text.write_text(before, encoding="utf-8")
    assert newest_checkpoint(stopped.checkpoints).progress.step == 11


def test_a_text_that_is_gone_is_named_and_one_that_came_back_serves(text, tmp_path, stopped, undisturbed):
    """Also in a run folder that was moved meanwhile."""
    moved = RunFolder(stopped.path.rename(tmp_path / "moved"))
    aside = text.rename(tmp_path / "aside.txt")
    try:
        with pytest.raises(UserError, match=r"text\.txt', which this run reads, is missing: bring it back"):
            train(recipe_of(text), moved.path, resume=True)
    finally:
        aside.rename(text)
    assert weights_of(train(recipe_of(text), moved.path, resume=True)) == weights_of(undisturbed)


def test_a_run_that_is_done_is_left_as_it_is(text, undisturbed):
    before, heard = (weights_of(undisturbed), undisturbed.log_file.read_bytes()), []
    again = train(recipe_of(text), undisturbed.path, lambda *event: heard.append(event), resume=True)
    assert again.path == undisturbed.path
    assert "is done and left as it is" in heard[-1][1]["message"]
    assert (weights_of(undisturbed), undisturbed.log_file.read_bytes()) == before


@pytest.mark.parametrize("is_new", [True, False])
def test_two_processes_do_not_train_in_one_folder(is_new, text, stopped, tmp_path, undisturbed):
    """While a new or a resumed run trains, a second one is refused and changes nothing."""
    folder, refused = tmp_path / "new" if is_new else stopped.path, []

    def train_too(event, fields):
        if event == "checkpoint":
            before = (folder / "log.jsonl").read_bytes()
            with pytest.raises(UserError, match="another process is training"):
                train(recipe_of(text), folder, resume=True)
            assert (folder / "log.jsonl").read_bytes() == before
            refused.append(fields["step"])

    run = train(recipe_of(text), folder, train_too, resume=not is_new)
    assert refused == ([5, 10, 15] if is_new else [15])
    assert weights_of(run) == weights_of(undisturbed)


def test_resume_needs_a_folder(capsys):
    assert main(["train", "--resume"]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_resumed_run_with_a_time_budget_has_only_the_time_that_was_left(text, tmp_path, monkeypatch):
    """With a clock that each reading moves by 10 ms, whatever the machine does."""
    now = itertools.count(0.0, 0.01)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    settings = ("training.minutes=0.1", "training.steps=null", "training.max_epochs=10000")

    def hear(event, fields):
        if event == "step" and fields["progress"] > 0.4:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        train(recipe_of(text, *settings), tmp_path / "run", hear)
    begun = newest_checkpoint(tmp_path / "run" / "checkpoints").progress
    run = train(recipe_of(text, *settings), tmp_path / "run", resume=True)
    events = run.read_log()
    steps = [e for e in events if e["event"] == "step"]
    trained = next(e for e in events if e["event"] == "trained")
    assert 0.4 * begun.seconds < begun.elapsed_s < 0.7 * begun.seconds
    assert trained["seconds"] == pytest.approx(begun.seconds, rel=0.1)
    resumed_at = next(i for i, e in enumerate(events) if e["event"] == "resumed")
    first = next(e for e in events[resumed_at:] if e["event"] == "step")
    assert begun.elapsed_s < first["elapsed_s"] < begun.elapsed_s + 0.1 * begun.seconds, "the clock continues"
    assert first["progress"] > 0.4
    expected = begun.step * begun.seconds / begun.elapsed_s
    assert trained["steps"] == pytest.approx(expected, rel=0.2), "not the whole time again"
    assert steps[-1]["learning_rate"] < 0.2 * max(e["learning_rate"] for e in steps)


def test_a_clock_that_jumps_changes_nothing(monkeypatch):
    budget = Budget(seconds=100.0)
    budget.start()
    now = time.time()
    for jump in (-3600.0, 3600.0):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        assert 0 <= budget.elapsed_s < 10
        assert not budget.is_spent(1)


def spoil(monkeypatch, step: int, times: int) -> None:
    """The loss of that step is NaN, so many times."""
    compute, left = BudgetTrainer.compute_loss, [times]

    def compute_loss(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        if self.state.global_step == step and left[0]:
            left[0] -= 1
            return loss * float("nan")
        return loss

    monkeypatch.setattr(BudgetTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize(("step", "back_to"), [(12, 10), (3, 0)])
def test_a_loss_of_nan_goes_back_and_halves_the_rate_once(step, back_to, text, tmp_path, monkeypatch):
    spoil(monkeypatch, step, times=1)
    run = train(recipe_of(text, "training.warmup_steps=0"), tmp_path / "run")
    (event,) = [e for e in run.read_log() if e["event"] == "diverged"]
    assert event["back_to"] == back_to
    steps = [e for e in run.read_log() if e["event"] == "step"]
    before, after = steps[0]["learning_rate"], steps[-1]["learning_rate"]
    share_before, share_after = (min(1.0, (1 - (s - 0.5) / 20) / 0.5) for s in (1, steps[-1]["step"]))
    assert after / share_after == pytest.approx(before / share_before / 2, rel=1e-6)
    assert run.evaluation.is_file()


def test_a_halved_rate_stays_halved_when_the_run_is_resumed(text, tmp_path, monkeypatch, undisturbed):
    """Stopped after the first checkpoint at half the rate; then the loss becomes NaN once more."""
    rate = {e["step"]: e["learning_rate"] for e in undisturbed.read_log() if e["event"] == "step"}
    spoil(monkeypatch, 12, times=1)
    with pytest.raises(Stopped):
        train(recipe_of(text), tmp_path / "run", at_step(15, lambda: signal.raise_signal(signal.SIGTERM)))
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").progress.is_rate_halved
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    run = train(recipe_of(text), tmp_path / "run", resume=True)
    last = [e for e in run.read_log() if e["event"] == "step"][-1]
    assert last["learning_rate"] == pytest.approx(rate[last["step"]] / 2, rel=1e-6)
    spoil(monkeypatch, 18, times=1)
    with pytest.raises(UserError, match="at half the learning rate"):  # noted in its own checkpoints too
        train(recipe_of(text, "training.save_steps=1"), tmp_path / "again", resume=True)


def test_a_loss_of_nan_at_half_of_the_rate_ends_the_run(text, tmp_path, monkeypatch):
    spoil(monkeypatch, 12, times=2)
    with pytest.raises(UserError, match="learning_rate"):
        train(recipe_of(text), tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").progress.step == 10


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.name == "posix" and shutil.which("mount") is not None
    mounted = (
        mounted
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Take all space there is."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(text, small_disk, undisturbed):
    """It fills while the run goes on, and is cleared by the person before the model is saved."""
    ballast, missed = small_disk / "ballast", []

    def hear(event, fields):
        if event == "checkpoint" and fields["step"] == 5:
            fill(ballast)
        if event == "note":
            missed.append(fields["message"])
        if event == "trained":
            ballast.unlink()

    run = train(recipe_of(text), small_disk / "run", hear)
    assert any("no checkpoint after step 10" in message for message in missed)
    assert weights_of(run) == weights_of(undisturbed)


def test_a_model_that_found_no_room_is_saved_by_resuming(text, tmp_path, monkeypatch, undisturbed):
    def full(folder):
        if folder.name.startswith(".model."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hf_genlm.files.sync_folder", full)
    with pytest.raises(UserError, match="--resume"):
        train(recipe_of(text), tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert not run.model.exists()
    monkeypatch.undo()
    assert weights_of(train(recipe_of(text), run.path, resume=True)) == weights_of(undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
def test_several_processes_stop_together_and_go_on_to_the_same_weights(text, tmp_path):
    settings = [*killing.SETTINGS, "training.save_steps=20", "training.steps=400"]
    command = [sys.executable, "-m", "hf_genlm", "train", "--processes", "2"]
    begin = [*command, str(text), *(part for setting in settings for part in ("--set", setting))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path]), "ACCELERATE_USE_CPU": "true"}

    def run(name: str, *more: str) -> subprocess.CompletedProcess:
        command = [*more, "--out", str(tmp_path / name)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    whole = run("undisturbed", *begin)
    assert whole.returncode == 0, whole.stderr
    stopped = tmp_path / "stopped"
    child = subprocess.Popen(
        [*begin, "--out", str(stopped)], stderr=subprocess.PIPE, text=True, env=environment
    )
    while not (stopped / "checkpoints" / "checkpoint-20").is_dir():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 0, said
    assert said.splitlines()[-1] == f"hf-genlm train --resume --out {stopped}"
    resumed = run("stopped", *command, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert weights_of(RunFolder(stopped)) == weights_of(RunFolder(tmp_path / "undisturbed"))


@pytest.mark.parametrize(("field", "value"), [("log_history", "x"), ("max_steps", "9"), ("epoch", [])])
def test_a_state_of_trainer_of_other_types_is_refused_before_a_step(field, value, tmp_path):
    state = TrainerState(global_step=3)
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    begin = SimpleNamespace(path=tmp_path, progress=SimpleNamespace(step=3))
    trainer = SimpleNamespace(state=state)
    with _resuming(begin, trainer):
        pass
    stated = json.loads((tmp_path / "trainer_state.json").read_text())
    (tmp_path / "trainer_state.json").write_text(json.dumps({**stated, field: value}))
    with pytest.raises(UserError, match=field), _resuming(begin, trainer):
        raise AssertionError("a step")
