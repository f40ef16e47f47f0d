"""Promise: text that its name, its encoding or its marks belie is read as what it is, or people are told."""

import gzip
import json

import pytest
from support.corpora import complaint, corpus_of, read, texts, write

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.text.corpus import notes_on
from hf_genlm.text.raw_files import RawFile
from hf_genlm.text.sources import look_at
from hf_genlm.text.streaming import open_stream, read_stream

RECORDS = "".join(json.dumps({"text": f"record {i} of a river", "id": i}) + "\n" for i in range(3))
FROM_RECORDS = [f"record {i} of a river" for i in range(3)]
HTML = "\n <!DOCTYPE html>\n<html><p>a river</p></html>\n"


def both(path, **fields) -> tuple[list[str], list[str]]:
    """(texts, notes) of a file, which is read the same way in memory and as a stream."""
    documents, report = read(path, **fields)
    walk = open_stream(CorpusRecipe(sources=[str(path)], **fields)).walk().texts()
    assert ["".join(parts) for parts in iter(lambda: next(walk), None)] == texts(documents)
    held = write(path.parent / "held/held.txt", "held out")
    streamed = read_stream(CorpusRecipe(sources=[str(path)], validation=[str(held)], stream=True, **fields))
    notes = notes_on(report)
    assert set(notes) >= set(streamed.report["notices"]) >= {note for note in notes if path.name in note}
    return texts(documents), notes


@pytest.mark.parametrize(
    "name", ["records", "records.json", "records.data", "v1.0", "records.json.gz", "a.bz2"]
)
@pytest.mark.parametrize("start", ["", "\n", "\ufeff"])
def test_json_lines_of_any_name_are_records(tmp_path, name, start):
    import bz2

    pack = {".gz": gzip.compress, "bz2": bz2.compress}.get(name[-3:], bytes)
    found, notes = both(write(tmp_path / name, pack((start + RECORDS).encode())))
    assert found == FROM_RECORDS
    assert notes == [
        f"{name}: read as JSON lines, a document of each; to read them as text, rename it to .txt"
    ]


def test_json_lines_by_suffix(tmp_path):
    for name in ("a.ndjson", "b.ndjson.gz", "c.jsonl"):
        write(tmp_path / "data" / name, gzip.compress(RECORDS.encode()) if name.endswith("gz") else RECORDS)
    write(tmp_path / "data" / "d.txt", "plain")
    documents, report = read(tmp_path / "data")
    assert texts(documents) == [*FROM_RECORDS * 3, "plain"], "beside text too"
    assert notes_on(report) == []
    found, (note,) = both(write(tmp_path / "a.txt", RECORDS))
    assert found == [RECORDS]
    assert note == "a.txt: JSON lines, read as text; to read a document of each, rename it to .jsonl"


@pytest.mark.parametrize(
    "content",
    ["{a set of words}\n{another}\n", '{"a": 1}', "[1]\n[2]\n", '{"a":\n1}\n', "\n\n", "{" * 100_000],
)
def test_other_text_of_no_suffix_is_text(tmp_path, content):
    path = write(tmp_path / "plain", content)
    assert both(path) == ([content], [])


@pytest.mark.parametrize(
    "name", ["a.html.gz", "a.html", "page", "a.txt", "a.md.gz", "a.json.gz", "a.xml.bz2"]
)
def test_markup_is_told_under_any_name(tmp_path, name):
    import bz2

    content = '[{"text": "a"}]' if "json" in name else HTML
    pack = {".gz": gzip.compress, "bz2": bz2.compress}.get(name[-3:], bytes)
    found, (note,) = both(write(tmp_path / name, pack(content.encode())))
    assert found == [content]
    assert note.startswith(f"{name}: read as it stands, with the marks of its format")


STORIES = ["Once upon a time\n\nthere was a river.\n", "  Two cats sat.\nThey slept.\n", "The end."]


