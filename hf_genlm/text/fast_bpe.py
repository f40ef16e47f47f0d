"""Pre-tokenization patterns, and a second, faster encoder for our tokenizers: tiktoken, with the same ids.

tiktoken encodes a text only where its ids are proved equal to those of the saved tokenizer: by the merges in
the tokenizer's JSON (`ranks_of`), and by the characters that both regex engines classify alike
(`differing_characters`).
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

if TYPE_CHECKING:
    import tiktoken

# What a token may not cross. After cl100k of tiktoken, with these changes: marks belong to their letters
# (Indic scripts); a space may precede digits; line ends go with the punctuation before and the indentation
# after them, but for the last space, which goes with the word. On CPython's library, 4,096 tokens: 3.71 bytes
# a token, cl100k's pattern 3.44, GPT-2's 3.46.
_INDENT = r"(?:[ \t]+(?=[ \t]\S))?"
_WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)",
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",
    r" ?\p{N}{1,3}",
)
_REST = (
    rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+(?:[\r\n]+{_INDENT})?",
    rf"\s*[\r\n]+{_INDENT}",
    r"\s+(?!\S)",
    r"\s+",
)
PATTERN = "|".join((*_WORDS, *_REST))
# recipe word -> what a token may not cross. Those of GPT-2 and Qwen3.5 are for models that llama.cpp is to
# run, which knows them by name; of CPython's library, 4,096 tokens: 9 % more tokens than by our own.
PATTERNS = {
    "own": PATTERN,
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "qwen35": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
# the own one, but tiktoken's engine is a quarter faster when what looks at nothing ahead stands in one group
GROUPED_PATTERN = "|".join((f"(?:{'|'.join(_WORDS)})", *_REST))

# Documents are joined by this word, which is encoded as a token of its own, and parted again at that token.
# A text that holds it is left to the other engine.
_BORDER = "\0<|border|>\0"
# tiktoken's regex engine keeps a stack that a million spaces overflow: longer pieces are left to the other
MAX_PIECE = 1 << 19  # characters
# every class and fold of case that the pattern asks for; the last one matches no single character
_CLASSES = (
    r"[\p{L}\p{M}]",
    r"\p{N}",
    r"\s",
    r"(?i:[sdmt])",
    r"(?i:l)",
    r"(?i:v)",
    r"(?i:e)",
    r"(?i:r)",
    r"(?i:ll|ve|re)",
)
_SAME, _DIFFERS = 1, 2
_N_CODE_POINTS = 0x110000


def pre_tokenizer(pattern: str = PATTERN) -> pre_tokenizers.PreTokenizer:
    """What cuts a text into words for a tokenizer that is trained here."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


class FastBPE:
    """Encodes texts as the tokenizer that `ranks` and `pattern` are of, without special tokens.

    May be called from several threads at once, but for `can_encode`.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str):
        import tiktoken

        self._border_id = max(ranks.values()) + 1
        self._encoding = tiktoken.Encoding(
            "hf_genlm",
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens={_BORDER: self._border_id},
        )
        self._engines = [_class_engines(pattern) for pattern in _CLASSES]
        self._known = np.zeros(_N_CODE_POINTS, dtype=np.uint8)  # _SAME or _DIFFERS of the characters met
        self._learn(np.arange(128))

    def can_encode(self, text: str) -> bool:
        """True if the ids of `text` are sure to be those of the saved tokenizer."""
        if len(text) > MAX_PIECE or _BORDER in text:
            return False
        if text.isascii() and not self._ascii_differs:
            return True
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        kinds = self._known[codes]
        if (kinds == 0).any():
            self._learn(np.unique(codes[kinds == 0]))
            kinds = self._known[codes]
        return bool((kinds == _SAME).all())

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, each (n,) uint32."""
        if not texts:
            return []
        joined = _BORDER.join(texts)
        ids = self._encoding.encode_to_numpy(joined, allowed_special={_BORDER}, disallowed_special=())
        ends = np.flatnonzero(ids == self._border_id)
        starts = np.concatenate([[0], ends + 1])
        return [ids[a:b] for a, b in zip(starts, [*ends, len(ids)], strict=True)]

    def _learn(self, codes: np.ndarray) -> None:
        codes = codes[(codes < 0xD800) | (codes > 0xDFFF)]
        self._known[codes] = _SAME
        different = differing_characters("".join(map(chr, codes)), self._engines)
        self._known[[ord(character) for character in different]] = _DIFFERS
        self._ascii_differs = bool((self._known[:128] != _SAME).any())


