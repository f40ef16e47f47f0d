"""Memory and time of head and loss without the logits, against the plain path.

    python recipes/benchmarks/loss_memory.py

Each way runs in a process of its own, one after another, five rounds; peak memory is what the process held at
most beyond what it held before the first step.
"""

import json
import resource
import statistics
import subprocess
import sys
import time

ROWS, WIDTH, VOCABULARY, ROUNDS = 4096, 256, 32768, 5
WAYS = ("plain", "chunked", "automatic")


def measure(way: str) -> dict[str, float]:
    """Loss, seconds and MiB of one step: forward and backward to states and head."""
    import torch
    import torch.nn.functional as F

    from hf_genlm.model.loss_genlm import chunked_causal_loss

    torch.manual_seed(0)
    states = torch.randn(8, ROWS // 8, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (8, ROWS // 8))
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()

    def step() -> torch.Tensor:
        if way == "chunked":
            loss = chunked_causal_loss(states, weight, None, labels)
        else:
            options = torch.nn.LinearCrossEntropyOptions() if way == "automatic" else None
            loss = F.linear_cross_entropy(states.flatten(0, 1), weight, targets, options=options)
        loss.backward()
        return loss

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"loss": loss.item(), "s": seconds, "MiB": (peak - before) / 1024}


def main() -> None:
    """Every way, `ROUNDS` times, interleaved; medians and their ratios to the plain path."""
    rounds: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way in WAYS:
            done = subprocess.run([sys.executable, __file__, way], capture_output=True, text=True, check=True)
            rounds[way].append(json.loads(done.stdout.splitlines()[-1]))
    median = {
        way: {name: statistics.median(r[name] for r in results) for name in ("loss", "s", "MiB")}
        for way, results in rounds.items()
    }
    print(f"{ROWS:,} rows, {WIDTH} wide, {VOCABULARY:,} tokens; medians of {ROUNDS} rounds")
    print(f"{'way':<10} {'loss':>10} {'MiB':>8} {'/ plain':>8} {'s':>7} {'/ plain':>8}")
    for way, m in median.items():
        plain = median["plain"]
        print(
            f"{way:<10} {m['loss']:>10.5f} {m['MiB']:>8.0f} {m['MiB'] / plain['MiB']:>8.2f} "
            f"{m['s']:>7.2f} {m['s'] / plain['s']:>8.2f}"
        )


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
