"""Promise: whatever a file of a run folder holds, a verb that reads it works or refuses it by its name.

HF_GENLM_FUZZ=N makes N changed folders; the slow form makes 2,000.
"""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from support.runs import SMALL

from hf_genlm.cli.main import main
from hf_genlm.comparison.plan import Plan
from hf_genlm.comparison.report import write_comparison
from hf_genlm.comparison.results import read_results
from hf_genlm.comparison.runs import ComparisonFolder
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import Measurement, write_measurements
from hf_genlm.files import write_json, write_text
from hf_genlm.run_schemas import FinishedFile, GuaranteeFile, PreparedFile

SHORT, LONG = 90, 2000
VERBS = {
    "card": lambda run: ["card", run, "--force"],
    "plot": lambda run: ["plot", run],
    "evaluate": lambda run: ["evaluate", run],
    "push": lambda run: ["push", run, "owner/name", "--dry-run"],
    "runs": lambda run: ["runs", str(Path(run).parent)],
}
# file -> the verbs that read it, the cheap ones more often: push writes the card, and card draws curves too
READERS = {
    "recipe.yaml": ["push", "push", "runs", "evaluate"],
    "corpus.json": ["push", "push", "push", "push", "evaluate"],
    "environment.json": ["push"],
    "log.jsonl": ["push", "push", "runs", "plot"],
    "evaluation.json": ["push", "push", "push", "runs", "card", "evaluate"],
    "audit.json": ["push"],
    "privacy.json": ["push"],
    "vectors.json": ["push"],
    "languages.json": ["push"],
    "canaries.json": ["push"],
    "samples.md": ["push"],
    "model/config.json": ["push", "evaluate"],
    "model/model.safetensors": ["push", "evaluate"],
    "model/tokenizer.json": ["evaluate"],
    "model/tokenizer_config.json": ["evaluate"],
    "model/README.md": ["push"],
}
AUDITED = [
    Measurement("exposure/4", 5.0, "bits", 10, 0.5, "canaries", False, (4.0, 6.0)),
    Measurement("exposure_p_value/4", 0.001, "probability", 10, None, "canaries", False),
    Measurement("extraction_50_tokens/prefix_10", 0.1, "fraction", 40, 0.01, "train", False, (0.0, 0.2)),
    Measurement("extraction_50_tokens/prefix_10", 0.0, "fraction", 40, 0.01, "validation", False),
    Measurement("canaries_extracted/4", 0.5, "fraction", 10, None, "canaries", False),
    Measurement("membership_auc/loss", 0.9, "auc", 40, 0.01, "train", False, (0.8, 1.0)),
    Measurement("epsilon_lower_bound/4", 1.5, "epsilon", 10, None, "canaries", False),
]
VECTORS = {
    "file": "v.txt", "sha256": "0" * 64, "dimension": 4, "words": {"read": 5, "skipped": {"unknown": 1}},
    "tokens": {"exact": 3, "drawn": 2}, "share_of_text": {"exact": 0.5, "drawn": 0.5}, "frozen": True,
    "unfreeze_step": 3,
}  # fmt: skip
GUARANTEE = {
    "epsilon": 4.0, "delta": 1e-5, "unit": "document", "sampling_rate": 0.1, "noise_multiplier": 1.1,
    "clip_norm": 1.0, "steps": 9, "accountant": "prv", "covered": ["weights"], "not_covered": ["card"],
}  # fmt: skip
STRANGE = [
    None, True, False, 0, -1, 2**63, 10**400, -(10**30), 1e308, 1e-320, float("nan"), float("inf"), "", "é",
    "7", "\x00", [], {}, [[[[]]]], {"a": {"b": []}}, "x" * 10_000, [1, "2"], {"value": None},
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(text_folder, tmp_path_factory) -> Path:
    """A finished run that has every kind of file."""
    path = tmp_path_factory.mktemp("finished") / "run"
    small = [word for assignment in SMALL[:-2] for word in ("--set", assignment)]
    more = ["training.num_samples=1", "training.num_validations=1", "evaluation.batch_size=32"]
    more += ["corpus.validation_fraction=0.02"]
    settings = [word for assignment in more for word in ("--set", assignment)]
    options = [*small, *settings, "--steps", "3", "--canaries", "4"]
    assert main(["train", str(text_folder), "--out", str(path), *options]) == 0
    write_measurements(path / "audit.json", AUDITED)
    write_measurements(
        path / "languages.json", [Measurement("whole_characters/Latin", 0.9, "fraction", 9, None, "x", True)]
    )
    write_json(path / "privacy.json", GUARANTEE, GuaranteeFile)
    write_json(path / "vectors.json", VECTORS)
    for name in READERS:
        assert (path / name).is_file(), name
    return path


def changed_value(draw: random.Random, content):
    """`content` with one part of it replaced by something strange, or a key of it gone or new."""
    if isinstance(content, dict) and content and draw.random() < 0.9:
        key = draw.choice(list(content))
        kind = draw.random()
        if kind < 0.15:
            return {k: v for k, v in content.items() if k != key}
        if kind < 0.2:
            return {**content, "new": draw.choice(STRANGE)}
        return {**content, key: changed_value(draw, content[key])}
    if isinstance(content, list) and content and draw.random() < 0.85:
        at = draw.randrange(len(content))
        return [*content[:at], changed_value(draw, content[at]), *content[at + 1 :]]
    return draw.choice(STRANGE)


def changed_bytes(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content) + 1)
    stop = min(len(content), at + draw.randrange(1, 40))
    return draw.choice(
        [
            lambda: content[:at],
            lambda: content[:at] + draw.randbytes(3) + content[stop:],
            lambda: content[:at] + content[stop:],
            lambda: content + draw.randbytes(9),
            lambda: b"",
            lambda: draw.randbytes(50),
            lambda: content.decode("utf-8", "replace").encode("utf-16"),
            lambda: b"\xef\xbb\xbf" + content,
            lambda: b"[" * 100_000,
            lambda: b'{"measurements": ' * 50_000,
            lambda: content.replace(b"0", b"9" * 400, 1),
            lambda: content[:at] + b"\xe9" + content[at:],
        ]
    )()


