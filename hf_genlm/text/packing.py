"""Documents end to end in rows of one length: what the trainer sees."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.text.tokenizer import TokenizedDocuments

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label that cross-entropy leaves out


def position_ids_of(row: np.ndarray, eos_id: int) -> np.ndarray:
    """Positions (T,) int64 within documents of a row (T,): 0 at its start and at every end-of-text token."""
    steps = np.arange(len(row), dtype=np.int64)
    starts = np.where(row == eos_id, steps, 0)
    return steps - np.maximum.accumulate(starts)


class PackedRows:
    """Rows of `row_length` tokens over the stream `eos d1 eos d2 ... eos dn eos`, a map-style dataset.

    Row i is stream[i * (T - 1) : i * (T - 1) + T] with T = row_length: neighbours share the one token that
    the second only reads, so every token but the first of the stream is a label exactly once (models shift
    the labels inside). The last row is filled up with `pad_id`, labelled -100.

    An item holds `input_ids`, `position_ids` and `labels`, each (T,) int64. No attention mask: with none,
    transformers finds the documents of a row by their positions.
    """

    def __init__(self, documents: TokenizedDocuments, row_length: int, eos_id: int, pad_id: int):
        """
        Raises:
            UserError: the stream is shorter than one row, or a row shorter than two tokens.
        """
        if row_length < 2:
            raise UserError(
                f"training.row_length = {row_length}: a row needs at least 2 tokens, one to read and one to "
                "predict"
            )
        self.row_length = row_length
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.stream = _stream(documents, eos_id)
        if len(self.stream) < row_length:
            raise UserError(
                f"training.row_length = {row_length}: the text has only {len(self.stream)} tokens, less "
                "than one row; "
                f"give more text, or --set training.row_length={max(2, len(self.stream) // 4)}"
            )

    @property
    def n_targets(self) -> int:
        """Labels trained on in one epoch."""
        return len(self.stream) - 1

    def __len__(self) -> int:
        return -(-self.n_targets // (self.row_length - 1))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = range(len(self))[index]
        start = index * (self.row_length - 1)
        tokens = self.stream[start : start + self.row_length]
        input_ids = np.full(self.row_length, self.pad_id, dtype=np.int64)
        input_ids[: len(tokens)] = tokens
        labels = input_ids.copy()
        labels[len(tokens) :] = IGNORED
        return {
            "input_ids": input_ids,
            "position_ids": position_ids_of(input_ids, self.eos_id),
            "labels": labels,
        }


def collate(items: Sequence[dict[str, np.ndarray]]) -> "dict[str, torch.Tensor]":
    """Items of `PackedRows` as one batch: each value (B, T) int64."""
    import torch

    return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}


def _stream(documents: TokenizedDocuments, eos_id: int) -> np.ndarray:
    """`eos d1 eos d2 ... eos dn eos`, of the type of the documents' ids."""
    stream = np.empty(documents.n_tokens + len(documents) + 1, dtype=documents.ids.dtype)
    is_token = np.ones(len(stream), dtype=bool)
    is_token[documents.offsets + np.arange(len(documents) + 1)] = False
    stream[~is_token] = eos_id
    stream[is_token] = documents.ids
    return stream
