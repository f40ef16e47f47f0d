"""Promise: no text makes the package slow: time grows linearly with it, however it is made.

Every regular expression of the package is collected from the modules, and every detector from its table: a
new one is tested unasked.
"""

import ast
import inspect
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import regex
from support.growth import (
    Attack,
    attacks_on,
    methods_used,
    modules,
    patterns_in_functions,
    patterns_of,
    repeated,
    too_fast_growth,
)

pytest.importorskip("detect_secrets")
pytest.importorskip("phonenumbers")

from hf_genlm.config.recipe import CorpusRecipe, TokenizerRecipe
from hf_genlm.evaluation import text_statistics
from hf_genlm.hub import manifest
from hf_genlm.text import encoding, fast_bpe, scrubbing
from hf_genlm.text.duplicates import shingles_of
from hf_genlm.text.store import Document
from hf_genlm.text.tokenizer import train_tokenizer

MODULES = {module.__name__.removeprefix("hf_genlm."): module for module in modules()}
SOURCES = [inspect.getsource(module) for module in MODULES.values()]
# functions that compose a pattern: module and line's function -> patterns that it may compose
COMPOSED = {
    ("text.formats", "compile"): [r"(?m)^[ \t\r]*<\|endoftext\|>[ \t\r]*(?:\n|\Z)"],
    ("text.encoding", "split"): [r"(<\|endoftext\|>|<\|assistant\|>|<\|pad\|>)"],
    ("text.encoding", "compile"): [r"<\|endoftext\|>|<\|assistant\|>|<\|pad\|>"],
    ("evaluation.languages", "findall"): [r"\p{Script=Latin}"],
    ("text.scrubbing", "compile"): [scrubbing._iban_tail(length).pattern for length in (11, 29)],
}


def slow(runs: dict[str, Callable[[str], Any]], attacks: dict[Any, Attack], **bounds: int) -> list[str]:
    found = []
    for name, run in runs.items():
        for attack in attacks.values():
            grown = too_fast_growth(run, attack, **bounds)
            if grown is not None:
                found.append(f"{name}: {grown}")
                break
    return found


def uses_of(pattern: Any, methods: set[str]) -> dict[str, Callable[[str], Any]]:
    """The pattern as the package uses it: searched from every place, or at one place only."""

    def as_read(text: str) -> Any:
        return text.encode() if isinstance(pattern.pattern, bytes) else text

    anchored = {"match", "fullmatch"} & methods or {"fullmatch"}
    runs: dict[str, Callable[[str], Any]] = {
        "match": lambda text: pattern.match(as_read(text)),
        "fullmatch": lambda text: pattern.fullmatch(as_read(text)),
        "finditer": lambda text: sum(1 for _ in pattern.finditer(as_read(text))),
    }
    chosen = {name for name in anchored if not methods or name in methods}
    chosen |= {"finditer"} if not methods or methods - anchored else set()
    return {name: runs[name] for name in runs if name in chosen}


@pytest.mark.parametrize("name", MODULES)
def test_every_pattern_is_linear(name):
    module = MODULES[name]
    found = []
    for where, pattern in patterns_of(module).items():
        methods = methods_used(where.split("[")[0], SOURCES)
        text = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
        found += [
            f"{where} {message}"
            for message in slow(uses_of(pattern, methods), attacks_on(text, pattern.flags))
        ]
    for line, function, text in patterns_in_functions(module):
        texts = COMPOSED.get((name, function), []) if text is None else [text]
        assert texts, f"{name}:{line} composes a pattern: state in COMPOSED what it may compose"
        for one in texts:
            engine = regex if r"\p{" in one else re
            methods = {"fullmatch" if function == "fullmatch" else "search"}
            found += slow(uses_of(engine.compile(one), methods), attacks_on(one))
    assert not found, "\n".join(found)


