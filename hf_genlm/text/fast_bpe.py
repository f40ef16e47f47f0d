"""Pre-tokenization patterns, and a second, faster encoder for our tokenizers: tiktoken, with the same ids.

tiktoken encodes a text only where its ids are proved equal to those of the saved tokenizer: by the merges in
the tokenizer's JSON (`ranks_of`), and by the characters that both regex engines classify alike
(`differing_characters`).
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

if TYPE_CHECKING:
    import tiktoken

# Pre-token pattern: no token crosses its borders. After cl100k of tiktoken, with these changes: marks belong
# to their letters (Indic scripts); a space may precede digits; line ends go with the punctuation before and
# the indentation after them, but for the last space, which goes with the word; a run of signs goes on over
# variation selectors, which are marks (emoji), and a digit keeps its keycap. On CPython's library, 4,096
# tokens: 3.71 bytes per token, cl100k's pattern 3.44, GPT-2's 3.46.
_INDENT = r"(?:[ \t]+(?=[ \t]\S))?"
_SELECTOR, _KEYCAP = "\ufe00-\ufe0f", "\u20e3"
_EMOJI = (
    rf" ?(?:[^\s\p{{L}}\p{{M}}\p{{N}}]+[{_SELECTOR}]|[0-9][{_SELECTOR}]?{_KEYCAP})"
    rf"(?:[^\s\p{{L}}\p{{M}}\p{{N}}]|[{_SELECTOR}{_KEYCAP}])*",
)
_WORDS = (r"'(?i:[sdmt]|ll|ve|re)", r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+", r" ?\p{N}{1,3}")
_REST = (
    rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+(?:[\r\n]+{_INDENT})?",
    rf"\s*[\r\n]+{_INDENT}",
    r"\s+(?!\S)",
    r"\s+",
)
# our own pattern, and that of tokenizers saved before it knew emoji -> the same for tiktoken, whose engine is
# a quarter faster if the alternatives without lookahead form one group
GROUPED_PATTERNS = {
    "|".join((*words, *_REST)): "|".join((f"(?:{'|'.join(words)})", *_REST))
    for words in ((*_EMOJI, *_WORDS), _WORDS)
}
PATTERN, *_ = GROUPED_PATTERNS
# recipe word -> pattern. Those of GPT-2 and Qwen3.5 are for models that llama.cpp is to run, which knows them
# by name; on CPython's library, 4,096 tokens, they give 9 % more tokens than our own.
PATTERNS = {
    "own": PATTERN,
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "qwen35": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

# joins texts and is encoded as one token, at which their ids are split; a text that holds it is refused
BORDER = "\0<|border|>\0"
MAX_PIECE = 1 << 19  # characters: the stack of tiktoken's regex engine overflows at a million spaces
# every character class and case folding of the pattern; the last one matches no single character
CLASSES = (
    r"[\p{L}\p{M}]",
    r"\p{N}",
    r"\s",
    r"(?i:[sdmt])",
    r"(?i:l)",
    r"(?i:v)",
    r"(?i:e)",
    r"(?i:r)",
    r"(?i:ll|ve|re)",
    rf"[{_SELECTOR}{_KEYCAP}]",
)
_SAME, _DIFFERS = 1, 2
MAX_WORD = 1 << 10  # characters of a pre-token of the text that trains a tokenizer: a longer one is cut
MAX_TOKEN = 128  # bytes of a token, which a run of one character would fill with tokens of any length
_MAX_CHECKS = 1 << 25  # pairs of bytes looked at to prove that ids are equal, some seconds
_N_CODE_POINTS = 0x110000


def pre_tokenizer(pattern: str = PATTERN) -> pre_tokenizers.PreTokenizer:
    """Pre-tokenizer of our own tokenizers."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def bounded(pattern: str) -> str:
    """`pattern` whose matches are at most about MAX_WORD characters long, and otherwise the same.

    Training takes time with the square of a pre-token's length.
    """
    return re.sub(r"(?<!\\)([+*])", lambda found: f"{{{int(found[1] == '+')},{MAX_WORD}}}", pattern)


