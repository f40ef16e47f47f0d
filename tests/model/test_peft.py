"""Promise: every method of PEFT works on every decoder that it suits, and is refused by name on the others;
the fused kernels do not read past an adapter."""

import warnings

import pytest
import torch
from support import contracts
from support.models import EOS, PAD, READS_WORDS, STACKS, VOCAB, build_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_genlm.model import RECURRENT_MIXERS

peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[test]'")

PROMPT = {"num_virtual_tokens": 3}
# by peft_type, what a small model needs beside defaults that are made for large ones
SETTINGS = {
    "C3A": {"block_size": 8},
    "MISS": {"r": 8},
    "SHIRA": {"r": 4},
    "FOURIERFT": {"n_frequency": 50},
    "WAVEFT": {"n_frequency": 50},
    "VBLORA": {"vector_length": 8, "num_vectors": 8},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "POLY": {"n_tasks": 1, "n_skills": 1},
    "ADALORA": {"total_step": 10},
    "TRAINABLE_TOKENS": {"token_indices": [3]},
    "PROMPT_TUNING": PROMPT,
    "P_TUNING": {**PROMPT, "encoder_hidden_size": 8},
    "MULTITASK_PROMPT_TUNING": {**PROMPT, "num_tasks": 1},
    "CPT": {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
    "PREFIX_TUNING": PROMPT,
    "CARTRIDGE": PROMPT,
}
PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")  # keys and values for every layer
# PEFT's own refusals: it knows Llama's modules only; copies the config with fewer layers; needs adapters
REFUSED = {"ADAPTION_PROMPT": "genlm", "SHADOW": "mixer_types", "XLORA": "use_cache"}
METHODS = [method.value for method in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING]
ATTENTION_ONLY = [
    name for name, stack in STACKS.items() if not set(stack["mixer_types"]) & set(RECURRENT_MIXERS)
]


def adapt(model, method: str):
    """A model with an adapter by the method's defaults, moved away from its start."""
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
    adapted = peft.get_peft_model(model, config(task_type="CAUSAL_LM", **SETTINGS.get(method, {})))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted.eval()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_by_its_defaults(method, tokens):
    """Its target modules are found, and its weights change the loss."""
    model = build_model(
        "full_attention" if method in PREFIXES else ["lstm", "gated_linear", "full_attention"]
    )
    if method in REFUSED:
        with pytest.raises((ValueError, AttributeError), match=REFUSED[method]):
            adapt(model, method)
        return
    adapted = adapt(model, method).train()
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    if method in ("MULTITASK_PROMPT_TUNING", "POLY"):
        given["task_ids"] = torch.zeros(len(tokens), dtype=torch.long)
    if method == "CPT":
        given["input_type_mask"] = torch.full_like(tokens, 4)
    adapted(**given).loss.backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad and p.grad is not None]
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def greedy(adapted, ids: torch.Tensor, mask: torch.Tensor, n_new: int) -> torch.Tensor:
    """Greedy search by whole forward passes."""
    for _ in range(n_new):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        logits = adapted(input_ids=ids, **given).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


@pytest.mark.parametrize(
    ("stack", "method"),
    [(stack, "PROMPT_TUNING") for stack, config in STACKS.items() if not READS_WORDS & set(config)]
    + [(stack, "PREFIX_TUNING") for stack in ATTENTION_ONLY]
    + [("factorised", "P_TUNING"), ("gru", "CPT"), ("llama", "CARTRIDGE")],
)
def test_prompt_methods_generate_what_their_forward_computes(stack, method, tokens):
    """The prompt is given once, before the first token; rows may be padded; and the adapter is saved."""
    adapted = adapt(build_model(stack, eos_token_id=None), method)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    expected = greedy(adapted, tokens, mask, 5)
    found = adapted.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mixer", RECURRENT_MIXERS)
def test_prompts_before_a_static_state(mixer, tokens):
    adapted = adapt(build_model([mixer], eos_token_id=None), "PROMPT_TUNING")
    options = {"input_ids": tokens, "max_new_tokens": 5, "do_sample": False}
    found = adapted.generate(**options, cache_implementation="static")
    assert torch.equal(found, adapted.generate(**options))


@pytest.mark.parametrize("option", ["prompt_lookup_num_tokens", "prefill_chunk_size"])
@pytest.mark.parametrize("stack", ["lstm", "full_attention"])
def test_what_peft_would_cut_to_one_token_is_refused(stack, option):
    """PEFT's prompt methods keep the last of the tokens that follow a cache, also of drafts."""
    adapted = adapt(build_model(stack, eos_token_id=None), "PROMPT_TUNING")
    row = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    with pytest.raises(ValueError, match="one token at a time"):
        adapted.generate(input_ids=row, max_new_tokens=8, do_sample=False, **{option: 2})


