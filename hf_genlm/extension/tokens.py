"""More tokens for a byte-level BPE: merges learned on another text, behind those that it has.

The new merges stand last, and none makes a token that there was. So a text is first merged as before, and the
new ones then join what came of it: with every new token written as its pieces, the ids of any text are those
of the old tokenizer. Where no new pair occurs they are the same ids.
"""

import heapq
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from hf_genlm.errors import UserError

_LEAST_COUNT = 2  # a merge seen once memorises
Pair = tuple[str, str]


class Extension(NamedTuple):
    """The state of a tokenizer with new tokens, as tokenizer.json holds it, and of each new id the old ones
    that it stands for."""

    state: dict[str, Any]
    pieces: dict[int, list[int]]


def extend_bpe(
    backend: Tokenizer,
    texts: Iterable[str],
    n_tokens: int,
    keep: Iterable[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> Extension:
    """Learn `n_tokens` more tokens on `texts`, the most frequent pair first, as if training had gone on.

    Args:
        backend: byte-level, without a normalizer.
        keep: texts whose ids stay as they are: no pair that occurs in them is merged.
        on_progress: called with (tokens found, `n_tokens`).

    Raises:
        UserError: a tokenizer of another kind, or texts that have not so many tokens to learn.
    """
    state = json.loads(backend.to_str())
    _check(state)
    words = _segmented(backend, texts)
    banned = {pair for pieces in _segmented(backend, keep) for pair in itertools.pairwise(pieces)}
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
            f"--vocab-size +{n_tokens}: this text has {len(merges)} more tokens to learn at most; ask for no "
            "more, or give more text"
        )
    pieces = {vocabulary[token]: [vocabulary[token]] for token in vocabulary}
    for number, (left, right) in enumerate(merges, start=first):
        vocabulary[left + right] = number
        state["model"]["vocab"][left + right] = number
        pieces[number] = pieces[vocabulary[left]] + pieces[vocabulary[right]]
    as_lists = not state["model"]["merges"] or isinstance(state["model"]["merges"][0], list)
    state["model"]["merges"] += [[*pair] if as_lists else " ".join(pair) for pair in merges]
    return Extension(state, {number: pieces[number] for number in range(first, first + n_tokens)})


def _check(state: dict[str, Any]) -> None:
    model = state["model"]
    kind = (state["decoder"] or {}).get("type")
    is_plain = not any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    )
    if model["type"] != "BPE" or kind != "ByteLevel" or state["normalizer"] is not None or not is_plain:
        raise UserError(
            f"this tokenizer is {model['type']} with the decoder {kind}: only a byte-level BPE without a "
            "normalizer can be extended"
        )


def _segmented(backend: Tokenizer, texts: Iterable[str]) -> Counter[tuple[str, ...]]:
    """How often each word occurs, as the tokens that `backend` makes of it; words of one token left out."""
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
    """Pairs to be merged, one after the other: the one that occurs most often in `words`, of equal ones the
    first in the order of their letters."""
    pieces = [list(word) for word in words]
    counts = list(words.values())
    n_of: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)

    queue: list[tuple[int, Pair]] = []  # the counts as they were, and as they are

    def add(i: int, sign: int) -> set[Pair]:
        for pair in itertools.pairwise(pieces[i]):
            n_of[pair] += sign * counts[i]
            if sign > 0:
                where[pair].add(i)
        return set(itertools.pairwise(pieces[i]))

    changed: set[Pair] = set().union(*(add(i, 1) for i in range(len(pieces))))
    while True:
        for pair in changed:
            heapq.heappush(queue, (-n_of[pair], pair))
        changed = set()
        while queue and (-queue[0][0] != n_of[queue[0][1]] or _is_out(queue[0][1], banned, taken)):
            heapq.heappop(queue)
        if not queue or -queue[0][0] < _LEAST_COUNT:
            return
        best = heapq.heappop(queue)[1]
        for i in where.pop(best):
            changed |= add(i, -1)
            pieces[i] = _joined(pieces[i], best)
            changed |= add(i, 1)
        taken.add(best[0] + best[1])
        yield best


def _is_out(pair: Pair, banned: set[Pair], taken: set[str]) -> bool:
    return pair in banned or pair[0] + pair[1] in taken


def _joined(word: list[str], pair: Pair) -> list[str]:
    """`word` with every occurrence of `pair`, from the left, made one."""
    found: list[str] = []
    i = 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            found.append(pair[0] + pair[1])
            i += 2
        else:
            found.append(word[i])
            i += 1
    return found
