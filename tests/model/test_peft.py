"""Promise: LoRA works on every mixer; the fused kernels do not read past an adapter."""

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'hf_genlm[test]'")


def test_lora_changes_trains_and_merges(model, tokens):
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
