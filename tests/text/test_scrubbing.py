"""Promise: with `corpus.scrub`, what a detector describes is in no text that is trained or measured on."""

import copy
import ipaddress
import json
import random
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.text.corpus import read_corpus, read_documents
from hf_genlm.text.scrubbing import (
    CARDS,
    DETECTORS,
    IBAN_LENGTHS,
    ISSUERS,
    PLUGINS,
    Scrubber,
    Tally,
    iban_remainder,
    luhn_sum,
    secret_patterns,
)
from hf_genlm.text.streaming import read_stream, sample
from hf_genlm.training.check import check

pytest.importorskip("detect_secrets")
phonenumbers = pytest.importorskip("phonenumbers")

KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA7bq\nx1Yw==\n-----END RSA PRIVATE KEY-----"
LETTERS = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8s9T0u1V2w3X4y5Z6a7B8c9D0e1F2g3H4"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"

# a text, and what becomes of it by all detectors
FOUND = {
    "secret": {
        f"HF_TOKEN=hf_{LETTERS[:34]} #": "HF_TOKEN=<SECRET> #",
        f"ghp_{LETTERS[:36]}": "<SECRET>",
        f"github_pat_{LETTERS[:36]}": "<SECRET>",
        "id AKIAIOSFODNN7EXAMPLE.": "id <SECRET>.",
        "aws_key = 'wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY'": "aws_key = '<SECRET>'",
        "redis://user:pa55@cache.example.com/0": "redis://<SECRET>/0",
        f"before\n{KEY}\nafter": "before\n<SECRET>\nafter",
        "-----BEGIN PRIVATE KEY-----\nMIIEowIBAAKCAQEA7bq\nMIIEowIBAAKCAQEA7bq": "<SECRET>",
        f"Bearer {JWT}": "Bearer <SECRET>",
        f"ghp_{LETTERS}, longer than it is known to be": "<SECRET>, longer than it is known to be",
        f"sk_live_{LETTERS[:24]}": "<SECRET>",
        f"AIza{LETTERS[:35]}": "<SECRET>",
        f"glpat-{LETTERS[:20]}": "<SECRET>",
        "xoxb-123456789012-abcdefABCDEF": "<SECRET>",
        f"sk-ant-{LETTERS[:30]}": "<SECRET>",
        f"sk-eyJ-{LETTERS[:20]}T3BlbkFJ{LETTERS[:20]}": "<SECRET>",
        f"-eyJ-eyJ {JWT}": "-eyJ-eyJ <SECRET>",
        f"//registry.npmjs.org/:_authToken=npm_{LETTERS[:36]}\n": (
            "//registry.npmjs.org/:_authToken=<SECRET>\n"
        ),
    },
    "email": {
        "mail <o'brien+x@mail.example.co.uk>, or": "mail <<EMAIL>>, or",
        "mailto:jörg@müller.example.": "mailto:<EMAIL>.",
        "почта@пример.рф": "<EMAIL>",
        "a@b.xn--p1ai!": "<EMAIL>!",
    },
    "iban": {
        "to DE89 3704 0044 0532 0130 00 AND": "to <IBAN> AND",
        "GB29NWBK60161331926819;": "<IBAN>;",
        "NO93 8601 1117 947": "<IBAN>",
    },
    "card": {
        "4111 1111 1111 1111 exp": "<CARD> exp",
        "4111 1111 1111 1111 123": "<CARD> 123",
        "card:5555-5555-5555-4444,": "card:<CARD>,",
        "3782 822463 10005": "<CARD>",
        "6011111111111117.": "<CARD>.",
    },
    "ip": {
        "from 8.8.8.8.": "from <IP>.",
        "203.12.160.7:8080": "<IP>:8080",
        "[2001:4860:4860::8888]": "[<IP>]",
    },
    "phone": {
        "call +49 30 901820 now": "call <PHONE> now",
        "(+44) 20 7946 0018": "<PHONE>",
        "+1-212-555-0123": None,  # of a kind that no one is given: what phonenumbers says decides
        "tel:+33142685300": "tel:<PHONE>",
    },
}
# what looks like it
NOT_FOUND = [
    "@property\n    def x(self): return a@b",
    "user@localhost",
    "version 3.11.7 of 2026-11-25 12:30:00, build 3.11.7.1000",
    "4111 1111 1111 1112",  # Luhn
    "0.4111111111111111 and 1.4111111111111111e5",
    "0x4111111111111111",
    "4111111111111111222233334444",
    "DE89 3704 0044 0532 0130 01",  # mod 97
    "US89 3704 0044 0532 0130 00",  # no country with IBANs
    "127.0.0.1, 10.1.2.3, 192.168.1.1, 224.0.0.1, 300.1.1.1, 1.2.3.4.5",
    "::1 fe80::1 std::vector a[::2] 12:30:45",
    "+1 + 2 + 34567890123456789012",
    "hf_home, HF_TOKEN, ghp_short, AKIA",
    "-----BEGIN CERTIFICATE-----\nMIIEowIBAAKCAQEA7bq\n-----END CERTIFICATE-----",
    "<EMAIL> <PHONE> <CARD> <IBAN> <IP> <SECRET>",
    "http://[::1]:80/, https://host:80/path@2",
]
ALL = Scrubber(CorpusRecipe(scrub=["all"]))


