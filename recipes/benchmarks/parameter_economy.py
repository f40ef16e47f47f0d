"""Bits per byte against parameters at equal training time, for every way to have fewer of them.

    python recipes/benchmarks/parameter_economy.py --steps 200 --seeds 3 --out RESULTS [SOURCE ...]

How the time is made equal: equal_time.py.
"""

from equal_time import PLAIN, compare

ATTENTION = ["model.decoder=transformer", "model.num_attention_heads=6"]
WAYS = {
    "tied": [],
    "untied head": ["model.tie_word_embeddings=false"],
    "factorised, r = d/2": ["model.embedding_size=96"],
    "factorised, r = d/4": ["model.embedding_size=48"],
    "3 layers share": ["model.shared_layers=3"],
    "low-rank MLP, d/2": ["model.mlp_rank=96"],
    "low-rank MLP, d/4": ["model.mlp_rank=48"],
    "attention, 6 key heads": ATTENTION,
    "attention, 2 key heads": [*ATTENTION, "model.num_key_value_heads=2"],
    "attention, 1 key head": [*ATTENTION, "model.num_key_value_heads=1"],
}

if __name__ == "__main__":
    compare(__doc__, lambda options: {way: [*PLAIN, *settings] for way, settings in WAYS.items()})
