"""Privacy: attacks that measure what a model reveals of its training text, and training that bounds it."""
