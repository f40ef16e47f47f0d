"""`hf-genlm range`: which decoder remembers how far, by training small ones on tasks that ask for it."""

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_genlm.cli.display import Display
from hf_genlm.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from hf_genlm.long_range.report import Outcome
    from hf_genlm.long_range.training import TaskRun


def run(options: argparse.Namespace) -> None:
    """Train and measure what the folder does not hold yet, and write its report."""
    with Display() as display:
        display.show("loading torch and transformers")
        from hf_genlm.long_range.report import sentence, write_range_report

        runs = _runs(options)
        folder = Path(options.out)
        best: dict[tuple[str, str], Outcome] = {}  # of the first seed of a task and decoder
        outcomes = []
        for number, run in enumerate(runs, 1):
            place, model = f"{number} of {len(runs)}", (run.task, run.decoder)
            if model in best:
                chosen = replace(run, learning_rate=best[model].learning_rate)
                outcomes.append(_outcome(chosen, folder, place, display))
            else:
                best[model] = _best_of_rates(run, options.rates, folder, place, display)
                outcomes.append(best[model])
        command = f"hf-genlm {shlex.join(options.arguments)}"
        html, plain = write_range_report(folder, outcomes, command)
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        largest = next(outcome.sizes[-1] for outcome in outcomes if outcome.task == task)
        print(sentence(outcomes, task, largest))
    print(f"\nreport:  {html}\n         {plain}")


def _runs(options: argparse.Namespace) -> "list[TaskRun]":
    """One for each seed, task and decoder; the seeds last, so that an early end leaves whole ones."""
    from hf_genlm.long_range.tasks import TASKS
    from hf_genlm.long_range.training import TaskRun
    from hf_genlm.model.configuration_genlm import DECODERS

    decoders = _known(options.decoders, DECODERS, "decoder")
    sizes_of = {}
    for name in _known(options.tasks, TASKS, "task"):
        task = TASKS[name]
        given = options.pairs if task.size_name == "pairs" else options.lengths
        sizes_of[name] = tuple(sorted(given or task.sizes))
        for size in sizes_of[name]:
            task.check_size(size)
    return [
        TaskRun(
            task=task,
            decoder=decoder,
            seed=seed,
            sizes=sizes,
            steps=options.steps if options.minutes is None else None,
            minutes=options.minutes,
            hidden_size=options.width,
            num_hidden_layers=options.layers,
        )
        for seed in range(options.seeds)
        for task, sizes in sizes_of.items()
        for decoder in decoders
    ]


def _best_of_rates(
    run: "TaskRun", rates: Sequence[float], folder: Path, place: str, display: Display
) -> "Outcome":
    """The outcome of the best rate; those after one that remembers the largest size are not tried."""
    from hf_genlm.long_range.report import HELD

    outcomes = []
    for rate in rates:
        outcomes.append(_outcome(replace(run, learning_rate=rate), folder, place, display))
        if outcomes[-1].accuracies[-1] >= HELD:
            break
    return max(outcomes, key=lambda outcome: sum(outcome.accuracies))


def _outcome(run: "TaskRun", folder: Path, place: str, display: Display) -> "Outcome":
    """That of `run`, from the folder where it lies there.

    Raises:
        UserError: what lies there was trained by other settings.
    """
    from hf_genlm.long_range.report import Outcome
    from hf_genlm.run_folder import read_json, write_text

    kept = folder / "runs" / f"{run.name}.json"
    if kept.is_file():
        content = read_json(kept)
        if content.get("run") != run.to_json():
            raise UserError(
                f"{str(kept)!r} was trained by other settings: name another --out, or those settings"
            )
        return Outcome.from_json(content["outcome"])
    outcome = _train(run, place, display)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_text(kept, json.dumps({"run": run.to_json(), "outcome": outcome.to_json()}, indent=1) + "\n")
    shown = f"{outcome.accuracies[-1]:.2f} at {run.sizes[-1]} {outcome.size_name}"
    display.say(f"{place:<12}  {run.name:<28} {shown}  ({outcome.seconds:.0f} s)")
    return outcome


def _train(run: "TaskRun", place: str, display: Display) -> "Outcome":
    from hf_genlm.long_range.report import Outcome
    from hf_genlm.long_range.tasks import TASKS, measure_task
    from hf_genlm.long_range.training import train_on_task

    def report(share: float, facts: str) -> None:
        display.hear("progress", {"task": f"{place}  {run.name}  {facts}", "done": share, "total": 1.0})

    trained = train_on_task(run, report)
    task = TASKS[run.task]
    return Outcome(
        task=run.task,
        decoder=run.decoder,
        seed=run.seed,
        learning_rate=run.learning_rate,
        size_name=task.size_name,
        sizes=run.sizes,
        chance=tuple(task.chance(size) for size in run.sizes),
        mixers=tuple(trained.model.config.mixer_types),
        n_parameters=trained.n_parameters,
        steps=trained.steps,
        seconds=round(trained.seconds, 1),
        measurements=tuple(measure_task(trained.model, task, run.sizes)),
    )


def _known(words: str, table: Any, what: str) -> list[str]:
    """The names in `words`, each of them in `table` and once."""
    names = list(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    for name in names:
        if name not in table:
            raise UserError(f"unknown {what} {name!r}{did_you_mean(name, table)}")
    if not names:
        raise UserError(f"no {what} is named: known are {', '.join(table)}")
    return names
