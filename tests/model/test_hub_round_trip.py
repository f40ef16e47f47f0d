"""Promise: a saved model loads bit-equal, with this package and without it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import contracts
from support.models import STACKS, build_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_genlm.model
from hf_genlm.config.recipe import TokenizerRecipe
from hf_genlm.model import RECURRENT_MIXERS, GenLMConfig, GenLMForCausalLM, GenLMModel
from hf_genlm.model.bundle import bundle
from hf_genlm.text.store import Document
from hf_genlm.text.tokenizer import train_tokenizer


def test_weights_and_logits_are_bit_equal_after_a_reload(model, tokens, tmp_path):
    contracts.check_reload_is_bit_equal(model, tokens, tmp_path)


def test_config_returns_equal(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    loaded, expected = AutoConfig.from_pretrained(tmp_path).to_dict(), model.config.to_dict()
    for written_at_save in ("transformers_version", "architectures", "auto_map", "_name_or_path"):
        loaded.pop(written_at_save, None)
        expected.pop(written_at_save, None)
    assert loaded == expected
    assert "layer_types" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("stack", RECURRENT_MIXERS)
def test_missing_weights_are_initialised_and_present_ones_kept(stack, tmp_path):
    contracts.check_missing_weights(stack, tmp_path)


def test_new_models_start_as_documented():
    model = GenLMForCausalLM(GenLMConfig(mixer_types=["lstm", "gru", "gated_linear", "full_attention"]))
    lstm, gru, linear, _ = (layer.mixer for layer in model.model.layers)
    for layer in model.model.layers:
        for projection in (layer.mixer.out_proj, layer.mlp.down_proj):
            assert projection.weight.std().item() == pytest.approx(0.1 * 0.02 / 8**0.5, rel=0.05)
    assert torch.equal(lstm.in_proj.bias.view(4, -1).mean(1), torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert torch.equal(gru.in_proj.bias.view(3, -1).mean(1), torch.tensor([0.0, 1.0, 0.0]))
    memory = 1 / (1 - torch.sigmoid(linear.forget_proj.bias.double())) - 1
    torch.testing.assert_close(
        memory[[0, -1]], torch.tensor([1.0, 128.0], dtype=torch.double), atol=1e-2, rtol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads_and_runs(model, tokens, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = GenLMForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded.dtype == dtype
    logits = loaded(tokens, use_cache=False).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    "overrides", [{}, {"embedding_size": 8}, {"tie_word_embeddings": False, "output_bias": True}]
)
def test_vocabulary_can_be_resized(overrides, tokens):
    model = build_model(["gru", "full_attention"], **overrides)
    before = model(tokens, use_cache=False).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    grown = model(tokens, use_cache=False).logits
    assert grown.shape[-1] == 70
    torch.testing.assert_close(grown[..., :61], before)
    model.resize_token_embeddings(61)
    torch.testing.assert_close(model(tokens, use_cache=False).logits, before)


def test_gradient_checkpointing_gives_the_same_gradients(model, tokens):
    gradients = []
    for checkpoint in (False, True):
        if checkpoint:
            model.activation_checkpointing_enable()
        model.train()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    for with_it, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_it, without, atol=1e-6, rtol=1e-5)


WITHOUT_US = """
import sys, pathlib
sys.modules["hf_genlm"] = None  # as if it were not installed
import torch
import transformers
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    # before any other class of this folder: a head must not need them
    transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    ids = torch.load(folder / "expected.pt", weights_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    assert torch.equal(model(ids["tokens"], use_cache=False).logits, ids["logits"]), folder.name
    text = model.generate(ids["tokens"], max_new_tokens=5, do_sample=False, num_beams=2)
    assert torch.equal(text, ids["text"]), folder.name
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__module__.startswith("transformers_modules"), type(config)
    for auto, name in {"AutoModel": "GenLMModel",
                       "AutoModelForSequenceClassification": "GenLMForSequenceClassification",
                       "AutoModelForTokenClassification": "GenLMForTokenClassification"}.items():
        other = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
        assert type(other).__name__ == name, type(other)
        assert torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight)
    table = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert type(model).__name__ in table.values()  # or Trainer would smooth labels unshifted
    again = pathlib.Path(sys.argv[2]) / folder.name
    model.save_pretrained(again)
    for file in again.iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes(), file
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("a text").input_ids) == "a text"
    print("loaded", folder.name)
