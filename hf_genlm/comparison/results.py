"""What the runs of a comparison came to: means, differences and the verdict, read from their folders."""

import itertools
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hf_genlm.comparison.plan import Plan, Run
from hf_genlm.comparison.running import ComparisonFolder, prepared_of
from hf_genlm.comparison.statistics import Estimate, difference_in_bits, holm, mean_bits
from hf_genlm.config.recipe import load_recipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.aggregation import BlockSums
from hf_genlm.files import read_json, write_json
from hf_genlm.run_folder import RunFolder

SIGNIFICANT = 0.05
MIN_DOCUMENT_CLUSTERS = 20  # from so many on, documents are the pieces of text that are paired


@dataclass(frozen=True)
class RunResult:
    """One finished run. The curves are (seconds of training, value) each."""

    name: str
    seed: int
    bits_per_byte: float
    nats_per_token: float
    steps: int
    tokens: int
    passes: float | None
    seconds: float
    tokens_per_s: float
    validation_curve: list[tuple[float, float]] = field(repr=False)  # bits per byte of a part of the text
    training_curve: list[tuple[float, float]] = field(repr=False)  # nats per token


@dataclass(frozen=True)
class CandidateResult:
    """A candidate over its finished runs; `mean` is that of their bits per byte."""

    name: str
    runs: list[RunResult]
    mean: Estimate
    nats_per_token: float
    parameters: int
    hidden_size: int
    layers: int
    context: int | None  # tokens that a measured prediction looked back on; None: to the document's start
    training_flops: float

    def average(self, name: str) -> float | None:
        """Of a figure of its runs; None: not known."""
        values = [getattr(run, name) for run in self.runs]
        return None if None in values else float(np.mean(values))


@dataclass(frozen=True)
class Difference:
    """How much worse a candidate is than the best, in bits per byte; `p_value` is Holm's."""

    name: str
    estimate: Estimate
    p_value: float | None

    @property
    def is_told(self) -> bool:
        """True if it can be told from the best."""
        return self.p_value is not None and self.p_value < SIGNIFICANT


@dataclass(frozen=True)
class Results:
    """All of a comparison: `candidates` from the best on, and `failed` runs with their reasons."""

    candidates: list[CandidateResult]
    differences: list[Difference]
    failed: dict[str, str]
    n_pieces: int  # of the held-out text, that are paired
    piece: str  # document or block
    n_bytes: int  # of the held-out text
    vocab_size: int | None  # of the one tokenizer

    @property
    def best(self) -> CandidateResult:
        """With the fewest bits per byte."""
        return self.candidates[0]

    def to_json(self) -> dict[str, Any]:
        """Every number, by name."""
        return {
            "verdict": verdict(self),
            "held_out": {"bytes": self.n_bytes, "pieces": self.n_pieces, "piece": self.piece},
            "candidates": [_candidate_json(candidate) for candidate in self.candidates],
            "worse_than_best": [
                {"name": d.name, **_estimate_json(d.estimate), "p_value_holm": d.p_value}
                for d in self.differences
            ],
            "failed": self.failed,
        }


def read_results(folder: ComparisonFolder, plan: Plan, failed: dict[str, str]) -> Results:
    """The results of all finished runs; writes comparison.json.

    Raises:
        UserError: no run was finished.
    """
    prepared = prepared_of(folder)
    tables: dict[str, list[np.ndarray]] = {}
    runs: dict[str, list[RunResult]] = {}
    for run in sorted(plan.runs(), key=lambda run: run.seed):
        if run.name not in failed:
            table = BlockSums.load(folder.run(run).blocks).table
            tables.setdefault(run.candidate, []).append(table)
            runs.setdefault(run.candidate, []).append(_read_run(folder.run(run), run, table))
    if not runs:
        raise UserError(f"every run failed, the first by: {next(iter(failed.values()))}")
    table = next(iter(tables.values()))[0]
    n_documents = len(np.unique(table["document"]))
    by_document = n_documents >= MIN_DOCUMENT_CLUSTERS
    piece_of = np.unique(table["document"], return_inverse=True)[1] if by_document else np.arange(len(table))
    bytes_C = np.bincount(piece_of, table["bytes"])
    nats = {
        name: np.stack([np.bincount(piece_of, each["nats"]) for each in found])
        for name, found in tables.items()
    }
    candidates = [
        _candidate(folder, plan, name, runs[name], nats[name], bytes_C, prepared[name]) for name in runs
    ]
    candidates.sort(key=lambda candidate: candidate.mean.value)
    results = Results(
        candidates=candidates,
        differences=_differences([candidate.name for candidate in candidates], nats, bytes_C),
        failed=failed,
        n_pieces=len(bytes_C),
        piece="document" if by_document else "block",
        n_bytes=round(float(bytes_C.sum())),
        vocab_size=read_json(folder.run(plan_run(candidates[0])).model / "config.json")["vocab_size"]
        if plan.one_tokenizer
        else None,
    )
    write_json(folder.results, results.to_json())
    return results


