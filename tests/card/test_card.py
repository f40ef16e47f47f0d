"""The promise: the card says what the run folder says, to anyone, whatever the text in it looks like."""

import json
import math
import re
import socket

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors.numpy import save_file
from support.cards import MEASURED, SHAPES, make_run, tables
from support.hub_metadata import faults_of, front_matter_of

from hf_genlm.card import write_card
from hf_genlm.config.recipe import Recipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import Measurement, write_measurements
from hf_genlm.report import document

HOSTILE = [
    "a|b.txt", "`tick`.txt", "``` fence.txt", "---", "{{ 7*7 }}{% raw %}", "<script>x</script>.txt",
    "[link](http://x).md", "line\nbreak\r\n# heading.txt", "x\\|y", "&amp;|", "*_a_* ~~b~~ $c$", "1. list",
    "日本語 العربية.txt", "\ud800.txt",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the card touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def table_with(text: str, header: str) -> list[list[str]]:
    (table,) = [rows for rows in tables(text) if header in rows[0]]
    return table


def test_front_matter_parses_and_survives_a_round_trip(tmp_path):
    recipe = Recipe()
    recipe.card.name, recipe.card.license, recipe.card.language = "tiny-tale", "cc-by-4.0", ["no", "nn"]
    path = write_card(make_run(tmp_path, recipe=recipe))
    assert path == tmp_path / "run" / "model" / "README.md"
    card = ModelCard.load(path)
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["license"] == "cc-by-4.0"
    assert data["language"] == ["no", "nn"]
    assert data["tags"] == ["genlm", "custom_code", "hybrid", "lstm", "full_attention"]
    assert data["metrics"] == [m.name for m in MEASURED]
    assert data["model-index"][0]["name"] == "tiny-tale"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        m.name: m.value for m in MEASURED
    }
    assert {r.dataset_split for r in card.data.eval_results} == {"validation"}
    assert {r.dataset_args["sha256"] for r in card.data.eval_results} == {"ef" * 32}
    assert ModelCardData(**yaml.safe_load(card.data.to_yaml())).to_dict() == data
    assert str(card) == path.read_text(encoding="utf-8")
    assert card.text.strip().startswith("# tiny-tale\n")


def test_what_the_recipe_leaves_open_is_not_invented(tmp_path):
    card = ModelCard.load(write_card(make_run(tmp_path)))
    assert not {"license", "language"} & set(card.data.to_dict())
    assert card.data.model_name == "run"
    assert "none declared" in card.text
    assert "More information" not in card.text
    assert "None" not in re.sub(r"```.*?```", "", card.text, flags=re.S)


def test_every_measured_number_is_that_of_the_file(tmp_path):
    rows = table_with(ModelCard.load(write_card(make_run(tmp_path))).text, "measurement")[2:]
    assert len(rows) == len(MEASURED)
    for (_, value, stderr, interval, n, unit, better, split), m in zip(rows, MEASURED, strict=True):
        decimals = len(value.partition(".")[2])
        assert float(value) == round(m.value, decimals)
        assert n == f"{m.n:,}"
        assert (unit, better, split) == (m.unit, "higher" if m.higher_is_better else "lower", m.split)
        if m.stderr is None:
            assert stderr == "unknown"
        else:
            assert float(stderr) == round(m.stderr, decimals)
            assert float(stderr) == pytest.approx(m.stderr, rel=0.05), "two figures of the error are shown"
        if m.interval is None:
            assert interval == "unknown"
        else:
            assert interval == " to ".join(f"{end:.{decimals}f}" for end in m.interval)


def test_a_number_that_is_not_finite_is_called_unknown(tmp_path):
    run = make_run(tmp_path)
    write_measurements(
        run.evaluation, [Measurement("perplexity", math.inf, "1", 9, None, "validation", False)]
    )
    card = ModelCard.load(write_card(run))
    assert table_with(card.text, "measurement")[2][1:3] == ["unknown", "unknown"]
    assert not card.data.eval_results


def test_what_was_measured_on_other_text_is_not_said_of_the_corpus(tmp_path):
    run = make_run(tmp_path)
    part = Measurement("minimal_pairs_accuracy/passive_1", 0.75, "fraction", 1000, 0.01, "blimp", True)
    lm_eval = Measurement("acc/blimp_passive_1", 0.7, "fraction", 1000, 0.01, "blimp_passive_1:train", True)
    write_measurements(run.evaluation, [*MEASURED, part, lm_eval])
    card = ModelCard.load(write_card(run))
    assert table_with(card.text, "measurement")[-2][0] == "Minimal pairs: passive_1"
    assert card.data.metrics == [*(m.name for m in MEASURED), "minimal_pairs_accuracy", "acc"]
    names = {
        (result.dataset_name, result.dataset_split) for result in card.data.eval_results[len(MEASURED) :]
    }
    assert names == {("blimp", "blimp"), ("blimp_passive_1:train", "blimp_passive_1:train")}


