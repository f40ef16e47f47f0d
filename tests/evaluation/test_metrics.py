"""Promise: our figures are metrics of evaluate that load from the package alone, without a network."""

import json
import math
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import build_model

import hf_genlm
from hf_genlm.config.recipe import TokenizerRecipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.aggregation import calibration_error
from hf_genlm.evaluation.benchmarks import pair_accuracy
from hf_genlm.evaluation.metrics import metric_names
from hf_genlm.evaluation.text_statistics import distinct_n, repetition, self_bleu, split_words
from hf_genlm.text.encoding import encode_documents
from hf_genlm.text.store import Document
from hf_genlm.text.tokenizer import train_tokenizer

PACKAGE = Path(hf_genlm.__file__).parent
TEXTS = [
    "the cat sat on the mat, the cat sat",
    "a dog sat on the mat",
    "to be or not to be",
    "the the the the the",
]
GOOD, BAD = [-1.0, -5.0, -2.0], [-2.0, -4.0, -3.0]
CONFIDENCE, CORRECT = [0.9, 0.8, 0.3, 0.2], [True, False, True, False]
# metric -> (its inputs, its settings, what it gives)
CASES = {
    "distinct_n": ({"predictions": TEXTS}, {"n": [2]}, lambda: distinct_n(words(), 2).value),
    "repetition": ({"predictions": TEXTS}, {"n": [1]}, lambda: repetition(words(), 1).value),
    "self_bleu": ({"predictions": TEXTS}, {}, lambda: self_bleu(words()).value),
    "training_overlap": (
        {"predictions": TEXTS},
        {"training_texts": ["a dog", "not to be on the mat"], "lengths": [2]},
        lambda: 8 / 23,
    ),
    "minimal_pairs": ({"good": GOOD, "bad": BAD}, {}, lambda: pair_accuracy(GOOD, BAD).value),
    "calibration_error": (
        {"confidence": CONFIDENCE, "correct": CORRECT},
        {"bins": 5},
        lambda: calibration_error(CONFIDENCE, CORRECT, 5).value,
    ),
}


def words() -> list[list[str]]:
    return [split_words(text) for text in TEXTS]


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        import evaluate

        home = tmp_path_factory.mktemp("evaluate")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", home / "metrics")
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", home / "modules")
        # another test may have let evaluate import scripts from another cache, which would be found first
        patch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "evaluate_modules").is_dir()])
        _forget_scripts()
        yield evaluate
        _forget_scripts()


def _forget_scripts() -> None:
    """Those that evaluate has imported from its cache."""
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


def test_every_metric_has_a_case():
    assert set(metric_names()) == {*CASES, "bits_per_byte"}


@pytest.mark.parametrize("name", CASES)
def test_a_metric_gives_what_its_function_gives(evaluate, name):
    inputs, settings, expected = CASES[name]
    metric = evaluate.load(hf_genlm.metric_path(name))
    at_once = metric.compute(**inputs, **settings)
    value = next(iter(at_once.values()))
    assert value == pytest.approx(expected(), abs=1e-12)
    for i in range(len(next(iter(inputs.values())))):
        metric.add_batch(**{key: column[i : i + 1] for key, column in inputs.items()})
    assert metric.compute(**settings) == at_once
    assert metric.name == name
    assert len(metric.description) > 100
    assert metric.citation.strip().startswith("@")
    assert "Returns:" in metric.inputs_description
    assert set(metric.features if isinstance(metric.features, dict) else metric.features[0]) == set(inputs)


@pytest.mark.parametrize("name", ["distinct_n", "repetition", "self_bleu"])
def test_token_ids_do_as_well_as_texts(evaluate, name):
    metric = evaluate.load(hf_genlm.metric_path(name))
    ids = {word: i for i, word in enumerate(sorted({w for text in words() for w in text}))}
    numbered = [[ids[word] for word in text] for text in words()]
    assert metric.compute(predictions=numbered) == metric.compute(predictions=TEXTS)


def test_bits_per_byte_of_log_probabilities(evaluate):
    metric = evaluate.load(hf_genlm.metric_path("bits_per_byte"), "log_probabilities")
    texts = ["ab", "é", "xyz"]
    found = metric.compute(predictions=[[-1.0, -2.0], [-3.0], [-0.5]], references=texts)
    assert found["bits_per_byte"] == pytest.approx(6.5 / math.log(2) / 7)
    assert found["bits_per_byte_stderr"] > 0
    with pytest.raises(ValueError, match="known: default, log_probabilities"):
        evaluate.load(hf_genlm.metric_path("bits_per_byte"), "logprobs")


@torch.no_grad()
def test_bits_per_byte_by_a_model(evaluate, tmp_path):
    """As summed from the probabilities of each token: nothing is cut off, an empty text weighs nothing."""
    texts = ["The cat saw a dog.", "", "A dog ran. " * 12, "It ends<|endoftext|> here."]
    tokenizer = train_tokenizer([Document(TEXTS[0] * 50, "text")], TokenizerRecipe(vocab_size=270), 2000)
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    model = build_model("hybrid", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **special)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    bits = 0.0
    for text in texts:
        (tokens, _), *_ = encode_documents(tokenizer, [Document(text, "as in training")])
        ids = torch.tensor([[tokenizer.bos_token_id, *tokens.tolist()]])
        log_p = model(ids).logits[0, :-1].double().log_softmax(dim=-1)
        bits -= float(log_p.gather(1, ids[0, 1:, None]).sum()) / math.log(2)
    metric = evaluate.load(hf_genlm.metric_path("bits_per_byte"))
    found = metric.compute(predictions=texts, model_id=str(tmp_path))
    assert found["bits_per_byte"] == pytest.approx(bits / len("".join(texts)), rel=1e-5)
    assert metric.compute(predictions=texts, model_id=str(tmp_path), batch_size=1) == pytest.approx(
        found, rel=1e-5
    )
    with pytest.raises(ValueError, match="model_id"):
        metric.compute(predictions=texts)


def test_unknown_names_are_refused_with_the_near_one():
    with pytest.raises(UserError, match="no metric 'distinct'; did you mean 'distinct_n'"):
        hf_genlm.metric_path("distinct")


OFFLINE = """
import json, socket, sys
def refuse(*_): raise AssertionError("reached for the network")
socket.socket.connect = refuse
import hf_genlm
assert "evaluate" not in sys.modules, "imported unasked"
assert hf_genlm.__file__.startswith(sys.argv[1]), hf_genlm.__file__
import evaluate
cases = json.loads(sys.argv[2])
print(json.dumps({name: evaluate.load(hf_genlm.metric_path(name)).compute(**given)
                  for name, given in cases.items()}))
"""


def test_they_load_offline_from_a_read_only_package(tmp_path):
    """As from site-packages of another owner: nothing can be written there, and the home is empty."""
    shutil.copytree(PACKAGE, tmp_path / "site" / "hf_genlm", ignore=shutil.ignore_patterns("__pycache__"))
    site = tmp_path / "site"
    for path in [*site.rglob("*"), site]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    before = sorted(path.relative_to(site) for path in site.rglob("*"))
    cases = {name: {**inputs, **settings} for name, (inputs, settings, _) in CASES.items()}
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(site), json.dumps(cases)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (_, _, expected) in CASES.items():
        assert next(iter(found[name].values())) == pytest.approx(expected(), abs=1e-12), name
    assert sorted(path.relative_to(site) for path in site.rglob("*")) == before
    for path in [site, *site.rglob("*")]:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)  # pytest clears its folders away
