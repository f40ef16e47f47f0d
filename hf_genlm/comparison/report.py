"""Report of a comparison: verdict, scores, what was equal, how certain it is, and how to repeat it."""

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_genlm.comparison.plan import Plan
from hf_genlm.comparison.results import CandidateResult, Results, format_p_value, verdict
from hf_genlm.comparison.runs import ComparisonFolder
from hf_genlm.files import read
from hf_genlm.report.document import Block, Code, Heading, Lead, Picture, Table, Text, write_report
from hf_genlm.report.figures import COLOURS, line_style, new_figure, save_png
from hf_genlm.run_schemas import CorpusFile, EnvironmentFile

_UNKNOWN = "unknown"
_EQUAL_WITHIN = 0.01  # relative difference up to which quantities are called equal
_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_WIDTH = 5.2  # inches: text in a plot stays legible on a phone
_ROW, _FRAME = 0.42, 0.95  # inches: height of a candidate, and of the frame
_MIN_CURVE_POINTS = 2


def write_comparison(folder: ComparisonFolder, plan: Plan, results: Results) -> tuple[Path, Path]:
    """Write report.html, report.md and plots/ into `folder`; return the paths of the reports."""
    scores = draw_scores(results, folder.plots / "scores.png")
    curves, is_validation = draw_curves(results, folder.plots / "curves.png")
    curve = "Loss on a part of the held-out text" if is_validation else "Loss on the training text"
    names = sorted(candidate.name for candidate in results.candidates)
    listed = " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])
    recipes = [folder.run(candidate.first_run).recipe for candidate in results.candidates]
    commands = [f"hf-genlm train --recipe {shlex.quote(str(recipe))} --out again" for recipe in recipes]
    blocks: list[Block] = [
        Lead(verdict(results)),
        *_failures(results, plan),
        Picture(
            scores,
            f"Bits per byte of {listed}, and the difference of each from {results.best.name}",
            "Above: a dot for each seed, a stroke for their mean, a band for its 95 % interval over seeds "
            "and texts. All are measured on the same text, so overlapping bands mean little. Below: the "
            "paired difference from the best with its 95 % interval; filled if it is significant.",
        ),
        Heading("Results"),
        _score_table(results, plan),
        *_difference_table(results),
        Heading("What was equal"),
        Text(_describe_equality(results, plan)),
        _quantity_table(results),
        Heading("During training"),
        Picture(curves, f"{curve} by training time, of {listed}", f"{curve}, one line per run."),
        Heading("How certain this is"),
        *(Text(text) for text in _describe_limits(results, plan)),
        Heading("How to repeat it"),
        Text(
            "Each run is an ordinary run folder that every verb accepts. Its recipe repeats it, from the "
            "folder in which the comparison was started; add --seed for the other seeds:"
        ),
        Code("\n".join(commands), "bash"),
        Text(_describe_text(folder, results)),
        Text(_describe_machine(read(folder.run(results.best.first_run).environment, EnvironmentFile))),
    ]
    return write_report(folder.path, f"{listed}: which one?", blocks)


def _failures(results: Results, plan: Plan) -> list[Block]:
    if not results.failed:
        return []
    table = Table(["run", "reason"], [[name, reason] for name, reason in results.failed.items()])
    n = len(results.failed)
    return [Text(f"{n} of {len(plan.runs())} runs failed and are left out of every number below."), table]


def _score_table(results: Results, plan: Plan) -> Table:
    rows = [
        [
            c.name,
            f"{c.mean.value:.3f}",
            _format_interval(c.mean.interval),
            *([f"{c.nats_per_token:.3f}"] if plan.one_tokenizer else []),
            f"{len(c.runs)} of {plan.seeds}",
        ]
        for c in results.candidates
    ]
    nats = ["nats per token"] if plan.one_tokenizer else []
    return Table(
        ["", "bits per byte", "95 %", *nats, "seeds"],
        rows,
        "Mean over the seeds; less is better. The intervals are over seeds and texts of this kind. "
        "Compare by the differences below, not by the overlap of these.",
        best=frozenset({0}),
    )


def _difference_table(results: Results) -> list[Block]:
    if not results.differences:
        return []
    rows = [
        [
            d.name,
            f"{d.estimate.value:+.3f}",
            _format_interval(d.estimate.interval),
            format_p_value(d.p_value),
            "worse" if d.is_significant else "not significant",
        ]
        for d in results.differences
    ]
    return [
        Table(
            [f"against {results.best.name}", "bits per byte", "95 %", "p (Holm)", "verdict"],
            rows,
            "Intervals are not adjusted; p-values are adjusted for all pairs of candidates by Holm's method, "
            "since the best was chosen by the same numbers.",
        )
    ]


