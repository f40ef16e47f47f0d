"""Contracts of every model, as functions: tests run them over all stacks, test_faults.py with faults put in.

A check raises AssertionError where a model breaks its contract.
"""

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import PAD, SHALLOW, build_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from hf_genlm.model import GenLMForCausalLM

N_NEW = 9  # tokens that `generate` writes


def assert_caught(check: Callable, *args: Any, at: str, error: type[Exception] = AssertionError) -> None:
    """Assert that `check` fails with `error` in the statement of this file that contains `at`."""
    with pytest.raises(error) as caught:
        check(*args)
    assert caught.type is error
    frames = traceback.extract_tb(caught.value.__traceback__)
    own = [frame for frame in frames if frame.filename == __file__ and frame.name != "assert_caught"]
    assert at in (own[-1].line or ""), f"it failed elsewhere: {own[-1].line}"


def generate(model: GenLMForCausalLM, prompt: torch.Tensor | None, **options: Any) -> Any:
    """Greedy search for `N_NEW` tokens, unless `options` say otherwise."""
    return model.generate(
        prompt, **{"max_new_tokens": N_NEW, "do_sample": False, "eos_token_id": None, **options}
    )


# generation


def check_greedy_search(model: GenLMForCausalLM, tokens: torch.Tensor) -> None:
    """With a cache as without one."""
    cached, plain = generate(model, tokens), generate(model, tokens, use_cache=False)
    assert torch.equal(cached, plain)


def check_beam_search(model: GenLMForCausalLM, tokens: torch.Tensor) -> None:
    """With a cache as without one."""
    options = {"num_beams": 4, "num_return_sequences": 2, "eos_token_id": model.config.eos_token_id}
    cached = generate(model, tokens, **options)
    assert torch.equal(cached, generate(model, tokens, use_cache=False, **options))


def check_left_padded_batch(model: GenLMForCausalLM, tokens: torch.Tensor) -> None:
    """Rows of a padded batch as alone."""
    prompts = [tokens[0, :3], tokens[1], tokens[2, :7]]
    batch = torch.stack([torch.nn.functional.pad(p, (12 - len(p), 0), value=PAD) for p in prompts])
    together = generate(model, batch, attention_mask=(batch != PAD).long())
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row[12:], generate(model, prompt[None])[0, len(prompt) :])


def check_rejected_drafts(model: GenLMForCausalLM, tokens: torch.Tensor) -> None:
    """Prompt lookup and a draft model propose wrong tokens; the text equals that of greedy search."""
    prompt = tokens[:1].repeat(1, 2)
    expected = generate(model, prompt, max_new_tokens=20)
    by_lookup = generate(model, prompt, max_new_tokens=20, prompt_lookup_num_tokens=3)
    assert torch.equal(by_lookup, expected)
    by_draft = generate(model, prompt, max_new_tokens=20, assistant_model=build_model(["gru"], seed=5))
    assert torch.equal(by_draft, expected)


def check_static_cache_after_reset(model: GenLMForCausalLM, tokens: torch.Tensor) -> None:
    """A static cache serves another prompt after its reset."""
    cache = StaticCache(model.config, max_cache_len=40)
    for prompt in (tokens, tokens.flip(0)):
        cached = generate(model, prompt, past_key_values=cache)
        assert torch.equal(cached, generate(model, prompt))
        cache.reset()


# rows


def check_packed_row(model: GenLMForCausalLM, tokens: torch.Tensor) -> None:
    """A row of packed documents has the logits of its documents alone."""
    documents = [tokens[0, :5], tokens[1, :12], tokens[2, :1], tokens[0, 3:9]]
    row = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    alone = torch.cat([model(document[None], use_cache=False).logits[0] for document in documents])
    for use_cache in (False, True):
        packed = model(row, position_ids=positions, use_cache=use_cache)
        torch.testing.assert_close(packed.logits[0], alone, atol=1e-5, rtol=0)


# saving and loading


def check_reload_is_bit_equal(model: GenLMForCausalLM, tokens: torch.Tensor, folder: Path) -> None:
    """Weights and logits of a saved and loaded model are those of the model."""
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(loaded) is GenLMForCausalLM
    expected = model.state_dict()
    assert expected.keys() == loaded.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    logits = loaded(tokens, use_cache=False).logits
    assert torch.equal(logits, model(tokens, use_cache=False).logits)
    table = AutoModel.from_pretrained(folder).embed_tokens.weight
    assert torch.equal(table, model.model.embed_tokens.weight)