class FastBPE:
    """Encodes texts by tiktoken with `ranks` and `pattern`, without special tokens.

    `encode` may be called from several threads at once, `can_encode` may not.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str):
        import tiktoken

        self._border_id = max(ranks.values()) + 1
        self._encoding = tiktoken.Encoding(
            "hf_genlm", pat_str=pattern, mergeable_ranks=ranks, special_tokens={BORDER: self._border_id}
        )
        self._engines = [class_engines(pattern) for pattern in CLASSES]
        self._known = np.zeros(_N_CODE_POINTS, dtype=np.uint8)  # _SAME or _DIFFERS of the characters met
        self._learn(np.arange(128))

    def can_encode(self, text: str) -> bool:
        """True if the ids of `text` are proved equal to those of the saved tokenizer."""
        if len(text) > MAX_PIECE or BORDER in text:
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
        joined = BORDER.join(texts)
        ids = self._encoding.encode_to_numpy(joined, allowed_special={BORDER}, disallowed_special=())
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
    """`FastBPE` of a tokenizer whose pre-tokenizer splits by `pattern`; None if its ids might differ."""
    ranks = ranks_of(json.loads(backend.to_str()))
    return None if ranks is None else FastBPE(ranks, pattern)


def ranks_of(state: Mapping[str, Any]) -> dict[bytes, int] | None:
    """Ranks for tiktoken, bytes -> id, from a tokenizer's JSON; None if ranks would give other ids.

    The saved tokenizer merges the adjacent pair that comes first in its list of merges; tiktoken the pair
    whose joined bytes are the token of the lowest id. Sufficient for equal ids is that

    1. every byte is a token, every merge makes a token of its parts' bytes, and the merges that make a token
       for the first time are ordered by the ids that they make;
    2. tiktoken, run on the bytes of each such token with lower ids alone, arrives at the two parts of that
       merge.

    Proof: suppose both have done the same so far, and tiktoken joins x and y to the token of id k. As x and y
    cover the bytes of that token, no merge has crossed its borders, and those inside were what tiktoken does
    on these bytes alone: each was the lowest of all, hence the lowest inside. Were one of an id above k among
    them, the run of 2. would have stopped before it, with more than two parts. So x and y are the parts of
    2., which is a merge of the list, and by 1. the first of those that apply, the leftmost too: the saved
    tokenizer does the same. Where tiktoken finds nothing to join, the list has no pair either. (A second
    merge that makes the same token comes later in the list than the first, and is never applied.) A token
    that is a whole word is found by 2. as well as by looking it up, so `ignore_merges` does not matter;
    tokens that no merge makes are special or never used, and are left out.
    """
    model = state["model"]
    if model["type"] != "BPE" or any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        return None
    byte_of = byte_of_letter()
    vocab: dict[str, int] = model["vocab"]
    if not all(letter in vocab for letter in byte_of):
        return None
    ranks = {bytes([byte]): vocab[letter] for letter, byte in byte_of.items()}
    last, pairs = -1, set()
    if sum(len(token) ** 2 for token in vocab) > _MAX_CHECKS:  # long tokens, or very many
        return None
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
    """Those of `characters` that the two regex engines, which follow different versions of Unicode, classify
    differently."""
    apart = "\n".join(characters)
    different: set[str] = set()
    for ours, theirs in engines:
        found = bytes(ours.encode_ordinary(apart)).decode("utf-8")
        saved = "".join(word for word, _ in theirs.pre_tokenize_str(apart))
        different |= set(found) ^ set(saved)
    return different


def class_engines(pattern: str) -> "tuple[tiktoken.Encoding, pre_tokenizers.PreTokenizer]":
    """Both regex engines, set up to keep what matches `pattern` and drop the rest."""
    import tiktoken

    ranks = {bytes([byte]): byte for byte in range(256)}
    ours = tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return ours, pre_tokenizers.Split(Regex(pattern), "removed", invert=True)


def _merged(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, ...]:
    """Merge `token` as tiktoken does: the pair of the lowest rank first, the leftmost of equal ones."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def byte_of_letter() -> dict[str, int]:
    """Letter -> byte of a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
