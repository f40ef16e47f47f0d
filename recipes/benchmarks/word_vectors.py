"""Bits per byte with and without word vectors at equal training time.

    python recipes/benchmarks/word_vectors.py --vectors glove.6B.50d.txt --out RESULTS [SOURCE ...]

The embedding without them is factorised to the same size. How the time is made equal: equal_time.py.
"""

from equal_time import Ways, compare


def ways_of(options) -> Ways:
    """The first is the ordinary embedding; the others hold E of the vectors' dimension, and W and b."""
    from hf_genlm.text.vector_files import peek_dimension

    vectors = f"vectors.path={options.vectors}"
    dimension = f"model.embedding_size={peek_dimension(options.vectors)}"
    release = f"vectors.release_step={max(1, options.steps // 4)}"
    return {
        "no vectors, r = d": [],
        "no vectors, r of the vectors": [dimension],
        "vectors, trained": [vectors],
        "vectors, frozen to a quarter": [vectors, "vectors.frozen=true", release],
        "vectors, frozen": [vectors, "vectors.frozen=true"],
    }


if __name__ == "__main__":
    compare(__doc__, ways_of, lambda parser: parser.add_argument("--vectors", required=True))
