"""The cache: found by content, whole or made anew, never of another text, never a reason to fail."""

import io
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hf_genlm.config.recipe import TokenizerRecipe, load_recipe
from hf_genlm.errors import UserError
from hf_genlm.run_folder import RunFolder
from hf_genlm.text import tokenizer
from hf_genlm.text.cache import STALE_S, ArrayWriter, Cache, cache_folder, key_of
from hf_genlm.text.encoding import Encoder
from hf_genlm.training.corpus import prepare_corpus


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a text, the word {i % 7} again\n" for i in range(3000)))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_GENLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def work(monkeypatch) -> list[str]:
    """Names of what was computed instead of read from the cache."""
    done = []
    train_merges, encode = tokenizer.sample_evenly, Encoder.encode
    monkeypatch.setattr(
        tokenizer, "sample_evenly", lambda *args: done.append("merges") or train_merges(*args)
    )
    monkeypatch.setattr(Encoder, "encode", lambda *args: done.append("ids") or encode(*args))
    return done


def prepare(tmp_path, source: Path, *assignments: str):
    """(ids of both splits, notes in the log, corpus.json) of a run up to its training."""
    out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    run = RunFolder.create(out)
    recipe = load_recipe(None, ["training.max_seq_length=16", *assignments])
    recipe.corpus.sources = [str(source)]
    corpus = prepare_corpus(run, recipe)
    notes = [event["message"] for event in run.read_log() if event["event"] == "note"]
    notes = [note for note in notes if "stands in the training text too" not in note]
    ids = [[ids.tolist() for ids, _ in split] for split in (corpus.train, corpus.validation)]
    return ids, notes, run.corpus.read_text(), (run.tokenizer / "tokenizer.json").read_bytes()


ALL = ["merges", "ids", "ids"]


def test_a_second_run_computes_nothing_and_is_the_same(tmp_path, text, folder, work):
    first = prepare(tmp_path, text)
    assert work == ALL
    assert prepare(tmp_path, text) == first
    assert work == ALL
    copy = tmp_path / "text.txt.copy"
    copy.write_bytes(text.read_bytes())
    assert prepare(tmp_path, copy)[0] == first[0]
    assert work == ALL  # by its content, not its name


def test_a_changed_text_is_never_taken_for_the_old_one(tmp_path, text, folder, work):
    before = prepare(tmp_path, text)
    times = text.stat().st_atime_ns, text.stat().st_mtime_ns
    text.write_bytes(text.read_bytes().replace(b"line 1500", b"line 15x0"))  # the same length
    os.utime(text, ns=times)
    work.clear()
    after = prepare(tmp_path, text)
    assert "merges" in work
    assert "ids" in work
    assert after[0] != before[0]
    assert after[:1] == prepare(tmp_path, text, "corpus.cache=false")[:1]


@pytest.mark.parametrize(
    "assignment", ["tokenizer.vocab_size=300", "tokenizer.max_characters=20000", "corpus.split_seed=1"]
)
def test_other_settings_are_another_entry(tmp_path, text, folder, work, assignment):
    prepare(tmp_path, text)
    work.clear()
    found = prepare(tmp_path, text, assignment)
    assert "merges" in work
    assert found[0] == prepare(tmp_path, text, assignment, "corpus.cache=false")[0]


def test_a_given_tokenizer_is_part_of_the_key(tmp_path, text, folder, work):
    first = prepare(tmp_path, text)
    (given,) = tmp_path.glob("run*/tokenizer")
    small = prepare(tmp_path, text, "tokenizer.vocab_size=280")
    assert small[0] != first[0]
    work.clear()
    assert prepare(tmp_path, text, f"tokenizer.path={given}")[0] == first[0]
    assert work == []  # the ids of the same vocabulary, named by its folder


