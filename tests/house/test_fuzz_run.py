"""Promise: whatever is typed, and whatever a file of a run, a model, a checkpoint or the cache holds, a verb
works or refuses it by its name.

HF_GENLM_FUZZ=N makes N calls; the slow form makes 6,000.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
from support import fuzzing
from support.fuzzing import Case, judge, run_call, state_of

SHORT, LONG = 18, 6000


def fuzz(n: int, seed: int) -> str:
    words = [sys.executable, fuzzing.__file__, str(n), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_calls_of_all_kinds_work_or_refuse():
    told = fuzz(int(os.environ.get("HF_GENLM_FUZZ", SHORT)), seed=0)
    for kind in fuzzing.KINDS:
        assert f"'{kind} " in told


@pytest.mark.slow
def test_six_thousand_calls_work_or_refuse():
    print(fuzz(LONG, seed=1))


def raises() -> int:
    raise KeyError("a fault of this package")


def refuses(message: str):
    def run() -> int:
        sys.stderr.write(message)
        return 2

    return run


def leaves_a_process() -> int:
    subprocess.Popen(["sleep", "60"], start_new_session=True)  # a process of its own, as a launcher starts it
    return 0


FAULTS = {
    "traceback": raises,
    "ended by SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exit code 3": lambda: 3,
    "exit code 130 without Ctrl-C": lambda: 130,
    "hangs": lambda: time.sleep(60),
    "a refusal without a message": refuses(""),
    "a refusal that does not name the changed file": refuses("hf-genlm: some file is damaged\n"),
    "leaves a process behind": leaves_a_process,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fuzz_sees_the_fault(tmp_path, fault):
    (tmp_path / "work").mkdir()
    fuzzing.adopt_orphans()
    outcome = run_call(FAULTS[fault], tmp_path, timeout_s=2.0)
    judge(outcome, Case([], "run/corpus.json", "content"))
    assert [found for found in outcome.faults if found.startswith(fault)], outcome


def test_the_fuzz_takes_a_call_that_works_or_names_the_file(tmp_path):
    (tmp_path / "work").mkdir()
    for run in (lambda: 0, refuses("hf-genlm: 'run/corpus.json' is damaged\n")):
        outcome = run_call(run, tmp_path)
        judge(outcome, Case([], "run/corpus.json", "content"))
        assert not outcome.faults
    judge(large := dataclasses.replace(outcome, n_bytes=2_000_000_000), Case([]))
    assert large.faults


def test_the_fuzz_sees_a_changed_place(tmp_path):
    (tmp_path / "folder").mkdir()
    states = [state_of(tmp_path)]
    for change in (
        lambda: (tmp_path / "folder" / "a").write_text("a"),
        lambda: (tmp_path / "folder" / "a").write_text("longer"),
        lambda: (tmp_path / "folder" / "a").chmod(0o600),
        lambda: (tmp_path / "folder" / "a").unlink(),
    ):
        change()
        states.append(state_of(tmp_path))
    assert len({str(state) for state in states}) == 4  # the first is as the last
    assert states[0] == states[-1]
