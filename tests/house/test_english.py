"""Promise: docstrings are plain technical English that a colleague reads once."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "hf_genlm").rglob("*.py"))
RIDDLES = re.compile(r"(What|How|Where|That|Of|As|Whether)\b")
# words of our former dialect, and the field's word for each
DIALECT = {
    r"learned by heart": "memorised, overfits",
    r"behind one another": "concatenated",
    r"tell(s|ing)? each other": "exchange, all-reduce",
    r"told apart": "distinguished",
    r"no finite number": "NaN or infinite",
    r"leaves? the numbers": "becomes NaN or infinite",
    r"most_passes": "max_epochs",
    r"row_length": "max_seq_length",
    r"the_one": "unwrap_batch",
    r"is_again": "is_resuming",
    r"parcel": "upload manifest",
    r"training\.start\b": "training.init",
    r"by the clock": "with a time budget",
    r"\bgo(es)? on (with|from)\b": "continue, resume",
}


def docstrings(source: str):
    """(line, docstring) of a module and of all of its classes and functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def riddles(source: str) -> list[str]:
    return [f"{line}: {text.splitlines()[0]}" for line, text in docstrings(source) if RIDDLES.match(text)]


def dialect(source: str) -> list[str]:
    return [found[0] for word in DIALECT for found in re.finditer(word, source, flags=re.IGNORECASE)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_first_lines_say_what_a_thing_is(file):
    assert not riddles(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_words_of_the_old_dialect_are_gone(file):
    assert not dialect(file.read_text(encoding="utf-8"))


def test_the_checks_can_fail():
    assert riddles('def f():\n    """What a push takes from where."""')
    assert not riddles('def f():\n    """Select the files to push."""')
    assert dialect("# a text that is learned by heart")
