"""Promise: what the README and the guides show is what happens. Their code runs here, in short form.

Each page runs in a folder of its own that holds the texts its commands name, block after block. Blocks of
`bash` and `python` run; blocks of `shell` (which need a cluster) and `text` (output) do not.
"""

import random
import re
import shlex
import shutil
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
from support.runs import SMALL

from hf_genlm.cli.main import main, parse
from hf_genlm.text import sources

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "recipes" / "guides").glob("*.md"))
PAGES = [README, *GUIDES]
MAX_README_WORDS = 1500
# words of a command that is only parsed, and why it does not run here
PARSED_ONLY = {
    "owner/": "needs the Hub",
    "USER/MODEL": "tests/hub runs it against a Hub on the loopback interface",
    " serve ": "runs until it is stopped; tests/cli",
    " chat ": "is interactive; tests/cli",
    "--processes": "tests/training runs several processes",
    "--resume": "the run before it is complete",
    "export": "tests/exporting runs it",
    "--epsilon": "tests/privacy runs it",
    "range": "tests/long_range runs it",
    "compare": "tests/comparison runs it",
}
SHORT = [word for assignment in SMALL if "steps" not in assignment for word in ("--set", assignment)]
TRAINING = {"train"}
# syllables of two made-up languages
LANGUAGES = {"fra": "le la ma tou bre ché ir eau que vi", "swh": "pa ka na ba ha ri mwe nzi ku ta"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    """The words of each `hf-genlm ...` of a block, without the program's name."""
    found = re.findall(r"hf-genlm ([^&#\n]+)", block)
    return [shlex.split(command) for command in found]


def shortened(words: list[str]) -> list[str]:
    """The same command for a run of seconds: few steps, a tiny model."""
    if words[0] not in TRAINING:
        return words
    words = list(words)
    for option in ("--minutes", "--tokens", "--size", "--steps"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return [*words, "--steps", "6", *(SHORT if "--from" not in words else SHORT[-6:])]


@pytest.fixture
def material(tmp_path, monkeypatch):
    """The folder of a reader who follows a guide: texts, vectors, pairs, a trained `my-model`."""
    monkeypatch.chdir(tmp_path)
    for folder in ("my-texts", "letters", "train_10M", "blimp"):
        (tmp_path / folder).mkdir()
    documents = [text for _, text in sorted(topics.items())[:12]]
    for i, text in enumerate(documents):
        (tmp_path / "my-texts" / f"{i}.txt").write_text(text, encoding="utf-8")
        (tmp_path / "letters" / f"{i}.txt").write_text(text, encoding="utf-8")
        (tmp_path / "train_10M" / f"{i}.train").write_text(text, encoding="utf-8")
    for name, text in {"dev": documents[0], "seen": documents[1] * 4, "unseen": documents[2] * 4,
                       "other-text": documents[3], "old-text": documents[4]}.items():  # fmt: skip
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    for code, syllables in LANGUAGES.items():
        draw = random.Random(code)
        words = ["".join(draw.choices(syllables.split(), k=draw.randint(1, 4))) for _ in range(300)]
        lines = [" ".join(draw.choices(words, k=6)) for _ in range(400)]
        (tmp_path / f"{code}.txt").write_text("\n".join(lines), encoding="utf-8")
        (tmp_path / f"parallel-{code}.txt").write_text("\n".join(lines[:20]), encoding="utf-8")
    shutil.copy(tmp_path / "swh.txt", tmp_path / "new-language.txt")
    (tmp_path / "glove.txt").write_text("the 0.1 0.2 0.3 0.4\nof 0.4 0.3 0.2 0.1\n", encoding="utf-8")
    said = '{"messages": [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "%d."}]}\n'
    (tmp_path / "chats.jsonl").write_text("".join(said % (i, i) for i in range(40)))
    (tmp_path / "blimp" / "pairs.jsonl").write_text(
        '{"sentence_good": "the names are", "sentence_bad": "the names is", "UID": "agreement"}\n'
    )
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("guides"))
    # without a source, a command reads the library of this Python: here, some of it (tests/text has all)
    library = Path(sysconfig.get_path("stdlib"))
    for path in (*library.glob("json/*.py"), library / "pydoc_data" / "topics.py"):
        (tmp_path / "library" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "library" / path.parent.name)
    monkeypatch.setattr(sources, "sysconfig", SimpleNamespace(get_path=lambda name: tmp_path / "library"))
    return tmp_path


@pytest.fixture(scope="session")
def trained_model(text_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("guides") / "my-model"
    assert main(["train", str(text_folder), "--out", str(out), "--steps", "6", *SHORT]) == 0
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page):
    for _, block in (b for b in blocks(page) if b[0] in ("bash", "shell")):
        for words in commands(block):
            parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_of_a_page_runs(page, material, trained_model):
    names = {"__name__": "__guide__"}
    makes_model = any("--out my-model\n" in block for _, block in blocks(page))
    if not makes_model:
        shutil.copytree(trained_model, material / "my-model")
    for language, block in blocks(page):
        if language == "python":
            block = re.sub(r"minutes=[\d.]+", "steps=6, training=SMALL_TRAINING, model=SMALL_MODEL", block)
            names |= {"SMALL_TRAINING": small("training"), "SMALL_MODEL": small("model")}
            exec(compile(block, page.name, "exec"), names)
        if language == "bash":
            for words in commands(block):
                if not any(word in f" {' '.join(words)} " for word in PARSED_ONLY):
                    assert main(shortened(words)) == 0, words


def small(section: str) -> dict[str, str]:
    """The fields of a section that make a run small."""
    pairs = (assignment.split("=") for assignment in SMALL if assignment.startswith(section + "."))
    return {name.split(".")[1]: value for name, value in pairs if not name.endswith(".steps")}


@pytest.mark.slow
def test_the_first_command_reaches_its_figure(tmp_path, monkeypatch):
    """Within a tenth of a bit of the README's headline, on an idle machine."""
    monkeypatch.chdir(tmp_path)
    headline = float(re.search(r"\*\*([\d.]+) ± [\d.]+ bits per byte\*\*", README.read_text("utf-8"))[1])
    assert main(commands(blocks(README)[0][1])[0]) == 0
    import hf_genlm

    assert hf_genlm.Run("my-model").metrics["bits_per_byte"].value == pytest.approx(headline, abs=0.1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_the_readme_is_short_and_shows_a_result():
    words = README.read_text(encoding="utf-8").split()
    assert len(words) <= MAX_README_WORDS
    first_screen = "\n".join(README.read_text(encoding="utf-8").splitlines()[:40])
    assert "bits per byte" in first_screen
    assert first_screen.count("```bash") == 2


def test_the_picture_of_the_package_names_every_module():
    picture = (ROOT / "hf_genlm" / "README.md").read_text(encoding="utf-8").split("```")[1]
    for file in (ROOT / "hf_genlm").rglob("*.py"):
        name = file.stem.removesuffix("_genlm")
        is_part = "metrics" in file.parts or "files" in file.parts or name.startswith("__")
        assert is_part or re.search(rf"\b{name}\b", picture), file


def test_files_and_tables_that_the_architecture_names_exist():
    text = (ROOT / "hf_genlm" / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:\w+/)+\w+\.\w+)`", text):
        assert (ROOT / "hf_genlm" / path).is_file() or (ROOT / path).is_file(), path
    for table, path in re.findall(r"`([A-Z_]+)` in `([\w/]+\.py)`", text):
        assert re.search(rf"^{table}\b", (ROOT / "hf_genlm" / path).read_text("utf-8"), re.MULTILINE), table
