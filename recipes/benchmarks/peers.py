"""What others would train, for the benchmarks beside this file: a GPT-2 of transformers in a plain loop."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

WARMUP = 0.05
FLOOR = 0.1  # of the peak rate, where the cosine ends
Batches = Iterator[dict[str, torch.Tensor]]


def build_gpt2(vocab_size: int, context: int, layers: int, width: int, heads: int) -> GPT2LMHeadModel:
    """A new GPT-2, without dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def train_gpt2(
    model: GPT2LMHeadModel,
    batches: Batches,
    rate: float,
    progress: Callable[[int, float], float],
    beta2: float = 0.95,
) -> dict[str, Any]:
    """AdamW with weight decay 0.1 on matrices, clipping at 1, warm-up and cosine, until `progress(steps,
    seconds)` is 1.

    Returns:
        {"steps", "seconds"} of the loop.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, beta2), fused=True)
    model.train()
    began, step = time.monotonic(), 0
    while (share := progress(step, time.monotonic() - began)) < 1:
        up = min(1.0, share / WARMUP + 1e-3)
        cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate * up * cosine
        model(**next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    model.eval()
    return {"steps": step, "seconds": time.monotonic() - began}
