"""The corpus of a run: documents from its sources, split in two, and the report on both."""

import hashlib
import itertools
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_genlm.errors import UserError
from hf_genlm.recipe import CorpusRecipe
from hf_genlm.text.formats import check_encoding
from hf_genlm.text.sources import Document, Reading, read_sources, read_standard_library

__all__ = ["Corpus", "Document", "read_corpus", "read_documents", "split_documents"]

_FEW_DOCUMENTS = 20  # fewer than these are split inside
_DOMINANT_SHARE = (
    0.5  # of all bytes: a document larger than this is split inside, or validation would not see its kind
)
_HELD_OUT_BLOCKS = 16  # so many blocks make up the validation split of a long text
_BLOCK_CHARACTERS = 2000  # blocks are not made shorter than this for the sake of their number


@dataclass
class Corpus:
    """Two disjoint splits. `report` is the content of corpus.json."""

    train: Sequence[Document]
    validation: Sequence[Document]
    report: dict[str, Any]


def read_corpus(recipe: CorpusRecipe) -> Corpus:
    """Read the sources and split them. The same recipe over the same files gives the same corpus.

    A text that stands in both splits is taken out of training.

    Raises:
        UserError: a source cannot be used, or one of the splits would be empty.
    """
    if not 0.0 < recipe.validation_fraction < 1.0:
        raise UserError(
            f"corpus.validation_fraction = {recipe.validation_fraction}: "
            "it is a share of the bytes between 0 and 1, such as 0.05"
        )
    reading = _read(recipe.sources, recipe, "train")
    readings = [reading]
    if recipe.validation:
        readings.append(_read(recipe.validation, recipe, "validation"))
        train, validation, method = reading.documents, readings[1].documents, "given"
    else:
        train, validation, method = split_documents(
            reading.documents, recipe.validation_fraction, recipe.split_seed
        )
    n_before = len(train)
    held_out = {_sha256(document.text) for document in validation}
    train = [document for document in train if _sha256(document.text) not in held_out]
    if not train:
        raise UserError(
            f"no training text is left: all {n_before} training documents stand in the validation split too; "
            "add other text, or hold out other files with --validation"
        )
    report = {
        "sources": list(recipe.sources),
        "description": _describe(recipe.sources, reading),
        "python": None if recipe.sources else platform.python_version(),
        "encoding": recipe.encoding if recipe.sources else "utf-8",
        "split": {"method": method, "seed": recipe.split_seed, "fraction": recipe.validation_fraction},
        "duplicates_removed": n_before - len(train),
        "empty_skipped": sum(part.empty_skipped for part in readings),
        "files_skipped": sum(part.files_skipped for part in readings),
        "train": _count(train),
        "validation": _count(validation),
        "files": [file for part in readings for file in part.files],
    }
    return Corpus(train, validation, report)


def read_documents(
    sources: Sequence[str], recipe: CorpusRecipe, split: str = "train"
) -> tuple[list[Document], dict[str, Any]]:
    """Documents of `sources` unsplit, and a report on their files; no sources: the embedded default.

    `split` ("train" or "validation") is the one preferred of a Hub data set that has several.

    Raises:
        UserError: a source cannot be used, or holds no text.
    """
    reading = _read(sources, recipe, split)
    report = {
        "sources": list(sources),
        "description": _describe(sources, reading),
        "empty_skipped": reading.empty_skipped,
        "files_skipped": reading.files_skipped,
        **_count(reading.documents),
        "files": reading.files,
    }
    return reading.documents, report


