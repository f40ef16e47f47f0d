"""The second engine gives the ids of the saved tokenizer, or is not used: proved, probed, spot-checked."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hf_genlm.config.recipe import CorpusRecipe, TokenizerRecipe
from hf_genlm.text import encoding, fast_bpe
from hf_genlm.text.corpus import Document, read_documents
from hf_genlm.text.encoding import Encoder, encode_documents
from hf_genlm.text.fast_bpe import (
    GROUPED_PATTERNS,
    MAX_PIECE,
    MAX_TOKEN,
    PATTERN,
    PATTERNS,
    FastBPE,
    bounded,
    differing_characters,
    fast_bpe_of,
    pre_tokenizer,
    ranks_of,
)
from hf_genlm.text.tokenizer import END_OF_TEXT, PAD, train_tokenizer, wrap_tokenizer

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text("ab \n\t'sS\u017f\u0130", max_size=80),
    st.lists(
        st.sampled_from(
            ["\r\n", "\n\n", " ", "    ", "\t", "\x0b", "\x1c", "\x85", "\u2028", "\u00a0", "self", "def ",
             "'ll", "'VE", "12345", "\u0661\u0662", "_x", "):", "\u00e9", "e\u0301", "हिन्दी", "日本", "😀",
             "\u2764", "\ufe0f", "\ufe0e", "\u200d", "\u20e3",
             "\ufdd0", END_OF_TEXT, PAD, fast_bpe.BORDER, "\U000e0001", "\u1c89", "\ua7cb"]
        ),
        max_size=40,
    ).map("".join),
)  # fmt: skip


@pytest.fixture(scope="module")
def documents():
    return read_documents([], CorpusRecipe())[0][:60]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, TokenizerRecipe(vocab_size=1024), 0)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer.backend_tokenizer, 10**9)


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(autouse=True)
def worthwhile(monkeypatch):
    """The second engine for short texts too."""
    monkeypatch.setattr(Encoder, "min_fast", 0)


def as_text(*texts: str) -> list[Document]:
    return [Document(text, "x") for text in texts]


def ids_of(tokenizer, *texts: str) -> list[list[int]]:
    return [ids.tolist() for ids, _ in encode_documents(tokenizer, as_text(*texts))]


def saved_ids(tokenizer, *texts: str) -> list[list[int]]:
    """By the tokenizer itself; the words of its special tokens are text."""
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def changed(tokenizer, change) -> dict:
    """The tokenizer's JSON after `change(state)`."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    change(state)
    return state


def with_merges(merges: list[tuple[str, str]], vocab_order: list[str] | None = None) -> Tokenizer:
    """The bytes and `merges`; tokens take ids as they are made, or in `vocab_order`."""
    state = json.loads(train_tokenizer(as_text("ab"), TokenizerRecipe(), 2).backend_tokenizer.to_str())
    made = vocab_order or [left + right for left, right in merges]
    for word in made:
        state["model"]["vocab"].setdefault(word, len(state["model"]["vocab"]))
    state["model"]["merges"] = [list(pair) for pair in merges]
    return Tokenizer.from_str(json.dumps(state))


# the same ids


@settings(max_examples=500, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=5))
def test_ids_are_those_of_the_saved_tokenizer(tokenizer, encoder, pool, texts):
    assert [ids.tolist() for ids in encoder.encode(texts, pool)] == saved_ids(tokenizer, *texts)
    assert encoder.fast is not None


def test_real_documents(tokenizer, documents):
    texts = [document.text for document in documents]
    assert ids_of(tokenizer, *texts) == saved_ids(tokenizer, *texts)


