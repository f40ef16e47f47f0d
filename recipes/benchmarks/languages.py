"""Many languages in one model: what balancing does for the worst, and what new tokens do for a new one.

    python recipes/benchmarks/languages.py balance FOLDER
    python recipes/benchmarks/languages.py whole FOLDER
    python recipes/benchmarks/languages.py extend FOLDER

FOLDER holds a text file a language, named by its code (`eng.txt`, `deu_1996.txt`), all of the same content,
whose bytes therefore give the byte premiums. Every fifth line is held out, whatever else is measured.
`balance` cuts six of the languages to a quarter and evens out the content; `whole` leaves all as they are and
evens out the bytes, as without premiums (of contents that are alike already there is nothing to even out).
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from hf_genlm.cli.main import main
from hf_genlm.config.recipe import load_recipe
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.training.train import train

SEEDS = (0, 1, 2)
SCARCE = ("arb", "cmn", "fin", "hin", "swh", "tur")  # of which a quarter of the training lines is left
SHAPE = [
    "model.hidden_size=128",
    "model.num_hidden_layers=1",
    "model.bigram_size=4096",
    "training.max_seq_length=64",
]
REST = [
    "training.batch_size=16",
    "training.num_validations=0",
    "training.num_samples=0",
    "training.save_steps=0",
]
STEPS, VOCABULARY, MORE_TOKENS = 150, 1024, 200
TUNING_MINUTES, TUNING_STEPS = 0.15, 60
SETTINGS = [*SHAPE, *REST, f"training.steps={STEPS}", f"tokenizer.vocab_size={VOCABULARY}"]


def cut(folder: Path, out: Path, scarce: tuple[str, ...]) -> dict[str, float]:
    """Write CODE.txt and CODE.held.txt to `out`; the byte premium of each language, relative to English."""
    n_bytes = {}
    for file in sorted(folder.glob("*.txt")):
        code = file.stem.partition("_")[0]
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        n_bytes[code] = file.stat().st_size
        kept = [line for i, line in enumerate(lines) if i % 5 != 4]
        kept = kept[: len(kept) // 4] if code in scarce else kept
        (out / f"{code}.txt").write_text("".join(kept), encoding="utf-8")
        (out / f"{code}.held.txt").write_text("".join(lines[4::5]), encoding="utf-8")
    return {code: n / n_bytes["eng"] for code, n in n_bytes.items()}


def sources(out: Path, codes: list[str]) -> list[str]:
    named = ",".join(f"{code}={out}/{code}.txt" for code in codes)
    held = ",".join(f"{code}={out}/{code}.held.txt" for code in codes)
    return [f"corpus.languages={named}", f"corpus.validation={held}"]


def bits_of(run, name: str = "bits_per_byte") -> dict[str, float]:
    return {
        m.name: m.value
        for m in read_measurements(run.evaluation)
        if m.name.startswith(name) or "language" in m.name
    }


def balance(folder: Path, scarce: tuple[str, ...] = SCARCE) -> None:
    """Proportional, and uniform in content, at equal steps, on the same held-out text."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work)
        premiums = cut(folder, out, scarce)
        stated = "{" + ", ".join(f"{code}: {premium:.4f}" for code, premium in premiums.items()) + "}"
        table = {}
        for temperature in (1, 1000):
            runs = []
            for seed in SEEDS:
                settings = [*SETTINGS, f"corpus.temperature={temperature}", f"training.seed={seed}",
                            *sources(out, list(premiums))]  # fmt: skip
                if scarce:
                    settings.append(f"corpus.byte_premiums={stated}")
                runs.append(bits_of(train(load_recipe(None, settings), out / f"{temperature}-{seed}")))
            table[f"T = {temperature}"] = runs
        show("a quarter of " + ", ".join(scarce) if scarce else "all of the text", table)


def whole(folder: Path) -> None:
    """Proportional, and uniform in bytes, of all that there is of each language."""
    balance(folder, scarce=())


def show(name: str, table: dict) -> None:
    print(f"\n{name}; mean of {len(SEEDS)} seeds ± standard error\n")
    print("| | " + " | ".join(map(str, table)) + " |")
    print("|---" * (len(table) + 1) + "|")
    for key in next(iter(table.values()))[0]:
        cells = [mean_of([run[key] for run in runs]) for runs in table.values()]
        print(f"| {key} | " + " | ".join(cells) + " |", flush=True)


def mean_of(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"


def extend(folder: Path) -> None:
    """One language held out of a model, which then learns it in the same time with and without new tokens."""
    for code in ("hin", "swh"):
        with tempfile.TemporaryDirectory() as work:
            out = Path(work)
            premiums = cut(folder, out, ())
            others = [other for other in premiums if other != code]
            base = train(load_recipe(None, [*SETTINGS, *sources(out, others)]), out / "base")
            extended = str(out / "extended")
            main(["extend", str(base.path), "--source", f"{code}={out}/{code}.txt",
                  "--vocab-size", f"+{MORE_TOKENS}", "--out", extended])  # fmt: skip
            for ends in (f"training.minutes={TUNING_MINUTES}", f"training.steps={TUNING_STEPS}"):
                table: dict[str, list[dict[str, float]]] = {"base": [], "extended": []}
                for seed in SEEDS:  # in turns: what else the machine does meets both
                    for name, start in (("base", str(base.path)), ("extended", extended)):
                        tuned = [*REST, f"model.init_from={start}", f"training.seed={seed}", ends,
                                 "training.max_epochs=1000", *sources(out, [code])]  # fmt: skip
                        run = train(load_recipe(None, tuned), out / f"{name}-{ends}-{seed}")
                        (trained,) = [event for event in run.read_log() if event["event"] == "trained"]
                        bits = bits_of(run)["bits_per_byte"]
                        table[name].append({"bits per byte": bits, "passes": trained["epochs"]})
                show(f"{code}, {ends}", table)


if __name__ == "__main__":
    {"balance": balance, "whole": whole, "extend": extend}[sys.argv[1]](Path(sys.argv[2]))
