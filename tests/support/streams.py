"""Texts, files and recipes for tests of streams."""

import json
import random

import pyarrow as pa
from pyarrow import parquet

from hf_genlm.config.recipe import CorpusRecipe

WORDS = [
    "time",
    "river",
    "house",
    "Ärger",
    "北京",
    "def f(x):\n    return x",
    "1984",
    "...",
    "the",
    "of",
    "ox",
]


def text_of(seed: int, n_words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def write_jsonl(path, seeds, n_words: int = 30) -> None:
    lines = [json.dumps({"text": text_of(seed, 1 + seed % n_words), "id": seed}) for seed in seeds]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_files_of_every_kind(folder) -> None:
    """Write empty records too, and one text that is read and encoded in several parts."""
    write_jsonl(folder / "a.jsonl", range(60))
    (folder / "b.txt").write_text("\n".join(text_of(seed, 9) for seed in range(24_000)), encoding="utf-8")
    (folder / "c.txt").write_text("", encoding="utf-8")
    values = [text_of(seed, 5) if seed % 3 else None for seed in range(100, 140)]
    parquet.write_table(pa.table({"text": values}), folder / "d.parquet")
    (folder / "e.md").write_text(text_of(7, 50), encoding="utf-8")


def lanes(folder) -> CorpusRecipe:
    """Recipe that mixes three sources, one of them far shorter."""
    for name, seeds in (("one", range(50)), ("two", range(200, 210)), ("three", range(300, 340))):
        write_jsonl(folder / f"{name}.jsonl", seeds)
    sources = [str(folder / f"{name}.jsonl") for name in ("one", "two", "three")]
    return CorpusRecipe(sources=sources, weights=[1.0, 0.5, 2.5])