def test_parameters_are_counted_by_part(tmp_path):
    text = write_card(make_run(tmp_path)).read_text(encoding="utf-8")
    table = table_with(text, "part")[2:]
    assert {row[0]: (row[1], row[2]) for row in table} == {
        "`token embedding`": ("1", "300"),
        "`embedding projection`": ("1", "48"),
        "`mixer lstm`": ("2", "288"),
        "`mixer full_attention`": ("1", "64"),
        "`norms`": ("3", "24"),
        "`MLP`": ("1", "128"),
        "total": ("9", "852"),
    }
    assert "stored and counted once" in text


def test_an_untied_head_is_a_part(tmp_path):
    run = make_run(tmp_path)
    tensors = {key: np.zeros(shape, np.float32) for key, shape in SHAPES.items()}
    save_file({**tensors, "lm_head.weight": np.zeros((50, 8), np.float32)}, run.model / "model.safetensors")
    text = write_card(run).read_text(encoding="utf-8")
    assert ["`output head`", "1", "400", "31.9 %"] in table_with(text, "part")
    assert "stored and counted once" not in text


def test_data_and_training_facts_are_those_of_the_run(tmp_path):
    run = make_run(tmp_path)
    text = write_card(run).read_text(encoding="utf-8")
    splits = next(table for table in tables(text) if table[0][0] == "split")
    assert splits[2:] == [
        ["train", "30", "2,345,678", "876,543", f"`{'cd' * 32}`"],
        ["validation", "4", "98,765", "41,234", f"`{'ef' * 32}`"],
    ]
    assert table_with(text, "file")[2:] == [["`a.txt`", "1,000", "3", f"`{'ab' * 32}`"]]
    assert "Duplicates removed: 13. Empty documents skipped: 2. Files skipped: 1." in text
    assert "321 steps, 1,753,086 tokens seen, 123.5 s of wall-clock time, 14,200 tokens/s." in text
    assert "each seen 2.00 times on average" in text
    assert "| bytes per token | 2.68 on" in text
    environment = json.loads(run.environment.read_text())
    for package, version in environment["packages"].items():
        assert version is None or f"`{package}` `{version}`" in text
    assert ["one step", "16 rows of 64 tokens"] in table_with(text, "setting")
    assert "The clock ends this run" not in text
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.S)
    assert yaml.safe_load(recipe) == yaml.safe_load(run.recipe.read_text())


def test_a_long_list_of_files_is_counted(tmp_path):
    files = [{"name": f"f{i}", "bytes": 1, "sha256": "0" * 64, "documents": 1} for i in range(21)]
    text = write_card(make_run(tmp_path, files=files)).read_text(encoding="utf-8")
    assert "21 files;" in text
    assert "`f20`" not in text
    text = write_card(make_run(tmp_path, files=files[:20], name="other")).read_text(encoding="utf-8")
    assert len(table_with(text, "file")) == 22


def test_a_hub_dataset_has_no_bytes_on_disk(tmp_path):
    files = [{"name": "owner/name", "bytes": None, "sha256": None, "documents": 5}]
    text = write_card(make_run(tmp_path, files=files)).read_text(encoding="utf-8")
    assert table_with(text, "file")[2] == ["`owner/name`", "unknown", "5", "unknown"]


def test_hostile_names_stay_in_their_cells(tmp_path):
    files = [{"name": name, "bytes": 5, "sha256": "0" * 64, "documents": 1} for name in HOSTILE]
    recipe = Recipe()
    recipe.card.name = "a\n---\nlicense: mit\n# b {{ 7*7 }} <b>`"
    recipe.card.authors = ["x: [y\n---\n", "<b>|`"]
    recipe.card.intended_use = "---\n# heading {{ 7*7 }} <img src=x>"
    corpus = {"description": "text | of `many` --- <img src=x> {{ 7*7 }}\n\n# heading"}
    path = write_card(make_run(tmp_path, files=files, recipe=recipe, corpus=corpus))
    card = ModelCard.load(path)
    assert card.data.model_name == recipe.card.name
    assert faults_of(front_matter_of(path.read_text(encoding="utf-8"))) == []
    assert {r.dataset_name for r in card.data.eval_results} == {corpus["description"]}
    table = table_with(card.text, "file")
    assert [len(row) for row in table] == [4] * (len(HOSTILE) + 2)
    for row in table[2:]:
        assert re.fullmatch(r"`[^`]*`|<code>[^<>`|*\[\]\\$]*</code>", row[0]), row[0]
    text = card.text.rpartition("<!--")[0]  # its hash has all digits
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.S | re.M)
    assert "<script" not in outside
    assert "<img" not in outside
    assert "49" not in outside
    assert [line for line in outside.split("\n") if line.startswith("# ")] == [outside.strip().split("\n")[0]]


@pytest.mark.parametrize(
    "text", ["plain", "a ``` b", "```\n# out\n```", "`````", "---\n", "{{ 7*7 }}", "\r\n", "    ```", ""]
)
def test_a_sample_cannot_leave_its_fence(tmp_path, text):
    samples = f"## After step 1\n\n``````text\nold\n``````\n\n## After step 9\n\n``````text\n{text}\n``````\n"
    body = ModelCard.load(write_card(make_run(tmp_path, samples=samples))).text
    section, after, _ = body.partition("## Samples")[2].partition("\n## Privacy\n")
    assert after, "the section after the samples is still one"
    blocks = document.fenced_blocks(section)
    assert blocks == ["old", text.replace("\r\n", "\n").removesuffix("\n")]