@pytest.mark.parametrize(
    ("kind", "text", "wanted"), [(kind, *pair) for kind in FOUND for pair in FOUND[kind].items()]
)
def test_what_is_found(kind, text, wanted):
    tally = Tally()
    found = ALL.scrub(text, tally)
    if wanted is None:
        number = phonenumbers.parse(text)
        wanted = "<PHONE>" if phonenumbers.is_valid_number(number) else text
    assert found == wanted
    assert tally.types == ({kind: 1} if found != text else {})


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_only_looks_like_it(text):
    assert ALL.scrub(text) == text


def test_every_detector_has_its_rows():
    assert list(FOUND) == list(DETECTORS)


def check_digit(number: str) -> str:
    """By the definition: the digit that makes the Luhn sum a multiple of ten, found by trying all."""
    return next(d for d in string.digits if by_hand(number + d) % 10 == 0)


def by_hand(digits: str) -> int:
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 else 1)
        total += value - 9 if value > 9 else value
    return total


@given(st.text(string.digits, min_size=1, max_size=30))
def test_luhn_is_its_definition(digits):
    assert luhn_sum(digits) == by_hand(digits)
    assert luhn_sum("79927398713") == 70, "the example of ISO/IEC 7812-1"


@st.composite
def card_numbers(draw):
    first, last, lengths = draw(st.sampled_from(ISSUERS))
    head = str(draw(st.integers(int(first), int(last))))
    length = draw(st.sampled_from(lengths))
    body = head + draw(
        st.text(string.digits, min_size=length - len(head) - 1, max_size=length - len(head) - 1)
    )
    number = body + check_digit(body)
    if length != 16:
        return number
    sign = draw(st.sampled_from(["", " ", "-"]))
    return sign.join(number[i : i + 4] for i in range(0, 16, 4))


@st.composite
def account_numbers(draw):
    country = draw(st.sampled_from(sorted(IBAN_LENGTHS)))
    size = IBAN_LENGTHS[country] - 4
    rest = draw(st.text(string.digits + string.ascii_uppercase, min_size=size, max_size=size))
    plain = "".join(str(int(c, 36)) for c in rest + country)
    number = f"{country}{98 - int(plain + '00') % 97:02d}{rest}"
    return " ".join(number[i : i + 4] for i in range(0, len(number), 4)) if draw(st.booleans()) else number


label = st.text(string.ascii_lowercase + string.digits + "äß", min_size=1, max_size=12)
mails = st.builds(
    lambda local, more, domain, top: f"{local}{more}@{domain}.{top}",
    label,
    st.sampled_from(["", ".x", "+tag", "_1", "-y"]),
    label,
    st.sampled_from(["com", "org", "de", "info", "xn--p1ai"]),
)
GENERATED = {"card": card_numbers(), "iban": account_numbers(), "email": mails}


