"""Count the n-grams of a tokenized text, and estimate interpolated modified Kneser-Ney from the counts.

The estimate is that of Chen and Goodman (1999, An empirical study of smoothing techniques for language
modeling), with adjusted counts as in Heafield et al. (2013, Scalable modified Kneser-Ney language model
estimation). `NgramCounts` states the model.

All windows of a text are sorted once: the n-grams of every order are then runs of windows that begin alike,
and an n-gram's row is the number of runs before its own.

Shapes: T tokens of a stream, V vocabulary, n_k n-grams of k tokens (n_0 = 1, n_1 = V).
"""

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_genlm.config.settings import Settings
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.encoding import TokenizedDocuments
from hf_genlm.text.packed_stream import PackedStream

if TYPE_CHECKING:
    from hf_genlm.model import GenLMForCausalLM
    from hf_genlm.training.corpus import StreamedCorpus, TokenizedCorpus

MAX_ORDER = 6
MAX_COUNTED_TOKENS = 1 << 23  # bounds memory: recipes/LOG.md has the measured peak
MAX_BESIDE_NETWORK = 1 << 21  # counted tokens, which take about a quarter of a gigabyte
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # where counts of counts give none; KenLM's
_BLOCK = 1 << 16  # tokens taken together from a text longer than what is counted
_HELD_OUT_SHARE, _MAX_HELD_OUT, _MIN_DOCUMENTS = 0.05, 100_000, 8  # tokens that choose the order, and of what
_COMPARED = 5  # order of the counts beside which a network is shown
_MAX_COMPARED = 1 << 22  # tokens, which take about half a gigabyte
_SHARE_OF_TIME, _COUNTED_PER_S = 0.03, 1_000_000  # of a run that they may take; tokens, at least
_MAX_SCORE = 1 << 16  # counts from which on pruning makes no difference


@dataclass(frozen=True)
class NgramCounts:
    """N-gram model as tables; level k holds the n-grams of k tokens, as a trie by prefixes.

    Level 1 has one row for each token of the vocabulary (row = token id, seen or not). A context of j tokens
    is a row of level j; the context of no tokens is one row.

    p_0 = 1 / V. For k = 1 to the order, if the last k - 1 tokens are a row with a total above 0:
    p_k(w) = max(count - D_k(count), 0) / total + backoff * p_(k-1)(w), with count 0 if the n-gram has no row;
    otherwise p_k = p_(k-1). The probabilities after every context sum to one, whatever was pruned.
    """

    vocab_size: int
    # levels 2 to order, (n_k,) int64, sorted: row of the prefix in level k - 1, times V, plus the last token
    keys: list[np.ndarray]
    # levels 1 to order, (n_k,) int32. Highest level: occurrences. Below: distinct tokens before the n-gram;
    # occurrences of one that begins with the start token, which nothing precedes
    counts: list[np.ndarray]
    # contexts of 0 to order - 1 tokens, (n_j,) int32: sum of the counts of all continuations, pruned ones
    # included; 0 for a row that is no context
    totals: list[np.ndarray]
    # the same rows, (n_j,) float32: probability left to the shorter context; 1 where the total is 0
    backoffs: list[np.ndarray]
    discounts: np.ndarray  # (order, 3) float32: D of the counts 1, 2, and 3 or more, of each level
    n_tokens: int = 0  # that were counted
    seconds: float = 0.0  # that it took, the choice of the order included
    leave_one_out: bool = True  # most of the training text was counted: a word of it finds its own count

    @property
    def sizes(self) -> list[int]:
        """n_1 to n_k, as in `GenLMConfig.ngram_sizes`."""
        return list(map(len, self.counts))

    @torch.no_grad()
    def fill(self, model: "GenLMForCausalLM") -> None:
        """Give the tables to a model with a config of these sizes; the memory is the same, not a copy."""
        head = model.lm_head if model.mixture is None else model.mixture.ngrams
        for name in ("keys", "counts", "totals", "backoffs"):
            for table, values in zip(getattr(head, name), getattr(self, name), strict=True):
                if len(values):
                    table.data = torch.from_numpy(values)
        head.discounts.copy_(torch.from_numpy(self.discounts))

    @property
    def order(self) -> int:
        """Tokens of the longest n-grams."""
        return len(self.counts)


