"""Results of a comparison: means and differences in bits per byte with their errors, and the verdict.

Statistics. Two things vary: the run (weights and order of rows, by the seed) and the text that happened to be
held out. All runs are measured on the same text, so seeds and pieces of text are crossed. The variance of a
mean over S seeds is that between the seeds over S, plus that of the text, which for a difference is taken
between pairs on the same piece. If seed and piece interact, both parts contain the interaction, so their sum
is rather too large (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007). The sum gets the
degrees of freedom of Satterthwaite (Biometrics Bulletin 2, 1946), and Student's t with them, as in Welch's
test of two groups (Biometrika 34, 1947). A bootstrap over three seeds would be too narrow: it underestimates
their variance by a third, and does not account for t.

Legend of shapes: S seeds, C pieces (clusters) of the held-out text.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from hf_genlm.comparison.plan import Plan, Run
from hf_genlm.comparison.runs import ComparisonFolder, read_prepared
from hf_genlm.config.recipe import load_recipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.aggregation import MIN_DOCUMENT_CLUSTERS, BlockSums
from hf_genlm.evaluation.measurement import CONFIDENCE_LEVEL, ratio_stderr
from hf_genlm.files import read, write_json
from hf_genlm.run_folder import RunFolder
from hf_genlm.run_schemas import AnyModelConfigFile

SIGNIFICANCE_LEVEL = 0.05
Key = TypeVar("Key")
_Part = tuple[float, float]  # a part of a variance, and its degrees of freedom


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error, and the degrees of freedom of the error; None if unknown."""

    value: float
    stderr: float | None
    degrees: float | None
    minimum: float = -math.inf  # of the scale

    @property
    def interval(self) -> tuple[float, float] | None:
        """The two ends of the 95 % confidence interval."""
        if self.stderr is None:
            return None
        from scipy.stats import t

        reach = float(t.ppf((1 + CONFIDENCE_LEVEL) / 2, self.degrees)) * self.stderr
        return max(self.minimum, self.value - reach), self.value + reach

    @property
    def p_value(self) -> float | None:
        """p-value of the two-sided test that the true value is 0."""
        if self.stderr is None:
            return None
        from scipy.stats import t

        if self.stderr == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * t.sf(abs(self.value) / self.stderr, self.degrees))

    def to_json(self) -> dict[str, Any]:
        """Value, error, degrees and interval by name."""
        names = ("value", "stderr", "degrees", "interval")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class RunResult:
    """One finished run. Curves are pairs of (seconds of training, value)."""

    name: str
    seed: int
    bits_per_byte: float
    nats_per_token: float
    steps: int
    tokens: int
    passes: float | None
    seconds: float
    tokens_per_s: float
    parameters: int | None  # None: the log does not say
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
    context: int | None  # maximum input tokens of the evaluation; None: back to the start of the document
    training_flops: float

    @property
    def first_run(self) -> Run:
        """The first finished run."""
        return Run(self.name, self.runs[0].seed)

    def average(self, name: str) -> float | None:
        """Mean over the runs of a field of RunResult; None if unknown."""
        values = [getattr(run, name) for run in self.runs]
        return None if None in values else float(np.mean(values))

    def to_json(self) -> dict[str, Any]:
        """The results by name, without curves."""
        runs = [{k: v for k, v in asdict(run).items() if not k.endswith("_curve")} for run in self.runs]
        return {
            "name": self.name,
            "bits_per_byte": self.mean.to_json(),
            "nats_per_token": self.nats_per_token,
            "parameters": self.parameters,
            "training_flops": self.training_flops,
            "runs": runs,
        }


@dataclass(frozen=True)
class Difference:
    """Bits per byte of a candidate minus those of the best; `p_value` is adjusted by Holm's method."""

    name: str
    estimate: Estimate
    p_value: float | None

    @property
    def is_significant(self) -> bool:
        """True if the candidate is significantly worse than the best."""
        return self.p_value is not None and self.p_value < SIGNIFICANCE_LEVEL


@dataclass(frozen=True)
class Results:
    """All results of a comparison: `candidates` from the best to the worst, `failed` runs with reasons."""

    candidates: list[CandidateResult]
    differences: list[Difference]
    failed: dict[str, str]
    n_pieces: int  # pieces of the held-out text that are paired
    piece: str  # "document" or "block"
    n_bytes: int  # of the held-out text
    vocab_size: int | None  # of the one tokenizer

    @property
    def best(self) -> CandidateResult:
        """The candidate with the fewest bits per byte."""
        return self.candidates[0]

    def to_json(self) -> dict[str, Any]:
        """Content of comparison.json."""
        return {
            "verdict": verdict(self),
            "held_out": {"bytes": self.n_bytes, "pieces": self.n_pieces, "piece": self.piece},
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "worse_than_best": [
                {"name": d.name, **d.estimate.to_json(), "p_value_holm": d.p_value} for d in self.differences
            ],
            "failed": self.failed,
        }


