"""Results of decoders on synthetic tasks: means over seeds, and the report.

All sentences of the report are derived from the measurements.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_genlm.evaluation.measurement import Measurement, write_measurements
from hf_genlm.report import figures
from hf_genlm.report.document import Block, Code, Heading, Picture, Table, Text, write_report

SOLVED = 0.9  # accuracy from which on a size counts as solved


@dataclass(frozen=True)
class Outcome:
    """Accuracies of one model, trained on one task with one seed.

    `chance` is the accuracy of guessing for each of `sizes`; `size_name` is the unit of the sizes.
    """

    task: str
    decoder: str
    seed: int
    learning_rate: float
    size_name: str
    sizes: tuple[int, ...]
    chance: tuple[float, ...]
    mixers: tuple[str, ...]
    n_parameters: int
    steps: int
    seconds: float
    measurements: tuple[Measurement, ...]

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Accuracy for each of `sizes`."""
        by_name = {m.name: m.value for m in self.measurements}
        return tuple(by_name[f"{self.task}_accuracy/{size}_{self.size_name}"] for size in self.sizes)

    def to_json(self) -> dict[str, Any]:
        """The fields by name, in JSON types."""
        return {**asdict(self), "measurements": [m.to_json() for m in self.measurements]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Outcome":
        """Invert `to_json`."""
        lists = {name: tuple(content[name]) for name in ("sizes", "chance", "mixers")}
        measurements = tuple(Measurement.from_json(item) for item in content["measurements"])
        return cls(**{**content, **lists, "measurements": measurements})


def over_seeds(outcomes: Sequence[Outcome]) -> list[Measurement]:
    """Average over the seeds of each task and decoder.

    Returns:
        - NAME_accuracy/DECODER/64_pairs, and by distance below it: n counts the questions to all seeds, the
          standard error is over seeds (None for one).
        - NAME_remembered/DECODER: the largest size up to which every mean is at least SOLVED, 0 if there is
          none; n counts seeds.
    """
    found = []
    for task, decoder, group in _groups(outcomes):
        first = group[0]
        means = []
        for rank, measured in enumerate(first.measurements):
            title, part = measured.name.split("/", 1)
            same = [outcome.measurements[rank] for outcome in group]
            means.append(_mean_over_seeds(f"{title}/{decoder}/{part}", same))
        by_name = {m.name: m.value for m in means}
        remembered = 0
        for size in first.sizes:
            if by_name[_name_of(first, size)] < SOLVED:
                break
            remembered = size
        found += means
        name, n = f"{task}_remembered/{decoder}", len(group)
        found.append(Measurement(name, float(remembered), first.size_name, n, None, "made", True))
    return found


def sentence(outcomes: Sequence[Outcome], task: str, size: int) -> str:
    """State which decoders reach an accuracy of SOLVED in `task` at `size`, and which do not."""
    of_task = [outcome for outcome in outcomes if outcome.task == task]
    measured = {m.name: m for m in over_seeds(of_task)}
    able: list[str] = []
    unable: list[str] = []
    for _, decoder, (first, *_) in _groups(of_task):
        found = measured[_name_of(first, size)]
        (able if found.value >= SOLVED else unable).append(f"{decoder} ({_shown(found)})")
    first = of_task[0]
    chance = first.chance[first.sizes.index(size)]
    parts = []
    if able:
        parts.append(f"{_listed(able)} {'reaches' if len(able) == 1 else 'reach'} an accuracy of {SOLVED}")
    if unable:
        rest = "" if able else f" reach an accuracy of {SOLVED}"
        parts.append(f"{_listed(unable)} {'does' if len(unable) == 1 else 'do'} not{rest}")
    return f"{task.capitalize()} of {size} {first.size_name}: {'; '.join(parts)}. Chance is {chance:.2f}."


def write_range_report(folder: Path, outcomes: Sequence[Outcome], command: str) -> tuple[Path, Path]:
    """Write range.json, the plot, report.html and report.md; returns the paths of the reports."""
    write_measurements(folder / "range.json", over_seeds(outcomes))
    tasks = list(dict.fromkeys(outcome.task for outcome in outcomes))
    picture = _draw(folder / "plots" / "range.png", outcomes, tasks)
    blocks: list[Block] = [Text(sentence(outcomes, t, _of(outcomes, t)[0].sizes[-1])) for t in tasks]
    blocks.append(Picture(picture, "accuracy of each decoder by the size of the task", "Grey: chance."))
    for task in tasks:
        blocks += _task_blocks(_of(outcomes, task))
    blocks += [Heading("What was trained"), _model_table(outcomes), Code(command, "bash")]
    return write_report(folder, "Which decoder remembers how far", blocks)


def _task_blocks(outcomes: Sequence[Outcome]) -> list[Block]:
    first = outcomes[0]
    measured = {m.name: m for m in over_seeds(outcomes)}
    groups = list(_groups(outcomes))
    remembered = {
        decoder: int(measured[f"{first.task}_remembered/{decoder}"].value) for _, decoder, _ in groups
    }
    rows = []
    for _, decoder, group in groups:
        accuracies = [_shown(measured[_name_of(group[0], size)]) for size in first.sizes]
        rows.append([decoder, *accuracies, str(remembered[decoder])])
    best = frozenset(i for i, d in enumerate(remembered) if remembered[d] == first.sizes[-1])
    rows.append(["chance", *(f"{chance:.2f}" for chance in first.chance), ""])
    head = ["decoder", *(f"{size} {first.size_name}" for size in first.sizes), f"solved at {SOLVED}"]
    largest = _name_of(first, first.sizes[-1]).split("/")[-1]
    prefix = f"{first.task}_accuracy/{first.decoder}/{largest}/distance_"
    distances = [name.removeprefix(prefix) for name in measured if name.startswith(prefix)]
    by_distance = [
        [d, *(_shown(measured[f"{first.task}_accuracy/{d}/{largest}/distance_{at}"]) for at in distances)]
        for _, d, _ in groups
    ]
    n_seeds = max(len(group) for _, _, group in groups)
    errors = f"± the standard error over {n_seeds} seeds" if n_seeds > 1 else "one seed: no standard errors"
    return [
        Heading(f"{first.task.capitalize()}"),
        Table(head, rows, f"Accuracy by the number of {first.size_name}; {errors}.", best),
        Table(
            ["decoder", *distances],
            by_distance,
            f"At {first.sizes[-1]} {first.size_name}, by the number of tokens between an answer and its "
            "question.",
        ),
    ]


def _model_table(outcomes: Sequence[Outcome]) -> Table:
    rows = []
    for task, decoder, group in _groups(outcomes):
        steps = sorted({outcome.steps for outcome in group})
        rows.append(
            [
                decoder,
                task,
                ", ".join(group[0].mixers),
                f"{group[0].n_parameters:,}",
                f"{group[0].learning_rate:g}",
                " to ".join(f"{step:,}" for step in dict.fromkeys((steps[0], steps[-1]))),
                f"{math.fsum(outcome.seconds for outcome in group) / len(group):.0f}",
            ]
        )
    return Table(
        ["decoder", "task", "layers", "parameters", "learning rate", "steps", "seconds"],
        rows,
        "Width, number of layers, optimizer, tokens per step and curriculum are equal for all; parameters "
        "and seconds of training are not. With the first seed, the next learning rate was tried if the one "
        f"before did not reach {SOLVED} at the largest size; the best of those tried is shown.",
    )


def _draw(path: Path, outcomes: Sequence[Outcome], tasks: Sequence[str]) -> Path:
    figure, axes = figures.new_figure(width=max(7.0, 4.5 * len(tasks)), height=4.0, columns=len(tasks))
    decoders = list(dict.fromkeys(outcome.decoder for outcome in outcomes))
    for task, axis in zip(tasks, [axes] if len(tasks) == 1 else axes, strict=True):
        measured = {m.name: m for m in over_seeds(_of(outcomes, task))}
        for _, decoder, (first, *_) in _groups(_of(outcomes, task)):
            found = [measured[_name_of(first, size)] for size in first.sizes]
            axis.errorbar(
                first.sizes,
                [m.value for m in found],
                [m.stderr or 0.0 for m in found],
                label=decoder,
                capsize=2,
                **figures.line_style(decoders.index(decoder)),
            )
        axis.plot(first.sizes, first.chance, color="#888888", linewidth=1, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(first.sizes, [str(size) for size in first.sizes])
        axis.set(title=task, xlabel=first.size_name, ylabel="accuracy", ylim=(-0.03, 1.05))
    (axes if len(tasks) == 1 else axes[-1]).legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figures.save_png(figure, path)


def _of(outcomes: Sequence[Outcome], task: str) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.task == task]


def _groups(outcomes: Sequence[Outcome]) -> list[tuple[str, str, list[Outcome]]]:
    """Group by (task, decoder), in order of appearance; outcomes are in order of seeds."""
    keys = dict.fromkeys((outcome.task, outcome.decoder) for outcome in outcomes)
    return [(*key, [o for o in outcomes if (o.task, o.decoder) == key]) for key in keys]


def _name_of(outcome: Outcome, size: int) -> str:
    return f"{outcome.task}_accuracy/{outcome.decoder}/{size}_{outcome.size_name}"


def _mean_over_seeds(name: str, same: Sequence[Measurement]) -> Measurement:
    values = [m.value for m in same]
    mean, stderr = math.fsum(values) / len(values), None
    if len(values) > 1:
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        stderr = math.sqrt(variance / len(values))
    return replace(same[0], name=name, value=mean, n=sum(m.n for m in same), stderr=stderr, interval=None)


def _shown(measured: Measurement) -> str:
    error = "" if measured.stderr is None else f" ± {measured.stderr:.2f}"
    return f"{measured.value:.2f}{error}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
