"""What others would train, for the benchmarks beside this file: models of transformers in a plain loop."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_genlm.text.packing import PackedRows, collate
from hf_genlm.training.corpus import TokenizedCorpus

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


def build_llama(vocab_size: int, context: int, layers: int, width: int, heads: int) -> LlamaForCausalLM:
    """A new Llama, with a tied head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=context,
        hidden_size=width,
        intermediate_size=32 * round(width * 8 / 3 / 32),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def packed_batches(corpus: TokenizedCorpus, context: int, n_rows: int) -> Batches:
    """Shuffled batches of packed rows of a tokenized text, without end."""
    tokenizer = corpus.tokenizer
    rows = PackedRows(corpus.train, context, tokenizer.eos_token_id, tokenizer.pad_token_id)
    loader = DataLoader(rows, batch_size=n_rows, shuffle=True, collate_fn=collate)
    while True:
        for batch in loader:
            yield {name: batch[name] for name in ("input_ids", "labels")}


def train_peer(
    model: PreTrainedModel,
    batches: Batches,
    rate: float,
    progress: Callable[[int, float], float],
    beta2: float = 0.95,
    uses_muon: bool = False,
) -> dict[str, Any]:
    """AdamW with weight decay 0.1 on matrices, clipping at 1, warm-up and cosine, until `progress(steps,
    seconds)` is 1; with `uses_muon`, torch's Muon for the matrices of the layers, at the same rate.

    Returns:
        {"steps", "seconds"} of the loop.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizers: list[torch.optim.Optimizer] = []
    if uses_muon:
        inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
        matrices = [p for p in matrices if all(p is not other for other in inner)]
        optimizers.append(torch.optim.Muon(inner, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=(0.9, beta2), fused=True))
    model.train()
    began, step = time.monotonic(), 0
    while (share := progress(step, time.monotonic() - began)) < 1:
        up = min(1.0, share / WARMUP + 1e-3)
        cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * up * cosine
        model(**next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
    model.eval()
    return {"steps": step, "seconds": time.monotonic() - began}
