"""Membership inference: can one tell a training passage from one that was held out?

Members and non-members are passages of as many tokens of either split. Each attack gives a passage a score,
high for a member; the area under its ROC curve is the chance that a member scores higher than a non-member
(0.5: nothing is told), and the true positive rate at a low false positive rate says how many are given away
almost surely (Carlini et al., Membership Inference Attacks From First Principles, S&P 2022). Attacks whose
names begin with `blind` see the text alone: an area above 0.5 there means that the splits differ by
themselves, and that much of the others' is not the model's doing (Das, Zhang and Tramer, Blind Baselines Beat
Membership Inference Attacks, 2024).
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.privacy.attacks.intervals import auc, clopper_pearson, hits_at, roc
from hf_genlm.privacy.attacks.scoring import Scores
from hf_genlm.privacy.subject import (
    Audited,
    Evidence,
    Findings,
    Progress,
    draw_places,
    longest_drawn,
    passage_at,
)

LENGTHS = (16, 32, 64, 128, 256)  # tokens of a passage: the longest of which there are enough
RATES = {
    "0.1_percent": 0.001,
    "1_percent": 0.01,
}  # false positive rates, with as many non-members as they need
SPLIT = "train against validation"
_ENOUGH, _LEAST = 100, 2
_LOWEST = 0.2  # of the tokens that min-k % looks at
_CURVE_POINTS = 200


@dataclass(frozen=True)
class Passages:
    """P passages: their text, token ids and scores, whether each is a member (P,), and what a model that has
    not seen the training text says of them, in nats (P,), if there is one."""

    texts: list[str]
    ids: list[np.ndarray]
    scores: list[Scores]
    is_member: np.ndarray
    reference_nats: np.ndarray | None

    @property
    def n_bytes(self) -> np.ndarray:
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


def _loss(passages: Passages) -> np.ndarray:
    """Yeom et al. 2018: mean log P."""
    return np.array([scores.log_p.mean() for scores in passages.scores])


def _zlib(passages: Passages) -> np.ndarray:
    """Carlini et al., Extracting Training Data, 2021: loss over what zlib needs."""
    return -passages.nats / passages.compressed_bytes


def _min_k(passages: Passages) -> np.ndarray:
    """Shi et al. 2024: mean log P of the least likely tokens."""
    return np.array([_mean_of_lowest(scores.log_p) for scores in passages.scores])


def _min_k_plus_plus(passages: Passages) -> np.ndarray:
    """Zhang et al. 2024: the same of log P in standard deviations of the model's own distribution."""
    return np.array(
        [_mean_of_lowest((s.log_p - s.mean) / np.maximum(s.deviation, 1e-6)) for s in passages.scores]
    )


def _reference(passages: Passages) -> np.ndarray:
    """Per byte, so that tokenizers may differ: the loss of another model less that of this one."""
    assert passages.reference_nats is not None
    return (passages.reference_nats - passages.nats) / np.maximum(1, passages.n_bytes)


def _blind_zlib(passages: Passages) -> np.ndarray:
    """How well zlib compresses the text."""
    return -passages.compressed_bytes / np.maximum(1, passages.n_bytes)


def _blind_tokens(passages: Passages) -> np.ndarray:
    """Naive Bayes over tokens, each half of the passages scored by what the other half says."""
    n_ids = max(int(ids.max(initial=0)) for ids in passages.ids) + 1
    counts_PV = np.stack([np.bincount(ids, minlength=n_ids) for ids in passages.ids])
    half_P = np.zeros(len(counts_PV), dtype=bool)
    for side in (True, False):  # as many members in either half
        half_P[np.flatnonzero(passages.is_member == side)[::2]] = True
    scores = np.zeros(len(counts_PV))
    for half in (True, False):
        learned = half_P != half
        seen = [counts_PV[learned & (passages.is_member == side)].sum(axis=0) + 1 for side in (True, False)]
        odds_V = np.log(seen[0] / seen[0].sum()) - np.log(seen[1] / seen[1].sum())
        scores[half_P == half] = counts_PV[half_P == half] @ odds_V
    return scores


SCORES: dict[str, Callable[[Passages], np.ndarray]] = {
    "loss": _loss,
    "zlib": _zlib,
    "min_k": _min_k,
    "min_k_plus_plus": _min_k_plus_plus,
    "reference": _reference,
    "blind_zlib": _blind_zlib,
    "blind_tokens": _blind_tokens,
}


def measure_membership(audited: Audited, evidence: Evidence, on_progress: Progress | None) -> Findings:
    """`membership_auc/SCORE`, and `membership_tpr_at_1_percent_fpr/SCORE` where there are enough passages."""
    passages = passages_of(audited, evidence, on_progress)
    found, curves = [], {}
    for name, score_of in SCORES.items():
        if name == "reference" and passages.reference_nats is None:
            continue
        scores = score_of(passages)
        members, others = scores[passages.is_member], scores[~passages.is_member]
        area, stderr, interval = auc(members, others)
        n = len(scores)
        found.append(Measurement(f"membership_auc/{name}", area, "auc", n, stderr, SPLIT, False, interval))
        for words, rate in RATES.items():
            if len(others) * rate >= 1:
                hits = hits_at(members, others, rate)
                found.append(_rate(f"membership_tpr_at_{words}_fpr/{name}", hits, len(members)))
        curves[name] = _thinned(*roc(members, others))
    return Findings(found, curves)


def passages_of(audited: Audited, evidence: Evidence, on_progress: Progress | None = None) -> Passages:
    """As many members as non-members, at most `evidence.limit` of each, and what the models say of them."""
    assert evidence.train is not None
    assert evidence.held_out is not None
    sides = (evidence.train, evidence.held_out)
    fitting = [length for length in LENGTHS if length < audited.context] or [audited.context - 1]
    length = longest_drawn(fitting, sides, _LEAST, _ENOUGH)
    drawn = [draw_places(side, length, evidence.limit, evidence.seed) for side in sides]
    n = min(map(len, drawn))
    of_sides = [
        (documents, place)
        for documents, places in zip(sides, drawn, strict=True)
        for place in (places[i] for i in _evenly(len(places), n))
    ]
    ids = [documents[place.document][0][place.start : place.stop] for documents, place in of_sides]
    texts = [audited.tokenizer.decode(each, clean_up_tokenization_spaces=False) for each in ids]
    passages = [passage_at(documents, place, audited.start_id) for documents, place in of_sides]
    scores = audited.score(passages, on_progress)
    reference_nats = None
    if evidence.reference is not None:
        of_reference = evidence.reference.score_texts(texts, on_progress)
        reference_nats = -np.array([each.log_p.sum() for each in of_reference])
    return Passages(texts, ids, scores, np.repeat([True, False], n), reference_nats)


def _evenly(n: int, n_wanted: int) -> np.ndarray:
    return (np.arange(n_wanted) * n) // n_wanted


def _mean_of_lowest(values: np.ndarray) -> float:
    n = max(1, int(_LOWEST * len(values)))
    return float(np.partition(values, n - 1)[:n].mean())


def _rate(name: str, hits: int, n: int) -> Measurement:
    rate = hits / n
    stderr = float(np.sqrt(rate * (1 - rate) / n))
    return Measurement(name, rate, "fraction", n, stderr, SPLIT, False, clopper_pearson(hits, n))


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    """Few enough points for a file, those of low rates all of them."""
    kept = np.unique(
        np.concatenate([np.arange(min(50, len(x))), _evenly(len(x), _CURVE_POINTS), [len(x) - 1]])
    )
    return x[kept].round(6).tolist(), y[kept].round(6).tolist()
