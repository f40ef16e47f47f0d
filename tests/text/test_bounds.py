"""Promise: no input takes more memory than is stated, whatever it expands to, and reading ends."""

import os
import re
import shutil
import struct
import sys
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import bombs
from support.corpora import complaint, parquet_of, read, texts, write

from hf_genlm import files, memory
from hf_genlm.config.recipe import CorpusRecipe, TokenizerRecipe, load_recipe, load_yaml
from hf_genlm.errors import UserError
from hf_genlm.text import encoding, records, sources, tokenizer, vector_files
from hf_genlm.text.encoding import MAX_WORD, pieces, pieces_of, pieces_of_parts
from hf_genlm.text.fast_bpe import PATTERNS, pre_tokenizer
from hf_genlm.text.locating import as_sources
from hf_genlm.text.store import Document, as_documents
from hf_genlm.text.streaming import open_stream

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
MOST_MB = 1000  # with torch and a small model 1,500
ROOT = Path(__file__).parents[2]


# files that expand


@on_linux
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in bombs.HEAVY)) for name in bombs.BOMBS]
)
def test_a_small_file_takes_no_more_memory_than_is_stated(tmp_path, name):
    write_bomb, refusal = bombs.BOMBS[name]
    peak, outcome = bombs.measure(write_bomb, tmp_path)
    assert peak < (150 if "in zip" in name else MOST_MB), outcome
    assert (refusal or "") in outcome
    assert bool(refusal) == bool(outcome)


@on_linux
def test_the_measure_sees_memory_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(bombs, "LIMIT_S", 1)
    peak, _ = bombs.measure(
        lambda folder: bombs.written(folder / "a", b"a"), tmp_path, lambda path: len(b"a" * (300 << 20))
    )
    assert peak >= 290
    with pytest.raises(AssertionError, match="fault"):
        bombs.measure(lambda folder: pytest.fail("fault"), tmp_path)

    def endless(path):
        while True:
            pass

    assert (
        "did not end" in bombs.measure(lambda folder: bombs.written(folder / "a", b"a"), tmp_path, endless)[1]
    )


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("suffix", bombs.COMPRESSIONS)
@pytest.mark.parametrize("script", bombs.SCRIPTS)
def test_text_of_any_script_in_any_compression(tmp_path, script, suffix):
    peak, outcome = bombs.measure(bombs.a_text(script, suffix, 40 << 20), tmp_path, bombs.read_text)
    assert not outcome
    assert peak < 300


@pytest.mark.parametrize("suffix", bombs.COMPRESSIONS)
def test_streams_behind_one_another_are_read_whole(tmp_path, suffix):
    if suffix == ".zip":
        return
    pack = bombs.COMPRESSIONS[suffix]
    content = b"".join(pack(part) for part in (b"one ", b"", b"two ", b"three " * 500_000))
    assert texts(read(write(tmp_path / f"a.txt{suffix}", content))[0]) == ["one two " + "three " * 500_000]
    if suffix:
        assert "readable" in complaint(write(tmp_path / f"a.txt{suffix}", content[:-5]))
        assert "readable" in complaint(write(tmp_path / f"a.txt{suffix}", content + b"rest of another kind"))


@pytest.mark.parametrize("method", [0, 8, 12, 14])
def test_every_method_of_zip_is_read_and_checked(tmp_path, method):
    content = bombs.zipped(b"some text, " * 200_000, method)
    assert texts(read(write(tmp_path / "a.txt.zip", content))[0]) == ["some text, " * 200_000]
    changed = bytearray(content)
    at = content.index(b"PK\x01\x02") + 16  # the checksum in the table
    changed[at] ^= 1
    assert "checksum" in complaint(write(tmp_path / "a.txt.zip", bytes(changed)))
    changed = bytearray(content)
    changed[content.index(b"PK\x01\x02") + 8] |= 1
    assert "encrypted" in complaint(write(tmp_path / "a.txt.zip", bytes(changed)))


# parquet


