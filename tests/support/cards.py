"""Helpers shared by tests: cards."""

import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from hf_genlm.config.recipe import Recipe
from hf_genlm.evaluation.measurement import Measurement, write_measurements
from hf_genlm.files import write_json
from hf_genlm.run_folder import RunFolder, describe_environment
from hf_genlm.run_schemas import CorpusFile

MEASURED = [
    Measurement("nats_per_token", 3.2171234, "nats/token", 41234, 0.0123456, "validation", False),
    Measurement("perplexity", 24.956, "1", 41234, 0.31, "validation", False),
    Measurement(
        "bits_per_byte", 1.7345678, "bits/byte", 98765, 0.0066, "validation", False, (1.72111, 1.7477)
    ),
    Measurement("top1_accuracy", 0.3456789, "fraction", 41234, 0.0021, "validation", True),
    Measurement("top5_accuracy", 0.5678912, "fraction", 41234, None, "validation", True),
]


SHAPES = {
    "model.embed_tokens.weight": (50, 6),
    "model.embed_proj.weight": (8, 6),
    "model.layers.0.mixer.in_proj.weight": (32, 8),
    "model.layers.0.mixer.in_proj.bias": (32,),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.0.mixer_norm.weight": (8,),
    "model.layers.1.mixer.q_proj.weight": (8, 8),
    "model.layers.1.mlp_norm.weight": (8,),
    "model.norm.weight": (8,),
}


def make_run(path: Path, *, files=None, samples="", recipe=None, corpus=None, name="run") -> RunFolder:
    """A finished run, its files as the verbs write them."""
    run = RunFolder.create(path / name)
    recipe = recipe or Recipe()
    recipe.model.mixers = ["lstm", "full_attention"]
    recipe.training.max_seq_length, recipe.training.batch_size = 64, 16
    run.recipe.write_text(recipe.to_yaml(), encoding="utf-8")
    write_json(run.environment, {**describe_environment(), "device": "cpu"})
    report = {
        "sources": ["texts"],
        "description": "2 files: a.txt, b.txt",
        "files": files or [{"name": "a.txt", "bytes": 1000, "sha256": "ab" * 32, "documents": 3}],
        "encoding": "utf-8",
        "split": {"method": "documents", "seed": 0, "fraction": 0.05},
        "duplicates_removed": 13,
        "empty_skipped": 2,
        "files_skipped": 1,
        "train": {"documents": 30, "bytes": 2345678, "characters": 9, "sha256": "cd" * 32, "tokens": 876543},
        "validation": {"documents": 4, "bytes": 98765, "characters": 9, "sha256": "ef" * 32, "tokens": 41234},
    }
    write_json(run.corpus, {**report, **(corpus or {})}, CorpusFile)
    run.log("step", step=1, loss=5.0, learning_rate=1e-3, tokens=64, tokens_per_s=100.0, elapsed_s=0.6)
    run.log("trained", steps=321, tokens=1753086, seconds=123.46, tokens_per_s=14200)
    write_measurements(run.evaluation, MEASURED)
    if samples:
        run.samples.write_text(samples, encoding="utf-8")
    run.model.mkdir()
    config = {
        "model_type": "genlm",
        "mixer_types": ["lstm", "full_attention"],
        "hidden_size": 8,
        "vocab_size": 50,
        "max_position_embeddings": 64,
    }
    write_json(run.model / "config.json", config)
    save_file(
        {key: np.zeros(shape, np.float32) for key, shape in SHAPES.items()}, run.model / "model.safetensors"
    )
    return run


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables as rows of cells, read as GitHub does: split at every unescaped pipe."""
    found, rows, inside = [], [], False
    for line in [*text.split("\n"), ""]:
        inside ^= bool(re.match(r"`{3,}", line))
        if line.startswith("|") and not inside:
            cells = re.findall(r"(?:\\.|[^|\\])*", line.strip().strip("|"))
            rows.append([cell.strip() for cell in cells if cell])
        elif rows:
            found.append(rows)
            rows = []
    return found
