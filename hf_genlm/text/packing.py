"""Documents end to end in rows of one length: what the trainer sees."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.text.encoding import TokenizedDocuments

if TYPE_CHECKING:
    import torch

_ROWS_AT_ONCE = 8192  # where more are read than a batch holds
_ROWS_IN_MEMORY = 1024  # each keeps the 64 KiB around it of a file of ids
IGNORED = -100  # the label that cross-entropy leaves out


def position_ids_of(rows: np.ndarray, eos_id: int, first: int = 0) -> np.ndarray:
    """Positions (..., T) int64 within documents of rows (..., T): 0 at every end-of-text token, and `first`
    where a row begins in mid-document."""
    steps = np.arange(rows.shape[-1], dtype=np.int64)
    starts = np.where(rows == eos_id, steps, -first)
    return steps - np.maximum.accumulate(starts, axis=-1)


class PackedRows:
    """Rows of `max_seq_length` tokens over the stream `eos d1 eos d2 ... eos dn eos`, a map-style dataset.

    Row i is stream[i * (T - 1) : i * (T - 1) + T] with T = max_seq_length: neighbours share the one token
    that the second only reads, so every token but the first of the stream is a label exactly once (models
    shift the labels inside). The last row is filled up with `pad_id`, labelled -100.

    An item holds `input_ids`, `position_ids` and `labels`, each (T,) int64. No attention mask: with none,
    transformers finds the documents of a row by their positions. With `goes_on`, for models that carry a
    state from row to row, position 0 means the start of a document alone: other rows begin at position 1.

    The stream is never built: a row is found in the ids of the documents, which may lie on disk, when it is
    asked for. A DataLoader asks for a whole batch at once.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        max_seq_length: int,
        eos_id: int,
        pad_id: int,
        goes_on: bool = False,
    ):
        """
        Raises:
            UserError: the stream is shorter than one row, or a row shorter than two tokens.
        """
        if max_seq_length < 2:
            raise UserError(
                f"training.max_seq_length = {max_seq_length}: a row needs at least 2 tokens, one to "
                "read and one to predict"
            )
        self.max_seq_length = max_seq_length
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.goes_on = goes_on
        self.documents = documents
        self._n_fetched = 0  # rows since the memory of the ids was given back
        # where the end-of-text tokens stand in the stream (n + 1,)
        self._eos_at = documents.offsets + np.arange(len(documents) + 1)
        self._length = documents.n_tokens + len(documents) + 1
        if self._length < max_seq_length:
            raise UserError(
                f"training.max_seq_length = {max_seq_length}: the text has only {self._length} tokens, less "
                "than one row; "
                f"give more text, or --set training.max_seq_length={max(2, self._length // 4)}"
            )

    @property
    def n_targets(self) -> int:
        """Labels trained on in one epoch."""
        return self._length - 1

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return -(-self.n_targets // (self.max_seq_length - 1))

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """A whole batch: each value (B, T) int64."""
        chosen = range(len(self))
        starts_B = np.array([chosen[index] for index in indices], dtype=np.int64) * (self.max_seq_length - 1)
        input_ids_BT, n_tokens_B = self._stream_at(starts_B)
        is_padding_BT = np.arange(self.max_seq_length) >= n_tokens_B[:, None]
        input_ids_BT[is_padding_BT] = self.pad_id
        return {
            "input_ids": input_ids_BT,
            "position_ids": position_ids_of(input_ids_BT, self.eos_id, first=int(self.goes_on)),
            "labels": np.where(is_padding_BT, IGNORED, input_ids_BT),
        }

    def first_tokens(self, count: int) -> np.ndarray:
        """The beginning of the stream, at most `count` tokens, its very last one left out."""
        width = self.max_seq_length - 1
        n_rows = min(len(self), -(-count // width))
        parts = [
            self._stream_at(np.arange(row, min(row + _ROWS_AT_ONCE, n_rows), dtype=np.int64) * width)[0]
            for row in range(0, n_rows, _ROWS_AT_ONCE)
        ]
        stream = np.concatenate([part[:, :-1].ravel().astype(self.documents.ids.dtype) for part in parts])
        return stream[: min(count, self.n_targets)]

    def _stream_at(self, starts_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The stream from each start on, (B, T) int64, and how many of these tokens it has, (B,)."""
        stops_B = np.minimum(starts_B + self.max_seq_length, self._length)
        # the end-of-text tokens of each row, as one list over all rows
        first_B = np.searchsorted(self._eos_at, starts_B)
        n_eos_B = np.searchsorted(self._eos_at, stops_B) - first_B
        row_N = np.repeat(np.arange(len(starts_B)), n_eos_B)
        nth_N = np.arange(len(row_N)) - np.repeat(np.cumsum(n_eos_B) - n_eos_B, n_eos_B)
        is_eos_BT = np.zeros((len(starts_B), self.max_seq_length), dtype=bool)
        is_eos_BT[row_N, self._eos_at[first_B[row_N] + nth_N] - starts_B[row_N]] = True
        # all tokens before this one that are of documents
        index_BT = (starts_B - first_B)[:, None] + np.cumsum(~is_eos_BT, axis=1) - 1
        tokens_BT = self.documents.take(index_BT).astype(np.int64)
        self._n_fetched += len(starts_B)
        if self._n_fetched >= _ROWS_IN_MEMORY:
            self.documents.release()
            self._n_fetched = 0
        tokens_BT[is_eos_BT] = self.eos_id
        return tokens_BT, stops_B - starts_B


def collate(rows: "dict[str, np.ndarray] | Sequence[dict[str, np.ndarray]]") -> "dict[str, torch.Tensor]":
    """Items of `PackedRows`, or a batch of them, as tensors: each value (B, T) int64."""
    import torch

    if not isinstance(rows, dict):
        rows = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return {key: torch.from_numpy(value) for key, value in rows.items()}