def read_results(folder: ComparisonFolder, plan: Plan, failed: dict[str, str]) -> Results:
    """Read the results of all finished runs, and write comparison.json.

    Raises:
        UserError: no run was finished.
    """
    prepared = read_prepared(folder, plan)
    tables: dict[str, list[np.ndarray]] = {}
    runs: dict[str, list[RunResult]] = {}
    for run in sorted(plan.runs(), key=lambda run: run.seed):
        if run.name not in failed:
            table = BlockSums.load(folder.run(run).blocks).table
            tables.setdefault(run.candidate, []).append(table)
            runs.setdefault(run.candidate, []).append(_read_run(folder.run(run), run, table))
    if not runs:
        raise UserError(f"every run failed, the first with: {next(iter(failed.values()))}")
    table = next(iter(tables.values()))[0]
    by_document = len(np.unique(table["document"])) >= MIN_DOCUMENT_CLUSTERS
    piece_of = np.unique(table["document"], return_inverse=True)[1] if by_document else np.arange(len(table))
    bytes_C = np.bincount(piece_of, table["bytes"])
    nats = {
        name: np.stack([np.bincount(piece_of, each["nats"]) for each in of_candidate])
        for name, of_candidate in tables.items()
    }
    candidates = []
    for name, finished in runs.items():
        settings = load_recipe(folder.run(Run(name, finished[0].seed)).recipe).evaluation
        n_tokens = float(np.mean([run.tokens for run in finished]))
        candidates.append(
            CandidateResult(
                name=name,
                runs=finished,
                mean=replace(mean_bits(nats[name], bytes_C), minimum=0.0),
                nats_per_token=float(np.mean([run.nats_per_token for run in finished])),
                parameters=finished[0].parameters or prepared[name].parameters,
                hidden_size=prepared[name].hidden_size,
                layers=prepared[name].layers,
                context=None if settings.carry_state else settings.context_length,
                training_flops=prepared[name].training_flops_per_token * n_tokens,
            )
        )
    candidates.sort(key=lambda candidate: candidate.mean.value)
    config = read(folder.run(candidates[0].first_run).model / "config.json", AnyModelConfigFile)
    results = Results(
        candidates=candidates,
        differences=_compare_with_best([candidate.name for candidate in candidates], nats, bytes_C),
        failed=failed,
        n_pieces=len(bytes_C),
        piece="document" if by_document else "block",
        n_bytes=round(float(bytes_C.sum())),
        vocab_size=config.vocab_size if plan.one_tokenizer else None,
    )
    write_json(folder.results, results.to_json())
    return results


def _read_run(folder: RunFolder, run: Run, table: np.ndarray) -> RunResult:
    events = folder.read_log()
    trained = next((event for event in reversed(events) if event["event"] == "trained"), None)
    if trained is None:
        raise UserError(f"{str(folder.log_file)!r} holds no end of the training: remove the run to repeat it")
    nats = math.fsum(table["nats"])
    steps = {event["step"]: event for event in events if event["event"] == "step"}
    elapsed = {step: event["elapsed_s"] for step, event in steps.items()}
    validations = {event["step"]: event for event in events if event["event"] == "validation"}
    return RunResult(
        name=run.name,
        seed=run.seed,
        bits_per_byte=nats / math.log(2) / float(table["bytes"].sum()),
        nats_per_token=nats / int(table["tokens"].sum()),
        steps=trained["steps"],
        tokens=trained["tokens"],
        passes=trained.get("epochs"),
        seconds=trained["seconds"],
        tokens_per_s=trained["tokens_per_s"],
        # of the network, beside which counts take none away
        parameters=next(
            (
                event["parameters"] - (event.get("of_counts") or 0)
                for event in events
                if event["event"] == "model"
            ),
            None,
        ),
        validation_curve=[
            (max((s for at, s in elapsed.items() if at <= step), default=0.0), event["bits_per_byte"])
            for step, event in sorted(validations.items())
        ],
        training_curve=[(event["elapsed_s"], event["loss"]) for _, event in sorted(steps.items())],
    )


def _compare_with_best(
    names: Sequence[str], nats: Mapping[str, np.ndarray], bytes_C: np.ndarray
) -> list[Difference]:
    """Differences of all candidates but the first from the first.

    The best was chosen by the same numbers, so p-values are adjusted for all pairs of candidates.
    """
    estimates = {
        (one, other): difference_in_bits(nats[other], nats[one], bytes_C)
        for one, other in itertools.combinations(names, 2)
    }
    adjusted = holm({pair: e.p_value for pair, e in estimates.items() if e.p_value is not None})
    return [
        Difference(other, estimates[names[0], other], adjusted.get((names[0], other))) for other in names[1:]
    ]


