"""Run an exported graph by onnxruntime, token by token, without torch and transformers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_NUM_SLOTS = 64  # initial slots of layers that attend to all earlier tokens; doubled when they are full


class OnnxRunner:
    """An exported model and its state after the tokens read so far.

    Args:
        folder: an export of `hf-genlm export --to onnx`.
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
        """Begin a new text: set the state to zeros."""
        self.n_tokens, self.n_slots = 0, _NUM_SLOTS
        self.state = {
            part["input"]: np.zeros(self._shape(part), dtype=part["dtype"])
            for part in self.description["state"]
        }

    def read(self, token: int) -> np.ndarray:
        """Read a token; returns the logits (V,) of the next one.

        Raises:
            ValueError: the text would exceed the positions of the model.
            IndexError: `token` is not an id of the vocabulary.
        """
        vocab_size = self.description["logits"]["shape"][1]
        if not 0 <= token < vocab_size:
            raise IndexError(f"token {token} is out of range: the model has {vocab_size} tokens")
        max_tokens = self.description["max_tokens"]
        if max_tokens is not None and self.n_tokens == max_tokens:
            raise ValueError(f"the model has positions for {max_tokens} tokens")
        if self.n_tokens == self.n_slots:
            self._grow()
        before = np.array([self.n_tokens], dtype=np.int64)
        inputs = {"token": np.array([[token]], dtype=np.int64), "n_before": before, **self.state}
        logits, *state = self.session.run(None, inputs)
        self.state = dict(zip(self.state, state, strict=True))
        self.n_tokens += 1
        return logits[0]

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Decode greedily after `prompt` up to an end-of-text token.

        Raises:
            ValueError: `prompt` is empty.
        """
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
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
