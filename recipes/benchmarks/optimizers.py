"""Bits per byte of AdamW and Muon at equal training time, on one decoder of each kind.

    python recipes/benchmarks/optimizers.py --steps 200 --seeds 3 --out RESULTS [SOURCE ...]

How the time is made equal: equal_time.py. The first way's time is that of all decoders.
"""

from equal_time import PLAIN, compare

WAYS = {
    f"{decoder}, {optimizer}": [*PLAIN, f"model.decoder={decoder}", f"training.optimizer={optimizer}"]
    for decoder in ("gated_linear", "lstm", "transformer")
    for optimizer in ("adamw", "muon")
}

if __name__ == "__main__":
    compare(__doc__, lambda options: WAYS)