def change(draw: random.Random, path: Path) -> str:
    """Change the file, and return what it holds now, for a failing test."""
    content = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.65:
        content = json.dumps(changed_value(draw, json.loads(content)), ensure_ascii=False).encode()
    elif path.suffix == ".jsonl" and draw.random() < 0.65:
        lines = content.splitlines()
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(changed_value(draw, json.loads(lines[at]))).encode()
        content = b"\n".join(lines)
    else:
        content = changed_bytes(draw, content)
    path.write_bytes(content)
    return content[:300].decode("utf-8", "replace")


def check(verb: str, name: str, run: Path, content: str, capsys) -> int:
    """Exit code 0, or 2 with one line that names the file."""
    capsys.readouterr()
    code = main(VERBS[verb](str(run)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert code in (0, 2), (verb, name, content)
    if code == 2:
        stem = name.rsplit("/", 1)[-1]
        # transformers names no file where it loads a folder: the folder is named then
        is_named = stem in lines[-1] or (name.startswith("model/") and str(run) in lines[-1])
        assert is_named, (verb, name, lines[-1], content)
    return code


def fuzz(n: int, finished: Path, folder: Path, capsys) -> Counter:
    seen: Counter = Counter()
    for number in range(n):
        draw = random.Random(number)
        name = draw.choice(list(READERS))
        verb = draw.choice(READERS[name])
        run = folder / "run"
        shutil.copytree(finished, run)
        content = change(draw, run / name)
        try:
            code = check(verb, name, run, content, capsys)
        except Exception as error:
            raise AssertionError(
                f"example {number}: {verb} of a changed {name}: {error!r}: {content}"
            ) from error
        seen[f"{verb} {code}"] += 1
        shutil.rmtree(run)
    return seen


def test_a_changed_file_of_a_run_is_used_or_named(finished, tmp_path, capsys):
    seen = fuzz(int(os.environ.get("HF_GENLM_FUZZ", SHORT)), finished, tmp_path, capsys)
    for outcome in ("push 0", "push 2", "evaluate 0", "evaluate 2"):
        assert seen[outcome], f"no changed file gave {outcome}: {seen}"


COMPARED = ("compare.yaml", "prepared.json", "finished.json", *(
    f"runs/one-seed0/{name}" for name in ("environment.json", "corpus.json", "log.jsonl", "recipe.yaml",
                                          "evaluation_blocks.npy", "model/config.json")
))  # fmt: skip


def test_a_changed_file_of_a_comparison_is_used_or_named(finished, tmp_path, capsys):
    """Read as `compare` does before it trains anything, with the report."""
    plan = Plan({"one": {}, "two": {}}, "steps", 3.0, seeds=1)
    original = ComparisonFolder.open_or_create(tmp_path / "original", plan)
    write_text(original.plan, plan.to_yaml())
    sizes = {"parameters": 1000, "training_flops_per_token": 6e3, "hidden_size": 8, "layers": 2}
    prepared = {name: {"text": ".", "fields": {}, **sizes} for name in plan.candidates}
    write_json(original.prepared, prepared, PreparedFile)
    write_json(original.finished, {run.name: {"log.jsonl": "0" * 64} for run in plan.runs()}, FinishedFile)
    for run in plan.runs():
        shutil.copytree(finished, original.run(run).path)
    seen: Counter = Counter()
    for number in range(30):
        draw = random.Random(1000 + number)
        name = draw.choice(COMPARED)
        path, message = tmp_path / "changed", ""
        shutil.copytree(original.path, path)
        content = change(draw, path / name)
        try:
            folder = ComparisonFolder.open_or_create(path, plan)
            results = read_results(folder, plan, {})
            if number % 13 == 0:
                write_comparison(folder, plan, results)
            seen["used"] += 1
        except UserError as error:
            message = str(error)
            seen["refused"] += 1
        except Exception as error:
            raise AssertionError(f"example {number}: {name}: {error!r}: {content}") from error
        is_plan = name == "compare.yaml" and "began with" in message  # the option that differs is named
        assert not message or is_plan or Path(name).name in message, (number, name, message, content)
        assert main(["runs", str(path)]) == 0, (number, name, content)
        shutil.rmtree(path)
    assert min(seen["used"], seen["refused"]) > 5, seen


@pytest.mark.slow
def test_two_thousand_changed_files_are_used_or_named(finished, tmp_path, capsys):
    fuzz(LONG, finished, tmp_path, capsys)


@pytest.mark.parametrize("name", ["corpus.json", "evaluation.json", "environment.json", "model/config.json"])
def test_a_file_in_another_encoding_is_named(finished, tmp_path, capsys, name):
    shutil.copytree(finished, tmp_path / "run")
    for encoded in ("é".encode("latin-1"), '{"a": 1}'.encode("utf-16"), b"[" * 100_000):
        (tmp_path / "run" / name).write_bytes(encoded)
        assert check("card", name, tmp_path / "run", "", capsys) == 2