def split_documents(
    documents: Sequence[Document], fraction: float, seed: int
) -> tuple[list[Document], list[Document], str]:
    """(training, validation, method): about `fraction` of the bytes in validation, neither side empty.

    "document": whole documents are held out, in a seeded order. "block", where documents are few or one of
    them is most of the corpus: all are cut at line ends into blocks of similar length, of which a seeded
    choice is held out; neighbouring blocks of one side stay one document. Depends on the order of `documents`
    and on `seed` alone.

    Raises:
        UserError: the text is a single character.
    """
    sizes = [document.n_bytes for document in documents]
    target = fraction * sum(sizes)
    if len(documents) >= _FEW_DOCUMENTS and max(sizes) <= _DOMINANT_SHARE * sum(sizes):
        held = _choose(sizes, target, seed)
        if target / 2 <= sum(sizes[i] for i in held) <= target * 2:
            train = [document for i, document in enumerate(documents) if i not in held]
            return train, [documents[i] for i in sorted(held)], "document"
    n_characters = sum(len(document.text) for document in documents)
    if n_characters < 2:
        raise UserError("the corpus is a single character, which cannot be split: add text")
    wanted = fraction * n_characters
    length = max(1, round(max(wanted / _HELD_OUT_BLOCKS, min(wanted, _BLOCK_CHARACTERS))))
    length = min(length, n_characters // 2)
    # cutting at line ends can fail on a short text of long lines: then any character will do
    for reach in (max(length, _BLOCK_CHARACTERS), 0):
        blocks = [
            (i, block) for i, document in enumerate(documents) for block in cut(document.text, length, reach)
        ]
        sizes = [len(block.encode("utf-8")) for _, block in blocks]
        held = _choose(sizes, target, seed) or {_seeded_order(len(blocks), seed)[0]}
        if len(held) < len(blocks) and sum(sizes[i] for i in held) <= max(2 * target, sum(sizes) / 4):
            break
    sides = _join(documents, blocks, held)
    return sides[False], sides[True], "block"


def cut(text: str, length: int, reach: int) -> list[str]:
    """Blocks of `text`, each ending at the first line end after `length` characters, or, when none follows
    within `reach` further ones, right there. A last block shorter than half of `length` is left with its
    neighbour."""
    ends = []
    start = 0
    while len(text) - start > 1.5 * length:
        newline = text.find("\n", start + length - 1, start + length + reach)
        start = newline + 1 if newline >= 0 else start + length
        ends.append(start)
    if start < len(text):
        ends.append(len(text))
    return [text[a:b] for a, b in itertools.pairwise([0, *ends])]


def _choose(sizes: Sequence[int], target: float, seed: int) -> set[int]:
    """Indices in a seeded order, each taken if it brings the sum of the taken sizes nearer to `target`."""
    chosen: set[int] = set()
    total = 0
    for i in _seeded_order(len(sizes), seed):
        if abs(total + sizes[i] - target) < abs(total - target) and len(chosen) < len(sizes) - 1:
            chosen.add(i)
            total += sizes[i]
    return chosen


def _seeded_order(n: int, seed: int) -> list[int]:
    """A permutation that no version of a random generator can change."""
    return sorted(range(n), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())


def _join(
    documents: Sequence[Document], blocks: Sequence[tuple[int, str]], held: set[int]
) -> dict[bool, list[Document]]:
    """Held-out blocks under True, the others under False; neighbours of one document and side joined."""
    runs: list[tuple[int, bool, list[str]]] = []
    for k, (i, block) in enumerate(blocks):
        if runs and runs[-1][:2] == (i, k in held):
            runs[-1][2].append(block)
        else:
            runs.append((i, k in held, [block]))
    sides: dict[bool, list[Document]] = {False: [], True: []}
    for i, side, parts in runs:
        sides[side].append(Document("".join(parts), documents[i].source))
    return sides


def _read(sources: Sequence[str], recipe: CorpusRecipe, split: str) -> Reading:
    check_encoding(recipe.encoding)
    reading = read_sources(sources, recipe, split) if sources else read_standard_library()
    if not reading.documents:
        raise UserError(
            f"no text was found in {', '.join(map(repr, sources))}: "
            "every record and file is empty, name other sources"
        )
    return reading


def _describe(sources: Sequence[str], reading: Reading) -> str:
    if not sources:
        return f"CPython {platform.python_version()} standard library source and reference topics"
    names = list(dict.fromkeys(file["name"].partition("/")[0] for file in reading.files))
    if any(file["bytes"] is None for file in reading.files):  # a Hub id: its owner alone says nothing
        names = [file["name"] for file in reading.files]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")
    n_files = len(reading.files)
    return f"{n_files} file{'' if n_files == 1 else 's'}: {shown}"


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


def _count(documents: Sequence[Document]) -> dict[str, Any]:
    """`sha256` is of every text in order as UTF-8, each behind its byte count (8 bytes, little-endian)."""
    digest = hashlib.sha256()
    n_bytes = 0
    for document in documents:
        encoded = document.text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
        n_bytes += len(encoded)
    return {
        "documents": len(documents),
        "bytes": n_bytes,
        "characters": sum(len(document.text) for document in documents),
        "sha256": digest.hexdigest(),
    }
