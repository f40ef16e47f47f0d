"""A stream of documents as rows for the trainer: encoded and packed while it is read, shuffled in blocks.

The rows are those of `PackedRows` over the same documents. Every process walks through the whole stream and
trains on its part of each batch (accelerate's `IterableDatasetShard`), so that the rows of a step are the
same for any number of processes; each pays for the reading.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from hf_genlm.errors import UserError
from hf_genlm.text.encoding import DifferentIds, Encoder, n_cores
from hf_genlm.text.packing import IGNORED, position_ids_of
from hf_genlm.text.streaming import DocumentStream, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH = 1 << 20  # characters encoded at once
_REMEMBERED = 1 << 16  # rows that may lie between the last one given out and the last one trained on
_PADDING = -1  # among ids
_ENDLESS = 1 << 62


@dataclass(frozen=True)
class _Place:
    """Where rows are made from: a position of the documents, and what is left of the row that was begun."""

    row: int  # the number of the next one
    tail: list[int]  # its tokens
    documents: dict[str, Any] | None
    is_exact: bool  # the tokenizer's own library encodes


@dataclass(frozen=True)
class _Rows:
    """Rows (n, T) that follow from one place; the last one may be padded, with `_PADDING`."""

    place: _Place
    rows: np.ndarray
    ends_pass: bool
    n_passes: int  # that every lane has ended


@dataclass(frozen=True)
class _Mark:
    """Where a block of rows that are shuffled among each other begins: at row `row`, which is found from
    `place`."""

    number: int  # of the block
    row: int
    place: _Place


class PackedStream(IterableDataset):
    """Rows of `max_seq_length` tokens over the stream `eos d1 eos d2 ...`, without end; see `PackedRows`.

    A pass ends with a padded row, as there, and another one follows; a mixture of several lanes has no end.
    Rows are shuffled in blocks of `shuffle_buffer` of them, none over the end of a pass; 0: not shuffled.

    An item holds `input_ids`, `position_ids` and `labels`, each (T,) int64. `state_after(n)` is all that is
    needed to go on behind n rows, in JSON; what a DataLoader has fetched beyond them does not matter. To be
    read by one loader without workers.

    Raises:
        UserError: while it is read: a record that cannot be read, or a first pass shorter than one row.
    """

    n_rows = None  # not known

    def __init__(
        self,
        documents: DocumentStream,
        tokenizer: "PreTrainedTokenizerFast",
        max_seq_length: int,
        shuffle_buffer: int = 0,
        seed: int = 0,
        note: Callable[[str], None] = lambda message: None,
    ):
        """`note(message)` is told what goes otherwise than it should."""
        self.documents = documents
        self.max_seq_length, self.shuffle_buffer, self.seed = max_seq_length, shuffle_buffer, seed
        self.eos_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        self._note = note
        self._encoder = Encoder(tokenizer.backend_tokenizer, _ENDLESS)
        self._decided_by = {  # what a state cannot change
            "max_seq_length": max_seq_length,
            "shuffle_buffer": shuffle_buffer,
            "seed": seed,
            "tokenizer": hashlib.sha256(self._encoder.state.encode()).hexdigest(),
            "text": documents.sha256,
        }
        self._begin = _Mark(0, 0, _Place(0, [self.eos_id], None, is_exact=False))
        self._n_before = self._n_given = 0  # rows, before an iteration and so far
        self._marks = deque([self._begin])

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Rows from the loaded state on."""
        assert get_worker_info() is None, "its position is kept in this process: dataloader_num_workers=0"
        self._n_given = self._n_before
        self._marks = deque([self._begin])
        for mark, rows in self._blocks(self._begin):
            if mark.row > self._begin.row:
                self._marks.append(mark)
            while len(self._marks) > 1 and self._marks[1].row <= mark.row - _REMEMBERED:
                self._marks.popleft()
            for i in self._order(mark.number, len(rows))[max(0, self._n_before - mark.row) :]:
                self._n_given += 1
                yield self._item(rows[i])

    def state_after(self, n_rows: int) -> dict[str, Any]:
        """The state behind `n_rows` rows, all since the first counted; known for the last 65,536."""
        known = [mark for mark in self._marks if mark.row <= n_rows]
        assert known, f"row {n_rows} is too long ago"
        return {"rows": n_rows, "mark": asdict(known[-1]), "of": self._decided_by}

    def state_dict(self) -> dict[str, Any]:
        """The state behind the rows that were given out."""
        return self.state_after(self._n_given)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, in the next iteration.

        Raises:
            UserError: it is of a stream of other rows.
        """
        for name, value in self._decided_by.items():
            if state["of"][name] != value:
                raise UserError(
                    f"the stream of this checkpoint had another {name.replace('_', ' ')} "
                    f"({state['of'][name]!r}, now {value!r}): "
                    "go on with the sources and the recipe that it was made with"
                )
        mark = state["mark"]
        self._begin = _Mark(mark["number"], mark["row"], _Place(**mark["place"]))
        self._n_before = self._n_given = state["rows"]
        self._marks = deque([self._begin])

    def first_tokens(self, count: int) -> np.ndarray:
        """(n,) int32: the beginning of the stream, at most `count` tokens of its first pass."""
        parts: list[np.ndarray] = []
        n_targets = 0
        for found in self._made(_Place(0, [self.eos_id], None, is_exact=False)):
            parts.append(found.rows[:, :-1].ravel())
            n_targets += int((found.rows[:, 1:] != _PADDING).sum())
            if found.n_passes or n_targets >= count:
                break
        return np.concatenate(parts)[: min(count, n_targets)]

    def _order(self, number: int, n_rows: int) -> np.ndarray:
        """(n,): the order in which the rows of a block are given out."""
        if not self.shuffle_buffer:
            return np.arange(n_rows)
        return np.random.default_rng((self.seed, number)).permutation(n_rows)

    def _item(self, ids_T: np.ndarray) -> dict[str, np.ndarray]:
        ids_T = ids_T.astype(np.int64)
        is_padding_T = ids_T == _PADDING
        input_ids_T = np.where(is_padding_T, self.pad_id, ids_T)
        return {
            "input_ids": input_ids_T,
            "position_ids": position_ids_of(input_ids_T, self.eos_id),
            "labels": np.where(is_padding_T, IGNORED, ids_T),
        }

    def _blocks(self, begin: _Mark) -> Iterator[tuple[_Mark, np.ndarray]]:
        """Blocks of rows (n, T), the first one that at `begin`."""
        size = self.shuffle_buffer or _ENDLESS
        number, n_held = begin.number, 0
        held: list[np.ndarray] = []
        for found in self._made(begin.place):
            first = max(found.place.row, begin.row)
            rows = found.rows[first - found.place.row :]
            is_end = found.ends_pass or not self.shuffle_buffer
            while len(rows):
                if not held:
                    mark = _Mark(number, first, found.place)
                held.append(rows[: size - n_held])
                first, n_held, rows = first + len(held[-1]), n_held + len(held[-1]), rows[len(held[-1]) :]
                if n_held == size:
                    yield mark, np.concatenate(held)
                    number, n_held, held = number + 1, 0, []
            if is_end and held:
                yield mark, np.concatenate(held)
                number, n_held, held = number + 1, 0, []

    def _made(self, place: _Place) -> Iterator[_Rows]:
        """All rows from `place` on, some at a time."""
        if place.is_exact:
            self._encoder.slow_down()
        walk = self.documents.walk(place.documents)
        pieces = walk.pieces(self._encoder.cuts)
        with ThreadPoolExecutor(n_cores()) as pool:
            while True:
                taken, ends_pass = _batch_of(pieces)
                rows, tail = self._cut(np.array(place.tail, np.int32), self._encoded(taken, pool), ends_pass)
                if ends_pass and place.row == 0 and (rows[0] == _PADDING).any():
                    raise UserError(
                        f"training.max_seq_length = {self.max_seq_length}: all the text has less than one "
                        "row; give more, or a smaller max_seq_length"
                    )
                yield _Rows(place, rows, ends_pass, walk.passes)
                place = _Place(
                    place.row + len(rows), tail.tolist(), walk.position, is_exact=self._encoder.fast is None
                )

    def _encoded(self, pieces: list[Piece], pool: ThreadPoolExecutor) -> list[np.ndarray]:
        """Ids of the pieces, an end-of-text token behind each document."""
        texts = [piece.text for piece in pieces]
        if not texts:
            return []
        try:
            encoded = self._encoder.encode(texts, pool)
        except DifferentIds as error:
            self._encoder.slow_down()
            self._note(f"tiktoken is left aside, since it does not follow this tokenizer: {error}")
            encoded = self._encoder.encode(texts, pool)
        eos = np.array([self.eos_id], dtype=np.int32)
        return [
            part
            for piece, ids in zip(pieces, encoded, strict=True)
            for part in ((ids, eos) if piece.ends_document else (ids,))
        ]

    def _cut(
        self, tail: np.ndarray, parts: list[np.ndarray], ends_pass: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows (n, T) of the tokens `tail` and `parts`, and what is left of them for the next."""
        tokens = np.concatenate([tail, *parts]).astype(np.int32)
        width = self.max_seq_length - 1
        n_rows = (len(tokens) - 1) // width
        left = tokens[n_rows * width :]
        if ends_pass and len(left) > 1:
            tokens = np.append(tokens, np.full(self.max_seq_length - len(left), _PADDING, np.int32))
            n_rows += 1
        starts = np.arange(n_rows)[:, None] * width
        rows = tokens[starts + np.arange(self.max_seq_length)]
        return rows, np.array([self.eos_id], np.int32) if ends_pass else left


def _batch_of(pieces: Iterator[Piece]) -> tuple[list[Piece], bool]:
    """The next pieces, about `_BATCH` characters, and whether a pass ends behind them."""
    taken: list[Piece] = []
    size = 0
    for piece in pieces:
        if piece.ends_pass:
            return taken, True
        taken.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            break
    return taken, False