def count_corpus(
    run: RunFolder, corpus: "TokenizedCorpus | StreamedCorpus", settings: Settings
) -> NgramCounts:
    """Count the training text, at most `MAX_COUNTED_TOKENS` of it; the order is stated or chosen.

    Beside a network, which takes memory of its own, at most `MAX_BESIDE_NETWORK`.
    """
    began = time.monotonic()
    run.tell("progress", task="counting", done=0, total=None)
    start_id, vocab_size = corpus.tokenizer.eos_token_id, len(corpus.tokenizer)
    rows = corpus.rows(settings.training)
    most = MAX_COUNTED_TOKENS if settings.architecture.is_ngram else MAX_BESIDE_NETWORK
    n_tokens = None
    if isinstance(rows, PackedStream):
        stream = rows.first_tokens(most)
    else:
        stream, n_tokens = stream_of(corpus.train, start_id, most), corpus.train.n_tokens  # type: ignore[union-attr]
    if len(stream) >= most:
        run.log("note", message=f"{len(stream):,} tokens are counted: more would take too much memory")
    order = settings.model.ngram_order or choose_order(stream, vocab_size, start_id)
    counts = count_ngrams(stream, order, vocab_size, start_id, settings.model.ngram_entries)
    seconds = time.monotonic() - began
    entries = sum(map(len, counts.keys))
    run.log("counted", order=order, entries=entries, tokens=len(stream), seconds=round(seconds, 3))
    leave_one_out = n_tokens is not None and 2 * len(stream) > n_tokens
    return replace(counts, n_tokens=len(stream), seconds=seconds, leave_one_out=leave_one_out)


def measure_counts(run: RunFolder, corpus: "TokenizedCorpus", seconds: float) -> None:
    """Log what 5-grams alone reach on the held-out text, if that takes little time beside a training of
    `seconds`, and little memory.

    They predict the tokens that `evaluation.likelihood` scores, with the same tokenizer.
    """
    n_tokens = corpus.n_tokens + corpus.validation.n_tokens
    most = min(_SHARE_OF_TIME * seconds * _COUNTED_PER_S, _MAX_COMPARED)
    if corpus.validation.targets is not None or n_tokens > most:
        return
    start_id, vocab_size = corpus.tokenizer.eos_token_id, len(corpus.tokenizer)
    measured = stream_of(corpus.validation, start_id)
    found = log_probabilities(stream_of(corpus.train, start_id), measured, vocab_size, start_id, _COMPARED)
    nats = -found[-1][measured[1:] != start_id].sum()  # the ends of documents are not scored
    n_bytes = sum(n_bytes for ids, n_bytes in corpus.validation if len(ids))
    run.log("counts", order=_COMPARED, bits_per_byte=round(float(nats / np.log(2) / n_bytes), 5))


