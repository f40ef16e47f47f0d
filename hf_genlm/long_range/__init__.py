"""Measure how far back decoders remember, by training small ones on synthetic recall tasks.

`measure_range` is the service behind `hf-genlm range`.
"""

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.files import read_json, refuse_links_out, write_json
from hf_genlm.long_range.report import SOLVED, Outcome, sentence, write_range_report
from hf_genlm.long_range.tasks import TASKS, measure_task
from hf_genlm.run_folder import Listener

if TYPE_CHECKING:
    from hf_genlm.long_range.training import TaskRun

DEFAULT_DECODERS = ("elman", "gru", "lstm", "gated_linear", "transformer", "sliding", "hybrid")
OnProgress = Callable[[float, str], None]  # (share of the run that is done, facts to show)


@dataclass(frozen=True)
class RangeResults:
    """Outcomes of all trained models and the files that report them."""

    outcomes: list[Outcome]
    html: Path
    markdown: Path

    @property
    def sentences(self) -> list[str]:
        """One sentence per task: which decoders solve its largest size."""
        largest = {outcome.task: outcome.sizes[-1] for outcome in self.outcomes}
        return [sentence(self.outcomes, task, size) for task, size in largest.items()]


def train_and_measure(run: "TaskRun", on_progress: OnProgress) -> Outcome:
    """Train one model on its task and measure its accuracy at every size."""
    from hf_genlm.long_range.training import train_on_task

    trained = train_on_task(run, on_progress)
    task = TASKS[run.task]
    return Outcome(
        task=run.task, decoder=run.decoder, seed=run.seed, learning_rate=run.learning_rate,
        size_name=task.size_name, sizes=run.sizes, chance=tuple(task.chance(size) for size in run.sizes),
        mixers=tuple(trained.model.config.mixer_types or ()), n_parameters=trained.n_parameters,
        steps=trained.steps, seconds=round(trained.seconds, 1),
        measurements=tuple(measure_task(trained.model, task, run.sizes)),
    )  # fmt: skip


def measure_range(
    out: str | Path,
    *,
    decoders: Sequence[str] = DEFAULT_DECODERS,
    tasks: Sequence[str] = tuple(TASKS),
    recall_pairs: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    steps: int = 400,
    minutes: float | None = None,
    seeds: int = 3,
    learning_rates: Sequence[float] = (0.003, 0.001),
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    listener: Listener | None = None,
    train: Callable[["TaskRun", OnProgress], Outcome] = train_and_measure,
) -> RangeResults:
    """Train a small model for each decoder, task and seed, and report how far each decoder remembers.

    Outcomes are kept in `out`/runs; the same call trains what is missing and writes the report.

    Args:
        out: folder for the outcomes and the report.
        decoders: presets of the model room.
        tasks: names in `tasks.TASKS`.
        recall_pairs: sizes of the tasks that count pairs (recall). Default: those of the task.
        lengths: sizes of the tasks that count tokens (copy, passkey). Default: those of the task.
        steps: training steps of each model; not used if `minutes` is given.
        minutes: training time of each model.
        seeds: number of seeds.
        learning_rates: tried in this order with the first seed until one solves the largest size; the other
            seeds use the best of those tried.
        hidden_size, num_hidden_layers: width and depth of every model.
        listener: receives the events "progress" and "measured".
        train: trains and measures one model.

    Raises:
        UserError: an unknown decoder or task, a value out of range, or outcomes of other settings in `out`.
    """
    from hf_genlm.long_range.training import TaskRun

    decoders = _check_names(decoders, DEFAULT_DECODERS, "decoder")
    tasks = _check_names(tasks, TASKS, "task")
    sizes = {name: _sizes_of(name, recall_pairs, lengths) for name in tasks}
    budget: dict[str, Any] = {"steps": steps} if minutes is None else {"steps": None, "minutes": minutes}
    shape = {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers}
    runs = [
        TaskRun(task=task, decoder=decoder, seed=seed, sizes=sizes[task], **budget, **shape)
        for seed in range(seeds)  # the outer loop: an early end leaves complete seeds
        for task in tasks
        for decoder in decoders
    ]
    if Path(out).is_dir():
        refuse_links_out(out)
    outcomes = _run_all(runs, learning_rates, Path(out), listener or (lambda event, fields: None), train)
    command = _command(
        decoders=decoders, tasks=tasks, recall_pairs=recall_pairs, lengths=lengths, **budget, seeds=seeds,
        rates=learning_rates, width=hidden_size, layers=num_hidden_layers, out=out,
    )  # fmt: skip
    html, markdown = write_range_report(Path(out), outcomes, command)
    return RangeResults(outcomes, html, markdown)


