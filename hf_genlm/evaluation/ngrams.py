"""How varied texts are, each a sequence of words or token ids: distinct-n, seq-rep-n and self-BLEU.

All counts are exact: equal n-grams have equal numbers, and no hash stands for one. distinct-n and self-BLEU
depend on how many texts there are and how long they are: compare them at the same count and length only.

Legend of shapes: M texts, N tokens of all texts together, P n-grams of them, E pairs of a text and an n-gram
that it holds.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.evaluation.figure import Figure, jackknife_stderr, mean_figure

Tokens = Sequence[Hashable]
_EPSILON = 0.1  # what nltk's smoothing method 1 puts in place of no match


class Grams(NamedTuple):
    """The n-grams of texts in reading order: `ids` (P,), equal for equal ones, and the text `owner` (P,) and
    place `at` (P,) among all tokens where each begins."""

    ids: np.ndarray
    owner: np.ndarray
    at: np.ndarray


def count_grams(texts: Sequence[Tokens], most: int) -> list[Grams]:
    """The n-grams of `texts` for n = 1..`most`; none reaches over the end of a text.

    Raises:
        UserError: `most` is less than 1.
    """
    if most < 1:
        raise UserError(f"n = {most}: an n-gram has at least 1 token")
    numbers: dict[Hashable, int] = {}
    ids = np.fromiter((numbers.setdefault(t, len(numbers)) for text in texts for t in text), dtype=np.int64)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    found = [Grams(ids, owner, np.arange(len(ids)))]
    for n in range(2, most + 1):
        shorter = found[-1]
        goes_on = np.flatnonzero(shorter.at + n - 1 < len(ids))
        goes_on = goes_on[owner[shorter.at[goes_on] + n - 1] == shorter.owner[goes_on]]
        at = shorter.at[goes_on]
        key = shorter.ids[goes_on] * (len(ids) + 1) + ids[at + n - 1]
        found.append(Grams(np.unique(key, return_inverse=True)[1], shorter.owner[goes_on], at))
    return found


def distinct_n(texts: Sequence[Tokens], n: int) -> Figure | None:
    """distinct-n: the share of the n-grams of all texts together that are different ones.

    Source: Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models, NAACL 2016,
    with the number of n-grams below the line. The standard error is the jackknife's over texts, which is
    rather too large than too small (Efron and Stein, 1981).

    Returns:
        The share and the number of n-grams; None where no text is as long as n.
    """
    grams = count_grams(texts, n)[-1]
    if not len(grams.ids):
        return None
    of_text, of_gram, _ = _occurrences(grams)
    n_owners = np.bincount(of_gram)
    lengths = np.bincount(grams.owner, minlength=len(texts))
    only_here = np.bincount(of_text[n_owners[of_gram] == 1], minlength=len(texts))
    n_distinct, total = len(n_owners), len(grams.ids)
    taking_part = np.flatnonzero(lengths)
    stderr = None
    if len(taking_part) > 1:
        stderr = jackknife_stderr(((n_distinct - only_here) / (total - lengths).clip(min=1))[taking_part])
    return Figure(n_distinct / total, total, stderr)


def repetition(texts: Sequence[Tokens], n: int) -> Figure | None:
    """seq-rep-n: the share of a text's n-grams that repeat an earlier one of it, averaged over texts.

    1 - (different n-grams) / (n-grams). Source: Welleck et al., Neural Text Generation with Unlikelihood
    Training, ICLR 2020 (n = 4 there). Texts shorter than n have none, and are left out.

    Returns:
        The mean and the number of texts; None where no text is as long as n.
    """
    grams = count_grams(texts, n)[-1]
    lengths = np.bincount(grams.owner, minlength=len(texts))
    is_long = lengths > 0
    if not is_long.any():
        return None
    of_text, _, _ = _occurrences(grams)
    shares = 1 - np.bincount(of_text, minlength=len(texts))[is_long] / lengths[is_long]
    return mean_figure(shares)


def self_bleu(texts: Sequence[Tokens], n: int = 4) -> Figure | None:
    """self-BLEU-n: the mean over texts of the BLEU of each with all others as its references, from 0 to 1.

    Source: Zhu et al., Texygen: A Benchmarking Platform for Text Generation Models, SIGIR 2018. As there,
    BLEU is that of nltk's `sentence_bleu` with equal weights of the orders 1..n and its smoothing method 1:
    clipped counts, the closest length of a reference, 0.1 for no match. (sacrebleu's smooths otherwise and
    goes to 100.) The standard error is the jackknife's over texts: each text is left out as a hypothesis and
    as a reference.

    Returns:
        The mean and the number of texts; None for fewer than two. With two there is no standard error.
    """
    m = len(texts)
    if m < 2:
        return None
    matches = [_Matches(grams, m) for grams in count_grams(texts, n)]
    lengths = np.array([len(text) for text in texts])
    closest = _ClosestLengths(lengths)
    scores, without = (
        np.zeros(m),
        np.zeros(m),
    )  # (M,): of each text; summed over the others when it is left out
    for i in range(m):
        closest_M = np.append(closest.without_each(i), closest.of(i))  # last: nothing is left out
        matches_M = np.stack([order.of(i) for order in matches])
        totals = np.maximum(1, lengths[i] - np.arange(n))
        bleu_M = _bleu(matches_M, totals, lengths[i], closest_M)
        scores[i] = bleu_M[-1]
        bleu_M[i] = 0
        without += bleu_M[:-1]
    stderr = jackknife_stderr(without / (m - 1)) if m > 2 else None
    return Figure(float(scores.mean()), m, stderr)


def _occurrences(grams: Grams) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each text with each n-gram in it, once: (text (E,), n-gram (E,), times (E,)), by text."""
    size = int(grams.ids.max(initial=0)) + 1
    pairs, times = np.unique(grams.owner * size + grams.ids, return_counts=True)
    return pairs // size, pairs % size, times


