"""Promise: n-grams are counted, and the model estimated, as the definitions of Kneser-Ney smoothing read."""

import itertools

import numpy as np
import pytest
from support.kneser_ney import NaiveKneserNey, ngrams_of, p_of_table

from hf_genlm.text.encoding import TokenizedDocuments
from hf_genlm.training.counting import (
    FALLBACK_DISCOUNTS,
    MAX_ORDER,
    choose_order,
    count_ngrams,
    log_probabilities,
    prune,
    stream_of,
)

VOCAB, START = 12, 3  # tokens 10 and 11 never occur


def stream(documents, dtype=np.uint16) -> np.ndarray:
    return np.array([START, *itertools.chain(*([*document, START] for document in documents))], dtype=dtype)


def tokenized(documents) -> TokenizedDocuments:
    lengths = [len(document) for document in documents]
    ids = np.array([token for document in documents for token in document], dtype=np.uint16)
    return TokenizedDocuments(ids, np.append(0, np.cumsum(lengths)).astype(np.int64), np.array(lengths))


def random_documents(seed: int, n: int = 14, longest: int = 25) -> list[list[int]]:
    """Documents of a Markov chain; an empty one, repeated ones, and one of one token are among them."""
    random = np.random.default_rng(seed)
    tokens = [token for token in range(10) if token != START]
    table = random.dirichlet(np.full(len(tokens), 0.3), size=VOCAB)
    documents: list[list[int]] = [[], [tokens[0]], [], []]
    for length in random.integers(1, longest, n):
        document = [START]
        for _ in range(length):
            document.append(int(random.choice(tokens, p=table[document[-1]])))
        documents.append(document[1:])
    documents += documents[-2:]
    return [documents[i] for i in random.permutation(len(documents))]


def contexts_of(documents, order: int) -> list[tuple[int, ...]]:
    """Contexts of every kind: in the text, at the start of a document, and unseen ones."""
    seen = {(START,)}
    for document in documents:
        tokens = [START, *document]
        seen |= {tuple(tokens[max(0, i - order) : i]) for i in range(1, len(tokens) + 1)}
    unseen = [(10,), (11, 10, 0, 1), (START, 10), (START, 11, 0), (0, 10, 1, 2, 0, 1)]
    return [*sorted(seen)[::7], (START,), *unseen]


def test_adjusted_counts_of_a_tiny_text_by_hand():
    a, b, s = 0, 1, START
    table = count_ngrams(stream([[a, b, a, b], [b, a], []]), 3, VOCAB, s)
    one, two, three = (dict(zip(ngrams, counts.tolist(), strict=True)) for ngrams, counts in zip(
        ngrams_of(table), table.counts, strict=True
    ))  # fmt: skip
    # distinct tokens before: a after s, b; b after a, s; s after b, a and s
    assert {ngram: count for ngram, count in one.items() if count} == {(a,): 2, (b,): 2, (s,): 3}
    # as they begin with the start token: s a, s b, s s each occur once; a b after s and b; b a after a and s
    assert two == {(s, a): 1, (s, b): 1, (s, s): 1, (a, b): 2, (b, a): 2, (b, s): 1, (a, s): 1}
    assert three == {(s, a, b): 1, (a, b, a): 1, (b, a, b): 1, (a, b, s): 1, (s, b, a): 1, (b, a, s): 1}
    assert table.totals[0].tolist() == [7]
    assert {row: total for row, total in enumerate(table.totals[1].tolist()) if total} == {a: 3, b: 3, s: 3}
    assert table.totals[2].tolist() == [2, 0, 2, 0, 1, 1, 0]  # of ab, as, ba, bs, sa, sb, ss
    assert table.discounts.tolist() == [list(FALLBACK_DISCOUNTS)] * 3


def test_discounts_by_hand():
    """n_1 = 5, n_2 = 2, n_3 = 1, n_4 = 1, of single tokens and the end: Y = 5/9."""
    ids = [0, *[1] * 2, *[2] * 3, *[4] * 4, 5, 6, 7, *[8] * 2]
    table = count_ngrams(stream([ids]), 1, VOCAB, START)
    assert table.discounts[0] == pytest.approx([1 - 2 * 5 / 9 * 2 / 5, 2 - 3 * 5 / 9 * 1 / 2, 3 - 4 * 5 / 9])


@pytest.mark.parametrize(
    "ids", [[0, 1, 2], [0, 1, *[2] * 2, *[4] * 2, *[5] * 3, *[6] * 4, *[7] * 4, *[8] * 4]],
    ids=["no count of 2", "D of 3 and more below 0"],
)  # fmt: skip
def test_discounts_that_would_leave_nothing_are_replaced(ids):
    table = count_ngrams(stream([ids]), 1, VOCAB, START)
    assert table.discounts[0].tolist() == list(FALLBACK_DISCOUNTS)


