"""Promise: the notebooks run from the first cell to the last, in short form here, with equal measures."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "recipes" / "notebooks"
TIME = "MINUTES = 0.4"
# what a reader of three-models.ipynb would compare
FIGURES = """
import json

n = {name: m.n for name, m in runs["lstm"].metrics.items()}
n_tokens = sum(len(encode(text)) - 1 for text in held_out)
sums = [sum(counts[3].probability(t, c) for t in range(len(tokenizer))) for c in [(), (5,), (300, 301)]]
print(json.dumps([results, n_tokens, n_bytes, n["nats_per_token"], n["bits_per_byte"], sums]))
"""


@pytest.fixture(autouse=True)
def no_backend(monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the command line, if called in this process, states one


def run(name: str, folder: Path, minutes: str) -> nbformat.NotebookNode:
    """Run a notebook in `folder`, with a last cell that prints its figures."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    changed = [cell for cell in notebook.cells if TIME in cell.source]
    assert len(changed) == 1
    changed[0].source = changed[0].source.replace(TIME, f"MINUTES = {minutes}")
    notebook.cells.append(nbformat.v4.new_code_cell(FIGURES))
    return nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()


def outputs(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """The outputs of one MIME type."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.data[kind] for output in shown if kind in output.get("data", {})]


def check(notebook: nbformat.NotebookNode) -> dict[str, float]:
    """Both pictures and the units are shown, and all models are measured on the same tokens and bytes."""
    assert len(outputs(notebook, "image/png")) == 2
    units = outputs(notebook, "text/html")[-1]
    assert units.count("unit ") == 3
    assert units.count("<span") > 300
    printed = "".join(o.text for o in notebook.cells[-1].outputs if o.get("name") == "stdout")
    results, n_tokens, n_bytes, scored_tokens, scored_bytes, sums = json.loads(printed)
    assert (n_tokens, n_bytes) == (scored_tokens, scored_bytes)
    assert sums == pytest.approx([1.0, 1.0, 1.0])
    assert set(results) == {f"counts {n}-gram" for n in (1, 2, 3)} | {"lstm", "transformer"}
    return results


def test_the_lesson_of_three_models_runs(tmp_path):
    results = check(run("three-models.ipynb", tmp_path, "0.03"))
    assert results["counts 3-gram"] < results["counts 2-gram"] < results["counts 1-gram"] < 8
    assert max(results["lstm"], results["transformer"]) < results["counts 1-gram"]


@pytest.mark.slow
def test_networks_predict_better_than_counts_in_the_time_of_the_lesson(tmp_path):
    results = check(run("three-models.ipynb", tmp_path, "0.4"))
    assert max(results["lstm"], results["transformer"]) < results["counts 3-gram"]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not [c for c in notebook.cells if c.get("outputs") or c.get("execution_count")]
