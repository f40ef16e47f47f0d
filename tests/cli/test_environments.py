"""Promise: an odd environment costs no traceback, no lost work and no process that is left running."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
from support.launching import environment
from support.models import build_model
from support.runs import SMALL

from hf_genlm.cli import display
from hf_genlm.cli.main import main
from hf_genlm.config.recipe import load_recipe
from hf_genlm.decoding import FastGenerator
from hf_genlm.errors import Stopped, UserError
from hf_genlm.files import atomic_folder, cache_folder
from hf_genlm.run_folder import RunFolder, launched_as
from hf_genlm.text.cache import usable_cache
from hf_genlm.training.check import check
from hf_genlm.training.checkpoints import StopRequest
from hf_genlm.training.processes import end_after, meet
from hf_genlm.training.train import train

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def run(*words: str, cwd, **more: str) -> subprocess.CompletedProcess:
    """`python -m hf_genlm *words` in a folder and an environment."""
    command = [sys.executable, "-m", "hf_genlm", *words]
    return subprocess.run(command, capture_output=True, cwd=cwd, env=environment(**more), timeout=60)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_encoding_prints_every_text(encoding, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    display.prepare_streams()
    display.print_rows([("bits", "1.5 ± 0.1", "日本")])
    display.print_generated("é日\n")
    sys.stdout.flush()
    lines = written.getvalue().decode(encoding).splitlines()
    sign, text = {"ascii": ("+-", "\\xe9\\u65e5"), "cp1252": ("±", "é\\u65e5"), "utf-8": ("±", "é日")}[
        encoding
    ]
    assert lines[0].startswith(f"bits  1.5 {sign} 0.1")
    assert lines[1] == text


def test_output_that_is_closed_is_no_fault(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--version"]) == 0
    sys.stdout.close()


def test_a_locale_without_utf8_reads_words_in_utf8(tmp_path):
    done = run("train", "--dépôt", cwd=tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 2
    assert "no option --dépôt" in done.stderr.decode("utf-8")


def test_modules_of_the_user_are_not_modules_of_python(tmp_path):
    for name in ("random", "token", "shlex", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the user')\n")
    done = run("runs", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr


def test_the_backend_of_a_notebook_is_not_used(tmp_path):
    code = "import sys; from hf_genlm.cli.main import main; main(['--version']); import matplotlib.figure"
    words = [sys.executable, "-c", code]
    subprocess.run(words, cwd=tmp_path, env=environment(MPLBACKEND="nosuch"), check=True, timeout=60)


def test_a_name_that_is_not_utf8_is_refused_before_the_work(tmp_path, capsys):
    name = str(tmp_path / os.fsdecode(b"r\xe9"))
    with pytest.raises(UserError, match="not a name in UTF-8"):
        RunFolder.create(name)
    with pytest.raises(UserError, match="not a name in UTF-8"), atomic_folder(name):
        pass
    assert list(tmp_path.iterdir()) == []


def test_texts_whose_names_are_not_utf8_are_read(text_folder, tmp_path):
    folder = tmp_path / os.fsdecode(b"t\xe9")
    folder.mkdir()
    for file in text_folder.iterdir():
        (folder / (file.stem + os.fsdecode(b"\xff") + file.suffix)).write_bytes(file.read_bytes())
    recipe = load_recipe(None, [*SMALL, "training.steps=1", "training.num_samples=0"])
    recipe.corpus.sources = [str(folder)]
    found = train(recipe, tmp_path / "run")
    assert train(load_recipe(found.recipe), found.path, resume=True).evaluation.is_file()


@pytest.mark.parametrize("leave_out", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", None])
def test_variables_that_a_launcher_left_are_removed(leave_out, monkeypatch):
    for name, value in {**LAUNCHED, "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    if leave_out is None:
        assert launched_as() == (1, 2)
        return
    monkeypatch.delenv(leave_out)
    assert launched_as() == (0, 1)
    assert not os.environ.keys() & {*LAUNCHED, "LOCAL_RANK"}


@pytest.mark.parametrize("value", ["two", "", "-1", "1"])
def test_variables_that_are_no_numbers_of_processes_are_removed(value, monkeypatch):
    for name, stated in {**LAUNCHED, "WORLD_SIZE": value}.items():
        monkeypatch.setenv(name, stated)
    assert launched_as() == (0, 1)


def test_only_train_runs_as_one_of_several(monkeypatch, capsys):
    """The second of two processes prints nothing: any other verb would end without a word."""
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert main(["generate", "/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_processes_that_do_not_come_are_told():
    for name, value in LAUNCHED.items():
        os.environ[name] = value
    try:
        with pytest.raises(UserError, match="unset WORLD_SIZE"):
            meet(1, 2, timeout=timedelta(seconds=1))
    finally:
        for name in LAUNCHED:
            del os.environ[name]


def test_a_second_signal_changes_nothing(tmp_path):
    stop, done = StopRequest(str(tmp_path)), []
    before = signal.getsignal(signal.SIGINT)

    def save() -> None:
        with stop.handled(), stop.deferred():
            for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.raise_signal(number)
            assert stop.is_made
            done.append("the checkpoint")

    with pytest.raises(Stopped):
        save()
    assert done == ["the checkpoint"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("is_ignored", [False, True])
def test_hangup_is_a_request_to_stop_unless_it_is_ignored(is_ignored, tmp_path):
    stop = StopRequest(str(tmp_path))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        with stop.handled():
            if is_ignored:
                signal.raise_signal(signal.SIGHUP)
            else:
                with pytest.raises(Stopped):
                    signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stop.is_made is not is_ignored


def test_a_second_signal_leaves_the_message_how_to_continue(monkeypatch, capsys):
    """Ctrl-C ended the training, and another one came while the curves were drawn."""

    def interrupted(*args: object) -> None:
        try:
            raise Stopped("my run", 7)
        finally:
            raise KeyboardInterrupt

    monkeypatch.setattr("hf_genlm.cli.main._run", interrupted)
    assert main(["train"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "stopped after step 7; to continue:", "hf-genlm train --resume --out 'my run'"
    ]  # fmt: skip


def test_a_process_ends_after_its_parent():
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_after(lambda: None)
        time.sleep(30)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_progress_that_nobody_reads_ends_no_training(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Closed())
    with display.Display() as shown:
        shown.hear("note", {"message": "the terminal was closed"})
    display.say("stopped", is_error=True)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_takes_nothing_is_one_line(number, monkeypatch, capsys):
    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number), "/place/.lock")

    monkeypatch.setattr("hf_genlm.cli.main._run", fail)
    assert main(["train"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "/place/.lock" in line
    assert os.strerror(number) in line


def test_a_user_without_home_has_no_cache_and_generates(monkeypatch):
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "HF_GENLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(UserError, match="HF_GENLM_CACHE"):
        cache_folder()
    notes: list[str] = []
    assert usable_cache(True, notes.append).folder is None
    assert len(notes) == 1
    model = build_model(["gru"]).eval()
    found = FastGenerator(model).generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False)
    assert found.shape == (1, 4)


def test_bfloat16_without_hardware_is_told_or_refused(text_folder, tmp_path, monkeypatch):
    recipe = load_recipe(
        None, [*SMALL, "training.steps=1", "training.num_samples=0", "training.dtype=bfloat16"]
    )
    recipe.corpus.sources = [str(text_folder)]
    if not torch.cuda.is_available():
        monkeypatch.setattr("hf_genlm.training.train.computes_bfloat16", lambda: False)
        notes = [e["message"] for e in train(recipe, tmp_path / "run").read_log() if e["event"] == "note"]
        assert any("training.dtype=bfloat16" in note for note in notes)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("hf_genlm.training.check.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(UserError, match=r"training\.dtype=auto"):
        check(recipe)
