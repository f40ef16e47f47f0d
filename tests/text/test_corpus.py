"""The corpus: text is read exactly, split without overlap and accounted for; bad input is explained."""

import gzip
import hashlib
import json
import os
import random
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpora import COMPRESSORS, complaint, corpus_of, parquet_of, read, texts, write, zipped

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.text.corpus import Document, notes_on, read_corpus, split_documents
from hf_genlm.text.store import TextStore, as_documents, cut_blocks


def many_texts(n: int) -> list[str]:
    generator = random.Random(n)
    return [f"document {i}\n" + "word " * generator.randrange(5, 60) for i in range(n)]


# reading


def test_text_is_read_exactly(tmp_path):
    text = "\ufeff  first\r\nsecond\rthird\n\n\x0c\u2028 é e\u0301 \t\n  "
    documents, _ = read(write(tmp_path / "a.txt", text))
    assert texts(documents) == [text]
    assert documents[0].n_bytes == len(text.encode("utf-8"))


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("kind", [".txt", ".md", ".py", ".jsonl", ".parquet"])
def test_every_format_in_every_compression(tmp_path, kind, suffix):
    wanted = ["one\r\n", "zwei ü"]
    if kind == ".jsonl":
        content = "".join(json.dumps({"text": text}) + "\n" for text in wanted).encode()
    elif kind == ".parquet":
        content = parquet_of({"text": wanted})
    else:
        wanted = ["one\r\nzwei ü"]
        content = wanted[0].encode()
    plain = write(tmp_path / f"plain{kind}", content)
    packed = write(tmp_path / f"packed{kind}{suffix}", COMPRESSORS[suffix](content))
    assert texts(read(plain)[0]) == wanted
    documents, report = read(packed)
    assert texts(documents) == wanted
    assert report["files"][0]["bytes"] == packed.stat().st_size
    assert not (tmp_path.parent.parent / "outside.txt").exists()


def test_zstandard_with_several_frames_and_cut_off(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    frames = [
        zstandard.ZstdCompressor().compress(part) for part in (b"first frame\n", b"second frame\n" * 50)
    ]
    documents, _ = read(write(tmp_path / "a.txt.zst", b"".join(frames)))
    assert texts(documents) == ["first frame\n" + "second frame\n" * 50]
    assert "zstd" in complaint(write(tmp_path / "cut.txt.zst", b"".join(frames)[:-5]))


def test_zip_without_inner_suffix_goes_by_its_member(tmp_path):
    content = zipped(("deep/records.jsonl", b'{"text": "a"}\n{"text": "b"}\n'))
    assert texts(read(write(tmp_path / "records.zip", content))[0]) == ["a", "b"]


def test_folder_is_read_recursively_in_name_order(tmp_path):
    root = tmp_path / "data"
    for name in ("b.txt", "a/z.md", "a/b/c.py", ".hidden/x.txt", ".x.txt", "picture.png", "empty.txt"):
        write(root / name, "" if name == "empty.txt" else name)
    documents, report = read(root)
    assert [d.source for d in documents] == ["data/a/b/c.py", "data/a/z.md", "data/b.txt"]
    assert texts(documents) == ["a/b/c.py", "a/z.md", "b.txt"]
    assert report["files_skipped"] == 1
    assert notes_on(report)[0].startswith("1 other file of the folders named")
    assert report["description"] == "4 files: data"
    assert read(root / "b.txt")[1]["description"] == "1 file: b.txt"
    assert report["empty_skipped"] == 1
    assert str(tmp_path) not in json.dumps([report["files"], report["description"]])


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    for i in range(30):
        write(tmp_path / "data" / f"{i}.txt", f"text {i}\n")
    before = corpus_of(tmp_path / "data")
    walk = os.walk
    monkeypatch.setattr(
        os, "walk", lambda *a, **k: ((p, d, sorted(f, key=hash, reverse=True)) for p, d, f in walk(*a, **k))
    )
    assert corpus_of(tmp_path / "data").report == before.report


def test_globs_other_suffixes_and_repeats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "logs/a.log", "alpha")
    write(tmp_path / "logs/b.log", "beta")
    documents, _ = read("logs/*.log", "logs/a.log", tmp_path / "logs/b.log")
    assert [(d.source, d.text) for d in documents] == [("logs/a.log", "alpha"), ("logs/b.log", "beta")]


def test_a_file_of_marks_is_read_as_it_stands_and_that_is_told(tmp_path):
    documents, report = read(write(tmp_path / "marks.xml", "<a>text</a>"), write(tmp_path / "a.log", "b"))
    assert texts(documents) == ["<a>text</a>", "b"]
    (note,) = notes_on(report)
    assert note.startswith("marks.xml: read as it stands, with the marks of its format")