@pytest.mark.parametrize("order", range(1, MAX_ORDER + 1))
@pytest.mark.parametrize("seed", [0, 1])
def test_tables_are_those_of_the_naive_twin(order, seed):
    documents = random_documents(seed)
    table = count_ngrams(stream(documents), order, VOCAB, START)
    naive = NaiveKneserNey(documents, order, VOCAB, START)
    found = {
        ngram: count
        for ngrams, counts in zip(ngrams_of(table), table.counts, strict=True)
        for ngram, count in zip(ngrams, counts.tolist(), strict=True)
    }
    assert {ngram: count for ngram, count in found.items() if count} == naive.counts
    assert table.order == order
    assert table.discounts == pytest.approx(np.array(naive.discounts), abs=1e-6)
    for context in contexts_of(documents, order):
        wanted = [naive.p(context, token) for token in range(VOCAB)]
        assert sum(wanted) == pytest.approx(1)
        assert p_of_table(table, context) == pytest.approx(np.array(wanted), abs=1e-6)


@pytest.mark.parametrize("max_entries", [None, 0, 1, 30, 90])
def test_probabilities_sum_to_one_after_every_context(max_entries):
    documents = random_documents(2)
    table = count_ngrams(stream(documents), 4, VOCAB, START, max_entries)
    for context in contexts_of(documents, 4):
        p = p_of_table(table, context)
        assert p.sum() == pytest.approx(1, abs=1e-6)
        assert p.min() > 0


def test_levels_are_sorted_and_closed_under_prefixes():
    table = count_ngrams(stream(random_documents(3)), 5, VOCAB, START)
    for k, keys in enumerate(table.keys):
        assert (np.diff(keys) > 0).all()
        assert keys.max() // VOCAB < len(table.counts[k])
        assert len(keys) == len(table.counts[k + 1])
    assert [len(of_level) for of_level in table.totals] == [
        1,
        *(len(of_level) for of_level in table.counts[:-1]),
    ]
    assert [len(of_level) for of_level in table.backoffs] == [len(of_level) for of_level in table.totals]
    assert [each.dtype for each in (table.keys[0], table.counts[0], table.totals[0], table.backoffs[0])] == [
        np.int64, np.int32, np.int32, np.float32
    ]  # fmt: skip


def test_probabilities_of_a_stream_are_those_of_the_naive_twin():
    counted, measured = random_documents(4), random_documents(5)
    found = log_probabilities(stream(counted), stream([*measured, [10, 0, 11]]), VOCAB, START, MAX_ORDER)
    for order in range(1, MAX_ORDER + 1):
        naive = NaiveKneserNey(counted, order, VOCAB, START)
        wanted = []
        for document in [*measured, [10, 0, 11]]:
            tokens = [START, *document, START]
            wanted += [naive.p(tokens[:t], tokens[t]) for t in range(1, len(tokens))]
        assert np.exp(found[order - 1]) == pytest.approx(np.array(wanted), rel=1e-5)


@pytest.mark.parametrize("order", [5, 6])
def test_ids_of_a_large_vocabulary_are_sorted_by_two_halves(order):
    """Six ids of 17 bits are no key of 63 bits: the same text with ids far apart has the same table."""
    large, step = 1 << 17, 10_000
    documents = random_documents(6)
    far = [[token * step for token in document] for document in documents]
    wide = np.array([START * step, *itertools.chain(*([*d, START * step] for d in far))], dtype=np.uint32)
    narrow, table = (
        count_ngrams(stream(documents), order, VOCAB, START), count_ngrams(wide, order, large, START * step)
    )  # fmt: skip
    assert [
        [tuple(token * step for token in ngram) for ngram in level] for level in ngrams_of(narrow)[1:]
    ] == (ngrams_of(table)[1:])
    for level in range(1, order):
        assert (table.counts[level] == narrow.counts[level]).all()


def test_a_text_may_lack_its_first_and_last_end_or_everything():
    documents = random_documents(7)
    whole, cut = (count_ngrams(ids, 3, VOCAB, START) for ids in (stream(documents), stream(documents)[1:-1]))
    assert all((a == b).all() for a, b in zip(whole.keys + whole.counts, cut.keys + cut.counts, strict=True))
    empty = count_ngrams(np.zeros(0, dtype=np.uint16), 3, VOCAB, START, max_entries=0)
    assert p_of_table(empty, (START, 1)).tolist() == [pytest.approx(1 / VOCAB)] * VOCAB