def test_patterns_are_collected():
    """The collection sees patterns in tables, in functions, and those of other libraries that we use."""
    held = patterns_of(MODULES["text.scrubbing"])
    assert {"_DOMAIN[0]", "CARDS[3]"} <= held.keys()
    assert "_TOKENS[9]" in patterns_of(manifest)
    tree = ast.parse(inspect.getsource(MODULES["config.fields"]))
    n_uses = sum(isinstance(node, ast.Attribute) and node.attr == "fullmatch" for node in ast.walk(tree))
    assert len(list(patterns_in_functions(MODULES["config.fields"]))) == n_uses > 0


SLOW = {
    r"eyJ[\w=-]+\.[\w=-]+": "finditer",
    r"\/\/.+\/:_authToken=\s*((npm_.+)|([A-Fa-f0-9-]{36})).*": "finditer",
    r"sk-[A-Za-z0-9-_]*[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}": "finditer",
    r"-----BEGIN KEY-----(?:[\s\S]{0,65536}?-----END KEY-----)": "finditer",
    r"\S+://\S+": "finditer",
    r"\w[\w.%+-]*(?:'[\w.%+-]+)*\Z": "search",
    r"(?:a+)+b": "fullmatch",
    r"[\w.\\-]*([/\\][\w.\\-]+)+/?": "fullmatch",
    r"(?:\w|\d\d?)+!": "fullmatch",
}


@pytest.mark.parametrize("pattern", SLOW)
def test_a_slow_pattern_is_noticed(pattern):
    """The test can fail: patterns that were quadratic, cubic or exponential here and elsewhere."""
    assert slow(uses_of(re.compile(pattern), {SLOW[pattern]}), attacks_on(pattern))


# detectors

POSITIVES = {
    "secret": [
        "-eyJ", "eyJa.a.a", "/:_authToken=", "//:_authToken= ", "//a/:_authToken=npm_", "sk-T3BlbkFJ", "sk-",
        "-----BEGIN PRIVATE KEY-----", "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA7bq\n",
        "-----END PRIVATE KEY-----", "AC" + "a" * 32, "ghp_" + "a1" * 18, "hf_" + "a" * 20, "a://b:c@",
        "xoxa-1-", "aws key'", "M" * 30 + ".", "1234567890:", "glpat-" + "a" * 20,
    ],
    "email": ["a@b.cd", "@a.", "a'", "a" * 127 + " @a.bc ", "@xn--a.", "a@"],
    "iban": ["DE89", "DE89 3704 0044 0532 0130 00", "DE89370400440532013000", "A1 "],
    "card": ["4111 1111 1111 1111 ", "41", "4-", "4111-"],
    "ip": ["1.1.1.1.", "8.8.8.8 ", "2001:", "2001::"],
    "phone": [
        "1", "+1", "+49 30 901820 ", "030 901820x12;", "1/1/1 ", "1 - ", "(1", "2012-01-02 08:00 ", "+",
    ],
}  # fmt: skip


def test_every_detector_has_positives():
    assert list(POSITIVES) == list(scrubbing.DETECTORS)


@pytest.mark.parametrize("kind", scrubbing.DETECTORS)
def test_every_detector_is_linear(kind):
    recipe = CorpusRecipe(scrub=[kind], phone_regions=["DE"] if kind == "phone" else [])
    scrubber = scrubbing.Scrubber(recipe)
    attacks = {unit: repeated(unit) for unit in [*POSITIVES[kind], *map(" ".join, [POSITIVES[kind]])]}
    attacks |= {("line", unit): repeated(unit, "\n", "\n") for unit in POSITIVES[kind]}
    n = 1 << (13 if kind == "phone" else 16)
    found = slow({kind: scrubber.scrub}, attacks, max_characters=n)
    assert not found, "\n".join(found)


SECRETS = scrubbing.secret_patterns()


