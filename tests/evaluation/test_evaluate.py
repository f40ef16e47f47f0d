"""Promise: `hf-genlm evaluate` measures any causal model, and its figures are those of lm-eval."""

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from support.command_line import last_line
from support.models import build_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_genlm.cli.main import main
from hf_genlm.config.recipe import TokenizerRecipe
from hf_genlm.evaluation.evaluate import SUITES, Material, evaluate
from hf_genlm.evaluation.likelihood import document_nats, make_windows, measure_likelihood
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.text.store import Document
from hf_genlm.text.tokenizer import train_tokenizer

CONTEXT = 32
TEXTS = [text for _, text in sorted(topics.items())[:24]]
TYPED = "<|endoftext|>!"  # text like any other, for lm-eval too
PAIRS = {
    "order": [("The value of the<|pad|> name is an object.", "value The of name the is object<|pad|> an."),
              ("an object", "object an"), ("It is bound.", "It bound is.")],
    "number": [("An expression is evaluated.", "An expression are evaluated."), ("two items", "two item"),
               ("One of the items is an integer.", "One of the items are an integer.")],
}  # fmt: skip
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
# as lm-eval's own: its target_delimiter, a space, stands before each sentence
BLIMP = """
task: TASK
dataset_path: json
dataset_kwargs: {data_files: {train: FOLDER/pairs/UID.jsonl}}
validation_split: train
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[sentence_good, sentence_bad]}}"
num_fewshot: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
PLAIN = BLIMP + 'target_delimiter: ""'
GROUP = """
group: blimp_all
task: [blimp_order, blimp_number]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """texts.jsonl, pairs/ and lm-eval's tasks on both."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": text[: 40 * (i + 1)] + TYPED}) for i, text in enumerate(TEXTS)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    (folder / "rolling.yaml").write_text(ROLLING.replace("FOLDER", str(folder)))
    (folder / "group.yaml").write_text(GROUP)
    for uid, pairs in PAIRS.items():
        write_pairs(folder / "pairs", uid, pairs)
        write_pairs(folder / "spaced", uid, [(f" {good}", f" {bad}") for good, bad in pairs])
        write_task(folder, PLAIN, f"blimp_{uid}", uid)
        write_task(folder, BLIMP, f"spaced_{uid}", uid)
    return folder


def write_pairs(folder: Path, uid: str, pairs: list[tuple[str, str]]) -> None:
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps({"sentence_good": good, "sentence_bad": bad, "UID": uid, "linguistics_term": "all"})
        for good, bad in pairs
    ]
    (folder / f"{uid}.jsonl").write_text("\n".join(lines))


def write_task(folder: Path, template: str, task: str, uid: str) -> None:
    """On the pairs in `folder`."""
    text = template.replace("FOLDER", str(folder)).replace("TASK", task).replace("UID", uid)
    (folder / f"{task}.yaml").write_text(text)


@pytest.fixture(scope="module", params=["hybrid", "gpt2"])
def folder(request, tmp_path_factory) -> Path:
    """A model of ours, a linear recurrence, attention and a cell, and a GPT-2 of transformers."""
    path = tmp_path_factory.mktemp(request.param)
    documents = [Document(text, "x") for text in TEXTS]
    tokenizer = train_tokenizer(documents, TokenizerRecipe(vocab_size=400), sum(d.n_bytes for d in documents))
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    if request.param == "gpt2":
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=400, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, **ids
        )
        GPT2LMHeadModel(config).save_pretrained(path)
    else:
        build_model("hybrid", vocab_size=400, max_position_embeddings=CONTEXT, **ids).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def own_tasks_only(monkeypatch):
    """lm-eval's own 14,000 task files stay unread."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm_eval is not installed")
    only_folder = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_path=None, **_: only_folder(include_path=include_path)
    )


@pytest.fixture
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def harness(loaded):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")
    model, tokenizer = loaded
    return huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=CONTEXT)


