"""Training tokens a second of ours and of transformers' models of one shape, in turns, and the share of this
machine's own matrix-product rate that they reach.

    python recipes/benchmarks/throughput.py [--tokens 256] [--rows 8] [--width 256] [--layers 6] [--rounds 7]
        [--compile inductor]

A step is forward, backward, clipping and AdamW, in float32, on random tokens. A turn is a step that is not
timed and two that are; ours keep freed memory meanwhile, as their training does (hf_genlm.memory). The peak
is that of a product of two 2,048 x 2,048 matrices, timed between the rounds. The share counts what doctor
counts: every linear layer and, for attention, every visible pair of tokens, forward and twice that backward.
"""

import argparse
import contextlib
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
from hf_genlm.memory import keeping_memory
from hf_genlm.model import GenLMConfig, GenLMForCausalLM

DECODERS = ("transformer", "gated_linear", "lstm", "gru", "hybrid")
SHAPE = {"vocab": 4096, "tokens": 256, "rows": 8, "width": 256, "layers": 6}
STEPS = 2  # timed in a turn
PEAK_SIZE = 2048
PEAKS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="models whose name holds one of these words, by commas")
    parser.add_argument(
        "--compile", metavar="BACKEND", help="ours by torch.compile too, as training.torch_compile_backend"
    )
    options = parser.parse_args()
    models = {
        name: build(options)
        for name, build in BUILDERS.items()
        if any(word in name for word in options.only.split(","))
    }
    steps = {name: step_of(model, options) for name, model in models.items()}
    for name in [name for name in models if name.startswith("ours") and options.compile]:
        compiled = f"{name}, {options.compile}"
        models[compiled] = BUILDERS[name](options)
        steps[compiled] = step_of(models[compiled], options, options.compile)
        print(f"{compiled}: the first step takes {timed(steps[compiled]):.1f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    peaks = []
    for _ in range(options.rounds):
        peaks += [measure_peak() for _ in range(PEAKS)]
        for name, step in steps.items():
            with keeping_memory() if name.startswith("ours") else contextlib.nullcontext():
                step()
                seconds[name] += [timed(step) for _ in range(STEPS)]
    peak = statistics.median(peaks)
    print(f"{torch.get_num_threads()} threads, matrix products {peak / 1e9:.0f} GFLOP/s\n")
    print("| model | parameters | tokens/s | ms a step, slowest | share of the peak |\n|---|---|---|---|---|")
    n_tokens = options.rows * options.tokens
    for name, model in models.items():
        step_s = statistics.median(seconds[name])
        share = (
            "" if not isinstance(model, GenLMForCausalLM) else f"{share_of(model, options, step_s, peak):.2f}"
        )
        count = sum(p.numel() for p in model.parameters())
        times = f"{1000 * step_s:,.0f}, {1000 * max(seconds[name]):,.0f}"
        print(f"| {name} | {count:,} | {n_tokens / step_s:,.0f} | {times} | {share} |")


def share_of(model: GenLMForCausalLM, options: argparse.Namespace, step_s: float, peak: float) -> float:
    flops = sum(count_flops(model, options.tokens).values())
    return 3 * options.rows * flops / step_s / peak


def measure_peak() -> float:
    """Floating-point operations a second."""
    a, b = torch.randn(PEAK_SIZE, PEAK_SIZE), torch.randn(PEAK_SIZE, PEAK_SIZE)
    return 2 * PEAK_SIZE**3 / timed(lambda: a @ b)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def step_of(model: nn.Module, options: argparse.Namespace, backend: str | None = None) -> Callable[[], None]:
    model.train()
    forward = model if backend is None else torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, options.vocab, (options.rows, options.tokens))
    ours = {"skip_logits": True} if isinstance(model, GenLMForCausalLM) else {}

    def step() -> None:
        forward(input_ids=ids, labels=ids, use_cache=False, **ours).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_llama(o: argparse.Namespace) -> nn.Module:
    # two matrices of 4 d and three of 8/3 d hold as many weights
    config = LlamaConfig(vocab_size=o.vocab, hidden_size=o.width, intermediate_size=8 * o.width // 3,
                         num_hidden_layers=o.layers, num_attention_heads=max(1, o.width // 64),
                         max_position_embeddings=o.tokens, tie_word_embeddings=True)  # fmt: skip
    return LlamaForCausalLM(config)


def build_gpt2(o: argparse.Namespace) -> nn.Module:
    config = GPT2Config(vocab_size=o.vocab, n_embd=o.width, n_layer=o.layers, n_head=max(1, o.width // 64),
                        n_positions=o.tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return GPT2LMHeadModel(config)


def build_recurrent_gemma(o: argparse.Namespace) -> nn.Module:
    config = RecurrentGemmaConfig(vocab_size=o.vocab, hidden_size=o.width, intermediate_size=6 * o.width,
                                  num_hidden_layers=o.layers, num_attention_heads=max(1, o.width // 64),
                                  lru_width=o.width, attention_window_size=o.tokens)  # fmt: skip
    return RecurrentGemmaForCausalLM(config)


def builder_of(decoder: str) -> Callable[[argparse.Namespace], nn.Module]:
    return lambda o: GenLMForCausalLM(
        GenLMConfig(
            vocab_size=o.vocab,
            hidden_size=o.width,
            decoder=decoder,
            num_hidden_layers=o.layers,
            max_position_embeddings=o.tokens,
        )
    )


BUILDERS = {f"ours, {decoder}": builder_of(decoder) for decoder in DECODERS} | {
    "Llama": build_llama,
    "GPT-2": build_gpt2,
    "RecurrentGemma": build_recurrent_gemma,
}

if __name__ == "__main__":
    main()
