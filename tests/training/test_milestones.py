"""Promise: the model as it was after so many words of text is kept, whole, and loads like any other."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.runs import SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_genlm.cli.main import main
from hf_genlm.config.recipe import CorpusRecipe, Recipe, load_recipe
from hf_genlm.config.settings import Pace
from hf_genlm.errors import UserError
from hf_genlm.files import read_json
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.corpus import read_corpus
from hf_genlm.text.languages import milestone_words
from hf_genlm.text.store import Document, TextStore, as_documents
from hf_genlm.training.budget import Budget
from hf_genlm.training.callbacks import MilestoneCallback, WordRate, milestone_name, read_milestones
from hf_genlm.training.train import train

ROOT = Path(__file__).parents[2]
MILLION = 10**6


def recipe_of(text: Path, *assignments: str) -> Recipe:
    plain = ["training.steps=20", "training.num_validations=0", "training.num_samples=0"]
    return load_recipe(None, [*SMALL, f"corpus.sources={text}", *plain, *assignments])


def test_the_schedule_of_the_challenge_and_numbers_of_ones_own():
    found = read_milestones(["babylm"])
    assert [milestone_name(words) for words in found] == [
        f"chck_{n}M" for n in (*range(1, 10), *range(10, 100, 10), *range(100, 1001, 100))
    ]
    assert read_milestones(["2M", "500k", "7", "2000000"]) == [7, 500_000, 2 * MILLION]
    assert [milestone_name(words) for words in (7, 500_000, 1_500_000, 10**9)] == [
        "chck_7", "chck_500K", "chck_1500K", "chck_1000M",
    ]  # fmt: skip
    assert all(re.fullmatch(r"[A-Za-z0-9_]+", milestone_name(words)) for words in found)
    for word in ("0", "1.5M", "-3", "babylmm", "1T", ""):
        with pytest.raises(UserError, match="is no number such as 500K or 1M"):
            read_milestones([word])


def test_words_are_counted_across_the_parts_of_a_long_document():
    texts = ["one two", "three", " a\u3000b\n\nc ", "   ", "long " * 50 + "end", "x" * 100 + " y"]
    expected = sum(len(text.split()) for text in texts)
    for chunk in (1 << 20, 16, 7):
        documents = as_documents([Document(text, "t") for text in texts], TextStore(chunk_bytes=chunk))
        assert documents.total_words() == expected


@pytest.mark.parametrize("chunk", [1 << 20, 16, 7])
def test_words_of_scripts_without_spaces_are_counted_by_byte_premiums(chunk):
    """By the rule of the track: 5.43 bytes, times the byte premium of the language, for a word."""
    zho, jpn, tha = (
        "\u4eba\u751f\u81ea\u7531\u3002" * 1000,
        "\u4eba\u306f\u81ea\u7531\u3067\u3059\u3002" * 1000,
        "\u0e20\u0e32\u0e29\u0e32" * 1000,
    )
    english = "one two three " * 500
    found = {}
    for name, texts in {"zho": [zho], "jpn": [jpn], "tha": [tha], "mixed": [english + zho, english]}.items():
        documents = as_documents([Document(text, "t") for text in texts], TextStore(chunk_bytes=chunk))
        found[name] = milestone_words(documents, CorpusRecipe(), {})
    assert found["zho"] == (round(15_000 / (5.43 * 0.936)), {"zho": 0.936})
    assert found["jpn"] == (round(21_000 / (5.43 * 1.322)), {"jpn": 1.322})
    assert found["tha"] == (round(12_000 / (5.43 * 2.742)), {"tha": 2.742})
    assert found["mixed"] == (3000 + found["zho"][0], {"zho": 0.936})
    documents = as_documents([Document(zho, "t"), Document(english, "t")])
    recipe = CorpusRecipe(languages={"zho": ["x"], "eng": ["y"]}, byte_premiums={"zho": 0.5, "eng": 1})
    counted = milestone_words(documents, recipe, {"zho": 1, "eng": 1})
    assert counted == (round(15_000 / (5.43 * 0.5) + 1500), {"zho": 0.5})
    spaced = as_documents([Document("\u0434\u043e\u043c a\u3000b \ud55c\uad6d \uc5b4", "t")])
    assert milestone_words(spaced, CorpusRecipe(), {}) == (5, {})


def test_a_run_over_unspaced_text_tells_how_its_words_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(0x4E00 + i * i % 300) for i in range(6000)), encoding="utf-8")
    run = train(
        recipe_of(tmp_path / "a.txt", "training.milestone_words=[1000]", "training.steps=20"),
        tmp_path / "run",
    )
    corpus = read_json(run.corpus)["train"]
    assert corpus["words"] == pytest.approx(corpus["bytes"] / (5.43 * 0.936), abs=1)
    assert "(zho 0.936)" in " ".join(event.get("message", "") for event in run.read_log())
    assert (run.milestones / "chck_1K").is_dir()


@pytest.fixture(scope="module")
def kept(text_folder, tmp_path_factory):
    """A run of twenty steps that kept its model three times."""
    recipe = recipe_of(text_folder, "training.milestone_words=[500, 1000, 1200, 500M]")
    return train(recipe, tmp_path_factory.mktemp("runs") / "kept")


def due_steps(run: RunFolder, marks: list[int]) -> dict[int, int]:
    """Words -> the first step that has seen them, counted here from the text itself."""
    recipe = load_recipe(run.recipe)
    n_words = sum(len(document.text.split()) for document in read_corpus(recipe.corpus).train)
    assert read_json(run.corpus)["train"]["words"] == n_words
    (model,) = (event for event in run.read_log() if event["event"] == "model")
    rows = recipe.training.batch_size
    return {
        words: next(s for s in range(1, 999) if s * rows * n_words >= words * model["rows"])
        for words in marks
    }


def test_each_has_the_weights_of_its_step_in_a_run_without_any(kept, text_folder, tmp_path):
    steps = due_steps(kept, [500, 1000, 1200])
    assert len(set(steps.values())) == 3
    written = [event for event in kept.read_log() if event["event"] == "milestone"]
    assert {event["words"]: event["step"] for event in written} == steps
    assert sorted(path.name for path in kept.milestones.iterdir()) == ["chck_1200", "chck_1K", "chck_500"]
    weights = {}

    def take(event, fields):
        if event == "checkpoint" and fields["step"] in steps.values():
            file = tmp_path / "plain/checkpoints" / f"checkpoint-{fields['step']}" / "model.safetensors"
            weights[fields["step"]] = load_file(file)

    plain = train(recipe_of(text_folder, "training.save_steps=1"), tmp_path / "plain", take)
    assert not plain.milestones.exists()
    assert (plain.model / "model.safetensors").read_bytes() == (kept.model / "model.safetensors").read_bytes()
    for words, step in steps.items():
        found = load_file(kept.milestones / milestone_name(words) / "model.safetensors")
        assert found.keys() == weights[step].keys()
        assert all(torch.equal(found[name], weights[step][name]) for name in found)


def test_each_is_a_whole_model_that_generates(kept):
    folder = kept.milestones / "chck_1K"
    assert {path.name for path in kept.model.iterdir()} - {"README.md", "plots"} == {
        p.name for p in folder.iterdir()
    }
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.use_cache
    ids = AutoTokenizer.from_pretrained(folder)("import", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


def test_each_loads_as_a_branch_of_a_repository(kept, tmp_path):
    """As the Hub's cache holds a repository of which two branches were fetched."""
    repository = tmp_path / "models--me--baby"
    (repository / "refs").mkdir(parents=True)
    for number, name in enumerate(("chck_500", "chck_1200")):
        commit = str(number) * 40
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(kept.milestones / name, repository / "snapshots" / commit)
    for name in ("chck_500", "chck_1200"):
        model = AutoModelForCausalLM.from_pretrained("me/baby", revision=name, cache_dir=tmp_path)
        expected = load_file(kept.milestones / name / "model.safetensors")
        assert torch.equal(
            model.state_dict()["model.embed_tokens.weight"], expected["model.embed_tokens.weight"]
        )


