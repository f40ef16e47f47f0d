"""The report of a comparison: the verdict first, then the numbers, what was equal, and how to repeat it."""

import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from hf_genlm.comparison.pictures import draw_curves, draw_scores
from hf_genlm.comparison.plan import Plan
from hf_genlm.comparison.results import CandidateResult, Results, p_words, plan_run, verdict
from hf_genlm.comparison.running import ComparisonFolder
from hf_genlm.files import read_json
from hf_genlm.report.document import Block, Code, Heading, Lead, Picture, Table, Text, write_report

_UNKNOWN = "unknown"
_ALIKE = 0.01  # quantities that differ by less are called equal
_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def write_comparison(folder: ComparisonFolder, plan: Plan, results: Results) -> tuple[Path, Path]:
    """Write report.html, report.md and plots/ into `folder`; returns the paths of the reports."""
    scores = draw_scores(results, folder.plots / "scores.png")
    curves, is_validation = draw_curves(results, folder.plots / "curves.png")
    what = "Loss on a part of the held-out text" if is_validation else "Loss on the training text"
    first_run = folder.run(plan_run(results.best))
    blocks: list[Block] = [
        Lead(verdict(results)),
        *_failures(results, plan),
        Picture(
            scores,
            f"Bits per byte of {_names(results)}, and how much more each has than {results.best.name}",
            "Above: a dot for each seed, a stroke for their mean, a band for its 95 % interval over seeds "
            "and texts. All are measured on the same text, so bands that overlap say little. Below, what "
            "decides: the difference from the best, paired, with its 95 % interval; filled where the two can "
            "be told apart.",
        ),
        Heading("Results"),
        _scores(results, plan),
        *_differences(results),
        Heading("What was equal"),
        Text(_equal(results, plan)),
        _quantities(results),
        Heading("On the way"),
        Picture(
            curves, f"{what} against the time of training, of {_names(results)}", f"{what}, a line a run."
        ),
        Heading("How sure this is"),
        *(Text(text) for text in _limits(results, plan)),
        Heading("How to repeat it"),
        Text(
            "Each run is an ordinary run folder, which every verb takes. Its recipe repeats it, from where "
            "the comparison was started; for the other seeds say --seed:"
        ),
        Code("\n".join(_commands(folder, results)), "bash"),
        Text(_about_text(folder, results)),
        Text(_about_machine(read_json(first_run.environment))),
    ]
    return write_report(folder.path, f"{_names(results)}: which one?", blocks)


def _names(results: Results) -> str:
    names = sorted(candidate.name for candidate in results.candidates)
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])


def _failures(results: Results, plan: Plan) -> list[Block]:
    if not results.failed:
        return []
    table = Table(["run", "why it failed"], [[name, reason] for name, reason in results.failed.items()])
    n = len(results.failed)
    return [Text(f"{n} of {len(plan.runs())} runs failed and are left out of every number below."), table]