def requests(kind: str, arguments: list[tuple[str, ...]]):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def measured(capsys) -> dict[str, dict]:
    """What was printed as JSON."""
    return {m["name"]: m for m in json.loads(capsys.readouterr().out)["measurements"]}


class TestTheSameAsLmEval:
    def test_each_document_by_its_rolling_windows(self, loaded, harness):
        """Below, at and beyond one context and several, with stride = context."""
        model, tokenizer = loaded
        ids = tokenizer("".join(TEXTS)[:4000]).input_ids
        lengths = [1, 2, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 3 * CONTEXT - 5, 3 * CONTEXT + 7]
        texts = [tokenizer.decode(ids[:length]) for length in lengths]
        theirs = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in texts]))
        for text, length, log_p in zip(texts, lengths, theirs, strict=True):
            assert len(tokenizer(text).input_ids) == length
            document = (np.array(tokenizer(text).input_ids), len(text.encode()))
            found = measure_likelihood(
                model, [document], start_id=tokenizer.bos_token_id, context=CONTEXT, stride=CONTEXT
            )
            assert found[0].value == pytest.approx(-log_p / length, rel=1e-6)
        # windows that overlap look further back, from the second window on
        half = document_nats(
            model,
            [tokenizer(text).input_ids for text in texts],
            start_id=tokenizer.bos_token_id,
            context=CONTEXT,
        )
        is_one_window = np.array(lengths) <= CONTEXT
        assert half[is_one_window] == pytest.approx(-np.array(theirs)[is_one_window], rel=1e-6)
        assert not np.isclose(half[~is_one_window], -np.array(theirs)[~is_one_window], rtol=1e-4).any()

    def test_each_sentence_given_the_start_token(self, loaded, harness):
        model, tokenizer = loaded
        sentences = [text for pairs in PAIRS.values() for pair in pairs for text in pair]
        theirs = harness.loglikelihood(requests("loglikelihood", [("", text) for text in sentences]))
        ours = document_nats(
            model,
            tokenizer(sentences, add_special_tokens=False)["input_ids"],
            start_id=tokenizer.bos_token_id,
            context=CONTEXT,
        )
        assert ours == pytest.approx([-log_p for log_p, _ in theirs], rel=1e-6)

    def test_whole_runs_of_both_side_by_side(self, folder, data, capsys):
        pytest.importorskip("lm_eval", reason="lm_eval is not installed")
        options = {
            "--pairs": str(data / "pairs"),
            "--tasks": "rolling,blimp_all",
            "--include-path": str(data),
        }
        windows = ["--set", f"evaluation.stride={CONTEXT}", "--set", f"evaluation.context_length={CONTEXT}"]
        options = [word for option in options.items() for word in option] + windows
        assert main(["evaluate", str(folder), str(data / "texts.jsonl"), "--json", *options]) == 0
        found = measured(capsys)
        values = {name: m["value"] for name, m in found.items()}
        assert values["bits_per_byte/rolling"] == pytest.approx(values["bits_per_byte"], rel=1e-6)
        nats_per_word = [math.log(values[f"word_perplexity{task}"]) for task in ("", "/rolling")]
        assert nats_per_word[0] == pytest.approx(nats_per_word[1], rel=1e-6)
        assert values["acc/blimp_all"] == values["minimal_pairs_accuracy"]
        for uid in PAIRS:
            assert values[f"acc/blimp_{uid}"] == values[f"minimal_pairs_accuracy/{uid}"]
            ours, theirs = found[f"minimal_pairs_accuracy/{uid}"], found[f"acc/blimp_{uid}"]
            assert ours["stderr"] == pytest.approx(theirs["stderr"])
            assert (theirs["n"], theirs["unit"], theirs["split"]) == (3, "fraction", f"blimp_{uid}:train")
        assert found["acc/blimp_all"]["n"] == 6
        assert found["acc/blimp_all"]["higher_is_better"]
        assert not found["bits_per_byte/rolling"]["higher_is_better"]
        assert found["bits_per_byte/rolling"]["unit"] == found["bits_per_byte"]["unit"]

    def test_pairs_by_lm_evals_own_template(self, folder, data, capsys):
        """It puts a space before each sentence, as these pairs have it."""
        pytest.importorskip("lm_eval", reason="lm_eval is not installed")
        options = ["--pairs", str(data / "spaced"), "--tasks", "spaced_*", "--include-path", str(data)]
        assert main(["evaluate", str(folder), "--json", *options]) == 0
        found = measured(capsys)
        for uid in PAIRS:
            assert found[f"acc/spaced_{uid}"]["value"] == found[f"minimal_pairs_accuracy/{uid}"]["value"]

    def test_but_a_tie_counts_half(self, folder, tmp_path, capsys):
        """lm-eval takes the first of two sentences that are as likely, which is the good one."""
        pytest.importorskip("lm_eval", reason="lm_eval is not installed")
        write_pairs(tmp_path / "pairs", "ties", [("two items", "two items")])
        write_task(tmp_path, PLAIN, "blimp_ties", "ties")
        options = [
            "--pairs",
            str(tmp_path / "pairs"),
            "--tasks",
            "blimp_ties",
            "--include-path",
            str(tmp_path),
        ]
        assert main(["evaluate", str(folder), "--json", *options]) == 0
        values = {name: m["value"] for name, m in measured(capsys).items()}
        assert values["minimal_pairs_accuracy"] == 0.5
        assert values["acc/blimp_ties"] == 1.0


