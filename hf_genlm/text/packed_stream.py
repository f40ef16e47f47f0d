"""A stream of documents as training rows: encoded and packed while it is read, shuffled in blocks.

The rows are those of `PackedRows` over the same documents. Every process walks through the whole stream and
trains on its part of each batch (accelerate's `IterableDatasetShard`), so the rows of a step are the same for
any number of processes, and each process pays for the reading.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from hf_genlm.errors import UserError
from hf_genlm.run_folder import n_cores
from hf_genlm.text.encoding import DifferentIds, Encoder, pieces_of_parts
from hf_genlm.text.packing import IGNORED, position_ids_of
from hf_genlm.text.records import Parts
from hf_genlm.text.streaming import DocumentStream, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PADDING = -1  # among ids
_ENDLESS = 1 << 62


@dataclass(frozen=True)
class _Place:
    """Start of building rows: a position in the documents, and the tokens of the row that was begun."""

    row: int  # number of the next row
    tail: list[int]
    documents: dict[str, Any] | None  # position of a walk; None: the beginning
    is_exact: bool  # encoded by the tokenizer's own library


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows (n, T) built from `place`; the last one may be padded, with `_PADDING`."""

    place: _Place
    rows: np.ndarray
    ends_pass: bool
    n_passes: int  # epochs that every lane has finished


@dataclass(frozen=True)
class _Mark:
    """Start of a block of rows that are shuffled together: row `row`, to be rebuilt from `place`."""

    number: int  # of the block
    row: int
    place: _Place


