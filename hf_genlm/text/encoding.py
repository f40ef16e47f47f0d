"""Documents to token ids, on all cores, in one pass; the ids lie in a file."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from tokenizers import Tokenizer

from hf_genlm.memory import give_back_memory
from hf_genlm.text.cache import ArrayFile, ArrayWriter, Cache, key_of
from hf_genlm.text.fast_bpe import GROUPED_PATTERN, FastBPE, fast_bpe_of, pre_tokenizer
from hf_genlm.text.store import Document, Documents, as_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# where a text may be cut, see `cuts_are_exact`
_BORDER = re.compile(r"(?<=\n)(?=[!-~])|(?<=[A-Za-z])(?=[\x00-@\[-`{-\x7f])")
_PIECE = 1 << 18  # characters of a piece of a long document, and of a job
_BATCH = 1 << 22  # characters encoded at once
_WORTHWHILE = 1 << 17  # characters from which on the second engine saves more time than it takes to make
_SPOT = 2048  # characters of a spot check
_SPOTS = 8  # spot checks in a batch


@dataclass(frozen=True, eq=False)
class TokenizedDocuments(Sequence[tuple[np.ndarray, int]]):
    """Token ids of n documents in one flat array; `self[i]` is (ids of document i, its UTF-8 bytes).

    `ids` (n_tokens,) uint16 or uint32; `offsets` (n + 1,) int64, where each document begins; `n_bytes` (n,)
    int64. `file` is the one that they are mapped from, if any.
    """

    ids: np.ndarray
    offsets: np.ndarray
    n_bytes: np.ndarray
    file: ArrayFile | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents, special ones not counted."""
        return len(self.ids)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The ids at `indices`, of their shape; any id for an index outside."""
        return np.take(self.ids, indices, mode="clip") if len(self.ids) else np.zeros_like(indices)

    def release(self) -> None:
        """Give back the memory of the ids that were read from a file."""
        if self.file is not None:
            self.file.release()

    def __len__(self) -> int:
        return len(self.n_bytes)

    @overload
    def __getitem__(self, index: int) -> tuple[np.ndarray, int]: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenizedDocuments": ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            if chosen.step == 1:  # neighbours, which lie where they are
                offsets = self.offsets[chosen.start : max(chosen.start, chosen.stop) + 1]
                ids = self.ids[offsets[0] : offsets[-1]]
                return TokenizedDocuments(ids, offsets - offsets[0], self.n_bytes[index], self.file)
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

    The tokenizers that are trained here go through `FastBPE`, every other one through its own library. `cuts`
    says whether a text may be encoded in pieces, `dtype` is that of the ids.
    """

    def __init__(self, backend: Tokenizer, n_characters: int):
        """`n_characters`: about how much there is to encode."""
        self.state = state_of(backend)
        self.exact = Tokenizer.from_str(self.state)
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
    cache: Cache | None = None,
    sha256: str | None = None,
) -> TokenizedDocuments:
    """Token ids of every document, without special tokens; the words of special tokens in the text are plain
    text.

    Runs on all cores, over batches of a bounded number of characters, and writes the ids to a file: that of
    `cache` with a hash of the text (`sha256`, as the report on a corpus has it), where they are found again.
    `on_progress(done, total)` is told the characters encoded so far and all of them, `note(message)` what
    went otherwise than it should. Memory does not grow with the text; with a tokenizer of another kind it
    grows with the longest document.

    Raises:
        UserError: the disk is full.
    """
    documents = as_documents(documents)
    encoder = Encoder(tokenizer.backend_tokenizer, documents.n_characters)
    cache = cache or Cache(None)
    key = None
    if sha256 is not None:
        tokenizer_sha256 = hashlib.sha256(encoder.state.encode()).hexdigest()
        key = key_of(kind="tokens", text=sha256, tokenizer=tokenizer_sha256)
        found = cache.load(key)
        if found is not None:
            return tokenized_of(found)
    try:
        return _encode(encoder, documents, cache, key, on_progress)
    except DifferentIds as error:
        encoder.slow_down()
        if note is not None:
            note(f"tiktoken is left aside, since it does not follow this tokenizer: {error}")
        return _encode(encoder, documents, cache, key, on_progress)


