"""Encode documents to token ids on all cores, in one pass; the ids are written to a memory-mapped file.

Every text of people is encoded here: `encode_documents` for a corpus, `encode_texts` for texts in memory,
`encode_messages` for a conversation. The words of special tokens that stand in a text are plain text.
"""

import hashlib
import itertools
import json
import re
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from tokenizers import Tokenizer

from hf_genlm.errors import UserError
from hf_genlm.memory import give_back_memory
from hf_genlm.run_folder import n_cores
from hf_genlm.text.cache import ArrayFile, ArrayWriter, Cache, key_of
from hf_genlm.text.fast_bpe import GROUPED_PATTERNS, FastBPE, fast_bpe_of, pre_tokenizer
from hf_genlm.text.store import TURN, Document, Documents, as_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PIECE = 1 << 18  # characters of a piece of a long document, and of a thread's job
MAX_WORD = 1 << 18  # characters behind which a piece ends anywhere, if nothing may be cut before
UNCUT = 1 << 20  # characters of a document that is cut even if that may change ids beside the cuts
BATCH = 1 << 22  # bytes encoded at once
_LOCK = threading.Lock()  # of tokenizers: what a text's special words are is a mode that threads share
SPOTS, SPOT = 8, 2048  # spot checks of tiktoken in a batch, and the characters of each
# letters, marks and signs that are the same in every version of Unicode
_LETTERS = (
    "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0391-\u03a1\u03a3-\u03c9\u0400-\u0481\u05d0-\u05ea\u0621-\u064a"
    "\u0905-\u0939\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u1000-\u1021\u1780-\u17b3\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
_SIGNS = (
    "\\x00-@\\[-`{-\\x7f\u00a0\u00ab\u00b7\u00bb\u060c\u061b\u061f\u0964\u0965\u104a\u104b\u17d4\u17d5\u2010-\u2027\u3000-\u3003"
    "\u3008-\u3011\uff01-\uff0f\uff1a-\uff20"
)
# where a text may be cut: behind a word, with every pattern; and with ours before a line that is not indented
_WORD_END = re.compile(f"(?<=[{_LETTERS}])(?=[{_SIGNS}])")
_BORDER = re.compile(rf"(?<=\n)(?=[!-~{_LETTERS}])|{_WORD_END.pattern}")


@dataclass(frozen=True, eq=False)
class TokenizedDocuments(Sequence[tuple[np.ndarray, int]]):
    """Token ids of n documents in one flat array; `self[i]` is (ids of document i, its UTF-8 bytes).

    `ids` (n_tokens,) uint16 or uint32; `offsets` (n + 1,) int64, the start of each document in `ids`;
    `n_bytes` (n,) int64. `file` holds the arrays if they are memory-mapped. Where some documents are chats,
    `targets` (n_tokens,) bool is false for the tokens that a model reads and does not learn to predict, and
    `n_bytes` counts what it predicts.
    """

    ids: np.ndarray
    offsets: np.ndarray
    n_bytes: np.ndarray
    file: ArrayFile | None = None
    targets: np.ndarray | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents, without special tokens."""
        return len(self.ids)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Ids at `indices`, of the same shape; arbitrary ids for indices out of range."""
        return np.take(self.ids, indices, mode="clip") if len(self.ids) else np.zeros_like(indices)

    def targets_of(self, i: int) -> np.ndarray:
        """Mask (T,) of the tokens of document i that a model learns to predict."""
        start, stop = self.offsets[i], self.offsets[i + 1]
        return np.ones(stop - start, dtype=bool) if self.targets is None else self.targets[start:stop]

    def release(self) -> None:
        """Return the memory of ids read from the file to the system."""
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
            if chosen.step == 1:  # adjacent documents: no copy
                offsets = self.offsets[chosen.start : max(chosen.start, chosen.stop) + 1]
                ids = self.ids[offsets[0] : offsets[-1]]
                targets = None if self.targets is None else self.targets[offsets[0] : offsets[-1]]
                return TokenizedDocuments(ids, offsets - offsets[0], self.n_bytes[index], self.file, targets)
            parts = [self.ids[self.offsets[i] : self.offsets[i + 1]] for i in chosen]
            ids, offsets = np.concatenate([self.ids[:0], *parts]), _offsets([len(part) for part in parts])
            targets = None
            if self.targets is not None:
                targets = np.concatenate([self.targets[:0], *map(self.targets_of, chosen)])
            return TokenizedDocuments(ids, offsets, self.n_bytes[index], targets=targets)
        i = range(len(self))[index]
        return self.ids[self.offsets[i] : self.offsets[i + 1]], int(self.n_bytes[i])


class DifferentIds(Exception):
    """tiktoken gave other ids than the tokenizer."""


class Encoder:
    """Encodes texts without special tokens; the words of special tokens in a text are plain text.

    Our own tokenizers are encoded by tiktoken (`FastBPE`), every other one by its own library. `can_cut` says
    whether a text may be encoded in pieces; `dtype` is that of the ids.
    """

    min_fast = 1 << 17  # characters from which on tiktoken saves more time than its setup takes

    def __init__(self, backend: Tokenizer, n_characters: int):
        """`n_characters`: about how much there is to encode."""
        state = json.loads(backend.to_str())
        state["truncation"] = state["padding"] = None  # documents are subject to neither
        self.state = json.dumps(state, ensure_ascii=False)
        self.exact = Tokenizer.from_str(self.state)
        self.exact.encode_special_tokens = True
        grouped = own_pattern_of(backend)
        self.can_cut = grouped is not None
        self.fast: FastBPE | None = None
        if grouped is not None and n_characters >= self.min_fast:
            self.fast = fast_bpe_of(backend, grouped)
        self.n_ids = max(backend.get_vocab(with_added_tokens=True).values(), default=0) + 1
        self.dtype = np.dtype(np.uint16 if self.n_ids <= 1 << 16 else np.uint32)

    def slow_down(self) -> None:
        """Use the tokenizer's own library from now on."""
        self.fast = None

    def encode(self, texts: Sequence[str], pool: ThreadPoolExecutor) -> list[np.ndarray]:
        """Ids (n,) of `dtype` of each text.

        Raises:
            DifferentIds: a spot check failed.
        """
        fast = self.fast
        if fast is None:
            return self.encode_exactly(texts)
        quick = [i for i, text in enumerate(texts) if fast.can_encode(text)]
        jobs = list(_batches(quick, lambda i: len(texts[i]), PIECE))
        running = [pool.submit(fast.encode, [texts[i] for i in job]) for job in jobs]
        found: dict[int, np.ndarray] = {}
        for job, future in zip(jobs, running, strict=True):
            found.update(zip(job, future.result(), strict=True))
        # spot check: compare both encoders on the heads of a few texts, spread evenly
        spots = [texts[i][:SPOT] for i in quick[:: max(1, len(quick) // SPOTS)][:SPOTS]]
        for spot, ids, wanted in zip(spots, fast.encode(spots), self.encode_exactly(spots), strict=True):
            if not np.array_equal(ids, wanted):
                raise DifferentIds(f"the ids of {spot[:40]!r}... differ")
        others = [i for i in range(len(texts)) if i not in found]
        found.update(zip(others, self.encode_exactly([texts[i] for i in others]), strict=True))
        return [found[i].astype(self.dtype, copy=False) for i in range(len(texts))]

    def encode_exactly(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text by the tokenizer's own library."""
        encodings = self.exact.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]


def encode_texts(tokenizer: Any, texts: Iterable[str], add_special_tokens: bool = False) -> list[list[int]]:
    """Token ids of each text; the words of special tokens in a text are plain text, as in training.

    `add_special_tokens`: put special tokens around each text, if the tokenizer does so by itself.
    """
    texts = list(texts)
    if not texts:
        return []
    options = {"add_special_tokens": add_special_tokens, "split_special_tokens": True, "verbose": False}
    with _LOCK:
        return tokenizer(texts, **options)["input_ids"]


def encode_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]], **template: Any) -> list[int]:
    """Token ids of a conversation in the chat template; `template` are options of `apply_chat_template`.

    Special tokens of the template are special, those that are typed in a message are plain text. To tell them
    apart, a private character stands for each typed one while the template is applied.
    """
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    any_special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
    written = "".join(value for message in messages for value in message.values())
    typed = sorted(set(any_special.findall(written)))
    if not typed:
        with _LOCK:
            return tokenizer.apply_chat_template(messages, return_dict=True, **template)["input_ids"]
    free = (chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in written)
    character_of = dict(zip(typed, free, strict=False))
    word_of = {ord(character): word for word, character in character_of.items()}
    hidden = [
        {key: any_special.sub(lambda found: character_of[found[0]], value) for key, value in message.items()}
        for message in messages
    ]
    text = tokenizer.apply_chat_template(hidden, tokenize=False, **template)
    ids: list[int] = []
    for part in re.split(f"({any_special.pattern})", text):  # texts, and special tokens of the template
        ids += [special[part]] if part in special else encode_texts(tokenizer, [part.translate(word_of)])[0]
    return ids


def encode_documents(
    tokenizer: "PreTrainedTokenizerFast",
    documents: Sequence[Document],
    on_progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
    cache: Cache | None = None,
    sha256: str | None = None,
    batch: int = BATCH,
    ends_chats: bool = False,
) -> TokenizedDocuments:
    """Encode every document without special tokens; the words of special tokens in a text are plain text.

    In a chat, an end-of-text token stands between two messages. What the assistant says and the token behind
    it are targets.

    Runs on all cores over batches of about `batch` bytes. Memory does not grow with the text, for which a
    document of more than `UNCUT` characters is cut behind a word if the tokenizer is not ours.

    Args:
        on_progress: called with (characters encoded, all characters).
        note: receives a message if tiktoken cannot be used.
        cache, sha256: where the ids are stored and looked up, and the hash of the text as in corpus.json.
        ends_chats: put the end-of-text token behind the last message of a chat too, as to measure it.

    Raises:
        UserError: the disk is full, or there are chats and the tokenizer has no end-of-text token.
    """
    documents = as_documents(documents)
    encoder = Encoder(tokenizer.backend_tokenizer, documents.n_characters)
    cache = cache or Cache(None)
    key = None
    turns = _Turns(tokenizer.eos_token_id, ends_chats) if documents.is_chat.any() else None
    if sha256 is not None:
        tokenizer_sha256 = hashlib.sha256(encoder.state.encode()).hexdigest()
        of_chats = {} if turns is None else turns._asdict()
        key = key_of(kind="tokens", text=sha256, tokenizer=tokenizer_sha256, **of_chats)
        found = cache.load(key)
        if found is not None and _fits(found.arrays, documents, encoder):
            return tokenized_of(found)
    try:
        return _encode(encoder, documents, cache, key, on_progress, batch, turns)
    except DifferentIds as error:
        encoder.slow_down()
        if note is not None:
            note(f"tiktoken is left aside, since it does not follow this tokenizer: {error}")
        return _encode(encoder, documents, cache, key, on_progress, batch, turns)


def _encode(
    encoder: Encoder,
    documents: Documents,
    cache: Cache,
    key: str | None,
    on_progress: Callable[[int, int], None] | None,
    batch: int,
    turns: "_Turns | None",
) -> TokenizedDocuments:
    total, done = documents.n_characters, 0
    lengths = np.zeros(len(documents), dtype=np.int64)
    n_bytes = np.where(documents.is_chat, 0, documents.n_bytes)
    runs, are_targets = array("q"), array("b")  # lengths of the runs of tokens that are targets or not
    with ArrayWriter(cache, key) as writer, ThreadPoolExecutor(n_cores()) as pool:
        for texts in _batches(
            _segments(documents, encoder.can_cut, turns), lambda piece: len(piece[1].encode()), batch
        ):
            parts = encoder.encode([text for _, text, _ in texts], pool)
            for k, ((i, text, is_target), ids) in enumerate(zip(texts, parts, strict=True)):
                if turns is not None:
                    if text == TURN and documents.is_chat[i]:
                        parts[k] = ids = turns.end(encoder.dtype)
                    elif is_target and documents.is_chat[i]:
                        n_bytes[i] += len(text.encode())
                    runs.append(len(ids))
                    are_targets.append(is_target)
                lengths[i] += len(ids)
                done += len(text)
            writer.append("ids", np.concatenate(parts))
            if on_progress is not None:
                on_progress(done, total)
        writer.append("ids", np.zeros(0, dtype=encoder.dtype))  # for an empty list of documents
        writer.append("offsets", _offsets(lengths))
        writer.append("n_bytes", n_bytes)
        for first in range(0, len(runs), BATCH >> 8):
            part = slice(first, first + (BATCH >> 8))
            writer.append("targets", np.repeat(np.array(are_targets[part], dtype=bool), runs[part]))
        finished = writer.finish()
    give_back_memory()
    return tokenized_of(finished)


class _Turns(NamedTuple):
    """The token behind each message of a chat; with `ends_chats`, behind the last one too."""

    eos_id: int | None
    ends_chats: bool

    def end(self, dtype: np.dtype) -> np.ndarray:
        if self.eos_id is None:
            raise UserError("this tokenizer has no eos token, which ends every message of a chat: set one")
        return np.array([self.eos_id], dtype=dtype)


def _segments(documents: Documents, can_cut: bool, turns: _Turns | None) -> Iterator[tuple[int, str, bool]]:
    """(index of the document, text, True if its tokens are targets) of all documents in order. In a chat, the
    role of a message, its content and the end of it, `TURN`, are segments of their own."""
    for i, group in itertools.groupby(pieces(documents, can_cut), key=lambda piece: piece[0]):
        if not documents.is_chat[i]:
            yield from ((i, text, True) for _, text in group)
            continue
        is_target = is_begun = False
        for _, text in group:
            if text.startswith(TURN):
                if is_begun:
                    yield i, TURN, is_target
                role, _, text = text[1:].partition("\n")
                is_target, is_begun = role == "assistant", True
                yield i, f"{role}\n", False
            yield i, text, is_target
        if turns is not None and turns.ends_chats:
            yield i, TURN, is_target


def _fits(arrays: Mapping[str, np.ndarray], documents: Documents, encoder: Encoder) -> bool:
    """Return True if arrays read from a file can be the ids of `documents`."""
    is_text = ~documents.is_chat
    types = {"ids": encoder.dtype, "offsets": np.dtype(np.int64), "n_bytes": np.dtype(np.int64)}
    if not is_text.all():
        types["targets"] = np.dtype(bool)
    if {name: values.dtype for name, values in arrays.items()} != types:
        return False
    ids, offsets, n_bytes = arrays["ids"], arrays["offsets"], arrays["n_bytes"]
    return (
        n_bytes.shape == is_text.shape
        and np.array_equal(n_bytes[is_text], documents.n_bytes[is_text])
        and len(arrays.get("targets", ids)) == len(ids)
        and len(offsets) == len(documents) + 1
        and (offsets[0], offsets[-1]) == (0, len(ids))
        and bool((np.diff(offsets) >= 0).all())
        and int(ids.max(initial=0)) < encoder.n_ids
    )


def tokenized_of(file: ArrayFile) -> TokenizedDocuments:
    """Documents whose arrays lie in `file`."""
    return TokenizedDocuments(**file.arrays, file=file)


def own_pattern_of(backend: Tokenizer) -> str | None:
    """The pattern for tiktoken of a tokenizer with our own pre-tokenizer, old or new; None for any other.

    Only with our own may a text be encoded in the pieces of `pieces_of`, as two places are always borders of
    pre-tokens. Before a visible character that follows a line end: no alternative of `PATTERN` matches across
    it, none looks ahead across it (the one that starts with `\\s*` takes a run of white space up to its last
    line end before the others see it), and none looks back. And between an ASCII letter and an ASCII
    character that is none: an alternative that takes a letter continues with letters and marks only, and a
    lookahead stands in white space and sees at most the letter.
    """
    state = json.loads(backend.to_str())
    if state["normalizer"] is not None or not all(token["special"] for token in state["added_tokens"]):
        return None
    for pattern, grouped in GROUPED_PATTERNS.items():
        if state["pre_tokenizer"] == json.loads(pre_tokenizer(pattern).__getstate__()):
            return grouped
    return None


def pieces(
    documents: Documents, can_cut: bool = True, length: int | None = None
) -> Iterator[tuple[int, str]]:
    """(index of the document, text) of all documents in order, long ones in pieces; of a chat, each message,
    which begins with `TURN`."""
    for i, parts in itertools.groupby(documents.texts(), key=lambda part: part[0]):
        texts = (part for _, part in parts)
        if documents.is_chat[i]:  # as a record, it was held in memory before
            turns = "".join(texts).split(TURN)[1:]
            for turn in turns:
                yield from ((i, piece) for piece in pieces_of_parts((TURN, turn), can_cut, length))
        else:
            yield from ((i, piece) for piece in pieces_of_parts(texts, can_cut, length))


def pieces_of_parts(parts: Iterable[str], can_cut: bool = True, length: int | None = None) -> Iterator[str]:
    """Pieces of the text that `parts` join to, see `pieces_of`, which do not depend on the parts.

    `length` is `PIECE` by default, `UNCUT` where a cut may change ids. Memory does not grow with the text.
    """
    length = length or (PIECE if can_cut else UNCUT)
    begun: list[str] = []
    size = 0
    for part in parts:
        begun.append(part)
        size += len(part)
        if size > length + MAX_WORD:
            *whole, rest = pieces_of("".join(begun), length, can_cut)
            yield from whole
            begun, size = [rest], len(rest)
    yield from pieces_of("".join(begun), length, can_cut)


def pieces_of(text: str, length: int = PIECE, can_cut: bool = True) -> Iterator[str]:
    """Pieces of about `length` characters; one of more than `length + MAX_WORD` ends anywhere.

    With `can_cut` the ids are those of the whole text, up to the words that are longer than `MAX_WORD`;
    otherwise, a tokenizer that looks across the end of a word may give other ids beside the cuts.
    """
    start, border = 0, _BORDER if can_cut else _WORD_END
    while len(text) - start > length:
        found = border.search(text, start + length, start + length + MAX_WORD)
        if found is None and len(text) - start <= length + MAX_WORD:
            break
        end = start + length + MAX_WORD if found is None else found.start()
        yield text[start:end]
        start = end
    yield text[start:]


def _batches(items: Iterable[Any], size_of: Callable[[Any], int], batch: int) -> Iterator[list[Any]]:
    """Group consecutive items until their sizes sum to at least `batch`."""
    found: list[Any] = []
    total = 0
    for item in items:
        found.append(item)
        total += size_of(item)
        if total >= batch:
            yield found
            found, total = [], 0
    if found:
        yield found


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