"""


def test_two_saves_give_the_same_files(model, tmp_path):
    contracts.check_saves_are_equal(model, tmp_path)


def test_loads_by_remote_code_where_our_package_is_not_installed(tokens, tmp_path):
    tokenizer = train_tokenizer([Document("a text", "here")], TokenizerRecipe(), 6)
    for name in STACKS:
        model, folder = build_model(name), tmp_path / "models" / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        expected = {
            "tokens": tokens,
            "logits": model(tokens, use_cache=False).logits.detach(),
            "text": model.generate(tokens, max_new_tokens=5, do_sample=False, num_beams=2),
        }
        torch.save(expected, folder / "expected.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, str(tmp_path / "models"), str(tmp_path / "again")],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split().count("loaded") == len(STACKS)


def names_of(statement: ast.stmt) -> list[str]:
    """Names that a function, class or assignment of a module defines."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    nodes = ast.walk(statement) if isinstance(statement, ast.Assign | ast.AnnAssign) else []
    return [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def test_the_bundle_holds_every_statement_of_the_flat_files_once():
    """No name of one file hides that of another, and nothing is lost."""
    folder = Path(hf_genlm.model.__file__).parent
    imports = (ast.Import, ast.ImportFrom)
    statements, names = [], []
    for path in sorted(folder.glob("*_genlm.py")):
        if path.name != "configuration_genlm.py":
            body = ast.parse(path.read_text()).body[1:]  # without the docstring
            statements += [ast.dump(node) for node in body if not isinstance(node, imports)]
            names += [name for node in body for name in names_of(node) if name != "__all__"]
    code = bundle()
    assert code.keys() == {"configuration_genlm.py", "modeling_genlm.py"}
    assert code["configuration_genlm.py"] == (folder / "configuration_genlm.py").read_text()
    tree = ast.parse(code["modeling_genlm.py"])
    whole = [node for node in tree.body[1:] if not isinstance(node, imports)]
    assert sorted(ast.dump(node) for node in whole) == sorted(statements)
    imported = [
        alias.asname or alias.name for node in tree.body if isinstance(node, imports) for alias in node.names
    ]
    everything = imported + names
    assert len(set(everything)) == len(everything), sorted(everything)
    relative = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level}
    assert relative == {"configuration_genlm"}


def test_the_bundle_has_no_undefined_or_unused_name():
    pytest.importorskip("ruff", reason="ruff is not installed: pip install '.[test]'")
    for name, text in bundle().items():
        command = [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--isolated",
            "--select",
            "F,E9,E4,E7",
            "--stdin-filename",
            name,
            "-",
        ]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_files_of_an_earlier_save_are_replaced_and_others_kept(tmp_path):
    (tmp_path / "cache_genlm.py").write_text("old")
    (tmp_path / "notes_genlm.py").write_text("of somebody")
    build_model(["gru"]).save_pretrained(tmp_path)
    code = {path.name: path.read_text() for path in tmp_path.glob("*.py")}
    assert code == {**bundle(), "notes_genlm.py": "of somebody"}
    GenLMConfig().save_pretrained(tmp_path / "config")
    assert {path.name for path in (tmp_path / "config").iterdir()} == {
        "config.json",
        "configuration_genlm.py",
    }


def test_our_package_wins_over_remote_code(tmp_path):
    build_model(["gru"]).save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)) is GenLMForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path, trust_remote_code=True)) is GenLMModel