def _encode(
    encoder: Encoder,
    documents: Documents,
    cache: Cache,
    key: str | None,
    on_progress: Callable[[int, int], None] | None,
) -> TokenizedDocuments:
    total, done = documents.n_characters, 0
    lengths = np.zeros(len(documents), dtype=np.int64)
    with ArrayWriter(cache, key) as writer, ThreadPoolExecutor(n_cores()) as pool:
        for batch in _batches(pieces(documents, encoder.cuts)):
            parts = encoder.encode([text for _, text in batch], pool)
            for (i, text), ids in zip(batch, parts, strict=True):
                lengths[i] += len(ids)
                done += len(text)
            writer.append("ids", np.concatenate(parts))
            if on_progress is not None:
                on_progress(done, total)
        writer.append("ids", np.zeros(0, dtype=encoder.dtype))  # of no documents, too
        writer.append("offsets", _offsets(lengths))
        writer.append("n_bytes", documents.n_bytes)
        finished = writer.finish()
    give_back_memory()
    return tokenized_of(finished)


def tokenized_of(file: ArrayFile) -> TokenizedDocuments:
    """The documents whose arrays lie in `file`."""
    return TokenizedDocuments(**file.arrays, file=file)


def state_of(backend: Tokenizer) -> str:
    """A tokenizer's JSON but for the limits of length, which no document here is cut by."""
    state = json.loads(backend.to_str())
    state["truncation"] = state["padding"] = None
    return json.dumps(state, ensure_ascii=False)


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cuts_are_exact(backend: Tokenizer) -> bool:
    """True if a text may be encoded in the pieces of `pieces_of`: only with the pre-tokenizer that is trained
    here.

    Then two places are always borders of pre-tokens. Before a visible character that follows a line end: no
    alternative of `PATTERN` goes on past it, none looks ahead across it (the one that starts with `\\s*`
    takes a whitespace run up to its last line end before the others see it), and none looks back. And behind
    an ASCII letter before an ASCII character that is none: what takes a letter in goes on with letters and
    marks alone, and what looks ahead stands in whitespace and sees at most the letter.
    """
    state = json.loads(backend.to_str())
    ours = json.loads(pre_tokenizer().__getstate__())
    specials_only = all(token["special"] for token in state["added_tokens"])
    return state["normalizer"] is None and state["pre_tokenizer"] == ours and specials_only


def pieces(documents: Documents, cuts: bool = True) -> Iterator[tuple[int, str]]:
    """(number of the document, text) of all documents in order; with `cuts`, long ones in pieces."""
    for i, parts in itertools.groupby(documents.texts(), key=lambda part: part[0]):
        yield from ((i, piece) for piece in pieces_of_parts((part for _, part in parts), cuts))


def pieces_of_parts(parts: Iterable[str], cuts: bool = True) -> Iterator[str]:
    """The text that `parts` join to, whole or, with `cuts`, in pieces that depend on the parts."""
    begun: list[str] = []
    for part in parts:
        border = _last_border(part) if cuts else 0
        if border:
            yield from pieces_of("".join([*begun, part[:border]]))
            begun = []
        begun.append(part[border:])
    text = "".join(begun)
    yield from pieces_of(text) if cuts else (text,)


def pieces_of(text: str, length: int = _PIECE) -> Iterator[str]:
    """Pieces of about `length` characters, cut only between a line end and a visible ASCII character, or an
    ASCII letter and an ASCII character that is none."""
    start = 0
    while len(text) - start > length:
        border = _BORDER.search(text, start + length)
        if border is None:
            break
        yield text[start : border.start()]
        start = border.start()
    yield text[start:]


def _last_border(text: str) -> int:
    """The last place where `text` may be cut; 0 when there is none, or none is needed."""
    if len(text) < _PIECE:
        return 0
    reach = 256
    while reach < 2 * len(text):
        found = [border.start() for border in _BORDER.finditer(text, max(0, len(text) - reach))]
        if found:
            return found[-1]
        reach *= 16
    return 0


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


def _batches(texts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """`texts` in batches of about `_BATCH` characters, in order."""
    batch: list[tuple[int, str]] = []
    size = 0
    for i, text in texts:
        batch.append((i, text))
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
