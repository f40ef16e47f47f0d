"""Training rows of one length: documents concatenated end to end, or a window of one document each.

Shapes: B rows of a batch, T tokens of a row (max_seq_length), k documents.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.text.encoding import TokenizedDocuments

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label that cross-entropy ignores
_ROWS_AT_ONCE = 8192  # built at once by `first_tokens`
_ROWS_IN_MEMORY = 1024  # each keeps 64 KiB of the mapped file of ids in memory


def position_ids_of(rows: np.ndarray, eos_id: int, first: int = 0) -> np.ndarray:
    """Positions (..., T) int64 of tokens of rows (..., T) in their documents: 0 at every end-of-text token,
    `first` at the start of a row that begins inside a document."""
    steps = np.arange(rows.shape[-1], dtype=np.int64)
    starts = np.where(rows == eos_id, steps, -first)
    return steps - np.maximum.accumulate(starts, axis=-1)


class PackedRows:
    """Rows of `max_seq_length` tokens over the stream `eos d1 eos d2 ... eos dn eos`, a map-style dataset.

    Row i is stream[i * (T - 1) : i * (T - 1) + T]: neighbours share one token, the last label of the first
    row, so every token but the first of the stream is a label exactly once (models shift the labels inside).
    The last row is padded with `pad_id`, labelled -100.

    An item holds `input_ids`, `position_ids` and `labels`, each (T,) int64; of a chat, what is no target is
    labelled -100, and the end-of-text tokens within it begin no document. There is no attention mask: without
    one, transformers finds the documents of a row by their positions. With `carries_state`, for
    models that carry a state from row to row, only the start of a document has position 0: a row that begins
    inside a document starts at position 1.

    The stream is never built: a row is gathered from the ids of the documents, which may lie on disk, when it
    is indexed. A DataLoader fetches a whole batch at once.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        max_seq_length: int,
        eos_id: int,
        pad_id: int,
        carries_state: bool = False,
    ):
        """
        Raises:
            UserError: the stream is shorter than one row, or a row is shorter than two tokens.
        """
        if max_seq_length < 2:
            raise UserError(
                f"training.max_seq_length = {max_seq_length}: a row needs at least 2 tokens, one to "
                "read and one to predict"
            )
        self.max_seq_length = max_seq_length
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.carries_state = carries_state
        self.documents = documents
        self._n_fetched = 0  # rows since the memory of the ids was released
        # positions of the end-of-text tokens in the stream (n + 1,)
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
        """Labels of one epoch."""
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
        input_ids_BT, n_tokens_B, is_eos_BT, is_target_BT = self._stream_at(starts_B)
        is_padding_BT = np.arange(self.max_seq_length) >= n_tokens_B[:, None]
        input_ids_BT[is_padding_BT] = self.pad_id
        return {
            "input_ids": input_ids_BT,
            "position_ids": position_ids_of(is_eos_BT, True, first=int(self.carries_state)),
            "labels": np.where(is_padding_BT | ~is_target_BT, IGNORED, input_ids_BT),
        }

    def first_tokens(self, count: int) -> np.ndarray:
        """The first `count` tokens of the stream, at most all but its last one."""
        width = self.max_seq_length - 1
        n_rows = min(len(self), -(-count // width))
        parts = [
            self._stream_at(np.arange(row, min(row + _ROWS_AT_ONCE, n_rows), dtype=np.int64) * width)[0]
            for row in range(0, n_rows, _ROWS_AT_ONCE)
        ]
        stream = np.concatenate([part[:, :-1].ravel().astype(self.documents.ids.dtype) for part in parts])
        return stream[: min(count, self.n_targets)]

    def _stream_at(self, starts_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """T tokens of the stream from each start (B, T) int64, and how many of them exist (B,); which stand
        between documents, and which are targets (B, T) bool."""
        stops_B = np.minimum(starts_B + self.max_seq_length, self._length)
        # the end-of-text tokens of each row, as one flat list over all rows
        first_B = np.searchsorted(self._eos_at, starts_B)
        n_eos_B = np.searchsorted(self._eos_at, stops_B) - first_B
        row_N = np.repeat(np.arange(len(starts_B)), n_eos_B)
        nth_N = np.arange(len(row_N)) - np.repeat(np.cumsum(n_eos_B) - n_eos_B, n_eos_B)
        is_eos_BT = np.zeros((len(starts_B), self.max_seq_length), dtype=bool)
        is_eos_BT[row_N, self._eos_at[first_B[row_N] + nth_N] - starts_B[row_N]] = True
        # document tokens before each token, which is its index in `ids`
        index_BT = (starts_B - first_B)[:, None] + np.cumsum(~is_eos_BT, axis=1) - 1
        tokens_BT = self.documents.take(index_BT).astype(np.int64)
        self._n_fetched += len(starts_B)
        if self._n_fetched >= _ROWS_IN_MEMORY:
            self.documents.release()
            self._n_fetched = 0
        tokens_BT[is_eos_BT] = self.eos_id
        is_target_BT = np.array(True)
        if self.documents.targets is not None:  # the end of a document as the token before it
            is_target_BT = np.take(self.documents.targets, index_BT, mode="clip")
        return tokens_BT, stops_B - starts_B, is_eos_BT, is_target_BT


class DocumentWindows:
    """Windows of at most `max_seq_length` tokens, each of one document, for differentially private training.

    A window begins uniformly anywhere in `eos document eos`; a document that fits is taken whole. As in
    packed rows, the first token has position 0 and is no label. Shorter windows are padded at the end,
    labelled -100: what follows a token does not change its logits.
    """

    def __init__(self, documents: TokenizedDocuments, max_seq_length: int, eos_id: int, pad_id: int):
        self.documents, self.max_seq_length = documents, max_seq_length
        self.eos_id, self.pad_id = eos_id, pad_id
        self._lengths = np.diff(documents.offsets) + 2

    @property
    def n_rows(self) -> int:
        """Documents, one row each."""
        return len(self.documents)

    @property
    def n_targets(self) -> int:
        """Mean number of labels of a window."""
        return round(float(np.minimum(self._lengths, self.max_seq_length).mean())) - 1

    def take(self, chosen: np.ndarray, places: np.ndarray) -> dict[str, np.ndarray]:
        """`input_ids`, `position_ids` and `labels`, each (k, T) int64, of the documents `chosen` (k,), sorted
        by length; `places` (k,) are uniform integers that decide where each window begins."""
        order = np.argsort(self._lengths[chosen], kind="stable")
        chosen, places = chosen[order], places[order].astype(np.uint64)
        lengths = self._lengths[chosen]
        n_places = np.maximum(1, lengths - self.max_seq_length + 1)
        starts = (places % n_places.astype(np.uint64)).astype(np.int64)
        at_kT = starts[:, None] + np.arange(self.max_seq_length)
        ids_kT = self.documents.take(self.documents.offsets[chosen][:, None] + at_kT - 1).astype(np.int64)
        is_end_kT = (at_kT == 0) | (at_kT == lengths[:, None] - 1)
        is_padding_kT = at_kT >= lengths[:, None]
        ids_kT[is_end_kT], ids_kT[is_padding_kT] = self.eos_id, self.pad_id
        self.documents.release()
        return {
            "input_ids": ids_kT,
            "position_ids": np.broadcast_to(np.arange(self.max_seq_length), ids_kT.shape).copy(),
            "labels": np.where(is_padding_kT, IGNORED, ids_kT),
        }


def collate(rows: "dict[str, np.ndarray] | Sequence[dict[str, np.ndarray]]") -> "dict[str, torch.Tensor]":
    """Tensors (B, T) int64 of items of `PackedRows`, or of a batch of them."""
    import torch

    if not isinstance(rows, dict):
        rows = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return {key: torch.from_numpy(value) for key, value in rows.items()}
