"""Promise: several processes train the model that one process would, and end together."""

import importlib.util
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.launching import (
    ROOT,
    SHORT,
    TIMEOUT_S,
    command,
    compare_with_one,
    environment,
    start,
)
from support.runs import SMALL, losses, write_documents

from hf_genlm.cli.launch import check_processes, describe_failure
from hf_genlm.config.recipe import load_recipe
from hf_genlm.errors import UserError
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.encoding import TokenizedDocuments
from hf_genlm.text.packing import IGNORED, PackedRows
from hf_genlm.training import processes
from hf_genlm.training.budget import Budget
from hf_genlm.training.train import train

QUICK = """
import sys
import hf_genlm.cli  # torch's launcher alone, not our model
from hf_genlm.cli.launch import launch
AS = "import os, signal, sys, time; rank = int(os.environ['RANK']); "
for body in sys.stdin.read().splitlines():
    print(launch(["-c", AS + body], 2), flush=True)
"""


def test_a_failed_process_ends_the_others_and_decides_the_exit_code():
    outcomes = {
        "pass": (0, None),
        "sys.exit(2) if rank == 0 else time.sleep(60)": (2, None),
        "sys.exit(3) if rank == 1 else time.sleep(60)": (
            1,
            "process 1 failed with exit code 3, and the others were stopped",
        ),
        "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)": (
            1,
            "process 1 was ended by SIGKILL, and the others were stopped",
        ),
    }
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", QUICK], input="\n".join(outcomes), capture_output=True, text=True,
        env=environment(), timeout=TIMEOUT_S, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [str(outcome) for outcome in outcomes.values()]
    assert done.stderr == ""
    assert time.monotonic() - began < 60


LISTENING = r"""
import os, psutil
import hf_genlm.cli  # the processes alone, not our model
from hf_genlm.training import processes
processes.join()
assert processes.from_first(lambda: processes.count()) == 2
group = [psutil.Process(), psutil.Process().parent()]
ports = [c.laddr for process in group for c in process.net_connections() if c.status == "LISTEN"]
os.write(1, f"{sorted({port.ip for port in ports})}\n".encode())  # in one piece
processes.leave()
"""


def test_processes_of_one_machine_listen_on_its_loopback_interface_only(monkeypatch):
    """Neither the launcher nor a process, on no other address: a store unpickles what is written to it."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")  # as it is stated for several machines
    done = start(["-c", LISTENING])
    out, err = done.communicate(timeout=TIMEOUT_S)
    *addresses, outcome = out.splitlines()
    assert outcome == "(0, None)", err
    assert addresses == ["['127.0.0.1']"] * 2


def test_the_message_names_the_process_that_failed_first():
    """The launcher ends the remaining processes by SIGTERM; a killed process makes others fail by itself."""
    term, kill = -signal.SIGTERM, -signal.SIGKILL
    assert describe_failure({0: term, 1: 1, 2: kill})[1].startswith("process 2 was ended by SIGKILL")
    assert describe_failure({0: term, 1: 1})[1].startswith("process 1 failed with exit code 1")
    assert describe_failure({0: term})[1].startswith("process 0 was ended by SIGTERM")
    assert describe_failure({0: 2, 1: term}) == (2, None)


def test_processes_of_another_launcher_do_not_launch_more(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    check_processes(None)
    check_processes(4)
    with pytest.raises(UserError, match="--processes 2: a launcher has already started 4"):
        check_processes(2)


def test_unreachable_machines_give_the_remedy(monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("Gloo connectFullMesh failed with timed out connecting: Connection refused")

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "HF_GENLM_STORE": "file:///nowhere"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.PartialState", fail)
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME=eth0"):
        processes.join()


def test_a_batch_is_shared_evenly_or_refused():
    assert processes.rows_per_process(9) == 9
    assert processes.rows_per_process(16, n_processes=4) == 4
    with pytest.raises(UserError, match=r"batch_size = 10 .*--processes 2, or --set training\.batch_size=8$"):
        processes.rows_per_process(10, n_processes=4)
    message = r"--set training\.batch_size=12 and --set training\.gradient_accumulation_steps=1"
    with pytest.raises(UserError, match=message):
        processes.rows_per_process(2, accumulation=6, n_processes=4)


@pytest.fixture(scope="module")
def rows() -> PackedRows:
    ids = np.arange(2, 200, dtype=np.uint16)
    documents = TokenizedDocuments(ids, np.array([0, 100, 198]), np.array([100, 98]))
    return PackedRows(documents, max_seq_length=16, eos_id=1, pad_id=0)


def test_processes_read_each_row_once_in_the_order_of_one_process(rows):
    """The order of accelerate's own sampler."""
    from accelerate.data_loader import SeedableRandomSampler

    for epoch in (0, 3):
        alone = SeedableRandomSampler(range(len(rows)), data_seed=7)
        alone.set_epoch(epoch)
        order = list(processes.PaddedSampler(len(rows), 8, seed=7, epoch=lambda epoch=epoch: epoch))
        assert order[: len(rows)] == list(alone)
        assert set(order[len(rows) :]) == {len(rows)}
        assert len(order) == len(processes.PaddedSampler(len(rows), 8, 7, lambda: 0)) == 16


