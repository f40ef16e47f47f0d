"""Promise: the command line works for a stranger, and every mistake is one line with a remedy, exit 2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import last_line
from transformers import AutoConfig

import hf_genlm
from hf_genlm.cli.main import main
from hf_genlm.config.recipe import load_recipe
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.run_folder import RunFolder


def test_train_leaves_a_whole_run_folder(trained):
    names = {path.name for path in trained.path.iterdir()}
    assert names >= {"recipe.yaml", "environment.json", "corpus.json", "log.jsonl", "tokenizer",
                     "evaluation.json", "samples.md", "model"}  # fmt: skip
    in_model = {path.name for path in trained.model.iterdir()}
    assert in_model >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json",
                        "README.md", "modeling_genlm.py", "configuration_genlm.py"}  # fmt: skip
    assert not [name for name in in_model if name.startswith("_")]


def test_evaluate_repeats_the_measurements_of_the_run(trained, capsys):
    before = read_measurements(trained.evaluation)
    assert main(["evaluate", str(trained.path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["measurements"]
    assert [m["value"] for m in printed] == pytest.approx([m.value for m in before], rel=1e-9)


def test_evaluate_measures_a_model_folder_on_a_file(trained, text_folder, capsys):
    file = str(sorted(text_folder.iterdir())[0])
    assert main(["evaluate", str(trained.model), file, "--json", "--set", "evaluation.batch_size=3"]) == 0
    printed = json.loads(capsys.readouterr().out)["measurements"]
    assert {m["split"] for m in printed} == {"given"}


def test_evaluate_measures_a_model_of_transformers(trained, text_folder, tmp_path, capsys):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(trained.model)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = str(sorted(text_folder.iterdir())[0])
    assert main(["evaluate", str(tmp_path), file]) == 0
    assert "bits_per_byte" in capsys.readouterr().out


def test_generate_continues_the_prompt(trained, capsys):
    for seed in ("1", "1", "2"):
        assert (
            main(["generate", str(trained.path), "The import", "--max-new-tokens", "9", "--seed", seed]) == 0
        )
    first, second, third = capsys.readouterr().out.split("The import")[1:]
    assert first.strip() == second.strip() != third.strip()
    assert main(["generate", str(trained.path), "--max-new-tokens", "5", "--temperature", "0"]) == 0
    assert main(["generate", str(trained.path), "--max-new-tokens", "5", "--int8"]) == 0


def test_card_is_written_again(trained, capsys):
    card = trained.model / "README.md"
    before = card.read_text()
    card.unlink()
    assert main(["card", str(trained.path)]) == 0
    assert card.read_text() == before


def test_tokenizer_verb(text_folder, tmp_path, capsys):
    from transformers import AutoTokenizer

    out = tmp_path / "tokenizer"
    assert main(["tokenizer", str(text_folder), "--out", str(out), "--vocab-size", "300"]) == 0
    assert "300 tokens" in capsys.readouterr().out
    assert len(AutoTokenizer.from_pretrained(out)) == 300
    assert main(["tokenizer", str(text_folder), "--out", str(out)]) == 2
    assert "already holds files" in last_line(capsys)


def write(path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


PROSE = ("It was the best of times, it was the worst of times. " * 400).encode()
MISTAKES = {
    "missing path": (lambda p: ["nowhere.txt"], "owner/name"),
    "empty file": (lambda p: [write(p / "empty.txt", b"")], "empty"),
    "binary file": (lambda p: [write(p / "a.txt", b"GIF89a\0\0\1" * 9)], "NUL"),
    "invalid UTF-8": (lambda p: [write(p / "a.txt", b"caf\xe9 " * 9)], "corpus.encoding=cp1252"),
    "text shorter than a row": (
        lambda p: [write(p / "a.txt", b"A short text.\nIn two lines.\n")],
        "training.max_seq_length",
    ),
    "unknown decoder": (lambda p: [write(p / "a.txt", PROSE), "--decoder", "lstmm"], "did you mean 'lstm'"),
    "unknown recipe key": (
        lambda p: ["--recipe", write(p / "r.yaml", b"training: {batchsize: 3}")],
        "did you mean 'training.batch_size'",
    ),
    "unknown key in --set": (lambda p: ["--set", "trainin.steps=3"], "did you mean 'training'"),
    "heads that do not divide": (
        lambda p: [
            write(p / "a.txt", PROSE),
            "--decoder",
            "transformer",
            "--set",
            "model.num_attention_heads=5",
        ],
        "multiple of num_attention_heads",
    ),
    "vocabulary larger than the text": (
        lambda p: [write(p / "a.txt", PROSE), "--vocab-size", "20000"],
        "20000: this text fills",
    ),
    "folder that holds a run": (
        lambda p: ["--out", write(p / "recipe.yaml", b"") and str(p)],
        "already holds a run",
    ),
    "unwritable folder": (lambda p: ["--out", "/proc/run"], "cannot be written"),
    "file in the way": (lambda p: ["--out", write(p / "file", b"x")], "cannot be written"),
    "two ends": (lambda p: ["--minutes", "1", "--steps", "3"], "give one of them"),
    "no number": (lambda p: ["--steps", "many"], "expected a whole number"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input_is_one_line_and_exit_2(mistake, tmp_path, capsys):
    arguments, words = MISTAKES[mistake]
    arguments = arguments(tmp_path)
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert main(["train", *arguments, *out]) == 2
    line = last_line(capsys)
    assert words in line, line
    assert not (tmp_path / "out").exists()


def test_invalid_utf8_names_the_byte(tmp_path, capsys):
    assert main(["train", write(tmp_path / "a.txt", b"caf\xe9 "), "--out", str(tmp_path / "out")]) == 2
    line = last_line(capsys)
    assert "0xe9" in line
    assert "3" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "Did you mean 'train'"),
        (["tran"], "Did you mean 'train'"),
        (["train", "--stps", "3"], "did you mean --steps"),
        (["train", "--output_dir", "x"], "did you mean --out"),
        (["train", "--lr", "1"], "--set training.learning_rate=VALUE"),
        (["train", "--epochs", "1"], "--set training.max_epochs=VALUE"),
        (["train", "--learning-rate=1"], "--set training.learning_rate=VALUE"),
        (["generate", "x", "--max-tokens", "3"], "did you mean --max-new-tokens"),
        (["compare"], "--out"),
        (["card"], "RUN"),
        (["settings", "learning_rte"], "did you mean 'learning_rate'"),
        (["evaluate", "nowhere"], "name the SOURCE"),
        (["evaluate", "nowhere", "x.txt"], "x.txt"),
        (["generate", "nowhere"], "no model at"),
        (["generate", "nowhere", "--max-new-tokens", "0"], "whole number above 0"),
        (["card", "nowhere"], "not a run folder"),
    ],
)
def test_other_mistakes(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in last_line(capsys)


def test_a_changed_corpus_is_noticed(trained, text_folder, capsys, monkeypatch, tmp_path):
    import shutil

    shutil.copytree(trained.path, tmp_path / "run")
    shutil.copytree(text_folder, tmp_path / "text")
    for file in (tmp_path / "text").iterdir():
        file.write_text(file.read_text() + "more\n")
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml", [f"corpus.sources={tmp_path / 'text'}"])
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "have changed" in last_line(capsys)


@pytest.mark.parametrize("words", [[], ["lr"]], ids=["more than a buffer", "less than a buffer"])
@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_reader_that_ends_early_is_no_fault(unbuffered, words):
    command = [sys.executable, *(["-u"] if unbuffered else []), "-m", "hf_genlm", "settings", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        error = process.stderr.read().decode()
        assert process.wait() == 141
    assert "BrokenPipeError" not in error


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    """So it answers at once: 0.17 s of CPU on the development machine, which a test cannot time."""
    code = (
        "import sys; from hf_genlm.cli.main import main; main(sys.argv[1:]);"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    words = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    heavy = {"torch", "transformers", "numpy", "datasets", "tokenizers", "yaml", "scipy"}
    assert "typer" in loaded
    assert not loaded & heavy


def test_torch_is_not_imported_for_the_help_of_a_verb():
    code = (
        "from hf_genlm.cli.main import main; main(['train', '-h']); import sys; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_importing_the_package_registers_the_model_before_transformers_is_imported():
    """In a process whose arguments are those of the command line, which must not matter. torchao's lines,
    where its programs do not fit torch, are hidden."""
    code = "import hf_genlm, transformers as t; print(t.AutoConfig.for_model('genlm').model_type)"
    words = [sys.executable, "-c", code, "hf-genlm", "-m", "hf_genlm"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("genlm\n", "")


def test_importing_the_package_registers_the_model_after_transformers_is_imported():
    modules = list(sys.modules)
    assert modules.index("transformers") < modules.index("hf_genlm")
    assert AutoConfig.for_model("genlm").model_type == "genlm"


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_names_every_verb_and_exits_0(words, capsys):
    assert main(words) == 0
    printed = capsys.readouterr().out
    verbs = "train tokenizer extend evaluate audit compare range generate chat serve space export push"
    for verb in [*verbs.split(), "plot", "card", "runs", "settings", "doctor"]:
        assert re.search(rf"^. {verb} ", printed, flags=re.MULTILINE), verb


def test_help_of_a_verb_shows_groups_defaults_and_an_example(capsys):
    assert main(["train", "-h"]) == 0
    printed = capsys.readouterr().out
    for fact in (
        "Training",
        "Privacy",
        "--minutes",
        "default: (3)",
        "gated_linear",
        "Example: hf-genlm train",
    ):
        assert fact in printed, fact


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"hf-genlm {hf_genlm.__version__}"


@pytest.mark.parametrize(
    ("words", "completion"), [("hf-genlm tr", "train"), ("hf-genlm train --dec", "--decoder")]
)
def test_the_shell_completes_verbs_and_options(words, completion):
    environment = {**os.environ, "_HF_GENLM_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split()) - 1)
    code = "import sys; from hf_genlm.cli.main import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert completion in done.stdout.split(), done.stderr[-500:]


def test_settings_are_found_by_their_usual_names(capsys):
    assert main(["settings", "lr", "--json"]) == 0
    (first, *_) = json.loads(capsys.readouterr().out)
    assert first["name"] == "training.learning_rate"
    assert main(["settings"]) == 0
    printed = capsys.readouterr().out
    for name in ("training.learning_rate", "corpus.sources", "model.decoder", "card.license"):
        assert name in printed


def test_runs_lists_runs_models_and_their_state(trained, tmp_path, capsys):
    import shutil

    shutil.copytree(trained.path, tmp_path / "done")
    shutil.copytree(trained.path, tmp_path / "cut", ignore=shutil.ignore_patterns("evaluation.json", "model"))
    shutil.copytree(trained.model, tmp_path / "a-model")
    assert main(["runs", str(tmp_path), "--json"]) == 0
    found = {Path(run["path"]).name: run for run in json.loads(capsys.readouterr().out)}
    assert {name: (run["kind"], run["state"]) for name, run in found.items()} == {
        "a-model": ("model", "done"), "cut": ("run", "interrupted"), "done": ("run", "done"),
    }  # fmt: skip
    bits = {m.name: m.value for m in read_measurements(trained.evaluation)}["bits_per_byte"]
    assert found["done"]["bits_per_byte"]["value"] == bits
    assert found["done"]["parameters"] == found["a-model"]["parameters"] > 0
    assert found["done"]["decoder"] == "2 gru" or found["done"]["decoder"] == "gru"
    with RunFolder(tmp_path / "cut").locked():
        assert main(["runs", str(tmp_path)]) == 0
    assert re.search(r"cut +run .* training$", capsys.readouterr().out, flags=re.MULTILINE)


@pytest.mark.parametrize("verb", ["serve", "chat"])
def test_serving_without_its_libraries_names_the_extra(verb, trained, monkeypatch, capsys):
    monkeypatch.setattr("hf_genlm.serving.find_spec", lambda name: None)
    assert main([verb, str(trained.path)]) == 2
    assert "pip install 'transformers[serving]'" in last_line(capsys)