class _Quantity(NamedTuple):
    name: str
    value: Callable[[CandidateResult], float | None]
    format: Callable[[float], str]


def _minutes(candidate: CandidateResult) -> float:
    return (candidate.average("seconds") or 0.0) / 60


def _short(number: float) -> str:
    """Three significant digits and a unit: 1.23M."""
    if not math.isfinite(number):
        return _UNKNOWN
    for size, unit in _UNITS:
        if number >= size:
            return f"{float(f'{number / size:.3g}'):g}{unit}"
    return f"{number:.3g}"


_QUANTITIES = (
    _Quantity("parameters", lambda c: c.parameters, _short),
    _Quantity("tokens seen", lambda c: c.average("tokens"), _short),
    _Quantity("epochs", lambda c: c.average("passes"), lambda x: f"{x:.2f}"),
    _Quantity("tokens/s", lambda c: c.average("tokens_per_s"), _short),
    _Quantity("training FLOPs", lambda c: c.training_flops, _short),
    _Quantity("minutes", _minutes, lambda x: f"{x:.2f}" if x >= 0.1 else f"{x:.3f}"),
    _Quantity(
        "context", lambda c: c.context or math.inf, lambda x: "all before" if x == math.inf else f"{x:,}"
    ),
)


def _quantity_table(results: Results) -> Table:
    rows = []
    for candidate in results.candidates:
        cells = [(quantity.value(candidate), quantity.format) for quantity in _QUANTITIES]
        rows.append(
            [
                candidate.name,
                f"{candidate.layers} x {candidate.hidden_size}",
                *(_UNKNOWN if value is None else form(value) for value, form in cells),
            ]
        )
    return Table(
        ["", "layers x width", *(quantity.name for quantity in _QUANTITIES)],
        rows,
        "Means over the seeds. FLOPs are 3 x forward FLOPs per token x tokens; minutes are those of the "
        "steps. Context: maximum number of tokens that a prediction is conditioned on in the evaluation.",
    )


def _describe_equality(results: Results, plan: Plan) -> str:
    """The budget of each run, and the quantities that are equal and unequal."""
    budget = {
        "minutes": f"{plan.amount:.3g} minutes of training on this machine",
        "steps": f"{plan.amount:g} optimizer steps",
        "tokens": f"{_short(plan.amount)} tokens of training",
        "flops": f"{_short(plan.amount)} FLOPs of training",
    }[plan.until]
    size = f", at about {plan.parameters} parameters" if plan.parameters else ""
    tokenizer = "" if results.vocab_size is None else f", one tokenizer of {results.vocab_size:,} tokens"
    if not plan.one_tokenizer:
        tokenizer = ", a tokenizer for each recipe"
    equal, unequal = [], []
    for quantity in _QUANTITIES:
        values = [quantity.value(candidate) for candidate in results.candidates]
        known = [value for value in values if value is not None]
        if known and max(known) > (1 + _EQUAL_WITHIN) * min(known):
            low, high = quantity.format(min(known)), quantity.format(max(known))
            unequal.append(f"{quantity.name} ({low} to {high})")
        elif known:
            equal.append(quantity.name)
    sentences = [f"Each run had a budget of {budget}{size}, on the same text{tokenizer}."]
    if equal:
        sentences.append(f"Equal within 1 %: {', '.join(equal)}.")
    if unequal:
        sentences.append(f"Not equal: {', '.join(unequal)}.")
    if plan.has_time_budget and plan.parameters is None:
        sentences.append(
            "If no size was stated, it is the one that training would choose for this time, chosen once for "
            "all seeds of a candidate."
        )
    return " ".join(sentences)


def _describe_limits(results: Results, plan: Plan) -> list[str]:
    several = "" if results.n_pieces == 1 else "s"
    pieces = f"{results.n_pieces:,} {results.piece}{several} of {results.n_bytes:,} bytes in all"
    if plan.seeds == 1:
        about_seeds = (
            "With one seed, the variation of a candidate from run to run is unknown: the intervals say "
            "whether these very models differ on such texts, not whether the candidates do. Give --seeds 3 "
            "or more."
        )
    else:
        about_seeds = (
            f"{plan.seeds} seeds are a rough measure of the variation between runs, which makes the "
            "intervals wide; they assume that runs vary normally. More seeds make them narrower."
        )
    if results.n_pieces == 1:
        about_pieces = (
            f"The held-out text is one piece of {results.n_bytes:,} bytes: its influence is unknown, and the "
            "intervals are over seeds alone. Hold out more with --validation FILE."
        )
    elif results.piece == "document":
        about_pieces = "Documents are assumed to be independent of each other."
    else:
        about_pieces = (
            "Adjacent blocks of a document are correlated, so the part of the text in an interval is rather "
            "too small. A held-out text of many documents is better."
        )
    return [
        "The variance of a difference is that between the seeds of each candidate, over their number, and "
        f"that between the pieces of the held-out text ({pieces}), paired. The sum has the degrees of "
        "freedom of Satterthwaite (1946) and is tested by Student's t, as in Welch (1947); if seeds and "
        "text interact it is rather too large (Owen, 2007). p-values are adjusted by Holm's method (1979).",
        about_seeds,
        about_pieces,
        "A comparison holds for its text, its budget and its machine: with more training it may turn.",
    ]


