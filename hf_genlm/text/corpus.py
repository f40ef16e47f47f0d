"""The corpus of a run: documents from its sources, split in two, and the report on both."""

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.text.damage import DAMAGED, LeftOut, left_out_line
from hf_genlm.text.formats import check_encoding
from hf_genlm.text.identity import split_by_hash, stands_in
from hf_genlm.text.languages import (
    by_language,
    check_languages,
    counts_after,
    report_on,
    spans,
    trained_parallel,
)
from hf_genlm.text.near_duplicates import Progress, check_near_duplicates, find_near_duplicates
from hf_genlm.text.scrubbing import Tally
from hf_genlm.text.sources import Reading, read_sources, read_standard_library
from hf_genlm.text.store import CHUNK, Document, Documents, TextStore, as_documents

__all__ = ["Corpus", "Document", "notes_on", "read_corpus", "read_documents", "split_documents"]

_FEW_DOCUMENTS = 20  # fewer than these are split inside
_DOMINANT_SHARE = (
    0.5  # of all bytes: a document larger than this is split inside, or validation would not see its kind
)
_HELD_OUT_BLOCKS = 16  # so many blocks make up the validation split of a long text
_LOOK_AHEAD = 1 << 12  # bytes in which a line end is looked for at once
_BLOCK_CHARACTERS = 2000  # blocks are not made shorter than this for the sake of their number
# text between the marks of a format
_MARKED = {".csv", ".tsv", ".json", ".html", ".htm", ".xml", ".tex", ".ipynb"}


Sources = Sequence[str] | Mapping[str, Sequence[str]]  # as they are, or by language


@dataclass
class Corpus:
    """Two disjoint splits. `report` is the content of corpus.json."""

    train: Documents
    validation: Documents
    report: dict[str, Any]


def read_corpus(recipe: CorpusRecipe, on_progress: Progress | None = None) -> Corpus:
    """Read the sources and split them. The same recipe over the same files gives the same corpus.

    Memory does not grow with the text, but for some 50 bytes a document.

    A text that stands in both splits is taken out of training, and then, with `corpus.near_duplicates`, what
    is nearly another one: `on_progress(done, total)` is told the documents compared.

    Raises:
        UserError: a source cannot be used, or one of the splits would be empty.
    """
    if not 0.0 < recipe.validation_fraction < 1.0:
        raise UserError(
            f"corpus.validation_fraction = {recipe.validation_fraction}: "
            "it is a share of the bytes between 0 and 1, such as 0.05"
        )
    check_languages(recipe)
    check_near_duplicates(recipe)
    reading = _read(recipe.languages or recipe.sources, recipe, "train")
    readings = [reading]
    if recipe.validation:
        held = by_language(recipe.validation, recipe.languages) if recipe.languages else recipe.validation
        readings.append(_read(held, recipe, "validation"))
        train, validation = (each.writer.documents() for each in readings)
        n_train, n_validation = (each.languages for each in readings)
        method = "given"
    else:
        train, validation, method, n_train, n_validation = _split(reading, recipe)
    n_before = len(train)
    kept = ~stands_in(train, validation)
    train, n_train = train.take(kept), counts_after(n_train, kept)
    _check_left(train, n_before, "stand")
    n_exact, near = n_before - len(train), None
    if recipe.near_duplicates is not None:
        near = find_near_duplicates(train, validation, recipe.near_duplicates, on_progress)
        train, n_train = train.take(near.kept), counts_after(n_train, near.kept)
        _check_left(train, n_before, "stand, or nearly,")
    named_sources = recipe.languages or recipe.sources
    report = {
        "sources": list(recipe.sources),
        "description": _describe(named_sources, reading),
        "python": None if named_sources else platform.python_version(),
        "encoding": recipe.encoding if named_sources else "utf-8",
        "split": {"method": method, "seed": recipe.split_seed, "fraction": recipe.validation_fraction},
        "duplicates_removed": n_exact,
        "empty_skipped": sum(part.empty_skipped for part in readings),
        "files_skipped": sum(part.files_skipped for part in readings),
        "links_out": sum(part.links_out for part in readings),
        "damaged": _left_out_of(readings).to_json(),
        "train": count_text(train),
        "validation": count_text(validation),
        "files": [file for part in readings for file in part.files],
    }
    report |= _scrubbing_report(readings)
    if near is not None:
        report["near_duplicates"] = near.to_json()
    if recipe.languages:
        splits = {"train": (train, n_train), "validation": (validation, n_validation)}
        report["languages"] = report_on(recipe, splits)
        report["parallel_trained_on"] = trained_parallel(recipe, reading.files)
    return Corpus(train, validation, report)