def _scores(results: Results, plan: Plan) -> Table:
    rows = [
        [
            c.name,
            f"{c.mean.value:.3f}",
            _ends(c.mean.interval),
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
        "Compare by the differences below, not by whether these overlap.",
        best=frozenset({0}),
    )


def _differences(results: Results) -> list[Block]:
    if not results.differences:
        return []
    rows = [
        [
            d.name,
            f"{d.estimate.value:+.3f}",
            _ends(d.estimate.interval),
            p_words(d.p_value),
            "worse" if d.is_told else "cannot be told",
        ]
        for d in results.differences
    ]
    return [
        Table(
            [f"against {results.best.name}", "bits per byte", "95 %", "p (Holm)", "verdict"],
            rows,
            "Each interval stands for itself; p is corrected for all pairs of candidates by Holm's method, "
            "since which one is best was read from the same numbers.",
        )
    ]


_QUANTITIES: tuple[tuple[str, Callable[[CandidateResult], float | None], Callable[[float], str]], ...] = (
    ("parameters", lambda c: c.parameters, lambda x: _short(x)),
    ("tokens seen", lambda c: c.average("tokens"), lambda x: _short(x)),
    ("passes over the text", lambda c: c.average("passes"), lambda x: f"{x:.2f}"),
    ("tokens/s", lambda c: c.average("tokens_per_s"), lambda x: _short(x)),
    ("training FLOPs", lambda c: c.training_flops, lambda x: _short(x)),
    ("minutes", lambda c: _minutes(c), lambda x: f"{x:.2f}" if x >= 0.1 else f"{x:.3f}"),
)


def _minutes(candidate: CandidateResult) -> float:
    return (candidate.average("seconds") or 0.0) / 60


def _quantities(results: Results) -> Table:
    rows = []
    for candidate in results.candidates:
        cells = [(value(candidate), words) for _, value, words in _QUANTITIES]
        rows.append(
            [
                candidate.name,
                f"{candidate.layers} x {candidate.hidden_size}",
                *(_UNKNOWN if value is None else words(value) for value, words in cells),
                "all before" if candidate.context is None else f"{candidate.context:,}",
            ]
        )
    return Table(
        ["", "layers x width", *(name for name, _, _ in _QUANTITIES), "context"],
        rows,
        "Means over the seeds. FLOPs are 3 x forward FLOPs per token x tokens; minutes those of the steps. "
        "Context: tokens that a prediction may look back on when it is measured.",
    )


def _equal(results: Results, plan: Plan) -> str:
    """What was given alike, and what came out alike and otherwise."""
    given = {
        "minutes": f"{plan.amount:.3g} minutes of training on this machine",
        "steps": f"{plan.amount:g} optimizer steps",
        "tokens": f"{_short(plan.amount)} tokens of training",
        "flops": f"{_short(plan.amount)} FLOPs of training",
    }[plan.until]
    sized = f", at about {plan.parameters} parameters" if plan.parameters else ""
    tokens = "" if results.vocab_size is None else f", one tokenizer of {results.vocab_size:,} tokens"
    if not plan.one_tokenizer:
        tokens = ", a tokenizer for each recipe by what it says"
    alike, unlike = [], []
    for name, value, words in _QUANTITIES:
        values = [value(candidate) for candidate in results.candidates]
        known = [v for v in values if v is not None]
        if known and max(known) > (1 + _ALIKE) * min(known):
            unlike.append(f"{name} ({words(min(known))} to {words(max(known))})")
        elif known:
            alike.append(name)
    sentences = [f"Each run was given {given}{sized}, on the same text{tokens}."]
    if alike:
        sentences.append(f"Equal within 1 %: {', '.join(alike)}.")
    if unlike:
        sentences.append(f"Not equal: {', '.join(unlike)}.")
    planned = plan.is_by_clock and plan.parameters is None
    if planned:
        sentences.append(
            "Where no size was stated, it is the one that the training would have chosen for that time, "
            "planned once for all seeds of a candidate."
        )
    return " ".join(sentences)


def _limits(results: Results, plan: Plan) -> Sequence[str]:
    several = "" if results.n_pieces == 1 else "s"
    pieces = f"{results.n_pieces:,} {results.piece}{several} of {results.n_bytes:,} bytes in all"
    seeds = (
        "With one seed, how much a candidate varies from run to run is not known: the intervals say whether "
        "these very models differ on such texts, not whether the candidates do. Give --seeds 3 or more."
        if plan.seeds == 1
        else f"{plan.seeds} seeds tell the variation between runs roughly, which makes the intervals wide; "
        "they assume that runs vary normally. More seeds make them narrower."
    )
    about_pieces = (
        "Documents are taken to be independent of each other."
        if results.piece == "document"
        else "Blocks of one document resemble their neighbours, so the part of the text in an interval is "
        "rather too small. A held-out text of many documents tells more."
    )
    if results.n_pieces == 1:
        about_pieces = (
            f"The held-out text is one piece of {results.n_bytes:,} bytes: how much it decides is not known, "
            "and the intervals are over seeds alone. Hold out more by --validation FILE."
        )
    return (
        "The variance of a difference is that between the seeds of each candidate, over their number, and "
        f"that between the pieces of the held-out text ({pieces}), paired. Their sum has the degrees of "
        "freedom of Satterthwaite (1946) and is tested by Student's t, as Welch (1947) does; where seeds and "
        "text interact it is rather too large (Owen, 2007). Many p-values are corrected as by Holm (1979).",
        seeds,
        about_pieces,
        "A comparison holds for its text, its amount of training and its machine: more can turn it.",
    )


def _commands(folder: ComparisonFolder, results: Results) -> list[str]:
    recipes = [folder.run(plan_run(candidate)).recipe for candidate in results.candidates]
    return [f"hf-genlm train --recipe {shlex.quote(str(recipe))} --out again" for recipe in recipes]


def _about_text(folder: ComparisonFolder, results: Results) -> str:
    corpus = read_json(folder.run(plan_run(results.best)).corpus)
    splits = "; ".join(
        f"{name} {corpus[split]['bytes']:,} bytes"
        if corpus[split]["bytes"] is not None
        else f"{name} what was read of a stream"
        for name, split in (("trained on", "train"), ("held out", "validation"))
    )
    digest = (corpus["validation"]["sha256"] or _UNKNOWN)[:16]
    return f"Text: {corpus['description']}; {splits}. The held-out text has the sha256 {digest}..."


def _about_machine(environment: dict) -> str:
    versions = {name: environment["packages"][name] for name in ("hf_genlm", "torch", "transformers")}
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    return (
        f"Machine: {environment['device']}, {environment['cpu_count']} CPU cores, {environment['platform']}; "
        f"Python {environment['python']}, {packages}."
    )


def _ends(interval: tuple[float, float] | None) -> str:
    return _UNKNOWN if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def _short(number: float) -> str:
    """Three figures and a unit: 1.23M."""
    if not math.isfinite(number):
        return _UNKNOWN
    for size, unit in _UNITS:
        if number >= size:
            return f"{float(f'{number / size:.3g}'):g}{unit}"
    return f"{number:.3g}"
