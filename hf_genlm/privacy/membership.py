"""Membership inference: distinguish training passages (members) from held-out ones (non-members).

Both are passages of equal length. Each attack scores a passage, high for a member; the area under its ROC
curve is the chance that a member scores higher than a non-member (0.5: no information), and the true positive
rate at a low false positive rate is the share of members that are identified almost surely (Carlini et al.,
Membership Inference Attacks From First Principles, S&P 2022). Attacks whose names begin with `blind` see the
text alone: an area above 0.5 there means that the splits differ by themselves, so that much of another
attack's area is not due to the model (Das, Zhang and Tramer, Blind Baselines Beat Membership Inference
Attacks, 2024).

Shapes: P passages, V vocabulary.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.privacy.statistics import auc, clopper_pearson, count_hits_at, roc
from hf_genlm.privacy.target import (
    Evidence,
    Findings,
    Progress,
    Scores,
    TargetModel,
    choose_length,
    draw_spans,
    passage_of,
)

LENGTHS = (16, 32, 64, 128, 256)  # tokens of a passage: the longest of which there are enough
# false positive rates by the words of a measurement's name; each needs at least 1 / rate non-members
RATES = {"0.1_percent": 0.001, "1_percent": 0.01}
SPLIT = "train against validation"
_LOWEST = 0.2  # share of the tokens that min-k % uses
_NUM_CURVE_POINTS = 200


@dataclass(frozen=True)
class Passages:
    """P passages with their token ids and scores.

    `is_member` is (P,); `reference_nats` (P,) is -log P of each text by a model that has not seen the
    training text, None without such a model.
    """

    texts: list[str]
    ids: list[np.ndarray]
    scores: list[Scores]
    is_member: np.ndarray
    reference_nats: np.ndarray | None

    @property
    def num_bytes(self) -> np.ndarray:
        """UTF-8 bytes (P,)."""
        return np.array([len(text.encode("utf-8")) for text in self.texts])

    @property
    def nats(self) -> np.ndarray:
        """-log P (P,) of the scored tokens."""
        return np.array([-scores.log_p.sum() for scores in self.scores])

    @property
    def compressed_bytes(self) -> np.ndarray:
        """Bytes (P,) after zlib."""
        return np.array([len(zlib.compress(text.encode("utf-8"), 9)) for text in self.texts])


def _blind_tokens(passages: Passages) -> np.ndarray:
    """Naive Bayes over tokens by two-fold cross-validation: each half is scored by counts of the other."""
    vocab_size = max(int(ids.max(initial=0)) for ids in passages.ids) + 1
    counts_PV = np.stack([np.bincount(ids, minlength=vocab_size) for ids in passages.ids])
    half_P = np.zeros(len(counts_PV), dtype=bool)
    for side in (True, False):  # as many members in either half
        half_P[np.flatnonzero(passages.is_member == side)[::2]] = True
    scores = np.zeros(len(counts_PV))
    for half in (True, False):
        fitted = half_P != half
        seen = [counts_PV[fitted & (passages.is_member == side)].sum(axis=0) + 1 for side in (True, False)]
        odds_V = np.log(seen[0] / seen[0].sum()) - np.log(seen[1] / seen[1].sum())
        scores[half_P == half] = counts_PV[half_P == half] @ odds_V
    return scores


# name -> scores (P,), high for a member
SCORES: dict[str, Callable[[Passages], np.ndarray]] = {
    # mean log P (Yeom et al. 2018)
    "loss": lambda p: np.array([scores.log_p.mean() for scores in p.scores]),
    # log P over the size after zlib (Carlini et al., Extracting Training Data, 2021)
    "zlib": lambda p: -p.nats / p.compressed_bytes,
    # mean log P of the least likely tokens (Shi et al. 2024)
    "min_k": lambda p: np.array([_mean_of_lowest(scores.log_p) for scores in p.scores]),
    # the same of log P standardised by the model's distribution at each place (Zhang et al. 2024)
    "min_k_plus_plus": lambda p: np.array(
        [_mean_of_lowest((s.log_p - s.mean) / np.maximum(s.std, 1e-6)) for s in p.scores]
    ),
    # loss of the reference less that of the target, per byte so that tokenizers may differ
    "reference": lambda p: (p.reference_nats - p.nats) / np.maximum(1, p.num_bytes),
    # compression of the text by zlib
    "blind_zlib": lambda p: -p.compressed_bytes / np.maximum(1, p.num_bytes),
    "blind_tokens": _blind_tokens,
}


def measure_membership(target: TargetModel, evidence: Evidence, on_progress: Progress | None) -> Findings:
    """`membership_auc/SCORE`, and `membership_tpr_at_1_percent_fpr/SCORE` with enough passages."""
    passages = draw_passages(target, evidence, on_progress)
    found, curves = [], {}
    for name, score in SCORES.items():
        if name == "reference" and passages.reference_nats is None:
            continue
        scores = score(passages)
        members, others = scores[passages.is_member], scores[~passages.is_member]
        area, stderr, interval = auc(members, others)
        n = len(scores)
        found.append(Measurement(f"membership_auc/{name}", area, "auc", n, stderr, SPLIT, False, interval))
        for words, rate in RATES.items():
            if len(others) * rate >= 1:
                found.append(_measure_rate(words, name, count_hits_at(members, others, rate), len(members)))
        curves[name] = _thin(*roc(members, others))
    return Findings(found, curves)


def draw_passages(target: TargetModel, evidence: Evidence, on_progress: Progress | None = None) -> Passages:
    """Draw and score as many members as non-members, at most `evidence.limit` of each."""
    assert evidence.train is not None
    assert evidence.held_out is not None
    sides = (evidence.train, evidence.held_out)
    possible = [length for length in LENGTHS if length < target.context] or [target.context - 1]
    length = choose_length(possible, sides)
    drawn = [draw_spans(side, length, evidence.limit, evidence.seed) for side in sides]
    n = min(map(len, drawn))
    chosen = [
        (documents, spans[i])
        for documents, spans in zip(sides, drawn, strict=True)
        for i in _evenly_spaced(len(spans), n)
    ]
    ids = [documents[span.document][0][span.start : span.stop] for documents, span in chosen]
    texts = [target.tokenizer.decode(each, clean_up_tokenization_spaces=False) for each in ids]
    passages = [passage_of(documents, span, target.start_id) for documents, span in chosen]
    scores = target.score(passages, on_progress)
    reference_nats = None
    if evidence.reference is not None:
        by_reference = evidence.reference.score_texts(texts, on_progress)
        reference_nats = -np.array([each.log_p.sum() for each in by_reference])
    return Passages(texts, ids, scores, np.repeat([True, False], n), reference_nats)


def _evenly_spaced(n: int, num_wanted: int) -> np.ndarray:
    """`num_wanted` indices below n."""
    return (np.arange(num_wanted) * n) // num_wanted


def _mean_of_lowest(values: np.ndarray) -> float:
    n = max(1, int(_LOWEST * len(values)))
    return float(np.partition(values, n - 1)[:n].mean())


def _measure_rate(words: str, score: str, hits: int, n: int) -> Measurement:
    rate, name = hits / n, f"membership_tpr_at_{words}_fpr/{score}"
    stderr = float(np.sqrt(rate * (1 - rate) / n))
    return Measurement(name, rate, "fraction", n, stderr, SPLIT, False, clopper_pearson(hits, n))


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    """Keep few enough points of a curve for a file, and all of the lowest rates."""
    lowest, spaced = np.arange(min(50, len(x))), _evenly_spaced(len(x), _NUM_CURVE_POINTS)
    kept = np.unique(np.concatenate([lowest, spaced, [len(x) - 1]]))
    return x[kept].round(6).tolist(), y[kept].round(6).tolist()