def _check_left(train: Documents, n_before: int, how: str) -> None:
    if not len(train):
        raise UserError(
            f"no training text is left: all {n_before} training documents {how} in the validation split too; "
            "add other text, or hold out other files with --validation"
        )


def read_documents(
    sources: Sources, recipe: CorpusRecipe, split: str = "train"
) -> tuple[Documents, dict[str, Any]]:
    """Documents of `sources` unsplit, and a report on their files; no sources: the embedded default.

    Sources by language must be those of `recipe.languages`.

    `split` ("train" or "validation") is the one preferred of a Hub data set that has several.

    Raises:
        UserError: a source cannot be used, or holds no text.
    """
    reading = _read(sources, recipe, split)
    documents = reading.writer.documents()
    report: dict[str, Any] = {
        "sources": list(sources),
        "description": _describe(sources, reading),
        "empty_skipped": reading.empty_skipped,
        "files_skipped": reading.files_skipped,
        "links_out": reading.links_out,
        "damaged": reading.left_out.to_json(),
        **count_text(documents),
        "files": reading.files,
        **_scrubbing_report([reading]),
    }
    if reading.languages:
        report["languages"] = report_on(recipe, {"train": (documents, reading.languages)})
    return documents, report


def with_sources(recipe: CorpusRecipe, sources: Sources) -> CorpusRecipe:
    """A copy of `recipe` that reads `sources`: in `languages` if they are by language, else in `sources`."""
    if isinstance(sources, Mapping):
        by_language = {code: list(words) for code, words in sources.items()}
        return recipe.model_copy(update={"sources": [], "languages": by_language})
    return recipe.model_copy(update={"sources": list(sources), "languages": {}})


def notes_on(report: dict[str, Any]) -> list[str]:
    """What a person should hear of a report on a corpus, a line each."""
    line = left_out_line(report["damaged"]) if "damaged" in report else None
    notes = [] if line is None else [line]
    if report.get("files_skipped"):
        n = report["files_skipped"]
        notes.append(
            f"{n:,} other file{'' if n == 1 else 's'} of the folders named: read are .txt, .md, .py, .jsonl "
            "and .parquet, and of another suffix what is named itself"
        )
    marked = [file["name"] for file in report["files"] if PurePath(file["name"]).suffix.lower() in _MARKED]
    if marked:
        notes.append(
            f"{', '.join(marked[:3])}: read as it stands, with the marks of its format; to train on the text "
            "alone, write that to .txt or .jsonl"
        )
    if report.get("links_out"):
        notes.append(f"{report['links_out']:,} of the files are links that lead out of the folder named")
    copies = {
        "that stand in the validation split too": report.get("duplicates_removed", 0),
        "that are near-duplicates": report.get("near_duplicates", {}).get("removed", 0),
    }
    notes += [f"{n:,} training documents left out {which}" for which, n in copies.items() if n]
    if report.get("parallel_trained_on"):
        notes.append(
            f"the parallel text of {', '.join(report['parallel_trained_on'])} is trained on too, and what "
            "compares sentences then tells how well it was learned: leave it out of the sources"
        )
    if "scrubbed" in report:
        found = report["scrubbed"]["types"]
        replaced = ", ".join(f"{n:,} {name}" for name, n in found.items() if n)
        notes.append(f"replaced by placeholders: {replaced or 'nothing'}")
    return notes


class Block(NamedTuple):
    """A part of a document: the bytes [start, stop) of its store."""

    document: int
    start: int
    stop: int
    characters: int


