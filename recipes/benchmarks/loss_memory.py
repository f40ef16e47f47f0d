"""Memory and time of a training step without the logits, against the plain path.

    python recipes/benchmarks/loss_memory.py

A step is forward, backward and AdamW of a model of two gated linear layers. Each way runs in a process of its
own, in turn, five rounds; peak memory is what the process held at most beyond what it held before the
first step (weights). Loss and gradients of the first step are compared with the plain path's.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOKENS, WIDTH, VOCABULARY, ROUNDS = 4096, 256, 32768, 5
WAYS = {
    "plain": None,
    "without logits": None,  # ours, skip_logits=True
    "torch, 512 rows": {"batch_chunk_size": 512, "chunking_method": None, "acc_policy": "accurate"},
    "torch, automatic": {},
}


def measure(way: str, gradients: str) -> dict[str, float]:
    """Loss, seconds of the second step and MiB of both; the first step's gradients go to a file."""
    import torch
    import torch.nn.functional as F

    from hf_genlm.model import GenLMConfig, GenLMForCausalLM

    torch.manual_seed(0)
    model = GenLMForCausalLM(
        GenLMConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, initializer_range=0.06)
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, VOCABULARY, (16, TOKENS // 16))

    def loss_of() -> torch.Tensor:
        if WAYS[way] is None:
            return model(tokens, labels=tokens, use_cache=False, skip_logits=way != "plain").loss
        states = model.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        targets = F.pad(tokens, (0, 1), value=-100)[:, 1:].flatten()
        options = torch.nn.LinearCrossEntropyOptions(**WAYS[way])
        return F.linear_cross_entropy(states, model.lm_head.weight, targets, options=options)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(2):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        if step == 0:
            first = loss.item()
            torch.save({name: p.grad for name, p in model.named_parameters()}, gradients)
        optimizer.step()
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"loss": first, "s": seconds, "MiB": (peak - before) / 1024}


def largest_difference(file: Path, other: Path) -> float:
    """Of two steps' gradients, in parts of each tensor's largest entry."""
    import torch

    ours, plain = torch.load(file, weights_only=True), torch.load(other, weights_only=True)
    return max(float((ours[n] - g).abs().max() / g.abs().max()) for n, g in plain.items())


def main() -> None:
    """Every way, `ROUNDS` times, interleaved; medians and their ratios to the plain path."""
    rounds: dict[str, list[dict]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        files = {way: Path(folder) / way for way in WAYS}
        for _ in range(ROUNDS):
            for way, file in files.items():
                command = [sys.executable, __file__, way, str(file)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rounds[way].append(json.loads(done.stdout.splitlines()[-1]))
        differences = {way: largest_difference(file, files["plain"]) for way, file in files.items()}
    median = {
        way: {name: statistics.median(r[name] for r in results) for name in ("loss", "s", "MiB")}
        for way, results in rounds.items()
    }
    plain = median["plain"]
    print(f"{TOKENS:,} tokens, {WIDTH} wide, {VOCABULARY:,} in the vocabulary; medians of {ROUNDS} rounds")
    print(f"{'way':<18} {'loss':>9} {'gradients':>10} {'MiB':>7} {'/ plain':>8} {'s':>7} {'/ plain':>8}")
    for way, m in median.items():
        print(
            f"{way:<18} {m['loss']:>9.5f} {differences[way]:>10.1e} {m['MiB']:>7.0f} "
            f"{m['MiB'] / plain['MiB']:>8.2f} {m['s']:>7.2f} {m['s'] / plain['s']:>8.2f}"
        )


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
