"""Helpers shared by tests: vectors."""

import numpy as np

WORDS = ["the", ",", "naïve", "ไทย", "नमस्ते", "x-ray", "7"]


VECTORS = np.random.default_rng(0).standard_normal((len(WORDS), 5)).astype(np.float32)


def text(words=WORDS, vectors=VECTORS, end="\n") -> bytes:
    lines = [f"{w} " + " ".join(repr(float(x)) for x in v) + end for w, v in zip(words, vectors, strict=True)]
    return "".join(lines).encode()
