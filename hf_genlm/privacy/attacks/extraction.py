"""Extraction: does the model write its training text word for word?

A passage counts as extracted by a prefix of k tokens if greedy decoding from those k tokens gives its next
`CONTINUATION` tokens, every one (discoverable memorisation: Carlini, Ippolito, Jagielski, Lee, Tramer and
Zhang, Quantifying Memorization Across Neural Language Models, ICLR 2023, definition 3.1). Greedy decoding
follows a text as long as each of its tokens is the likeliest after those before it, so one forward pass over
the text tells. The same on held-out text is what a model writes of such text without having seen it.
"""

from collections.abc import Sequence

import numpy as np

from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.privacy.attacks.intervals import clopper_pearson
from hf_genlm.privacy.attacks.scoring import Passage
from hf_genlm.privacy.subject import (
    Audited,
    Evidence,
    Findings,
    Place,
    Progress,
    draw_places,
    longest_drawn,
    passage_at,
)
from hf_genlm.text.canaries import Canaries
from hf_genlm.text.encoding import TokenizedDocuments

CONTINUATION = 50  # tokens; half of the context where that is shorter than two of them
PREFIXES = (10, 25, 50, 100, 200, 400)
_SHORTER = (10, 25)  # continuations that are looked at, too
_COPIES = ((1, 1), (2, 9), (10, None))  # groups by how often a continuation stands in the training text
_ENOUGH, _LEAST = 100, 2
_AT_ONCE = 1 << 20  # tokens


def measure_extraction(audited: Audited, evidence: Evidence, on_progress: Progress | None) -> Findings:
    """`extraction_50_tokens/prefix_k` on both splits, and `canaries_extracted/n` of those planted n times.

    On the training text with the longest prefix also the shorter continuations, and
    `extraction_50_tokens/copies_...` by how often it stands there.
    """
    found: list[Measurement] = []
    if evidence.train is not None and evidence.held_out is not None:
        found += _measure_texts(audited, evidence.train, evidence.held_out, evidence, on_progress)
    if evidence.canaries is not None:
        found += measure_canary_extraction(audited, evidence.canaries, on_progress)
    return Findings(found)