class PackedStream(IterableDataset):
    """Endless rows of `max_seq_length` tokens over the stream `eos d1 eos d2 ...`; see `PackedRows`.

    An epoch ends with a padded row, as in `PackedRows`, and the next one follows; a mixture of several lanes
    has no epochs. Rows are shuffled in blocks of `shuffle_buffer` rows, which never span two epochs; 0: not
    shuffled.

    An item holds `input_ids`, `position_ids` and `labels`, each (T,) int64. `state_after(n)` is all that is
    needed to resume behind n rows, as JSON, whatever a DataLoader has prefetched beyond them. To be read by
    one loader without workers.

    Raises:
        UserError: from iteration: a record cannot be read, or the first epoch is shorter than one row.
    """

    n_rows = None  # unknown

    def __init__(
        self,
        documents: DocumentStream,
        tokenizer: "PreTrainedTokenizerFast",
        max_seq_length: int,
        shuffle_buffer: int = 0,
        seed: int = 0,
        note: Callable[[str], None] = lambda message: None,
        batch: int = 1 << 20,
        max_remembered: int = 1 << 16,
    ):
        """
        Args:
            note: receives a message if tiktoken cannot be used.
            batch: characters encoded at once.
            max_remembered: rows that may lie between the last row given out and that of `state_after`.
        """
        self.documents, self.batch, self.max_remembered = documents, batch, max_remembered
        self.max_seq_length, self.shuffle_buffer, self.seed = max_seq_length, shuffle_buffer, seed
        self.eos_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        self._note = note
        self._encoder = Encoder(tokenizer.backend_tokenizer, _ENDLESS)
        self._decided_by = {  # must be the same when a state is loaded
            "max_seq_length": max_seq_length,
            "shuffle_buffer": shuffle_buffer,
            "seed": seed,
            "tokenizer": hashlib.sha256(self._encoder.state.encode()).hexdigest(),
            "text": documents.sha256_without_names,
        }
        self._start = _Place(0, [self.eos_id], None, is_exact=False)
        self._begin = _Mark(0, 0, self._start)
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
            while len(self._marks) > 1 and self._marks[1].row <= mark.row - self.max_remembered:
                self._marks.popleft()
            order = np.arange(len(rows))
            if self.shuffle_buffer:
                order = np.random.default_rng((self.seed, mark.number)).permutation(len(rows))
            for i in order[max(0, self._n_before - mark.row) :]:
                self._n_given += 1
                ids_T = rows[i].astype(np.int64)
                is_padding_T = ids_T == _PADDING
                input_ids_T = np.where(is_padding_T, self.pad_id, ids_T)
                yield {
                    "input_ids": input_ids_T,
                    "position_ids": position_ids_of(input_ids_T, self.eos_id),
                    "labels": np.where(is_padding_T, IGNORED, ids_T),
                }

    def state_after(self, n_rows: int) -> dict[str, Any]:
        """State behind `n_rows` rows, counted from the very first; known for the last `max_remembered`."""
        known = [mark for mark in self._marks if mark.row <= n_rows]
        assert known, f"row {n_rows} is too long ago"
        return {"rows": n_rows, "mark": asdict(known[-1]), "of": self._decided_by}

    def state_dict(self) -> dict[str, Any]:
        """State behind the rows that were given out."""
        return self.state_after(self._n_given)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state in the next iteration.

        Raises:
            UserError: the state is of a stream of other rows.
        """
        by_name = {"text": self.documents.sha256}  # in older checkpoints
        for name, value in self._decided_by.items():
            if state["of"][name] not in (value, by_name.get(name)):
                raise UserError(
                    f"the stream of this checkpoint had another {name.replace('_', ' ')} "
                    f"({state['of'][name]!r}, now {value!r}): "
                    "resume with the sources and the recipe that it was made with"
                )
        mark = state["mark"]
        self._begin = _Mark(mark["number"], mark["row"], _Place(**mark["place"]))
        self._n_before = self._n_given = state["rows"]
        self._marks = deque([self._begin])

    def first_tokens(self, count: int) -> np.ndarray:
        """At most `count` tokens (n,) int32: all of the first epoch, or of a longer one an even sample, from
        the places that `DocumentStream.stretches` can reach."""
        fast, parts, n_targets = self._encoder.fast, list[np.ndarray](), 0
        for found in self._built(self._start):
            parts.append(found.rows[:, :-1].ravel())
            n_targets += int((found.rows[:, 1:] != _PADDING).sum())
            if found.n_passes or n_targets >= count:
                break
        stretches = self.documents.stretches()[0] if n_targets > count else []
        if len(stretches) > 1:
            with ThreadPoolExecutor(n_cores()) as pool:
                parts = [self._sampled(texts, round(share * count), pool) for share, texts in stretches]
            n_targets = sum(map(len, parts))
        self._encoder.fast = fast  # rows are encoded as those of a resumed run
        return np.concatenate(parts)[: min(count, n_targets)]

    def _sampled(
        self, texts: Generator[Parts, None, None], count: int, pool: ThreadPoolExecutor
    ) -> np.ndarray:
        """At most `count` tokens (n,) int32 of the stream of `texts`."""

        def pieces() -> Iterator[Piece]:
            for parts in texts:
                for text in pieces_of_parts(parts, self._encoder.can_cut):
                    yield Piece(text, ends_document=False)
                yield Piece("", ends_document=True)

        found, size, given = [np.array([self.eos_id], np.int32)], 1, pieces()
        while size < count and (taken := self._next_batch(given, min(self.batch, 4 * (count - size)))[0]):
            found += self._encode(taken, pool)
            size = sum(map(len, found))
        texts.close()  # a file and a part of it
        return np.concatenate(found)[:count].astype(np.int32)

    def _blocks(self, begin: _Mark) -> Iterator[tuple[_Mark, np.ndarray]]:
        """Blocks of rows (n, T) to shuffle, from the block at `begin` on."""
        size = self.shuffle_buffer or _ENDLESS
        number, n_pending = begin.number, 0
        pending: list[np.ndarray] = []
        for found in self._built(begin.place):
            first = max(found.place.row, begin.row)
            rows = found.rows[first - found.place.row :]
            while len(rows):
                if not pending:
                    mark = _Mark(number, first, found.place)
                pending.append(rows[: size - n_pending])
                n = len(pending[-1])
                first, n_pending, rows = first + n, n_pending + n, rows[n:]
                if n_pending == size:
                    yield mark, np.concatenate(pending)
                    number, n_pending, pending = number + 1, 0, []
            if pending and (found.ends_pass or not self.shuffle_buffer):
                yield mark, np.concatenate(pending)
                number, n_pending, pending = number + 1, 0, []

    def _built(self, place: _Place) -> Iterator[_Rows]:
        """All rows from `place` on, a batch of text at a time."""
        if place.is_exact:
            self._encoder.slow_down()
        walk = self.documents.walk(place.documents)
        pieces = walk.pieces(self._encoder.can_cut)
        with ThreadPoolExecutor(n_cores()) as pool:
            while True:
                taken, ends_pass = self._next_batch(pieces, self.batch)
                rows, tail = self._cut(np.array(place.tail, np.int32), self._encode(taken, pool), ends_pass)
                if ends_pass and place.row == 0 and (rows[0] == _PADDING).any():
                    raise UserError(
                        f"training.max_seq_length = {self.max_seq_length}: all the text has less than one "
                        "row; give more, or a smaller max_seq_length"
                    )
                yield _Rows(place, rows, ends_pass, walk.passes)
                is_exact = self._encoder.fast is None
                place = _Place(place.row + len(rows), tail.tolist(), walk.position, is_exact)

    def _next_batch(self, pieces: Iterator[Piece], batch: int) -> tuple[list[Piece], bool]:
        """(the next pieces, about `batch` characters, True if an epoch ends behind them)."""
        taken: list[Piece] = []
        size = 0
        for piece in pieces:
            if piece.ends_pass:
                return taken, True
            taken.append(piece)
            size += len(piece.text)
            if size >= batch:
                break
        return taken, False

    def _encode(self, pieces: list[Piece], pool: ThreadPoolExecutor) -> list[np.ndarray]:
        """Ids of the pieces, with an end-of-text token behind each document."""
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
        """(rows (n, T) of the tokens `tail` and `parts`, the tokens left for the next rows)."""
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
