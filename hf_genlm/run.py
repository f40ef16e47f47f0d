"""A run as people see it, with measurements, model, curves, samples and card; and the list of all runs."""

import base64
import html
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_genlm.config.recipe import Recipe, load_recipe
from hf_genlm.errors import UserError
from hf_genlm.files import read, read_bytes, read_json, read_tensor_sizes, read_text
from hf_genlm.loading import load
from hf_genlm.run_folder import RunFolder
from hf_genlm.run_schemas import AnyModelConfigFile, FinishedFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_genlm.evaluation.measurement import Measurement
    from hf_genlm.report.curves import Curves


class Run:
    """A run folder that `train` has written, finished or not: its numbers, model, curves, samples and card.

    A `Run` stands wherever a function takes a model or a folder.
    """

    def __init__(self, path: "str | os.PathLike[str]"):
        """Open the run folder at `path`.

        Raises:
            UserError: there is no run folder.
        """
        self.folder = RunFolder.open(Path(path))
        self.path = self.folder.path

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return os.fspath(self.path)

    def __repr__(self) -> str:
        bits = self.metrics.get("bits_per_byte")
        return f"Run({os.fspath(self.path)!r}{'' if bits is None else f', {bits.value:.4f} bits per byte'})"

    @property
    def recipe(self) -> Recipe:
        """The complete recipe, with every size, rate and length that was chosen for this run."""
        return load_recipe(self.folder.recipe)

    @property
    def metrics(self) -> "dict[str, Measurement]":
        """Measurements by name, such as "bits_per_byte"; the validation text comes before other text."""
        from hf_genlm.evaluation.measurement import read_measurements

        if not self.folder.evaluation.is_file():
            return {}
        measured = read_measurements(self.folder.evaluation)
        return {m.name: m for m in sorted(measured, key=lambda m: m.split == "validation")}

    def load_model(self) -> "PreTrainedModel":
        """Load the model in eval mode, on the GPU if there is one."""
        return load(self.path)[0]

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder.tokenizer, trust_remote_code=False)

    def curves(self) -> "Curves":
        """Read loss, bits per byte, learning rate, gradient norm and speed over the steps from the log."""
        from hf_genlm.report.curves import read_curves

        return read_curves(self.folder, self.path.name)

    @property
    def samples(self) -> list[str]:
        """The texts that the finished model generated."""
        from hf_genlm.report.document import fenced_blocks

        if not self.folder.samples.is_file():
            return []
        return fenced_blocks(read_text(self.folder.samples))

    @property
    def card(self) -> str:
        """The model card, as Markdown."""
        card = self.folder.model / "README.md"
        return read_text(card) if card.is_file() else ""

    def _repr_html_(self) -> str:
        """Show the measurements and the curves in a notebook."""
        from hf_genlm.evaluation.measurement import tabulate

        table = ""
        for head, rows in tabulate(list(self.metrics.values())):
            lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
            names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
            table += f"<table><tr>{names}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
        picture = self.path / "plots" / "curves.png"
        image = ""
        if picture.is_file():
            content = base64.b64encode(read_bytes(picture)).decode("ascii")
            image = f'<img alt="training curves" src="data:image/png;base64,{content}">'
        name = html.escape(os.fspath(self.path))
        return f"<b>{name}</b>{table}{image}"


@dataclass(frozen=True)
class RunSummary:
    """One line of the list. `parameters` and `bits` are None where nothing states them yet."""

    path: str
    kind: str  # run, model or comparison
    decoder: str
    parameters: int | None
    bits: "Measurement | None"  # bits per byte of the validation text
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
    from hf_genlm.evaluation.measurement import read_measurements

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
