"""Extraction: share of training passages that the model writes verbatim.

A passage is extracted by a prefix of k tokens if greedy decoding from those k tokens gives all of its next
`CONTINUATION` tokens (discoverable memorisation: Carlini, Ippolito, Jagielski, Lee, Tramer and Zhang,
Quantifying Memorization Across Neural Language Models, ICLR 2023, definition 3.1). Greedy decoding follows a
text as long as each of its tokens is the most likely one, so one forward pass over the text is enough. The
same share of held-out text is the baseline: text that the model writes without having seen it.
"""

from collections.abc import Sequence

import numpy as np

from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.privacy.statistics import clopper_pearson
from hf_genlm.privacy.target import (
    Evidence,
    Findings,
    Passage,
    Progress,
    Span,
    TargetModel,
    choose_length,
    draw_spans,
    passage_of,
)
from hf_genlm.text.canaries import Canaries
from hf_genlm.text.encoding import TokenizedDocuments

CONTINUATION = 50  # tokens; half of the context if that is shorter
PREFIXES = (10, 25, 50, 100, 200, 400)
_SHORTER = (10, 25)  # further continuations, in tokens
_COPIES = ((1, 1), (2, 9), (10, None))  # groups by occurrences of a continuation in the training text


def measure_extraction(target: TargetModel, evidence: Evidence, on_progress: Progress | None) -> Findings:
    """`extraction_50_tokens/prefix_k` on both splits, and `canaries_extracted/n` of those planted n times.

    With the longest prefix also the shorter continuations, and on the training text
    `extraction_50_tokens/copies_...` by how often a continuation occurs there.
    """
    found: list[Measurement] = []
    if evidence.train is not None and evidence.held_out is not None:
        found += _measure_texts(target, evidence.train, evidence.held_out, evidence, on_progress)
    if evidence.canaries is not None:
        found += measure_canary_extraction(target, evidence.canaries, on_progress)
    return Findings(found)