def check_missing_weights(stack: str, folder: Path) -> None:
    """Of a file without half of a mixer's tensors, these are initialised and the others kept."""
    from safetensors.torch import load_file, save_file

    model = build_model(stack)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    gone = [
        name for name in weights if "layers.1" in name and ("rec_proj.weight" in name or "value_proj" in name)
    ]
    kept = {name: tensor for name, tensor in weights.items() if name not in gone}
    assert gone
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = GenLMForCausalLM.from_pretrained(folder)
    for name, tensor in kept.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for name in gone:
        fresh = loaded.state_dict()[name]
        assert fresh.isfinite().all()
        assert 0 < fresh.std() < 1
        if "rec_proj" in name:
            gate = fresh[:32].double()
            torch.testing.assert_close(gate @ gate.T, torch.eye(32, dtype=torch.double), atol=1e-5, rtol=0)


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of each file by its name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def check_saves_are_equal(model: GenLMForCausalLM, folder: Path) -> None:
    """A new, a loaded and a headless model save the same files, whatever auto_map they came with."""
    model.save_pretrained(folder / "first")
    first = files_of(folder / "first")
    code = ["configuration_genlm.py", "modeling_genlm.py"]
    assert sorted(first) == sorted(["config.json", "generation_config.json", "model.safetensors", *code])
    auto_map = json.loads(first["config.json"])["auto_map"]
    heads = {"AutoModelForSequenceClassification", "AutoModelForTokenClassification"}
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} | heads
    loaded = AutoModelForCausalLM.from_pretrained(folder / "first")
    loaded.config.auto_map = {"AutoModel": "someone/elses--modeling_genlm.GenLMModel"}
    loaded.save_pretrained(folder / "second")
    assert files_of(folder / "second") == first
    AutoModel.from_pretrained(folder / "first").save_pretrained(folder / "base")
    base = files_of(folder / "base")
    assert {name: base[name] for name in code} == {name: first[name] for name in code}
    assert json.loads(base["config.json"])["auto_map"] == auto_map


# training


def rows_of(n: int = 16, seed: int = 0) -> list[dict]:
    """`n` rows of 4 to 11 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (n,), generator=generator).tolist()
    return [{"input_ids": torch.randint(2, 61, (length,), generator=generator)} for length in lengths]


class Collator(DataCollatorForLanguageModeling):
    """transformers' own without a tokenizer: right padding, -100 at padding."""

    def __init__(self):
        pass

    def __call__(self, rows):
        ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], True)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer_of(model: GenLMForCausalLM, folder: Path, **arguments: Any) -> Trainer:
    """transformers' Trainer for four steps on `rows_of`."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True,
                "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(folder, **{**settings, **arguments}),
        train_dataset=rows_of(),
        eval_dataset=rows_of(seed=1),
        data_collator=Collator(),
    )


def check_gradient_accumulation(stack: str, folder: Path) -> None:
    """Accumulated steps equal one large batch: with rows of unequal length only by num_items_in_batch."""
    weights = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = build_model(stack)
        trainer = trainer_of(
            model, folder, optim="sgd", learning_rate=0.05, train_sampling_strategy="sequential",
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*weights, atol=2e-5, rtol=1e-4)


COMPILER = "aot_eager"  # traces as the default backend but generates no code: ten times as fast


def loss_and_gradients(model: GenLMForCausalLM, run: Callable, **inputs: Any) -> list[torch.Tensor]:
    """The loss by `run`, which is `model` or a compiled form of it, and the gradients of all parameters."""
    loss = run(**inputs).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def check_training_is_one_graph(kind: str, is_packed: bool, tokens: torch.Tensor) -> None:
    """torch.compile without a graph break gives the loss and gradients of the model."""
    model = build_model(SHALLOW[kind]).train()
    tokens = tokens[:, :7]  # more than a window; a step of a cell is traced for each
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    if is_packed:
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in (2, 4, 1)]).repeat(3, 1)
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER)
    found = loss_and_gradients(model, compiled, **inputs)
    for got, expected in zip(found, loss_and_gradients(model, model, **inputs), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def check_lora(model: GenLMForCausalLM, tokens: torch.Tensor) -> None:
    """LoRA on every Linear changes the logits, gets gradients everywhere, and can be merged."""
    import peft

    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name  # tied
    ]
    before = model(tokens, use_cache=False).logits
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    logits = adapted(tokens, use_cache=False).logits
    assert not torch.allclose(logits, before, atol=1e-3)
    loss = adapted(tokens, labels=tokens, use_cache=False).loss
    adapters = [p for p in adapted.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, adapters)
    assert len(adapters) == 2 * len(targets)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens, use_cache=False).logits, logits, atol=1e-4, rtol=1e-4)
