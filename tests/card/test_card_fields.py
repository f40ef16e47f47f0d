"""The promise: what a person says of a model stands on its card, by the Hub's rules, and is never written
over."""

import math
import re
import shlex

import pytest
from support.cards import MEASURED, make_run, tables
from support.hub_metadata import faults_of, front_matter_of

from hf_genlm.card import check_card, render_card, write_card
from hf_genlm.card.card import is_edited
from hf_genlm.card.front_matter import LICENSES
from hf_genlm.card.wording import cite_model, describe_layers, duration
from hf_genlm.cli.main import main, parse
from hf_genlm.config.recipe import Recipe, load_recipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import write_measurements
from hf_genlm.extension import extension_card
from hf_genlm.loading import card_fields, hub_id_of

CARD_FIELDS = [
    "card.license=other", "card.license_name=psf-2.0", "card.license_link=https://docs.python.org/3/license.html",
    "card.language=en,code,pt-BR", "card.authors=Jane Doe,J. R. {Bob} & Søn_1", "card.url=https://example.org/tale",
    "card.intended_use=to try this | and that", "card.datasets=me/texts", "card.base_model=me/older",
    "card.tags=toy",
]  # fmt: skip


def test_what_the_recipe_says_of_the_card_stands_on_it(tmp_path):
    path = write_card(make_run(tmp_path, recipe=load_recipe(None, CARD_FIELDS)))
    text = path.read_text(encoding="utf-8")
    data = front_matter_of(text)
    assert faults_of(data) == []
    assert {key: data[key] for key in ("license", "license_name", "license_link", "language")} == {
        "license": "other",
        "license_name": "psf-2.0",
        "license_link": "https://docs.python.org/3/license.html",
        "language": ["en", "code", "pt"],
    }
    assert data["language_bcp47"] == ["pt-BR"]
    assert (data["base_model"], data["base_model_relation"]) == ("me/older", "finetune")
    assert data["datasets"] == ["me/texts"]
    assert data["tags"][-1] == "toy"
    assert "## Intended use\n\nto try this &#124; and that\n" in text
    facts = {row[0]: row[1] for row in tables(text)[0]}
    assert facts["license"] == "psf-2.0, <https://docs.python.org/3/license.html>"
    assert facts["language"] == "English (en), source code (code), Portuguese (pt)"
    entry = re.findall(r"```bibtex\n(.*?)```", text, flags=re.S)[0]
    assert r"  author = {Jane Doe and J. R. \{Bob\} \& Søn\_1}," in entry
    assert "  url = {https://example.org/tale}," in entry


def test_hub_data_sets_are_named_by_their_ids(tmp_path):
    files = [{"name": "owner/tales:fr", "bytes": None, "sha256": None, "documents": 5}]
    data = front_matter_of(render_card(make_run(tmp_path, files=files)))
    assert data["datasets"] == ["owner/tales"]
    dataset = data["model-index"][0]["results"][0]["dataset"]
    assert (dataset["type"], dataset["config"], dataset["split"]) == ("owner/tales", "fr", "validation")
    assert faults_of(data) == []
    local = [{"name": "a.txt", "bytes": 3, "sha256": "ab" * 32, "documents": 1}]
    data = front_matter_of(render_card(make_run(tmp_path, files=[*files, *local], name="both")))
    assert data["datasets"] == ["owner/tales"]
    assert data["model-index"][0]["results"][0]["dataset"]["type"] == "text", "it is of both"


@pytest.mark.parametrize(
    "text",
    [
        b"", b"# A card", b"---\n- a list\n---\n", b"---\na: b: c\n---\n", b"---\n2000-99-99\n---\n",
        b"---\n" + b"[" * 5000 + b"\n---\n", b"---\n\xff\n---\n",
    ],
)  # fmt: skip
def test_a_card_of_a_stranger_may_hold_anything(text, tmp_path):
    card = tmp_path / "README.md"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    card.write_bytes(text)
    assert card_fields(card) == {}
    assert hub_id_of(tmp_path) is None
    card.write_text("\ufeff---\nbase_model: [owner/base]\nlicense: mit\n---\n", encoding="utf-8")
    assert card_fields(card) == {"base_model": ["owner/base"], "license": "mit"}
    assert hub_id_of(tmp_path) == "owner/base"


@pytest.mark.parametrize("base", ["owner/model", None])
def test_what_it_was_trained_further_from_is_told(tmp_path, base):
    recipe = Recipe()
    recipe.model.init_from = base or str(tmp_path / "alice" / "older")
    run = make_run(tmp_path, recipe=recipe)
    run.log("started", base_model=base)
    text = render_card(run)
    assert front_matter_of(text).get("base_model") == base
    assert f"further from `{base or 'older'}`" in text
    assert "alice" not in text
    assert "from scratch" not in text


