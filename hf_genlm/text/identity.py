"""Which documents are the same text, by its hash, and a split that asks for nothing else."""

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.text.store import Documents


def digests(documents: Documents) -> Iterator[bytes]:
    """sha256 of each text."""
    for _, parts in itertools.groupby(documents.contents(), key=lambda part: part[0]):
        digest = hashlib.sha256()
        for _, content in parts:
            digest.update(content)
        yield digest.digest()


def stands_in(documents: Documents, others: Documents) -> np.ndarray:
    """A mask (n,): which documents have the text of one of `others`."""
    # a text of another length is another text: of most documents nothing needs to be read
    alike = np.flatnonzero(np.isin(documents.n_bytes, others.n_bytes))
    found = np.zeros(len(documents), dtype=bool)
    if len(alike):
        texts = set(digests(others.take(np.isin(others.n_bytes, documents.n_bytes[alike]))))
        found[alike] = [digest in texts for digest in digests(documents.take(alike))]
    return found


def split_by_hash(documents: Documents, fraction: float, seed: int) -> tuple[Documents, Documents, str]:
    """(training, validation, "hash"): each document is held out with the chance `fraction`, as its own text
    and the seed decide, whatever the others are. So one document more or less moves no other, and copies are
    on one side.

    Raises:
        UserError: a side is empty.
    """
    shares = [
        int.from_bytes(hashlib.sha256(f"{seed}:".encode() + digest).digest()[:8], "big") / 2**64
        for digest in digests(documents)
    ]
    held = np.array(shares) < fraction
    if held.all() or not held.any():
        raise UserError(
            f"of {len(held):,} documents, each held out with a chance of {fraction:g} by its own hash, "
            f"{int(held.sum()):,} are: hold out a file of your own by --validation FILE"
        )
    return documents.take(~held), documents.take(held), "hash"
