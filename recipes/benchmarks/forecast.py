"""Forecasts of `hf-genlm train --minutes`: runs at t and at four times t, and the error of what was forecast.

    python recipes/benchmarks/forecast.py --out DIR [--text NAME=TRAIN,VALIDATION ...]
        [--seconds 3,12,48,192] [--set KEY=VALUE ...]

Without --text, the text is what CPython brings. Each run goes to DIR/NAME-SECONDS; one that is done there is
not run again. `expected` is what the run was to reach before it began, if its text was counted, `4 t` what
these constants forecast from its result for four times the time, `error` the difference from the run that had
it. At the end, the constants for hf_genlm/training/forecast.py that leave the smallest errors in these runs.
"""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np

from hf_genlm.config.recipe import load_recipe
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.model import GenLMConfig
from hf_genlm.run_folder import RunFolder
from hf_genlm.training.forecast import CURVES, LONGER, Curve, Training, kind_of
from hf_genlm.training.plan import count_weights

CLOSE = 0.05  # bits per byte
FLOORS = np.arange(0.5, 0.96, 0.05).round(2).tolist()  # that are tried, as the rates
RATES = np.geomspace(0.02, 0.5, 25).round(3).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", action="append", help="NAME=TRAIN,VALIDATION", default=[])
    parser.add_argument("--seconds", default="3,12,48,192")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    seconds = [float(each) for each in options.seconds.split(",")]
    texts = [text.partition("=")[::2] for text in options.text] or [("cpython", "")]
    runs = {}
    for (name, files), each in itertools.product(texts, seconds):
        run = train(options.out / f"{name}-{each:g}", files, each, options.assignments)
        runs[name, each] = read(run)
    pairs = [(runs[key], runs[longer]) for key in runs if (longer := (key[0], LONGER * key[1])) in runs]
    head = ("bits", "counts", "expected", "4 t", "error")
    print(f"{'run':<18}", *(f"{name:>8}" for name in head))
    for (name, each), found in runs.items():
        longer = runs.get((name, LONGER * each))
        ahead = forecast(found, found["training"].curve)
        error = "" if longer is None else f"{ahead - longer['bits']:+.4f}"
        known = [found["bits"], found["counts"], found["expected"], ahead]
        cells = ["" if value is None else f"{value:.4f}" for value in known]
        print(f"{f'{name}, {each:g} s':<18}", *(f"{cell:>8}" for cell in cells), f"{error:>8}")
    if pairs:
        errors = [forecast(run, run["training"].curve) - longer["bits"] for run, longer in pairs]
        n_close = sum(abs(error) <= CLOSE for error in errors)
        print(f"{n_close} of {len(pairs)} within {CLOSE}, the largest error {max(map(abs, errors)):.3f}")
        fit(list(runs.values()), pairs)


def train(out: Path, files: str, seconds: float, assignments: list[str]) -> RunFolder:
    """The run of `hf-genlm train` in a process of its own, or the one that lies in `out`."""
    if not (out / "evaluation.json").is_file():
        sources, _, held_out = files.partition(",")
        command = [
            sys.executable,
            "-m",
            "hf_genlm",
            "train",
            *([sources] if sources else []),
            "--out",
            str(out),
        ]
        command += ["--minutes", str(seconds / 60), *(["--validation", held_out] if held_out else [])]
        stated = [*assignments, "training.num_samples=0"]
        command += [word for each in stated for word in ("--set", each)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return RunFolder.open(out)


def read(run: RunFolder) -> dict:
    """Bits per byte, those of counts and those expected (None if unknown), and how far the training went."""
    events, recipe = run.read_log(), load_recipe(run.recipe).training
    last = {event["event"]: event for event in events}
    config = GenLMConfig.from_pretrained(run.model)
    kind = kind_of(config)
    tokens, epochs = last["trained"]["tokens"], last["trained"].get("epochs")
    weights = count_weights(config.hidden_size, config.num_hidden_layers, config.vocab_size)
    expected = [event.get("expected") for event in events if event["event"] == "forecast"]
    return {
        "bits": next(m.value for m in read_measurements(run.evaluation) if m.name == "bits_per_byte"),
        "counts": last["counts"]["bits_per_byte"] if "counts" in last and kind != "history" else None,
        "expected": next((each for each in expected if each is not None), None),
        "training": Training(
            tokens, weights, CURVES[kind], epochs,
            None if not epochs else recipe.max_epochs * tokens / epochs,
        ),
    }  # fmt: skip


def forecast(run: dict, curve: Curve) -> float:
    """Bits per byte that are forecast for four times the time of `run`."""
    training = run["training"]
    ahead = Training(training.tokens, training.weights, curve, training.epochs, training.max_tokens)
    return ahead.continued(run["bits"], run["counts"], ahead.useful_times)


def fit(runs: list[dict], pairs: list[tuple[dict, dict]]) -> None:
    """Print the curve with the smallest squared errors of the forecasts; the gap is that of the levels."""

    def gap_of(floor: float, rate: float) -> float:
        counted = [run for run in runs if run["counts"] is not None]
        gaps = [
            max(1e-3, run["bits"] / run["counts"] - floor)
            * (run["training"].tokens * run["training"].weights / 1e10) ** rate
            for run in counted
        ]
        return float(np.exp(np.mean(np.log(gaps)))) if gaps else 0.2

    def worth(curve: Curve) -> float:
        return sum((forecast(run, curve) - longer["bits"]) ** 2 for run, longer in pairs)

    tried = [Curve(f, round(gap_of(f, r), 3), r) for f, r in itertools.product(FLOORS, RATES)]
    best = min(tried, key=worth)
    errors = [forecast(run, best) - longer["bits"] for run, longer in pairs]
    print(f"best here: {best}, largest error {max(map(abs, errors)):.3f}")


if __name__ == "__main__":
    main()