@pytest.mark.parametrize("kind", GENERATED)
def test_valid_ones_are_always_found(kind):
    @settings(max_examples=150, deadline=None)
    @given(GENERATED[kind], st.sampled_from([("", ""), ("a ", " b"), ("(", ")"), ("\n", "\n"), ("=", ",")]))
    def holds(value, around):
        found = Scrubber(CorpusRecipe(scrub=[kind])).scrub(value.join(around))
        assert found == f"<{kind.upper()}>".join(around)

    holds()


@settings(max_examples=100, deadline=None)
@given(account_numbers(), st.integers(0, 40), st.sampled_from(string.digits))
def test_one_wrong_digit_is_never_an_account_number(number, place, digit):
    place %= len(number)
    wrong = number[:place] + digit + number[place + 1 :]
    if number[place].isdigit() and wrong != number:
        assert iban_remainder(wrong) != 1


@given(st.ip_addresses(v=4))
def test_addresses_on_the_internet_are_found_and_no_others(address):
    is_public = address.is_global and not address.is_multicast
    assert ALL.scrub(f"at {address} ,") == ("at <IP> ," if is_public else f"at {address} ,")
    assert ipaddress.ip_address("8.8.8.8").is_global


PHONE_TEXTS = [
    "Büro: 030 901820, mobil 0151 23456789; Fax: 030/901820-22 ext. 3",
    "(212) 664-7665 or 212.664.7665 and +44 20 7946 0018 x12, 12 34 56 +49 30 901820 78",
    "Row 1 2 3 4 5 6 7 8 9 10 11 12 13 14 and 2026-11-25 08:00:15, pages 211-227 (2003).",
    "x" * 200 + " +49 30 901820 " + "y" * 200 + " +49 30 901821\n+33 1 42 68 53 00",
    "٠٣٠ ٩٠١٨٢٠ \uff0b49 30 901820",
]


@pytest.mark.parametrize("regions", [[], ["DE"], ["US", "DE"]])
@pytest.mark.parametrize("text", PHONE_TEXTS)
def test_windows_find_what_the_whole_text_does(text, regions):
    recipe = CorpusRecipe(phone_regions=regions)
    whole = {
        (match.start, match.end)
        for region in regions or [None]
        for match in phonenumbers.PhoneNumberMatcher(text, region)
        if sum(c.isdigit() for c in match.raw_string) >= 7
    }
    assert set(DETECTORS["phone"](text, recipe)) == whole
    assert whole or "Row" in text or not regions


def test_the_words_of_a_secret_stand_in_every_one():
    """A pattern is only tried where one of its words stands: each positive has one, by the pattern itself."""
    texts = list(FOUND["secret"])
    for pattern, words in secret_patterns():
        for text in texts:
            found = pattern.search(text)
            if found is not None and found.lastgroup != "skipped":
                assert any(word in text.lower() for word in words), pattern.pattern
    assert len(secret_patterns()) > len(PLUGINS)


POSITIVES = [text for rows in FOUND.values() for text in rows]


UNENDED = KEY[: KEY.index("-----END")]
# a key without an end goes as far as the end of the next one, which may lie beyond a piece
WITHIN_REACH = [text for text in POSITIVES if ("-----BEGIN" in text) == ("-----END" in text)]