@pytest.mark.parametrize("number", range(len(SECRETS)))
def test_every_pattern_of_a_secret_is_linear(number):
    """Those of detect-secrets included, on attacks of their own; and the whole detector on the same texts."""
    pattern, words = SECRETS[number]
    attacks = attacks_on(pattern.pattern, pattern.flags)
    assert not slow(uses_of(pattern, {"finditer"}), attacks)
    # a match is extended to the end of its word, which is the whole text
    drawn = random.Random(number).sample(sorted(attacks), min(12, len(attacks)))
    with_words = {key: (lambda n, a=attacks[key]: words[0] + "\n" + a(n)) for key in drawn}
    scrubber = scrubbing.Scrubber(CorpusRecipe(scrub=["secret"]))
    assert not slow({"secret": scrubber.scrub}, with_words, max_characters=1 << 13)


# functions of texts


@pytest.fixture(scope="module")
def encoder():
    text = "the time of the words grows with the words of the time " * 40
    tokenizer = train_tokenizer([Document(text, "x")], TokenizerRecipe(), 0)
    return encoding.Encoder(tokenizer.backend_tokenizer, 10**9)


def text_attacks() -> dict[Any, Attack]:
    """Texts that are hard for a tokenizer: long words of every class, and attacks on its pattern."""
    units = [
        "a",
        "ab1",
        "\u0301",
        "e\u0301",
        "\u4e00",
        "!",
        "=-",
        "1",
        " ",
        "\n",
        " \n",
        "\t ",
        "\r\n ",
        "'s",
    ]
    drawn = random.Random(0)
    letters = "".join(drawn.choices("abcdefghij", k=1 << 16))
    found: dict[Any, Attack] = {unit: repeated(unit) for unit in units}
    found["letters"] = lambda n: letters[:n]
    found["end"] = repeated(" ", "\n", "a")
    return found


def test_encoding_is_linear(encoder):
    assert encoder.fast is not None
    runs = {
        "tiktoken": lambda text: encoder.fast.encode([text]),
        "tokenizers": lambda text: encoder.encode_exactly([text]),
    }
    assert not slow(runs, text_attacks())
    assert not slow(runs, attacks_on(fast_bpe.PATTERN), max_characters=1 << 12)


@pytest.mark.parametrize("pattern", fast_bpe.PATTERNS)
def test_training_a_tokenizer_on_one_word_is_linear(pattern):
    recipe = TokenizerRecipe(pattern=pattern)
    attacks = {unit: attack for unit, attack in text_attacks().items() if unit in ("a", "!", " ", "letters")}

    def train(text: str) -> None:
        train_tokenizer([Document(text, "x")], recipe, 0)

    assert not slow({pattern: train}, attacks, max_characters=1 << 17)


def test_texts_are_read_in_linear_time():
    def parts(text: str) -> Iterator[str]:
        return (text[i : i + 4096] for i in range(0, len(text), 4096))

    def numbered(text: str) -> Iterator[tuple[int, str]]:
        return ((0, part) for part in parts(text))

    runs = {
        "shingles": lambda text: list(shingles_of(parts(text))),
        "words": lambda text: list(text_statistics.split_words_of_parts(numbered(text))),
        "pieces": lambda text: list(encoding.pieces_of_parts(parts(text))),
        "repetition": lambda text: text_statistics.repetition([text_statistics.split_words(text)], 4),
        "overlap": lambda text: text_statistics.measure_overlap([text[:2000]], [text]),
    }
    assert not slow(runs, text_attacks(), max_characters=1 << 17)


def test_the_manifest_reads_lines_in_linear_time(tmp_path):
    path = tmp_path / "README.md"

    def scan(text: str) -> None:
        path.write_text(text, encoding="utf-8")
        list(manifest._scan_lines(path, "README.md", ["a canary of some length"]))

    units = [
        "-eyJ",
        "sk-",
        "a://b:c@",
        "/home/",
        "C:\\Users\\",
        "/",
        "xoxb-",
        "hf_",
        "https://",
        "ghp_",
        "\\n",
    ]
    assert not slow({"manifest": scan}, {unit: repeated(unit) for unit in units})
