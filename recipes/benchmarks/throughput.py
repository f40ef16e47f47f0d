"""Training tokens a second of ours and of transformers' models of one shape, in alternating steps, and the
share of this machine's own matrix-product rate that they reach.

    python recipes/benchmarks/throughput.py [--tokens 256] [--rows 8] [--width 256] [--layers 6] [--rounds 7]

A step is forward, backward, clipping and AdamW, in float32, on random tokens. The peak is that of a product
of two 2,048 x 2,048 matrices, timed between the rounds. The share counts what doctor counts: every linear
layer and, for attention, every visible pair of tokens, forward and twice that backward.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from hf_genlm.doctor import count_flops
from hf_genlm.model import GenLMConfig, GenLMForCausalLM

VOCAB = 4096
DECODERS = ("transformer", "gated_linear", "lstm", "gru", "hybrid")
PEAK_SIZE = 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("tokens", 256), ("rows", 8), ("width", 256), ("layers", 6), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="", help="models whose name holds one of these words, by commas")
    options = parser.parse_args()
    models = {
        name: build(options.width, options.layers, options.tokens)
        for name, build in BUILDERS.items()
        if any(word in name for word in options.only.split(","))
    }
    steps = {name: step_of(model, options.rows, options.tokens) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    peaks = []
    for _ in range(options.rounds + 1):
        peaks.append(measure_peak())
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    peak = statistics.median(peaks[1:])
    print(f"{torch.get_num_threads()} threads, matrix products {peak / 1e9:.0f} GFLOP/s\n")
    print("| model | parameters | tokens/s | share of the peak |\n|---|---|---|---|")
    n_tokens = options.rows * options.tokens
    for name, model in models.items():
        step_s = statistics.median(seconds[name][1:])
        share = (
            "" if not isinstance(model, GenLMForCausalLM) else f"{share_of(model, options, step_s, peak):.2f}"
        )
        count = sum(p.numel() for p in model.parameters())
        print(f"| {name} | {count:,} | {n_tokens / step_s:,.0f} | {share} |")


def share_of(model: GenLMForCausalLM, options: argparse.Namespace, step_s: float, peak: float) -> float:
    flops = sum(count_flops(model, options.tokens).values())
    return 3 * options.rows * flops / step_s / peak


def measure_peak() -> float:
    """Floating-point operations a second."""
    a, b = torch.randn(PEAK_SIZE, PEAK_SIZE), torch.randn(PEAK_SIZE, PEAK_SIZE)
    began = time.perf_counter()
    a @ b
    return 2 * PEAK_SIZE**3 / (time.perf_counter() - began)


def step_of(model: nn.Module, rows: int, tokens: int) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, VOCAB, (rows, tokens))
    ours = {"skip_logits": True} if isinstance(model, GenLMForCausalLM) else {}

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False, **ours).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_llama(width: int, layers: int, tokens: int) -> nn.Module:
    # two matrices of 4 d and three of 8/3 d hold as many weights
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=width, intermediate_size=8 * width // 3,
                         num_hidden_layers=layers, num_attention_heads=max(1, width // 64),
                         max_position_embeddings=tokens, tie_word_embeddings=True)  # fmt: skip
    return LlamaForCausalLM(config)


def build_gpt2(width: int, layers: int, tokens: int) -> nn.Module:
    config = GPT2Config(vocab_size=VOCAB, n_embd=width, n_layer=layers, n_head=max(1, width // 64),
                        n_positions=tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return GPT2LMHeadModel(config)


def build_recurrent_gemma(width: int, layers: int, tokens: int) -> nn.Module:
    config = RecurrentGemmaConfig(vocab_size=VOCAB, hidden_size=width, intermediate_size=6 * width,
                                  num_hidden_layers=layers, num_attention_heads=max(1, width // 64),
                                  lru_width=width, attention_window_size=tokens)  # fmt: skip
    return RecurrentGemmaForCausalLM(config)


def builder_of(decoder: str) -> Callable[[int, int, int], nn.Module]:
    return lambda width, layers, tokens: GenLMForCausalLM(
        GenLMConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            decoder=decoder,
            num_hidden_layers=layers,
            max_position_embeddings=tokens,
        )
    )


BUILDERS = {f"ours, {decoder}": builder_of(decoder) for decoder in DECODERS} | {
    "Llama": build_llama,
    "GPT-2": build_gpt2,
    "RecurrentGemma": build_recurrent_gemma,
}

if __name__ == "__main__":
    main()
