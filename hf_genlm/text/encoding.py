"""Documents to token ids, on all cores."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from tokenizers import Tokenizer

from hf_genlm.text.fast_bpe import FastBPE, fast_bpe_of
from hf_genlm.text.sources import Document
from hf_genlm.text.tokenizer import GROUPED_PATTERN, pre_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PIECE = (
    1 << 18
)  # characters after which a long document is cut, where a cut changes no id; and those of a job
_BATCH = 1 << 22  # characters encoded at once
_WORTHWHILE = 1 << 17  # characters from which on the second engine saves more time than it takes to make
_SPOT = 2048  # characters of a spot check
_SPOTS = 8  # spot checks in a batch


@dataclass(frozen=True, eq=False)
class TokenizedDocuments(Sequence[tuple[np.ndarray, int]]):
    """Token ids of n documents in one flat array; `self[i]` is (ids of document i, its UTF-8 bytes).

    `ids` (n_tokens,) uint16 or uint32; `offsets` (n + 1,) int64, where each document begins; `n_bytes` (n,)
    int64.
    """

    ids: np.ndarray
    offsets: np.ndarray
    n_bytes: np.ndarray

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents, special ones not counted."""
        return len(self.ids)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The ids at `indices`, of their shape; any id for an index outside."""
        return np.take(self.ids, indices, mode="clip") if len(self.ids) else np.zeros_like(indices)

    def __len__(self) -> int:
        return len(self.n_bytes)

    @overload
    def __getitem__(self, index: int) -> tuple[np.ndarray, int]: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenizedDocuments": ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            parts = [self.ids[self.offsets[i] : self.offsets[i + 1]] for i in chosen]
            lengths = [len(part) for part in parts]
            ids = np.concatenate([self.ids[:0], *parts])
            return TokenizedDocuments(ids, _offsets(lengths), self.n_bytes[index])
        i = range(len(self))[index]
        return self.ids[self.offsets[i] : self.offsets[i + 1]], int(self.n_bytes[i])


class DifferentIds(Exception):
    """The second engine gave other ids than the tokenizer."""


class Encoder:
    """Texts to ids, without special tokens; the words of special tokens in a text are plain text.

    The tokenizers that are trained here go through `FastBPE`, every other one through its own library. `fast`
    says which; `slow_down` turns to the second for good.
    """

    def __init__(self, backend: Tokenizer, n_characters: int):
        """`n_characters`: about how much there is to encode."""
        state = json.loads(backend.to_str())
        state["truncation"] = state["padding"] = None  # all of a text, and nothing else
        self.exact = Tokenizer.from_str(json.dumps(state))
        self.exact.encode_special_tokens = True
        self.cuts = cuts_are_exact(backend)
        self.fast: FastBPE | None = None
        if self.cuts and n_characters >= _WORTHWHILE:
            self.fast = fast_bpe_of(backend, GROUPED_PATTERN)
        n_ids = max(backend.get_vocab(with_added_tokens=True).values(), default=0) + 1
        self.dtype = np.dtype(np.uint16 if n_ids <= 1 << 16 else np.uint32)

    def slow_down(self) -> None:
        """Use the tokenizer's own library from now on."""
        self.fast = None

    def encode(self, texts: Sequence[str], pool: ThreadPoolExecutor) -> list[np.ndarray]:
        """Ids of each text, each (n,) of `dtype`.

        Raises:
            DifferentIds: a spot check failed.
        """
        fast = self.fast
        if fast is None:
            return self._encode_exactly(texts)
        quick = [i for i, text in enumerate(texts) if fast.can_encode(text)]
        jobs = list(_jobs(texts, quick))
        running = [pool.submit(fast.encode, [texts[i] for i in job]) for job in jobs]
        found: dict[int, np.ndarray] = {}
        for job, future in zip(jobs, running, strict=True):
            found.update(zip(job, future.result(), strict=True))
        self._check_spots(fast, [texts[i] for i in quick])
        others = [i for i in range(len(texts)) if i not in found]
        if others:
            found.update(zip(others, self._encode_exactly([texts[i] for i in others]), strict=True))
        return [found[i].astype(self.dtype, copy=False) for i in range(len(texts))]

    def _encode_exactly(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self.exact.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def _check_spots(self, fast: FastBPE, texts: Sequence[str]) -> None:
        """Compare both engines on the heads of a few texts, spread evenly."""
        chosen = texts[:: max(1, len(texts) // _SPOTS)][:_SPOTS]
        spots = [text[:_SPOT] for text in chosen]  # a text of its own, wherever it is cut
        for spot, ids, wanted in zip(spots, fast.encode(spots), self._encode_exactly(spots), strict=True):
            if not np.array_equal(ids, wanted):
                raise DifferentIds(f"the ids of {spot[:40]!r}... differ")


def encode_documents(
    tokenizer: "PreTrainedTokenizerFast",
    documents: Sequence[Document],
    on_progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> TokenizedDocuments:
    """Token ids of every document, without special tokens; the words of special tokens in the text are plain
    text.

    Runs on all cores, over batches of a bounded number of characters. `on_progress(done, total)` is told the
    characters encoded so far and all of them, `note(message)` what went otherwise than it should.
    """
    encoder = Encoder(tokenizer.backend_tokenizer, sum(len(document.text) for document in documents))
    try:
        return _encode(encoder, documents, on_progress)
    except DifferentIds as error:
        encoder.slow_down()
        if note is not None:
            note(f"tiktoken is left aside, since it does not follow this tokenizer: {error}")
        return _encode(encoder, documents, on_progress)


def _encode(
    encoder: Encoder, documents: Sequence[Document], on_progress: Callable[[int, int], None] | None
) -> TokenizedDocuments:
    total = sum(len(document.text) for document in documents)
    parts: list[np.ndarray] = []
    lengths = np.zeros(len(documents), dtype=np.int64)
    done = 0
    with ThreadPoolExecutor(n_cores()) as pool:
        for batch in _batches(documents, encoder.cuts):
            for (i, text), ids in zip(batch, encoder.encode([text for _, text in batch], pool), strict=True):
                parts.append(ids)
                lengths[i] += len(ids)
                done += len(text)
            if on_progress is not None:
                on_progress(done, total)
    ids = np.concatenate(parts) if parts else np.zeros(0, dtype=encoder.dtype)
    n_bytes = np.array([document.n_bytes for document in documents], dtype=np.int64)
    return TokenizedDocuments(ids, _offsets(lengths), n_bytes)


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cuts_are_exact(backend: Tokenizer) -> bool:
    """Whether a text may be encoded in the pieces of `pieces_of`: only with the pre-tokenizer that is trained
    here.

    Then a line end followed by a visible character is always a border of pre-tokens: no alternative of
    `PATTERN` goes on past it, none looks ahead across it (the one that starts with `\\s*` takes a whitespace
    run up to its last line end before the others see it), and none looks back.
    """
    state = json.loads(backend.to_str())
    ours = json.loads(pre_tokenizer().__getstate__())
    specials_only = all(token["special"] for token in state["added_tokens"])
    return state["normalizer"] is None and state["pre_tokenizer"] == ours and specials_only


def pieces_of(text: str, length: int = _PIECE) -> Iterator[str]:
    """Pieces of about `length` characters, cut only between a line end and a visible ASCII character."""
    start = 0
    while len(text) - start > length:
        end = text.find("\n", start + length - 1) + 1
        while 0 < end < len(text) and not "!" <= text[end] <= "~":
            end = text.find("\n", end) + 1
        if not 0 < end < len(text):
            break
        yield text[start:end]
        start = end
    yield text[start:]


def _jobs(texts: Sequence[str], indices: Iterable[int]) -> Iterator[list[int]]:
    """`indices` in groups of about `_PIECE` characters of text."""
    job: list[int] = []
    size = 0
    for i in indices:
        job.append(i)
        size += len(texts[i])
        if size >= _PIECE:
            yield job
            job, size = [], 0
    if job:
        yield job


def _batches(documents: Sequence[Document], exact: bool) -> Iterator[list[tuple[int, str]]]:
    """(index of the document, text) in batches of about `_BATCH` characters, in order."""
    batch: list[tuple[int, str]] = []
    size = 0
    for i, document in enumerate(documents):
        for piece in pieces_of(document.text) if exact else (document.text,):
            batch.append((i, piece))
            size += len(piece)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
