"""How much of some texts stands word for word in a larger one, as the one that a model was trained on.

The larger text is read once, a part at a time, and looked up among what the texts hold: memory does not grow
with it. Nothing is hashed. A span of 2^k tokens is known by the numbers of its two halves, so two spans have
the same number where all their tokens are the same; one of any other length L is two of 2^floor(log2 L) that
overlap.

Source of the figures: McCoy et al., How Much Do Language Models Copy From Their Training Data?, TACL 2023,
whose novelty is 1 - the share here.

Legend of shapes: N tokens of all texts together and one place behind each text, T tokens of a part that is
read.
"""

from array import array
from collections.abc import Hashable, Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.evaluation.figure import Figure
from hf_genlm.evaluation.measurement import ratio_stderr
from hf_genlm.evaluation.ngrams import Tokens
from hf_genlm.evaluation.words import words_of, words_of_parts

LENGTHS = (1, 2, 4, 8, 16, 32)
_BUFFER = 1 << 18  # tokens of the larger text that are looked up at once
_NONE = -1  # the number of what no text holds, and of the place behind a text


class Overlap(NamedTuple):
    """What was found: the share of the spans of each length that a text has, and the longest one."""

    shares: dict[int, Figure]
    longest: list[Hashable]


class SpanCounter:
    """Remembers which spans of `texts` it has read in the larger text, of `lengths` and the longest.

    Texts are sequences of words or of token ids, as is what is read.

    Raises:
        UserError: a length is less than 1.
    """

    def __init__(self, texts: Sequence[Tokens], lengths: Sequence[int] = LENGTHS):
        if min(lengths, default=1) < 1:
            raise UserError(f"lengths of {min(lengths)}: a span has at least 1 word")
        self._texts = [list(text) for text in texts]
        self._numbers: dict[Hashable, int] = {}
        sizes = [len(text) for text in self._texts]
        own = array("q")
        for text in self._texts:
            own.extend(self._numbers.setdefault(token, len(self._numbers)) for token in text)
            own.append(_NONE)
        self._owner = np.repeat(np.arange(len(sizes)), np.array(sizes, dtype=np.int64) + 1)
        self._most = max(sizes, default=0)
        # the k-th numbers spans of 2^(k + 1) by their halves; the k-th level, (N,): those of 2^k, by place
        self._doublings: list[_Numbering] = []
        self._levels = [np.array(own, dtype=np.int64)]
        while 2 << len(self._doublings) <= self._most:
            pairs = _pairs(self._levels[-1], 1 << len(self._doublings))
            self._doublings.append(_Numbering(pairs))
            self._levels.append(self._doublings[-1].numbers_of(pairs))
        self._others: dict[int, _Numbering] = {}  # of spans of other lengths than powers of two
        self._seen = {n: self._unseen(n) for n in lengths if n <= self._most}  # by number
        self._longest, self._longest_at = 0, 0
        self._buffer, self._kept = array("q"), np.zeros(0, dtype=np.int64)

    def read(self, tokens: Iterable[Hashable]) -> None:
        """Go on with the larger text."""
        self._buffer.extend(map(self._numbers.get, tokens, repeat(_NONE)))
        if len(self._buffer) >= _BUFFER:
            self._look_up()

    def end_text(self) -> None:
        """What is read next begins a text of its own: no span reaches over from here."""
        self._buffer.append(_NONE)

    def share(self, length: int) -> Figure | None:
        """The share of the texts' spans of `length` tokens that were read.

        A span that they hold twice counts twice. The standard error is clustered by text.

        Returns:
            The share and the number of spans; None where no text is so long.
        """
        self._look_up()
        if length > self._most:
            return None
        own = self._numbers_of(self._levels, length)
        places, m = own != _NONE, len(self._texts)
        totals = np.bincount(self._owner[places], minlength=m)
        found = np.bincount(self._owner[places], self._seen[length][own[places]], m)
        is_long = totals > 0
        if not is_long.any():
            return None
        stderr = ratio_stderr(found[is_long], totals[is_long])
        return Figure(float(found.sum() / totals.sum()), int(totals.sum()), stderr)

    def longest(self) -> list[Hashable]:
        """The longest span of any text that was read; one of several as long."""
        self._look_up()
        if not self._longest:
            return []
        text = int(self._owner[self._longest_at])
        begin = self._longest_at - int(np.searchsorted(self._owner, text))
        return self._texts[text][begin : begin + self._longest]

    def _look_up(self) -> None:
        if not len(self._buffer):
            return
        levels_T = [np.concatenate([self._kept, np.array(self._buffer, dtype=np.int64)])]
        for k, doubling in enumerate(self._doublings):
            if not (levels_T[-1] != _NONE).any():
                break
            levels_T.append(doubling.numbers_of(_pairs(levels_T[-1], 1 << k)))
        for length, seen in self._seen.items():
            seen[self._numbers_of(levels_T, length)] = True
        self._look_for_longer(levels_T)
        self._kept = levels_T[0][max(0, len(levels_T[0]) - self._most + 1) :]  # a span may go on from there
        self._buffer = array("q")

    def _look_for_longer(self, levels_T: list[np.ndarray]) -> None:
        """Longer than the longest so far; where there is one, by bisection: its beginnings are there too."""
        low, high = self._longest, min(self._most, (1 << len(levels_T)) - 1)
        length = low + 1
        while low < high:
            numbers = self._numbers_of(levels_T, length)
            found = numbers[numbers != _NONE]
            if len(found):
                low = length
                self._longest = length
                self._longest_at = int(np.argmax(self._numbers_of(self._levels, length) == found[0]))
            else:
                high = length - 1
            length = (low + high + 1) // 2

    def _numbers_of(self, levels: list[np.ndarray], length: int) -> np.ndarray:
        """Numbers of the spans of `length` by place: of the texts' own, or of what is read."""
        k = length.bit_length() - 1
        offset = length - (1 << k)
        if k >= len(levels):
            return np.zeros(0, dtype=np.int64)
        if not offset:
            return levels[k]
        if length not in self._others:
            self._others[length] = _Numbering(_pairs(self._levels[k], offset))
        return self._others[length].numbers_of(_pairs(levels[k], offset))

    def _unseen(self, length: int) -> np.ndarray:
        """Room for every number and, last, for `_NONE`."""
        return np.zeros(int(self._numbers_of(self._levels, length).max()) + 2, dtype=bool)


