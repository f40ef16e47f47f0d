"""The tokenizer: lossless, deterministic, loaded by transformers alone; special words in a text are text."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.qwen3_5 import tokenization_qwen3_5

from hf_genlm import api
from hf_genlm.config.recipe import CorpusRecipe, TokenizerRecipe
from hf_genlm.decoding import FastGenerator
from hf_genlm.errors import UserError
from hf_genlm.loading import check_files
from hf_genlm.serving import Server
from hf_genlm.space.files.demo.models import LanguageModel
from hf_genlm.text.corpus import Document, read_documents
from hf_genlm.text.encoding import (
    encode_documents,
    encode_messages,
    encode_texts,
    own_pattern_of,
    pieces,
    pieces_of,
)
from hf_genlm.text.store import TextStore, as_documents
from hf_genlm.text.tokenizer import (
    END_OF_TEXT,
    PAD,
    PATTERNS,
    choose_vocab_size,
    load_tokenizer,
    pre_tokenizer,
    sample_evenly,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def documents():
    return read_documents([], CorpusRecipe())[0][:60]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, TokenizerRecipe(vocab_size=1024), 0)


def train(text: str, **fields):
    return train_tokenizer([Document(text, "x")], TokenizerRecipe(**fields), len(text.encode()))


def encode(tokenizer, *texts):
    return encode_documents(tokenizer, [Document(text, "x") for text in texts])


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_its_ids(tokenizer, text):
    tokens = encode(tokenizer, text)
    assert tokenizer.decode(tokens.ids.tolist()) == text
    assert tokens.n_bytes.tolist() == [len(text.encode("utf-8"))]


@pytest.mark.parametrize(
    "text", [" 'll not , yes . ", "e\u0301 \u00e9 \ufb01 \u212b", "a\r\n\r\n\tb  \n", " \u00a0\u2003x"]
)
def test_nothing_is_cleaned_up_or_normalised(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_words_in_a_text_are_text(tokenizer):
    text = f"print('{END_OF_TEXT}')  # {PAD}{END_OF_TEXT}"
    ids = encode(tokenizer, text).ids.tolist()
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
    assert tokenizer.decode(ids) == text
    # outside encode_documents the tokenizer still knows them
    assert tokenizer(END_OF_TEXT)["input_ids"] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["", f"a{END_OF_TEXT}b {PAD}", f"{END_OF_TEXT * 2}\n", "plain"])
def test_what_people_type_is_encoded_as_training_encodes_it(tokenizer, text, monkeypatch):
    """Prompts of generate, serve and the demo, and texts of the metrics, pairs and samples."""
    expected = encode(tokenizer, text).ids.tolist()
    assert encode_texts(tokenizer, [text, "x", text])[::2] == [expected, expected]
    assert LanguageModel("demo", None, tokenizer).encode(text) == expected
    prompts = []
    monkeypatch.setattr(FastGenerator, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(FastGenerator, "generate", lambda self, ids, **_: prompts.append(ids.tolist()))
    api.generate((SimpleNamespace(device="cpu"), tokenizer), text)
    assert prompts == [[[tokenizer.bos_token_id, *expected]]]
    if text:
        model = SimpleNamespace(config=SimpleNamespace())
        assert Server(model, tokenizer, "m", "localhost").encode({"prompt": text}) == expected


@pytest.mark.parametrize("typed", ["", END_OF_TEXT, f"{PAD}{END_OF_TEXT}", f"<{END_OF_TEXT}>", "\U000f0000"])
def test_special_words_of_a_message_are_text_and_those_of_the_template_are_tokens(tokenizer, typed):
    messages = [{"role": "user", "content": f"one {typed} two"}, {"role": "assistant", "content": "three"}]
    plain = [{**message, "content": message["content"].replace(typed or "?", "")} for message in messages]
    ids = encode_messages(tokenizer, messages, add_generation_prompt=True)
    expected = tokenizer.apply_chat_template(plain, return_dict=True, add_generation_prompt=True)["input_ids"]
    special = set(tokenizer.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in expected if i in special] != []
    template = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids) == template
    if not typed:
        assert ids == expected


def test_special_tokens(tokenizer):
    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.pad_token == PAD
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.unk_token is None
    assert tokenizer.padding_side == "left"
    output = tokenizer(["a", "a b c"], padding=True)
    assert sorted(output) == ["attention_mask", "input_ids"]
    assert output["input_ids"][0][0] == tokenizer.pad_token_id
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]


def test_digits_are_grouped_by_three_at_most(tokenizer):
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x = 1234567")
    assert [word for word, _ in words][2:] == ["Ġ123", "456", "7"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_words_end_where_the_named_models_end_them(pattern, documents):
    """By the tokenizers library's own GPT-2, and the pattern that transformers has for Qwen3.5."""
    qwen35 = tokenization_qwen3_5.PRETOKENIZE_REGEX
    theirs = {
        "own": pre_tokenizer(),
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "qwen35": pre_tokenizer(qwen35),
    }[pattern]
    mine = train("It's 12 words\n" * 20, vocab_size=265, pattern=pattern).backend_tokenizer.pre_tokenizer
    texts = [document.text[:5000] for document in documents[:20]]
    for text in [
        *texts,
        "\ta  b\r\n\n    c 1234 é\u0301 हिन्दी 'LL 日本語\u2028 .!\n\n  x१२३",
        " \u00a0\u2003x",
    ]:
        assert mine.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_an_unknown_pattern_is_refused():
    with pytest.raises(UserError, match=r"unknown tokenizer\.pattern 'gpt-2'; did you mean 'gpt2'"):
        train("some text", pattern="gpt-2")


