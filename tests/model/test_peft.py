"""Promise: LoRA works on every mixer; the fused kernels do not read past an adapter."""

import pytest
from support import contracts

pytest.importorskip("peft", reason="peft is not installed: pip install '.[test]'")


def test_lora_changes_trains_and_merges(model, tokens):
    contracts.check_lora(model, tokens)
