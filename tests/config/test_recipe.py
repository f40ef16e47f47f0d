"""Promise: a recipe says what it means, and a mistyped one says where."""

import copy
import pickle
import re

import pytest
import yaml
from support.settings_page import PAGE, settings_page

from hf_genlm.config import sections
from hf_genlm.config.recipe import (
    CorpusRecipe,
    Recipe,
    TrainingRecipe,
    describe_fields,
    load_recipe,
    set_field,
    stated_fields,
)
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
    assert copy.deepcopy(recipe) == pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301  our own
    assert stated_fields(recipe) == {
        "training.minutes": 2.0,
        "card.language": ["fra"],
        "corpus.sources": ["ä b"],
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("training: {stepps: 3}", "'training.stepps'; did you mean 'training.steps'"),
        ("training: {lr: 3}", "did you mean 'training.learning_rate'"),
        ("training: {epochs: 3}", "did you mean 'training.max_epochs'"),
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
        ("training: {seed: -1}", "from 0 to 4,294,967,295"),
        ("model: {hidden_size: -3}", "from 1 to 1,048,576"),
        ("corpus: {validation_fraction: 1}", "between 0 and 1"),
        ("corpus: {weights: [1, 0]}", "more than 0"),
        ("corpus: {byte_premiums: {deu: -1}}", "more than 0"),
        ("corpus: {byte_premiums: {deu: x}}", "corpus.byte_premiums.deu = 'x': expected a number"),
        ("training: {optimizer: adam}", "unknown training.optimizer 'adam'; did you mean 'adamw'"),
        ("model: {mixers: [lstm, gruu]}", "unknown model.mixers 'gruu'; did you mean 'gru'"),
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
        ("card: {name: " + "a" * 200_000 + "}", "more than 131,072 characters"),
    ],
)
def test_mistakes_are_named_in_one_line(content, words, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        load_recipe(file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("training.lr=1", "unknown setting 'training.lr'; did you mean 'training.learning_rate'"),
        ("lr=1", "unknown setting 'lr'; did you mean 'training.learning_rate'"),
        ("steps=1", "did you mean 'training.steps'"),
        ("training.batch=1", "did you mean 'training.batch_size'"),
        ("model.layers=1", "did you mean 'model.num_hidden_layers'"),
        ("training.steps", r"section.key=value"),
        ("training.steps=[", "not YAML"),
    ],
)
def test_an_assignment_with_another_name_is_answered_with_the_right_one(assignment, words):
    with pytest.raises(UserError) as caught:
        load_recipe(None, [assignment])
    assert words in str(caught.value)


def test_a_vocabulary_that_no_tokenizer_can_hold_is_refused():
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size"):
        load_recipe(None, ["tokenizer.vocab_size=1000000000"])


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"cannot read the recipe 'nowhere\.yaml'"):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize("lost", [*Recipe.model_fields, None])
def test_a_recipe_of_a_run_that_lost_a_section_is_refused_by_name(lost, tmp_path):
    (tmp_path / "log.jsonl").touch()
    path = tmp_path / "recipe.yaml"
    left = {key: value for key, value in Recipe().model_dump().items() if lost not in (key, None)}
    path.write_text(yaml.safe_dump(left) if left else "")
    with pytest.raises(UserError, match=f"recipe.yaml' has lost its section '{lost or 'corpus'}'"):
        load_recipe(path)
    path.write_text(Recipe().to_yaml())
    assert load_recipe(path) == Recipe()


def test_a_run_folder_of_an_older_version_is_refused_by_name(tmp_path):
    (tmp_path / "recipe.yaml").write_text("training: {steps: 3, row_length: 128}\n")
    with pytest.raises(UserError, match=r"unknown setting 'training\.row_length'"):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(UserError, match=r"written by an older version.*training\.row_length") as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert str(tmp_path) in str(caught.value)


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