def _sizes_of(task: str, pairs: Sequence[int] | None, lengths: Sequence[int] | None) -> tuple[int, ...]:
    """Sizes of a task, ascending: those that were given for what it counts, or its usual ones."""
    given = pairs if TASKS[task].size_name == "pairs" else lengths
    sizes = tuple(sorted(given or TASKS[task].sizes))
    for size in sizes:
        TASKS[task].check_size(size)
    return sizes


def _run_all(
    runs: "Sequence[TaskRun]",
    learning_rates: Sequence[float],
    folder: Path,
    tell: Listener,
    train: Callable[["TaskRun", OnProgress], Outcome],
) -> list[Outcome]:
    """The outcome of each run: of the best learning rate for the first seed of a task and decoder."""
    first_seed: dict[tuple[str, str], Outcome] = {}
    outcomes = []
    for number, run in enumerate(runs, 1):
        place = f"{number} of {len(runs)}"
        known = first_seed.get((run.task, run.decoder))
        tried: list[Outcome] = []
        for rate in learning_rates if known is None else [known.learning_rate]:
            tried.append(_load_or_train(replace(run, learning_rate=rate), folder, place, tell, train))
            if tried[-1].accuracies[-1] >= SOLVED:
                break
        best = max(tried, key=lambda outcome: sum(outcome.accuracies))
        first_seed.setdefault((run.task, run.decoder), best)
        outcomes.append(best)
    return outcomes


def _load_or_train(
    run: "TaskRun",
    folder: Path,
    place: str,
    tell: Listener,
    train: Callable[["TaskRun", OnProgress], Outcome],
) -> Outcome:
    """Read the outcome of `run` from the folder if it is there; otherwise train, and write it."""
    file = folder / "runs" / f"{run.name}.json"
    if file.is_file():
        content = read_json(file)
        if content.get("run") != run.to_json():
            raise UserError(
                f"{str(file)!r} was trained with other settings: name another --out, or those settings"
            )
        return Outcome.from_json(content["outcome"])

    def on_progress(share: float, facts: str) -> None:
        tell("progress", {"task": f"{place}  {run.name}  {facts}", "done": share, "total": 1.0})

    outcome = train(run, on_progress)
    write_json(file, {"run": run.to_json(), "outcome": outcome.to_json()})
    size = f"{run.sizes[-1]} {outcome.size_name}"
    measured = {"accuracy": outcome.accuracies[-1], "size": size, "seconds": outcome.seconds}
    tell("measured", {"place": place, "run": run.name, **measured})
    return outcome


def _check_names(names: Sequence[str], known: Iterable[str], kind: str) -> list[str]:
    """`names` without repeats.

    Raises:
        UserError: a name that is not in `known`, or no name.
    """
    found = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    for name in found:
        if name not in known:
            raise UserError(f"unknown {kind} {name!r}{did_you_mean(name, known)}")
    if not found:
        raise UserError(f"no {kind} is named; known: {', '.join(known)}")
    return found


def _command(**options: Any) -> str:
    """The command line with these options; options that are None are left out."""
    words = ["hf-genlm", "range"]
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            shown = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
            words += [f"--{name.replace('_', '-')}", ",".join(shown)]
    return shlex.join(words)
