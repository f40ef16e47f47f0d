"""The promise: a committed card is that of a recipe that lies here, and says one thing of each number."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from support.cards import MEASURED, make_run, tables
from support.hub_metadata import faults_of, front_matter_of
from support.models import NETWORKS
from support.runs import SMALL

from hf_genlm.card import render_card
from hf_genlm.card.card import is_edited
from hf_genlm.card.wording import DEFINITIONS
from hf_genlm.cli.main import main
from hf_genlm.config.recipe import Recipe, load_recipe
from hf_genlm.evaluation.measurement import Measurement, write_measurements
from hf_genlm.report.document import prose
from hf_genlm.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

import make_cards  # noqa: E402

CARDS = sorted(make_cards.CARDS.glob("*.md"))
RECIPES = sorted(make_cards.RECIPES.glob("cpython-*.yaml"))
MOST_BYTES = 100_000  # of a picture that lies in the repository


def faults_of_card(card: Path, recipe: Path) -> list[str]:
    """What a card says otherwise than its recipe, or than itself; a line each."""
    text = card.read_text(encoding="utf-8")
    data = front_matter_of(text)
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", text, flags=re.S | re.M)
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    found = faults_of(data)
    found += faults_of_recipe(yaml.safe_load(shown), load_recipe(recipe))
    found += faults_of_numbers(text, data)
    found += [f"picture: {path}" for path in pictures if not _is_small_file(card.parent / path)]
    if f"hf-genlm train --recipe recipes/{recipe.name} --out " not in text:
        found.append("the command that makes it is missing")
    return found if pictures else [*found, "no picture"]


def faults_of_recipe(shown: dict, stated: Recipe) -> list[str]:
    """Fields of the recipe on a card that the file says otherwise; what the file leaves open was chosen, and
    a field that is younger than the card had its default."""
    found, defaults = [], Recipe().model_dump()
    for section, values in stated.model_dump().items():
        for key, value in values.items():
            on_card = shown.get(section, {}).get(key, defaults[section][key])
            if value is not None and on_card != value:
                found.append(f"{section}.{key}: {on_card!r} for {value!r}")
    return found


def faults_of_numbers(text: str, data: dict) -> list[str]:
    """Numbers of the table that are not those of the front matter, rounded, and the headline's."""
    (rows,) = (table[2:] for table in tables(text) if table[0][0] == "measurement")
    shown = {row[0]: row[1] for row in rows}
    found = []
    for result in data["model-index"][0]["results"]:
        for metric in result["metrics"]:
            figures = shown.pop(prose(metric["name"]), "")
            whole, point, digits = figures.partition(".")
            decimals = len(digits) if point else len(whole.rstrip("0,")) - len(whole)  # 24,700,000
            decimals += 0 if point else whole[len(whole.rstrip("0,")) :].count(",")
            if figures != f"{round(metric['value'], decimals):,.{len(digits)}f}":
                found.append(f"{metric['name']}: {figures} for {metric['value']}")
    found += [f"{name}: not in the front matter" for name, figures in shown.items() if figures != "unknown"]
    (headline,) = re.findall(r"\*\*([0-9.,]+) bits for each byte\*\*", text)
    by_name = {row[0]: row[1] for row in rows}
    return found if headline == by_name[DEFINITIONS["bits_per_byte"][0]] else [*found, f"headline {headline}"]


def _is_small_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_a_committed_card_is_that_of_its_recipe(card):
    assert faults_of_card(card, make_cards.RECIPES / f"{card.stem}.yaml") == []


def sentences_of(card: str) -> set[str]:
    """Sentences and lines of Python of a card, with # for numbers, names in code and kinds of layers."""
    body = re.sub(r"\A---\n.*?^---\n", "", card, flags=re.S | re.M)
    body = re.sub(
        r"^```(\w*)\n(.*?)^```$", lambda m: m[2] if m[1] == "python" else "", body, flags=re.S | re.M
    )
    body = re.sub(r"`[^`\n]*`|\d[\d,.]*\d|\d|layers? of [^.]*", "#", body)
    lines = [line for line in body.splitlines() if re.match(r"[A-Za-z-]|<summary", line)]
    return {sentence for line in lines for sentence in re.split(r"(?<=[.;:])\s+", line)}


