"""Helpers shared by tests: launching."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from support.runs import SMALL, losses
from support.trackers import scalars_of

from hf_genlm.config.recipe import load_recipe
from hf_genlm.run_folder import RunFolder
from hf_genlm.training.train import train

ROOT = Path(__file__).parents[2]


TIMEOUT_S = 300


def environment(**more: str) -> dict[str, str]:
    """Return environment variables for one thread in each process and imports of package and tests."""
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]  # "": the folder
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **more}


START = """
import sys
import hf_genlm.cli  # torch's launcher alone, not our model
from hf_genlm.cli.launch import launch
print(launch(sys.argv[2:], int(sys.argv[1])), flush=True)
"""


def start(command: list[str], n: int = 2) -> subprocess.Popen:
    """Start a process that runs `launch(command, n)` and prints its result."""
    return subprocess.Popen(
        [sys.executable, "-c", START, str(n), *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment(),
    )  # fmt: skip


TRAINED = {False: ["DistributedDataParallel", "Parameter"], True: ["FSDPGenLMForCausalLM", "DTensor"]}


def compare_with_one(jobs, folder) -> None:
    """Run each job by two processes and by one: the same losses, and the same weights up to rounding."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    done = start([str(ROOT / "tests" / "support" / "several.py"), str(folder / "jobs.json")])
    out, err = done.communicate(timeout=TIMEOUT_S)
    assert out == "done\n(0, None)\n", err[-3000:]
    wanted = [TRAINED[job["sharded"]] for job in jobs]
    for process in (0, 1):
        lines = (folder / f"trained-{process}.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]  # several of each job
        assert [kind for kind, _ in itertools.groupby(found)] == [
            kind for kind, _ in itertools.groupby(wanted)
        ]
    for job in jobs:
        several_run = RunFolder.open(folder / job["name"])
        # by one thread, as each of the two: by more, sums round otherwise, and 50 steps make much of it
        assignments = [*job["assignments"], "training.num_threads=1"]
        one = train(load_recipe(None, assignments), folder / (job["name"] + "-one"))
        curves = losses(several_run), losses(one)
        assert len(curves[0]) == len(curves[1]) == load_recipe(one.recipe).training.steps
        assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-5, (job["name"], curves)
        assert not several_run.shared.exists()
        assert several_run.corpus.read_text() == one.corpus.read_text()
        folders = [sorted([run.model, *run.milestones.glob("*")]) for run in (several_run, one)]
        for mine, theirs in zip(*folders, strict=True):
            assert mine.name == theirs.name
            compare_weights(mine, theirs)
        scalars = [scalars_of(run.tensorboard) for run in (several_run, one) if run.tensorboard.is_dir()]
        for mine, theirs in zip(scalars[::2], scalars[1::2], strict=True):
            assert mine.keys() == theirs.keys()
            assert list(mine["train/loss"]) == [*range(1, len(curves[0]) + 1)]
        assert json.loads(several_run.environment.read_text())["processes"] == 2


def compare_weights(folder, other) -> None:
    mine, theirs = (load_file(each / "model.safetensors") for each in (folder, other))
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, atol=2e-3, rtol=0.0)


SHORT = ["training.steps=8", "training.num_validations=1"]


def command(text, folder, *more: str) -> list[str]:
    """Return the arguments of a small run by two processes."""
    settings = [word for assignment in SMALL for word in ("--set", assignment)]
    return ["-m", "hf_genlm", "train", str(text), *settings, "--out", str(folder), "--processes", "2", *more]