def count_overlap(
    texts: Sequence[str], larger: Iterable[str | tuple[int, str]], lengths: Sequence[int] = LENGTHS
) -> Overlap:
    """How much of `texts` stands in `larger`, in spans of words (see `words`).

    Args:
        larger: its texts, or (number of the text, part of it) in order. They are read once.
    """
    counter = SpanCounter([words_of(text) for text in texts], lengths)
    read_texts([counter], larger)
    figures = {length: counter.share(length) for length in lengths}
    return Overlap({length: f for length, f in figures.items() if f is not None}, counter.longest())


def read_texts(counters: Sequence[SpanCounter], texts: Iterable[str | tuple[int, str]]) -> None:
    """Let `counters` read the words of texts, or of (number of the text, part of it) in order."""
    number = None
    for text, words in words_of_parts(texts):
        for counter in counters:
            if number is not None and text != number:
                counter.end_text()
            counter.read(words)
        number = text
    for counter in counters:
        counter.end_text()


class _Numbering:
    """Numbers for the keys that occur, in their order."""

    def __init__(self, keys: np.ndarray):
        self._keys = np.unique(keys[keys != _NONE])

    def numbers_of(self, keys: np.ndarray) -> np.ndarray:
        """The number of each key (T,), `_NONE` for one that is unknown."""
        numbers = np.full(len(keys), _NONE, dtype=np.int64)
        if not len(self._keys):
            return numbers
        places = np.flatnonzero(keys != _NONE)
        at = np.minimum(np.searchsorted(self._keys, keys[places]), len(self._keys) - 1)
        is_known = self._keys[at] == keys[places]
        numbers[places[is_known]] = at[is_known]
        return numbers


def _pairs(numbers: np.ndarray, offset: int) -> np.ndarray:
    """A key for each number (below 2^31) and the one `offset` places on, `_NONE` where either is."""
    keys = np.full(len(numbers), _NONE, dtype=np.int64)
    if offset >= len(numbers):
        return keys
    left, right = numbers[: len(numbers) - offset], numbers[offset:]
    places = np.flatnonzero((left != _NONE) & (right != _NONE))
    keys[places] = (left[places] << 31) | right[places]
    return keys
