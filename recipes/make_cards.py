"""Run the recipes, one after another, and write what they came to: a card each, and its recipe's first line.

    python recipes/make_cards.py --runs DIR                          every recipes/cpython-*.yaml
    python recipes/make_cards.py --runs DIR recipes/cpython-lstm.yaml
    python recipes/make_cards.py --runs DIR --minutes 0.05           a try: the cards stay in DIR/cards

DIR/NAME is the run folder of recipes/NAME.yaml. A run that is done there is not run again, one that was cut
off goes on. The card goes to model_cards/NAME.md, its picture to model_cards/plots/NAME.png. These
runs end by their tokens and take one thread: what else the machine does changes their speed alone.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from PIL import Image

from hf_genlm.card import render_card
from hf_genlm.card.wording import interval
from hf_genlm.config.recipe import load_recipe
from hf_genlm.evaluation.measurement import figures, read_measurements
from hf_genlm.files import read_json
from hf_genlm.report.curves import CURVES_FILE
from hf_genlm.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
RECIPES, CARDS = ROOT / "recipes", ROOT / "model_cards"
_COLOURS = 48  # of a picture
MEASURED = "# Measured: "  # so begins the first line of a recipe that was run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", type=Path, help="default: all recipes/cpython-*.yaml")
    parser.add_argument("--runs", required=True, type=Path, metavar="DIR", help="where the run folders go")
    parser.add_argument("--minutes", type=float, metavar="F", help="shorter, for a try: nothing is kept")
    options = parser.parse_args()
    is_try = options.minutes is not None
    end = ["--minutes", str(options.minutes)] if is_try else []
    recipes = options.recipes or sorted(RECIPES.glob("cpython-*.yaml"))
    for i, recipe in enumerate(recipes, start=1):
        print(f"{i}/{len(recipes)}: {recipe.stem}", flush=True)
        run = train(recipe, options.runs / recipe.stem, end)
        write_results(run, recipe, options.runs / "cards" if is_try else CARDS, is_kept=not is_try)
    return 0


def train(recipe: Path, out: Path, more: list[str]) -> RunFolder:
    """The run of a recipe in a process of its own, or what is left of it; more: options for `train`.

    A run that lies in `out` by another recipe, or is a try, is refused.
    """
    command = [sys.executable, "-m", "hf_genlm", "train", "--out", str(out), "--recipe", str(recipe), *more]
    resume = ["--resume"] if (out / "recipe.yaml").is_file() else []
    subprocess.run([*command, *resume], check=True)
    return RunFolder.open(out)


def write_results(run: RunFolder, recipe: Path, cards: Path, is_kept: bool) -> Path:
    """The card of `run` in the folder `cards`, its picture, and, `is_kept`, the first line of its recipe.

    Returns:
        The path of the card.
    """
    name = recipe.stem
    picture, card = cards / "plots" / f"{name}.png", cards / f"{name}.md"
    picture.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(run.model / CURVES_FILE) as curves:  # few colours: a quarter of the bytes
        curves.convert("RGB").quantize(_COLOURS).save(picture, optimize=True)
    text = render_card(
        run, f"{name}/model", picture=f"plots/{name}.png", recipe_file=f"recipes/{recipe.name}"
    )
    card.write_text(text, encoding="utf-8")
    if is_kept:
        lines = recipe.read_text(encoding="utf-8").splitlines(keepends=True)
        stated = lines[1:] if lines[0].startswith(MEASURED) else lines
        recipe.write_text("".join([first_line(run), *stated]), encoding="utf-8")
    return card


def first_line(run: RunFolder) -> str:
    """What a recipe says of its own result, as a comment."""
    (bits,) = (m for m in read_measurements(run.evaluation) if m.name == "bits_per_byte")
    trained = next(event for event in reversed(run.read_log()) if event["event"] == "trained")
    machine, corpus = read_json(run.environment), read_json(run.corpus)
    decoder = load_recipe(run.recipe).model
    return (
        f"{MEASURED}{figures(bits.value, bits.stderr)} bits per byte (95 % interval {interval(bits)}) on "
        f"{bits.n:,} held-out bytes of {corpus['description']}, {decoder.hidden_size} x "
        f"{decoder.num_hidden_layers}, {trained['steps']:,} steps in {trained['seconds']:.0f} s on "
        f"{machine['cpu_count']} CPU cores.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
