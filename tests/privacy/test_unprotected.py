"""Promise: no exact figure of a private run leaves its folder unasked, and privacy.json names all of them."""

import json
import re

import pytest
from support.cards import make_run
from support.hub_metadata import front_matter_of

from hf_genlm.card import render_card, write_card
from hf_genlm.cli.main import main
from hf_genlm.config.recipe import load_recipe
from hf_genlm.evaluation.measurement import Measurement, read_measurements, write_measurements
from hf_genlm.files import read_json, write_json
from hf_genlm.hub.manifest import ModelSource, build_manifest
from hf_genlm.privacy.mechanism import NOT_COVERED
from hf_genlm.report.audit_plot import AUDIT_FILE
from hf_genlm.report.curves import CURVES_FILE
from hf_genlm.run_folder import RunFolder

GUARANTEE = {
    "epsilon": 3.98, "delta": 1e-5, "unit": "document", "sampling_rate": 8 / 71234,
    "noise_multiplier": 1.1234567, "clip_norm": 1.0, "steps": 100, "accountant": "prv",
    "covered": ["weights"], "not_covered": NOT_COVERED,
}  # fmt: skip
COUNTS = iter(range(71235, 10**6, 1234))


def split_of(name: str) -> dict:
    counts = {key: next(COUNTS) for key in ("documents", "bytes", "characters", "tokens")}
    return {**counts, "sha256": name * 64}


CORPUS = {
    "sources": ["/srv/patients/letters-of-smith.jsonl"],
    "description": "1 file: letters-of-smith.jsonl",
    "files": [
        {
            "name": "letters-of-smith.jsonl",
            "bytes": next(COUNTS),
            "sha256": "b" * 64,
            "documents": next(COUNTS),
        }
    ],
    "duplicates_removed": next(COUNTS),
    "empty_skipped": next(COUNTS),
    "files_skipped": next(COUNTS),
    "train": split_of("c"),
    "validation": split_of("d"),
    "damaged": {"records": next(COUNTS), "files": next(COUNTS)},
    "scrubbed": {"types": {"email": next(COUNTS), "phone": next(COUNTS)}, "documents": next(COUNTS)},
    "languages": {
        "deu": {
            "train": {"documents": next(COUNTS), "bytes": next(COUNTS)},
            "validation": {"documents": next(COUNTS), "bytes": next(COUNTS)},
            "repeats": 1.0,
        }
    },
}
OWN = [
    Measurement(
        "bits_per_byte", 1.7345678, "bits/byte", next(COUNTS), 0.0066, "validation", False, (1.7211, 1.7477)
    ),
    Measurement("bits_per_byte/deu", 1.8123451, "bits/byte", next(COUNTS), 0.0066, "validation", False),
    Measurement("training_overlap_8", 0.0345671, "fraction", next(COUNTS), 0.01, "samples", False),
    Measurement("longest_copied_span", 23.0, "words", next(COUNTS), None, "samples", False),
    Measurement("distinct_1", 0.4567812, "fraction", next(COUNTS), 0.01, "reference", True),
]  # fmt: skip
BENCHMARKS = [
    Measurement("minimal_pairs_accuracy", 0.6789123, "fraction", 777, 0.01, "blimp", True),
    Measurement("acc/piqa", 0.5678912, "fraction", 888, 0.01, "piqa:validation", True),
]
ATTACKS = [
    Measurement(
        "membership_auc/loss", 0.5612349, "auc", next(COUNTS), 0.01, "validation", False, (0.55, 0.57)
    )
]
SETTINGS = [
    "privacy.epsilon=4",
    "corpus.sources=",
    "corpus.languages=deu=letters-of-smith.jsonl",
    "corpus.parallel=deu=translations-of-smith.txt",
    "corpus.validation=held-out-of-smith.jsonl",
]


def private_run(path, *settings: str) -> RunFolder:
    """A finished run, every figure of its text at most once in its files."""
    run = make_run(path, recipe=load_recipe(None, [*SETTINGS, *settings]), corpus=CORPUS)
    write_json(run.privacy, GUARANTEE)
    write_measurements(run.evaluation, [*OWN, *BENCHMARKS])
    write_measurements(
        run.languages, [Measurement("bytes_per_token/deu", 3.4567, "bytes", 5, None, "validation", True)]
    )
    write_json(run.audit, {"measurements": [m.to_json() for m in ATTACKS]})
    for picture in (CURVES_FILE, AUDIT_FILE):
        (run.model / picture).parent.mkdir(exist_ok=True)
        (run.model / picture).write_bytes(b"of an earlier version")
    return run


def leaves(value) -> list:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


def exact_figures() -> list[str]:
    found = [
        value for value in leaves(CORPUS) if isinstance(value, str) or (isinstance(value, int) and value > 10)
    ]
    found = [value for value in found if value not in ("utf-8", "documents")]
    found += [number for m in OWN + ATTACKS for number in (m.n, m.value)]
    return [str(value) for value in found] + ["1.73", "1.7211", "0.0345", "0.561", "3.4567", "-of-smith"]