def plan_run(candidate: CandidateResult) -> Run:
    """The first finished run of a candidate."""
    return Run(candidate.name, candidate.runs[0].seed)


def verdict(results: Results) -> str:
    """The answer in one sentence, from the numbers."""
    best = results.best
    told = [d for d in results.differences if d.is_told]
    untold = [d for d in results.differences if not d.is_told]
    parts = [f"{d.name} is {signed(d.estimate, '')} worse{_p(d)}" for d in told]
    if untold:
        names = ", ".join(f"{d.name} ({signed(d.estimate)}{_p(d)})" for d in untold)
        parts.append(f"not to be told from it: {names}")
    head = "is best" if not untold else "has the lowest mean"
    head = "is the only one that finished" if not results.differences else head
    sentence = f"{best.name} {head}: {best.mean.value:.3f} bits per byte{_interval(best.mean)}"
    return "; ".join([sentence, *parts]) + "."


def signed(estimate: Estimate, plus: str = "+") -> str:
    """A difference with its interval, to three decimals."""
    return f"{plus}{estimate.value:.3f}{_interval(estimate)}"


def p_words(p_value: float | None) -> str:
    """A p-value as it is printed."""
    if p_value is None:
        return "unknown"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.2g}" if p_value < 0.1 else f"{p_value:.2f}"


def _p(difference: Difference) -> str:
    if difference.p_value is None:
        return ""
    words = p_words(difference.p_value)
    return f", p {words}" if words.startswith("<") else f", p = {words}"


def _interval(estimate: Estimate) -> str:
    if estimate.interval is None:
        return ""
    low, high = estimate.interval
    return f" [{low:.3f}, {high:.3f}]"


def _candidate(
    folder: ComparisonFolder,
    plan: Plan,
    name: str,
    runs: list[RunResult],
    nats_SC: np.ndarray,
    bytes_C: np.ndarray,
    prepared: dict[str, Any],
) -> CandidateResult:
    recipe = load_recipe(folder.run(Run(name, runs[0].seed)).recipe)
    return CandidateResult(
        name=name,
        runs=runs,
        mean=mean_bits(nats_SC, bytes_C),
        nats_per_token=float(np.mean([run.nats_per_token for run in runs])),
        parameters=prepared["parameters"],
        hidden_size=prepared["hidden_size"],
        layers=prepared["layers"],
        context=None if recipe.evaluation.carry_state else recipe.evaluation.context_length,
        training_flops=prepared["training_flops_per_token"] * float(np.mean([run.tokens for run in runs])),
    )


def _differences(names: list[str], nats: dict[str, np.ndarray], bytes_C: np.ndarray) -> list[Difference]:
    """Of all but the first from the first. Which one is best was read from the same numbers: so the
    correction counts all pairs, of which these are some."""
    estimates = {
        (one, other): difference_in_bits(nats[other], nats[one], bytes_C)
        for one, other in itertools.combinations(names, 2)
    }
    p_values = {pair: e.p_value for pair, e in estimates.items() if e.p_value is not None}
    adjusted = holm(p_values)
    return [
        Difference(other, estimates[names[0], other], adjusted.get((names[0], other))) for other in names[1:]
    ]


def _read_run(folder: RunFolder, run: Run, table: np.ndarray) -> RunResult:
    events = folder.read_log()
    (trained,) = [event for event in events if event["event"] == "trained"][-1:]
    nats = math.fsum(table["nats"])
    steps = {event["step"]: event for event in events if event["event"] == "step"}
    passed = {step: event["elapsed_s"] for step, event in steps.items()}
    validations = {event["step"]: event for event in events if event["event"] == "validation"}
    return RunResult(
        name=run.name,
        seed=run.seed,
        bits_per_byte=nats / math.log(2) / float(table["bytes"].sum()),
        nats_per_token=nats / int(table["tokens"].sum()),
        steps=trained["steps"],
        tokens=trained["tokens"],
        passes=trained["epochs"],
        seconds=trained["seconds"],
        tokens_per_s=trained["tokens_per_s"],
        validation_curve=[
            (max((s for at, s in passed.items() if at <= step), default=0.0), event["bits_per_byte"])
            for step, event in sorted(validations.items())
        ],
        training_curve=[(event["elapsed_s"], event["loss"]) for _, event in sorted(steps.items())],
    )


def _candidate_json(candidate: CandidateResult) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "bits_per_byte": _estimate_json(candidate.mean),
        "nats_per_token": candidate.nats_per_token,
        "parameters": candidate.parameters,
        "training_flops": candidate.training_flops,
        "runs": [
            {k: v for k, v in asdict(run).items() if not k.endswith("_curve")} for run in candidate.runs
        ],
    }


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    return {**asdict(estimate), "interval": estimate.interval}