@pytest.mark.parametrize(
    ("card", "base"),
    [
        (extension_card("new", "old", "owner/old", 300, 20), "owner/old"),
        (extension_card("new", "old", None, 300, 20), None),
        ("---\nbase_model:\n- owner/a\n- owner/b\n---\n", "owner/a"),
        ("---\nbase_model: 3\n---\n", None),
        ("---\n- a\n---\n", None),
        ("---\na: [\n---\n", None),
        ("no front matter", None),
        (None, None),
    ],
)
def test_a_local_model_is_of_the_hub_model_that_its_card_names(tmp_path, card, base):
    assert hub_id_of("owner/nowhere") == "owner/nowhere"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    if card is not None:
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert hub_id_of(str(tmp_path)) == base


def test_an_extended_model_has_a_valid_card():
    text = extension_card("a | <b>", "old", "owner/old", 1300, 20)
    assert faults_of(front_matter_of(text)) == []
    assert "`owner/old` with 20 new tokens, 1,300 in all" in text
    assert "# a &#124; &#60;b&#62;" in text


def test_languages_of_the_sources_are_those_that_the_hub_knows(tmp_path):
    recipe = Recipe()
    recipe.corpus.languages = {"sr-Latn": ["a"], "xx": ["b"], "sr-Cyrl": ["c"]}
    data = front_matter_of(render_card(make_run(tmp_path, recipe=recipe)))
    assert data["language"] == ["sr"]
    assert data["language_bcp47"] == ["sr-Latn", "sr-Cyrl"]
    assert faults_of(data) == []


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (["card.license=MIT"], "did you mean 'mit'?"),
        (["card.license=apache2"], "did you mean 'apache-2.0'?"),
        (["card.license=mine"], "huggingface.co/docs/hub/repositories-licenses"),
        (["card.license=other"], "needs card.license_name"),
        (["card.license=other", "card.license_name=My License"], "small letters"),
        (["card.license_name=psf-2.0"], "card.license=other"),
        (
            ["card.license=other", "card.license_name=x", "card.license_link=my.txt"],
            "it must be an address",
        ),
        (["card.language=English"], "did you mean 'en'?"),
        (["card.language=xx"], "no code of ISO 639"),
        (["card.language=en_US"], "no code of ISO 639"),
        (["card.datasets=a/b/c"], "write owner/name"),
        (["card.base_model=a b"], "write owner/name"),
        (["card.url=example.org"], "write it whole"),
        (["card.citation=Doe 2026"], "BibTeX"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before(tmp_path, stated, words):
    recipe = load_recipe(None, stated)
    with pytest.raises(UserError, match=re.escape(words)):
        check_card(recipe.card)
    with pytest.raises(UserError, match=re.escape(words)):
        write_card(make_run(tmp_path, recipe=recipe))


def test_every_field_that_passes_is_valid_on_the_hub(tmp_path):
    for i, code in enumerate(["code", "multilingual", "sw", "swh"]):
        recipe = load_recipe(None, [f"card.language={code}", "card.license=cc-by-4.0"])
        assert faults_of(front_matter_of(render_card(make_run(tmp_path, recipe=recipe, name=str(i))))) == []
    assert {"apache-2.0", "mit", "cc-by-sa-4.0", "openrail++", "other"} <= LICENSES
    assert all(license == license.lower() and " " not in license for license in LICENSES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("license", "x"), ("license_name", "A B"), ("language", ["xx"]), ("language", "en"), ("tags", []),
        ("pipeline_tag", "text"), ("datasets", ["a b"]), ("base_model", "a/b/c"), ("title", "x"),
        ("model-index", [{"name": "x"}]),
    ],
)  # fmt: skip
def test_the_check_of_the_front_matter_can_fail(tmp_path, key, value):
    data = front_matter_of(render_card(make_run(tmp_path, recipe=load_recipe(None, CARD_FIELDS))))
    assert faults_of(data) == []
    assert faults_of({**data, key: value})
    data["model-index"][0]["results"][0]["metrics"][0]["value"] = math.nan
    assert faults_of(data)


def test_a_card_that_was_changed_by_hand_stays(tmp_path):
    run = make_run(tmp_path)
    path = write_card(run)
    assert not is_edited(path)
    write_measurements(run.evaluation, MEASURED[:1])
    write_card(run)
    assert "Top-1" not in path.read_text(encoding="utf-8"), "our own is written anew"
    ours = path.read_text(encoding="utf-8")
    for theirs in (ours.replace("# run", "# My run"), f"{ours}\nMore.\n", "# My card\n", f"{ours}{ours}x"):
        path.write_text(theirs, encoding="utf-8")
        assert is_edited(path)
        write_card(run)
        assert path.read_text(encoding="utf-8") == theirs
    write_card(run, if_edited="overwrite")
    assert path.read_text(encoding="utf-8") == ours
    path.unlink()
    assert not is_edited(path)


