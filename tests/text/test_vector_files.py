"""Promise: a file of word vectors in any format gives the same vectors, all of them right or none."""

import gzip
import hashlib
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vectors import VECTORS, WORDS, text

from hf_genlm.errors import UserError
from hf_genlm.text.vector_files import peek_dimension, read_vectors

WANTED = {"the", "naïve", "नमस्ते", "absent"}


def binary(words=WORDS, vectors=VECTORS, end=b"\n") -> bytes:
    parts = [w.encode() + b" " + v.tobytes() + end for w, v in zip(words, vectors, strict=True)]
    return b"%d %d\n" % vectors.shape + b"".join(parts)


def by_gensim(path: Path, is_binary: bool) -> bytes:
    gensim = pytest.importorskip("gensim", reason="gensim is not installed: pip install '.[vectors]'")
    keyed = gensim.models.KeyedVectors(VECTORS.shape[1])
    keyed.add_vectors(WORDS, VECTORS)
    keyed.save_word2vec_format(path, binary=is_binary)
    return path.read_bytes()


FORMATS = {
    "glove": lambda path: text(),
    "glove, last line open": lambda path: text()[:-1],
    "glove, windows": lambda path: text(end="\r\n"),
    "word2vec text": lambda path: b"7 5\n" + text(),
    "fasttext text": lambda path: b"7 5\n" + text(end=" \n"),
    "word2vec binary": lambda path: binary(),
    "word2vec binary, no line ends": lambda path: binary(end=b""),
    "gensim's word2vec text": lambda path: by_gensim(path, False),
    "gensim's word2vec binary": lambda path: by_gensim(path, True),
}


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_vectors(name, compress, tmp_path):
    """By its content: the suffix says nothing."""
    path = tmp_path / "vectors.dat"
    path.write_bytes(compress(FORMATS[name](tmp_path / "aside")))
    assert peek_dimension(path) == 5
    heard = []
    read = read_vectors(path, WANTED, on_progress=lambda done, total: heard.append((done, total)))
    assert list(read.words) == ["the", "naïve", "नमस्ते"]
    assert read.vectors.dtype == np.float32
    assert np.array_equal(read.vectors, VECTORS[[0, 2, 4]])
    assert (read.n_in_file, read.n_skipped) == (7, {})
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def fasttext(tmp_path_factory):
    """(a model of n-grams that gensim made and wrote as fastText does, the file's bytes)."""
    name = "gensim.models.fasttext"
    module = pytest.importorskip(name, reason="gensim is not installed: pip install '.[vectors]'")
    sentences = [["the", "cat", "sat"], ["the", "naïve", "नमस्ते"], ["a", "cat"]] * 4
    model = module.FastText(
        sentences, vector_size=6, min_count=1, bucket=64, epochs=2, workers=1, seed=3, min_n=2, max_n=4
    )
    path = tmp_path_factory.mktemp("fasttext") / "model.bin"
    module.save_facebook_model(model, str(path))
    return model, path.read_bytes()


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_fasttext_model_gives_the_vectors_that_gensim_gives(fasttext, compress, tmp_path):
    model, content = fasttext
    path = tmp_path / "vectors.dat"
    path.write_bytes(compress(content))
    assert peek_dimension(path) == 6
    read = read_vectors(path, WANTED)
    assert set(read.words) == {"the", "naïve", "नमस्ते"}
    for word, row in read.words.items():
        assert np.array_equal(read.vectors[row], model.wv[word])
    assert read.n_in_file == 6


def test_a_fasttext_model_that_is_cut_short_is_refused_anywhere(fasttext, tmp_path):
    """In its header, its dictionary and its matrices; a reader that waits for more would never end."""
    _, content = fasttext
    path = tmp_path / "model.bin"
    for length in (4, 11, 30, 80, 95, 110, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="cut short"):
            read_vectors(path, WANTED, damaged="skip")


