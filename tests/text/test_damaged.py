"""Promise: what is damaged stops the reading with its place, or is left out and counted; never half read."""

import gzip
import io
import json
import random

import pytest
from support.corpora import COMPRESSORS, complaint, parquet_of, read, texts, write, zipped
from support.runs import SMALL

from hf_genlm.cli.main import main
from hf_genlm.config.recipe import CorpusRecipe, load_recipe
from hf_genlm.text.formats import texts_of
from hf_genlm.text.raw_files import MAX_PLACES, RawFile
from hf_genlm.text.store import TextStore

BAD_LINES = {
    b'{"text": "cut': "is not JSON",
    b"[1, 2]": "is list, not an object",
    b'"text"': "is str, not an object",
    b'{"body": "x"}': "has no field 'text', it has 'body'",
    b'{"text": 3}': "field 'text' is int, not text",
    b'{"text": ["a"]}': "field 'text' is list, not text",
    b'{"text": "a\\ud800b"}': "holds the lone surrogate U+D800",
    b'{"text": "caf\xe9"}': "is not utf-8: byte 0xe9",
    b'{"text": "\xed\xa0\x80"}': "is not utf-8: byte 0xed",
    b'{"text": "a\0b"}': "is binary",
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_damaged_record_stops_the_reading_with_line_reason_and_remedy(tmp_path, bad):
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n' + bad + b'\n{"text": "two"}\n')
    message = complaint(path)
    assert "a.jsonl, line 2" in message
    assert BAD_LINES[bad] in message
    assert "--set corpus.damaged=skip" in message


def test_damaged_records_are_left_out_and_counted(tmp_path):
    lines, wanted = [], []
    for i, bad in enumerate(BAD_LINES):
        lines += [json.dumps({"text": f"record {i}"}).encode(), bad]
        wanted.append(f"record {i}")
    content = b"\n".join(lines)
    for name, packed in (("a.jsonl", content), ("a.jsonl.gz", gzip.compress(content))):
        documents, report = read(write(tmp_path / name, packed), damaged="skip")
        assert texts(documents) == wanted
        assert report["damaged"]["records"] == len(BAD_LINES)
        assert report["damaged"]["files"] == report["damaged"]["more_places"] == 0
        places = report["damaged"]["places"]
        assert [place["line"] for place in places] == list(range(2, 2 * len(BAD_LINES) + 1, 2))
        assert {place["file"] for place in places} == {name}
        for place, reason in zip(places, BAD_LINES.values(), strict=True):
            assert place["reason"].startswith(reason)


def test_the_first_places_are_named_and_the_rest_counted(tmp_path):
    lines = ['{"text": "good"}'] + ["bad"] * 50
    _, report = read(write(tmp_path / "a.jsonl", "\n".join(lines)), damaged="skip")
    assert [place["line"] for place in report["damaged"]["places"]] == list(range(2, 2 + MAX_PLACES))
    assert report["damaged"]["records"] == 50
    assert report["damaged"]["more_places"] == 50 - MAX_PLACES


@pytest.mark.parametrize("chunk", [3, 7, 1 << 20])
def test_a_line_too_long_to_hold_is_one_damaged_record(chunk):
    class InParts(io.BytesIO):
        def read(self, n=-1):
            return super().read(min(n, chunk))

    good = json.dumps({"text": "x" * 28})
    assert len(good) == 40
    lines = [good, "y" * 41, good, "z" * 500, "", good, "w" * 99]
    file = RawFile("a.jsonl", "a.jsonl", InParts("\n".join(lines).encode()), max_line=40)
    damaged = []
    found = list(texts_of(file, CorpusRecipe(), damaged.append))
    assert ["".join(parts) for parts in found] == ["x" * 28] * 3
    assert [damage.place.number for damage in damaged] == [2, 4, 7]
    assert "line 2' has more than 40 characters" in str(damaged[0])


def damaged_files() -> dict[str, bytes]:
    """Files that begin well: name -> content."""
    noise = random.Random(0)
    records = [json.dumps({"text": f"lost {i} {noise.randbytes(40).hex()}"}) for i in range(900)]
    lines = "\n".join(records).encode()
    packed = {f"cut.jsonl{suffix}": pack(lines) for suffix, pack in COMPRESSORS.items()}
    files = {name: content[: len(content) * 2 // 3] for name, content in packed.items()}
    table = bytearray(parquet_of({"text": [f"lost {i} {i * i}" * 9 for i in range(4000)]}))
    files["cut.parquet"] = bytes(table[:-9])
    table[len(table) // 2 : len(table) // 2 + 400] = b"\xff" * 400  # a page in the middle
    files["hole.parquet"] = bytes(table)
    files["latin.txt"] = b"lost " * 500_000 + b"caf\xe9"  # more than one part is decoded before the fault
    files["binary.md"] = b"lost\0"
    files["other.parquet"] = parquet_of({"body": ["lost"]})
    files["several.txt.zip"] = zipped(("a.txt", b"lost"), ("b.txt", b"lost"))
    files["wide.jsonl.gz"] = gzip.compress('{"text": "lost"}\n'.encode("utf-16"))[:-4]
    return files


@pytest.mark.parametrize("in_memory", [1 << 26, 100])
def test_a_damaged_file_in_a_folder_is_left_out_whole(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(TextStore, "max_in_memory", in_memory)
    files = damaged_files()
    for name, content in files.items():
        write(tmp_path / "data" / name, content)
        write(tmp_path / "data" / f"{name}.good.txt", f"kept beside {name}")
    documents, report = read(tmp_path / "data", damaged="skip")
    assert texts(documents) == [f"kept beside {name}" for name in sorted(f"{n}.good.txt" for n in files)
                                for name in [name.removesuffix(".good.txt")]]  # fmt: skip
    assert report["damaged"]["files"] == len(files)
    assert report["damaged"]["records"] == 0
    assert {place["file"] for place in report["damaged"]["places"]} == {f"data/{name}" for name in files}
    assert {file["name"] for file in report["files"]} == {f"data/{name}.good.txt" for name in files}
    for name in files:  # each alone stops the reading otherwise
        (tmp_path / "one").mkdir(exist_ok=True)
        write(tmp_path / "one" / name, files[name])
        assert "--set corpus.damaged=skip" in complaint(tmp_path / "one")
        (tmp_path / "one" / name).unlink()


@pytest.mark.parametrize("name", damaged_files())
def test_a_damaged_file_that_was_named_is_an_error_all_the_same(tmp_path, name):
    path = write(tmp_path / name, damaged_files()[name])
    message = complaint(path, damaged="skip")
    assert name in message
    assert message == complaint(path)  # no remedy that would not help
    assert "corpus.damaged" not in message
    write(tmp_path / "good.txt", "good text, twice")
    assert read(tmp_path / "*", damaged="skip")[1]["damaged"]["files"] == 1  # a glob names no file


def test_records_of_a_file_that_is_left_out_are_not_counted_too(tmp_path):
    lines = b'{"text": "lost"}\nbad\n' * 50_000
    write(tmp_path / "data/a.jsonl.gz", gzip.compress(lines)[:-8])
    write(tmp_path / "data/b.txt", "kept")
    documents, report = read(tmp_path / "data", damaged="skip")
    assert texts(documents) == ["kept"]
    assert (report["damaged"]["records"], report["damaged"]["files"]) == (0, 1)


def test_nothing_but_damage_is_no_corpus(tmp_path):
    path = write(tmp_path / "data/a.jsonl", "bad\nworse\n")
    message = complaint(path, damaged="skip")
    assert "2 records are damaged" in message
    assert "is not JSON" in message
    assert "no text was found" in complaint(tmp_path / "data", damaged="skip")


def test_rows_that_are_not_utf8_are_told_apart(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    values = [b"one", b"caf\xe9", None, b"two"]
    buffers = pa.array(values, pa.binary()).buffers()
    column = pa.StringArray.from_buffers(4, buffers[1], buffers[2], buffers[0])
    sink = io.BytesIO()
    parquet.write_table(pa.table({"text": column}), sink)
    path = write(tmp_path / "a.parquet", sink.getvalue())
    assert "row 2" in complaint(path)
    documents, report = read(path, damaged="skip")
    assert texts(documents) == ["one", "two"]
    assert report["empty_skipped"] == 1
    assert report["damaged"]["places"] == [
        {"file": "a.parquet", "row": 2, "reason": "field 'text' is bytes, not text"}
    ]


def test_an_unknown_word_is_refused(tmp_path):
    assert "did you mean 'skip'" in complaint(write(tmp_path / "a.txt", "text"), damaged="skipp")


def test_settings_that_read_other_text_share_no_cached_tokens(tmp_path):
    """The keys hold the hash of the text that was read, whatever was left out of the files."""
    bad = write(tmp_path / "bad.jsonl", '{"text": "one one"}\nbad\n{"text": "two two"}\n')
    mended = write(tmp_path / "mended.jsonl", '{"text": "one one"}\n{"text": "two two"}\n')
    other = write(tmp_path / "other.jsonl", '{"text": "one one"}\n{"text": "bad"}\n{"text": "two two"}\n')
    left_out, whole, more = (read(path, damaged="skip")[1]["sha256"] for path in (bad, mended, other))
    assert left_out == whole != more
    assert read(mended)[1]["sha256"] == whole


def test_a_run_says_what_it_left_out(tmp_path, capsys):
    lines = [json.dumps({"text": f"{i} some words of a record, {i}"}) for i in range(60)]
    lines.insert(3, '{"text": 3}')
    write(tmp_path / "data/a.jsonl", "\n".join(lines))
    write(tmp_path / "data/b.txt.gz", b"no gzip")
    small = [word for assignment in SMALL[1:-2] for word in ("--set", assignment)]
    command = ["train", str(tmp_path / "data"), *small, "--steps", "2", "--set", "training.num_samples=0",
               "--set", "training.num_validations=0"]  # fmt: skip
    assert main([*command, "--out", str(tmp_path / "stopped")]) == 2
    assert "line 4" in capsys.readouterr().err
    assert not (tmp_path / "stopped").exists()
    assert main([*command, "--out", str(tmp_path / "run"), "--set", "corpus.damaged=skip"]) == 0
    told = "1 damaged record and 1 damaged file left out, the first: 'data/a.jsonl, line 4'"
    assert told in capsys.readouterr().err
    report = json.loads((tmp_path / "run/corpus.json").read_text())["damaged"]
    assert (report["records"], report["files"]) == (1, 1)
    assert load_recipe(tmp_path / "run/recipe.yaml").corpus.damaged == "skip"
    card = (tmp_path / "run/model/README.md").read_text()
    assert "Damaged and left out: records 1, files 1." in card
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert told in capsys.readouterr().err