def test_it_can_be_turned_off(tmp_path, text, folder, work):
    prepare(tmp_path, text, "corpus.cache=false")
    prepare(tmp_path, text, "corpus.cache=false")
    assert work == 2 * ALL
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("damage", ["cut off", "empty", "a bit", "the table", "grown", "foreign"])
def test_a_damaged_entry_is_made_anew(tmp_path, text, folder, work, damage):
    first = prepare(tmp_path, text)
    for path in folder.iterdir():
        content = bytearray(path.read_bytes())
        if damage == "cut off":
            content = content[: len(content) * 2 // 3]
        elif damage == "empty":
            content = b""
        elif damage == "a bit":
            content[len(content) // 3] ^= 1
        elif damage == "the table":
            content[-60] ^= 1
        elif damage == "grown":
            content = content * 2
        else:
            content = os.urandom(500)
        path.write_bytes(content)
    work.clear()
    again = prepare(tmp_path, text)
    assert work == ALL
    assert (again[0], again[2]) == (first[0], first[2])
    assert len(again[1]) == 3
    assert all("damaged: it is made anew" in note for note in again[1])
    work.clear()
    assert prepare(tmp_path, text)[1] == []
    assert work == []


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, text, work, monkeypatch):
    blocker = tmp_path / "blocker"
    blocker.write_text("a file where a folder should be")
    monkeypatch.setenv("HF_GENLM_CACHE", str(blocker / "cache"))
    ids, notes, *_ = prepare(tmp_path, text)
    assert work == ALL
    assert len(notes) == 1
    assert all(word in notes[0] for word in ("cannot be written", "HF_GENLM_CACHE", "corpus.cache=false"))
    assert ids == prepare(tmp_path, text, "corpus.cache=false")[0]


def test_what_is_not_finished_leaves_nothing(folder):
    cache = Cache(folder)
    with ArrayWriter(cache, "a" * 64) as writer:
        writer.append("ids", np.arange(5))
        assert len(list(folder.iterdir())) == 1
        assert cache.load("a" * 64) is None
    assert list(folder.iterdir()) == []
    with ArrayWriter(cache, "a" * 64) as writer:
        writer.append("ids", np.arange(5))
        writer.append("ids", np.arange(3))
        writer.append("none", np.zeros(0, dtype=np.uint16))
        written = writer.finish()
    for file in (written, cache.load("a" * 64)):
        assert file.arrays["ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
        assert file.arrays["none"].dtype == np.uint16
        file.release()
        assert file.arrays["ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
        with pytest.raises(ValueError, match="read-only"):
            file.arrays["ids"][0] = 1
    if os.name == "posix":
        (path,) = folder.iterdir()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_full_disk_is_one_line(folder, monkeypatch):
    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Cache, "new_file", lambda *_: SimpleNamespace(file=Full(), discard=lambda: None))
    with (
        pytest.raises(UserError, match=r"disk is full.*HF_GENLM_CACHE") as caught,
        ArrayWriter(Cache(folder), "a") as writer,
    ):
        writer.append("ids", np.arange(5))
    assert "\n" not in str(caught.value)


def test_the_folder_is_bounded(folder):
    cache = Cache(folder, max_bytes=25_000)
    folder.mkdir()
    stale, fresh = folder / "x.part", folder / "y.part"
    for path, age in ((stale, 10 * STALE_S), (fresh, 10)):
        path.write_bytes(b"unfinished")
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    for i in range(4):
        with ArrayWriter(cache, str(i)) as writer:
            writer.append("ids", np.zeros(8_000, dtype=np.uint8))
            writer.finish()
        for path in folder.glob("*.arrays"):  # an hour passes
            os.utime(path, (path.stat().st_mtime - 3600,) * 2)
        cache.load("0")  # the one used last
    assert sorted(path.name for path in folder.iterdir()) == ["0.arrays", "2.arrays", "3.arrays", "y.part"]


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_GENLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/hf_genlm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/hf_genlm"
    monkeypatch.setenv("HF_GENLM_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


def test_keys_differ_where_anything_does():
    keys = [key_of(a=1, b=2), key_of(a=2, b=1), key_of(a=1), key_of(a="1", b=2), key_of(a=1, b=None)]
    assert len(set(keys)) == len(keys)
    assert key_of(b=2, a=1) == keys[0]


def test_a_vocabulary_that_cannot_be_filled_is_refused_again(tmp_path, text, folder, work):
    for _ in range(2):
        with pytest.raises(UserError, match="fills"):
            prepare(tmp_path, text, "tokenizer.vocab_size=9000")
    assert work == ["merges"] * 2


def test_the_tokenizer_comes_back_as_it_was(text, folder):
    from hf_genlm.text.store import Document

    documents = [Document(text.read_text(), "x")]
    made, found = (
        tokenizer.train_tokenizer(documents, TokenizerRecipe(), 10**5, Cache(folder), "0" * 64)
        for _ in range(2)
    )
    assert len(list(folder.iterdir())) == 1
    assert json.loads(found.backend_tokenizer.to_str()) == json.loads(made.backend_tokenizer.to_str())
    assert (found.eos_token, found.pad_token, found.chat_template) == (
        made.eos_token, made.pad_token, made.chat_template,
    )  # fmt: skip
    other = TokenizerRecipe(pattern="gpt2")
    tokenizer.train_tokenizer(documents, other, 10**5, Cache(folder), "0" * 64)
    assert len(list(folder.iterdir())) == 2


def test_an_entry_of_another_user_is_made_anew(tmp_path, monkeypatch):
    """Its checksum says that it is whole, not who wrote it."""
    notes: list[str] = []
    cache = Cache(tmp_path, notes.append)
    with ArrayWriter(cache, "key") as writer:
        writer.append("ids", np.arange(5))
        writer.finish()
    assert cache.load("key").arrays["ids"].tolist() == [0, 1, 2, 3, 4]
    if not hasattr(os, "geteuid"):
        return
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert cache.load("key") is None
    assert "another user wrote it" in notes[0]


@pytest.mark.parametrize(
    "table",
    [b"[]", b"[" * 100_000, b'{"a": 1}', b'{"a": {"dtype": "O", "length": 1, "offset": 0}}',
     b'{"a": {"dtype": "<i8", "length": 1000, "offset": 0}}', b'{"a": {"dtype": "evil", "length": 1}}',
     b'{"a": {"dtype": "<i8", "length": 1, "offset": 1%s}}' % (b"0" * 400)],
    ids=range(7),
)  # fmt: skip
def test_a_whole_entry_with_a_wrong_table_is_damaged(tmp_path, table):
    import hashlib
    import struct

    content = bytes(8) + table
    tail = struct.pack("<Q32s8s", len(table), hashlib.sha256(content).digest(), b"hfgenlm\n")
    (tmp_path / "key.arrays").write_bytes(content + tail)
    notes: list[str] = []
    assert Cache(tmp_path, notes.append).load("key") is None
    assert "damaged" in notes[0]
