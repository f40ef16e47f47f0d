"""Bits per byte with and without a hashed bigram embedding, at equal training time.

    python recipes/benchmarks/bigram.py --steps 200 --seeds 3 --out RESULTS [SOURCE ...]

How the time is made equal: equal_time.py. The first way's time is that of all.
"""

from equal_time import compare

ROWS = (None, 4096, 16384)
WAYS = {
    f"{decoder}, {'no table' if rows is None else f'{rows:,} rows'}": [
        f"model.decoder={decoder}",
        f"model.bigram_size={'null' if rows is None else rows}",
    ]
    for decoder in ("gated_linear", "lstm")
    for rows in ROWS
}

if __name__ == "__main__":
    compare(__doc__, lambda options: WAYS)