def test_windows_beside_each_other_are_lm_evals():
    utils = pytest.importorskip("lm_eval.utils", reason="lm_eval is not installed")
    for length in range(1, 60):
        ids = list(range(100, 100 + length))
        theirs = list(utils.get_rolling_token_windows(ids, 0, 8, 1))
        windows = make_windows([length], 8, 8)
        inputs = [0, *ids]
        assert [(inputs[w.start : w.stop], ids[w.first : w.stop]) for w in windows] == theirs


def test_settings_of_the_recipe_reach_the_likelihood(loaded, folder):
    """Through the service as by hand: stride, context and texts in memory, for each combination."""
    model, tokenizer = loaded
    texts = TEXTS[:3]
    documents = [(np.array(tokenizer(text).input_ids), len(text.encode())) for text in texts]
    found = []
    for context, stride in ((CONTEXT, CONTEXT), (CONTEXT, 3), (CONTEXT, None), (16, None)):
        assignments = [f"evaluation.context_length={context}"]
        assignments += [] if stride is None else [f"evaluation.stride={stride}"]
        measured = evaluate(str(folder), texts=texts, assignments=assignments)
        expected = measure_likelihood(
            model, documents, start_id=tokenizer.bos_token_id, context=context, stride=stride
        )
        assert measured[0].value == pytest.approx(expected[0].value, rel=1e-6)
        assert {m.split for m in measured} == {"given"}
        found.append(measured[0].value)
    assert len({round(value, 5) for value in found}) == 4, "each setting changes the windows"