def test_the_card_of_a_private_run_shows_no_exact_figure(tmp_path):
    run = private_run(tmp_path)
    text = write_card(run).read_text(encoding="utf-8")
    plain = re.sub(r"(?<=\d),(?=\d\d\d)", "", text.replace("&#45;", "-").replace("&#95;", "_"))
    assert [figure for figure in exact_figures() if figure in plain] == []
    # of the log: 1,753,086 tokens in 123.46 s
    assert not re.search(r"1753086|123\.5|123 s|14200|\b7123\d|1\.12|0\.000112", plain)
    for figures in ("epsilon = 3.98", "0.00011 ", "1.1 ", "| steps | 100 |", "0.568", "0.679", "German"):
        assert figures in text, figures
    assert "A privacy audit was made." in text
    assert "trains another model, and spends as much privacy again" in text
    data = front_matter_of(text)
    values = [result["metrics"][0]["value"] for result in data["model-index"][0]["results"]]
    assert values == [m.value for m in BENCHMARKS]
    assert "datasets" not in data
    assert not list(run.model.rglob("*.png")), "pictures of exact figures are not pushed"
    assert not any(
        "curves" in name or "audit" in name for name in build_manifest(ModelSource.find(run.path)).sizes
    )


def test_the_switch_shows_them_and_says_so(tmp_path):
    run = private_run(tmp_path)
    path = write_card(run, assignments=["card.private_figures=true"])
    plain = re.sub(r"(?<=\d),(?=\d\d\d)", "", path.read_text(encoding="utf-8"))
    for figure in (
        "letters-of-smith.jsonl",
        "b" * 64,
        str(CORPUS["train"]["tokens"]),
        "1.7346",
        "0.561",
        "1753086",
    ):
        assert figure in plain, figure
    assert "a card with card.private_figures" in plain, "in the list of what is not covered"
    hidden = write_card(run, assignments=["card.private_figures=false"]).read_text(encoding="utf-8")
    assert "letters" not in hidden


def test_a_run_that_lost_its_guarantee_is_still_private(tmp_path):
    run = private_run(tmp_path)
    run.privacy.unlink()
    assert "letters" not in render_card(run)


def test_a_run_without_epsilon_shows_everything(tmp_path):
    text = render_card(make_run(tmp_path, corpus=CORPUS))
    assert "letters" in text
    assert "c" * 64 in text
    assert "not shown" not in text


# a run, by the command line

TINY = [
    "tokenizer.vocab_size=270", "training.steps=2", "training.num_threads=1", "training.max_seq_length=16",
    "training.batch_size=8", "training.num_samples=1", "training.num_validations=1", "model.hidden_size=16",
    "model.mixers=gated_linear", "corpus.cache=false", "training.report_to=tensorboard",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunFolder:
    """Trained, evaluated with samples, audited, plotted and written about."""
    pytest.importorskip("opacus")
    folder = tmp_path_factory.mktemp("private")
    source = folder / "letters-of-smith.jsonl"
    lines = [
        json.dumps({"text": f"Dear Smith, {i} times {i % 7} is {i * (i % 7)}. " * 3}) for i in range(1200)
    ]
    source.write_text("\n".join(lines), encoding="utf-8")
    out = folder / "run"
    words = [word for setting in TINY for word in ("--set", setting)]
    assert main(["train", str(source), "--epsilon", "8", "--out", str(out), *words]) == 0
    assert main(["evaluate", str(out), "--suite", "samples"]) == 0
    assert main(["audit", str(out), "--attacks", "membership", "--limit", "20"]) == 0
    assert main(["plot", str(out)]) == 0
    assert main(["card", str(out)]) == 0
    return RunFolder(out)


def test_measured_samples_of_a_private_run_do_not_read_its_training_text(finished, capsys):
    names = {m.name for m in read_measurements(finished.evaluation)}
    assert "words_per_text" in names
    assert not [name for name in names if "training_overlap" in name or "copied" in name]
    command = ["evaluate", str(finished.path), "--suite", "samples"]
    assert main([*command, "--set", "card.private_figures=true"]) == 0
    printed = capsys.readouterr()
    assert "longest_copied_span" in printed.out
    assert "is not measured" not in printed.err
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "the training text of a private run is not measured" in printed.err
    assert "longest_copied_span" not in printed.out


def test_nothing_exact_is_in_the_model_folder(finished):
    corpus, texts = read_json(finished.corpus), {}
    for path in finished.model.rglob("*"):
        if path.suffix in (".md", ".json", ".png"):
            texts[path.name] = path.read_bytes().decode("utf-8", "replace").replace(",", "")
    assert not [name for name in texts if name.endswith(".png")]
    figures = [corpus["train"][name] for name in ("sha256", "documents", "bytes", "tokens")]
    figures += [corpus["validation"]["sha256"], corpus["validation"]["bytes"], "letters", "smith"]
    measured = read_measurements(finished.evaluation) + read_measurements(finished.audit)
    figures += [f"{m.value:.4f}" for m in measured if m.value not in (0.0, 1.0)]
    card = texts.pop("README.md")
    assert [figure for figure in figures if str(figure) in card] == []
    for name in ("config.json", "tokenizer_config.json"):
        assert [figure for figure in figures[:-2] if str(figure) in texts[name]] == []
    assert "sampling rate" in card


def test_privacy_json_names_every_output_that_is_not_protected(finished):
    said = read_json(finished.privacy)
    covered, open_to = " ".join(said["covered"]), " ".join(said["not_covered"])
    # these hold nothing of the text: versions and machine; the guarantee; a lock; a vocabulary of public text
    neutral = {"environment.json", "privacy.json", ".lock", "tokenizer"}
    found = {path.name for path in finished.path.iterdir()}
    assert {"model", "log.jsonl", "audit.json", "tensorboard", "plots", "samples.md"} <= found
    for name in found - neutral:
        stem = "weights of the model" if name == "model" else name
        assert stem in covered + open_to, f"privacy.json does not speak of {name}"
    for words in ("evaluate --suite samples", "card.private_figures", "duration", "checkpoints/"):
        assert words in open_to
    shown = (finished.model / "README.md").read_text(encoding="utf-8")
    assert "It does not cover:" in shown