def test_a_run_that_is_gone_on_with_writes_none_twice(kept, text_folder, tmp_path):
    recipe = recipe_of(text_folder, "training.milestone_words=[500, 1000, 1200]", "training.save_steps=5")
    steps = due_steps(kept, [500, 1000, 1200])

    def fail(event, fields):
        if event == "milestone" and fields["words"] == 1000:  # before the checkpoint of its step
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(recipe, tmp_path / "run", fail)
    run = RunFolder(tmp_path / "run")
    inodes = {path.name: path.stat().st_ino for path in run.milestones.iterdir()}
    assert set(inodes) == {"chck_500", "chck_1K"}
    shutil.copytree(
        run.milestones / "chck_1K", run.milestones / f".chck_1200.{0:016x}.part"
    )  # a kill in mid-writing
    train(recipe, run.path, resume=True)
    assert {name: (run.milestones / name).stat().st_ino for name in inodes} == inodes
    assert sorted(path.name for path in run.milestones.iterdir()) == ["chck_1200", "chck_1K", "chck_500"]
    written = [(event["words"], event["step"]) for event in run.read_log() if event["event"] == "milestone"]
    assert written == sorted(steps.items())
    for name in ("chck_500", "chck_1K", "chck_1200"):
        file = Path(name) / "model.safetensors"
        assert (run.milestones / file).read_bytes() == (kept.milestones / file).read_bytes()


