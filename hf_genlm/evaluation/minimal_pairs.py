"""Minimal pairs: how often a model finds the acceptable sentence of two likelier than the other.

Pairs are files of BLiMP's format (Warstadt et al., TACL 2020): a JSON object a line, with `sentence_good` and
`sentence_bad`; `UID` names the paradigm (the file, where there is none), `linguistics_term` the phenomenon
that the paradigm belongs to (the paradigm itself, where there is none).

A pair counts 1 where the good sentence has the higher log-probability, summed over its tokens given the start
token, and 1/2 where both are as likely, to within the rounding of float32. A sentence is read as it stands in
the file. (The BLiMP tasks of lm-evaluation-harness put a space before each, and take the first of two equal
scores, which is that of the good one.)
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.evaluation.bootstrap import RESAMPLES, percentile_interval
from hf_genlm.evaluation.likelihood import document_nats
from hf_genlm.evaluation.measurement import Measurement, ratio_stderr
from hf_genlm.evaluation.outcomes import worth_of_pairs

_WORTH = np.array([0.0, 0.5, 1.0])  # of a pair: the bad sentence is likelier, a tie, the good one is


class Pair(NamedTuple):
    """Two sentences that differ in what makes one of them unacceptable."""

    good: str
    bad: str
    uid: str
    term: str


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a .jsonl file, or of all those in a folder.

    Raises:
        UserError: nothing to read there, or a line that holds no pair; the message names file and line.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no pairs at {str(path)!r}: name a .jsonl file, or a folder of such files")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    pairs = [pair for file in files for pair in _pairs_of(file)]
    if not pairs:
        raise UserError(f"{str(path)!r} holds no pairs: name a .jsonl file, or a folder of such files")
    return pairs


def measure_minimal_pairs(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    start_id: int,
    context: int,
    batch_size: int = 64,
    split: str = "pairs",
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    """Accuracy of a causal language model on `pairs`, on the device and in the number format of its weights.

    Args:
        model, start_id, context, on_progress: as in `measure_likelihood`.
        tokenizer: called as `tokenizer(texts, add_special_tokens=False)`.
        batch_size: sentences in one forward pass, fewer where their logits would be too large. No result
            depends on it.

    Returns:
        All are fractions.
        - minimal_pairs_accuracy: the mean over pairs. BLiMP's overall figure, the mean over its paradigms, is
          the same, since all of them have as many pairs.
        - minimal_pairs_accuracy_macro: the mean over phenomena of their figures.
        - minimal_pairs_accuracy/TERM of each phenomenon, where it is more than one paradigm of its own, and
          minimal_pairs_accuracy/UID of each paradigm: the means over their pairs.
        Standard errors and 95 % intervals (percentiles of a bootstrap, see `bootstrap`) are those of other
        pairs of the same paradigms.

    Raises:
        UserError: logits that are not finite.
    """
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.good, pair.bad)))
    number = {text: i for i, text in enumerate(texts)}
    nats = document_nats(
        model,
        tokenizer(texts, add_special_tokens=False)["input_ids"],
        start_id=start_id,
        context=context,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    good = nats[[number[pair.good] for pair in pairs]]
    bad = nats[[number[pair.bad] for pair in pairs]]
    outcomes = 2 * worth_of_pairs(-good, -bad)
    by_uid: dict[str, list[int]] = defaultdict(list)
    for pair, outcome in zip(pairs, outcomes, strict=True):
        by_uid[pair.uid].append(int(outcome))
    return _measurements(by_uid, {pair.uid: pair.term for pair in pairs}, split)


class _Share(NamedTuple):
    """An accuracy over n pairs with its standard error (None: of a single pair) and its (R,) resamples."""

    value: float
    n: int
    stderr: float | None
    resampled_R: np.ndarray

    def named(self, name: str, split: str) -> Measurement:
        interval = None if self.stderr is None else percentile_interval(self.resampled_R)
        return Measurement(name, self.value, "fraction", self.n, self.stderr, split, True, interval)


def _measurements(by_uid: dict[str, list[int]], term_of: dict[str, str], split: str) -> list[Measurement]:
    generator = np.random.default_rng(0)
    paradigms = {uid: _share_of(np.array(outcomes), generator) for uid, outcomes in by_uid.items()}
    terms = {
        term: _pooled([paradigms[uid] for uid in paradigms if term_of[uid] == term])
        for term in dict.fromkeys(term_of.values())
    }
    name = "minimal_pairs_accuracy"
    shown = {term: share for term, share in terms.items() if term not in paradigms} | paradigms
    return [
        _pooled(list(paradigms.values())).named(name, split),
        _mean(list(terms.values())).named(f"{name}_macro", split),
        *(share.named(f"{name}/{part}", split) for part, share in shown.items()),
    ]


def _share_of(outcomes: np.ndarray, generator: np.random.Generator) -> _Share:
    """Pairs drawn with replacement have a multinomial number of each outcome."""
    n, counts = len(outcomes), np.bincount(outcomes, minlength=3)
    worth = _WORTH[outcomes]
    resampled_R = generator.multinomial(n, counts / n, size=RESAMPLES) @ _WORTH / n
    return _Share(float(worth.mean()), n, ratio_stderr(worth, np.ones(n)), resampled_R)


def _pooled(shares: Sequence[_Share]) -> _Share:
    """All pairs of independent shares together."""
    sizes = np.array([share.n for share in shares])
    return _weighted(shares, sizes / sizes.sum())


def _mean(shares: Sequence[_Share]) -> _Share:
    """Each share as much as any other."""
    return _weighted(shares, np.full(len(shares), 1 / len(shares)))


def _weighted(shares: Sequence[_Share], weights: np.ndarray) -> _Share:
    errors = [share.stderr for share in shares if share.stderr is not None]
    is_known = len(errors) == len(shares)
    return _Share(
        float(weights @ [share.value for share in shares]),
        sum(share.n for share in shares),
        float(np.sqrt(np.square(weights * errors).sum())) if is_known else None,
        weights @ np.stack([share.resampled_R for share in shares]),
    )


def _pairs_of(file: Path) -> Iterator[Pair]:
    with file.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _pair_of(line, f"{str(file)!r}, line {number}", file.stem)
        except UnicodeDecodeError as error:
            raise UserError(f"{str(file)!r} is not UTF-8 text: {error.reason}") from error


def _pair_of(line: str, place: str, stem: str) -> Pair:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{place}: an object with sentence_good and sentence_bad should stand there")
    for field in ("sentence_good", "sentence_bad"):
        if not isinstance(fields.get(field), str) or not fields[field]:
            raise UserError(f"{place}: {field} should be a text, not {fields.get(field)!r}")
    uid = str(fields.get("UID") or stem)
    return Pair(
        fields["sentence_good"], fields["sentence_bad"], uid, str(fields.get("linguistics_term") or uid)
    )