def split_documents(
    documents: Sequence[Document], fraction: float, seed: int
) -> tuple[Documents, Documents, str]:
    """(training, validation, method): about `fraction` of the bytes in validation, neither side empty.

    "document": whole documents are held out, in a seeded order. "block", where documents are few or one of
    them is most of the corpus: all are cut at line ends into blocks of similar length, of which a seeded
    choice is held out; neighbouring blocks of one side stay one document. Depends on the order of `documents`
    and on `seed` alone.

    Raises:
        UserError: the text is a single character.
    """
    documents = as_documents(documents)
    sizes = documents.n_bytes
    total = int(sizes.sum())
    target = fraction * total
    if len(documents) >= _FEW_DOCUMENTS and sizes.max() <= _DOMINANT_SHARE * total:
        held = _choose(sizes, target, seed)
        if target / 2 <= sizes[held].sum() <= target * 2:
            return documents.take(~held), documents.take(held), "document"
    n_characters = documents.n_characters
    if n_characters < 2:
        raise UserError("the corpus is a single character, which cannot be split: add text")
    wanted = fraction * n_characters
    length = max(1, round(max(wanted / _HELD_OUT_BLOCKS, min(wanted, _BLOCK_CHARACTERS))))
    length = min(length, n_characters // 2)
    # cutting at line ends can fail on a short text of long lines: then any character will do
    for reach in (max(length, _BLOCK_CHARACTERS), 0):
        blocks = [block for i in range(len(documents)) for block in cut(documents, i, length, reach)]
        sizes = np.array([block.stop - block.start for block in blocks])
        held = _choose(sizes, target, seed)
        if not held.any():
            held[_seeded_order(len(blocks), seed)[0]] = True
        if not held.all() and sizes[held].sum() <= max(2 * target, sizes.sum() / 4):
            break
    train, validation = (_joined(documents, blocks, held == side) for side in (False, True))
    return train, validation, "block"


def _split(
    reading: Reading, recipe: CorpusRecipe
) -> tuple[Documents, Documents, str, dict[str, int], dict[str, int]]:
    """As `split_documents`, each language by itself: each is held out in proportion, and none is missing on a
    side. Also the documents of each language on both sides, none where no languages were named."""
    documents = reading.writer.documents()
    counts = reading.languages or {"": len(documents)}
    split = split_by_hash if recipe.split_by_hash else split_documents
    found = {
        code: split(documents[span], recipe.validation_fraction, recipe.split_seed)
        for code, span in spans(counts).items()
    }
    train = Documents.join([each[0] for each in found.values()])
    validation = Documents.join([each[1] for each in found.values()])
    method = ", ".join(dict.fromkeys(each[2] for each in found.values()))
    n_train, n_validation = (
        {code: len(each[side]) for code, each in found.items() if code} for side in (0, 1)
    )
    return train, validation, method, n_train, n_validation


def cut(documents: Documents, index: int, length: int, reach: int) -> Iterator[Block]:
    """Blocks of a document, each ending at the first line end after `length` characters, or, when none
    follows within `reach` further ones, right there. A last block shorter than half of `length` is left with
    its neighbour."""
    start, stop = int(documents.starts[index]), int(documents.stops[index])
    left = int(documents.characters[index])
    while left > 1.5 * length:
        at_least = _skip(documents.store, start, stop, length - 1)  # the last character that must be in it
        end, n_more = _line_end(documents.store, at_least, stop, reach + 1)
        if n_more == 0:
            end, n_more = _skip(documents.store, at_least, stop, 1), 1
        n_taken = length - 1 + n_more
        yield Block(index, start, end, n_taken)
        start, left = end, left - n_taken
    if left:
        yield Block(index, start, stop, left)


def _skip(store: TextStore, start: int, stop: int, n_characters: int) -> int:
    """The byte at which the character `n_characters` after that at `start` begins; at most `stop`."""
    while n_characters and start < stop:
        # no more bytes than the characters can have
        content = store.read(start, min(stop, start + min(CHUNK, 4 * n_characters)))
        begins = np.flatnonzero(_begins_character(content))
        if len(begins) > n_characters:
            return start + int(begins[n_characters])
        start, n_characters = start + len(content), n_characters - len(begins)
    while start < stop and not _begins_character(store.read(start, start + 1))[0]:
        start += 1
    return start


def _line_end(store: TextStore, start: int, stop: int, n_characters: int) -> tuple[int, int]:
    """(byte behind the first line end, characters up to there, itself counted) among the next
    `n_characters`; 0 characters when there is none."""
    n_passed = 0
    while n_passed < n_characters and start < stop:
        content = store.read(start, min(stop, start + _LOOK_AHEAD))
        at = content.find(b"\n")
        n_passed += int(_begins_character(content[: at + 1] if at >= 0 else content).sum())
        if at >= 0:
            return (start + at + 1, n_passed) if n_passed <= n_characters else (start, 0)
        start += len(content)
    return start, 0


def _begins_character(content: bytes) -> np.ndarray:
    """Which bytes (n,) of UTF-8 are the first of a character."""
    return (np.frombuffer(content, dtype=np.uint8) & 0xC0) != 0x80


def _choose(sizes: np.ndarray, target: float, seed: int) -> np.ndarray:
    """A mask (n,): in a seeded order, each is taken if it brings the sum of the taken sizes nearer to
    `target`."""
    chosen = np.zeros(len(sizes), dtype=bool)
    total = n_chosen = 0
    for i in _seeded_order(len(sizes), seed):
        size = int(sizes[i])
        if abs(total + size - target) < abs(total - target) and n_chosen < len(sizes) - 1:
            chosen[i] = True
            n_chosen += 1
            total += size
    return chosen


def _seeded_order(n: int, seed: int) -> np.ndarray:
    """A permutation (n,) that no version of a random generator can change."""
    digests = np.empty(n, dtype="S32")
    for i in range(n):
        digests[i] = hashlib.sha256(f"{seed}:{i}".encode()).digest()
    return np.argsort(digests, kind="stable")


def _joined(documents: Documents, blocks: Sequence[Block], chosen: np.ndarray) -> Documents:
    """The chosen blocks as documents; neighbours of one document are joined."""
    runs: list[Block] = []
    for block, is_chosen in zip(blocks, chosen, strict=True):
        if not is_chosen:
            continue
        if runs and runs[-1].document == block.document and runs[-1].stop == block.start:
            last = runs.pop()
            block = Block(last.document, last.start, block.stop, last.characters + block.characters)
        runs.append(block)
    index, starts, stops, characters = np.array(runs, dtype=np.int64).reshape(-1, 4).T
    return Documents(
        documents.store, starts, stops, characters, documents.sources, documents.source_ids[index]
    )


def _read(sources: Sources, recipe: CorpusRecipe, split: str) -> Reading:
    check_encoding(recipe.encoding)
    if recipe.damaged not in DAMAGED:
        raise UserError(f"unknown corpus.damaged {recipe.damaged!r}{did_you_mean(recipe.damaged, DAMAGED)}")
    reading = read_sources(sources, recipe, split) if sources else read_standard_library(recipe)
    if not len(reading.writer):
        lost = left_out_line(reading.left_out.to_json())
        raise UserError(
            f"no text was found in {', '.join(map(repr, sources))}: "
            f"every record and file is empty{f' ({lost})' if lost else ''}, name other sources"
        )
    return reading


def _left_out_of(readings: Sequence[Reading]) -> LeftOut:
    total = LeftOut()
    for reading in readings:
        total.join(reading.left_out)
    return total


def _scrubbing_report(readings: Sequence[Reading]) -> dict[str, Any]:
    """What was replaced, if anything was to be."""
    scrubber, total = readings[0].scrubber, Tally()
    for reading in readings:
        total.join(reading.scrubbed)
    return {} if scrubber is None else {"scrubbed": scrubber.to_json(total)}


def _describe(sources: Sources, reading: Reading) -> str:
    if not sources:
        return f"CPython {platform.python_version()} standard library source and reference topics"
    return named(reading.files)


def named(files: Sequence[dict[str, Any]]) -> str:
    """What a person is told about so many files of a report."""
    names = list(dict.fromkeys(file["name"].partition("/")[0] for file in files))
    # of a Hub id its owner alone says nothing, nor of a single file its folder
    if len(files) == 1 or any(file["bytes"] is None for file in files):
        names = [file["name"] for file in files]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")
    return f"{len(files)} file{'' if len(files) == 1 else 's'}: {shown}"


def count_text(documents: Documents) -> dict[str, Any]:
    """`sha256` is of every text in order as UTF-8, each behind its byte count (8 bytes, little-endian)."""
    digest = hashlib.sha256()
    last, n_bytes = -1, documents.n_bytes
    for i, content in documents.contents():
        if i != last:
            digest.update(int(n_bytes[i]).to_bytes(8, "little"))
            last = i
        digest.update(content)
    return {
        "documents": len(documents),
        "bytes": int(n_bytes.sum()),
        "characters": documents.n_characters,
        "sha256": digest.hexdigest(),
    }