def test_pages_of_all_kinds_are_measured(tmp_path):
    """Of version 1 and 2, with a dictionary and long statistics, in several row groups."""
    import pyarrow as pa
    from pyarrow import parquet

    values = [f"{i} " + "word " * (i % 300) for i in range(3000)] + ["long " * 5000, None, ""]
    wanted = [value for value in values if value]
    for options in (
        {},
        {"data_page_version": "2.0"},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        {
            "use_dictionary": False,
            "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"},
            "write_page_checksum": True,
        },
        {"row_group_size": 700, "data_page_size": 2000},
        {"compression": "none"},
    ):
        parquet.write_table(
            pa.table({"other": range(len(values)), "text": values}), tmp_path / "a.parquet", **options
        )
        with (tmp_path / "a.parquet").open("rb") as file:
            metadata = parquet.ParquetFile(file).metadata
            for group in range(metadata.num_row_groups):
                column = metadata.row_group(group).column(1)
                assert (
                    0 < sum(n for n, _ in records._page_sizes(file, column)) <= column.total_uncompressed_size
                )
        assert texts(read(tmp_path / "a.parquet")[0]) == wanted


@pytest.mark.parametrize(
    ("limit", "value"),
    [("_MAX_TEXT", 5000), ("_MAX_TEXT", 9999), ("_MAX_PAGE_VALUES", 99), ("_MAX_BATCH", 3000)],
)
def test_a_chat_too_large_to_hold_is_refused_unread(tmp_path, monkeypatch, limit, value):
    """By its text, by the number of its messages, and by what its row group unpacks to."""
    import pyarrow as pa

    small = [{"role": "assistant", "content": "a"}]
    many = [{"role": "user", "content": f"{i} words " * 9} for i in range(100)]
    large = small + ([{"role": "user", "content": "a" * 5000}] if value == 5000 else many)
    path = write(tmp_path / "a.parquet", parquet_of({"messages": [small, large]}))
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        table = pa.table({"messages": [small, large]})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    monkeypatch.setattr(records, limit, value)
    assert "more than" in complaint(path)
    if limit == "_MAX_TEXT":
        for each in (path, tmp_path / "a.arrow"):
            assert "row 2' has more than" in complaint(each)
            assert len(read(each, damaged="skip")[0]) == 1


def test_a_field_given_twice_hides_no_large_page():
    large = struct.pack("<B", 0x15) + b"\x00" + b"\x15\xfe\xff\xff\xff\x0f"  # fields 1 and 2 as 32 bits
    for other in (b"\x01\x04", b"\x05\x04\x01", b"\x06\x04\x01"):  # again field 2: true, 32 or 64 bits
        fields, _ = records._thrift_struct(large + other + b"\x00", 0)
        assert fields[2] == (-1 if other[0] == 5 else 2**31 - 1)


def test_columns_that_are_no_text_are_refused_unread(tmp_path):
    for values in ([["a"]], [{"a": "b"}], [[{"a": "b"}]], [b"a"], [1.5]):
        assert "not text" in complaint(
            write(tmp_path / "a.parquet", parquet_of({"text": values})), damaged="skip"
        )
    assert texts(read(write(tmp_path / "b.parquet", parquet_of({"text": [None, "a"]})))[0]) == ["a"]


# long texts of any script


def test_letters_and_signs_are_those_of_every_version_of_unicode():
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        kind = unicodedata.category(character)[0]
        if re.match(f"[{encoding._LETTERS}]", character):
            assert kind == "L", hex(code)
            assert unicodedata.ucd_3_2_0.category(character)[0] in "LC", hex(code)
        elif re.match(f"[{encoding._SIGNS}]", character):
            assert kind not in "LM", hex(code)


SIGNS = re.split(
    "[|]",
    "\uff0c|。|\u3000|'a|1|٣|、a|!|\u0301|ー|ก็|กำ|م،|é,|हि।| |\n|\r\n|\u2764\ufe0f|\ufe0f|1\ufe0f\u20e3",
)
LETTERS = re.split("[|]", "春眠|\u0430|β|שלום|한국|か|word|ไทย|नमस्ते|日")


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(PATTERNS)),
    st.lists(st.sampled_from(SIGNS + LETTERS), max_size=40).map("".join),
    st.integers(1, 12),
)
def test_a_cut_is_where_a_word_ends(pattern, text, length):
    """With our own pattern, and behind words with every other one."""
    words = pre_tokenizer(PATTERNS[pattern]).pre_tokenize_str
    found = list(pieces_of(text, length, can_cut=pattern == "own"))
    assert "".join(found) == text
    assert [word for piece in found for word, _ in words(piece)] == [word for word, _ in words(text)]


