"""Promise: what no person wrote is not read as text, splits that names tell stay apart, and both are told."""

import json
import shutil
from pathlib import Path

import pytest
from support.corpora import complaint, corpus_of, read, texts, write

from hf_genlm.comparison.runs import ComparisonFolder
from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.corpus import notes_on
from hf_genlm.text.locating import locate
from hf_genlm.text.streaming import read_stream

STORIES = [f"story {i} of a river\n" * 5 for i in range(40)]


def stream_of(source, **fields):
    return read_stream(CorpusRecipe(sources=[str(source)], stream=True, **fields))


def streamed(found) -> set[str]:
    """Texts of the first epoch of a stream."""
    walk = found.stream.walk().texts()
    return {"".join(parts) for parts in iter(lambda: next(walk), None)}


@pytest.fixture
def project(tmp_path):
    """A folder of stories, as it lies on a disk after some work in it."""
    for i, story in enumerate(STORIES):
        write(tmp_path / f"project/texts/{i}.txt", story)
    return tmp_path / "project"


# what this package wrote

OUTPUT = {
    "a run that has just begun": ["recipe.yaml", "log.jsonl", ".lock"],
    "a finished run": ["recipe.yaml", "log.jsonl", "samples.md", "model/README.md", "milestones/1M/a.py"],
    "a comparison": ["compare.yaml", "log.jsonl", "report.md", "messages.txt", "runs/a-seed1/samples.md"],
    "a measured range": ["range.json", "report.md", "runs/a.json"],
    "a model": ["config.json", "model.safetensors", "README.md", "modeling_genlm.py"],
    "a model of another library": ["config.json", "pytorch_model.bin", "merges.txt"],
    "a large model": ["config.json", "model.safetensors.index.json", "README.md"],
    "an adapter": ["adapter_config.json", "README.md"],
    "a tokenizer": ["tokenizer.json", "tokenizer_config.json", "merges.txt"],
    "a demo": ["app.py", "space.json", "requirements.txt", "genlm/modeling_genlm.py"],
    "an export": ["model-f16.gguf", "README.md", "model_card.md"],
    "another export": ["model.onnx", "model.json", "README.md"],
}


@pytest.mark.parametrize("kind", OUTPUT)
def test_output_of_this_package_is_left_out_and_counted(project, monkeypatch, kind):
    for name in OUTPUT[kind]:
        write(project / "texts/out" / name, f"{name} is no story\n" * 3)
    monkeypatch.chdir(project)
    told = f"{len(OUTPUT[kind])} files of {{}}out/ left out: runs, comparisons and models are no text"
    assert "out/ left out" in complaint("*/*/*")
    for source in (".", "texts", "texts/*", "**/*", "*", project):
        documents, report = read(source)
        assert set(texts(documents)) == set(STORIES), source
        shown = "project/texts/" if source == project else "texts/"
        (note,) = notes_on(report)
        assert "left out: runs, comparisons and models are no text" in note
        if source != "**/*":  # which counts what it matches
            assert note.startswith(told.format(shown))
    found = stream_of(".")
    assert streamed(found) | set(texts(found.validation)) == set(STORIES)
    assert notes_on(found.report)[0].startswith(told.format("texts/"))
    assert "runs, comparisons and models are no text" in complaint("texts/out")
    assert len(corpus_of("texts/out", "texts/1.txt").report["files"]) == 1  # as the shell makes of texts/*
    with pytest.raises(UserError, match="runs, comparisons and models are no text"):
        stream_of("texts/out")
    named = next(name for name in OUTPUT[kind] if "." in name[1:])
    assert [file.name for file in locate(f"texts/out/{named}").files] == [f"texts/out/{named}"]


def test_the_marks_are_the_names_of_files_that_are_written():
    run, comparison = RunFolder("a"), ComparisonFolder("a")
    assert {run.recipe.name, run.log_file.name} == set(OUTPUT["a run that has just begun"][:2])
    assert {comparison.plan.name, comparison.log_file.name} == set(OUTPUT["a comparison"][:2])


@pytest.mark.slow
def test_a_run_in_the_folder_of_its_text_is_left_out(trained, project, monkeypatch):
    shutil.copytree(trained.path, project / "earlier")
    monkeypatch.chdir(project)
    documents, report = read(".")
    assert set(texts(documents)) == set(STORIES)
    n = sum(path.is_file() for path in (project / "earlier").rglob("*"))
    assert notes_on(report)[0].startswith(f"{n} files of earlier/ left out")


# what others wrote

INSTALLED = {
    "venv": ["pyvenv.cfg", "lib/python3/site-packages/a.py"],
    "env": ["pyvenv.cfg", "lib/a.py"],
    "conda": ["conda-meta/history", "lib/a.py"],
    "node_modules": ["a/README.md", "a/node_modules/b/README.md"],
    "lib/site-packages": ["a.py"],
    "target": ["CACHEDIR.TAG", "doc/a.md"],
    "own.egg-info": ["SOURCES.txt"],
    "src/__pycache__": ["a.py"],
    "__MACOSX": ["texts/._1.txt", "a.txt"],
}


