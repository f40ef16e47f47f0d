"""Benchmarks: minimal pairs, and tasks of lm-evaluation-harness.

Minimal pairs are files in BLiMP's format (Warstadt et al., TACL 2020): a JSON object per line, with
`sentence_good` and `sentence_bad`; `UID` names the paradigm (default: the file), `linguistics_term` the
phenomenon of the paradigm (default: the paradigm itself). A pair counts 1 if the good sentence has the higher
log-probability, summed over its tokens given the start token, and 1/2 if both are equal to within the
rounding of float32. Sentences are read as they stand in the file. (The BLiMP tasks of lm-evaluation-harness
put a space before each, and count a tie as correct.)

Tasks of lm-evaluation-harness (lm-eval) run on a loaded model by lm-eval's own code. A task is one of
lm-eval's, whose data come from the Hub, or a YAML file in a folder of the user, whose data may lie beside it:
`dataset_path: json` and `dataset_kwargs: {data_files: {test: FILE}}` need no network.
"""

import io
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_genlm.errors import UserError, did_you_mean, install_command
from hf_genlm.evaluation.aggregation import check_paired
from hf_genlm.evaluation.likelihood import document_nats
from hf_genlm.evaluation.measurement import (
    NUM_RESAMPLES,
    Measurement,
    Statistic,
    percentile_interval,
    ratio_stderr,
)
from hf_genlm.files import read_text
from hf_genlm.memory import MAX_BYTES, check_values
from hf_genlm.text.encoding import encode_texts

_RELATIVE_ROUNDING = 1e-6  # of a sum of float32 log-probabilities
_OUTCOMES = np.array([0.0, 0.5, 1.0])  # of a pair: bad sentence likelier, tie, good sentence likelier
# units of lm-eval's metrics; lm-eval does not state units, so that all others are "1"
_LM_EVAL_UNITS = {
    "acc": "fraction",
    "acc_norm": "fraction",
    "acc_bytes": "fraction",
    "exact_match": "fraction",
    "f1": "fraction",
    "bits_per_byte": "bits/byte",
}


class Pair(NamedTuple):
    """An acceptable sentence, and one that a minimal difference makes unacceptable."""

    good: str
    bad: str
    uid: str  # paradigm
    term: str  # phenomenon


