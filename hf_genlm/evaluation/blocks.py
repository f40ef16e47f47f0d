"""The likelihood of a text by blocks of it: what pairs the results of several models on one text.

A document is cut into blocks of about `BLOCK_BYTES` bytes. Its token i of T lies in block floor(i * K / T) of
its K: models of one vocabulary have exactly the same blocks, and those of others nearly so.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.files import atomic_file

if TYPE_CHECKING:
    from hf_genlm.evaluation.likelihood import Document, Window

BLOCK_BYTES = 2048
_FIELDS = [("document", np.int64), ("bytes", np.float64), ("tokens", np.int64), ("nats", np.float64)]


class BlockSums:
    """A table of B blocks in reading order: `document`, `bytes`, `tokens`, and `nats` of what was scored."""

    def __init__(self, table: np.ndarray):
        """`table`: (B,) of the fields that `of` makes."""
        self.table = table
        n_documents = int(table["document"].max(initial=-1)) + 1
        self._n_tokens = np.bincount(table["document"], table["tokens"], n_documents).astype(np.int64)
        self._n_blocks = np.bincount(table["document"], minlength=n_documents)
        self._first = np.cumsum(self._n_blocks) - self._n_blocks

    @classmethod
    def of(cls, documents: "Sequence[Document]") -> "BlockSums":
        """The blocks of `documents`, with no nats yet. A document without tokens has none."""
        rows = []
        for document, (ids, n_bytes) in enumerate(documents):
            n_blocks = min(len(ids), max(1, round(n_bytes / BLOCK_BYTES)))
            # block k begins with the first token i for which i * K // T is k
            begins = [-(-k * len(ids) // n_blocks) for k in range(n_blocks + 1)] if n_blocks else []
            rows += [
                (document, n_bytes / n_blocks, stop - start, 0.0)
                for start, stop in itertools.pairwise(begins)
            ]
        return cls(np.array(rows, dtype=_FIELDS))

    def add(self, windows: "Sequence[Window]", nats: np.ndarray) -> None:
        """Add the nats (N,) of the scored tokens of `windows`: what `measure_likelihood` calls."""
        documents = np.repeat([w.document for w in windows], [w.stop - w.first for w in windows])
        places = np.concatenate([np.arange(w.first, w.stop) for w in windows])
        blocks = places * self._n_blocks[documents] // self._n_tokens[documents]
        np.add.at(self.table["nats"], self._first[documents] + blocks, nats)

    def save(self, path: Path) -> None:
        """Write the table as .npy."""
        with atomic_file(path) as file:
            np.save(file, self.table, allow_pickle=False)

    @classmethod
    def load(cls, path: Path) -> "BlockSums":
        """
        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            table = np.load(path, allow_pickle=False)
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be read: {error}") from error
        except ValueError as error:
            raise UserError(f"{str(path)!r} is damaged: {error}") from error
        if table.dtype != np.dtype(_FIELDS) or table.ndim != 1:
            raise UserError(f"{str(path)!r} is damaged: it is no table of blocks")
        return cls(table)