def stream_of(
    documents: TokenizedDocuments, start_id: int, max_tokens: int = MAX_COUNTED_TOKENS, block: int = _BLOCK
) -> np.ndarray:
    """Return the ids (T,) `s d1 s d2 ... s` of documents, s being `start_id`, in the dtype of their ids.

    Of more than `max_tokens` tokens: blocks of `block` tokens, evenly from the whole text. The end of a block
    counts as the end of a document.
    """
    size, begins = documents.n_tokens, [0]
    if size > max_tokens:
        begins = np.linspace(0, size - block, max(1, max_tokens // block)).astype(np.int64).tolist()
    parts = []
    for begin in begins:
        stop = size if size <= max_tokens else begin + block
        # the border of two blocks is one end, and the last border belongs to the last block
        first, last = np.searchsorted(documents.offsets, (begin, stop + (stop == size)))
        borders = documents.offsets[first:last] - begin
        if documents.offsets[first] > begin:
            borders = np.append(0, borders)
        parts.append(np.insert(documents.ids[begin:stop], borders, start_id))
        documents.release()
    return np.concatenate(parts)


def count_ngrams(
    stream: np.ndarray, order: int, vocab_size: int, start_id: int, max_entries: int | None = None
) -> NgramCounts:
    """Count the n-grams of 1 to `order` tokens, estimate the model, and prune it.

    No n-gram passes over the start token: it stands first, where a document begins, or last, where one ends.

    Args:
        stream: (T,) token ids below `vocab_size`, documents separated by `start_id`. A start token is put
            before the first document and behind the last one where there is none.
        order: from 1 to `MAX_ORDER`.
        max_entries: bound of the n-grams of two tokens and more, see `prune`; None: keep all.
    """
    keys, counts = _count_levels(stream, order, vocab_size, start_id)[::2]
    n_contexts = [1, *map(len, counts[:-1])]
    estimates = [_estimate(*each, vocab_size) for each in zip(keys, counts, n_contexts, strict=True)]
    totals, backoffs, discounts = map(list, zip(*estimates, strict=True))
    table = NgramCounts(vocab_size, keys[1:], counts, totals, backoffs, np.stack(discounts))
    return table if max_entries is None else prune(table, max_entries)


def choose_order(stream: np.ndarray, vocab_size: int, start_id: int) -> int:
    """Return the order with the lowest cross-entropy on held-out tokens, the lowest one of equals.

    Ends of some documents of `stream` (as for `count_ngrams`) are held out, the rest is counted. A text of
    too few tokens to hold any out has order 1.
    """
    counted, held_out = _hold_out(_closed(stream, start_id), start_id)
    if len(held_out) < 2:
        return 1
    found = log_probabilities(counted, held_out, vocab_size, start_id, MAX_ORDER)
    return int(np.argmax(found.mean(1))) + 1


def log_probabilities(
    counted: np.ndarray, measured: np.ndarray, vocab_size: int, start_id: int, max_order: int
) -> np.ndarray:
    """Return (max_order, T - 1) ln p of the tokens measured[1:] by models of orders 1 to `max_order`.

    The models are those of the stream `counted`, as of `count_ngrams`, and share all levels but their
    highest. `measured`: (T,), from a start token on.
    """
    levels = _count_levels(counted, max_order, vocab_size, start_id)
    ids = measured.astype(np.int64)
    contexts, begin, n_contexts = np.zeros_like(ids[1:]), ids[:1], 1
    p, found = np.full(len(contexts), 1 / vocab_size), []
    for keys, *both_counts in zip(*levels, strict=True):
        wanted = contexts * vocab_size + ids[1:]
        at, both = np.searchsorted(keys, wanted), []
        rows = np.where(np.append(keys, -1)[at] == wanted, at, -1)  # -1: no row; it finds what is appended
        for counts in both_counts:
            totals, backoffs, discounts = _estimate(keys, counts, n_contexts, vocab_size)
            count, total = np.append(counts, 0)[rows], np.append(totals, 1)[contexts]
            gamma = np.append(backoffs, np.float32(1))[contexts]
            both.append(_discounted(count, discounts) / np.maximum(total, 1) + gamma * p)
        found.append(np.log(both[0]))
        p, n_contexts = both[1], len(keys)
        contexts, begin = np.append(begin, rows)[:-1], np.array([-1])
    return np.stack(found)


def prune(table: NgramCounts, max_entries: int) -> NgramCounts:
    """Drop n-grams of two tokens and more until at most `max_entries` are left.

    Those with the lowest counts go first, among equals the longest, then the last in the order of ids. A
    prefix of an n-gram that stays, stays. The probability of what is dropped goes to the shorter context;
    totals and discounts remain those of the whole text.
    """
    size = table.vocab_size
    if sum(map(len, table.keys)) <= max_entries:
        return table
    masks = [np.ones(size, dtype=bool), *_select(table, max_entries)]
    keys, contexts = [], [np.zeros(size, dtype=np.int64)]
    for above, old, mask in zip(masks[:-1], table.keys, masks[1:], strict=True):
        prefixes, tokens = np.divmod(old[mask], size)
        contexts.append((np.cumsum(above) - 1)[prefixes])
        keys.append(contexts[-1] * size + tokens)
    counts = [old[mask] for old, mask in zip(table.counts, masks, strict=True)]
    totals = [table.totals[0], *(old[mask] for old, mask in zip(table.totals[1:], masks[:-1], strict=True))]
    backoffs = [_gamma(*each) for each in zip(contexts, counts, totals, table.discounts, strict=True)]
    return NgramCounts(size, keys, counts, totals, backoffs, table.discounts)


def _select(table: NgramCounts, max_entries: int) -> list[np.ndarray]:
    """Masks (n_k,) of the n-grams of levels 2 to order that `prune` keeps."""
    # no n-gram scores more than its prefix: those above any threshold are a trie
    scores = [np.minimum(counts, _MAX_SCORE) for counts in table.counts[1:]]
    for level in range(len(scores) - 1, 0, -1):
        parents = table.keys[level] // table.vocab_size
        first = np.flatnonzero(np.diff(parents, prepend=-1))
        above, best = scores[level - 1], np.maximum.reduceat(scores[level], first)
        above[parents[first]] = np.maximum(above[parents[first]], best)
    scores = [of_level * MAX_ORDER + (MAX_ORDER - level) for level, of_level in enumerate(scores)]
    n_equal = np.sum([np.bincount(each, minlength=(_MAX_SCORE + 1) * MAX_ORDER + 1) for each in scores], 0)
    threshold = int(np.argmax(np.append(np.cumsum(n_equal[::-1])[::-1], 0) <= max_entries))
    masks = [of_level >= threshold for of_level in scores]
    room = max_entries - int(sum(mask.sum() for mask in masks))
    for of_level, mask in zip(scores, masks, strict=True):  # one level has the n-grams next to the threshold
        mask[np.flatnonzero(of_level == threshold - 1)[:room]] = True
    return masks


def _count_levels(
    stream: np.ndarray, order: int, vocab_size: int, start_id: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Keys (level 1: the ids), occurrences and adjusted counts of levels 1 to `order`, each (n_k,).

    Adjusted counts are of a model with higher levels; of level `order`, they are the occurrences.
    """
    assert 1 <= order <= MAX_ORDER
    stream = _closed(stream, start_id)
    n, no_token = len(stream), vocab_size
    padded = np.append(stream, np.full(order, no_token)).astype(np.min_scalar_type(no_token))
    starts = _sort_windows(padded, n, order, vocab_size + 1)
    occurrences = [np.bincount(stream[1:], minlength=vocab_size).astype(np.int32)]
    assert len(occurrences[0]) == vocab_size, "ids are positions in a vocabulary"
    keys, adjusted = [np.arange(vocab_size)], []
    token = padded[starts]
    rows, rows_at = token, padded  # (n,) of the n-grams of k - 1 tokens: by window, and by position
    is_first, is_whole = np.append(True, token[1:] != token[:-1]), np.ones(n, dtype=bool)
    for k in range(2, order + 1):
        if k > 2:
            is_whole &= token != start_id
        token = padded[starts + (k - 1)]
        is_whole &= token != no_token
        is_first[1:] |= token[1:] != token[:-1]
        first = np.flatnonzero(is_first)
        lengths, is_ngram = np.diff(first, append=n), is_whole[first]
        first, lengths = first[is_ngram], lengths[is_ngram]
        # an n-gram of k tokens is one token before an n-gram of k - 1
        n_before = np.bincount(rows_at[starts[first] + 1], minlength=len(keys[-1])).astype(np.int32)
        adjusted.append(np.where(n_before == 0, occurrences[-1], n_before))  # 0: begins with the start token
        keys.append(rows[first].astype(np.int64) * vocab_size + token[first])
        occurrences.append(lengths.astype(np.int32))
        rows, rows_at = np.cumsum(is_first & is_whole, dtype=np.int32) - 1, np.empty(n, dtype=np.int32)
        rows_at[starts] = rows
    return keys, occurrences, [*adjusted, occurrences[-1]]


def _sort_windows(padded: np.ndarray, n: int, order: int, base: int) -> np.ndarray:
    """Starts (n,) int32 of the windows of `order` tokens, sorted by their tokens from first to last.

    Windows of as many tokens as fit into 63 bits are numbered in order; two numbers are a window of twice the
    length (Manber and Myers, 1993, Suffix arrays).
    """
    width = order
    while base**width >= 1 << 63:
        width = -(-width // 2)
    key = padded[:n].astype(np.int64)
    for j in range(1, width):
        key *= base
        key += padded[j : j + n]
    while True:
        starts = np.argsort(key).astype(np.int32)
        if width >= order:
            return starts
        key = key[starts]
        ranks = np.full(n + width, n, dtype=np.int32)  # n: of a window beyond the end
        ranks[starts] = np.append(0, np.cumsum(key[1:] != key[:-1]))
        key = ranks[:n].astype(np.int64) * (n + 1) + ranks[width:]
        width *= 2


def _estimate(
    keys: np.ndarray, counts: np.ndarray, n_contexts: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Totals and backoffs (n_contexts,) and discounts (3,) of one level."""
    contexts, discounts = keys // vocab_size, _discounts(counts)
    totals = np.bincount(contexts, weights=counts, minlength=n_contexts).astype(np.int32)
    return totals, _gamma(contexts, counts, totals, discounts), discounts


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D_1, D_2 and D_3+ (3,) float32 from counts of counts (Chen and Goodman, equation 26).

    `FALLBACK_DISCOUNTS` if no n-gram has one of the counts 1, 2, 3, or one of D would not be positive: what
    has not been seen would have no probability.
    """
    n, i = np.bincount(np.minimum(counts, 5), minlength=6), np.arange(1, 4)
    if n[1:4].all():
        found = i - (i + 1) * n[1] / (n[1] + 2 * n[2]) * n[2:5] / n[1:4]
        if (found > 0).all():  # none is above its count
            return found.astype(np.float32)
    return np.array(FALLBACK_DISCOUNTS, dtype=np.float32)


def _discounted(counts: np.ndarray, discounts: np.ndarray) -> np.ndarray:
    return counts - np.append(np.float64(0), discounts)[np.minimum(counts, 3)]


def _gamma(contexts: np.ndarray, counts: np.ndarray, totals: np.ndarray, discounts: np.ndarray) -> np.ndarray:
    """Probability (n_j,) float32 that n-grams of these contexts and counts (n_k,) leave to others."""
    kept = np.bincount(contexts, weights=_discounted(counts, discounts), minlength=len(totals))
    return (1 - kept / np.maximum(totals, 1)).astype(np.float32)


def _hold_out(stream: np.ndarray, start_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a stream: one to count; one to measure, of documents drawn with a fixed seed, or their ends."""
    borders = np.flatnonzero(stream == start_id)
    stops, lengths = borders[1:], np.diff(borders)  # of each document with its end
    size = min(int(_HELD_OUT_SHARE * len(stream)), _MAX_HELD_OUT)
    longest = -(-size // max(1, min(_MIN_DOCUMENTS, len(lengths))))
    drawn = np.random.default_rng(0).permutation(len(lengths))
    taken = np.zeros_like(lengths)
    taken[drawn] = np.diff(np.minimum(np.cumsum(np.minimum(lengths[drawn], longest)), size), prepend=0)
    is_held_out = np.append(False, np.arange(1, len(stream)) > np.repeat(stops - taken, lengths))
    held_out = np.append(stream[:1], stream[is_held_out])
    is_held_out[stops[taken < lengths]] = False  # what is left of a document ends, too
    return stream[~is_held_out], held_out


def _closed(stream: np.ndarray, start_id: int) -> np.ndarray:
    """`stream`, from a start token to a start token."""
    start = np.array([start_id], dtype=stream.dtype)
    if not len(stream) or stream[0] != start_id:
        stream = np.append(start, stream)
    return stream if stream[-1] == start_id else np.append(stream, start)