def test_a_fasttext_model_without_gensim_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gensim", None)
    path = tmp_path / "model.bin"
    path.write_bytes((793712314).to_bytes(4, "little") + bytes(200))
    with pytest.raises(UserError, match="pip install 'gensim>="):
        peek_dimension(path)


def test_words_with_spaces_are_split_from_the_right(tmp_path):
    path = tmp_path / "glove.840B.txt"
    path.write_bytes(b", 1 2 3\n. . . 4 5 6\nat name@domain.com -1e-3 .5 6\nthe 7 8 9\n")
    read = read_vectors(path, {". . .", "at name@domain.com", "at"})
    assert read.words == {". . .": 0, "at name@domain.com": 1}
    assert np.array_equal(read.vectors, np.float32([[4, 5, 6], [-1e-3, 0.5, 6]]))


def test_binary_numbers_without_control_characters_are_binary(tmp_path):
    """Only bytes beyond ASCII tell them from a line of text."""
    vectors = np.frombuffer(b"\xc1\xbf\xe1=" * 10, dtype=np.float32).reshape(2, 5)
    path = tmp_path / "vectors.bin"
    path.write_bytes(binary(["a", "b"], vectors))
    assert np.array_equal(read_vectors(path, {"b"}).vectors, vectors[:1])


NAN, INF = np.float32([[np.nan] * 5]), np.float32([[np.inf] * 5])
# name: (content, words of the message, what skipping counts; None: it stops even then)
DAMAGE = {
    "line short": (b"a 1 2 3\nb 1 2\nc 4 5 6\n", "line 2: it holds 2 numbers, not", {"wrong_dimension": 1}),
    "line long": (b"a 1 2 3\nb 1 2 3 4\nc 4 5 6\n", "line 2: it holds 4 numbers", {"wrong_dimension": 1}),
    "empty line": (b"a 1 2 3\n\nc 4 5 6\n", "line 2: it holds 0 numbers", {"wrong_dimension": 1}),
    "not as the header says": (b"3 3\na 1 2 3\nb 1 2 3 4\nc 4 5 6\n", "line 3: ", {"wrong_dimension": 1}),
    "last line cut": (b"a 1 2 3\nb 1 2 3\nc 4 5", "line 3: the file is cut short", {"wrong_dimension": 1}),
    "fewer than the header says": (b"4 3\na 1 2 3\nc 1 2 3\n", "holds 2 words .* says 4", {"missing": 2}),
    "more than the header says": (b"1 3\na 1 2 3\nc 1 2 3\n", "holds 2 words .* says 1: mend", {}),
    "a word in place of a number": (b"a 1 2 3\nb 1 x 3\nc 4 5 6\n", "line 2: 'x'", {"not_a_number": 1}),
    "two points in a number": (b"a 1 1.2.3 3\nb 1 2 3\nc 4 5 6\n", "line 1: '1.2.3'", {"not_a_number": 1}),
    "number of other digits": ("a 1 2 3\nb 1 ٣ 3\nc 4 5 6\n".encode(), "line 2: '٣'", {"not_a_number": 1}),
    "nan": (b"a 1 2 3\nb 1 nan 3\nc 4 5 6\n", "line 2: 'nan'", {"not_finite": 1}),
    "inf": (b"a 1 2 -inf\nb 1 3 3\nc 4 5 6\n", "line 1: '-inf'", {"not_finite": 1}),
    "beyond float32": (b"a 1 2 1e39\nb 1 3 3\nc 4 5 6\n", "line 1: inf", {"not_finite": 1}),
    "not UTF-8": (b"a 1 2 3\ncaf\xe9 1 2 3\nc 4 5 6\n", r"line 2: the word 'caf\\\\xe9'", {"not_utf8": 1}),
    "a wanted word twice": (b"a 1 2 3\nb 4 5 6\na 7 8 9\nc 4 5 6\n", "line 3: 'a' .* 1 ", {"duplicate": 1}),
    "another word twice": (b"a 1 2 3\nb 4 5 6\nc 1 2 3\nb 7 8 9\n", "line 4: 'b' .* 2 ", {"duplicate": 1}),
    "gz cut": (gzip.compress(text() * 9)[:-9], "gzip", None),
    "gz damaged": (gzip.compress(text())[:40] + b"????" + gzip.compress(text())[44:], "gzip", None),
    "gz only in name": (b"\x1f\x8b" + bytes(90), "gzip", None),
    "binary cut in a vector": (binary(["a", "b"], VECTORS[:2])[:-4], "cut short in or after word 2", None),
    "binary cut in a word": (b"3 5\n" + binary(["a", "bcd"], VECTORS[:2])[4:-24], "word 2", None),
    "binary longer": (b"1 5\n" + binary(["a", "b"], VECTORS[:2])[4:], "goes on after the 1 words", None),
    "binary nan": (binary(["a", "b"], np.concatenate([VECTORS[:1], NAN])), "word 2: nan", {"not_finite": 1}),
    "binary inf": (binary(["b", "a"], np.concatenate([INF, VECTORS[:1]])), "word 1: inf", {"not_finite": 1}),
    "binary not UTF-8": (
        binary(["a", "??"], VECTORS[:2]).replace(b"??", b"\xc3\xff"), "word 2: .* not UTF-8", {"not_utf8": 1}
    ),
    "binary twice": (binary(["a", "b", "b"], VECTORS[:3]), "word 3: 'b' .* word 2 ", {"duplicate": 1}),
    "empty": (b"", "is empty", None),
    "header alone": (b"0 5\n", "holds no word", None),
    "no numbers": (b"once upon a time\nthere was\n", "a", None),
    "one word a line": (b"once\nupon\n", "vectors of 0 numbers", None),
    "zip": (b"PK\x03\x04" + bytes(60), "zip archive.* unpack", None),
    "some binary": (b"\x93NUMPY\x01\x00v\x00" + bytes(60), "is binary", None),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_or_skipped_and_counted(name, tmp_path):
    content, words, skipped = DAMAGE[name]
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_vectors(path, {"a"})
    assert "\n" not in str(caught.value)
    assert repr(str(path)) in str(caught.value)
    if skipped is None:
        with pytest.raises(UserError):
            read_vectors(path, {"a"}, damaged="skip")
    else:
        assert "vectors.damaged=skip" in str(caught.value)
        read = read_vectors(path, {"a"}, damaged="skip")
        assert read.n_skipped == skipped
        assert np.isfinite(read.vectors).all()
        if name == "a wanted word twice":
            assert np.array_equal(read.vectors, [[1, 2, 3]])


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "nowhere.txt", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(UserError, match="is no file: name one"):
            peek_dimension(path)


def test_memory_goes_with_the_words_that_are_wanted(tmp_path):
    path = tmp_path / "vectors.txt"
    row = " ".join(f"{x:.5f}" for x in np.random.default_rng(0).standard_normal(50))
    with path.open("w") as file:
        file.writelines(f"word{i} {row}\n" for i in range(60_000))
    wanted = {f"word{i}" for i in range(0, 60_000, 600)}
    tracemalloc.start()
    read = read_vectors(path, wanted)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read.vectors.shape == (100, 50)
    assert path.stat().st_size > 25e6
    assert peak < 8e6


@settings(max_examples=300, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.text(alphabet="ab 1.-e\n\té\0", max_size=80).map(str.encode),
        st.binary(max_size=60).map(lambda rest: b"2 2\n" + rest),
        st.binary(max_size=60).map(lambda rest: b"\x1f\x8b\x08\0" + rest),
        st.binary(max_size=200).map(gzip.compress),
        st.binary(max_size=200).map(lambda rest: (793712314).to_bytes(4, "little") + rest),
    ),
    damaged=st.sampled_from(["stop", "skip"]),
)
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, damaged):
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    path.write_bytes(content)
    try:
        read = read_vectors(path, {"a", "b", ""}, damaged)
    except UserError:
        return
    assert read.vectors.shape == (len(read.words), peek_dimension(path))
    assert np.isfinite(read.vectors).all()
