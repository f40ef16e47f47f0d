"""Which documents are the same text, by its hash, a split that asks for nothing else, and whether a text that
is read again is what it was."""

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

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


def check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """
    Raises:
        UserError: two reports are not of one text, as `changed_text` has it.
    """
    changed = changed_text(before, now)
    if changed is not None:
        raise UserError(
            f"{changed[0]} is not what this run began with (changed: {changed[1]}): bring it back, or start "
            "a new run"
        )


def changed_text(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, str] | None:
    """Which text is another in the second of two reports, as in corpus.json, and which files are; None: it is
    one text. Of a stream the sizes and samples of its files tell."""
    old = {file["name"]: file for file in before["files"]}
    files = [file["name"] for file in now["files"] if not _is_same(old.pop(file["name"], None), file)]
    names = ", ".join([*files, *old][:3])
    for split in ("train", "validation"):
        if before[split]["sha256"] != now[split]["sha256"]:
            return f"the {split} text", names or "the split"
    return ("the train text", names) if "stream" in now and names else None


def _is_same(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """True if what both reports know of a file is the same."""
    if before is None:
        return False
    known = [name for name in ("bytes", "sha256", "samples_sha256") if name in before and name in now]
    return all(before[name] == now[name] for name in known)


def touched(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a person should hear of streamed files whose samples are the same, and which were written since: a
    line, or none."""
    old = {file["name"]: file.get("modified") for file in before["files"]}
    names = [
        file["name"]
        for file in now["files"]
        if old[file["name"]] is not None and old[file["name"]] != file.get("modified")
    ]
    if not names:
        return []
    were = "was" if len(names) == 1 else "were"
    return [
        f"{', '.join(names[:3])} {were} written to since this run began, but keeps its size and what is "
        "sampled of it: stop here, unless the text is the same"
    ]