def _measure_texts(
    target: TargetModel,
    train: TokenizedDocuments,
    held_out: TokenizedDocuments,
    evidence: Evidence,
    on_progress: Progress | None,
) -> list[Measurement]:
    n_tokens = min(CONTINUATION, max(2, target.context // 2))
    possible = [k for k in PREFIXES if k + n_tokens < target.context] or [target.context - n_tokens - 1]
    length = choose_length([k + n_tokens for k in possible], (train, held_out))
    prefixes = [k for k in possible if k + n_tokens <= length]
    found = []
    for split, documents in (("train", train), ("validation", held_out)):
        drawn = draw_spans(documents, length, evidence.limit, evidence.seed)
        spans = [Span(span.document, span.stop - n_tokens, span.stop) for span in drawn]
        for k in prefixes:
            matched = count_matched_tokens(target, documents, spans, k, on_progress)
            found.append(
                measure_share(f"extraction_{n_tokens}_tokens/prefix_{k}", matched >= n_tokens, split)
            )
        found += [
            measure_share(f"extraction_{shorter}_tokens/prefix_{prefixes[-1]}", matched >= shorter, split)
            for shorter in _SHORTER
            if shorter < n_tokens
        ]
        if split == "train":
            copies = count_copies(documents, spans)
            for low, high in _COPIES:
                chosen = (copies >= low) & (copies <= (high or copies.max(initial=0)))
                if chosen.any():
                    group = f"{low}" if low == high else f"{low}_to_{high}" if high else f"{low}_or_more"
                    name = f"extraction_{n_tokens}_tokens/copies_{group}"
                    found.append(measure_share(name, matched[chosen] >= n_tokens, split))
    return found


def count_matched_tokens(
    target: TargetModel,
    documents: TokenizedDocuments,
    spans: Sequence[Span],
    prefix: int,
    on_progress: Progress | None = None,
) -> np.ndarray:
    """Count the leading tokens (n,) of each span that greedy decoding writes after `prefix` tokens."""
    passages = [passage_of(documents, span, target.start_id, num_before=prefix) for span in spans]
    return np.array([_count_leading(scores.is_argmax) for scores in target.score(passages, on_progress)])


def count_copies(
    documents: TokenizedDocuments, spans: Sequence[Span], chunk_size: int = 1 << 20
) -> np.ndarray:
    """Count how often (n,) the tokens of each span occur inside documents, its own place included.

    All spans have one length. Every run of as many tokens is hashed by a polynomial of random numbers modulo
    2^64, in chunks of `chunk_size` tokens; two different runs collide with a chance of about 2^-64.
    """
    if not spans:
        return np.zeros(0, dtype=np.int64)
    length = spans[0].stop - spans[0].start
    generator = np.random.default_rng(0)
    random_V = generator.integers(1 << 63, size=int(documents.ids.max()) + 1, dtype=np.uint64) * 2
    wanted = [_hash_runs(random_V[documents[s.document][0][s.start : s.stop]], length)[0] for s in spans]
    distinct, place = np.unique(np.array(wanted), return_inverse=True)
    counts = np.zeros(len(distinct), dtype=np.int64)
    n = len(documents.ids)
    ends = documents.offsets[1:-1]
    for start in range(0, max(1, n - length + 1), chunk_size):
        stop = min(n, start + chunk_size + length - 1)
        hashes = _hash_runs(random_V[documents.ids[start:stop]], length)
        # a run across the end of a document is no text of it
        crossings = np.zeros(len(hashes) + 1, dtype=np.int64)
        np.add.at(crossings, np.clip(ends - length + 1 - start, 0, len(hashes)), 1)
        np.add.at(crossings, np.clip(ends - start, 0, len(hashes)), -1)
        hashes = hashes[np.cumsum(crossings)[:-1] == 0]
        at = np.searchsorted(distinct, hashes)
        is_found = distinct[np.minimum(at, len(distinct) - 1)] == hashes
        counts += np.bincount(at[is_found], minlength=len(distinct))[: len(distinct)]
    return counts[place]


def _hash_runs(numbers: np.ndarray, length: int) -> np.ndarray:
    """sum_j numbers[i + j] B^(length - 1 - j) modulo 2^64 of every run i of `length` numbers."""
    base = np.uint64(0x9E3779B97F4A7C15)
    total = np.zeros(len(numbers) - length + 1, dtype=np.uint64)
    for j in range(length):
        total = total * base + numbers[j : len(numbers) - length + 1 + j]
    return total


def measure_canary_extraction(
    target: TargetModel, canaries: Canaries, on_progress: Progress | None = None
) -> list[Measurement]:
    """`canaries_extracted/n`: share of the canaries planted n times (0: left out) whose secret is written by
    greedy decoding after the canary's prefix."""
    texts = target.encode([canary.text for canary in canaries.candidates])
    prefixes = target.encode([canary.prefix for canary in canaries.candidates])
    passages = []
    for ids, prefix in zip(texts, prefixes, strict=True):
        # the space at the end of the prefix may be one token with the first digits
        num_known = _count_leading(ids[: len(prefix)] == prefix[: len(ids)])
        passages.append(Passage(np.concatenate([[target.start_id], ids]).astype(np.int64), num_known + 1))
    is_written = np.array([bool(s.is_argmax.all()) for s in target.score(passages, on_progress)])
    counts = np.array([c.repetitions if c.is_planted else 0 for c in canaries.candidates])
    return [
        measure_share(f"canaries_extracted/{n}", is_written[counts == n], "canaries")
        for n in np.unique(counts)
    ]


def measure_share(name: str, hits: np.ndarray, split: str) -> Measurement:
    """The share of True in (n,) with its exact interval."""
    n, value = len(hits), float(np.mean(hits))
    stderr = float(np.sqrt(value * (1 - value) / n))
    interval = clopper_pearson(int(np.sum(hits)), n)
    return Measurement(name, value, "fraction", n, stderr, split, False, interval)


def _count_leading(flags: np.ndarray) -> int:
    """Count the True values before the first False."""
    wrong = np.flatnonzero(~np.asarray(flags, dtype=bool))
    return int(wrong[0]) if len(wrong) else len(flags)
