"""A loss by nanoGPT's quick start for CPUs, and the time in which ours is below it; whole processes.

    python recipes/benchmarks/time_to_loss.py train.txt validation.txt --minutes 0.03 --rounds 3 --out RESULTS

The peer is a GPT-2 of transformers in the shape and by the settings of that quick start: characters, 4
layers, 4 heads, width 128, 64 characters of context, 12 rows, 2,000 steps, rate 1e-3. Its validation loss is
exact: every character of the text once, in windows of 64. Ours is `hf-genlm train --minutes F`, which counts
reading, training a tokenizer, planning, measuring and saving. Rounds of one and the other alternate.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CONTEXT, ROWS, STEPS, RATE = 64, 12, 2000, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", type=Path)
    parser.add_argument("validation", type=Path)
    parser.add_argument("--minutes", default="0.03", help="of ours")
    parser.add_argument("--decoder", default="gated_linear")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", action="store_true", help="run the peer in this process, and nothing else")
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(run_peer(options.train, options.validation)))
        return
    peers, ours = [], []
    for round_ in range(options.rounds):
        began = time.monotonic()
        words = [sys.executable, __file__, options.train, options.validation, "--out", "unused", "--peer"]
        peers.append(json.loads(subprocess.run(words, check=True, capture_output=True).stdout))
        peers[-1]["process"] = time.monotonic() - began
        ours.append(run_ours(options, round_))
        print("peer", peers[-1], "ours", ours[-1], flush=True)
    whole, training, nats = (
        [[run[key] for run in runs] for runs in (peers, ours)] for key in ("process", "seconds", "nats")
    )
    print(f"\nnats per byte: peer {statistics.mean(nats[0]):.4f}, ours {statistics.mean(nats[1]):.4f}")
    print(
        f"whole process: peer {statistics.median(whole[0]):.1f} s, ours {statistics.median(whole[1]):.1f} s"
    )
    print(f"  peer / ours {statistics.median(whole[0]) / statistics.median(whole[1]):.1f}")
    print(f"training alone {statistics.median(training[1]):.2f} s")
    print(f"  peer's whole process / ours {statistics.median(whole[0]) / statistics.median(training[1]):.1f}")


def run_ours(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """The command line in a process of its own."""
    shutil.rmtree(options.out, ignore_errors=True)
    began = time.monotonic()
    words = ["train", options.train, "--validation", options.validation, "--minutes", options.minutes,
             "--decoder", options.decoder, "--seed", seed, "--out", options.out,
             "--set", "corpus.cache=false"]  # fmt: skip
    subprocess.run([sys.executable, "-m", "hf_genlm", *map(str, words)], check=True, capture_output=True)
    process = time.monotonic() - began
    found = {
        m["name"]: m["value"]
        for m in json.loads((options.out / "evaluation.json").read_text())["measurements"]
    }
    events = [json.loads(line) for line in (options.out / "log.jsonl").read_text().splitlines()]
    (trained,) = [event for event in events if event["event"] == "trained"]
    planned = sum(event["seconds"] for event in events if event["event"] == "planned")
    nats = found["bits_per_byte"] * 0.6931471805599453
    return {"process": process, "seconds": trained["seconds"] + planned, "nats": nats}


def run_peer(train: Path, validation: Path) -> dict[str, float]:
    """nanoGPT's quick start."""
    import torch
    from peers import build_gpt2, train_peer

    text = train.read_text(encoding="utf-8")
    held_out = validation.read_text(encoding="utf-8")
    characters = {c: i for i, c in enumerate(sorted(set(text + held_out)))}
    ids = torch.tensor([characters[c] for c in text])

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            starts = torch.randint(len(ids) - CONTEXT, (ROWS, 1))
            rows = ids[starts + torch.arange(CONTEXT + 1)]
            yield {"input_ids": rows, "labels": rows}  # shifted inside

    model = build_gpt2(len(characters), CONTEXT + 1, layers=4, width=128, heads=4)
    trained = train_peer(model, batches(), RATE, lambda step, _: step / STEPS, beta2=0.99)
    tokens = torch.tensor([characters[c] for c in held_out])
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, CONTEXT * 64):
            part = tokens[start : start + CONTEXT * 64 + 1]
            n_rows = max(1, (len(part) - 1) // CONTEXT)
            rows = part[: n_rows * CONTEXT].view(n_rows, -1) if len(part) > CONTEXT else part[None, :-1]
            targets = part[1 : rows.numel() + 1].view(rows.shape)
            logits = model(rows).logits
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="sum"
            ).item()
    return {"nats": total / len(held_out.encode("utf-8")), **trained}


if __name__ == "__main__":
    main()
