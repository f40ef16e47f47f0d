"""Promise: LoRA works on every mixer; the fused kernels do not read past an adapter."""

import pytest
import torch
from support import contracts
from support.models import STACKS, build_model
from transformers import AutoModelForCausalLM

pytest.importorskip("peft", reason="peft is not installed: pip install '.[test]'")


def test_lora_changes_trains_and_merges(model, tokens):
    contracts.check_lora(model, tokens)


@pytest.mark.parametrize("stack", STACKS)
def test_lora_finds_its_targets_by_itself(stack, tokens):
    import peft

    adapted = peft.get_peft_model(build_model(stack), peft.LoraConfig(init_lora_weights=False))
    mixers = {name.split(".mixer.")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert len(mixers) == len(adapted.get_base_model().model.layers)


@pytest.mark.parametrize("embedding_size", [8, 32])
def test_head_that_peft_unties_is_saved_with_its_projection(embedding_size, tokens, tmp_path):
    """`modules_to_save` copies a head that was tied through W; the merged model loads with its logits."""
    import peft

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