def test_the_blank_row_has_no_labels(rows):
    n = len(rows)
    assert n == 14
    batch = processes.PaddedRows(rows).__getitems__([3, n, 5])
    plain = rows.__getitems__([3, 5])
    for key, value in plain.items():
        assert np.array_equal(batch[key][[0, 2]], value)
    assert (batch["labels"][1] == IGNORED).all()


def test_the_clock_of_several_processes_stands_still_between_agreements(monkeypatch):
    alone, shared = Budget(seconds=10.0), Budget(seconds=10.0)
    alone.start()
    monkeypatch.setattr("hf_genlm.training.budget.count", lambda: 2)
    monkeypatch.setattr("hf_genlm.training.budget.broadcast_time", lambda now: times.pop(0))
    times = [100.0, 104.0]
    shared.start()
    assert shared.elapsed_s == 0.0
    shared.agree()
    assert shared.elapsed_s == 4.0
    assert shared.progress(1) == 0.4
    assert alone.elapsed_s < 4.0


def jobs_of(text, decoders, more, sharded):
    """One job for each decoder."""
    return [
        {
            "name": f"{'fsdp' if sharded else 'ddp'}-{decoder}",
            "sharded": sharded,
            "assignments": [
                *SMALL, f"corpus.sources={text}", f"model.decoder={decoder}", "training.num_samples=1",
                *more.get(decoder, []), *more.get("all", []),
                *(["model.ngram_order=0"] if sharded else []),  # as processes that share the weights decide
            ],
        }
        for decoder in decoders
    ]  # fmt: skip


@pytest.fixture(scope="module")
def five_documents(tmp_path_factory):
    return write_documents(5, tmp_path_factory.mktemp("five"))


TRACKED = ["training.report_to=tensorboard", "training.milestone_words=100,300"]
# an epoch of 72 rows ends within the run, with a part of a batch, a row that is filled up, and fewer passes
LAST_ROWS = ["training.max_seq_length=128", "training.batch_size=8", "training.gradient_accumulation_steps=2"]
MORE = {
    "gated_linear": [*LAST_ROWS, "corpus.cache=false"],
    "lstm": ["model.embedding_size=16", "model.tie_word_embeddings=true", "model.output_bias=true"],
}


