"""Promise: text that its name, its encoding or its marks belie is read as what it is, or people are told."""

import gzip
import json

import pytest
from support.corpora import complaint, corpus_of, read, tar_of, texts, write, zipped

from hf_genlm.config.recipe import CorpusRecipe, Recipe
from hf_genlm.config.settle import Facts, settle_reading
from hf_genlm.errors import UserError
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.corpus import notes_on
from hf_genlm.text.raw_files import RawFile
from hf_genlm.text.sources import look_at
from hf_genlm.text.streaming import open_stream, read_stream
from hf_genlm.training.corpus import prepare_stream

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


ACCENTS = "naïve café \u2026 “quoted”"
MEMBERS = (
    ("a.txt", f"{STORIES[0]}<|endoftext|>\n{STORIES[1]}<|endoftext|>\n".encode()),
    ("b.txt", ACCENTS.encode("cp1252")),
    ("c.txt", ACCENTS.encode()),
    ("d.txt.gz", gzip.compress(ACCENTS.encode())),
    ("part-00000", RECORDS.encode()),
    ("e.json", b'{"a": 1}\n{"b": 2}\n'),  # of another kind
    ("f.md", b"the end"),
)
OF_MEMBERS = [*STORIES[:2], *[ACCENTS] * 3, *FROM_RECORDS, "the end"]


@pytest.mark.parametrize("name", ["data.zip", "data.tar", "data.tar.gz"])
def test_a_member_of_an_archive_is_looked_at_as_a_file_is(tmp_path, name):
    def pack(*members):
        return zipped(*members) if name.endswith("zip") else tar_of(*members, mode=f"w:{name[9:]}")

    path = write(tmp_path / name, pack(*MEMBERS))
    assert f"{name}/b.txt' is not utf-8" in complaint(path)
    found, notes = both(path, encoding="cp1252")
    assert found == OF_MEMBERS
    cut, as_utf8, as_records, n_others = notes
    assert cut.startswith(f"{name}/a.txt: cut into documents at lines of <|endoftext|>")
    assert as_utf8 == f"{name}/c.txt, {name}/d.txt.gz: read as utf-8, as its bytes say"
    assert as_records.startswith(f"{name}/part-00000: read as JSON lines")
    assert n_others.startswith("1 other file of the folders named, or inside archives")
    pointer = ("b.txt", POINTERS["git lfs pull"])
    path = write(tmp_path / name, pack(("a.txt", b"kept"), pointer, ("c.txt", b"kept too")))
    message = complaint(path)
    assert f"{name}/b.txt' is a pointer" in message
    assert "run git lfs pull; or leave out what is damaged with --set corpus.damaged=skip" in message
    documents, report = read(path, damaged="skip")
    assert texts(documents) == ["kept", "kept too"]
    assert report["damaged"]["places"][0]["file"] == f"{name}/b.txt"
    path = write(tmp_path / name, pack(pointer))
    assert "the first one is a pointer" in complaint(path, damaged="skip")
    if name == "data.zip":  # damage is met when it is looked at, and again when it is read
        damaged = pack(("a.txt", b"a" * 3000)).replace(b"aaaa", b"aaba", 1)
        assert "checksum" in complaint(write(tmp_path / name, damaged))


def test_the_one_member_of_an_archive_is_told_once(tmp_path):
    path = write(tmp_path / "a.zip", zipped(("records", RECORDS.encode())))
    found, (note,) = both(path)
    assert found == FROM_RECORDS
    assert note.startswith("a.zip/records: read as JSON lines")


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


def test_frequent_messages_are_told_and_can_be_kept_in_a_split_by_hash_and_in_a_stream(tmp_path):
    frequent = ["ok", "thanks", "yes", "no", "hi there", "see you", "lol"]
    given = [frequent[i % 7] for i in range(300)] + [f"message {i} about rivers" for i in range(100)]
    path = write(tmp_path / "chat.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in given))
    fields = {"validation_fraction": 0.3, "split_by_hash": True}
    corpus = corpus_of(path, **fields)
    n_copies = len(corpus.validation) - len(set(texts(corpus.validation)))
    assert n_copies > 40
    (note,) = notes_on(corpus.report)
    assert note.startswith(f"{n_copies} copies of other held-out texts are held out with them")
    assert "--set corpus.keep_held_out=true" in note
    kept = corpus_of(path, keep_held_out=True, **fields)
    assert sorted(texts(kept.validation)) == sorted(set(texts(corpus.validation)))
    assert len(kept.train) == len(corpus.train) + n_copies
    assert notes_on(kept.report) == []

    held = write(tmp_path / "held.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in frequent[:2]))
    for validation, n in (([], None), ([str(held)], 86)):
        stated = CorpusRecipe(
            sources=[str(path)], stream=True, validation=validation, validation_fraction=0.3
        )
        recipe = settle_reading(Recipe(corpus=stated), Facts())
        run = RunFolder.create(tmp_path / f"run{len(validation)}")
        prepare_stream(run, recipe)
        (note,) = [each["message"] for each in run.read_log() if "copies" in each.get("message", "")]
        assert n is None or note.startswith(
            f"{n} copies of held-out texts in a sample of the stream left out"
        )
        assert "--set corpus.keep_held_out=true" in note
        assert ("--validation" in note) == (not validation)
    with pytest.raises(UserError, match="a file of your own by --validation too"):
        read_stream(CorpusRecipe(sources=[str(path)], stream=True, keep_held_out=True))
    found = read_stream(
        CorpusRecipe(sources=[str(path)], validation=[str(held)], stream=True, keep_held_out=True)
    )
    walk = found.stream.walk().texts()
    assert ["".join(parts) for parts in iter(lambda: next(walk), None)] == given
