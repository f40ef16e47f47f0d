"""Naive twins of the counting of n-grams: dicts and loops, as the definitions read."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from hf_genlm.training.counting import FALLBACK_DISCOUNTS, NgramCounts


class NaiveKneserNey:
    """Interpolated modified Kneser-Ney of one order over documents of token ids."""

    def __init__(self, documents: Sequence[Sequence[int]], order: int, vocab_size: int, start_id: int):
        self.order, self.vocab_size = order, vocab_size
        occurrences: list[Counter] = [Counter() for _ in range(order + 1)]  # by length
        for document in documents:
            tokens = [start_id, *document, start_id]
            for last in range(1, len(tokens)):  # the first token is no event
                for k in range(1, min(order, last + 1) + 1):
                    occurrences[k][tuple(tokens[last - k + 1 : last + 1])] += 1
        before: defaultdict[tuple, set] = defaultdict(set)
        for k in range(2, order + 1):
            for ngram in occurrences[k]:
                before[ngram[1:]].add(ngram[0])
        self.counts: dict[tuple, int] = {}
        for k in range(1, order + 1):
            for ngram, n in occurrences[k].items():
                is_first = k > 1 and ngram[0] == start_id
                self.counts[ngram] = n if k == order or is_first else len(before[ngram])
        self.discounts = [self._discounts_of(k) for k in range(1, order + 1)]
        self.continuations: defaultdict[tuple, list[int]] = defaultdict(list)  # by context
        for ngram, count in self.counts.items():
            self.continuations[ngram[:-1]].append(count)

    def _discounts_of(self, k: int) -> tuple[float, ...]:
        of = Counter(count for ngram, count in self.counts.items() if len(ngram) == k)
        if not (of[1] and of[2] and of[3]):
            return FALLBACK_DISCOUNTS
        y = of[1] / (of[1] + 2 * of[2])
        found = tuple(i - (i + 1) * y * of[i + 1] / of[i] for i in (1, 2, 3))
        return found if min(found) > 0 else FALLBACK_DISCOUNTS

    def discount(self, k: int, count: int) -> float:
        return 0.0 if count == 0 else self.discounts[k - 1][min(count, 3) - 1]

    def p(self, context: Sequence[int], token: int) -> float:
        """Probability of `token` after `context`, from its document's start token on."""
        p = 1 / self.vocab_size
        for k in range(1, min(self.order, len(context) + 1) + 1):
            near = tuple(context[len(context) - k + 1 :])
            counts = self.continuations.get(near)
            if counts is None:
                break  # what has not been seen has no longer context either
            total, count = sum(counts), self.counts.get((*near, token), 0)
            left = sum(self.discount(k, each) for each in counts) / total
            p = max(count - self.discount(k, count), 0) / total + left * p
        return p


def ngrams_of(table: NgramCounts) -> list[list[tuple[int, ...]]]:
    """N-grams of each level in the order of the rows."""
    levels = [[(token,) for token in range(table.vocab_size)]]
    for keys in table.keys:
        levels.append(
            [(*levels[-1][key // table.vocab_size], key % table.vocab_size) for key in keys.tolist()]
        )
    return levels


def p_without(table: NgramCounts, context: Sequence[int], token: int) -> float:
    """Probability of `token`, which was counted after `context`, in the table without that one count."""
    levels = [[()], *ngrams_of(table)]
    rows = [{ngram: row for row, ngram in enumerate(level)} for level in levels]
    counts = [
        {n: int(table.counts[k - 1][row]) for n, row in rows[k].items()} for k in range(1, table.order + 1)
    ]
    totals = [{h: int(table.totals[k][row]) for h, row in rows[k].items()} for k in range(table.order)]
    masses = [
        {h: table.backoffs[k][row] * totals[k][h] for h, row in rows[k].items()} for k in range(table.order)
    ]

    def discount(k: int, count: int) -> float:
        return float(table.discounts[k - 1][min(count, 3) - 1]) if count else 0.0

    for k in range(min(table.order, len(context) + 1), 0, -1):
        near = tuple(context[len(context) - k + 1 :])
        count = counts[k - 1].get((*near, token), 0)
        if count == 0:
            continue
        masses[k - 1][near] -= discount(k, count) - discount(k, count - 1)  # that it gave to shorter contexts
        totals[k - 1][near] -= 1
        counts[k - 1][(*near, token)] -= 1
        if count > 1:
            break
    p = 1 / table.vocab_size
    for k in range(1, min(table.order, len(context) + 1) + 1):
        near = tuple(context[len(context) - k + 1 :])
        total, count = totals[k - 1].get(near, 0), counts[k - 1].get((*near, token), 0)
        if total:
            p = (max(count - discount(k, count), 0) + masses[k - 1][near] * p) / total
    return p


def p_of_table(table: NgramCounts, context: Sequence[int]) -> np.ndarray:
    """Probabilities (V,) after `context`, as `NgramCounts` states them."""
    levels = ngrams_of(table)
    rows = [{ngram: row for row, ngram in enumerate(level)} for level in [[()], *levels]]
    p = np.full(table.vocab_size, 1 / table.vocab_size)
    for k in range(1, min(table.order, len(context) + 1) + 1):
        near = tuple(context[len(context) - k + 1 :])
        row = rows[k - 1].get(near)
        if row is None or table.totals[k - 1][row] == 0:
            continue
        for token in range(table.vocab_size):
            here = rows[k].get((*near, token))
            count = 0 if here is None else int(table.counts[k - 1][here])
            discount = table.discounts[k - 1][min(count, 3) - 1] if count else 0.0
            p[token] = (
                max(count - discount, 0) / table.totals[k - 1][row] + table.backoffs[k - 1][row] * p[token]
            )
    return p