def test_two_processes_train_the_model_of_one(text_folder, five_documents, tmp_path):
    """By DDP and FSDP2: tied and untied heads, bigrams, accumulation, the end of an epoch, validation and
    samples between steps, no cache, a stream, balanced languages; with a tracker and milestones.
    (Attention is in the slow test.)"""
    short = [*SHORT, *TRACKED]
    more = {**MORE, "all": short}
    jobs = jobs_of(five_documents, ["gated_linear"], more, sharded=False)
    streamed = ["corpus.stream=true", "corpus.shuffle_buffer=64", "training.gradient_accumulation_steps=2"]
    jobs += jobs_of(five_documents, ["lstm"], {"all": [*short, *streamed]}, sharded=False)
    jobs += jobs_of(five_documents, ["gated_linear", "lstm"], more, sharded=True)
    named = f"corpus.languages=eng={text_folder}/[a-b]*.txt,deu={text_folder}/[!a-b]*.txt"
    of_languages = [*SMALL, *short, named, "corpus.temperature=100"]
    jobs.append({"name": "languages", "sharded": False, "assignments": of_languages})
    compare_with_one(jobs, tmp_path / "runs")
    for job in jobs:
        run = RunFolder(tmp_path / "runs" / job["name"])
        assert [path.name for path in sorted(run.milestones.iterdir())] == ["chck_100", "chck_300"]
        assert len(list(run.tensorboard.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_train_the_model_of_one_over_many_steps(five_documents, tmp_path, sharded):
    decoders = ["lstm", "gated_linear", "transformer", "hybrid"]
    jobs = jobs_of(five_documents, decoders, {**MORE, "all": ["training.steps=50"]}, sharded)
    compare_with_one(jobs, tmp_path / "runs")


def accelerate_loop():
    spec = importlib.util.spec_from_file_location("train_loop", ROOT / "recipes" / "train_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "more", [[], [*LAST_ROWS, "training.label_smoothing_factor=0.1", "model.dropout=0.1"]]
)
def test_the_accelerate_loop_has_the_losses_of_train(five_documents, tmp_path, more):
    assignments = [
        *SMALL,
        f"corpus.sources={five_documents}",
        *more,
        "training.steps=8",
        "training.num_samples=0",
    ]
    run = train(load_recipe(None, [*assignments, "training.num_validations=0"]), tmp_path / "run")
    accelerate_loop().main(str(run.recipe), str(tmp_path / "loop"))
    loop = RunFolder.open(tmp_path / "loop")
    assert losses(loop) == losses(run)
    mine, theirs = (load_file(folder.model / "model.safetensors") for folder in (loop, run))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())


@pytest.mark.slow
def test_the_accelerate_loop_by_two_processes(five_documents, tmp_path):
    run = train(load_recipe(None, [*SMALL, f"corpus.sources={five_documents}", *LAST_ROWS]), tmp_path / "run")
    loop = str(ROOT / "recipes" / "train_loop.py")
    done = start([loop, str(run.recipe), str(tmp_path / "loop")])
    out, err = done.communicate(timeout=TIMEOUT_S)
    assert out == "(0, None)\n", err[-3000:]
    curves = losses(RunFolder.open(tmp_path / "loop")), losses(run)
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-5


def test_muon_is_refused_under_fsdp(text_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    recipe = load_recipe(None, [*SMALL, f"corpus.sources={text_folder}", "training.optimizer=muon"])
    with pytest.raises(UserError, match=r"muon needs whole matrices, .* --set training\.optimizer=adamw"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def training_for_long(text, folder) -> tuple[subprocess.Popen, list]:
    """A run of two processes that has made a step, and its processes."""
    import psutil

    run = subprocess.Popen(
        [sys.executable, *command(text, folder, "--steps", "1000000")], env=environment(), text=True,
        stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    log = folder / "log.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
    while not (log.exists() and '"step"' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    workers = psutil.Process(run.pid).children()
    assert len(workers) == 2
    return run, workers


def messages(stderr: str) -> list[str]:
    """The messages to the user; there is no traceback beside them."""
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("hf-genlm:")]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_within_a_minute(text_folder, tmp_path, victim):
    run, workers = training_for_long(text_folder, tmp_path / "run")
    (killed,) = [worker for worker in workers if worker.environ()["RANK"] == str(victim)]
    began = time.monotonic()
    killed.kill()
    _, err = run.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert run.returncode == 1
    assert messages(err) == [f"hf-genlm: process {victim} was ended by SIGKILL, and the others were stopped"]
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_every_process(text_folder, tmp_path, number):
    run, workers = training_for_long(text_folder, tmp_path / "run")
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 0
    assert messages(err) == []
    assert err.splitlines()[-1] == f"hf-genlm train --resume --out {tmp_path / 'run'}"
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_write_a_checkpoint_and_end(text_folder, tmp_path):
    psutil = pytest.importorskip("psutil")
    run, workers = training_for_long(text_folder, tmp_path / "run")
    run.kill()
    _, err = run.communicate(timeout=60)
    _, left = psutil.wait_procs(workers, timeout=60)
    assert left == []
    assert messages(err) == []
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_user_error_ends_all_processes_with_one_line(text_folder, tmp_path):
    """An error that only the first process finds, and one that every process finds."""
    for more, message in (
        (["--set", "tokenizer.path=/nowhere"], "/nowhere"),
        (["--set", "training.batch_size=9"], "training.batch_size = 9 counts the rows over all processes"),
    ):
        done = subprocess.run(
            [sys.executable, *command(text_folder, tmp_path / "run", *more)], env=environment(),
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        (line,) = messages(done.stderr)
        assert message in line
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_follow_one_clock(text_folder, tmp_path):
    """A run with a time budget: planned once, and ended by all processes after the same step."""
    words = command(text_folder, tmp_path / "run", "--minutes", "0.1", "--set", "training.steps=null")
    done = subprocess.run([sys.executable, *words], env=environment(), timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0
    log = RunFolder.open(tmp_path / "run").read_log()
    (planned,) = [event for event in log if event["event"] == "planned"]
    (trained,) = [event for event in log if event["event"] == "trained"]
    assert planned["threads"] == 1
    assert trained["seconds"] + planned["seconds"] == pytest.approx(6.0, abs=1.5)