def read_pairs(path: str | Path) -> list[Pair]:
    """Read the pairs of a .jsonl file, or of all such files in a folder.

    Raises:
        UserError: there is nothing to read, or a line is not a pair; the message names file and line.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no pairs at {str(path)!r}: name a .jsonl file, or a folder of such files")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if sum(file.stat().st_size for file in files) > MAX_BYTES:
        raise UserError(f"{str(path)!r} holds more than {MAX_BYTES:,} bytes of pairs: name fewer of them")
    pairs = [pair for file in files for pair in _read_file(file)]
    if not pairs:
        raise UserError(f"{str(path)!r} holds no pairs: name a .jsonl file, or a folder of such files")
    return pairs


def _read_file(file: Path) -> Iterator[Pair]:
    text = read_text(file)
    check_values(text, file)
    for number, line in enumerate(io.StringIO(text), start=1):
        if line.strip():
            yield _parse_pair(line, f"{str(file)!r}, line {number}", file.stem)


def _parse_pair(line: str, place: str, default_uid: str) -> Pair:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{place}: must be an object with sentence_good and sentence_bad")
    for field in ("sentence_good", "sentence_bad"):
        if not isinstance(fields.get(field), str) or not fields[field]:
            raise UserError(f"{place}: {field} must be a text, not {fields.get(field)!r}")
    uid = str(fields.get("UID") or default_uid)
    term = str(fields.get("linguistics_term") or uid)
    return Pair(fields["sentence_good"], fields["sentence_bad"], uid, term)


def pair_accuracy(good: Sequence[float] | np.ndarray, bad: Sequence[float] | np.ndarray) -> Statistic:
    """Accuracy on minimal pairs from log-probabilities (P,) of their sentences, summed over tokens.

    Returns:
        The accuracy, the number of pairs, and the standard error over pairs.

    Raises:
        UserError: no pair, arrays of different lengths, or a number that is not finite.
    """
    good, bad = check_paired("log-probabilities of good and bad sentences", good, bad)
    outcomes = _score_pairs(good, bad)
    return Statistic(float(outcomes.mean()), len(outcomes), ratio_stderr(outcomes, np.ones(len(outcomes))))


def _score_pairs(good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """(P,): 1 if the good sentence has the higher log-probability, 1/2 for a tie, otherwise 0."""
    is_tie = np.abs(good - bad) <= _RELATIVE_ROUNDING * np.maximum(np.abs(good), np.abs(bad))
    return np.where(is_tie, 0.5, good > bad)


class _Accuracy(NamedTuple):
    """An accuracy over n pairs, its standard error (None for one pair), and its (R,) bootstrap resamples."""

    value: float
    n: int
    stderr: float | None
    resampled_R: np.ndarray

    def to_measurement(self, name: str, split: str) -> Measurement:
        interval = percentile_interval(self.resampled_R, self.n)
        return Measurement(name, self.value, "fraction", self.n, self.stderr, split, True, interval)


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
    """Measure the accuracy of a causal language model on `pairs`.

    Args:
        model, start_id, context, on_progress: as in `measure_likelihood`.
        tokenizer: as `encode_texts` calls it.
        batch_size: sentences per forward pass, fewer if their logits would be too large. Changes no result.

    Returns:
        All are fractions.
        - minimal_pairs_accuracy: mean over pairs. It equals BLiMP's overall accuracy, the mean over its
          paradigms, since all of them have the same number of pairs.
        - minimal_pairs_accuracy_macro: mean over phenomena.
        - minimal_pairs_accuracy/TERM of each phenomenon that is more than one paradigm of the same name, and
          minimal_pairs_accuracy/UID of each paradigm: means over their pairs.
        Standard errors and 95 % bootstrap intervals are over pairs, with the paradigms fixed.

    Raises:
        UserError: NaN or infinite logits.
    """
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.good, pair.bad)))
    index = {text: i for i, text in enumerate(texts)}
    nats = document_nats(
        model, encode_texts(tokenizer, texts), start_id=start_id, context=context, batch_size=batch_size,
        on_progress=on_progress,
    )  # fmt: skip
    good = nats[[index[pair.good] for pair in pairs]]
    bad = nats[[index[pair.bad] for pair in pairs]]
    by_uid: dict[str, list[int]] = defaultdict(list)
    for pair, outcome in zip(pairs, 2 * _score_pairs(-good, -bad), strict=True):
        by_uid[pair.uid].append(int(outcome))
    term_of = {pair.uid: pair.term for pair in pairs}
    generator = np.random.default_rng(0)
    paradigms = {uid: _accuracy_of(np.array(outcomes), generator) for uid, outcomes in by_uid.items()}
    terms = {}
    for term in dict.fromkeys(term_of.values()):
        terms[term] = _pool([paradigms[uid] for uid in paradigms if term_of[uid] == term])
    shown = {term: accuracy for term, accuracy in terms.items() if term not in paradigms} | paradigms
    name = "minimal_pairs_accuracy"
    macro = _weight(list(terms.values()), np.full(len(terms), 1 / len(terms)))
    return [
        _pool(list(paradigms.values())).to_measurement(name, split),
        macro.to_measurement(f"{name}_macro", split),
        *(accuracy.to_measurement(f"{name}/{part}", split) for part, accuracy in shown.items()),
    ]


def _accuracy_of(outcomes: np.ndarray, generator: np.random.Generator) -> _Accuracy:
    """Accuracy of one paradigm from indices (n,) into `_OUTCOMES`.

    Pairs drawn with replacement have a multinomial number of each outcome.
    """
    n, counts = len(outcomes), np.bincount(outcomes, minlength=3)
    values = _OUTCOMES[outcomes]
    resampled_R = generator.multinomial(n, counts / n, size=NUM_RESAMPLES) @ _OUTCOMES / n
    return _Accuracy(float(values.mean()), n, ratio_stderr(values, np.ones(n)), resampled_R)


def _pool(accuracies: Sequence[_Accuracy]) -> _Accuracy:
    """Accuracy over the pairs of all of them."""
    sizes = np.array([accuracy.n for accuracy in accuracies])
    return _weight(accuracies, sizes / sizes.sum())


def _weight(accuracies: Sequence[_Accuracy], weights: np.ndarray) -> _Accuracy:
    """Weighted mean of independent accuracies."""
    errors = [accuracy.stderr for accuracy in accuracies if accuracy.stderr is not None]
    is_known = len(errors) == len(accuracies)
    return _Accuracy(
        float(weights @ [accuracy.value for accuracy in accuracies]),
        sum(accuracy.n for accuracy in accuracies),
        float(np.sqrt(np.square(weights * errors).sum())) if is_known else None,
        weights @ np.stack([accuracy.resampled_R for accuracy in accuracies]),
    )


def measure_lm_eval_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    start_id: int,
    context: int,
    include_path: str | Path | None = None,
    batch_size: int = 32,
) -> list[Measurement]:
    """Run tasks or groups of tasks of lm-eval on a causal language model.

    Args:
        tasks: names; `*` matches any text.
        start_id: id of the token before each text.
        context: maximum number of input tokens.
        include_path: folder of task files; lm-eval's own are read only if it does not have all `tasks`.
        batch_size: requests per forward pass.

    Returns:
        `METRIC/TASK` of each metric of a task or group; a filter other than "none" is appended to the metric.
        n counts the examples of the task, the split is `TASK:SPLIT` with the task's own name of the split.
        Values and standard errors are lm-eval's.

    Raises:
        UserError: lm-eval is not installed, does not know a task, or cannot load or run it.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"lm-eval's tasks need one more library: {install_command('eval')}") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=folder)  # half a minute: it reads 14,000 files
    for task in tasks:
        if not manager.match_tasks([task]):
            near = did_you_mean(task, manager.all_tasks)
            if not near.startswith("; did"):  # instead of thousands of names
                near = ": list them with `lm-eval ls tasks`, or name a folder of others with --include-path"
            raise UserError(f"lm-eval has no task {task!r}{near}")
    tokenizer.split_special_tokens = True  # as in `encode_texts`, which the harness does not call
    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=context,
        prefix_token_id=start_id,
        batch_size=batch_size,
    )
    try:
        found = simple_evaluate(
            model=wrapped,
            tasks=manager.match_tasks(list(tasks)),
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except Exception as error:  # whatever a task's own code and the loaders of its data raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"lm-eval cannot run {', '.join(tasks)}: {reason}") from error
    assert found is not None, "lm-eval returns results in the main process, and there is only one"
    return [m for task, results in found["results"].items() for m in _convert_results(task, results, found)]


def _convert_results(task: str, results: dict[str, Any], found: dict[str, Any]) -> list[Measurement]:
    """Convert lm-eval's results of a task, such as `{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}`."""
    config = found["configs"].get(task, {})
    split = config.get("test_split") or config.get("validation_split") or "all"
    measurements = []
    for key, value in results.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = results.get(f"{metric}_stderr,{filter_name}")
        suffix = "" if filter_name == "none" else f"_{filter_name.replace('-', '_')}"
        measurements.append(
            Measurement(
                f"{metric}{suffix}/{task}",
                float(value),
                _LM_EVAL_UNITS.get(metric, "1"),
                n=_count_examples(task, found),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                split=f"{task}:{split}",
                higher_is_better=bool(found["higher_is_better"].get(task, {}).get(metric, True)),
            )
        )
    return measurements


def _count_examples(task: str, found: dict[str, Any]) -> int:
    """Number of examples of a task, or of all tasks of a group."""
    if task in found["n-samples"]:
        return int(found["n-samples"][task]["effective"])
    return sum(_count_examples(part, found) for part in found["group_subtasks"].get(task, []))