def test_training_twice_gives_the_same_file(documents, tokenizer):
    again = train_tokenizer(documents, TokenizerRecipe(vocab_size=1024), 0)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_auto_tokenizer_alone_gives_the_same_ids(tokenizer, documents, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [document.text[:3000] for document in documents[:20]]
    texts += ["\ta  b\n\n    c 1234 é\u0301 हिन्दी 日本語\u2028 <|endoftext|>x", "e\u0301", " . , 'll"]
    script = """
import json, sys
sys.modules["hf_genlm"] = None  # importing it would fail
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.load(sys.stdin)
ids = tokenizer(texts)["input_ids"]
special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
decoded = [tokenizer.decode(row) for row in ids]
print(json.dumps({"ids": ids, "special": special, "decoded": decoded, "side": tokenizer.padding_side}))
"""
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "tokenizer")],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
    )
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["ids"] == tokenizer(texts)["input_ids"]
    assert result["decoded"] == texts
    assert result["special"] == [0, 0, 1, None]
    assert result["side"] == "left"
    assert load_tokenizer(tmp_path / "tokenizer")(texts)["input_ids"] == result["ids"]


def test_vocabulary_size():
    text = "the cat sat on the mat and the dog sat on the log. " * 40
    chosen = train(text)
    assert 258 < len(chosen) < choose_vocab_size(len(text))
    assert len(train(text, vocab_size=260)) == 260
    with pytest.raises(UserError, match=rf"9999.* fills {len(chosen)} at most"):
        train(text, vocab_size=9999)
    for fields in ({"vocab_size": 257}, {"vocab_size": 0}, {"max_characters": 0}):
        with pytest.raises(UserError, match=next(iter(fields))):
            train(text, **fields)