@pytest.mark.parametrize("mark", ["<|endoftext|>", "</s>", "[EOS]"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separator_lines_part_documents(tmp_path, mark, end):
    content = f"{mark}\n\n".join(["", *STORIES]).replace("\n", end) + f"{end}{mark}{end}"
    path = write(tmp_path / "TinyStories.txt", content)
    wanted = [story.replace("\n", end) for story in STORIES[:2]] + [f"The end.{end}"]
    found, (note,) = both(path)
    assert found == wanted
    assert note == (
        f"TinyStories.txt: cut into documents at lines of {mark}; to keep it whole, "
        "--set corpus.documents=whole"
    )
    assert both(path, documents="whole")[0] == [content]
    assert mark not in both(path, documents="lines")[0]


def test_a_mark_within_lines_is_text_and_is_told(tmp_path):
    content = 'End a story with "<|endoftext|>", as GPT-2 does.\n'
    found, (note,) = both(write(tmp_path / "a.txt", content))
    assert found == [content]
    assert note.startswith("a.txt: <|endoftext|> in it is read as text")
    assert both(write(tmp_path / "a.py", content)) == ([content], [])


@pytest.mark.parametrize("size", [1, 2, 7, 300, 1 << 20])
def test_documents_are_parted_wherever_the_parts_end(size):
    """A naive twin: the lines of the whole text."""
    import io

    from hf_genlm.text.formats import texts_of

    mark = "<|endoftext|>"
    lines = [
        "a",
        mark,
        "",
        "b" * 700,
        f" {mark}\t",
        f"{mark} no",
        f"no {mark}",
        "x" * 299,
        mark,
        mark,
        "c",
        mark,
    ]
    content = "\n".join(lines)
    wanted, begun = [], []
    for line in [*lines, mark]:
        if line.strip() != mark:
            begun.append(line)
            continue
        text = "".join(f"{line}\n" for line in begun)
        wanted += [text.lstrip("\n")] if text.strip() else []
        begun = []

    class InParts(io.BytesIO):
        def read(self, n=-1):
            return super().read(min(n, size))

    file, recipe, _ = look_at(RawFile("a.txt", "a.txt", io.BytesIO(content.encode())), CorpusRecipe())
    assert file.separator == mark
    file.stream.close()
    parted = RawFile("a.txt", "a.txt", InParts(content.encode()), separator=mark)
    assert ["".join(parts) for parts in texts_of(parted, recipe)] == wanted


POINTERS = {
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 12345\n",
    "git annex get": b"/annex/objects/SHA256E-s42--a.txt\n",
}


@pytest.mark.parametrize("command", POINTERS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a", "a.txt.gz"])
def test_a_pointer_of_git_is_not_the_text(tmp_path, name, command):
    path = write(tmp_path / "data" / name, POINTERS[command])
    if name.endswith(".gz"):
        assert "gzip" in complaint(path)
        return
    assert f"run {command}" in complaint(path)
    if name == "a":
        return
    write(tmp_path / "data/b.txt", "kept")
    assert "--set corpus.damaged=skip" in complaint(tmp_path / "data")
    documents, report = read(tmp_path / "data", damaged="skip")
    assert texts(documents) == ["kept"]
    assert "git has not fetched" in notes_on(report)[0]


def test_each_file_has_its_own_encoding(tmp_path):
    plain, accents = "plain", "naïve café \u2026 “quoted”"
    contents = {
        "a.txt": plain.encode(),
        "b.txt": accents.encode("cp1252"),
        "c.txt": accents.encode(),
        "d.txt.gz": gzip.compress(accents.encode()),
        "e.jsonl": json.dumps({"text": accents}, ensure_ascii=False).encode(),
        "f.jsonl": json.dumps({"text": accents}, ensure_ascii=False).encode("cp1252"),
        "g.txt": accents.encode("utf-16"),
    }
    for name, content in contents.items():
        write(tmp_path / "data" / name, content)
    message = complaint(tmp_path / "data")
    assert all(word in message for word in ("data/b.txt", "--set corpus.encoding=cp1252", "UTF-8 stay so"))
    documents, report = read(tmp_path / "data", encoding="cp1252")
    assert texts(documents) == [plain] + [accents] * 6
    assert notes_on(report) == [
        "data/c.txt, data/d.txt.gz, data/e.jsonl: read as utf-8, as its bytes say",
        "data/g.txt: read as utf-16, as its bytes say",
    ]
    assert both(tmp_path / "data/c.txt", encoding="cp1252")[0] == [accents]
    for encoding in ("gbk", "shift_jis", "koi8-r", "utf-16", "iso2022_jp"):
        text = "Война и мир" if encoding == "koi8-r" else "日本の川 river"
        assert both(write(tmp_path / "other.txt", text.encode(encoding)), encoding=encoding)[0] == [text]


def test_frequent_messages_that_are_held_out_are_told_and_can_be_kept(tmp_path):
    """Seven messages are three quarters of the records; all of them are held out by some seed."""
    frequent = ["ok", "thanks", "yes", "no", "hi there", "see you", "lol"]
    texts_given = [frequent[i % 7] for i in range(300)] + [f"message {i} about rivers" for i in range(100)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts_given)
    path = write(tmp_path / "chat.jsonl", lines)
    corpus = corpus_of(path, validation_fraction=0.3)
    lost = set(frequent) - set(texts(corpus.train))
    n_lost = corpus.report["duplicates_removed"]
    assert lost
    (note,) = notes_on(corpus.report)
    assert note.startswith(f"{n_lost} training documents left out that stand in the validation split too")
    assert f"(copies of {len(lost)} texts)" in note
    assert "--set corpus.keep_held_out=true" in note
    kept = corpus_of(path, validation_fraction=0.3, keep_held_out=True)
    assert lost <= set(texts(kept.train))
    assert texts(kept.validation) == texts(corpus.validation)
    assert len(kept.train) == len(corpus.train) + n_lost
    assert notes_on(kept.report) == []
    with pytest.raises(UserError, match="not for a stream"):
        read_stream(CorpusRecipe(sources=[str(path)], stream=True, keep_held_out=True))