def test_committed_cards_say_what_a_card_says_today(tmp_path):
    """Figures are of the commit that made them; sentences and the loading example are of the template."""
    missing = DEFINITIONS.keys() - {m.name for m in MEASURED}
    measured = [*MEASURED, *(Measurement(name, 0.1, "1", 9, 0.01, "validation", False) for name in missing)]
    for card in CARDS:
        text = card.read_text(encoding="utf-8")
        (result,) = front_matter_of(text)["model-index"][0]["results"]
        stated = load_recipe(make_cards.RECIPES / f"{card.stem}.yaml")
        stated.model.decoder = "transformer"
        corpus = {"description": result["dataset"]["name"]}
        samples = "```text\na\n```\n" * 2
        run = make_run(tmp_path, name=card.stem, recipe=stated, corpus=corpus, samples=samples)
        write_measurements(run.evaluation, measured)
        for step in (1, 2):
            run.log("sample", step=step, text="a", elapsed_s=0.5, tokens=64)
        today = render_card(run, f"{card.stem}/model", recipe_file=f"recipes/{card.stem}.yaml")
        assert sentences_of(text) - sentences_of(today) == set()
        assert not is_edited(card)
    assert sentences_of(text.replace("it continues a text", "it writes")) - sentences_of(today)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_measured_and_nothing_for_want_of_it(recipe):
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    card = make_cards.CARDS / f"{recipe.stem}.md"
    assert first.startswith(make_cards.MEASURED) == card.is_file()
    if card.is_file():
        assert first.split()[2] in card.read_text(encoding="utf-8")
    stated = load_recipe(recipe)
    assert stated.card.name == recipe.stem
    ends = stated.training.tokens, stated.training.num_threads, stated.model.hidden_size
    assert ends == (1_000_000, 1, 128)  # they compare by it, and repeat


def test_every_decoder_has_a_recipe():
    assert {load_recipe(recipe).model.decoder for recipe in RECIPES} == set(NETWORKS)


@pytest.fixture
def _in_this_process(monkeypatch):
    """What the script runs in a process of its own: importing torch again would take most of the test."""

    def run(command, check):
        assert (command[:3], check) == ([sys.executable, "-m", "hf_genlm"], True)
        assert main(command[3:]) == 0

    monkeypatch.setattr(make_cards, "subprocess", SimpleNamespace(run=run))


@pytest.mark.usefixtures("_in_this_process")
def test_a_card_is_made_of_a_run_and_found_to_be_its_own(text_folder, tmp_path):
    """From a recipe's file to a card beside its picture, by what the script calls."""
    recipe = tmp_path / "cpython-toy.yaml"
    sections: dict[str, dict] = {"corpus": {"sources": [str(text_folder)]}, "card": {"name": "toy"}}
    for assignment in SMALL:
        section, key, value = re.split("[.=]", assignment)
        sections.setdefault(section, {})[key] = int(value)
    recipe.write_text(f"# A toy.\n{yaml.safe_dump(sections)}", encoding="utf-8")
    run = make_cards.train(recipe, tmp_path / "toy", ["--steps", "3"])
    written = (run.path / "evaluation.json").stat().st_mtime_ns
    assert make_cards.train(recipe, tmp_path / "toy", ["--steps", "3"]).path == run.path
    assert (run.path / "evaluation.json").stat().st_mtime_ns == written, "what is done is not done again"
    with pytest.raises(AssertionError):  # a try is not taken for the run itself
        make_cards.train(recipe, tmp_path / "toy", [])

    card = make_cards.write_results(run, recipe, tmp_path / "cards", is_kept=False)
    assert recipe.read_text(encoding="utf-8").startswith("# A toy.")
    stated = load_recipe(run.recipe)  # --steps 3 replaced what the file says, and folders are cut from names
    sections["training"]["steps"], sections["corpus"]["sources"] = 3, [text_folder.name]
    recipe.write_text(f"# A toy.\n{yaml.safe_dump(sections)}", encoding="utf-8")
    assert faults_of_card(card, recipe) == []
    text = card.read_text(encoding="utf-8")
    assert 'REPO = "cpython-toy/model"\n' in text
    assert "![" in text
    for right, wrong, word in (
        ("optimizer: adamw", "optimizer: muon", "training.optimizer"),
        ("value: 0.", "value: 0.9", "accuracy"),
        ("It needs **", "It needs **9", "headline"),
        ("plots/cpython-toy.png", "plots/curves.png", "picture"),
        ("recipes/cpython-toy.yaml", "recipe.yaml", "command"),
        ("pipeline_tag: text-generation", "pipeline_tag: text", "pipeline_tag"),
    ):
        assert right in text
        card.write_text(text.replace(right, wrong, 1), encoding="utf-8")
        assert any(word in fault for fault in faults_of_card(card, recipe)), word

    for _ in range(2):  # the line is written once
        make_cards.write_results(RunFolder(run.path), recipe, tmp_path / "cards", is_kept=True)
    first, second = recipe.read_text(encoding="utf-8").splitlines()[:2]
    assert re.match(r"# Measured: [0-9.]+ bits per byte \(95 % interval [0-9.]+ to [0-9.]+\) on ", first)
    assert f" {stated.model.hidden_size} x 2, 3 steps in " in first
    assert second == "# A toy."
    assert load_recipe(recipe).training.steps == 3