def test_the_verb_fills_the_card_after_training(tmp_path, capsys):
    run = make_run(tmp_path)
    path = run.model / "README.md"
    before = load_recipe(run.recipe)
    assert (
        main(["card", str(run.path), "--set", "card.license=mit", "--set", "card.authors=[Doe, Jane]"]) == 0
    )
    assert front_matter_of(path.read_text(encoding="utf-8"))["license"] == "mit"
    before.card.license, before.card.authors = "mit", ["Doe", "Jane"]
    assert load_recipe(run.recipe) == before, "the card's section alone has changed"
    assert (run.path / "plots" / "curves.png").is_file()
    kept = run.recipe.read_bytes()
    for wrong, words in (
        ("training.steps=3", "give card.KEY=VALUE"),
        ("card.license=apache", "did you mean 'apache-2.0'?"),
        ("card.licence=mit", "did you mean 'card.license'?"),
    ):
        assert main(["card", str(run.path), "--set", wrong]) == 2
        assert words in capsys.readouterr().err
        assert run.recipe.read_bytes() == kept
    path.write_text("mine", encoding="utf-8")
    assert main(["card", str(run.path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "mine"
    assert main(["card", str(run.path), "--force"]) == 0
    assert front_matter_of(path.read_text(encoding="utf-8"))["license"] == "mit"


def test_a_wrong_license_stops_training_before_it_begins(tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "run"), "--set", "card.license=apache"]) == 2
    assert "did you mean 'apache-2.0'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_was_taken_out_of_the_text_is_counted(tmp_path):
    scrubbed = {"documents": 1200, "types": {"email": 1234, "phone": 1}}
    near = {"removed": 1012, "clusters": 3, "threshold": 0.8, "shingle": 5}
    text = render_card(make_run(tmp_path, corpus={"scrubbed": scrubbed, "near_duplicates": near}))
    assert "measured, in 1,200 documents: `email` 1,234, `phone` 1." in text
    assert "Near-duplicates removed: 1,012, of 3 documents (similarity of at least 0.8" in text
    text = render_card(make_run(tmp_path, name="without"))
    assert "Personal data" not in text
    assert "Near-duplicates" not in text


def test_the_command_that_repeats_it_is_shown_and_understood(tmp_path):
    run = make_run(tmp_path, name="my run")
    (command,) = re.findall(r"```bash\n(.*?)\n```", render_card(run), flags=re.S)
    assert command == "hf-genlm train --recipe recipe.yaml --out 'my run'"
    assert parse(shlex.split(command)[1:])["output_dir"] == "my run"
    recipe = load_recipe(None, ["training.minutes=2"])
    text = render_card(make_run(tmp_path, recipe=recipe), recipe_file="recipes/x.yaml")
    assert "```bash\nhf-genlm train --recipe recipes/x.yaml --out run\n```" in text
    assert "`--steps 321` makes as many as here." in text
    assert "the same weights" not in text


def test_the_headline_is_the_measurement(tmp_path):
    text = render_card(make_run(tmp_path))
    assert "**1.7346 bits for each byte** of held-out text from the same sources (95 % interval" in text
    given = {"split": {"method": "given", "seed": 7, "fraction": 0.05}}
    assert "of held-out text (95 %" in render_card(make_run(tmp_path, corpus=given, name="given"))


def test_nothing_is_left_for_the_reader_to_guess(tmp_path):
    """Whatever is unknown is left out or said in a sentence of its own."""
    for name, recipe in (("bare", Recipe()), ("full", load_recipe(None, CARD_FIELDS))):
        text = render_card(make_run(tmp_path, recipe=recipe, name=name))
        outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.S | re.M)
        for word in (
            "ore information",
            "TODO",
            "None",
            "null",
            "undefined",
            "carbon",
            "emission",
            "{{",
            "}}",
        ):
            assert word not in outside, word
        sections = re.findall(r"^## (.*)$", outside, flags=re.M)
        assert sections[-4:] == ["Privacy", "Limits and risks", "Reproduce", "Citation"]


def test_entries_of_bibtex_are_whole():
    hostile = "a}{b\\ $x$ & 50% #1 _u_ ~ ^ \n@misc{"
    entry = cite_model(hostile, authors=[hostile, "Doe, Jane"], year=2026, url=None, version="1")
    plain = re.sub(r"\\[{}]", "", entry)
    assert plain.count("{") == plain.count("}")
    assert entry.startswith("@misc{a-b-x-50-1-u-misc-2026,\n")
    assert [line.split(" = ")[0].strip() for line in entry.splitlines()[1:-1]] == [
        "title", "author", "year", "note",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.5, "0.5 s"), (99.96, "100 s"), (179.4, "179 s"), (630, "10 minutes"), (8000, "2.2 hours"),
     (3e5, "3.5 days")],
)  # fmt: skip
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_layers_in_words():
    assert describe_layers(["gru"]) == "1 layer of a GRU"
    assert describe_layers(["gru", "full_attention", "gru", "new"]) == (
        "2 layers of a GRU, 1 of causal attention and 1 of new"
    )