@pytest.mark.parametrize("can_cut", [True, False])
@pytest.mark.parametrize("script", bombs.SCRIPTS)
def test_no_piece_grows_with_the_text(script, can_cut):
    unit = bombs.SCRIPTS[script]
    text = unit * (3_000_000 // len(unit))
    parts = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
    found = list(pieces_of_parts(parts, can_cut))
    assert "".join(found) == text
    assert max(map(len, found)) <= (encoding.PIECE if can_cut else encoding.UNCUT) + MAX_WORD
    assert found == list(pieces_of_parts([text], can_cut))  # whatever the parts
    documents = as_documents([Document(text, "x")])
    assert max(len(piece) for piece in tokenizer.sample_evenly(documents, len(text))) <= (1 << 16) + MAX_WORD
    assert "".join(piece for _, piece in pieces(documents, can_cut)) == text


def test_words_that_seldom_repeat_are_sampled(monkeypatch):
    """The merges see no more different words than fit in memory, evenly of all of the text."""
    monkeypatch.setattr(tokenizer, "_MAX_WORD_BYTES", 100_000)
    seen = []

    class Watched:
        def __getattr__(self, name):
            return getattr(backend, name)

        def train_from_iterator(self, given, trainer):
            seen.append("".join(given))
            backend.train_from_iterator([], trainer)

    backend = tokenizer.Tokenizer(tokenizer.models.BPE())
    monkeypatch.setattr(tokenizer, "Tokenizer", lambda model: Watched())
    monkeypatch.setattr(tokenizer, "wrap_tokenizer", lambda backend: None)
    for text, share in (
        ("the cat sat on the mat, " * 40_000, 1),
        ("".join(chr(0x4E00 + (i * i + i // 7) % 20_000) for i in range(400_000)), 0.2),
    ):
        tokenizer.train_tokenizer(as_documents([Document(text, "x")]), TokenizerRecipe(), len(text))
        assert share / 4 * len(text) < len(seen[-1]) <= share * len(text)


@pytest.mark.slow
@on_linux
def test_a_large_chinese_text_trains_in_one_and_a_half_gigabytes():
    import subprocess

    command = [
        sys.executable,
        str(ROOT / "recipes/benchmarks/data_path.py"),
        "--memory-mb",
        "200",
        "--chinese",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = [int(found.replace(",", "")) for found in re.findall(r"peak memory ([\d,]+) MB", done.stdout)]
    assert len(peaks) == 2
    assert max(peaks) < 1500


def test_a_long_string_of_python_is_one_document(tmp_path):
    long = 'ab\0"\\\n中' * 700_000
    with as_sources(["first", long, "", "last"]) as words:
        documents, report = read(*words)
    assert texts(documents) == ["first", long, "last"]
    assert report["empty_skipped"] == 1


def test_documents_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENTS", 100)
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' * 101)
    assert "--stream" in complaint(path)
    assert len(read(write(tmp_path / "b.jsonl", '{"text": "a"}\n' * 100))[0]) == 100


# one long document of a stream, and rows of the library datasets


def read_long_stream(n_bytes: int):
    """A reader of a stream of two documents of `n_bytes`, of which one is held out."""

    def read_it() -> None:
        from hf_genlm.config.recipe import CorpusRecipe
        from hf_genlm.text.store import TextStore
        from hf_genlm.text.streaming import read_stream, sample

        TextStore.max_in_memory = 1 << 20  # more lies in a file
        folder = Path(tempfile.mkdtemp())
        for name, line in (
            ("a", b"The quick brown fox jumps, and then some.\n"),
            ("v", b"A dog, lazy or not.\n"),
        ):
            with (folder / f"{name}.txt").open("wb") as file:
                for _ in range(n_bytes >> 20):
                    file.write(line * ((1 << 20) // len(line)))
        sources = [str(folder / "a.txt"), str(folder / "v.txt")]
        found = read_stream(CorpusRecipe(sources=sources, validation=sources[1:], stream=True))
        sample(found.stream, 1_000_000)
        texts = [sum(map(len, parts)) for parts in found.stream.first_epoch()]
        assert len(texts) == 1
        assert texts[0] == (folder / "a.txt").stat().st_size
        shutil.rmtree(folder)

    return read_it


@on_linux
def test_a_long_document_of_a_stream_is_not_held_in_memory():
    peaks = [bombs.in_child(read_long_stream(n << 20)) for n in (24, 48)]
    assert [outcome for _, outcome in peaks] == ["", ""]
    assert max(peak for peak, _ in peaks) < 100
    assert peaks[1][0] - peaks[0][0] < 20


@pytest.mark.slow
@on_linux
def test_a_document_of_a_gigabyte_takes_less_than_one_and_a_half():
    peak, outcome = bombs.in_child(read_long_stream(1 << 30))
    assert outcome == ""
    assert peak < 500


@pytest.mark.parametrize("streaming", [True, False])
def test_a_long_row_of_a_data_set_is_refused_by_name(tmp_path, monkeypatch, streaming):
    import datasets
    import huggingface_hub

    write(tmp_path / "a.parquet", parquet_of({"text": ["first", "x" * 5000, "last"]}))
    load, files = datasets.load_dataset, {"train": [str(tmp_path / "a.parquet")]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **o: load("parquet", data_files=files, **o))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(records, "_MAX_TEXT", 4000)
    if streaming:
        walk = open_stream(CorpusRecipe(sources=["owner/name"])).first_epoch()
        assert ["".join(next(walk))] == ["first"]
        with pytest.raises(UserError, match=r"'owner/name, row 2' has more than 4,000 bytes: cut it"):
            next(walk)
        return
    assert "'owner/name, row 2' has more than 4,000 bytes: cut it" in complaint("owner/name")
    documents, report = read("owner/name", damaged="skip")
    assert texts(documents) == ["first", "last"]
    assert report["damaged"]["records"] == 1


# globs, and other files


def test_globs_end_over_loops_of_links(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / "data" / name / "deep").mkdir(parents=True)
        for other in "abcd":
            (tmp_path / "data" / name / "deep" / f"loop_{other}").symlink_to(tmp_path / "data")
        write(tmp_path / "data" / name / "deep/x.txt", f"text {name}")
    write(tmp_path / "data/.hidden/y.txt", "hidden")
    write(tmp_path / "data/z[1].md", "marked")
    (tmp_path / "data/link.txt").symlink_to(tmp_path / "data/a/deep/x.txt")
    monkeypatch.chdir(tmp_path)
    for pattern, wanted in {
        "data/**/*.txt": ["text a", "text b"],
        "**/x.txt": ["text a", "text b"],
        "**/**/deep/**/*.txt": ["text a", "text b"],
        "data/**": ["text a", "text b", "marked"],
        f"{tmp_path}/data/*/**/x.*": ["text a", "text b"],
        "data/z[[]1].md": ["marked"],
    }.items():
        assert sorted(texts(read(pattern)[0])) == sorted(wanted), pattern


def test_aliases_of_a_recipe_stand_for_few_values(tmp_path):
    assert load_yaml("a: &x [1, 2]\nb: *x") == {"a": ["1", "2"], "b": ["1", "2"]}
    lines = ["&b0 {a: lol}"]
    for i in range(1, 25):
        lines.append(f"&b{i} {{a: {lines[-1]}, b: *b{i - 1}, c: *b{i - 1}, d: *b{i - 1}}}")
    for field in ("corpus.languages", "corpus.sources", "training.steps"):
        section, _, name = field.partition(".")
        path = write(tmp_path / "recipe.yaml", f"{section}:\n  {name}: {lines[-1]}\n")
        with pytest.raises(UserError, match="aliases stand for more than"):
            load_recipe(path, [])


def vectors(tmp_path, content: bytes, **options):
    return vector_files.read_vectors(write(tmp_path / "v.txt", content), {"a"}, **options)


def test_files_of_vectors_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_files, "_MAX_WORDS", 100)
    monkeypatch.setattr(vector_files, "_MAX_REPEATED", 50)
    good = b"".join(b"w%d 1 2\n" % i for i in range(99)) + b"a 1 2\n"
    assert vectors(tmp_path, good).n_in_file == 100
    for damaged in ("stop", "skip"):
        with pytest.raises(UserError, match="more than 100 words"):
            vectors(tmp_path, good + b"b 1 2\n", damaged=damaged)
        with pytest.raises(UserError, match="more than 50 words that stand there already"):
            vectors(tmp_path, b"b 1 2\n" * 99, damaged=damaged)
    monkeypatch.setattr(vector_files, "_MAX_HELD", 7)
    with pytest.raises(UserError, match="smaller dimension"):
        vectors(tmp_path, good)


@on_linux
def test_a_fasttext_model_is_not_held_in_memory(tmp_path):
    """A file of 600 MB, nearly all of it rows of n-grams; sparse, so that it takes no disk."""
    pytest.importorskip("gensim", reason="gensim is not installed: pip install '.[vectors]'")
    n_buckets, dimension = 1_500_000, 100
    with (tmp_path / "model.bin").open("wb") as file:
        file.write(
            struct.pack("<2i12id", 793712314, 12, dimension, 5, 5, 1, 5, 1, 2, 2, n_buckets, 3, 6, 100, 1e-4)
        )
        file.write(struct.pack("<3i2q", 1, 1, 0, 10, -1) + b"a\0" + struct.pack("<qb", 10, 0))
        for n_rows in (1 + n_buckets, 0):
            file.write(struct.pack("<?2q", False, n_rows, dimension))
            file.seek(4 * n_rows * dimension, os.SEEK_CUR)
        file.truncate()

    def read_it() -> None:
        assert vector_files.read_vectors(tmp_path / "model.bin", {"a"}).vectors.shape == (1, dimension)

    peak, outcome = bombs.in_child(read_it)
    assert outcome == ""
    assert peak < 300


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_devices_and_large_files_are_refused_by_every_reader(tmp_path, monkeypatch):
    from hf_genlm.evaluation.benchmarks import read_pairs
    from hf_genlm.text.languages import read_parallel
    from hf_genlm.text.tokenizer import load_tokenizer

    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer.json").symlink_to("/dev/zero")
    readers = {
        "json": lambda path: files.read_json(path),
        "pairs": lambda path: read_pairs(path),
        "recipe": lambda path: load_recipe(path, []),
        "parallel": lambda path: read_parallel(CorpusRecipe(parallel={"eng": str(path)})),
        "source": lambda path: read(path),
        "vectors": lambda path: vector_files.peek_dimension(path),
    }
    for reader in readers.values():
        for path in (tmp_path / "pipe.json", Path("/dev/zero")):
            with pytest.raises(UserError, match="file"):
                reader(path)
    with pytest.raises(UserError, match="link"):
        load_tokenizer(tmp_path / "model")
    (tmp_path / "model/tokenizer.json").unlink()
    with (tmp_path / "model/tokenizer.json").open("wb") as file:
        file.truncate(memory.MAX_BYTES + 1)  # sparse: it takes no disk
    with pytest.raises(UserError, match="more than"):
        load_tokenizer(tmp_path / "model")
    for name in ("json", "pairs", "parallel"):
        with pytest.raises(UserError, match="more than"):
            readers[name](tmp_path / "model/tokenizer.json")


def test_a_table_of_blocks_is_bounded(tmp_path):
    from hf_genlm.evaluation.aggregation import BlockSums

    with (tmp_path / "blocks.npy").open("wb") as file:
        file.truncate(memory.MAX_BYTES + 1)
    with pytest.raises(UserError, match="more than"):
        BlockSums.load(tmp_path / "blocks.npy")


def test_json_of_many_values_is_refused_before_it_is_parsed(tmp_path):
    from hf_genlm.evaluation.benchmarks import read_pairs
    from hf_genlm.run_folder import RunFolder

    many = write(tmp_path / "many.json", "[" + "[]," * memory.MAX_VALUES + "[]]")
    log = write(tmp_path / "log.jsonl", '{"event": "a"}\n' * (memory.MAX_VALUES + 1))
    for refused in (
        lambda: files.read_json(many),
        lambda: RunFolder(tmp_path).read_log(),
        lambda: read_pairs(log),
    ):
        with pytest.raises(UserError, match="values"):
            refused()


def test_aliases_of_a_comparison_are_refused(tmp_path):
    from hf_genlm.comparison.plan import Plan

    with pytest.raises(UserError, match="aliases"):
        Plan.read(write(tmp_path / "compare.yaml", "a: &a [x]\nb: *a\n"))
