"""A list of the runs, models and comparisons below a folder."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_genlm.config.recipe import load_recipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import Measurement, read_measurements
from hf_genlm.files import read, read_json, read_tensor_sizes
from hf_genlm.run_folder import RunFolder
from hf_genlm.run_schemas import AnyModelConfigFile, FinishedFile


@dataclass(frozen=True)
class RunSummary:
    """One line of the list. `parameters` and `bits` are None where nothing states them yet."""

    path: str
    kind: str  # run, model or comparison
    decoder: str
    parameters: int | None
    bits: Measurement | None  # bits per byte of the validation text
    state: str  # done, training, stopped after a step, interrupted, or what is wrong with a file


def list_runs(folder: str | Path) -> list[RunSummary]:
    """Find runs, models and comparisons in `folder` and below, in the order of their paths.

    The files inside a run or a model folder are not searched; the runs of a comparison are.

    Raises:
        UserError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{str(folder)!r} is not a folder: name one that holds runs")
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        path = Path(parent)
        if "recipe.yaml" in files and "log.jsonl" in files:
            found.append(_summarize(path, "run"))
            folders.clear()
        elif "compare.yaml" in files:
            found.append(_summarize(path, "comparison"))
        elif "config.json" in files and any(name.endswith(".safetensors") for name in files):
            found.append(_summarize(path, "model"))
            folders.clear()
    return found


def _summarize(path: Path, kind: str) -> RunSummary:
    try:
        facts = {"run": _run_facts, "comparison": _comparison_facts, "model": _model_facts}[kind](path)
    except UserError as error:
        facts = {"state": str(error)}
    return RunSummary(
        **{"path": str(path), "kind": kind, "decoder": "", "parameters": None, "bits": None, "state": ""}
        | facts
    )


def _run_facts(path: Path) -> dict[str, Any]:
    run = RunFolder(path)
    model = load_recipe(run.recipe).model
    events = run.read_log()
    sizes = [event["parameters"] for event in events if event["event"] == "model"]
    bits = None
    if run.evaluation.is_file():
        measured = {m.name: m for m in read_measurements(run.evaluation) if m.split == "validation"}
        bits = measured.get("bits_per_byte")
        state = "done"
    elif run.is_locked():
        state = "training"
    elif events and events[-1]["event"] == "stopped":
        state = f"stopped after step {events[-1]['step']:,}"
    else:
        state = "interrupted"
    mixers = ", ".join(f"{n} {mixer}" for mixer, n in Counter(model.mixers or ()).items())
    return {
        "decoder": mixers or model.decoder,
        "parameters": sizes[-1] if sizes else None,
        "bits": bits,
        "state": state,
    }


def _comparison_facts(path: Path) -> dict[str, Any]:
    finished = path / "finished.json"
    n_finished = len(read_json(finished, FinishedFile)) if finished.is_file() else 0
    is_done = (path / "comparison.json").is_file()
    return {"state": f"{'done' if is_done else 'interrupted'}, {n_finished} runs finished"}


def _model_facts(path: Path) -> dict[str, Any]:
    config = read(path / "config.json", AnyModelConfigFile)
    mixers = Counter(config.mixer_types or ())
    decoder = ", ".join(f"{n} {mixer}" for mixer, n in mixers.items()) or str(config.model_type)
    return {
        "decoder": decoder,
        "parameters": sum(sum(read_tensor_sizes(file).values()) for file in path.glob("*.safetensors")),
        "state": "done",
    }
