"""Promise: one trained model walks through the tools of the ecosystem, and none needs to know what it is.

transformers' pipelines and device maps, PEFT, TRL, torchao, lm-eval, the exporters, the server: each in its
newest release, each on the model folder that `hf-genlm train` left.
"""

import json
import subprocess
import sys

import pytest
import torch
from support.command_line import SMALL_OPTIONS
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_genlm.cli.main import main

MIXERS = "gru,gated_linear,full_attention"
# each layer runs twice, the embedding is E W + b, the MLP has a low rank: none of the tools needs to know
ECONOMY = ["model.shared_layers=2", "model.embedding_size=8", "model.output_bias=true", "model.mlp_rank=16"]


@pytest.fixture(scope="module")
def folder(text_folder, tmp_path_factory):
    """The model folder of a run: a cell, a linear recurrence and attention in one model."""
    out = tmp_path_factory.mktemp("citizen") / "run"
    settings = [word for setting in ECONOMY for word in ("--set", setting)]
    options = ["--mixers", f"{MIXERS},{MIXERS}", "--out", str(out), *SMALL_OPTIONS,
               "--set", "model.num_hidden_layers=null", *settings]  # fmt: skip
    assert main(["train", str(text_folder), *options]) == 0
    return out / "model"


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def prompt(tokenizer):
    """Two prompts of unequal length, padded on the left."""
    return tokenizer(["The value of", "An expression is"], return_tensors="pt", padding=True)


def importorskip(name: str):
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[test]'")


def test_pipeline_generates_what_the_model_does(folder, model, tokenizer):
    ids = tokenizer("The value of", return_tensors="pt")
    text = tokenizer.decode(
        model.generate(**ids, max_new_tokens=10, do_sample=False)[0], skip_special_tokens=True
    )
    answer = pipeline("text-generation", model=str(folder))(
        ["The value of", "An expression is"], max_new_tokens=10, do_sample=False, batch_size=2
    )
    assert answer[0][0]["generated_text"] == text


def test_layers_can_lie_on_the_disk(folder, model, prompt, tmp_path):
    expected = model(**prompt).logits
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(folder, device_map="auto")(**prompt).logits, expected
    )
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
              "model.embed_proj": "disk", "model.layers.0": "disk", "model.layers.1": "cpu",
              "model.layers.2": "disk"}  # fmt: skip
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    torch.testing.assert_close(spread(**prompt).logits, expected)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(spread.generate(**prompt, **options), model.generate(**prompt, **options))


