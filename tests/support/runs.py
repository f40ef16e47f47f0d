"""Helpers shared by tests: runs."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest

from hf_genlm.config.recipe import Recipe, load_recipe

SMALL = [
    "tokenizer.vocab_size=400",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "training.max_seq_length=32",
    "training.batch_size=8",
    "training.logging_steps=1",
    "training.num_samples=0",
    "training.steps=30",
    "training.num_validations=1",
]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """Forty documents of the reference that CPython brings."""
    return write_documents(40, tmp_path_factory.mktemp("text"))


def write_documents(n: int, folder: Path) -> Path:
    for name, text in sorted(topics.items())[:n]:
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def small_recipe(text_folder, *assignments: str) -> Recipe:
    return load_recipe(None, [*SMALL, f"corpus.sources={text_folder}", *assignments])


def losses(run) -> list[float]:
    return [event["loss"] for event in run.read_log() if event["event"] == "step"]
