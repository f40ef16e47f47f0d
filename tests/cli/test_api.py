"""Promise: the verbs of the command line are functions of Python, and a run shows what it holds."""

import importlib.resources
import inspect
import os
import pydoc
import signal
from pydoc_data.topics import topics

import datasets
import pytest
from support.runs import SMALL

import hf_genlm
from hf_genlm import api
from hf_genlm.evaluation.measurement import figures, read_measurements

pytestmark = pytest.mark.usefixtures("drawn")

DOCUMENTS = [text for _, text in sorted(topics.items())[:40]]


def sections(*assignments: str) -> dict[str, dict]:
    """Assignments `section.key=number` as keywords of `train`."""
    found: dict[str, dict] = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        section, _, key = name.partition(".")
        found.setdefault(section, {})[key] = int(value)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run trained on strings."""
    folder = tmp_path_factory.mktemp("api") / "run"
    settings = sections(*SMALL, "training.num_samples=2")
    return hf_genlm.train(DOCUMENTS, decoder="gru", output_dir=folder, progress=False, **settings)


def test_a_run_shows_its_measurements_model_samples_and_card(run):
    bits = run.metrics["bits_per_byte"]
    assert (bits.unit, bits.split) == ("bits/byte", "validation")
    assert bits.interval[0] < bits.value < bits.interval[1]
    assert bits == next(m for m in read_measurements(run.folder.evaluation) if m.name == "bits_per_byte")
    assert run.load_model().config.vocab_size == len(run.load_tokenizer()) == 400
    assert run.curves().steps[-1]["step"] == 30
    assert run.samples
    assert run.recipe.model.decoder == "gru"
    assert run.card.startswith("---\n")
    assert f"{bits.value:.3f}" in run.card
    assert (run.path / "plots" / "curves.png").is_file()
    assert f"{bits.value:.4f} bits per byte" in repr(run)


def test_a_run_is_shown_in_a_notebook(run):
    shown = run._repr_html_()
    bits = run.metrics["bits_per_byte"]
    assert f"<td>{figures(bits.value, bits.stderr)}</td>" in shown
    assert 'src="data:image/png;base64,' in shown


def test_strings_and_a_dataset_of_them_train_the_same_model(run, tmp_path):
    dataset = datasets.Dataset.from_dict({"text": DOCUMENTS})
    settings = sections(*SMALL, "training.num_samples=2")
    other = hf_genlm.train(dataset, decoder="gru", output_dir=tmp_path / "run", progress=False, **settings)
    assert other.metrics["bits_per_byte"] == run.metrics["bits_per_byte"]


def test_a_run_on_strings_is_resumed_and_evaluated_without_them(run):
    assert hf_genlm.train(resume=True, output_dir=run.path, progress=False).metrics == run.metrics
    measured = {m.name: m.value for m in hf_genlm.evaluate(run, progress=False)}
    assert measured["bits_per_byte"] == pytest.approx(run.metrics["bits_per_byte"].value, rel=1e-9)
    with pytest.raises(hf_genlm.UserError, match="not the texts that the run began with"):
        hf_genlm.train(DOCUMENTS[:9], resume=True, output_dir=run.path, progress=False)


def test_evaluate_takes_strings_and_settings(run):
    measured = hf_genlm.evaluate(run, DOCUMENTS[:2], progress=False, evaluation={"batch_size": 3})
    assert {m.split for m in measured} == {"given"}


def test_generate_continues_and_streams(run):
    pieces = []
    text = hf_genlm.generate(run, "The import", max_new_tokens=6, seed=1, on_text=pieces.append)
    assert text.startswith("The import")
    assert "".join(pieces) == text
    loaded = hf_genlm.load(run)
    assert hf_genlm.generate(loaded, "The import", max_new_tokens=6, seed=1) == text


def test_audit_plot_export_and_card_take_a_run(run, tmp_path):
    found = hf_genlm.audit(run, limit=20, progress=False)
    assert found.path == run.path / "audit.json"
    assert "audit" in run.card
    assert hf_genlm.plot([run.path], tmp_path / "curves.png").is_file()
    export = hf_genlm.tokenizer(DOCUMENTS, output_dir=tmp_path / "tokenizer", vocab_size=300, progress=False)
    assert len(export.trained.tokenizer) == 300
    assert hf_genlm.write_card(run, assignments=["card.license=mit"]).is_file()
    assert "license: mit" in run.card
    assert [found.kind for found in hf_genlm.list_runs(run.path.parent)] == ["run"]


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"out": "x"}, "output_dir"),
        ({"output": "x"}, "output_dir"),
        ({"outptu_dir": "x"}, "did you mean 'output_dir'"),
        ({"decodr": "lstm"}, "did you mean 'decoder'"),
        ({"learning_rate": 1e-3}, "training=dict(learning_rate=...)"),
        ({"lr": 1e-3}, "training=dict(learning_rate=...)"),
        ({"training": 3}, "training=dict(...)"),
        ({"training": {"learning_rte": 1}}, "did you mean"),
        ({"resume": True}, "output_dir"),
        ({"decoder": "lstmm", "output_dir": "x"}, "did you mean 'lstm'"),
    ],
)
def test_a_wrong_keyword_of_train_names_the_right_one(keywords, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(hf_genlm.UserError) as error:
        hf_genlm.train(DOCUMENTS, **keywords)
    assert words in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_wrong_keyword_is_a_type_error_too(run):
    with pytest.raises(TypeError, match="did you mean 'max_new_tokens'"):
        hf_genlm.generate(run, max_tokens=3)
    with pytest.raises(hf_genlm.UserError, match="did you mean 'suites'"):
        hf_genlm.evaluate(run, suite=["likelihood"])
    with pytest.raises(TypeError, match="missing"):
        hf_genlm.export(run)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["nowhere.txt"], "'nowhere.txt' does not exist"),
        (["nowhere.txt", "a text"], "mix a path"),
        ({"train": [], "test": []}, "splits train, test"),
        ([1, 2], "every item must be a string, a path or a record"),
        (3, "int"),
    ],
)
def test_texts_that_are_neither_paths_nor_strings_are_refused(texts, words, tmp_path):
    with pytest.raises(hf_genlm.UserError) as error:
        hf_genlm.train(texts, output_dir=tmp_path / "run", progress=False)
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()


def test_dir_and_help_name_what_there_is():
    assert set(hf_genlm.__all__) <= set(dir(hf_genlm))
    shown = pydoc.plain(pydoc.render_doc(hf_genlm))
    for name in ("train", "evaluate", "generate", "Run", "output_dir", "learning_rate"):
        assert name in shown
    for name in api.SERVICES:
        service = getattr(hf_genlm, name)
        assert len(inspect.getdoc(service)) > 100, name
        assert "keywords" not in inspect.signature(service).parameters, name


def test_type_checkers_find_the_types_of_the_package():
    assert importlib.resources.files("hf_genlm").joinpath("py.typed").is_file()


def test_a_script_shows_a_bar_that_can_be_silenced(text_folder, tmp_path, capfd):
    hf_genlm.tokenizer(text_folder, output_dir=tmp_path / "shown", vocab_size=300)
    shown = capfd.readouterr()
    hf_genlm.tokenizer(text_folder, output_dir=tmp_path / "silent", vocab_size=300, progress=False)
    silent = capfd.readouterr()
    assert "training the tokenizer" in shown.err
    assert "training the tokenizer" not in silent.err
    assert "%|" not in silent.err
    assert shown.out == silent.out == ""


def test_a_stopped_run_leaves_its_curves_and_is_resumed(tmp_path):
    signals = [signal.SIGINT]  # a second one would end the run without a checkpoint

    def stop(event, fields):
        if event == "step" and fields["step"] >= 3 and signals:
            os.kill(os.getpid(), signals.pop())

    folder = tmp_path / "run"
    with pytest.raises(hf_genlm.Stopped):
        hf_genlm.train(DOCUMENTS, output_dir=folder, progress=False, listener=stop, **sections(*SMALL))
    assert (folder / "plots" / "curves.png").is_file()
    (found,) = hf_genlm.list_runs(tmp_path)
    assert found.state.startswith("stopped after step")
    assert hf_genlm.train(resume=True, output_dir=folder, progress=False).metrics["bits_per_byte"].n > 0