class TestSuite:
    def test_rows_need_what_material_has(self):
        fields = {field.name for field in dataclasses.fields(Material)}
        for row in SUITES.values():
            assert set(row.needs) <= fields

    def test_one_is_enough_for_a_model_without_text(self, folder, data, capsys):
        assert main(["evaluate", str(folder), "--pairs", str(data / "pairs")]) == 0
        _, *lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == [
            "minimal_pairs_accuracy", "minimal_pairs_accuracy_macro", "minimal_pairs_accuracy/all",
            "minimal_pairs_accuracy/number", "minimal_pairs_accuracy/order",
        ]  # fmt: skip
        assert "±" in lines[0]
        assert "[" in lines[0]
        assert lines[0].split()[-2:] == ["6", "pairs"]

    def test_a_run_has_its_text_for_range_and_samples(self, trained, capsys):
        words = ["--suite", "range,extrapolation,samples", "--set", "evaluation.context_length=64", "--json"]
        assert main(["evaluate", str(trained.path), *words]) == 0
        found = {(m["name"], m["split"]): m for m in json.loads(capsys.readouterr().out)["measurements"]}
        assert 0 < found["nats_per_token/1-64", "validation"]["value"] < 8
        assert ("nats_gain_from_2x_context", "validation") in found
        assert ("nats_per_token/4x_none/129-256", "validation") in found
        shares = [found["training_overlap_1", split]["value"] for split in ("samples", "reference")]
        assert all(0 < share <= 1 for share in shares)
        assert found["words_per_text", "samples"]["n"] == 100

    def test_what_is_measured_of_a_run_is_kept_beside_the_rest(self, trained, data, capsys):
        before = trained.evaluation.read_bytes()
        try:
            assert main(["evaluate", str(trained.path), "--pairs", str(data / "pairs"), "--json"]) == 0
            pairs = measured(capsys)
            kept = read_measurements(trained.evaluation)
            assert {m.name for m in kept} > pairs.keys()
            assert {m.name for m in kept} - pairs.keys() == {
                m["name"] for m in json.loads(before)["measurements"]
            }
            assert main(["evaluate", str(trained.path), "--json"]) == 0
            assert read_measurements(trained.evaluation) == kept, "all was there before"
            assert measured(capsys)["word_perplexity"]["split"] == "validation"
            assert main(["card", str(trained.path)]) == 0
            assert "Minimal pairs: order" in (trained.model / "README.md").read_text(encoding="utf-8")
        finally:
            trained.evaluation.write_bytes(before)
            main(["card", str(trained.path)])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--suite", "likelyhood"], "did you mean 'likelihood'?"),
            (["--suite", "likelihood,"], "there is no suite ''"),
            (["--suite", "minimal_pairs"], "needs --pairs"),
            (["--suite", "lm_eval"], "needs --tasks"),
            (["--suite", "likelihood", "--pairs", "x"], "--pairs is for --suite minimal_pairs"),
            (["x.txt", "--suite", "minimal_pairs", "--pairs", "x"], "a SOURCE of text was given"),
            (["--pairs", "nowhere"], "no pairs at 'nowhere'"),
            (["--suite", "likelihood"], "name the SOURCE"),
        ],
    )
    def test_mistakes_are_named(self, options, words, folder, data, capsys):
        options = [str(data) if word == "DATA" else word for word in options]
        assert main(["evaluate", str(folder), *options]) == 2
        assert words in last_line(capsys)

    @pytest.mark.parametrize(
        ("task", "words"), [("blimp_ordre", "did you mean 'blimp_order'?"), ("zzzzqqqq", "--include-path")]
    )
    def test_an_unknown_task_is_named(self, task, words, folder, data, own_tasks_only, capsys):
        assert main(["evaluate", str(folder), "--tasks", task, "--include-path", str(data)]) == 2
        assert words in last_line(capsys)

    @pytest.mark.slow
    def test_lm_evals_own_tasks_are_known(self, folder, capsys):
        pytest.importorskip("lm_eval", reason="lm_eval is not installed")
        assert main(["evaluate", str(folder), "--tasks", "blimp_pasive_1"]) == 2
        assert "did you mean 'blimp_passive_1'?" in last_line(capsys)

    def test_data_that_cannot_be_had_are_named(self, folder, data, tmp_path, capsys):
        pytest.importorskip("lm_eval", reason="lm_eval is not installed")
        write_task(tmp_path, PLAIN, "blimp_broken", "nowhere")
        options = ["--tasks", "blimp_broken", "--include-path", str(tmp_path)]
        assert main(["evaluate", str(folder), *options]) == 2
        assert "lm-eval cannot run blimp_broken" in last_line(capsys)

    def test_a_missing_extra_is_named(self, folder, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        assert main(["evaluate", str(folder), "--tasks", "blimp_order"]) == 2
        assert "pip install 'lm-eval>=" in last_line(capsys)
