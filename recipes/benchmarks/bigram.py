"""Bits per byte with and without a hashed bigram embedding, at equal training time.

    python recipes/benchmarks/bigram.py --steps 200 --seeds 3 --out RESULTS [SOURCE ...]

How the time is made equal: equal_time.py. The first way's time is that of all.
"""

from equal_time import PLAIN, compare

ROWS = (0, 4096, 16384)
WAYS = {
    f"{decoder}, {f'{rows:,} rows' if rows else 'no table'}": [
        *PLAIN,
        f"model.decoder={decoder}",
        f"model.bigram_size={rows}",
    ]
    for decoder in ("gated_linear", "lstm")
    for rows in ROWS
}

if __name__ == "__main__":
    compare(__doc__, lambda options: WAYS)
