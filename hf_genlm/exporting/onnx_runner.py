"""Runs an exported graph by onnxruntime, token by token; needs neither torch nor transformers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_SLOTS = 64  # at first, of layers that see all earlier tokens; twice as many whenever they are full


class OnnxRunner:
    """A text of one row, and the state after it.

    Args:
        folder: what `hf-genlm export --to onnx` wrote.
    """

    def __init__(self, folder: str | Path):
        import onnxruntime

        folder = Path(folder)
        self.description: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.session = onnxruntime.InferenceSession(
            str(folder / self.description["graph"]), providers=["CPUExecutionProvider"]
        )
        self.reset()

    def reset(self) -> None:
        """Begin a text."""
        self.n_tokens, self.n_slots = 0, _SLOTS
        self.state = {
            part["input"]: np.zeros(self._shape(part), dtype=part["dtype"])
            for part in self.description["state"]
        }

    def read(self, token: int) -> np.ndarray:
        """Logits (V,) of what follows the text so far and `token`.

        Raises:
            ValueError: the text would be longer than the model has positions.
        """
        most = self.description["most_tokens"]
        if most is not None and self.n_tokens == most:
            raise ValueError(f"the model has positions for {most} tokens")
        if self.n_tokens == self.n_slots:
            self._grow()
        before = np.array([self.n_tokens], dtype=np.int64)
        inputs = {"token": np.array([[token]], dtype=np.int64), "n_before": before, **self.state}
        logits, *state = self.session.run(None, inputs)
        self.state = dict(zip(self.state, state, strict=True))
        self.n_tokens += 1
        return logits[0]

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """The likeliest tokens after `prompt`, at least one token, up to the end of the text."""
        self.reset()
        for token in prompt:
            logits = self.read(token)
        new: list[int] = []
        while True:
            new.append(int(logits.argmax()))
            if len(new) == max_new_tokens or new[-1] in self.description["eos_token_ids"]:
                return new
            logits = self.read(new[-1])

    def _shape(self, part: dict[str, Any]) -> list[int]:
        return [self.n_slots if size == "slots" else size for size in part["shape"]]

    def _grow(self) -> None:
        self.n_slots *= 2
        for part in self.description["state"]:
            if "slots" in part["shape"]:
                larger = np.zeros(self._shape(part), dtype=part["dtype"])
                kept = self.state[part["input"]]
                larger[: len(kept)] = kept
                self.state[part["input"]] = larger
