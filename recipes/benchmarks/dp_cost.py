"""What a differentially private step costs beside a plain one, in time and memory.

    python recipes/benchmarks/dp_cost.py [--rounds 5] [--decoders lstm,gru] [--width 192]

Both make a step of 16 rows of 128 tokens and update by AdamW; the private one clips each row's gradient and
adds noise. Seconds are those of the processor, which with OMP_NUM_THREADS=1 hold on a busy machine too. Each
way of a decoder runs in a process of its own, in turn; the ratio is that of medians. Memory is what a process
held at most beyond what it held with the model alone.
"""

import argparse
import multiprocessing
import resource
import statistics
import time

import torch

from hf_genlm.config.recipe import TrainingRecipe
from hf_genlm.model import GenLMConfig, GenLMForCausalLM, mixers_of
from hf_genlm.privacy.mechanism import Guarantee
from hf_genlm.training.private import PrivateState, private_gradient

ROWS, LENGTH, VOCABULARY, LAYERS = 16, 128, 2048, 3
WAYS = ("plain", "private", "private, secure noise")


def measure(way: str, decoder: str, width: int) -> dict[str, float]:
    """Seconds of the faster of two steps after a first, and MiB."""
    torch.manual_seed(0)
    mixers = mixers_of(decoder, LAYERS)
    config = GenLMConfig(vocab_size=VOCABULARY, hidden_size=width, mixer_types=mixers, bigram_size=None)
    model = GenLMForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    rows = {"input_ids": tokens, "position_ids": torch.arange(LENGTH).expand_as(tokens), "labels": tokens}
    guarantee = Guarantee(1.0, 1e-5, 0.01, 1.0, 1.0, ROWS, 1, is_noise_secure=way.endswith("secure noise"))
    state = PrivateState(guarantee, bytes(32))

    def step() -> float:
        start = time.process_time()
        optimizer.zero_grad()
        if way == "plain":
            model(**rows, use_cache=False, skip_logits=True).loss.backward()
        else:
            private_gradient(model, rows, state, 0, TrainingRecipe(), ROWS)
        optimizer.step()
        return time.process_time() - start

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    seconds = min(step(), step())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "mib": (peak - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decoders", default="elman,gru,lstm,gated_linear,transformer,sliding")
    parser.add_argument("--width", type=int, default=192)
    options = parser.parse_args()
    fork = multiprocessing.get_context("fork")  # what was imported need not be again
    print("| decoder | plain, processor s | private / plain | secure / plain | plain, MiB | private, MiB |")
    print("|---" * 6 + "|")
    for decoder in options.decoders.split(","):
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                with fork.Pool(1) as pool:
                    found[way].append(pool.apply(measure, (way, decoder, options.width)))
        seconds = {way: statistics.median(each["seconds"] for each in found[way]) for way in WAYS}
        mib = {way: statistics.median(each["mib"] for each in found[way]) for way in WAYS}
        plain, private, secure = (seconds[way] for way in WAYS)
        print(
            f"| `{decoder}` | {plain:.3f} | {private / plain:.2f} | {secure / plain:.2f} "
            f"| {mib['plain']:.0f} | {mib['private']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