class _Matches:
    """The clipped matches of each text in all others, and what they lose when one of those is left out.

    An n-gram that text i holds c times counts min(c, the most that another text holds it). Only the text that
    holds it the most of the others can lower that by leaving: the count is then the next most.
    """

    def __init__(self, grams: Grams, n_texts: int):
        text, gram, times = _occurrences(grams)
        order = np.lexsort((-times, gram))  # the three texts that hold a gram the most: the first of its run
        first = np.searchsorted(gram[order], gram)
        holders, most = [], []
        for rank in range(3):
            at = np.minimum(first + rank, len(order) - 1)
            is_there = (gram[order[at]] == gram) & (first + rank < len(order))
            holders.append(np.where(is_there, text[order[at]], -1))
            most.append(np.where(is_there, times[order[at]], 0))
        is_first, is_second = holders[0] == text, holders[1] == text
        self._holder = np.where(is_first, holders[1], holders[0])
        best = np.where(is_first, most[1], most[0])
        next_best = np.where(is_first | is_second, most[2], most[1])
        matched = np.minimum(times, best)
        self._loss = matched - np.minimum(times, next_best)
        self._bounds = np.searchsorted(text, np.arange(n_texts + 1))
        self._whole = np.bincount(text, matched, n_texts)
        self._n_texts = n_texts

    def of(self, i: int) -> np.ndarray:
        """(M + 1,): matches of text i without each text, and last without none."""
        part = slice(self._bounds[i], self._bounds[i + 1])
        is_held = self._holder[part] >= 0
        losses = np.bincount(self._holder[part][is_held], self._loss[part][is_held], self._n_texts + 1)
        return self._whole[i] - losses


class _ClosestLengths:
    """The length of another text that is closest to a text's own, the shorter of two as close."""

    def __init__(self, lengths: np.ndarray):
        self._lengths = lengths

    def _two_closest(self, i: int) -> np.ndarray:
        apart = np.abs(self._lengths - self._lengths[i])
        order = np.lexsort((self._lengths, apart))
        return order[order != i][:2]

    def of(self, i: int) -> int:
        """For text i among all."""
        return int(self._lengths[self._two_closest(i)[0]])

    def without_each(self, i: int) -> np.ndarray:
        """(M,): for text i when each other is left out."""
        closest = self._two_closest(i)
        found = np.full(len(self._lengths), self._lengths[closest[0]])
        found[closest[0]] = self._lengths[closest[-1]]
        return found


def _bleu(matches: np.ndarray, totals: np.ndarray, length: int, closest: np.ndarray) -> np.ndarray:
    """BLEU (K,) of one hypothesis for K sets of references.

    By matches (n, K) and totals (n,) of its n-grams, its
    length and the closest of a reference (K,).
    """
    if length == 0:
        return np.zeros(len(closest))
    precisions = np.where(matches == 0, _EPSILON, matches) / totals[:, None]
    brevity = np.exp(np.minimum(0.0, 1 - closest / length))
    return np.where(matches[0] == 0, 0.0, brevity * np.exp(np.log(precisions).mean(axis=0)))