def _measure_texts(
    audited: Audited,
    train: TokenizedDocuments,
    held_out: TokenizedDocuments,
    evidence: Evidence,
    on_progress: Progress | None,
) -> list[Measurement]:
    continuation = min(CONTINUATION, max(2, audited.context // 2))
    room = [k for k in PREFIXES if k + continuation < audited.context] or [audited.context - continuation - 1]
    lengths = [k + continuation for k in room]
    longest = longest_drawn(lengths, (train, held_out), _LEAST, _ENOUGH)
    prefixes = [k for k in room if k + continuation <= longest]
    found = []
    for split, documents in (("train", train), ("validation", held_out)):
        drawn = draw_places(documents, longest, evidence.limit, evidence.seed)
        targets = [Place(place.document, place.stop - continuation, place.stop) for place in drawn]
        for k in prefixes:
            matched = matched_tokens(audited, documents, targets, k, on_progress)
            found.append(
                share(f"extraction_{continuation}_tokens/prefix_{k}", matched >= continuation, split)
            )
        found += [
            share(f"extraction_{shorter}_tokens/prefix_{prefixes[-1]}", matched >= shorter, split)
            for shorter in _SHORTER
            if shorter < continuation
        ]
        if split == "train":
            copies = count_copies(documents, targets)
            for low, high in _COPIES:
                chosen = (copies >= low) & (copies <= (high or copies.max(initial=0)))
                if chosen.any():
                    group = f"{low}" if low == high else f"{low}_to_{high}" if high else f"{low}_or_more"
                    name = f"extraction_{continuation}_tokens/copies_{group}"
                    found.append(share(name, matched[chosen] >= continuation, split))
    return found


def matched_tokens(
    audited: Audited,
    documents: TokenizedDocuments,
    targets: Sequence[Place],
    prefix: int,
    on_progress: Progress | None = None,
) -> np.ndarray:
    """How many tokens (n,) of each target greedy decoding writes, given the `prefix` tokens before it."""
    passages = [passage_at(documents, target, audited.start_id, before=prefix) for target in targets]
    return np.array([_leading(scores.is_best) for scores in audited.score(passages, on_progress)])


def count_copies(documents: TokenizedDocuments, targets: Sequence[Place]) -> np.ndarray:
    """How often (n,) the tokens of each target stand in `documents`, its own place counted.

    By a polynomial of random numbers of the tokens, modulo 2^64, over every run of as many: two different
    runs agree with a chance of about 2^-64.
    """
    if not targets:
        return np.zeros(0, dtype=np.int64)
    length = targets[0].stop - targets[0].start
    random = (
        np.random.default_rng(0).integers(1 << 63, size=int(documents.ids.max()) + 1, dtype=np.uint64) * 2
    )
    of_targets = np.array(
        [_hashes(random[documents[t.document][0][t.start : t.stop]], length)[0] for t in targets]
    )
    distinct, place = np.unique(of_targets, return_inverse=True)
    counts = np.zeros(len(distinct), dtype=np.int64)
    n = len(documents.ids)
    ends = documents.offsets[1:-1]  # a run across one of them is no text
    for start in range(0, max(1, n - length + 1), _AT_ONCE):
        stop = min(n, start + _AT_ONCE + length - 1)
        hashes = _hashes(random[documents.ids[start:stop]], length)
        crossed = np.zeros(len(hashes) + 1, dtype=np.int64)
        first = np.clip(ends - length + 1 - start, 0, len(hashes))
        last = np.clip(ends - start, 0, len(hashes))
        np.add.at(crossed, first, 1)
        np.add.at(crossed, last, -1)
        hashes = hashes[np.cumsum(crossed)[:-1] == 0]
        at = np.searchsorted(distinct, hashes)
        is_found = distinct[np.minimum(at, len(distinct) - 1)] == hashes
        counts += np.bincount(at[is_found], minlength=len(distinct))[: len(distinct)]
    return counts[place]


def _hashes(numbers: np.ndarray, length: int) -> np.ndarray:
    """sum_j numbers[i + j] B^(length - 1 - j) modulo 2^64 of every run i of `length`."""
    base = np.uint64(0x9E3779B97F4A7C15)
    total = np.zeros(len(numbers) - length + 1, dtype=np.uint64)
    for j in range(length):
        total = total * base + numbers[j : len(numbers) - length + 1 + j]
    return total


def measure_canary_extraction(
    audited: Audited, canaries: Canaries, on_progress: Progress | None = None
) -> list[Measurement]:
    """`canaries_extracted/n`: the share of canaries planted n times (0: not at all) whose secret greedy
    decoding writes, given what stands before it."""
    texts = audited.encode([canary.text for canary in canaries.candidates])
    prefixes = audited.encode([canary.prefix for canary in canaries.candidates])
    passages = []
    for ids, prefix in zip(texts, prefixes, strict=True):
        # the blank at the end of the prefix may be one token with the first digits
        known = _leading(ids[: len(prefix)] == prefix[: len(ids)])
        tokens = np.concatenate([[audited.start_id], ids]).astype(np.int64)
        passages.append(Passage(tokens, known + 1))
    is_written = np.array([bool(s.is_best.all()) for s in audited.score(passages, on_progress)])
    times = np.array([c.repetitions if c.is_planted else 0 for c in canaries.candidates])
    return [share(f"canaries_extracted/{n}", is_written[times == n], "canaries") for n in np.unique(times)]


def share(name: str, hits: np.ndarray, split: str) -> Measurement:
    """The share of hits (n,) with its exact interval."""
    n, value = len(hits), float(np.mean(hits))
    stderr = float(np.sqrt(value * (1 - value) / n))
    return Measurement(
        name, value, "fraction", n, stderr, split, False, clopper_pearson(int(np.sum(hits)), n)
    )


def _leading(flags: np.ndarray) -> int:
    """How many are true before the first that is not."""
    wrong = np.flatnonzero(~np.asarray(flags, dtype=bool))
    return int(wrong[0]) if len(wrong) else len(flags)
