"""Statistics of texts: words, diversity of n-grams, and overlap with a training text.

Words. A word is a run of characters between spaces without the punctuation around it; each punctuation mark,
and each character of a script without spaces between words, is a word of its own. Words depend on the text
alone, so that statistics are comparable across tokenizers. Spaces and line ends are dropped.

Diversity (distinct-n, seq-rep-n, self-BLEU) and overlap count exactly: n-grams are numbered, not hashed.
distinct-n and self-BLEU depend on the number and length of the texts: compare them at equal number and length
only. Overlap is 1 - novelty of McCoy et al., How Much Do Language Models Copy From Their Training Data?, TACL
2023.

Legend of shapes: M texts, N tokens of all texts together, P n-grams of them, E pairs of a text and an n-gram
in it, T tokens of a part of the training text.
"""

import re
from array import array
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import Statistic, jackknife_stderr, mean_statistic, ratio_stderr

Tokens = Sequence[Hashable]  # of one text: words or token ids
SPAN_LENGTHS = (1, 2, 4, 8, 16, 32)
# blocks of scripts without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han
_UNSPACED = (
    r"\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf"
    r"\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# ASCII but _, Latin-1, Armenian, Hebrew, Arabic, Devanagari, Tibetan, Ethiopic, general, CJK and full-width
# punctuation. The letters of many scripts are joined by marks that `\w` does not hold, so what is no word is
# listed, and not what is.
_MARKS = (
    r"!-/:-@\[-^`{-~\xa1-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf\xd7\xf7\u055a-\u055f\u0589\u058a\u05be\u05c0\u05c3"
    r"\u060c\u061b\u061f\u06d4\u0964\u0965\u0f08-\u0f14\u1361-\u1368\u2010-\u2027\u2030-\u205e\u2e00-\u2e7f"
    r"\u3001-\u3003\u3008-\u3020\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_WORD = re.compile(rf"[^\s{_MARKS}{_UNSPACED}]+|\S")
_MAX_CHARACTERS = 1 << 20  # of a text that are split at once
_MAX_WORD = 1 << 13  # characters: a longer word may be cut where a part ends
_NO_MATCH = 0.1  # matches that nltk's smoothing method 1 assumes instead of none
_NONE = -1  # number of a span that no text has, and of the end of a text


def split_words(text: str) -> list[str]:
    """The words of `text` in order."""
    return _WORD.findall(text)


def split_words_of_parts(texts: Iterable[str | tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    """Split texts that need not fit in memory.

    Args:
        texts: whole texts, or (number of the text, part of it) in reading order.

    Yields:
        (number of the text, some of its words); concatenated, they are the words of the whole text, but for
        words of more than 8,192 characters, which may be cut.
    """
    number, unfinished = -1, ""
    for i, item in enumerate(texts):
        text_number, text = item if isinstance(item, tuple) else (i, item)
        if text_number != number and unfinished:
            yield number, [unfinished]
            unfinished = ""
        number = text_number
        for start in range(0, len(text), _MAX_CHARACTERS):
            part = unfinished + text[start : start + _MAX_CHARACTERS]
            words = split_words(part)
            # the last word may continue in the next part
            is_open = bool(words) and not part[-1].isspace() and len(words[-1]) <= _MAX_WORD
            unfinished = words.pop() if is_open else ""
            if words:
                yield number, words
    if unfinished:
        yield number, [unfinished]


class _NGrams(NamedTuple):
    """N-grams of texts in reading order: equal `ids` for equal ones, the index `owner` of the text, and the
    place `at` of the first token among all tokens; (P,) each."""

    ids: np.ndarray
    owner: np.ndarray
    at: np.ndarray


def _number_ngrams(texts: Sequence[Tokens], max_n: int) -> list[_NGrams]:
    """Number the n-grams of `texts` for n = 1..`max_n`; none crosses the end of a text."""
    if max_n < 1:
        raise UserError(f"n = {max_n}: an n-gram has at least 1 token")
    numbers: dict[Hashable, int] = {}
    ids = np.fromiter((numbers.setdefault(t, len(numbers)) for text in texts for t in text), dtype=np.int64)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    found = [_NGrams(ids, owner, np.arange(len(ids)))]
    for n in range(2, max_n + 1):
        shorter = found[-1]
        extended = np.flatnonzero(shorter.at + n - 1 < len(ids))
        extended = extended[owner[shorter.at[extended] + n - 1] == shorter.owner[extended]]
        at = shorter.at[extended]
        key = shorter.ids[extended] * (len(ids) + 1) + ids[at + n - 1]
        found.append(_NGrams(np.unique(key, return_inverse=True)[1], shorter.owner[extended], at))
    return found


def _count_by_text(ngrams: _NGrams) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(text, n-gram, count), (E,) each, sorted by text."""
    size = int(ngrams.ids.max(initial=0)) + 1
    pairs, counts = np.unique(ngrams.owner * size + ngrams.ids, return_counts=True)
    return pairs // size, pairs % size, counts


def distinct_n(texts: Sequence[Tokens], n: int) -> Statistic | None:
    """distinct-n: number of different n-grams over number of n-grams, of all texts together.

    Source: Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models, NAACL 2016.
    The standard error is the jackknife's over texts, which is rather too large than too small (Efron and
    Stein, 1981).

    Returns:
        The ratio and the number of n-grams; None if no text has n tokens.
    """
    ngrams = _number_ngrams(texts, n)[-1]
    if not len(ngrams.ids):
        return None
    text_E, ngram_E, _ = _count_by_text(ngrams)
    n_owners = np.bincount(ngram_E)
    lengths = np.bincount(ngrams.owner, minlength=len(texts))
    only_here = np.bincount(text_E[n_owners[ngram_E] == 1], minlength=len(texts))
    n_distinct, total = len(n_owners), len(ngrams.ids)
    not_empty = np.flatnonzero(lengths)
    stderr = None
    if len(not_empty) > 1:
        leave_one_out = (n_distinct - only_here) / (total - lengths).clip(min=1)
        stderr = jackknife_stderr(leave_one_out[not_empty])
    return Statistic(n_distinct / total, total, stderr)


def repetition(texts: Sequence[Tokens], n: int) -> Statistic | None:
    """seq-rep-n: 1 - (different n-grams) / (n-grams) of a text, averaged over texts with n tokens or more.

    Source: Welleck et al., Neural Text Generation with Unlikelihood Training, ICLR 2020 (n = 4 there).

    Returns:
        The mean and the number of texts; None if no text has n tokens.
    """
    ngrams = _number_ngrams(texts, n)[-1]
    lengths = np.bincount(ngrams.owner, minlength=len(texts))
    is_long = lengths > 0
    if not is_long.any():
        return None
    text_E, _, _ = _count_by_text(ngrams)
    return mean_statistic(1 - np.bincount(text_E, minlength=len(texts))[is_long] / lengths[is_long])


def self_bleu(texts: Sequence[Tokens], n: int = 4) -> Statistic | None:
    """self-BLEU-n: the mean over texts of the BLEU (0 to 1) of each text with all others as references.

    Source: Zhu et al., Texygen: A Benchmarking Platform for Text Generation Models, SIGIR 2018. As there,
    BLEU is nltk's `sentence_bleu` with equal weights of the orders 1..n and smoothing method 1 (sacrebleu
    smooths differently). The standard error is the jackknife's over texts: each text is left out as a
    hypothesis and as a reference, which takes M^2 values of BLEU from counts that are shared.

    Returns:
        The mean and the number of texts; None for fewer than two. With two there is no standard error.
    """
    m = len(texts)
    if m < 2:
        return None
    matches = [_ClippedMatches(ngrams, m) for ngrams in _number_ngrams(texts, n)]
    lengths = np.array([len(text) for text in texts])
    scores = np.zeros(m)  # (M,) of each text
    sums_without = np.zeros(m)  # (M,) over the other texts, when a text is left out
    for i in range(m):
        # reference lengths closest to the text's own, the shorter of two as close, and the next closest
        order = np.lexsort((lengths, np.abs(lengths - lengths[i])))
        closest, next_closest = order[order != i][[0, min(1, m - 2)]]
        closest_K = np.full(m + 1, lengths[closest])  # K = M + 1: without each text, and last without none
        closest_K[closest] = lengths[next_closest]
        matches_nK = np.stack([of_order.without_each(i) for of_order in matches])
        totals = np.maximum(1, lengths[i] - np.arange(n))
        bleu_K = _bleu(matches_nK, totals, lengths[i], closest_K)
        scores[i] = bleu_K[-1]
        bleu_K[i] = 0
        sums_without += bleu_K[:-1]
    stderr = jackknife_stderr(sums_without / (m - 1)) if m > 2 else None
    return Statistic(float(scores.mean()), m, stderr)


class _ClippedMatches:
    """Clipped matches of each text with all others, and with all others but one.

    An n-gram with count c in text i counts min(c, the maximum of its counts in other texts). Only leaving out
    the text with that maximum lowers it, to the next highest count.
    """

    def __init__(self, ngrams: _NGrams, n_texts: int):
        text, ngram, counts = _count_by_text(ngrams)
        # each n-gram's run begins with the texts that have it most often
        order = np.lexsort((-counts, ngram))
        first = np.searchsorted(ngram[order], ngram)
        holders, highest = [], []
        for rank in range(3):
            at = np.minimum(first + rank, len(order) - 1)
            is_there = (ngram[order[at]] == ngram) & (first + rank < len(order))
            holders.append(np.where(is_there, text[order[at]], -1))
            highest.append(np.where(is_there, counts[order[at]], 0))
        is_first, is_second = holders[0] == text, holders[1] == text
        self._holder = np.where(is_first, holders[1], holders[0])
        matched = np.minimum(counts, np.where(is_first, highest[1], highest[0]))
        next_highest = np.where(is_first | is_second, highest[2], highest[1])
        self._loss = matched - np.minimum(counts, next_highest)
        self._bounds = np.searchsorted(text, np.arange(n_texts + 1))
        self._whole = np.bincount(text, matched, n_texts)
        self._n_texts = n_texts

    def without_each(self, i: int) -> np.ndarray:
        """(M + 1,) matches of text i without each text, and last without none."""
        part = slice(self._bounds[i], self._bounds[i + 1])
        is_held = self._holder[part] >= 0
        losses = np.bincount(self._holder[part][is_held], self._loss[part][is_held], self._n_texts + 1)
        return self._whole[i] - losses


def _bleu(matches_nK: np.ndarray, totals_n: np.ndarray, length: int, closest_K: np.ndarray) -> np.ndarray:
    """BLEU (K,) of one hypothesis for K sets of references, whose closest lengths are `closest_K`."""
    if length == 0:
        return np.zeros(len(closest_K))
    precisions = np.where(matches_nK == 0, _NO_MATCH, matches_nK) / totals_n[:, None]
    brevity = np.exp(np.minimum(0.0, 1 - closest_K / length))
    return np.where(matches_nK[0] == 0, 0.0, brevity * np.exp(np.log(precisions).mean(axis=0)))


class SpanMatcher:
    """Find which spans of `texts` occur in a larger text, which is read once in parts: bounded memory.

    A span of 2^k tokens is numbered by the numbers of its two halves, so that two spans have the same number
    if and only if all their tokens are equal. A span of another length L is numbered by two overlapping spans
    of 2^floor(log2 L).

    Args:
        texts: sequences of words or token ids, as is the larger text.
        lengths: lengths of the spans for `share`.
        buffer_size: tokens of the larger text that are looked up at once. Changes no result.

    Raises:
        UserError: a length is less than 1.
    """

    def __init__(
        self, texts: Sequence[Tokens], lengths: Sequence[int] = SPAN_LENGTHS, buffer_size: int = 1 << 18
    ):
        if min(lengths, default=1) < 1:
            raise UserError(f"lengths of {min(lengths)}: a span has at least 1 word")
        self._texts = [list(text) for text in texts]
        self._numbers: dict[Hashable, int] = {}
        sizes = [len(text) for text in self._texts]
        own = array("q")  # tokens of all texts, with _NONE after each text
        for text in self._texts:
            own.extend(self._numbers.setdefault(token, len(self._numbers)) for token in text)
            own.append(_NONE)
        self._owner = np.repeat(np.arange(len(sizes)), np.array(sizes, dtype=np.int64) + 1)
        self._max_length = max(sizes, default=0)
        # _levels[k]: number of the span of 2^k that begins at each place; _doublings[k] makes level k + 1
        self._doublings: list[np.ndarray] = []
        self._levels = [np.array(own, dtype=np.int64)]
        while 2 << len(self._doublings) <= self._max_length:
            pairs = _pair_keys(self._levels[-1], 1 << len(self._doublings))
            self._doublings.append(_known(pairs))
            self._levels.append(_numbers_of(pairs, self._doublings[-1]))
        self._other_lengths: dict[int, np.ndarray] = {}  # not a power of two
        self._is_seen = {  # by number; the last place is for _NONE
            n: np.zeros(int(self._span_numbers(self._levels, n).max()) + 2, dtype=bool)
            for n in lengths
            if n <= self._max_length
        }
        self._longest, self._longest_at = 0, 0
        self._buffer_size = buffer_size
        self._buffer, self._last_tokens = array("q"), np.zeros(0, dtype=np.int64)

    def read(self, tokens: Iterable[Hashable]) -> None:
        """Read the next tokens of the larger text."""
        self._buffer.extend(map(self._numbers.get, tokens, repeat(_NONE)))
        if len(self._buffer) >= self._buffer_size:
            self._look_up()

    def end_text(self) -> None:
        """End a document of the larger text: no span crosses this place."""
        self._buffer.append(_NONE)

    def share(self, length: int) -> Statistic | None:
        """The share of the texts' spans of `length` tokens that occur in what was read.

        Repeated spans count repeatedly. The standard error is clustered by text.

        Returns:
            The share and the number of spans; None if no text is long enough.
        """
        self._look_up()
        if length > self._max_length:
            return None
        own = self._span_numbers(self._levels, length)
        places, m = own != _NONE, len(self._texts)
        totals = np.bincount(self._owner[places], minlength=m)
        found = np.bincount(self._owner[places], self._is_seen[length][own[places]], m)
        is_long = totals > 0
        if not is_long.any():
            return None
        stderr = ratio_stderr(found[is_long], totals[is_long])
        return Statistic(float(found.sum() / totals.sum()), int(totals.sum()), stderr)

    def longest(self) -> list[Hashable]:
        """The longest span of any text that was read; one of several with this length."""
        self._look_up()
        if not self._longest:
            return []
        text = int(self._owner[self._longest_at])
        begin = self._longest_at - int(np.searchsorted(self._owner, text))
        return self._texts[text][begin : begin + self._longest]

    def _look_up(self) -> None:
        """Look up the spans that end in the buffer, and empty it."""
        if not len(self._buffer):
            return
        levels_T = [np.concatenate([self._last_tokens, np.array(self._buffer, dtype=np.int64)])]
        for k, doubling in enumerate(self._doublings):
            if not (levels_T[-1] != _NONE).any():
                break
            levels_T.append(_numbers_of(_pair_keys(levels_T[-1], 1 << k), doubling))
        for length, is_seen in self._is_seen.items():
            is_seen[self._span_numbers(levels_T, length)] = True
        # bisect for a span longer than the longest so far: where there is one, its prefixes are found too
        low, high = self._longest, min(self._max_length, (1 << len(levels_T)) - 1)
        length = low + 1
        while low < high:
            numbers = self._span_numbers(levels_T, length)
            found = numbers[numbers != _NONE]
            if len(found):
                low = self._longest = length
                self._longest_at = int(np.argmax(self._span_numbers(self._levels, length) == found[0]))
            else:
                high = length - 1
            length = (low + high + 1) // 2
        self._last_tokens = levels_T[0][max(0, len(levels_T[0]) - self._max_length + 1) :]
        self._buffer = array("q")

    def _span_numbers(self, levels: list[np.ndarray], length: int) -> np.ndarray:
        """Numbers of the spans of `length` by place, from the levels of the texts or of what is read."""
        k = length.bit_length() - 1
        offset = length - (1 << k)
        if k >= len(levels):
            return np.zeros(0, dtype=np.int64)
        if not offset:
            return levels[k]
        if length not in self._other_lengths:
            self._other_lengths[length] = _known(_pair_keys(self._levels[k], offset))
        return _numbers_of(_pair_keys(levels[k], offset), self._other_lengths[length])


def _known(keys: np.ndarray) -> np.ndarray:
    """The keys that occur, in ascending order: the place of a key is its number."""
    return np.unique(keys[keys != _NONE])


def _numbers_of(keys: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The number of each key (T,) among those of `_known`, `_NONE` for an unknown one."""
    numbers = np.full(len(keys), _NONE, dtype=np.int64)
    if len(known):
        places = np.flatnonzero(keys != _NONE)
        at = np.minimum(np.searchsorted(known, keys[places]), len(known) - 1)
        is_known = known[at] == keys[places]
        numbers[places[is_known]] = at[is_known]
    return numbers


def _pair_keys(numbers: np.ndarray, offset: int) -> np.ndarray:
    """A key for each pair of numbers (below 2^31) that are `offset` apart; `_NONE` if either is."""
    keys = np.full(len(numbers), _NONE, dtype=np.int64)
    if offset >= len(numbers):
        return keys
    left, right = numbers[: len(numbers) - offset], numbers[offset:]
    places = np.flatnonzero((left != _NONE) & (right != _NONE))
    keys[places] = (left[places] << 31) | right[places]
    return keys


def match_texts(matchers: Sequence[SpanMatcher], texts: Iterable[str | tuple[int, str]]) -> None:
    """Let `matchers` read the words of whole texts, or of (number of the text, part of it) in order."""
    number = None
    for text, words in split_words_of_parts(texts):
        for matcher in matchers:
            if number is not None and text != number:
                matcher.end_text()
            matcher.read(words)
        number = text
    for matcher in matchers:
        matcher.end_text()


def measure_overlap(
    texts: Sequence[str],
    training_texts: Iterable[str | tuple[int, str]],
    lengths: Sequence[int] = SPAN_LENGTHS,
) -> tuple[dict[int, Statistic], list[Any]]:
    """Measure how much of `texts` occurs verbatim in `training_texts`, in spans of words.

    Returns:
        The share of spans by length, for lengths that a text has; and the longest span that occurs.
    """
    matcher = SpanMatcher([split_words(text) for text in texts], lengths)
    match_texts([matcher], training_texts)
    shares = {length: matcher.share(length) for length in lengths}
    return {length: share for length, share in shares.items() if share is not None}, matcher.longest()