def walk(run: RunFolder, took_s: float, is_retry: bool = False, **limit) -> list[tuple[int, int]]:
    """(words, step) of what the callback saves in ten steps of 10 words and a second each."""
    now = 0.0
    saved = []
    budget = Budget(clock=lambda: now, **limit)

    def save(model, words, step):
        nonlocal now
        now += took_s
        saved.append((words, step))
        (run.milestones / milestone_name(words)).mkdir(parents=True)

    budget.start()
    callback = MilestoneCallback(
        run, budget, Pace(None, 2, 5), WordRate(1, 1), [15, 20, 60, 100], save, is_retry
    )
    state = SimpleNamespace(global_step=0)
    callback.on_train_begin(None, state, None)
    for step in range(1, 11):
        now += 1.0
        state.global_step = step
        callback.on_step_end(None, state, SimpleNamespace(), model=None)
    return saved


def test_a_retry_writes_the_milestones_again(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    every = [(15, 2), (20, 2), (60, 6), (100, 10)]
    assert walk(run, 0.0, steps=10) == every
    assert walk(run, 0.0, steps=10) == []
    assert walk(run, 0.0, is_retry=True, steps=10) == every


def test_a_milestone_that_there_is_no_time_for_is_left_out(tmp_path):
    """The writings take 2 s each of 14 s; the last would begin at its 16th."""
    run = RunFolder.create(tmp_path / "run")
    assert walk(run, 2.0, seconds=14.0) == [(15, 2), (20, 2), (60, 6)]
    assert [event["message"] for event in run.read_log()] == [
        "chck_100 was not written: no time was left for it"
    ]


def test_a_full_disk_leaves_one_out_and_training_goes_on(text_folder, tmp_path, monkeypatch):
    from hf_genlm.model import GenLMForCausalLM

    save = GenLMForCausalLM.save_pretrained

    def full(self, folder, *args, **kwargs):
        if "chck_500" in str(folder):
            raise OSError(28, "No space left on device")
        save(self, folder, *args, **kwargs)

    monkeypatch.setattr(GenLMForCausalLM, "save_pretrained", full)
    run = train(recipe_of(text_folder, "training.milestone_words=[500, 1000]"), tmp_path / "run")
    assert [path.name for path in run.milestones.iterdir()] == ["chck_1K"]
    notes = [event["message"] for event in run.read_log() if event["event"] == "note"]
    assert any("chck_500 was not written: No space" in note for note in notes)


def test_a_stream_counts_the_words_of_its_beginning(text_folder, tmp_path):
    recipe = recipe_of(
        text_folder, "training.milestone_words=1000", "corpus.stream=true", "training.num_samples=0"
    )
    run = train(recipe, tmp_path / "run")
    (event,) = (event for event in run.read_log() if event["event"] == "milestone")
    recipe = load_recipe(run.recipe)
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    from hf_genlm.text.streaming import read_stream

    texts = []
    walked = read_stream(recipe.corpus).stream.walk()
    for parts in walked.texts():
        if parts is None or walked.passes:
            break
        texts.append("".join(parts))
    words = sum(len(text.split()) for text in texts)
    tokens = sum(len(tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in texts)
    per_step = recipe.training.batch_size * (recipe.training.max_seq_length - 1)
    assert event["step"] == next(s for s in range(1, 99) if s * per_step * words >= 1000 * tokens)


def test_the_recipe_of_the_challenge_runs(text_folder, tmp_path):
    out = tmp_path / "baby"
    recipe = str(ROOT / "recipes/babylm-strict-small.yaml")
    small = [
        "model.hidden_size=64",
        "model.num_hidden_layers=1",
        "training.max_seq_length=32",
        "training.batch_size=8",
    ]
    small += [
        "training.milestone_words=[babylm, 1000]",
        "training.num_validations=1",
        "training.num_samples=1",
    ]
    settings = [part for assignment in small for part in ("--set", assignment)]
    assert (
        main(["train", str(text_folder), "--recipe", recipe, "--steps", "20", "--out", str(out), *settings])
        == 0
    )
    resolved = load_recipe(out / "recipe.yaml")
    assert (resolved.training.max_epochs, resolved.training.minutes, resolved.training.steps) == (
        10,
        None,
        20,
    )
    assert resolved.model.decoder == "gated_linear"
    assert (out / "milestones/chck_1K/model.safetensors").is_file()
    assert (out / "model/plots/curves.png").is_file()