@pytest.mark.parametrize("unit", [" ", "\n", "a", " \n", "\t ", "é", "'s", "1", "#", "a\r\n \t"])
def test_long_runs(tokenizer, unit):
    """The regex engine underneath overflows its stack on much longer ones, which go to the other engine."""
    texts = [unit * (length // len(unit)) + "x" for length in (70_000, MAX_PIECE - 1, 2 * MAX_PIECE)]
    fast = Encoder(tokenizer.backend_tokenizer, 10**9).fast
    assert [fast.can_encode(text) for text in texts] == [True, True, False]
    for text in texts[:2]:
        assert sum(map(len, fast.encode([text]))) > 0
    assert ids_of(tokenizer, texts[0]) == saved_ids(tokenizer, texts[0])


def test_a_saved_limit_of_length_cuts_nothing_off(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    text = "one two three four five six seven"
    for word in (text, text + fast_bpe.BORDER):  # through both engines
        assert ids_of(wrap_tokenizer(backend), word) == saved_ids(tokenizer, word)
    assert backend.truncation["max_length"] == 3  # the person's own tokenizer is left as it was


# the proof

PARTS = st.sampled_from(["a", "b", "c"])


@st.composite
def merge_lists(draw):
    """Merges over three letters, in any order, many of which no training would make."""
    made, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(1, 8))):
        pair = (draw(st.sampled_from(made)), draw(st.sampled_from(made)))
        if pair not in merges:
            merges.append(pair)
            made.append("".join(pair))
    return merges, draw(st.booleans())


@settings(max_examples=400, deadline=None)
@given(merge_lists(), st.lists(st.text("abc", max_size=14), min_size=1, max_size=8))
def test_whatever_passes_the_proof_gives_equal_ids(drawn, texts):
    merges, turned = drawn
    names = list(dict.fromkeys(left + right for left, right in merges))
    backend = with_merges(merges, names[::-1] if turned else names)
    fast = fast_bpe_of(backend, GROUPED_PATTERNS[PATTERN])
    if fast is not None:
        wanted = [backend.encode(text).ids for text in texts]
        assert [ids.tolist() for ids in fast.encode(texts)] == wanted


@pytest.mark.parametrize(
    ("merges", "order", "text"),
    [
        # ids in another order than the merges
        ([("a", "b"), ("b", "c")], ["bc", "ab"], "abc"),
        # two ways to the same bytes, of which the list knows one that is not reached
        ([("a", "b"), ("b", "c"), ("a", "bc")], None, "abc"),
        ([("a", "a"), ("a", "aa")], None, "aaa"),
    ],
)
def test_what_the_proof_refuses_would_differ(merges, order, text):
    backend = with_merges(merges, order)
    state = json.loads(backend.to_str())
    assert ranks_of(state) is None
    byte_of = fast_bpe.byte_of_letter()
    ranks = {
        bytes(byte_of[letter] for letter in word): i
        for word, i in state["model"]["vocab"].items()
        if word not in (END_OF_TEXT, PAD)
    }
    assert FastBPE(ranks, GROUPED_PATTERNS[PATTERN]).encode([text])[0].tolist() != backend.encode(text).ids


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["model"].update(dropout=0.1),
        lambda state: state["model"].update(continuing_subword_prefix="##"),
        lambda state: state["model"].update(end_of_word_suffix="</w>"),
        lambda state: state["model"]["vocab"].pop("Ġ"),  # the space
        lambda state: state["model"]["merges"].append(state["model"]["merges"][0]),
        lambda state: state["model"].update(type="WordPiece"),
        lambda state: state["model"]["vocab"].update({"!": 3}),  # two tokens of one id
    ],
)
def test_other_models_are_refused(tokenizer, change):
    assert ranks_of(changed(tokenizer, lambda state: None)) is not None
    assert ranks_of(changed(tokenizer, change)) is None