def _describe_text(folder: ComparisonFolder, results: Results) -> str:
    corpus = read(folder.run(results.best.first_run).corpus, CorpusFile)
    splits = "; ".join(
        f"{name} {split.bytes:,} bytes" if split.bytes is not None else f"{name} what was read of a stream"
        for name, split in (("trained on", corpus.train), ("held out", corpus.validation))
    )
    digest = (corpus.validation.sha256 or _UNKNOWN)[:16]
    return f"Text: {corpus.description}; {splits}. The held-out text has the sha256 {digest}..."


def _describe_machine(environment: EnvironmentFile) -> str:
    versions = {name: environment.packages.get(name) for name in ("hf_genlm", "torch", "transformers")}
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    return (
        f"Machine: {environment.device}, {environment.cpu_count} CPU cores, {environment.platform}; "
        f"Python {environment.python}, {packages}."
    )


def _format_interval(interval: tuple[float, float] | None) -> str:
    return _UNKNOWN if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def draw_scores(results: Results, path: Path) -> Path:
    """Draw bits per byte with a dot for each seed above, and the differences from the best below."""
    n = len(results.candidates)
    rows = 2 if results.differences else 1
    figure, axes = new_figure(_WIDTH, rows * _FRAME + (2 * n - 1) * _ROW if rows == 2 else 1.6, rows)
    above, below = (axes[0], axes[1]) if rows == 2 else (axes, None)
    for place, candidate in enumerate(results.candidates):
        style: Any = {"color": COLOURS[place % len(COLOURS)]}
        if candidate.mean.interval is not None:
            above.plot(candidate.mean.interval, [place, place], linewidth=5, alpha=0.3, **style)
        above.plot([candidate.mean.value], [place], marker="|", markersize=16, markeredgewidth=2, **style)
        values = [run.bits_per_byte for run in candidate.runs]
        above.plot(values, np.full(len(values), place), "o", markersize=5, markeredgecolor="white", **style)
    _label_rows(above, [candidate.name for candidate in results.candidates])
    above.set_xlabel("bits per byte (less is better)")
    if below is not None:
        for place, difference in enumerate(results.differences):
            style = {"color": COLOURS[(place + 1) % len(COLOURS)]}
            if difference.estimate.interval is not None:
                below.plot(difference.estimate.interval, [place, place], linewidth=2, **style)
            face = style["color"] if difference.is_significant else "white"
            below.plot([difference.estimate.value], [place], "D", markersize=7, markerfacecolor=face, **style)
        below.axvline(0, color="#444444", linewidth=1, linestyle="--")
        _label_rows(below, [difference.name for difference in results.differences])
        below.set_xlabel(f"bits per byte more than {results.best.name}")
    return save_png(figure, path)


def _label_rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def draw_curves(results: Results, path: Path) -> tuple[Path, bool]:
    """Draw the loss by training time, a line for each run.

    Returns:
        The path, and True for the loss on held-out text. Short runs do not validate while they train, and
        show the loss on the training text, in bits per byte if their tokenizers differ.
    """
    in_bits = results.vocab_size is None
    runs = [run for candidate in results.candidates for run in candidate.runs]
    is_validation = all(len(run.validation_curve) >= _MIN_CURVE_POINTS for run in runs)
    figure, axes = new_figure(_WIDTH, 3.6)
    longest = max(run.seconds for run in runs)
    unit, name = (60.0, "minutes") if longest >= 120 else (1.0, "seconds")
    for place, candidate in enumerate(results.candidates):
        style = {**line_style(place), "linewidth": 1.3}
        if not is_validation:
            style["marker"] = None
        for number, run in enumerate(candidate.runs):
            curve = run.validation_curve if is_validation else run.training_curve[1:] or run.training_curve
            seconds, values = np.array(curve or np.empty((0, 2))).T
            if in_bits and not is_validation:
                values = values * run.bits_per_byte / run.nats_per_token
            label = candidate.name if number == 0 else None
            axes.plot(seconds / unit, values, label=label, **style)
    axes.set_xlabel(f"{name} of training")
    loss = f"training loss, {'bits per byte' if in_bits else 'nats per token'}"
    axes.set_ylabel("bits per byte, part of held-out text" if is_validation else loss)
    axes.legend(frameon=False)
    return save_png(figure, path), is_validation
