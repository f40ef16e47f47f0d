"""The tasks of lm-evaluation-harness, run by its own code on a model that is loaded already.

A task is one that lm-eval brings, whose data it gets from the Hub, or a YAML file in a folder of one's own,
whose data may lie beside it: `dataset_path: json` and `dataset_kwargs: {data_files: {test: FILE}}` need no
network.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.evaluation.measurement import Measurement

_INSTALL = "lm-eval's tasks need a library more: pip install 'hf_genlm[eval]'"
# of lm-eval's metrics; the others are numbers of which lm-eval does not say the unit
_UNITS = {
    "acc": "fraction",
    "acc_norm": "fraction",
    "acc_bytes": "fraction",
    "exact_match": "fraction",
    "f1": "fraction",
    "bits_per_byte": "bits/byte",
}


def measure_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    start_id: int,
    context: int,
    include_path: str | Path | None = None,
    batch_size: int = 32,
) -> list[Measurement]:
    """Run `tasks`, or groups of tasks, of lm-eval on a causal language model; `*` in a name is any text.

    Args:
        start_id: id of the token before each text.
        context: tokens that the model reads at most.
        include_path: a folder of task files; lm-eval's own are read only where it has not all of `tasks`.
        batch_size: requests in one forward pass.

    Returns:
        `METRIC/TASK` of each metric of a task, and of each that a group of them has; the name of a filter
        other than "none" follows the metric's. n counts the examples of the task, the split is `TASK:SPLIT`
        by the task's own word for it. Values and standard errors are lm-eval's.

    Raises:
        UserError: lm-eval is not installed, knows no such task, or cannot get or run it.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(_INSTALL) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=folder)  # half a minute: it reads 14,000 files
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(f"lm-eval has no task {unknown[0]!r}{_near(unknown[0], manager.all_tasks)}")
    harness = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=context,
        prefix_token_id=start_id,
        batch_size=batch_size,
    )
    try:
        found = simple_evaluate(
            model=harness,
            tasks=manager.match_tasks(list(tasks)),
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except Exception as error:  # whatever a task's own code and the loaders of its data raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"lm-eval cannot run {', '.join(tasks)}: {reason}") from error
    assert found is not None, "there is one process"
    return [one for task, results in found["results"].items() for one in _measurements(task, results, found)]


def _near(task: str, known: Sequence[str]) -> str:
    near = did_you_mean(task, known)
    return (
        near
        if near.startswith("; did")
        else ": lm-eval ls tasks lists them; a folder of others is named by --include-path"
    )


def _measurements(task: str, results: dict[str, Any], found: dict[str, Any]) -> list[Measurement]:
    """Of one row of lm-eval's results: `{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}` among other facts."""
    measurements = []
    for key, value in results.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = results.get(f"{metric}_stderr,{filtered}")
        suffix = "" if filtered == "none" else f"_{filtered.replace('-', '_')}"
        measurements.append(
            Measurement(
                f"{metric}{suffix}/{task}",
                float(value),
                _UNITS.get(metric, "1"),
                n=_n_examples(task, found),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                split=f"{task}:{_split_of(task, found)}",
                higher_is_better=bool(found["higher_is_better"].get(task, {}).get(metric, True)),
            )
        )
    return measurements


def _n_examples(task: str, found: dict[str, Any]) -> int:
    """Of a group, those of its tasks."""
    if task in found["n-samples"]:
        return int(found["n-samples"][task]["effective"])
    return sum(_n_examples(part, found) for part in found["group_subtasks"].get(task, []))


def _split_of(task: str, found: dict[str, Any]) -> str:
    config = found["configs"].get(task, {})
    return str(config.get("test_split") or config.get("validation_split") or "all")