def test_other_rules_of_cutting_are_refused(tokenizer):
    def upper(state):
        state["added_tokens"].append(
            {**state["added_tokens"][0], "id": 5000, "content": "self", "special": False}
        )

    for change in (
        upper,
        lambda state: state.update(normalizer={"type": "Lowercase"}),
        lambda state: state["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    ):
        backend = Tokenizer.from_str(json.dumps(changed(tokenizer, change)))
        assert Encoder(backend, 10**9).fast is None
        text = "a SELF of self"
        assert ids_of(wrap_tokenizer(backend), text) == [backend.encode(text, add_special_tokens=False).ids]


def test_tokens_of_no_merge_are_never_used(tokenizer):
    """A word of the vocabulary that no merge makes: tiktoken would find it, the tokenizer does not."""

    def unused(state):
        state["model"]["vocab"]["zqzq"] = len(state["model"]["vocab"])

    backend = Tokenizer.from_str(json.dumps(changed(tokenizer, unused)))
    assert Encoder(backend, 10**9).fast is not None
    assert ids_of(wrap_tokenizer(backend), "zqzq") == [backend.encode("zqzq").ids]


# characters on which the engines disagree, and the spot check


def test_the_engines_agree_on_every_character_of_today():
    """Nothing rests on it: it says that the fast way is taken for all text, with these versions."""
    engines = [fast_bpe.class_engines(pattern) for pattern in fast_bpe.CLASSES]
    assert not differing_characters("".join(map(chr, range(0x3000))), engines)


def test_characters_of_different_classes_are_left_to_the_tokenizer(tokenizer, monkeypatch):
    """As if the two followed different versions of Unicode: ß is a letter to one of them alone."""
    make = fast_bpe.class_engines

    def older(pattern):
        return (make(pattern)[0], make(pattern.replace(r"\p{M}", r"\p{M}&&[^ß]"))[1])

    monkeypatch.setattr(fast_bpe, "class_engines", older)
    fast = Encoder(tokenizer.backend_tokenizer, 10**9).fast
    assert fast.can_encode("Maße" * 10) is False
    assert fast.can_encode("Masse é" * 10) is True
    assert ids_of(tokenizer, "Maße", "Masse") == saved_ids(tokenizer, "Maße", "Masse")


def test_a_difference_that_is_seen_turns_to_the_tokenizer(tokenizer, documents, monkeypatch):
    encode = FastBPE.encode

    def faulty(self, texts):
        return [np.where(ids == 300, 301, ids) for ids in encode(self, texts)]

    monkeypatch.setattr(FastBPE, "encode", faulty)
    notes = []
    found = encode_documents(tokenizer, documents, note=notes.append)
    monkeypatch.undo()
    assert len(notes) == 1
    assert "tiktoken is left aside" in notes[0]
    assert found.ids.tolist() == encode_documents(tokenizer, documents).ids.tolist()


def test_the_fast_engine_is_the_one_that_runs(tokenizer, documents, monkeypatch):
    """All of a plain text goes through it, but for the spot checks."""
    exact = []
    encode_exactly = Encoder.encode_exactly
    monkeypatch.setattr(
        Encoder, "encode_exactly", lambda self, texts: exact.extend(texts) or encode_exactly(self, texts)
    )
    encode_documents(tokenizer, documents)
    assert 0 < sum(map(len, exact)) <= encoding.SPOTS * encoding.SPOT


def test_a_text_may_hold_the_word_that_joins_texts(tokenizer):
    texts = ["one", f"two{fast_bpe.BORDER}three", "", "four"]
    assert ids_of(tokenizer, *texts) == saved_ids(tokenizer, *texts)


def test_a_large_vocabulary_is_proved_too(documents):
    everything, _ = read_documents([], CorpusRecipe())
    recipe = TokenizerRecipe(vocab_size=8192, max_characters=1_000_000)
    backend = train_tokenizer(everything, recipe, 0).backend_tokenizer
    assert ranks_of(json.loads(backend.to_str())) is not None


@pytest.mark.parametrize("name", PATTERNS)
@given(TEXTS)
@settings(max_examples=60, deadline=None)
def test_words_of_a_usual_length_train_as_they_are_encoded(name, text):
    whole, cut = pre_tokenizer(PATTERNS[name]), pre_tokenizer(bounded(PATTERNS[name]))
    assert cut.pre_tokenize_str(text) == whole.pre_tokenize_str(text)


@pytest.mark.parametrize(
    "unit", ["a", "ab", "-", "=-", " ", "\n", "\r\n", "\u4e00", "\U0001f600", "\u2764\ufe0f"]
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_run_of_one_character_does_not_become_one_token(unit, pattern):
    text = unit * (40_000 // len(unit))
    tokenizer = train_tokenizer(as_text(text), TokenizerRecipe(pattern=pattern), 0)
    longest = max(map(len, tokenizer.get_vocab()))
    assert longest <= MAX_TOKEN
    assert longest >= MAX_TOKEN / 4 or pattern != "own", "a run may be a token of some length"
    assert len(ids_of(tokenizer, text)[0]) >= len(text.encode()) / MAX_TOKEN


def test_separators_of_a_usual_width_are_one_token():
    text = "".join(f"{'-' * 79}\nline {i}\n{' ' * 60}|\n" for i in range(300))
    vocabulary = train_tokenizer(as_text(text), TokenizerRecipe(vocab_size=300), 0).get_vocab()
    assert any(token.startswith("-" * 79) for token in vocabulary)
    assert any("\u0120" * 59 in token for token in vocabulary)


EMOJI = ["\u2764\ufe0f", "\u2764\ufe0f\u200d\U0001f525", "\U0001f3f3\ufe0f\u200d\U0001f308", "#\ufe0f\u20e3",
         "\U0001f469\U0001f3fd\u200d\u2695\ufe0f", "7\ufe0f\u20e3", "7\u20e3", "\u00a9\ufe0f", "\u203c\ufe0f",
         "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd", "\U0001f1eb\U0001f1f7",
         "\U0001f441\ufe0f\u200d\U0001f5e8\ufe0f", "\u2139\ufe0f", "\u2600\ufe0e"]  # fmt: skip


@pytest.mark.parametrize("before", ["", " ", "so ", "!", "\n", "\U0001f600", "\u2764\ufe0f"])
@pytest.mark.parametrize("emoji", EMOJI)
def test_no_emoji_is_cut(emoji, before):
    text = f"{before}{emoji}love"
    words = [text[begin:end] for _, (begin, end) in pre_tokenizer().pre_tokenize_str(text)]
    assert "".join(words) == text
    assert any(emoji in word for word in words)


def test_an_emoji_that_is_frequent_becomes_a_token():
    tokenizer = train_tokenizer(as_text("I \u2764\ufe0f you. " * 50), TokenizerRecipe(vocab_size=268), 0)
    assert [tokenizer.decode(i) for i in ids_of(tokenizer, "We \u2764\ufe0f")[0][-1:]] == [" \u2764\ufe0f"]


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_only_texts_with_emoji_of_several_characters_are_split_otherwise_than_before(text):
    _, before = map(pre_tokenizer, GROUPED_PATTERNS)
    for plain in (text, text.replace("\ufe0f", "").replace("\ufe0e", "").replace("\u20e3", "")):
        if plain != text or not set(text) & set("\ufe0e\ufe0f\u20e3"):
            assert pre_tokenizer().pre_tokenize_str(plain) == before.pre_tokenize_str(plain)


def test_tokenizers_that_were_saved_before_are_encoded_as_they_were(tokenizer, documents):
    def as_before(state: dict) -> None:
        state["pre_tokenizer"] = json.loads(pre_tokenizer(before).__getstate__())

    _, before = GROUPED_PATTERNS
    old = wrap_tokenizer(Tokenizer.from_str(json.dumps(changed(tokenizer, as_before))))
    encoder = Encoder(old.backend_tokenizer, 10**9)
    assert encoder.can_cut
    assert encoder.fast is not None
    texts = [documents[0].text, "a \u2764\ufe0f b 1\ufe0f\u20e3"]
    assert ids_of(old, *texts) == saved_ids(old, *texts)


def test_a_long_word_trains_in_pieces_and_is_encoded_whole():
    text = "".join(map(str, range(3000))).translate({ord(str(i)): "abcdefghij"[i] for i in range(10)})
    tokenizer = train_tokenizer(as_text(text), TokenizerRecipe(), 0)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert state["pre_tokenizer"] == json.loads(pre_tokenizer().__getstate__())
    assert ids_of(tokenizer, text) == saved_ids(tokenizer, text)


def test_tokens_too_long_to_be_proved_are_left_to_the_tokenizer(tokenizer):
    def with_long_tokens(state: dict) -> None:
        model = state["model"]
        for i in range(13):  # a, aa, aaaa, ...
            part = "a" * 2**i
            model["vocab"].setdefault(2 * part, max(model["vocab"].values()) + 1)
            model["merges"].append([part, part])

    state = changed(tokenizer, with_long_tokens)
    assert ranks_of(state) is None
    slow = wrap_tokenizer(Tokenizer.from_str(json.dumps(state)))
    assert ids_of(slow, "a" * 20_000 + " b") == saved_ids(slow, "a" * 20_000 + " b")