def fast_bpe_of(backend: Tokenizer, pattern: str) -> FastBPE | None:
    """The second engine for `backend`, whose pre-tokenizer splits by `pattern`; None where its ids might
    differ."""
    ranks = ranks_of(json.loads(backend.to_str()))
    return None if ranks is None else FastBPE(ranks, pattern)


def ranks_of(state: Mapping[str, Any]) -> dict[bytes, int] | None:
    """Rank of each token by its bytes, from a tokenizer's JSON; None where ranks would give other ids.

    The saved tokenizer merges the adjacent pair that stands first in its list of merges; tiktoken the pair
    whose joined bytes are the token of the lowest id. Sufficient for equal ids is that

    1. every byte is a token, every merge makes a token of its parts' bytes, and the merges that make a token
       for the first time stand in the order of the ids they make;
    2. tiktoken, run on the bytes of each such token with lower ids alone, arrives at the two parts of that
       merge.

    For suppose both have done the same so far, and tiktoken joins x and y to the token of id k. Since x and y
    cover the bytes of that token, no merge has crossed its borders, and those inside were what tiktoken does
    on these bytes alone: each was the lowest of all, hence the lowest inside. Were one of an id above k among
    them, the run of 2. would have stopped before it, with more than two parts. So x and y are the parts of
    2., which is a merge of the list, and by 1. the first of those that apply, the leftmost too: the saved
    tokenizer does the same. Where tiktoken finds nothing to join there is no pair of the list either. (A
    second merge that makes the same token stands later in the list than the first, and never comes first.)
    A token that is a whole word is found by 2. as well as by looking it up, so `ignore_merges` does not
    matter; tokens that no merge makes are special ones or never used, and are left out.
    """
    model = state["model"]
    if model["type"] != "BPE" or any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        return None
    byte_of = _byte_of_letter()
    vocab: dict[str, int] = model["vocab"]
    if not all(letter in vocab for letter in byte_of):
        return None
    ranks = {bytes([byte]): vocab[letter] for letter, byte in byte_of.items()}
    last, pairs = -1, set()
    for merge in model["merges"]:
        left, right = merge if isinstance(merge, (list, tuple)) else merge.split(" ")
        rank = vocab.get(left + right)
        if rank is None or (left, right) in pairs or not set(left + right) <= byte_of.keys():
            return None
        pairs.add((left, right))
        joined = bytes(byte_of[letter] for letter in left + right)
        if joined in ranks:
            continue
        parts = (bytes(byte_of[letter] for letter in left), bytes(byte_of[letter] for letter in right))
        # so far `ranks` holds single bytes and lower ids alone
        if rank <= last or _merged(joined, ranks) != parts:
            return None
        ranks[joined] = last = rank
    return ranks if len(set(ranks.values())) == len(ranks) else None


def differing_characters(
    characters: str, engines: "Sequence[tuple[tiktoken.Encoding, pre_tokenizers.PreTokenizer]]"
) -> set[str]:
    """Those of `characters` that the two regex engines, which follow different versions of Unicode, put in
    different classes."""
    apart = "\n".join(characters)
    different: set[str] = set()
    for ours, theirs in engines:
        found = bytes(ours.encode_ordinary(apart)).decode("utf-8")
        saved = "".join(word for word, _ in theirs.pre_tokenize_str(apart))
        different |= set(found) ^ set(saved)
    return different


def _class_engines(pattern: str) -> "tuple[tiktoken.Encoding, pre_tokenizers.PreTokenizer]":
    """Both engines, made so that what matches `pattern` is kept and all else is dropped."""
    import tiktoken

    ranks = {bytes([byte]): byte for byte in range(256)}
    ours = tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return ours, pre_tokenizers.Split(Regex(pattern), "removed", invert=True)


def _merged(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, ...]:
    """What tiktoken makes of `token` by `ranks`: the pair of the lowest rank first, the leftmost of equal
    ones."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def _byte_of_letter() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's table), and its byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