def test_an_adapter_of_prompts_is_loaded_with_its_width(tokens, tmp_path):
    """The embedding is narrower than the prompts: these are of the width of the layers."""
    adapted = adapt(build_model("factorised"), "PROMPT_TUNING")
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build_model("factorised"), tmp_path).eval()
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    torch.testing.assert_close(loaded(**given).logits, adapted(**given).logits)


def test_embeddings_may_be_given_before_or_after_their_projection(tokens):
    model = build_model("factorised")
    narrow = model.get_input_embeddings()(tokens)
    wide = model.model.embed_proj(narrow)
    expected = model(tokens).logits
    for inputs_embeds in (narrow, wide):
        torch.testing.assert_close(model(inputs_embeds=inputs_embeds).logits, expected)


@pytest.mark.parametrize("method", PREFIXES)
@pytest.mark.parametrize("stack", [*RECURRENT_MIXERS, "hybrid", "recurrent_first"])
def test_keys_and_values_for_a_recurrent_layer_are_refused_with_the_remedy(stack, method, tokens):
    with pytest.raises(ValueError, match=r"recurrent.*LoRA or prompt tuning"):
        adapt(build_model(stack), method)(input_ids=tokens)


def test_prompts_for_a_table_of_pairs_are_refused_with_the_remedy(tokens):
    with pytest.raises(ValueError, match=r"bigram_size needs input_ids.*use LoRA"):
        adapt(build_model("bigram"), "PROMPT_TUNING")(input_ids=tokens)


def test_modules_are_found_if_peft_is_imported_after_the_model_was_built(monkeypatch, tokens):
    model = build_model("gru")
    for name, table in vars(peft.utils.constants).items():
        if name.endswith("_MODULES_MAPPING"):
            monkeypatch.delitem(table, "genlm", raising=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig())
    assert any("lora_A" in name for name, _ in adapted.named_parameters())


def test_lora_changes_trains_and_merges(model, tokens):
    contracts.check_lora(model, tokens)


@pytest.mark.parametrize("stack", STACKS)
def test_lora_finds_its_targets_by_itself(stack, tokens):
    adapted = peft.get_peft_model(build_model(stack), peft.LoraConfig(init_lora_weights=False))
    mixers = {name.split(".mixer.")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert len(mixers) == len(adapted.get_base_model().model.layers)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("embedding_size", [8, 32])
def test_tied_weights_move_at_a_merge_as_those_of_a_llama(embedding_size, target, tokens, tmp_path):
    """One matrix serves as embedding and head: a merged adapter of either changes both, and PEFT warns."""

    def merge(model) -> tuple[list[str], bool, bool]:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=[target], r=2)).eval()
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    torch.nn.init.ones_(parameter)
            logits = adapted(input_ids=tokens).logits
            (layer,) = (m for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
            expected = layer.base_layer.weight + layer.get_delta_weight("default")
            merged = adapted.merge_and_unload()
        assert torch.equal(merged.get_input_embeddings().weight, expected)
        assert torch.equal(merged.get_output_embeddings().weight, expected)
        merged.save_pretrained(tmp_path)
        loaded = type(merged).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=tokens).logits, merged(input_ids=tokens).logits)
        said = [str(w.message) for w in warned if "tie_word_embeddings" in str(w.message)]
        changed = not torch.allclose(merged(input_ids=tokens).logits, logits, atol=0.1)
        return said, changed, merged.config.tie_word_embeddings

    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=EOS,
        )
    ).eval()  # fmt: skip
    ours = merge(build_model(["gru", "full_attention"], embedding_size=embedding_size))
    assert ours == merge(llama)
    said, changed, is_tied = ours
    assert (len(said), changed, is_tied) == (2, True, True)  # at creation and at the merge


@pytest.mark.parametrize("embedding_size", [8, 32])
def test_head_that_peft_unties_is_saved_with_its_projection(embedding_size, tokens, tmp_path):
    """`modules_to_save` copies a head that was tied through W; the merged model loads with its logits."""
    model = build_model(["gru"], embedding_size=embedding_size)
    config = peft.LoraConfig(target_modules=["in_proj"], modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    logits = adapted(input_ids=tokens).logits
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, logits, atol=1e-4, rtol=1e-4)
