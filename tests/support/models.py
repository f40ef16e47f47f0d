"""Helpers shared by tests: models."""

import os
import subprocess
import sys

import numpy as np
import torch

from hf_genlm.model import DECODERS, MIXERS, GenLMConfig, GenLMForCausalLM
from hf_genlm.training.counting import NgramCounts, count_ngrams

# every mixer of the table by itself, so that a new one is tested unasked, mixtures, and every way to have
# fewer parameters
STACKS = {mixer: {"mixer_types": [mixer, mixer]} for mixer in MIXERS}
STACKS["hybrid"] = {"mixer_types": ["gated_linear", "full_attention", "lstm"]}
STACKS["recurrent_first"] = {"mixer_types": ["gru", "sliding_attention", "elman"]}
STACKS["factorised"] = {
    "mixer_types": ["lstm", "sliding_attention"],
    "embedding_size": 8,
    "output_bias": True,
    "mlp_rank": 12,
}
STACKS["shared"] = {
    "mixer_types": ["gated_linear", "full_attention"] * 2,
    "shared_layers": 2,
    "num_key_value_heads": 1,
    "final_logit_softcapping": 20.0,
}
STACKS["llama"] = {
    "mixer_types": ["full_attention", "sliding_attention"],
    "gated_mlp": True,
    "hidden_act": "silu",
    "qk_norm": False,
}
STACKS["gated_factorised"] = {"mixer_types": ["full_attention"], "gated_mlp": True, "mlp_rank": 12}
STACKS["bigram"] = {"mixer_types": ["gated_linear", "full_attention"], "bigram_size": 32}
STACKS["counts"] = {"mixer_types": ["full_attention", "gated_linear"], "ngram_order": 3, "ngram_history": 16}
STACKS["counts_attention"] = {"mixer_types": ["full_attention"], "ngram_order": 4}
READS_WORDS = {"bigram_size", "ngram_order"}  # fields with which a model needs `input_ids`


# the kinds of config that transformers' own tests run over
KINDS = {mixer: {"mixer_types": [mixer, mixer]} for mixer in MIXERS}
KINDS["hybrid"] = {"mixer_types": ["gated_linear", "full_attention"]}
KINDS["factorised"] = {
    "mixer_types": ["lstm", "sliding_attention"],
    "embedding_size": 24,
    "output_bias": True,
    "mlp_rank": 16,
}
KINDS["shared"] = {"mixer_types": ["full_attention"] * 2, "shared_layers": 2, "num_key_value_heads": 1}


# one layer of each kind is enough for a tracer; more only takes longer
SHALLOW = {mixer: [mixer] for mixer in MIXERS} | {"hybrid": ["lstm", "full_attention"]}


NETWORKS = [decoder for decoder in DECODERS if decoder != "ngram"]
VOCAB, PAD, EOS = 61, 0, 1


def build_model(stack: str | list[str], seed: int = 0, **overrides) -> GenLMForCausalLM:
    """A small model in eval mode, of a stack by its name or of mixers.

    New models start as the identity: every matrix is given something to do.
    """
    chosen = STACKS[stack] if isinstance(stack, str) else {"mixer_types": stack}
    shapes = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
              "sliding_window": 5, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}  # fmt: skip
    config = GenLMConfig(**{**shapes, **chosen, **overrides})
    counts = None
    if config.holds_counts:
        counts = count_random_text(config.ngram_order, config.vocab_size)
        config.ngram_sizes = counts.sizes
    torch.manual_seed(seed)
    model = GenLMForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    if counts is not None:
        counts.fill(model)
    return model


def count_random_text(order: int, vocab_size: int = VOCAB, max_entries: int | None = None) -> NgramCounts:
    """Counts of a random text in which some tokens are frequent."""
    return count_ngrams(random_text(vocab_size), order, vocab_size, EOS, max_entries)


def random_text(vocab_size: int = VOCAB) -> np.ndarray:
    """The ids (3000,) of documents of 96 tokens."""
    ids = np.random.default_rng(0).zipf(1.3, 3000) % (vocab_size - 2) + 2
    ids[::97] = EOS
    return ids


def build_ngram(order: int = 4, max_entries: int | None = None) -> tuple[GenLMForCausalLM, NgramCounts]:
    """An n-gram model of `random_text`, and its counts."""
    counts = count_random_text(order, max_entries=max_entries)
    config = GenLMConfig(
        mixer_types=["ngram"], ngram_order=order, ngram_sizes=counts.sizes, vocab_size=VOCAB,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=EOS,
    )  # fmt: skip
    model = GenLMForCausalLM(config).eval()
    counts.fill(model)
    return model, counts


def by_triton_interpreter(code: str) -> str:
    """The last word that `code` prints, its Triton kernels run without a GPU; else the end of its errors."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    return (done.stdout.split() or [done.stderr[-2000:]])[-1]