def test_the_same_text_gives_the_same_bytes():
    first, second = (count_ngrams(stream(random_documents(8)), 4, VOCAB, START, 60) for _ in range(2))
    for name in ("keys", "counts", "totals", "backoffs", "discounts"):
        pairs = zip(getattr(first, name), getattr(second, name), strict=True)
        assert all(a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize("max_entries", [0, 1, 7, 40, 100, 200])
def test_pruning_keeps_a_bounded_trie_of_the_most_frequent(max_entries):
    whole = count_ngrams(stream(random_documents(9)), 4, VOCAB, START)
    table = prune(whole, max_entries)
    assert sum(map(len, table.keys)) == max_entries
    before, after = ngrams_of(whole), ngrams_of(table)
    for k in range(1, 4):
        assert (np.diff(table.keys[k - 1]) > 0).all()
        assert {ngram[:-1] for ngram in after[k]} <= set(after[k - 1])
    counts, totals = {}, {}
    for k, level in enumerate(before):
        counts.update(zip(level, whole.counts[k].tolist(), strict=True))
        if k < 3:
            totals.update(zip(level, whole.totals[k + 1].tolist(), strict=True))
    for k, level in enumerate(after):
        assert [counts[ngram] for ngram in level] == table.counts[k].tolist()
        if k < 3:
            assert [totals[ngram] for ngram in level] == table.totals[k + 1].tolist()
    # a dropped n-gram is no more frequent than any kept one that no other needs
    kept = {ngram for level in after[1:] for ngram in level}
    needed = {ngram[:-1] for ngram in kept}
    dropped = [counts[ngram] for level in before[1:] for ngram in level if ngram not in kept]
    free = [counts[ngram] for ngram in kept - needed]
    assert not free or min(free) >= max(n for n in dropped if n <= min(free))
    assert (table.discounts == whole.discounts).all()


def test_a_bound_that_is_met_changes_nothing():
    whole = count_ngrams(stream(random_documents(9)), 3, VOCAB, START)
    assert prune(whole, sum(map(len, whole.keys))) is whole


def markov_text(history: int, cuts: int) -> np.ndarray:
    """Random tokens of which each follows, nine times in ten, from the `history` tokens before it."""
    random = np.random.default_rng(history)
    tokens = np.array([0, 1, 2, 4, 5, 6, 7, 8])
    table = random.integers(0, 8, size=(8,) * history)
    ids = [0] * history
    while len(ids) < 8000:
        is_free = not history or random.random() < 0.1
        ids.append(int(random.integers(0, 8) if is_free else table[tuple(ids[-history:])]))
    return stream([part.tolist() for part in np.array_split(tokens[ids], cuts)])


@pytest.mark.parametrize("cuts", [1, 40])
@pytest.mark.parametrize("history", [0, 1, 2, 3])
def test_the_chosen_order_is_that_of_a_markov_text(history, cuts):
    assert choose_order(markov_text(history, cuts), VOCAB, START) == history + 1


def test_too_short_a_text_has_order_1():
    assert choose_order(np.array([START], dtype=np.uint16), VOCAB, START) == 1
    assert choose_order(stream([[1, 2, 1]]), VOCAB, START) == 1


def test_held_out_tokens_are_not_counted_and_none_is_lost(monkeypatch):
    import hf_genlm.training.counting as counting

    seen = {}

    def remember(counted, measured, *rest):
        seen.update(counted=counted, measured=measured)
        return log_probabilities(counted, measured, *rest)

    monkeypatch.setattr(counting, "log_probabilities", remember)
    text = stream(random_documents(11, n=80))
    choose_order(text, VOCAB, START)
    both = np.concatenate(list(seen.values()))
    n_cut = np.bincount(both, minlength=VOCAB)[START] - np.bincount(text, minlength=VOCAB)[START] - 1
    assert 0 <= n_cut <= 8
    assert len(seen["measured"]) - 1 == int(0.05 * len(text))
    others = [token for token in range(VOCAB) if token != START]
    assert (np.bincount(both, minlength=VOCAB)[others] == np.bincount(text, minlength=VOCAB)[others]).all()


def test_a_stream_of_documents():
    documents = random_documents(12)
    found = stream_of(tokenized(documents), START)
    assert found.dtype == np.uint16
    assert found.tolist() == stream(documents).tolist()
    assert stream_of(tokenized([]), START).tolist() == [START]
    assert stream_of(tokenized([[], []]), START).tolist() == [START] * 3


@pytest.mark.parametrize("documents", [[list(range(4, 10)) * 500], [[4, 5, 6]] * 1000], ids=["one", "many"])
def test_a_long_text_is_counted_in_blocks_from_all_of_it(documents):
    found = stream_of(tokenized(documents), START, max_tokens=1000, block=100)
    tokens = found[found != START]
    assert len(tokens) == 1000
    assert found[0] == found[-1] == START
    ends = np.flatnonzero(found == START)
    pieces = [found[a + 1 : b].tolist() for a, b in itertools.pairwise(ends)]
    assert all(pieces)  # no document is empty: a border of blocks is one end
    flat = list(itertools.chain(*documents))
    whole = [documents[0]] if len(documents) > 1 else []
    assert sum(piece in whole for piece in pieces) >= 0.9 * len(pieces) if whole else len(pieces) == 10
    assert flat[:90] == tokens[:90].tolist()
    assert flat[-90:] == tokens[-90:].tolist()
