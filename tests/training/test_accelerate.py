"""Promise: `accelerate launch` with a configuration of recipes/accelerate trains what one process would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import several
from support.launching import ROOT, SHORT, TIMEOUT_S, environment
from support.runs import SMALL, losses

from hf_genlm.config.recipe import load_recipe
from hf_genlm.run_folder import RunFolder
from hf_genlm.training.train import train

CONFIGS = {
    "one_gpu": (False, False, False, 1),
    "gpus": (True, False, False, 8),
    "cpu": (True, False, False, 2),
    "fsdp2": (False, True, False, 8),
    "fsdp2_cpu": (False, True, False, 2),
    "deepspeed_zero2": (False, False, True, 8),
    "deepspeed_zero3": (False, False, True, 8),
    "two_machines": (True, False, False, 16),
}


def launch_arguments(name: str):
    """As `accelerate launch` reads them."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    file = str(ROOT / "recipes" / "accelerate" / f"{name}.yaml")
    words = ["--config_file", file, "-m", "hf_genlm", "train", "text/", "--out", "run"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return arguments


def test_accelerate_reads_every_configuration(monkeypatch):
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    files = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
    assert [file.stem for file in files] == sorted(CONFIGS)
    for file in files:
        arguments = launch_arguments(file.stem)
        found = arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed, arguments.num_processes
        assert tuple(map(bool, found[:3])) + found[3:] == CONFIGS[file.stem], file
        assert arguments.use_cpu == ("cpu" in file.stem)
        assert f"--config_file recipes/accelerate/{file.name} " in file.read_text(encoding="utf-8")
        if arguments.use_deepspeed:
            arguments.deepspeed_fields_from_accelerate_config = "zero_stage"
            _, variables = prepare_deepspeed_cmd_env(arguments)
            assert variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == file.stem[-1]
        elif arguments.multi_gpu or arguments.use_fsdp:
            variables = prepare_multi_gpu_env(arguments)
            if arguments.use_fsdp:
                assert several.SHARDED.items() <= variables.items()


def launched(config: str, *words: str, **more: str) -> subprocess.Popen:
    """What `accelerate launch` starts with a configuration of ours."""
    file = str(ROOT / "recipes" / "accelerate" / f"{config}.yaml")
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**more),
    )  # fmt: skip


@pytest.mark.slow
def test_two_launchers_train_the_model_of_one_process(text_folder, tmp_path):
    """As on two machines."""
    settings = [*SMALL, f"corpus.sources={text_folder}", *SHORT, "training.num_threads=1"]
    one = train(load_recipe(None, settings), tmp_path / "one")
    jobs = [{"name": "several", "sharded": False, "assignments": settings}]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    group = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    group += ["--main_process_port", "29517"]
    body = [str(ROOT / "tests" / "support" / "several.py"), str(tmp_path / "jobs.json")]
    machines = [
        launched("cpu", *group, "--main_process_ip", "127.0.0.1", "--machine_rank", rank, *body)
        for rank in ("0", "1")
    ]
    for machine in machines:
        _, err = machine.communicate(timeout=TIMEOUT_S)
        assert machine.returncode == 0, err[-3000:]
    curves = losses(RunFolder.open(tmp_path / "several")), losses(one)
    assert len(curves[0]) == len(curves[1]) == 8
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-5


def run_by_deepspeed(stage: int, folder: Path, **job) -> int:
    """One process, which accelerate gives to DeepSpeed without a GPU too."""
    (folder / "jobs.json").write_text(json.dumps([{"sharded": False, **job}]), encoding="utf-8")
    more = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
    body = [str(ROOT / "tests" / "support" / "several.py"), str(folder / "jobs.json")]
    run = launched(f"deepspeed_zero{stage}", "--num_processes", "1", *body, **more)
    run.communicate(timeout=TIMEOUT_S)
    return run.returncode


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_the_same(text_folder, tmp_path, stage):
    """With a validation and a checkpoint; a run killed there and resumed reaches the same weights."""
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    settings = [*SMALL, f"corpus.sources={text_folder}", *SHORT, "training.save_steps=4"]
    one = train(load_recipe(None, settings), tmp_path / "one")
    assert run_by_deepspeed(stage, tmp_path, name="whole", assignments=settings) == 0
    whole = RunFolder.open(tmp_path / "whole")
    (trained, *_) = (tmp_path / "trained-0.jsonl").read_text().splitlines()
    assert json.loads(trained)[0] == "DeepSpeedEngine"
    curves = losses(whole), losses(one)
    assert len(curves[0]) == len(curves[1]) == 8
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-5
    assert [event["step"] for event in whole.read_log() if event["event"] == "checkpoint"] == [4]
    assert run_by_deepspeed(stage, tmp_path, name="parts", assignments=settings, ends_at=4) != 0
    assert run_by_deepspeed(stage, tmp_path, name="parts", assignments=settings, resumes=True) == 0
    parts = RunFolder.open(tmp_path / "parts")
    assert [event["step"] for event in parts.read_log() if event["event"] == "resumed"] == [4]
    weights = [(run.model / "model.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1]