def test_long_samples_are_cut_and_only_the_last_are_shown(tmp_path):
    samples = "".join(f"```text\n{i} {'x' * 5000}\n```\n" for i in range(5))
    text = write_card(make_run(tmp_path, samples=samples)).read_text(encoding="utf-8")
    section = text.partition("## Samples")[2].partition("## Privacy")[0]
    assert [block[:2] for block in document.fenced_blocks(section)] == ["3 ", "4 "]
    assert len(section) < 6000


def test_a_validation_text_that_was_named_has_no_seed(tmp_path):
    split = {"method": "given", "seed": 7, "fraction": 0.05}
    text = write_card(make_run(tmp_path, corpus={"split": split})).read_text(encoding="utf-8")
    assert "The validation text was given separately" in text
    assert "seed 7" not in text
    assert "same sources" not in text


def test_without_samples_there_is_no_section(tmp_path):
    assert "## Samples" not in write_card(make_run(tmp_path)).read_text(encoding="utf-8")


def test_no_path_of_this_machine_is_shown(tmp_path):
    home = str(tmp_path / "alice")
    recipe = Recipe()
    recipe.corpus.sources = [
        f"{home}/my texts",
        "~/alice/b",
        "C:\\Users\\alice\\c.txt",
        f"file://{home}/d",
        "e/f.txt",
    ]
    recipe.corpus.validation = [f"{home}/held.txt"]
    recipe.tokenizer.path = f"{home}/tokenizer"
    corpus = {
        "sources": recipe.corpus.sources,
        "description": f"2 files: see {home}/x.txt and https://example.org/a/b",
    }
    files = [{"name": f"{home}/a.txt", "bytes": 1, "sha256": "0" * 64, "documents": 1}]
    path = write_card(make_run(tmp_path, recipe=recipe, corpus=corpus, files=files))
    text = path.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert "alice" not in text
    assert socket.gethostname() not in text
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, flags=re.S)[0])
    assert shown["corpus"]["sources"] == ["my texts", "b", "c.txt", "d", "e/f.txt"]
    assert "see x.txt and https://example.org/a/b" in text


def test_the_same_run_gives_the_same_card(tmp_path):
    run = make_run(tmp_path)
    first = write_card(run).read_bytes()
    assert write_card(run).read_bytes() == first


def test_an_audit_is_reported_and_its_absence_is_said(tmp_path):
    run = make_run(tmp_path)
    assert "No privacy audit was made" in write_card(run).read_text(encoding="utf-8")
    write_measurements(
        run.path / "audit.json", [Measurement("exposure", 1.25, "bits", 10, 0.5, "train", False)]
    )
    text = write_card(run).read_text(encoding="utf-8")
    assert "No privacy audit was made" not in text
    assert "| exposure | 1.25 |  | 10 | bits | train |" in text


@pytest.mark.parametrize(
    "name",
    ["corpus.json", "environment.json", "evaluation.json", "model/config.json", "model/model.safetensors"],
)
def test_a_missing_or_damaged_file_is_named(tmp_path, name):
    run = make_run(tmp_path)
    (run.path / name).write_bytes(b"{")
    with pytest.raises(UserError, match=re.escape(name.rpartition("/")[2])):
        write_card(run)
    (run.path / name).unlink()
    with pytest.raises(UserError, match="'train' writes it"):
        write_card(run)
    assert not (run.model / "README.md").exists()


def test_a_run_that_is_not_finished_in_its_log_is_still_described(tmp_path):
    run = make_run(tmp_path)
    run.log_file.unlink()
    text = write_card(run).read_text(encoding="utf-8")
    assert "steps," not in text
    assert "| machine |" in text
    assert "year =" not in text


def test_the_loading_example_runs(tmp_path, monkeypatch, capsys):
    """As printed, in the model's folder, with a model and a tokenizer that are saved there."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from hf_genlm.model import GenLMConfig, GenLMForCausalLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    run = make_run(tmp_path)
    vocabulary = {
        word: i for i, word in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end
    ).save_pretrained(run.model)
    config = GenLMConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        mixer_types=["lstm", "full_attention"],
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    GenLMForCausalLM(config).save_pretrained(run.model)
    (example,) = re.findall(r"```python\n(.*?)```", write_card(run).read_text(encoding="utf-8"), flags=re.S)
    assert 'REPO = "."' in example
    monkeypatch.chdir(run.model)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    (example,) = re.findall(
        r"```python\n(.*?)```", write_card(run, "me/tale").read_text(encoding="utf-8"), flags=re.S
    )
    assert 'REPO = "me/tale"\nREVISION = "main"  # the newest' in example
    assert example.count("revision=REVISION") == 2
    named = write_card(run, "me/tale", revision="0a" * 20).read_text(encoding="utf-8")
    assert f'REPO = "me/tale"\nREVISION = "{"0a" * 20}"  # ' in named
    assert "newest" not in named