def test_chosen_vocabulary_grows_with_the_corpus():
    assert choose_vocab_size(1_000_000) == 1024
    assert choose_vocab_size(12_000_000) in (2048, 4096)
    assert choose_vocab_size(10**12) == 32768
    sizes = [choose_vocab_size(10**k) for k in range(13)]
    assert sizes == sorted(sizes)
    assert sizes[0] >= 258


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(1, 4000))
def test_sample_is_bounded_and_even(lengths, max_characters):
    documents = [Document(chr(0x4E00 + i) * n, "x") for i, n in enumerate(lengths)]
    sample = "".join(sample_evenly(documents, max_characters))
    total = sum(lengths)
    assert len(sample) <= max_characters
    if total <= max_characters:
        assert len(sample) == total
    elif max_characters >= 200:
        half = "".join(d.text for d in documents)[: total // 2]
        share = len([c for c in sample if c in set(half)]) / len(sample)
        assert share > 0.2


def test_sample_reaches_the_end_of_a_long_text():
    text = "".join(chr(0x4E00 + i // 25_000) for i in range(200_000))
    sample = "".join(sample_evenly([Document(text, "x")], 40_000))
    assert 30_000 < len(sample) <= 40_000
    assert all(2_500 <= sample.count(c) <= 7_500 for c in set(text))


# encoding


def test_tokenized_documents(tokenizer, documents):
    tokens = encode_documents(tokenizer, documents)
    assert tokens.ids.dtype == np.uint16
    assert len(tokens) == len(documents)
    assert tokens.n_tokens == len(tokens.ids) == tokens.offsets[-1]
    for document, (ids, n_bytes) in zip(documents, tokens, strict=True):
        assert n_bytes == len(document.text.encode())
        assert ids.tolist() == tokenizer(document.text)["input_ids"]
    part = tokens[3:7]
    assert [ids.tolist() for ids, _ in part] == [tokens[i][0].tolist() for i in range(3, 7)]
    assert np.shares_memory(tokens[-1][0], tokens.ids)
    with pytest.raises(IndexError):
        tokens[len(documents)]


def test_batches_leave_nothing_out(tokenizer, documents):
    whole = encode_documents(tokenizer, documents)
    batched = encode_documents(tokenizer, documents, batch=20_000)
    assert batched.ids.tolist() == whole.ids.tolist()
    assert batched.offsets.tolist() == whole.offsets.tolist()


def test_progress_ends_at_the_total(tokenizer, documents):
    heard = []
    encode_documents(tokenizer, documents, lambda done, total: heard.append((done, total)))
    assert heard[-1][0] == heard[-1][1] == sum(len(d.text) for d in documents)


WHITESPACE = [
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    " ",
    "  ",
    "    ",
    "\t",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\u2028",
    "\u00a0",
]
WORDS = [
    "a",
    "Word",
    "12345",
    "'s",
    "'",
    "_x",
    "):",
    "#!",
    "é",
    "\u0301",
    "हिन्दी",
    "日本",
    "<|endoftext|>",
    "😀",
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(WHITESPACE + WORDS), max_size=40).map("".join), st.integers(1, 12))
def test_cutting_a_text_changes_no_id(tokenizer, text, length):
    backend = tokenizer.backend_tokenizer
    assert own_pattern_of(backend)
    found = list(pieces_of(text, length))
    assert "".join(found) == text
    whole = backend.pre_tokenizer.pre_tokenize_str(text)
    cut = [word for piece in found for word, _ in backend.pre_tokenizer.pre_tokenize_str(piece)]
    assert cut == [word for word, _ in whole]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(WHITESPACE + WORDS), max_size=40).map("".join), max_size=4),
    st.integers(4, 60),
    st.integers(1, 30),
)
def test_a_document_that_is_read_in_parts_is_cut_as_well(tokenizer, texts, chunk, length):
    pre_tokenize = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    found = [[] for _ in texts]
    documents = as_documents([Document(text, "x") for text in texts], TextStore(chunk_bytes=chunk))
    for i, piece in pieces(documents, length=length):
        found[i].append(piece)
    assert ["".join(parts) for parts in found] == texts
    for text, parts in zip(texts, found, strict=True):
        cut = [word for part in parts for word, _ in pre_tokenize(part)]
        assert cut == [word for word, _ in pre_tokenize(text)]


def test_a_text_of_one_line_is_cut_too():
    text = "some words in a line that never ends, " * 50_000
    found = list(pieces_of(text))
    assert len(found) > 5
    assert max(map(len, found)) < 300_000


def test_a_long_document_is_cut_and_gives_the_ids_of_the_whole(tokenizer):
    generator = random.Random(0)
    words = [
        generator.choice(["if x:\n", "    return y\n", "\n", "word ", "\r\n", "  "]) for _ in range(200_000)
    ]
    text = "".join(words)
    assert len(list(pieces_of(text))) > 3
    assert encode(tokenizer, "first", text, "last")[1][0].tolist() == tokenizer(text)["input_ids"]


def test_other_tokenizers_are_not_cut():
    other = Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert not own_pattern_of(other)


# tokenizers that a person brings


def test_tokenizers_that_cannot_be_used(tokenizer, tmp_path):
    def saved(name, **changes):
        folder = tmp_path / name
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.update(changes)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    (tmp_path / "empty").mkdir()
    broken = saved("broken")
    (broken / "tokenizer.json").write_text("{")
    for path, word in [
        (tmp_path / "missing", "no folder"),
        (tmp_path / "empty", "holds no tokenizer"),
        (broken, "holds no tokenizer"),
        (saved("no_eos", eos_token=None), "no eos_token"),
        (saved("no_pad", pad_token=None), "no pad_token"),
        (saved("same", pad_token=END_OF_TEXT), "no pad_token"),
    ]:
        with pytest.raises(UserError, match=word) as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [2**24, 2**31, 10**400, -1])
@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_an_id_that_would_fill_the_memory_is_refused(number, place, tokenizer, tmp_path):
    """The library writes a tokenizer by a list that is as long as its largest id."""
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    if place == "vocab":
        content["model"]["vocab"]["a"] = number
    else:
        content["added_tokens"][0]["id"] = number
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"tokenizer\.json' is damaged: .*{place}"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=rf"tokenizer\.json' is damaged: .*{place}"):
        check_files(tmp_path)
