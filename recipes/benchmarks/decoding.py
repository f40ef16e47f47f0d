"""Tokens per second of generation, one row, greedy: python recipes/benchmarks/decoding.py

Ours against transformers' Llama, and against llama.cpp where `llama_cpp` and `gguf` can be imported, all in
float32, at V 4,096, d 256, 6 layers, 4 heads of 64, 5.8 million parameters (ours: an MLP of two matrices,
1,024 wide; Llama: of three, 688 wide). The ways take turns, and the median of the ratios to the first of
their round is printed; then the time per token at positions 100 and 4,000 of recurrent decoders. Weights are
random: the time does not depend on them. A compiled program is made before the clock starts, where the disk
has none; how long that took is printed too.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_genlm.decoding import FastGenerator
from hf_genlm.decoding.step import SLOTS_AT_ONCE, StepState
from hf_genlm.exporting.gguf_file import write_converted
from hf_genlm.model import GenLMConfig, GenLMForCausalLM

SHAPE = {"vocab_size": 4096, "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 8192}
N_LAYERS = 6
PROMPT = torch.arange(2, 18)[None]
NEAR, FAR = 100, 4000


def build(decoder: str) -> GenLMForCausalLM:
    """Ours, with weights that make a difference: new ones start as the identity."""
    torch.manual_seed(0)
    model = GenLMForCausalLM(GenLMConfig(decoder=decoder, num_hidden_layers=N_LAYERS, **SHAPE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def build_llama() -> LlamaForCausalLM:
    """transformers' own, of the same size."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=N_LAYERS, intermediate_size=688, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def llama_cpp_of(model: LlamaForCausalLM, n_threads: int) -> Callable[[int], list[int]] | None:
    """Greedy generation by llama.cpp with the same weights; None where it is not installed."""
    try:
        import gguf  # noqa: F401
        import llama_cpp
    except ImportError:
        return None
    file = Path(tempfile.mkdtemp()) / "llama.gguf"
    write_converted(model, file, "llama")
    llm = llama_cpp.Llama(
        str(file), n_ctx=1024, n_threads=n_threads, n_threads_batch=n_threads, verbose=False
    )

    def generate(n_tokens: int) -> list[int]:
        llm.reset()
        new = []
        for token in llm.generate(PROMPT[0].tolist(), top_k=1, temp=0.0, repeat_penalty=1.0):
            new.append(token)
            if len(new) == n_tokens:
                return new
        return new

    return generate


def new_tokens(generate: Callable, n_tokens: int) -> list[int]:
    """The greedy continuation of the prompt by a `generate` of transformers' kind."""
    rows = generate(PROMPT, max_new_tokens=n_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return rows[0, PROMPT.shape[1] :].tolist()


def compare(ways: dict[str, Callable[[int], list[int]]], n_tokens: int, rounds: int) -> None:
    """Print for each way its tokens/s and the ratio to the first way, medians over rounds."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, generate in ways.items():
            start = time.perf_counter()
            generate(n_tokens)
            rates[name].append(n_tokens / (time.perf_counter() - start))
    first = next(iter(rates))
    for name, seen in rates.items():
        ratio = statistics.median(a / b for a, b in zip(seen, rates[first], strict=True))
        print(f"{name:<44} {statistics.median(seen):8.0f} tokens/s   x {ratio:5.2f}", flush=True)
    cpp = next((name for name in rates if name.startswith("llama.cpp")), None)
    if cpp is not None:
        for name, seen in rates.items():
            ratio = statistics.median(a / b for a, b in zip(seen, rates[cpp], strict=True))
            print(f"{name:<44} x {ratio:5.2f} of llama.cpp", flush=True)


def compare_positions(fast: FastGenerator, name: str, rounds: int) -> None:
    """Print the time per token after 100 and after 4,000 tokens, in turns, and the bytes of state."""
    config = fast.model.config
    states = {}
    for n_tokens in (NEAR, FAR):
        state = StepState(config, fast.model.lm_head.weight, 1, n_tokens + SLOTS_AT_ONCE)
        position = torch.tensor([[n_tokens]])
        states[n_tokens] = (torch.tensor([[5]]), position, position[0].clone()), state.buffers(n_tokens + 1)
    step = fast._program_for(*states[NEAR][0], *states[NEAR][1])
    seen: dict[int, list[float]] = {NEAR: [], FAR: []}
    for _ in range(10 * rounds):
        for n_tokens, (inputs, buffers) in states.items():
            start = time.perf_counter()
            for _ in range(32):
                step(*inputs, *buffers)
            seen[n_tokens].append((time.perf_counter() - start) / 32)
    ratio = statistics.median(far / near for far, near in zip(seen[FAR], seen[NEAR], strict=True))
    n_bytes = [sum(b.numel() * b.element_size() for b in buffers) for _, buffers in states.values()]
    print(
        f"{name:<20} token {NEAR}: {1e3 * statistics.median(seen[NEAR]):.3f} ms, token {FAR}: "
        f"{1e3 * statistics.median(seen[FAR]):.3f} ms, ratio {ratio:.3f}; state {n_bytes[0]:,} and "
        f"{n_bytes[1]:,} bytes",
        flush=True,
    )


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--decoders", default="transformer,hybrid,gated_linear,lstm")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.tokens} new tokens")

    llama = build_llama()
    ways: dict[str, Callable[[int], list[int]]] = {
        "Llama, generate": lambda n: new_tokens(llama.generate, n),
    }
    cpp = llama_cpp_of(llama, options.threads)
    print("llama.cpp: " + ("found" if cpp else "not installed"))
    if cpp:
        ways["llama.cpp, the same Llama"] = cpp
        print(f"  same tokens: {cpp(64) == new_tokens(llama.generate, 64)}")
    recurrent = {}
    for decoder in options.decoders.split(","):
        model = build(decoder)
        expected = new_tokens(model.generate, 64)
        ways[f"{decoder}, generate"] = lambda n, m=model: new_tokens(m.generate, n)
        forms = {"traced": {}, "compiled": {}, "compiled, int8": {"int8": True}}
        for form, arguments in forms.items():
            fast = FastGenerator(model, program=form.split(",")[0], **arguments)
            start = time.perf_counter()
            same = new_tokens(fast.generate, 64) == expected
            took = time.perf_counter() - start
            assert fast.plain_because is None, fast.plain_because
            print(f"{decoder}, {form}: ready in {took:.1f} s; same tokens: {same}", flush=True)
            ways[f"{decoder}, {form}"] = lambda n, f=fast: new_tokens(f.generate, n)
            if form == "compiled" and decoder in ("gated_linear", "lstm"):
                recurrent[decoder] = fast
    compare(ways, options.tokens, options.rounds)
    for decoder, fast in recurrent.items():
        compare_positions(fast, decoder, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