def mean_bits(nats_SC: np.ndarray, bytes_C: np.ndarray) -> Estimate:
    """Mean bits per byte of a candidate over its seeds."""
    bits_S = _bits(nats_SC, bytes_C)
    seeds = (float(bits_S.var(ddof=1)) / len(bits_S), len(bits_S) - 1) if len(bits_S) > 1 else None
    return _estimate(float(bits_S.mean()), [seeds, _text_variance(nats_SC.mean(axis=0), bytes_C)])


def difference_in_bits(nats_SC: np.ndarray, others_SC: np.ndarray, bytes_C: np.ndarray) -> Estimate:
    """Bits per byte of a candidate minus those of another one, paired by the pieces of the text.

    The numbers of seeds may differ; a candidate with one seed is assumed to vary as the other one does. If
    both have one seed, only the text varies: the estimate is then about these two models, not the candidates.
    """
    bits_S, others_S = _bits(nats_SC, bytes_C), _bits(others_SC, bytes_C)
    several = [bits for bits in (bits_S, others_S) if len(bits) > 1]
    parts: list[_Part | None] = []
    if len(several) == 2:
        parts = [(float(bits.var(ddof=1)) / len(bits), len(bits) - 1) for bits in several]
    elif several:
        both = 1 / len(bits_S) + 1 / len(others_S)
        parts = [(float(several[0].var(ddof=1)) * both, len(several[0]) - 1)]
    parts.append(_text_variance(nats_SC.mean(axis=0) - others_SC.mean(axis=0), bytes_C))
    return _estimate(float(bits_S.mean() - others_S.mean()), parts)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Adjust p-values of several tests by Holm's method, which bounds the probability of any false positive.

    The i-th smallest of m is multiplied by m - i + 1, and none is less than one before it (Holm, A simple
    sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979). (scipy has
    only Benjamini and Hochberg's; statsmodels would be a dependency for these six lines.)
    """
    adjusted: dict[Key, float] = {}
    largest = 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[key]))
        adjusted[key] = largest
    return adjusted


def _bits(nats_SC: np.ndarray, bytes_C: np.ndarray) -> np.ndarray:
    """(S,) bits per byte."""
    return nats_SC.sum(axis=1) / (math.log(2) * bytes_C.sum())


def _text_variance(nats_C: np.ndarray, bytes_C: np.ndarray) -> _Part | None:
    """Variance due to the text and its degrees of freedom; None for a single piece."""
    stderr = ratio_stderr(nats_C / math.log(2), bytes_C)
    return None if stderr is None else (stderr**2, len(nats_C) - 1)


def _estimate(value: float, parts: Sequence[_Part | None]) -> Estimate:
    """An estimate from the parts of its variance, with the degrees of freedom of Satterthwaite."""
    known = [part for part in parts if part is not None]
    if not known:
        return Estimate(value, None, None)
    total = sum(variance for variance, _ in known)
    if total == 0:
        return Estimate(value, 0.0, min(degrees for _, degrees in known))
    degrees = total**2 / sum(variance**2 / degrees for variance, degrees in known)
    return Estimate(value, math.sqrt(total), degrees)


def verdict(results: Results) -> str:
    """The answer in one sentence."""
    best = results.best
    worse = [d for d in results.differences if d.is_significant]
    others = [d for d in results.differences if not d.is_significant]
    parts = [f"{d.name} is {format_difference(d.estimate, '')} worse{_format_p(d)}" for d in worse]
    if others:
        names = ", ".join(f"{d.name} ({format_difference(d.estimate)}{_format_p(d)})" for d in others)
        parts.append(f"not significantly different from it: {names}")
    head = "is best" if not others else "has the lowest mean"
    head = "is the only one that finished" if not results.differences else head
    sentence = f"{best.name} {head}: {best.mean.value:.3f} bits per byte{_format_interval(best.mean)}"
    return "; ".join([sentence, *parts]) + "."


def format_difference(estimate: Estimate, plus: str = "+") -> str:
    """A difference with its interval, to three decimals."""
    return f"{plus}{estimate.value:.3f}{_format_interval(estimate)}"


def format_p_value(p_value: float | None) -> str:
    """A p-value as it is printed."""
    if p_value is None:
        return "unknown"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.2g}" if p_value < 0.1 else f"{p_value:.2f}"


def _format_p(difference: Difference) -> str:
    if difference.p_value is None:
        return ""
    shown = format_p_value(difference.p_value)
    return f", p {shown}" if shown.startswith("<") else f", p = {shown}"


def _format_interval(estimate: Estimate) -> str:
    return "" if estimate.interval is None else " [{:.3f}, {:.3f}]".format(*estimate.interval)