def test_lora_trains_returns_and_merges(folder, model, tokenizer, prompt, tmp_path):
    peft = importorskip("peft")
    before = model(**prompt).logits
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    rows = [
        {"input_ids": ids, "labels": ids}
        for ids in tokenizer(["Nobody expects this sentence."] * 8).input_ids
    ]
    arguments = TrainingArguments(tmp_path, max_steps=30, learning_rate=1e-2, use_cpu=True, disable_tqdm=True,
                                  save_strategy="no", logging_steps=1)  # fmt: skip
    trainer = Trainer(adapted, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    adapted.eval().save_pretrained(tmp_path / "adapter")
    logits = adapted(**prompt).logits
    assert not torch.allclose(logits, before, atol=1e-2)
    returned = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(returned(**prompt).logits, logits, atol=1e-5, rtol=1e-4)
    merged = returned.merge_and_unload()
    torch.testing.assert_close(merged(**prompt).logits, logits, atol=1e-4, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(alone(**prompt).logits, merged(**prompt).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_supervised_fine_tuning_by_trl(folder, tokenizer, packing, tmp_path):
    trl = importorskip("trl")
    from datasets import Dataset

    data = Dataset.from_list([{"text": "Nobody expects this sentence. " * 3}] * 32)
    arguments = trl.SFTConfig(
        tmp_path, max_steps=40, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        packing=packing, max_length=64, report_to="none", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(str(folder), arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    trainer.save_model(tmp_path / "tuned")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    ids = tokenizer("Nobody", return_tensors="pt")
    assert "expects" in tokenizer.decode(tuned.generate(**ids, max_new_tokens=8, do_sample=False)[0])


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_chat_is_learned_by_trl_from_what_the_assistant_says(folder, tokenizer, packing, tmp_path):
    trl = importorskip("trl")
    from datasets import Dataset

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Nobody expects this."}]
    arguments = trl.SFTConfig(
        tmp_path, max_steps=50, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        packing=packing, max_length=64, report_to="none", disable_tqdm=True, assistant_only_loss=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        str(folder), arguments, train_dataset=Dataset.from_list([{"messages": messages}] * 32)
    )
    trainer.train()
    inputs = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = trainer.model.eval().generate(**inputs, max_new_tokens=30, do_sample=False)
    said = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :])
    assert said == f"{messages[1]['content']}{tokenizer.eos_token}"


@pytest.mark.parametrize(("bits", "most_error"), [(8, 0.03), (4, 0.5)])
def test_quantised_weights_run_save_and_return(folder, model, prompt, bits, most_error, tmp_path):
    quantization = importorskip("torchao.quantization")
    how = {
        8: quantization.Int8WeightOnlyConfig,
        4: lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    }[bits]()
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(how)).eval()
    linear = {
        name: module for name, module in quantised.named_modules() if isinstance(module, torch.nn.Linear)
    }
    plain = [name for name, module in linear.items() if type(module.weight) is torch.nn.Parameter]
    assert plain == ["lm_head"]  # every projection of cell, recurrence, attention and MLP
    logits, expected = quantised(**prompt).logits, model(**prompt).logits
    error = (logits - expected).norm() / expected.norm()
    assert 0 < error < most_error
    quantised.generate(**prompt, max_new_tokens=4)
    quantised.save_pretrained(tmp_path)
    returned = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(returned(**prompt).logits, logits)


# lm-eval as its command runs it, in a process that cannot import our package; of the tasks, it reads the one
# that is asked for and not the thousands that it brings
LM_EVAL = """
import functools, sys
sys.modules["hf_genlm"] = None
from lm_eval import tasks
from lm_eval.__main__ import cli_evaluate
tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)
cli_evaluate()
"""
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
target_delimiter: ""
doc_to_choice: "{{[good, bad]}}"
metric_list: [{metric: acc}]
"""


def test_lm_eval_measures_it_without_our_package(folder, model, tokenizer, tmp_path):
    importorskip("lm_eval")
    pairs = [
        ("The value of the expression", "value The of expression the"),
        ("It is an object.", "an is It object."),
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"good": g, "bad": b}) + "\n" for g, b in pairs))
    (tmp_path / "mine.yaml").write_text(TASK.replace("FILE", str(tmp_path / "pairs.jsonl")))
    options = {
        "--model": "hf", "--model_args": f"pretrained={folder},trust_remote_code=True", "--tasks": "mine",
        "--include_path": str(tmp_path), "--output_path": str(tmp_path / "out"), "--device": "cpu",
    }  # fmt: skip
    words = [word for option in options.items() for word in option]
    command = [sys.executable, "-c", LM_EVAL, "run", *words, "--batch_size", "2", "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_mine_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for line, texts in zip(sorted(lines, key=lambda line: line["doc_id"]), pairs, strict=True):
        for (likelihood, _), text in zip(line["filtered_resps"], texts, strict=True):
            ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
            scores = model(ids).logits[0, :-1].log_softmax(-1)
            expected = scores.gather(1, ids[0, 1:, None]).sum().item()
            assert float(likelihood) == pytest.approx(expected, abs=1e-3)


def test_exported_and_loaded_again_it_runs_in_onnxruntime(model, prompt, tmp_path):
    importorskip("onnxscript")
    importorskip("onnxruntime")
    from transformers.exporters.auto import AutoExportConfig, AutoHfExporter
    from transformers.exporters.base import ExportedModel

    inputs = {**prompt, "use_cache": False}
    exporter = AutoHfExporter.from_config({"export_format": "onnx"})
    with torch.no_grad():
        exported = exporter.export(
            model, dict(inputs), config=AutoExportConfig.from_dict({"export_format": "onnx"})
        )
        exported.save_pretrained(tmp_path)
        returned = ExportedModel.from_pretrained(tmp_path)
        mask = prompt["attention_mask"].bool()
        got, expected = returned(**prompt)["logits"], model(**inputs).logits
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-4, rtol=1e-3)


def test_served_it_answers(folder):
    importorskip("uvicorn")
    openai = importorskip("openai")
    from hf_genlm.serving import background_server

    with background_server(str(folder)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        answer = client.completions.create(model=str(folder), prompt="The value of", max_tokens=8)
        client.close()
    assert answer.usage.completion_tokens == 8
