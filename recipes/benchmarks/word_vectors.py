"""Bits per byte with and without word vectors at equal training time.

    python recipes/benchmarks/word_vectors.py --vectors glove.6B.50d.txt --out RESULTS [SOURCE ...]

The embedding without them is factorised to the same size. How the time is made equal: equal_time.py.
"""

from equal_time import PLAIN, Ways, compare


def ways_of(options) -> Ways:
    """Tied and untied heads; E has the dimension of the vectors in all ways but the first."""
    from hf_genlm.text.vector_files import peek_dimension

    untied = "model.tie_word_embeddings=false"
    vectors = f"vectors.path={options.vectors}"
    dimension = f"model.embedding_size={peek_dimension(options.vectors)}"
    release = f"vectors.unfreeze_step={max(1, options.steps // 4)}"
    ways = {
        "no vectors, r = d": [],
        "no vectors, tied": [dimension],
        "vectors, tied": [vectors],
        "no vectors, untied": [dimension, untied],
        "vectors, untied": [vectors, untied],
        "vectors, untied, frozen to a quarter": [vectors, untied, "vectors.frozen=true", release],
        "vectors, untied, frozen": [vectors, untied, "vectors.frozen=true"],
    }
    return {way: [*PLAIN, *settings] for way, settings in ways.items()}


if __name__ == "__main__":
    compare(__doc__, ways_of, lambda parser: parser.add_argument("--vectors", required=True))