def test_installed_packages_and_caches_are_left_out_and_counted(project, monkeypatch):
    for folder, names in INSTALLED.items():
        for name in names:
            write(project / folder / name, f"{folder} is no story\n")
    monkeypatch.chdir(project)
    n = sum(map(len, INSTALLED.values()))
    for source in (".", "*", project):
        documents, report = read(source)
        assert set(texts(documents)) == set(STORIES)
        (note,) = notes_on(report)
        assert note.startswith(f"{n} files of ")
        assert "left out: installed packages and caches; to read such a folder, name it" in note
    assert set(texts(read("**/*.txt")[0])) == set(STORIES)
    assert notes_on(stream_of(".").report)[0].startswith(f"{n} files of ")
    for folder, names in INSTALLED.items():  # named, it is read
        readable = {f"{folder}/{name}" for name in names if Path(name).suffix in (".py", ".md", ".txt")}
        readable = {name for name in readable if "/." not in name}
        assert {file.name for file in locate(folder).files} == readable
        assert {file.name for file in locate(f"{folder}/**").files} >= readable


def test_installed_packages_that_a_shell_names_beside_others_are_left_out(project, monkeypatch):
    for name in INSTALLED["venv"]:
        write(project / "venv" / name, "no story\n")
    write(project / "node_modules/a/README.md", "no story\n")
    monkeypatch.chdir(project)
    corpus = corpus_of("node_modules", "texts", "venv")  # as the shell makes of *
    assert set(texts(corpus.train)) | set(texts(corpus.validation)) == set(STORIES)
    (note,) = notes_on(corpus.report)
    assert note.startswith("3 files of venv/, node_modules/ left out: installed packages and caches")
    assert "name it alone, or as 'FOLDER/**'" in note
    found = read_stream(CorpusRecipe(sources=["node_modules", "texts", "venv"], stream=True))
    assert notes_on(found.report)[0] == note
    for sources in (
        ["venv"],
        ["texts", "venv/**"],
        ["texts", "venv/lib/python3/site-packages"],
    ):
        assert "no story\n" in texts(read(*sources)[0]), sources


def test_a_folder_of_nothing_else_is_refused_with_its_reason(tmp_path):
    write(tmp_path / "data/node_modules/a/README.md", "text")
    message = complaint(tmp_path / "data")
    assert "there is no text to read" in message
    assert "1 file of data/node_modules/ left out" in message


# splits by name

NAMED = {
    "words": ["{}.txt", "train", "valid", "test"],
    "shards": ["corpus/{}-00000-of-00002.jsonl", "train", "validation", "test"],
    "folders": ["{}/a.txt", "train", "dev", "test"],
    "within a name": ["ptb.{}.txt.gz", "train", "val", "test"],
    "no validation": ["poems_{}.md", "training", "test"],
    "capitals": ["Tiny-GPT4-{}.txt", "Train", "Valid"],
}


@pytest.mark.parametrize("kind", NAMED)
def test_splits_that_names_tell_stay_apart(tmp_path, kind):
    import gzip

    pattern, train, *others = NAMED[kind]
    for split in (train, *others):
        content = "".join(f"{split} line {i}\n" for i in range(300))
        if ".jsonl" in pattern:
            content = "".join(json.dumps({"text": line}) + "\n" for line in content.splitlines())
        packed = gzip.compress(content.encode()) if pattern.endswith(".gz") else content
        write(tmp_path / "data" / pattern.format(split), packed)
    write(tmp_path / "data/notes.md", "some notes")
    for found in (corpus_of(tmp_path / "data"), stream_of(tmp_path / "data")):
        trained = streamed(found) if "stream" in found.report else set(texts(found.train))
        assert {text.split(" ")[0] for text in trained} == {train, "some"}
        assert {text.split(" ")[0] for text in texts(found.validation)} == {others[0]}
        assert found.report["split"]["method"] == "names"
        (note,) = notes_on(found.report)
        assert note.startswith(f"held out by name: data/{pattern.format(others[0])}")
        assert ("not read" in note) == (len(others) == 2)
        assert "--set corpus.split_by_hash=true" in note


def test_splits_by_name_give_way_to_what_is_stated(tmp_path):
    for split in ("train", "valid", "test"):
        for i in range(30):
            write(tmp_path / f"data/{split}/{i}.txt", f"{split} story {i} {i * i}")
    by_hash = corpus_of(tmp_path / "data", split_by_hash=True)
    assert by_hash.report["split"]["method"] == "hash"
    assert len(by_hash.train) + len(by_hash.validation) == 90
    (note,) = notes_on(by_hash.report)
    assert "trained on with data/train/" in note
    held = write(tmp_path / "held.txt", "held out")
    given = corpus_of(tmp_path / "data", validation=[str(held)])
    assert len(given.train) == 90
    (note,) = notes_on(given.report)
    assert note.startswith("data/test/0.txt")
    named = corpus_of(*(tmp_path / f"data/{split}" for split in ("train", "valid", "test")))
    assert named.report["split"]["method"] == "document"
    assert "name it by --validation" in notes_on(named.report)[0]
    one_each = corpus_of(
        *(write(tmp_path / f"{name}.txt", f"{name} of rivers\n" * 99) for name in ("train", "test"))
    )
    assert notes_on(one_each.report)[0].startswith("test.txt: trained on with train.txt")
    assert len(read(tmp_path / "data")[0]) == 90  # no split is asked for


@pytest.mark.parametrize(
    "names", [["train.py", "test.py", "eval.py"], ["a_test.txt", "b_train.txt"], ["test/a.txt", "a.txt"]]
)
def test_other_names_are_split_at_random(tmp_path, names):
    for name in names:
        write(tmp_path / "data" / name, "".join(f"{name} {i}\n" for i in range(300)))
    corpus = corpus_of(tmp_path / "data")
    assert corpus.report["split"]["method"] == "block"
    assert not [note for note in notes_on(corpus.report) if "stands in the training" not in note]