def test_a_string_for_a_list_is_a_list_of_one(tmp_path):
    """A path is never read letter by letter: `/` would be the whole disk."""
    recipe = Recipe()
    recipe.corpus.sources = "/a/b, c.txt"
    assert recipe.corpus.sources == CorpusRecipe(sources="/a/b, c.txt").sources == ["/a/b, c.txt"]
    file = tmp_path / "recipe.yaml"
    file.write_text("corpus: {sources: '/a/b, c.txt', languages: {fra: x.txt}}\nprivacy: {canaries: 4}\n")
    recipe = load_recipe(file)
    assert recipe.corpus.sources == ["/a/b, c.txt"]
    assert recipe.corpus.languages == {"fra": ["x.txt"]}
    assert recipe.privacy.canaries == [4]
    set_field(recipe, "corpus.languages", ["fra=x.txt", "fra=y.txt", "deu=z.txt"])  # an option given thrice
    assert recipe.corpus.languages == {"fra": ["x.txt", "y.txt"], "deu": ["z.txt"]}


def test_fields_are_checked_when_python_sets_them():
    recipe = Recipe()
    with pytest.raises(UserError, match=r"training\.steps = 0: it must be at least 1"):
        recipe.training.steps = 0
    with pytest.raises(UserError, match=r"did you mean 'training\.learning_rate'"):
        recipe.training.lr = 1
    with pytest.raises(UserError, match=r"did you mean 'training\.batch_size'"):
        TrainingRecipe(batch=3)
    with pytest.raises(UserError, match=r"training\.warmup_ratio = 2: it must be from 0 to 1"):
        TrainingRecipe(warmup_ratio=2)
    assert recipe == Recipe(), "what is refused is not set"


def test_every_number_has_a_range_and_every_field_a_help():
    rows = describe_fields()
    assert len(rows) == len({row.name for row in rows}) > 90
    for row in rows:
        assert len(row.help) > 5, row.name
        if "number" in row.kind:
            assert row.allowed or row.name == "corpus.split_seed", row.name


def test_settings_are_found_by_the_names_that_people_use():
    for word, name in (("lr", "training.learning_rate"), ("epochs", "training.max_epochs"),
                       ("batch", "training.batch_size"), ("--width", "model.hidden_size")):  # fmt: skip
        assert name in [row.name for row in describe_fields(word.removeprefix("--"))]
    assert describe_fields("learning_rate")[0].name == "training.learning_rate"
    assert describe_fields("xyzzy") == []


def test_no_synonym_is_the_name_of_another_field_of_its_section():
    for row in describe_fields():
        section = row.name.partition(".")[0]
        names = {other.name for other in describe_fields()}
        assert not names & {f"{section}.{word}" for word in row.synonyms} - {row.name}, row.name


def test_the_page_of_settings_is_current():
    """`python tests/support/settings_page.py` writes it."""
    assert PAGE.read_text(encoding="utf-8") == settings_page()


def test_choices_are_the_tables_that_act_on_them():
    from hf_genlm.model import DECODERS, MIXER_TYPES
    from hf_genlm.model.configuration_genlm import POSITION_TYPES
    from hf_genlm.text.scrubbing import DETECTORS
    from hf_genlm.text.tokenizer import PATTERNS
    from hf_genlm.training.optimizer import OPTIMIZERS
    from hf_genlm.training.trackers import TRACKERS

    assert tuple(DECODERS) == sections.DECODERS
    assert sections.MIXERS == MIXER_TYPES
    assert sections.POSITIONS == POSITION_TYPES
    assert set(sections.PERSONAL) == {*DETECTORS, "all"}
    assert tuple(PATTERNS) == sections.PATTERNS
    assert tuple(OPTIMIZERS) == sections.OPTIMIZERS
    assert tuple(TRACKERS) == sections.TRACKERS


def test_no_message_holds_what_it_refuses(monkeypatch):
    """An access token in the wrong place is hidden in every message that shows the value."""
    token = "hf_abcdefghijklmnopqrstuvwxyz0123"
    monkeypatch.setenv("HF_TOKEN", "another-secret")
    names = ("", "training.steps=", "trainin.steps=", "card.name=", "card.name=[")
    secret = [name + token for name in names]
    for assignment in (*secret, "card.name=another-secret", "corpus.sources=http://u:w@h"):
        with pytest.raises(UserError) as caught:
            load_recipe(None, [assignment])
        assert not {token, "another-secret", "u:w"} & set(re.split(r"[\s'=\[]|//|@", str(caught.value)))
