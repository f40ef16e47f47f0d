"""Promise: a recipe says what it means, and a mistyped one says where."""

import dataclasses
import re
import typing

import pytest

from hf_genlm.config.ranges import RANGES
from hf_genlm.config.recipe import Recipe, check_recipe, load_recipe
from hf_genlm.errors import UserError


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
        ("training: {learning_rate: .inf}", "expected a number"),
        ("training: {learning_rate: .nan}", "expected a number"),
        ("training: {steps: .inf}", "expected a whole number"),
        ("training: {steps: 1e400}", "expected a whole number"),
        ("training: {steps: 100000000000000000000}", "expected a whole number"),
        ("training: {minutes: 1:30}", "expected a number"),
        ("training: {steps: 0}", "training.steps = 0: it must be at least 1"),
        ("training: {adam_beta2: 1}", "from 0 to less than 1"),
        ("model: {hidden_size: -3}", "from 1 to 1,048,576"),
        ("training: {steps: 3}\ntraining: {seed: 1}", "'training' stands twice"),
        ("corpus: {sources: [null]}", "expected words"),
        ("corpus: {sources: [[a]]}", "expected words"),
        ("a: &a [*a, *a]\nb: *a", "must hold keys"),
        ("[" * 9000, "not YAML"),
        ("corpus: {sources: https://me:word@host/x}", "holds an access token or a login"),
        ("card: {name: hf_abcdefghijklmnopqrstuvwxyz0123}", "holds an access token"),
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


def test_plain_words_stay_what_they_are(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("card: {language: [no, on, 1.50, 2024-01-01], name: 010}\ntraining: {steps: 010}\n")
    recipe = load_recipe(file, ["corpus.sources=*.txt, b #1.txt", "model.size=null", "card.license=no"])
    assert recipe.card.language == ["no", "on", "1.50", "2024-01-01"]
    assert recipe.card.name == "010"
    assert recipe.training.steps == 10
    assert recipe.corpus.sources == ["*.txt", "b #1.txt"]
    assert recipe.model.size is None
    assert recipe.card.license == "no"


def test_every_number_has_a_range():
    numbers = {
        f"{section.name}.{key}"
        for section in dataclasses.fields(Recipe)
        for key, hint in typing.get_type_hints(section.default_factory).items()
        if {int, float} & {hint, *typing.get_args(hint)}
    }
    assert numbers == RANGES.keys()
    check_recipe(Recipe())


def test_no_message_holds_what_it_refuses(monkeypatch):
    """A token in the wrong place is blotted out of every message that shows the value."""
    token = "hf_abcdefghijklmnopqrstuvwxyz0123"
    monkeypatch.setenv("HF_TOKEN", "another-secret")
    names = ("", "training.steps=", "trainin.steps=", "card.name=", "card.name=[")
    secret = [name + token for name in names]
    for assignment in (*secret, "card.name=another-secret", "corpus.sources=http://u:w@h"):
        with pytest.raises(UserError) as caught:
            load_recipe(None, [assignment])
        assert not {token, "another-secret", "u:w"} & set(re.split(r"[\s'=\[]|//|@", str(caught.value)))
