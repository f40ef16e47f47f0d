"""Promise: a run that streams its text is the run that has it in memory, and goes on from a checkpoint."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from support.models import build_model
from support.runs import SMALL, losses
from support.streams import lanes, text_of, write_jsonl
from transformers import Trainer, TrainingArguments

from hf_genlm.cli.main import main
from hf_genlm.config.recipe import TokenizerRecipe, load_recipe, pointing_to_places
from hf_genlm.config.settings import Facts
from hf_genlm.config.settle import settle
from hf_genlm.errors import Stopped, UserError
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.files import read_json
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.corpus import changed_text
from hf_genlm.text.packed_stream import PackedStream
from hf_genlm.text.packing import collate
from hf_genlm.text.sources import FileShard
from hf_genlm.text.store import Document
from hf_genlm.text.streaming import open_stream
from hf_genlm.text.tokenizer import train_tokenizer
from hf_genlm.training import train as train_module
from hf_genlm.training.corpus import StreamCallback
from hf_genlm.training.train import train


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_jsonl(folder / "train.jsonl", range(600), 60)
    write_jsonl(folder / "held.jsonl", range(590, 640), 60)
    return folder


def recipe_of(sources, *assignments: str):
    texts = [f"corpus.sources={sources / 'train.jsonl'}", f"corpus.validation={sources / 'held.jsonl'}"]
    return load_recipe(None, [*SMALL, "tokenizer.vocab_size=300", *texts, *assignments])


def test_a_streamed_run_has_the_losses_of_one_in_memory(sources, tmp_path, monkeypatch):
    """The same rows in the same order, from the same tokenizer and the same start: every bit is the same."""
    make = train_module.training_arguments_of

    def in_order(*args):
        arguments = make(*args)
        arguments.train_sampling_strategy = "sequential"
        return arguments

    monkeypatch.setattr(train_module, "training_arguments_of", in_order)
    # a stream is not counted
    settings = ["model.ngram_order=0", "training.weight_decay=0.1", "training.gradient_accumulation_steps=2"]
    runs = [
        train(recipe_of(sources, *settings, *streamed), tmp_path / name)
        for name, streamed in (
            ("memory", ()),
            ("stream", ("corpus.stream=true", "corpus.shuffle_buffer=0")),
        )
    ]
    in_memory, stream = runs
    assert len(losses(stream)) == 30
    assert losses(stream) == losses(in_memory)
    assert (stream.model / "model.safetensors").read_bytes() == (
        in_memory.model / "model.safetensors"
    ).read_bytes()
    assert read_measurements(stream.evaluation) == read_measurements(in_memory.evaluation)
    # neither claims more than it knows
    events = {event["event"]: event for event in stream.read_log()}
    assert (
        events["model"]["rows"] is events["trained"]["epochs"] is events["tokenized"]["train_tokens"] is None
    )
    assert events["trained"]["tokens"] == 30 * 2 * 8 * 31
    corpus = read_json(stream.corpus)
    assert corpus["validation"] == read_json(in_memory.corpus)["validation"]
    assert corpus["stream"] == {"weights": None, "shuffle_buffer": 0}
    assert set(corpus["train"].values()) == {None}


def trainer_of(stream, folder, **arguments) -> Trainer:
    """The plain one, over a model with dropout."""
    torch.manual_seed(0)
    model = build_model("hybrid", vocab_size=300, dropout=0.2)
    settings = {
        "max_steps": 14, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "use_cpu": True,
        "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 5, "disable_tqdm": True,
        "accelerator_config": {"dispatch_batches": False}, "remove_unused_columns": False,
    }  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**settings, **arguments}),
        train_dataset=stream,
        data_collator=collate,
        callbacks=[StreamCallback(stream, rows_per_step=6)],
    )


def curve(trainer) -> list[tuple]:
    return [(e["step"], e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize("shuffle_buffer", [0, 40])
def test_resuming_in_mid_stream_is_bit_equal(shuffle_buffer, tmp_path):
    """A mixture that begins again and again, with dropout and accumulation; twice resumed."""
    recipe = lanes(tmp_path)
    texts = [Document(text_of(seed, 100), "x") for seed in range(20)]
    tokenizer = train_tokenizer(texts, TokenizerRecipe(vocab_size=300), 10_000)

    def opened():
        return PackedStream(open_stream(recipe), tokenizer, 17, shuffle_buffer, batch=500)

    undisturbed = trainer_of(opened(), tmp_path / "a")
    undisturbed.train()
    assert len(curve(undisturbed)) == 14
    for folder, step in (("a", 5), ("b", 10)):
        resumed = trainer_of(opened(), tmp_path / "b")
        resumed.train(resume_from_checkpoint=str(tmp_path / folder / f"checkpoint-{step}"))
        assert curve(resumed) == curve(undisturbed)
        for name, weight in resumed.model.state_dict().items():
            assert torch.equal(weight, undisturbed.model.state_dict()[name]), name
    # it can fail: without its callback, the stream begins again
    lost = trainer_of(opened(), tmp_path / "c", ignore_data_skip=True)
    lost.remove_callback(StreamCallback)
    lost.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert curve(lost) != curve(undisturbed)


def test_the_place_is_that_of_the_rows_trained_on(tmp_path):
    """A loader fetches further: what was fetched and not trained on comes again."""
    recipe = lanes(tmp_path)
    texts = [Document(text_of(seed, 100), "x") for seed in range(20)]
    tokenizer = train_tokenizer(texts, TokenizerRecipe(vocab_size=300), 10_000)
    stream = PackedStream(open_stream(recipe), tokenizer, 17, 40)
    trainer_of(stream, tmp_path / "a", max_steps=5).train()
    saved = json.loads((tmp_path / "a" / "checkpoint-5" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["StreamCallback"]["attributes"]["stream"]["rows"] == 30
    assert stream.state_dict()["rows"] > 30


def test_a_checkpoint_of_another_kind_of_run_is_refused(tmp_path):
    recipe = lanes(tmp_path)
    texts = [Document(text_of(seed, 100), "x") for seed in range(20)]
    tokenizer = train_tokenizer(texts, TokenizerRecipe(vocab_size=300), 10_000)
    stream = PackedStream(open_stream(recipe), tokenizer, 17)
    other = trainer_of(stream, tmp_path / "a", max_steps=5)
    other.remove_callback(StreamCallback)
    other.train()
    with pytest.raises(UserError, match="no place in a stream"):
        trainer_of(stream, tmp_path / "a").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))


def test_the_command_line_streams(sources, tmp_path, capsys):
    """By the clock, shuffled, what is held out chosen by hash; measured again by `evaluate`."""
    small = [word for assignment in SMALL[1:-2] for word in ("--set", assignment)]
    words = ["train", str(sources / "train.jsonl"), "--stream", "--minutes", "0.03", *small]
    assert main([*words, "--vocab-size", "300", "--out", str(tmp_path / "run")]) == 0
    run = RunFolder.open(tmp_path / "run")
    events = {event["event"]: event for event in run.read_log()}
    assert events["planned"]["passes"] is None
    assert events["planned"]["weight_decay"] == 0.1
    assert load_recipe(run.recipe).corpus.stream
    values = {m.name: m for m in read_measurements(run.evaluation)}
    assert values["bits_per_byte"].n == read_json(run.corpus)["validation"]["bytes"]
    card = (run.model / "README.md").read_text()
    assert "was streamed during training" in card
    assert "None" not in card
    capsys.readouterr()
    assert main(["evaluate", str(run.path), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["measurements"]
    assert {m["name"]: m["value"] for m in again} == pytest.approx(
        {name: m.value for name, m in values.items()}, rel=1e-5
    )


def test_a_run_over_a_mixture(sources, tmp_path):
    """A whole run over two sources of which each begins again by itself."""
    recipe = recipe_of(sources, "corpus.stream=true", "training.steps=4", "training.num_validations=0")
    recipe.corpus.sources.append(str(sources / "held.jsonl"))
    recipe.corpus.weights = [1.0, 1.0]
    recipe.corpus.validation = []
    run = train(recipe, tmp_path / "run")
    assert read_json(run.corpus)["stream"]["weights"] == [1.0, 1.0]
    assert read_json(run.corpus)["split"]["method"] == "hash"
    assert all(math.isfinite(m.value) for m in read_measurements(run.evaluation))


def test_a_text_of_unknown_length_is_taken_for_one_pass(sources):
    recipe = recipe_of(sources)
    recipe.training.learning_rate, recipe.training.steps = 1e-3, 1000
    unknown = settle(recipe, Facts(train_tokens=None))
    one_epoch = settle(recipe, Facts(train_tokens=1000 * 8 * 31))
    assert unknown.length.epochs is None
    assert one_epoch.length.epochs == 1.0
    assert unknown.training.weight_decay == one_epoch.training.weight_decay == 0.1
    assert settle(recipe, Facts(train_tokens=100 * 8 * 31)).training.weight_decay > 0.1


def test_a_stream_that_cannot_be_read_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n', encoding="utf-8")
    recipe = load_recipe(None, [*SMALL, f"corpus.sources={tmp_path / 'a.jsonl'}", "corpus.stream=true"])
    with pytest.raises(UserError, match="has no field 'text'"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


WORDS = (b"1984", b"house", b"river", b"time", b"the ", b"of ")


def ends_at_step_5(event, fields):
    if event == "checkpoint" and fields["step"] >= 5:
        signal.raise_signal(signal.SIGTERM)


def stopped_stream(folder):
    """The file that a run in `folder` streams, which ended at its checkpoint of step 5, and its recipe."""
    path = folder / "train.jsonl"
    write_jsonl(path, range(100), 60)
    recipe = recipe_of(folder, "corpus.stream=true", "training.save_steps=5")
    recipe.corpus.validation = []
    with pytest.raises(Stopped):
        train(recipe, folder / "run", ends_at_step_5)
    return path, recipe


def test_an_edited_file_of_the_same_size_is_refused_by_name_at_resuming(tmp_path):
    path, recipe = stopped_stream(tmp_path)
    before = path.read_text(encoding="utf-8")
    path.write_text(before[:-8] + "Z" + before[-7:], encoding="utf-8")
    with pytest.raises(UserError, match=r"not what this run began with \(changed: train\.jsonl\)"):
        train(recipe, tmp_path / "run", resume=True)
    path.write_text(before, encoding="utf-8")
    os.utime(path, (1, 1))
    run = train(recipe, tmp_path / "run", resume=True)
    assert not [event for event in run.read_log() if "written to since" in event.get("message", "")]


def test_of_a_large_file_samples_are_compared_and_a_later_date_is_told(tmp_path, monkeypatch):
    """Sixteen blocks, evenly: what lies between them is told by the date alone."""
    monkeypatch.setattr(FileShard, "sample_bytes", 64)
    path, recipe = stopped_stream(tmp_path)
    before = path.read_bytes()
    for block in (0, 7, 15):
        start = (len(before) - 64) * block // 15
        word = next(word for word in WORDS if word in before[start : start + 64])
        place = before.index(word, start)
        path.write_bytes(before[:place] + b"Z" + before[place + 1 :])
        with pytest.raises(UserError, match=r"changed: train\.jsonl"):
            train(recipe, tmp_path / "run", resume=True)
    path.write_bytes(before)
    os.utime(path, (1, 1))
    run = train(recipe, tmp_path / "run", resume=True)
    notes = [event["message"] for event in run.read_log() if event["event"] == "note"]
    assert [note for note in notes if note.startswith("train.jsonl was written to since this run began")]


def test_a_stream_of_two_files_of_one_name_goes_on_and_after_a_move_where_it_is_pointed_to(
    tmp_path, monkeypatch
):
    """From the folder that it was started in; and moved with its text, from another one."""
    old = tmp_path / "old"
    for name, seeds in (("a", range(40)), ("b", range(40, 100))):
        (old / name).mkdir(parents=True)
        write_jsonl(old / name / "train.jsonl", seeds, 60)
    monkeypatch.chdir(old)
    recipe = recipe_of(old, "corpus.stream=true", "training.save_steps=5", "training.steps=12")
    recipe.corpus.sources, recipe.corpus.validation = [str(old / "a"), str(old / "b" / "train.jsonl")], []
    recipe.corpus.sources[0] += "/train.jsonl"  # both are shown by their last part
    with pytest.raises(Stopped):
        train(recipe, old / "run", ends_at_step_5)
    assert [file["name"] for file in read_json(old / "run/corpus.json")["files"]] == ["train.jsonl"] * 2
    shutil.copytree(old / "run", tmp_path / "same")
    assert train(recipe, tmp_path / "same", resume=True).model.is_dir()
    moved = old.rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    empty = load_recipe(None, [])
    with pytest.raises(UserError, match=r"a/train\.jsonl', which this run reads, is missing.*started in.*"):
        train(empty, moved / "run", resume=True)
    wrong = load_recipe(None, ["corpus.sources=[new/b/train.jsonl, new/a/train.jsonl]"])
    with pytest.raises(UserError, match="the order of the files"):
        train(wrong, moved / "run", resume=True)
    there = load_recipe(None, ["corpus.sources=[new/a/train.jsonl, new/b/train.jsonl]"])
    run = train(there, moved / "run", resume=True)
    assert (run.model / "model.safetensors").read_bytes() == (
        tmp_path / "same/model/model.safetensors"
    ).read_bytes()
    assert load_recipe(run.recipe).corpus.sources == there.corpus.sources  # for who reads its text later


def test_files_are_compared_by_content_not_by_name():
    def report(*files):
        files = [{"name": n, "bytes": size, "sha256": None, "samples_sha256": s} for n, size, s in files]
        return {"files": files, "train": {"sha256": None}, "validation": {"sha256": "v"}, "stream": {}}

    one, two, hub = ("a.txt", 5, "1"), ("a.txt", 5, "2"), ("me/data", None, None)
    before = report(one, two, hub)
    assert changed_text(before, report(one, two, hub)) is None
    assert changed_text(before, report(("x/b.txt", 5, "1"), two, hub)) is None
    assert changed_text(before, report(two, one, hub)) == ("the train text", "the order of the files")
    assert changed_text(before, report(one, one, hub)) == ("the train text", "a.txt")
    assert changed_text(before, report(one, ("new.txt", 6, "2"), hub)) == ("the train text", "new.txt, a.txt")
    assert changed_text(before, report(one, two, ("me/other", None, None)))[1] == "me/other, me/data"
    assert changed_text(before, report(one, two))[1] == "me/data"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("corpus.sources", "['gone', 'also.txt']"),
        ("corpus.languages", "{eng: [gone]}"),
        ("corpus.parallel", "{eng: gone}"),
        ("corpus.validation", "[gone]"),
        ("vectors.path", "gone"),
        ("model.init_from", "gone"),
    ],
)
def test_how_to_point_to_what_is_missing_is_told(tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(None, [f"{name}={value}"])
    told = rf"'gone', which this run reads.*{tmp_path.name}.*--set {name}="
    with pytest.raises(UserError, match=told), pointing_to_places(recipe):
        raise UserError("'gone' is not there")
    with pytest.raises(UserError, match="'other' is not there"), pointing_to_places(recipe):
        raise UserError("'other' is not there")
    (tmp_path / "gone").touch()
    with pytest.raises(UserError, match="'gone' is no text"), pointing_to_places(recipe):
        raise UserError("'gone' is no text")