@given(st.lists(st.sampled_from([*WITHIN_REACH, "\n", " and ", "x" * 50, KEY])), st.data())
@settings(max_examples=60, deadline=None)
def test_parts_do_not_matter(texts, data):
    text = "\n".join(texts)
    in_pieces = Scrubber(ALL.recipe, piece_length=400, max_lookback=390)
    whole = "".join(in_pieces.scrub_parts([text]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(in_pieces.scrub_parts(parts)) == whole
    assert whole == ALL.scrub(text), "a piece ends where nothing is cut"


def test_a_piece_ends_before_the_first_of_keys_that_have_begun():
    in_pieces = Scrubber(ALL.recipe, piece_length=400, max_lookback=390)
    text = "a line of text\n" * 20 + UNENDED + KEY
    assert len(text) > 400 > text.rindex("-----BEGIN")
    assert "".join(in_pieces.scrub_parts([text])) == ALL.scrub(text) == "a line of text\n" * 20 + "<SECRET>"


def test_a_line_without_end_takes_bounded_memory():
    in_pieces = Scrubber(ALL.recipe, piece_length=1000, max_lookback=100)
    pieces = list(in_pieces.scrub_parts("x" * 10 for _ in range(1000)))
    assert "".join(pieces) == "x" * 10_000
    assert max(map(len, pieces)) == 1000


def test_spans_that_meet_go_together():
    """A login before a host looks like a mail address too: nothing of either is left."""
    assert ALL.scrub("ftp://me:secret-word@example.com/x") == "ftp://<SECRET>/x"
    mail_only = Scrubber(CorpusRecipe(scrub=["email"]))
    assert mail_only.scrub("ftp://me:word@example.com/x") == "ftp://me:<EMAIL>/x"


# the corpus


def write_texts(folder: Path) -> list[str]:
    texts = [f"document {i} of nobody{i}@example.org, 10 words more\n" + "word " * i for i in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "b.txt").write_text("DE89 3704 0044 0532 0130 00 at 8.8.8.8\n", encoding="utf-8")
    return texts


def test_both_splits_are_scrubbed_and_counted(tmp_path):
    write_texts(tmp_path)
    corpus = read_corpus(CorpusRecipe(sources=[str(tmp_path)], scrub=["all"], validation_fraction=0.2))
    written = [document.text for split in (corpus.train, corpus.validation) for document in split]
    assert len(corpus.validation) > 1
    assert not any("@" in text or "8.8.8.8" in text for text in written)
    assert sum(text.count("<EMAIL>") for text in written) == 60
    report = corpus.report["scrubbed"]
    assert report["types"] == {"secret": 0, "email": 60, "iban": 1, "card": 0, "ip": 1, "phone": 0}
    assert report["documents"] == 61
    assert report["splits"] == ["train", "validation"]
    assert set(report["libraries"]) == {"detect-secrets", "phonenumbers"}
    assert corpus.report["train"]["bytes"] == sum(len(d.text.encode()) for d in corpus.train)
    json.dumps(corpus.report)


def test_validation_files_that_are_named_are_scrubbed(tmp_path):
    (tmp_path / "train.txt").write_text("training text of train@example.org\n")
    (tmp_path / "held.txt").write_text("validation text of held@example.org\n")
    sources = {"sources": [str(tmp_path / "train.txt")], "validation": [str(tmp_path / "held.txt")]}
    corpus = read_corpus(CorpusRecipe(**sources, scrub=["email"]))
    assert [document.text for document in corpus.validation] == ["validation text of <EMAIL>\n"]
    assert corpus.report["scrubbed"]["types"] == {"email": 2}
    streamed = read_stream(CorpusRecipe(**sources, scrub=["email"], stream=True))
    assert [document.text for document in streamed.validation] == ["validation text of <EMAIL>\n"]


def test_every_format_is_scrubbed(tmp_path):
    import gzip

    import pyarrow as pa
    from pyarrow import parquet

    text = "write to me@example.org\n"
    for suffix in (".txt", ".md", ".py"):
        (tmp_path / f"a{suffix}").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": text}))
    parquet.write_table(pa.table({"text": [text]}), tmp_path / "d.parquet")
    documents, report = read_documents([str(tmp_path)], CorpusRecipe(scrub=["email"]))
    assert [document.text for document in documents] == ["write to <EMAIL>\n"] * 6
    assert report["scrubbed"]["types"] == {"email": 6}


def test_what_is_damaged_is_not_counted(tmp_path):
    """A file that turns out to be no text is left out whole, and so is what was replaced in it."""
    (tmp_path / "good.txt").write_text("me@example.org " * 10)
    (tmp_path / "bad.txt").write_bytes(b"me@example.org \n" + b"word \n" * 400_000 + b"\xff")
    recipe = CorpusRecipe(scrub=["email"], damaged="skip")
    _, report = read_documents([str(tmp_path)], recipe)
    assert report["damaged"]["files"] == 1, "found in its second part"
    assert report["scrubbed"]["types"] == {"email": 10}


def test_a_stream_is_scrubbed_and_its_place_knows_it(tmp_path):
    texts = write_texts(tmp_path)
    recipe = CorpusRecipe(sources=[str(tmp_path)], stream=True, validation_fraction=0.2)
    scrubbed = read_stream(CorpusRecipe(**{**vars(recipe), "scrub": ["all"]}))
    plain = read_stream(recipe)
    read = [document.text for document in sample(scrubbed.stream, 100_000)[0]]
    assert len(read) + len(scrubbed.validation) == len(texts) + 1
    assert not any("@" in text for text in [*read, *(d.text for d in scrubbed.validation)])
    assert scrubbed.report["scrubbed"]["types"]["email"] is None
    assert scrubbed.stream.sha256 != plain.stream.sha256
    other = read_stream(CorpusRecipe(**{**vars(recipe), "scrub": ["email"]}))
    assert other.stream.sha256 != scrubbed.stream.sha256
    copied = copy.deepcopy(scrubbed.stream)
    assert copied.sha256 == scrubbed.stream.sha256


def test_without_the_option_nothing_changes(tmp_path, monkeypatch):
    """Hashes that were taken before there was one: every cache key and resumed run goes by them."""
    texts = write_texts(tmp_path)
    corpus = read_corpus(CorpusRecipe(sources=[str(tmp_path)]))
    assert {"scrubbed", "near_duplicates"}.isdisjoint(corpus.report)
    written = [document.text for split in (corpus.train, corpus.validation) for document in split]
    assert sorted(written) == sorted([*texts, "DE89 3704 0044 0532 0130 00 at 8.8.8.8\n"])
    assert corpus.report["train"]["sha256"] == TRAIN_SHA256
    monkeypatch.chdir(tmp_path)
    stream = read_stream(CorpusRecipe(sources=["a.jsonl", "b.txt"], stream=True)).stream
    assert stream.sha256 == STREAM_SHA256


TRAIN_SHA256 = "6ddc8a76625c7ce4dfe0811ac01de39d794586f64530eb7bf051729454357435"
STREAM_SHA256 = "164ea01d63876514f6f51fa5a87daf6244b7596c50aa162baa80ad2fad224f9b"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scrub": ["emial"]}, ["corpus.scrub", "'email'"]),
        ({"scrub": ["phone"], "phone_regions": ["de"]}, ["'de'", "ISO 3166"]),
        ({"scrub": ["email"], "phone_regions": ["DE"]}, ["phone_regions", "corpus.scrub"]),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(fields, words):
    from hf_genlm.config.recipe import Recipe, TrainingRecipe

    with pytest.raises(UserError) as caught:
        check(Recipe(corpus=CorpusRecipe(**fields), training=TrainingRecipe(steps=1)))
    assert all(word in str(caught.value) for word in words)


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the extra \[privacy\]"):
        Scrubber(CorpusRecipe(scrub=["all"]))
    assert Scrubber(CorpusRecipe(scrub=["email"])).scrub("a@b.org") == "<EMAIL>", "which needs none"


def test_the_library_of_python_keeps_its_code():
    """False alarms on 12 MB of source: what is replaced there is nearly all an address."""
    documents, report = read_documents([], CorpusRecipe(scrub=["all"]))
    plain, _ = read_documents([], CorpusRecipe())
    types = report["scrubbed"]["types"]
    assert types["secret"] == types["iban"] == types["card"] == 0
    assert types["phone"] <= 2
    assert types["ip"] <= 20
    n_before, n_after = (sum(text.text.count("@") for text in each) for each in (plain, documents))
    assert 100 < n_before - n_after <= 2 * types["email"], "decorators and matrix products stay"


def test_the_card_patterns_are_anchored():
    generator = random.Random(0)
    digits = "".join(generator.choice(string.digits) for _ in range(5000))
    assert not any(pattern.search(digits) for pattern in CARDS)
