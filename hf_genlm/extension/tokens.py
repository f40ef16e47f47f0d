"""Extend a byte-level BPE by merges learned on another text.

The new merges come after the old ones, and none makes a token that exists. So a text is first merged as
before, and the new merges join the result: with every new token replaced by its pieces, the ids of any text
are those of the old tokenizer. Where no new pair occurs, the ids do not change.
"""

import heapq
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from hf_genlm.errors import UserError

_MIN_COUNT = 2  # a merge seen once memorises
Pair = tuple[str, str]


class Extension(NamedTuple):
    """An extended tokenizer: `state` is the content of tokenizer.json, `pieces` maps each new id to the old
    ids that it stands for."""

    state: dict[str, Any]
    pieces: dict[int, list[int]]


def extend_bpe(
    backend: Tokenizer,
    texts: Iterable[str],
    n_tokens: int,
    keep: Iterable[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> Extension:
    """Learn `n_tokens` more tokens on `texts`, the most frequent pair first, as if training had continued.

    Args:
        backend: byte-level, without a normalizer.
        keep: texts whose ids must not change: no pair that occurs in them is merged.
        on_progress: called with (tokens found, `n_tokens`).

    Raises:
        UserError: the tokenizer is of another kind, or the texts have fewer tokens to learn.
    """
    state = json.loads(backend.to_str())
    model, decoder = state["model"], (state["decoder"] or {}).get("type")
    is_plain = not any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    )
    if model["type"] != "BPE" or decoder != "ByteLevel" or state["normalizer"] is not None or not is_plain:
        raise UserError(
            f"this tokenizer is {model['type']} with the decoder {decoder}: only a byte-level BPE without a "
            "normalizer can be extended"
        )
    words = _segment(backend, texts)
    banned = {pair for pieces in _segment(backend, keep) for pair in itertools.pairwise(pieces)}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    first = max(vocabulary.values()) + 1
    merges = []
    for pair in _merges(words, banned, set(vocabulary)):
        merges.append(pair)
        if on_progress is not None:
            on_progress(len(merges), n_tokens)
        if len(merges) == n_tokens:
            break
    if len(merges) < n_tokens:
        raise UserError(
            f"--vocab-size +{n_tokens}: this text has {len(merges)} more tokens to learn at most; ask for "
            "fewer, or give more text"
        )
    pieces = {number: [number] for number in vocabulary.values()}
    for number, (left, right) in enumerate(merges, start=first):
        vocabulary[left + right] = number
        model["vocab"][left + right] = number
        pieces[number] = pieces[vocabulary[left]] + pieces[vocabulary[right]]
    as_lists = not model["merges"] or isinstance(model["merges"][0], list)
    model["merges"] += [[*pair] if as_lists else " ".join(pair) for pair in merges]
    return Extension(state, {number: pieces[number] for number in range(first, first + n_tokens)})


def _segment(backend: Tokenizer, texts: Iterable[str]) -> Counter[tuple[str, ...]]:
    """Count the words of `texts`, each as its tokens by `backend`; words of one token are left out."""
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    found: Counter[tuple[str, ...]] = Counter()
    for word, n in words.items():
        tokens = tuple(token.value for token in backend.model.tokenize(word))
        if len(tokens) > 1:
            found[tokens] += n
    return found


def _merges(words: Counter[tuple[str, ...]], banned: set[Pair], taken: set[str]) -> Iterable[Pair]:
    """Pairs to merge, in order: the most frequent pair of `words`, ties in alphabetical order.

    A pair in `banned`, or one that makes a token in `taken`, is skipped. Adds the new tokens to `taken`.
    """
    pieces = [list(word) for word in words]
    counts = list(words.values())
    n_of: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    queue: list[tuple[int, Pair]] = []  # holds outdated counts too; only an entry equal to `n_of` is valid

    def add(i: int, sign: int) -> set[Pair]:
        for pair in itertools.pairwise(pieces[i]):
            n_of[pair] += sign * counts[i]
            if sign > 0:
                where[pair].add(i)
        return set(itertools.pairwise(pieces[i]))

    def is_skipped(negative_count: int, pair: Pair) -> bool:
        return -negative_count != n_of[pair] or pair in banned or pair[0] + pair[1] in taken

    changed: set[Pair] = set().union(*(add(i, 1) for i in range(len(pieces))))
    while True:
        for pair in changed:
            heapq.heappush(queue, (-n_of[pair], pair))
        changed = set()
        while queue and is_skipped(*queue[0]):
            heapq.heappop(queue)
        if not queue or -queue[0][0] < _MIN_COUNT:
            return
        best = heapq.heappop(queue)[1]
        for i in where.pop(best):
            changed |= add(i, -1)
            pieces[i] = _merge(pieces[i], best)
            changed |= add(i, 1)
        taken.add(best[0] + best[1])
        yield best


def _merge(word: list[str], pair: Pair) -> list[str]:
    """`word` with every occurrence of `pair`, from the left, merged."""
    found: list[str] = []
    for piece in word:
        if found and (found[-1], piece) == pair:
            found[-1] += piece
        else:
            found.append(piece)
    return found
