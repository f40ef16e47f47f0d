"""A run as Python users see it: its measurements, model, tokenizer, curves, samples and card."""

import base64
import html
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hf_genlm.config.recipe import Recipe, load_recipe
from hf_genlm.files import read_bytes, read_text
from hf_genlm.loading import load
from hf_genlm.run_folder import RunFolder

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