def test_records_without_text_are_skipped_and_counted(tmp_path):
    lines = ['{"body": "a"}', "", '{"body": ""}', '{"body": null, "id": 3}', '{"id": 4, "body": "b\u2028c"}']
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    documents, report = read(path, text_column="body")
    assert texts(documents) == ["a", "b\u2028c"]
    assert report["empty_skipped"] == 2
    assert report["files"][0]["documents"] == 2


def test_other_encodings(tmp_path):
    text = "naïve café\r\n"
    assert texts(read(write(tmp_path / "l.txt", text.encode("latin-1")), encoding="latin-1")[0]) == [text]
    assert texts(read(write(tmp_path / "u.txt", text.encode("utf-16")), encoding="utf-16")[0]) == [text]


# the Hub


@pytest.fixture
def hub(monkeypatch):
    """A Hub that knows one data set."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    asked = []

    def load(name, config=None):
        asked.append((name, config))
        return datasets.DatasetDict(
            {
                "train": datasets.Dataset.from_dict({"text": ["a", "", "b"], "id": [1, 2, 3]}),
                "test": datasets.Dataset.from_dict({"text": ["c"], "id": [4]}),
            }
        )

    def info(self, name, **_):
        if name != "owner/poems":
            raise ConnectionError("Hub not reachable\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return asked


def test_hub_dataset(hub):
    corpus = read_corpus(CorpusRecipe(sources=["owner/poems:de"], validation=["owner/poems"]))
    assert texts(corpus.train) == ["a", "b"]
    assert texts(corpus.validation) == ["c"]
    assert corpus.report["empty_skipped"] == 1
    assert hub == [("owner/poems", "de"), ("owner/poems", None)]
    assert "text" in complaint("owner/poems", text_column="body")


def test_hub_out_of_reach_is_one_line(hub):
    message = complaint("owner/missing")
    assert "owner/missing" in message
    assert "not reachable at all" in message
    assert hub == []


# bad input


def test_bad_sources(tmp_path, monkeypatch):
    assert "owner/name" in complaint(tmp_path / "missing.txt")
    for word in ("", "x" * 5000, "a\0b", "~nobody-of-this-name/a.txt", "data/"):
        assert "owner/name" in complaint(word)
    assert "owner/name" in complaint("corpus/missing.jsonl")
    assert "pattern" in complaint(tmp_path / "*.txt")
    write(tmp_path / "pictures/a.png", b"\x89PNG")
    assert "no readable file" in complaint(tmp_path / "pictures")
    write(tmp_path / "empties/a.txt", "")
    assert "no text" in complaint(tmp_path / "empties")
    assert "is empty" in complaint(write(tmp_path / "empty.txt", ""))
    assert "is empty" in complaint(write(tmp_path / "hollow.jsonl", '{"text": ""}\n'))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")
        assert "neither a file" in complaint(tmp_path / "pipe.txt")
    path = write(tmp_path / "secret.txt", "text")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert "Permission denied" in complaint(path)


def test_bad_text(tmp_path):
    binary = complaint(write(tmp_path / "binary.txt", b"text\0more"))
    assert "binary" in binary
    wrong = complaint(write(tmp_path / "latin.txt", b"abc\xe9 d"))
    assert all(word in wrong for word in ("0xe9", "offset 3", "latin.txt", "--set corpus.encoding=cp1252"))
    for content, kind in ((b"%PDF-1.7\n", "a PDF"), (zipped(("a.xml", b"a")), "docx"), (b"{\\rtf1 a", "RTF")):
        assert f"{kind}" in complaint(write(tmp_path / "letter.doc", content))
        assert "save its text as .txt" in complaint(tmp_path / "letter.doc")
    for encoding in ("no-such-thing", "hex", "utf\0-8", "", "undefined"):
        assert "corpus.encoding" in complaint(tmp_path / "latin.txt", encoding=encoding)
    surrogate = write(tmp_path / "half.jsonl", '{"text": "a\\ud800"}\n')
    assert "U+D800" in complaint(surrogate)


def test_bad_records(tmp_path):
    good = '{"text": "a"}\n'
    message = complaint(write(tmp_path / "a.jsonl", good + "{oops\n"))
    assert "line 2" in message
    assert "JSON" in message
    assert "line 2" in complaint(write(tmp_path / "b.jsonl", good + "[1]\n"))
    message = complaint(write(tmp_path / "c.jsonl", good + '{"body": "x", "id": 1}\n'))
    assert all(word in message for word in ("line 2", "'body'", "'id'", "--set corpus.text_column=body"))
    assert "int" in complaint(write(tmp_path / "d.jsonl", '{"text": 3}\n'))
    assert "line 1" in complaint(write(tmp_path / "g.jsonl", '{"text": ' + "9" * 5000 + "}\n"))
    assert "line 1" in complaint(write(tmp_path / "h.jsonl", "[" * 100_000))
    assert "'body'" in complaint(write(tmp_path / "e.parquet", parquet_of({"body": ["a"]})))
    assert "int" in complaint(write(tmp_path / "f.parquet", parquet_of({"text": [1, 2]})))


def test_damaged_archives(tmp_path):
    whole = parquet_of({"text": ["alpha", "beta"] * 100})
    for content in (
        whole[:-20],
        whole[: len(whole) // 2],
        b"PAR1 no parquet",
        whole[:8] + b"\xff" * 40 + whole[48:],
    ):
        assert "parquet" in complaint(write(tmp_path / "a.parquet", content))
    text = "some text\n" * 1000
    for suffix, compress in COMPRESSORS.items():
        content = compress(text.encode())
        kind = suffix[1:]
        assert kind[:2] in complaint(write(tmp_path / f"cut.txt{suffix}", content[: len(content) // 2]))
        assert kind[:2] in complaint(write(tmp_path / f"other.txt{suffix}", b"plain text, misnamed"))
    flipped = bytearray(gzip.compress(text.encode()))
    flipped[-6] ^= 0xFF
    assert "gzip" in complaint(write(tmp_path / "flipped.txt.gz", bytes(flipped)))
    several = write(tmp_path / "several.txt.zip", zipped(("a.txt", b"a"), ("b.txt", b"b")))
    assert "2 members" in complaint(several)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_bad_fraction(tmp_path, fraction):
    path = write(tmp_path / "a.txt", "text\n" * 100)
    assert "validation_fraction" in complaint(path, validation_fraction=fraction)


# the split


@pytest.mark.parametrize("seed", range(12))
def test_documents_are_split_without_overlap(seed):
    documents = [Document(text, "x") for text in many_texts(200)]
    split = split_documents(documents, 0.1, seed)
    train, validation, method = split.train, split.validation, split.method
    assert method == "document"
    assert not set(texts(train)) & set(texts(validation))
    assert sorted(texts(train) + texts(validation)) == sorted(texts(documents))
    share = sum(d.n_bytes for d in validation) / sum(d.n_bytes for d in documents)
    assert 0.08 < share < 0.12


@pytest.mark.parametrize("seed", range(12))
def test_one_long_text_is_split_in_blocks_at_line_ends(seed):
    lines = [f"line number {i}\n" for i in range(5000)]
    split = split_documents([Document("".join(lines), "x")], 0.05, seed)
    train, validation, method = split.train, split.validation, split.method
    assert method == "block"
    sides = [
        [line for d in side for line in d.text.splitlines(keepends=True)] for side in (train, validation)
    ]
    assert not set(sides[0]) & set(sides[1])
    assert sorted(sides[0] + sides[1]) == sorted(lines)
    assert 0.03 < len(sides[1]) / len(lines) < 0.07
    assert len(train) <= len(validation) + 1  # neighbours are joined


def test_a_dominant_document_is_split_inside():
    documents = [Document(text, "small") for text in many_texts(40)]
    documents.append(Document("".join(f"long {i}\n" for i in range(20000)), "long"))
    split = split_documents(documents, 0.05, 0)
    train, validation, method = split.train, split.validation, split.method
    assert method == "block"
    assert {"long"} <= {d.source for d in validation} & {d.source for d in train}


def test_other_seeds_give_other_splits():
    documents = [Document(text, "x") for text in many_texts(200)]
    assert len({tuple(texts(split_documents(documents, 0.1, seed).validation)) for seed in range(5)}) == 5


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab\n\r é", min_size=1, max_size=60), min_size=1, max_size=25),
    st.floats(0.001, 0.999),
    st.integers(-3, 50),
)
def test_any_split_keeps_every_character_and_both_sides(parts, fraction, seed):
    documents = [Document(part, str(i)) for i, part in enumerate(parts)]
    if sum(map(len, parts)) < 2:
        with pytest.raises(UserError):
            split_documents(documents, fraction, seed)
        return
    split = split_documents(documents, fraction, seed)
    train, validation = split.train, split.validation
    assert train
    assert validation
    assert all(texts([*train, *validation]))
    characters = sorted("".join(parts))
    assert sorted("".join(texts(train) + texts(validation))) == characters


def naive_cut(text: str, length: int, reach: int) -> list[str]:
    """The naive twin: blocks of a text in memory."""
    blocks = []
    start = 0
    while len(text) - start > 1.5 * length:
        newline = text.find("\n", start + length - 1, start + length + reach)
        end = newline + 1 if newline >= 0 else start + length
        blocks.append(text[start:end])
        start = end
    return [*blocks, text[start:]] if start < len(text) else blocks


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("aé日😀\n", max_size=80), min_size=1, max_size=3),
    st.integers(1, 20),
    st.integers(0, 20),
    st.integers(4, 9),
)
def test_blocks_are_cut_in_the_file_as_in_memory(texts, length, reach, chunk):
    # small reads, so that every border of a read is met
    documents = as_documents([Document(text, "x") for text in texts], TextStore(chunk_bytes=chunk))
    for i, text in enumerate(texts):
        blocks = list(cut_blocks(documents, i, length, reach))
        found = [documents.store.read(block.start, block.stop).decode() for block in blocks]
        assert found == naive_cut(text, length, reach)
        assert [block.characters for block in blocks] == list(map(len, found))


def test_text_without_line_ends_is_split_too():
    text = "".join(chr(0x4E00 + i % 5000) for i in range(30000))
    split = split_documents([Document(text, "x")], 0.05, 3)
    train, validation = split.train, split.validation
    assert 0.03 < sum(len(d.text) for d in validation) / len(text) < 0.07
    assert sum(len(d.text) for d in [*train, *validation]) == len(text)


def test_given_validation_is_taken_as_it_is(tmp_path):
    train = write(tmp_path / "train.txt", "training text\n")
    held = write(tmp_path / "held.txt", "held out text\n")
    corpus = corpus_of(train, validation=[str(held)])
    assert texts(corpus.train) == ["training text\n"]
    assert texts(corpus.validation) == ["held out text\n"]
    assert corpus.report["split"]["method"] == "given"
    assert "all 1 training documents" in complaint(train, validation=[str(train)])


def test_duplicates_between_splits_leave_training(tmp_path):
    records = [f"record {i % 60}" for i in range(120)]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in records))
    corpus = corpus_of(path, validation_fraction=0.1)
    assert not set(texts(corpus.train)) & set(texts(corpus.validation))
    removed = corpus.report["duplicates_removed"]
    assert removed > 0
    assert notes_on(corpus.report) == [
        f"{removed} training documents left out that stand in the validation split too (copies of {removed} "
        "texts): to train on them, as on frequent short messages, --set corpus.keep_held_out=true"
    ]
    assert len(corpus.train) + len(corpus.validation) + removed == 120


# the report


def test_report_counts_and_hashes(tmp_path):
    for i, text in enumerate(many_texts(40)):
        write(tmp_path / "data" / f"{i:02}.txt", text + "é")
    source = str(tmp_path / "data")
    corpus = read_corpus(CorpusRecipe(sources=[source]))
    report = json.loads(json.dumps(corpus.report))
    assert report["sources"] == [source]
    assert report["split"] == {"method": "document", "seed": 0, "fraction": 0.05}
    assert report["encoding"] == "utf-8"
    for split, documents in (("train", corpus.train), ("validation", corpus.validation)):
        joined = b"".join(
            len(d.text.encode()).to_bytes(8, "little") + d.text.encode("utf-8") for d in documents
        )
        assert report[split] == {
            "documents": len(documents),
            "bytes": sum(len(d.text.encode()) for d in documents),
            "characters": sum(len(d.text) for d in documents),
            "sha256": hashlib.sha256(joined).hexdigest(),
        }
    for file, path in zip(report["files"], sorted((tmp_path / "data").iterdir()), strict=True):
        content = path.read_bytes()
        assert file == {
            "name": f"data/{path.name}",
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "documents": 1,
        }


def test_embedded_default_is_the_standard_library():
    from pydoc_data import topics

    corpus = read_corpus(CorpusRecipe())
    documents = [*corpus.train, *corpus.validation]
    sources = {document.source for document in documents}
    assert {"argparse.py", "json/decoder.py", "topics:assert"} <= sources
    assert "pydoc_data/topics.py" not in sources
    library = Path(sysconfig.get_path("stdlib"))
    assert not any({"test", "tests", "site-packages"} & set(Path(s).parts[:-1]) for s in sources)
    by_source = {d.source: d.text for d in documents}
    assert by_source["argparse.py"] == (library / "argparse.py").read_bytes().decode("utf-8")
    assert by_source["topics:assert"] == topics.topics["assert"]
    assert not set(texts(corpus.train)) & set(texts(corpus.validation))
    assert corpus.report["description"].startswith(f"CPython {corpus.report['python']} standard library")
    assert 4e6 < corpus.report["train"]["bytes"] < 4e7
    assert read_corpus(CorpusRecipe()).report == corpus.report
