"""Promise: what the README shows is what happens."""

import re
import shlex
from pathlib import Path

import pytest
from support.runs import SMALL

from hf_genlm.cli.main import main, parse
from hf_genlm.evaluation.measurement import read_measurements

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [content for name, content in fenced if name == language]


def commands() -> list[list[str]]:
    """Every `hf-genlm ...` of the README, as words."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    found = re.findall(r"hf-genlm ([^&#\n]+)", "\n".join(lines))
    return [shlex.split(command) for command in found]


def main_command() -> list[str]:
    return commands()[0]


def test_every_command_is_understood():
    assert len(commands()) >= 5
    for words in commands():
        assert parse(words)["verb"] == words[0]


def test_main_command_and_snippets_in_short_form(tmp_path, monkeypatch):
    """The first command on the embedded default with less time and a smaller model, then all Python
    blocks."""
    monkeypatch.chdir(tmp_path)
    words = main_command()
    assert "--minutes" in words
    words[words.index("--minutes") + 1] = "0.1"
    small = [word for assignment in SMALL[1:-3] for word in ("--set", assignment)]
    assert main([*words, *small]) == 0
    snippets = blocks("python")
    assert len(snippets) >= 2
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {"__name__": "__readme__"})
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


@pytest.mark.slow
def test_main_command_reaches_its_figure(tmp_path, monkeypatch):
    """At most 1.9 bits per byte on the library source of CPython."""
    monkeypatch.chdir(tmp_path)
    assert main(main_command()) == 0
    values = {m.name: m.value for m in read_measurements(tmp_path / "my-model" / "evaluation.json")}
    assert values["bits_per_byte"] <= 1.9


def test_the_house_is_as_drawn():
    """Every module has its name in the picture."""
    (picture,) = (block for block in blocks("") if "cli" in block)
    for file in (ROOT / "hf_genlm").rglob("*.py"):
        name = file.stem.removesuffix("_genlm")
        if name != "__init__":
            assert re.search(rf"\b{name}\b", picture), file


def test_paths_of_the_table_exist():
    for path in re.findall(r"`((?:model|text|training|evaluation|publish|decoding)/[\w/]+\.\w+)`", README):
        assert (ROOT / "hf_genlm" / path).is_file(), path
