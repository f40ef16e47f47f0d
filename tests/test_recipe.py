"""Promise: a recipe says what it means, and a mistyped one says where."""

import pytest

from hf_genlm.errors import UserError
from hf_genlm.recipe import Recipe, load_recipe


def test_yaml_overlays_defaults_and_assignments_overlay_yaml(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("training:\n  learning_rate: 1e-3\n  steps: 7\nmodel: {mixers: [gru, lstm], size: 30M}\n")
    recipe = load_recipe(file, ["training.steps=9", "corpus.sources=a,b", "model.tie_word_embeddings=false"])
    assert recipe.training.learning_rate == 1e-3  # PyYAML reads it as a string
    assert recipe.training.steps == 9
    assert recipe.model.mixers == ["gru", "lstm"]
    assert recipe.model.size == "30M"
    assert recipe.corpus.sources == ["a", "b"]
    assert recipe.model.tie_word_embeddings is False
    assert recipe.training.batch_size is None


def test_round_trip(tmp_path):
    recipe = load_recipe(None, ["training.minutes=2", "card.language=fra", "corpus.sources=ä b"])
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(file) == recipe
    assert load_recipe(None) == Recipe()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("training: {stepps: 3}", "did you mean 'steps'"),
        ("trainig: {steps: 3}", "did you mean 'training'"),
        ("training: 3", "must hold keys"),
        ("- 3", "must hold sections"),
        ("training: {steps: 1.5}", "training.steps = 1.5: expected a whole number"),
        ("training: {steps: true}", "expected a whole number"),
        ("training: {learning_rate: fast}", "expected a number"),
        ("training: {learning_rate: .inf, steps: .inf}", "expected a whole number"),
        ("model: {tie_word_embeddings: 1}", "expected true or false"),
        ("model: {decoder: [a]}", "expected a word"),
        ("a: [", "not YAML"),
    ],
)
def test_mistakes_are_named_in_one_line(content, words, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        load_recipe(file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_malformed_assignment():
    with pytest.raises(UserError, match="cannot read the recipe"):
        load_recipe("nowhere.yaml")
    with pytest.raises(UserError, match=r"section\.key=value"):
        load_recipe(None, ["training.steps"])
    with pytest.raises(UserError, match="not YAML"):
        load_recipe(None, ["training.steps=["])
