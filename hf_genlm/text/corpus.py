"""The corpus of a run: documents read from its sources, two splits of them, and the report (corpus.json)."""

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.text.duplicates import (
    RUN,
    Progress,
    check_near_duplicates,
    digests,
    find_copies,
    find_in,
    find_near_duplicates,
    share_found,
)
from hf_genlm.text.formats import COMMON
from hf_genlm.text.languages import (
    by_language,
    check_languages,
    counts_after,
    report_on,
    spans,
    trained_parallel,
)
from hf_genlm.text.locating import lines_on, splits_by_name
from hf_genlm.text.raw_files import LeftOut, left_out_line
from hf_genlm.text.scrubbing import Tally
from hf_genlm.text.sources import (
    Reading,
    Sources,
    check_encoding,
    lines_told,
    read_sources,
    read_standard_library,
)
from hf_genlm.text.store import Block, Document, Documents, as_documents, cut_blocks

_FEW_DOCUMENTS = 20  # fewer documents are cut into blocks before they are split
_DOMINANT_SHARE = 0.5  # a larger document is cut into blocks, or validation would not see its kind
_HELD_OUT_BLOCKS = 16  # blocks of the validation split of a long text
_BLOCK_CHARACTERS = 2000  # blocks are not made shorter than this for the sake of their number
_MAX_NAMED = 20  # copies that a report names
TO_KEEP = "them, as on frequent short messages, --set corpus.keep_held_out=true"
LARGE_OVERLAP = 0.05  # share of the held-out text that training has too, from which on it spoils the figures


@dataclass
class Corpus:
    """Two disjoint splits. `report` is the content of corpus.json."""

    train: Documents
    validation: Documents
    report: dict[str, Any]


@dataclass
class Split:
    """Documents that are trained on and held out, and how they were parted.

    `copies` are the sources of copies that were left out. `n_train` and `n_validation` are the documents of
    each language, empty if no languages are named.
    """

    train: Documents
    validation: Documents
    method: str
    copies: list[str] = field(default_factory=list)
    n_held_copies: int = 0  # documents that are held out as their text is
    n_train: dict[str, int] = field(default_factory=dict)
    n_validation: dict[str, int] = field(default_factory=dict)


def read_corpus(recipe: CorpusRecipe, on_progress: Progress | None = None) -> Corpus:
    """Read the sources and split them. The same recipe over the same files gives the same corpus.

    Memory does not grow with the text, except for some 50 bytes a document. Copies are removed before texts
    are cut into blocks, then training documents whose text is in the validation split too, and then, with
    `corpus.near_duplicates`, near-duplicates: `on_progress` is called with (documents compared, all
    documents). The share of the held-out text that is still in the training text is measured.

    Raises:
        UserError: a source cannot be used, or one of the splits would be empty.
    """
    check_languages(recipe)
    check_near_duplicates(recipe)
    sources: Sources = recipe.languages or recipe.sources
    by_name = splits_by_name(recipe)
    readings = [_read(sources, recipe, "train", by_name)]
    if by_name:
        readings.append(_read(sources, recipe, "validation", by_name))
        split = Split(readings[0].writer.documents(), readings[1].writer.documents(), "names")
    elif recipe.validation:
        given = by_language(recipe.validation, recipe.languages) if recipe.languages else recipe.validation
        readings.append(_read(given, recipe, "validation"))
        split = Split(readings[0].writer.documents(), readings[1].writer.documents(), "given")
        split.n_train, split.n_validation = (each.languages for each in readings)
    else:
        split = _split(readings[0], recipe)
    train, validation, n_train = split.train, split.validation, split.n_train
    n_before = len(train)
    is_held = find_in(train, validation)
    n_texts = len(set(digests(train.take(is_held))))
    kept = np.ones_like(is_held) if recipe.keep_held_out else ~is_held
    train, n_train = train.take(kept), counts_after(n_train, kept)
    _check_left(train, n_before, "stand")
    n_exact, near = n_before - len(train), None
    if recipe.near_duplicates is not None:
        near = find_near_duplicates(train, validation, recipe.near_duplicates, on_progress)
        train, n_train = train.take(near.kept), counts_after(n_train, near.kept)
        _check_left(train, n_before, "stand, or nearly,")
    report = {
        "sources": list(recipe.sources),
        "description": _describe(sources, readings[0]),
        "python": None if sources else platform.python_version(),
        "encoding": recipe.encoding if sources else "utf-8",
        "split": {"method": split.method, "seed": recipe.split_seed, "fraction": recipe.validation_fraction},
        "duplicates_removed": n_exact,
        "duplicate_texts": 0 if recipe.keep_held_out else n_texts,
        "copies_removed": len(split.copies),
        "copies": split.copies[:_MAX_NAMED],
        "held_out_in_training": share_found(validation, train),
        **_facts_on(readings),
        "notices": _notices(readings, recipe, by_name, split.n_held_copies),
        "train": count_text(train),
        "validation": count_text(validation),
        "files": [file for part in readings for file in part.files],
        **_scrubbing_facts(readings),
        **_chat_facts(train, validation),
    }
    if near is not None:
        report["near_duplicates"] = near.to_json()
    if recipe.languages:
        splits = {"train": (train, n_train), "validation": (validation, split.n_validation)}
        report["languages"] = report_on(recipe, splits)
        report["parallel_trained_on"] = trained_parallel(recipe, readings[0].files)
    return Corpus(train, validation, report)


def _check_left(train: Documents, n_before: int, how: str) -> None:
    if not len(train):
        raise UserError(
            f"no training text is left: all {n_before} training documents {how} in the validation split too; "
            "add other text, hold out other files with --validation, or --set corpus.keep_held_out=true"
        )


def read_documents(
    sources: Sources, recipe: CorpusRecipe, split: str = "train", by_name: bool = False
) -> tuple[Documents, dict[str, Any]]:
    """Read `sources` unsplit, with a report on their files; no sources: the embedded default corpus.

    Sources by language must be those of `recipe.languages`. `split` ("train" or "validation") is preferred of
    a Hub data set that has several; with `by_name` also of files, as their names say.

    Raises:
        UserError: a source cannot be used, or holds no text.
    """
    reading = _read(sources, recipe, split, by_name)
    documents = reading.writer.documents()
    report: dict[str, Any] = {
        "sources": list(sources),
        "description": _describe(sources, reading),
        **_facts_on([reading]),
        "notices": lines_on(reading.located) + lines_told(reading.told),
        **count_text(documents),
        "files": reading.files,
        **_scrubbing_facts([reading]),
        **_chat_facts(documents),
    }
    if reading.languages:
        report["languages"] = report_on(recipe, {"train": (documents, reading.languages)})
    return documents, report


def _read(sources: Sources, recipe: CorpusRecipe, split: str, by_name: bool = False) -> Reading:
    check_encoding(recipe.encoding)
    reading = read_sources(sources, recipe, split, by_name) if sources else read_standard_library(recipe)
    if not len(reading.writer):
        lost = left_out_line(reading.left_out.to_json())
        raise UserError(
            f"no text was found in {', '.join(map(repr, sources))}: "
            f"every record and file is empty{f' ({lost})' if lost else ''}, name other sources"
        )
    return reading


def with_sources(recipe: CorpusRecipe, sources: Sources) -> CorpusRecipe:
    """Copy `recipe` with other sources: in `languages` if they are by language, else in `sources`."""
    if isinstance(sources, Mapping):
        by_language = {code: list(words) for code, words in sources.items()}
        return recipe.model_copy(update={"sources": [], "languages": by_language})
    return recipe.model_copy(update={"sources": list(sources), "languages": {}})


# splits


def split_documents(
    documents: Sequence[Document], fraction: float, seed: int, near: float | None = None, keeps: bool = False
) -> Split:
    """Hold out about `fraction` of the bytes; no side is empty.

    Method "document": whole documents are held out, in a seeded order. "block", where documents are few or
    one of them is most of the corpus: all are cut at line ends into blocks of similar length, of which a
    seeded choice is held out; neighbouring blocks of one side stay one document. Before that, copies are left
    out unless `keeps`: documents most of whose text stands in others, and with `near` those that are so
    similar to another. Chats are never cut. The result depends on `seed` and the order of `documents` only.

    Raises:
        UserError: the text is a single character, or a single chat.
    """
    documents = as_documents(documents)
    sizes = documents.n_bytes
    total = int(sizes.sum())
    target = fraction * total
    has_chats = bool(documents.is_chat.any())
    if has_chats and len(documents) < 2:
        raise UserError("there is one chat alone, and none to hold out: add chats, or name --validation FILE")
    if has_chats or (len(documents) >= _FEW_DOCUMENTS and sizes.max() <= _DOMINANT_SHARE * total):
        is_held = _choose(sizes, target, seed)
        if has_chats and not is_held.any():
            is_held[sizes.argmin()] = True
        if has_chats or target / 2 <= sizes[is_held].sum() <= target * 2:
            return Split(documents.take(~is_held), documents.take(is_held), "document")
    is_cut = documents.characters > 1.5 * _block_length(documents, fraction)
    is_copy = np.zeros(len(documents), dtype=bool)
    if is_cut.sum() > 1 and not keeps:
        is_copy[is_cut] = find_copies(documents.take(is_cut))
        if near is not None:
            left = is_cut & ~is_copy
            those = documents.take(left)
            is_copy[left] = ~find_near_duplicates(those, those[:0], near).kept
    copies = [documents.sources[i] for i in documents.source_ids[is_copy]]
    documents = documents.take(~is_copy)
    target = fraction * int(documents.n_bytes.sum())
    length = _block_length(documents, fraction)
    # cutting at line ends can fail on a short text of long lines: then any character will do
    for reach in (max(length, _BLOCK_CHARACTERS), 0):
        blocks = [block for i in range(len(documents)) for block in cut_blocks(documents, i, length, reach)]
        sizes = np.array([block.stop - block.start for block in blocks])
        is_held = _choose(sizes, target, seed)
        if not is_held.any():
            is_held[seeded_order(len(blocks), seed)[0]] = True
        if not is_held.all() and sizes[is_held].sum() <= max(2 * target, sizes.sum() / 4):
            break
    train, validation = (_join_blocks(documents, blocks, is_held == side) for side in (False, True))
    return Split(train, validation, "block", copies)


def _block_length(documents: Documents, fraction: float) -> int:
    """Characters of a block, about.

    Raises:
        UserError: the text is a single character.
    """
    n_characters = documents.n_characters
    if n_characters < 2:
        raise UserError("the corpus is a single character, which cannot be split: add text")
    wanted = fraction * n_characters
    length = max(1, round(max(wanted / _HELD_OUT_BLOCKS, min(wanted, _BLOCK_CHARACTERS))))
    return min(length, n_characters // 2)


def split_by_hash(documents: Documents, fraction: float, seed: int, keeps: bool = False) -> Split:
    """Hold out each document with probability `fraction`, decided by its own text and the seed.

    So one document more or less moves no other, and copies are on one side. With `keeps`, the first of them
    is held out and the others are trained on.

    Raises:
        UserError: a side is empty.
    """
    is_held = np.array([share_of(digest, seed) for digest in digests(documents)]) < fraction
    held = np.array(list(digests(documents.take(is_held))), dtype="S32")
    is_first = np.isin(np.arange(len(held)), np.unique(held, return_index=True)[1])
    if keeps:
        is_held[is_held] = is_first
    if is_held.all() or not is_held.any():
        raise UserError(
            f"of {len(is_held):,} documents, each held out with a chance of {fraction:g} by its own hash, "
            f"{int(is_held.sum()):,} are: hold out a file of your own by --validation FILE"
        )
    n_held_copies = 0 if keeps else int((~is_first).sum())
    return Split(documents.take(~is_held), documents.take(is_held), "hash", n_held_copies=n_held_copies)


def share_of(digest: bytes, seed: int) -> float:
    """A number in [0, 1) that depends on the digest of a text and on the seed only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:".encode() + digest).digest()[:8], "big") / 2**64


def _split(reading: Reading, recipe: CorpusRecipe) -> Split:
    """Split each language by itself, so that each is held out in proportion and none is missing on a side."""
    documents, keeps = reading.writer.documents(), recipe.keep_held_out
    how = recipe.validation_fraction, recipe.split_seed
    found: dict[str, Split] = {}
    for code, span in spans(reading.languages or {"": len(documents)}).items():
        if recipe.split_by_hash:
            found[code] = split_by_hash(documents[span], *how, keeps)
        else:
            found[code] = split_documents(documents[span], *how, recipe.near_duplicates, keeps)
    return Split(
        Documents.join([each.train for each in found.values()]),
        Documents.join([each.validation for each in found.values()]),
        ", ".join(dict.fromkeys(each.method for each in found.values())),
        [name for each in found.values() for name in each.copies],
        sum(each.n_held_copies for each in found.values()),
        {code: len(each.train) for code, each in found.items() if code},
        {code: len(each.validation) for code, each in found.items() if code},
    )


def _choose(sizes: np.ndarray, target: float, seed: int) -> np.ndarray:
    """Mask (n,): in a seeded order, each is chosen if it brings the sum of the chosen sizes nearer to
    `target`."""
    chosen = np.zeros(len(sizes), dtype=bool)
    total = n_chosen = 0
    for i in seeded_order(len(sizes), seed):
        size = int(sizes[i])
        if abs(total + size - target) < abs(total - target) and n_chosen < len(sizes) - 1:
            chosen[i] = True
            n_chosen += 1
            total += size
    return chosen


def seeded_order(n: int, seed: int) -> np.ndarray:
    """A permutation (n,) that does not depend on the version of a random generator."""
    keys = np.empty(n, dtype="S32")
    for i in range(n):
        keys[i] = hashlib.sha256(f"{seed}:{i}".encode()).digest()
    return np.argsort(keys, kind="stable")


def _join_blocks(documents: Documents, blocks: Sequence[Block], chosen: np.ndarray) -> Documents:
    """The chosen blocks as documents; neighbours in one document are joined."""
    runs: list[Block] = []
    for block, is_chosen in zip(blocks, chosen, strict=True):
        if not is_chosen:
            continue
        if runs and runs[-1].document == block.document and runs[-1].stop == block.start:
            last = runs.pop()
            block = Block(last.document, last.start, block.stop, last.characters + block.characters)
        runs.append(block)
    return documents.take_blocks(runs)


# reports


def _facts_on(readings: Sequence[Reading]) -> dict[str, Any]:
    """Files and records that were not read."""
    left_out = LeftOut()
    for reading in readings:
        left_out.update(reading.left_out)
    facts: dict[str, Any] = {
        name: sum(getattr(reading, name) for reading in readings)
        for name in ("empty_skipped", "files_skipped", "links_out")
    }
    return {**facts, "damaged": left_out.to_json()}


def _notices(
    readings: Sequence[Reading], recipe: CorpusRecipe, by_name: bool, n_held_copies: int
) -> list[str]:
    """Lines for people about what was not read of the sources of each split, or held out by name or text."""
    lines = lines_on(readings[0].located, recipe, by_name)
    lines += [line for each in readings[1:] for line in lines_on(each.located)]
    if n_held_copies:
        lines.append(
            f"{n_held_copies:,} copies of other held-out texts are held out with them: to train on {TO_KEEP}"
        )
    return list(dict.fromkeys([*lines, *lines_told(pair for each in readings for pair in each.told)]))


def _scrubbing_facts(readings: Sequence[Reading]) -> dict[str, Any]:
    """Counts of replacements; nothing if the recipe replaces nothing."""
    scrubber, total = readings[0].scrubber, Tally()
    for reading in readings:
        total.update(reading.scrubbed)
    return {} if scrubber is None else {"scrubbed": scrubber.to_json(total)}


def _chat_facts(*splits: Documents) -> dict[str, Any]:
    """Number of chats; nothing if there are none."""
    n = sum(int(documents.is_chat.sum()) for documents in splits)
    return {"chats": n} if n else {}


def _describe(sources: Sources, reading: Reading) -> str:
    if not sources:
        return f"CPython {platform.python_version()} standard library source and reference topics"
    return describe_files(reading.files)


def describe_files(files: Sequence[dict[str, Any]]) -> str:
    """Number and names of the files of a report, for people."""
    names: Iterable[str] = dict.fromkeys(file["name"].partition("/")[0] for file in files)
    # the owner alone says nothing about a Hub id, nor the folder about a single file
    if len(files) == 1 or any(file["bytes"] is None for file in files):
        names = [file["name"] for file in files]
    names = list(names)
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")
    return f"{len(files)} file{'' if len(files) == 1 else 's'}: {shown}"


def count_text(documents: Documents) -> dict[str, Any]:
    """Counts, and `sha256` over every text in order as UTF-8, each preceded by its byte count (8 bytes,
    little-endian)."""
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


def notes_on(report: dict[str, Any]) -> list[str]:
    """Lines for people about what is unusual in a report on a corpus."""
    line = left_out_line(report["damaged"]) if "damaged" in report else None
    notes = report.get("notices", []) + ([] if line is None else [line])
    if report.get("files_skipped"):
        n = report["files_skipped"]
        notes.append(
            f"{n:,} other file{'' if n == 1 else 's'} of the folders named, or inside archives: read are "
            f"{', '.join(COMMON)}; others if a folder has none of these, and what is named itself"
        )
    if report.get("links_out"):
        notes.append(f"{report['links_out']:,} of the files are links that lead out of the folder named")
    if n := report.get("copies_removed"):
        notes.append(
            f"{n:,} {'copy' if n == 1 else 'copies'} of other text here left out "
            f"({', '.join(report['copies'][:3])}), or the text held out would be trained on; to keep "
            "them, --set corpus.keep_held_out=true"
        )
    if n := report.get("duplicates_removed"):
        notes.append(
            f"{n:,} training documents left out that stand in the validation split too (copies of "
            f"{report.get('duplicate_texts', n):,} texts): to train on {TO_KEEP}"
        )
    if n := report.get("near_duplicates", {}).get("removed"):
        notes.append(f"{n:,} training documents left out that are near-duplicates")
    if report.get("chats"):
        notes.append(
            f"{report['chats']:,} chats: the loss and all figures are of what the assistant says and "
            "of the token that ends its turn, in these; their other messages are read only"
        )
    if report.get("parallel_trained_on"):
        notes.append(
            f"the parallel text of {', '.join(report['parallel_trained_on'])} is trained on too, and what "
            "compares sentences then tells how well it was learned: leave it out of the sources"
        )
    share = report.get("held_out_in_training")
    if share is not None and share >= LARGE_OVERLAP:
        leave = "" if "stream" in report else "leave copies out by --near-duplicates 0.5, or "
        remedy = f", so its figures are too good: {leave}hold out other text by --validation FILE"
        searched = ", as far as it was searched," if "stream" in report else ""
        notes.append(
            f"{100 * share:.1f} % of the held-out text stands in the training text too{searched} by runs of "
            f"{RUN} letters and digits{remedy}"
        )
    if "scrubbed" in report:
        found = report["scrubbed"]["types"]
        replaced = ", ".join(f"{n:,} {name}" for name, n in found.items() if n)
        notes.append(f"replaced by placeholders: {replaced or 'nothing'}")
    return notes


def changed_text(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, str] | None:
    """Compare two reports: (the text that changed, the files that changed), or None if nothing did.

    Files are compared by their content, and those of a stream by size and samples, in the order in which they
    are read: a name is not the same in another folder, and two files may share one."""

    def identity(file: dict[str, Any]) -> tuple[Any, ...]:
        found = file["bytes"], file["sha256"], file.get("samples_sha256")
        return found if any(found[1:]) else (file["name"],)  # a Hub data set has its name alone

    old, new = ([(identity(file), file["name"]) for file in each["files"]] for each in (before, now))
    gone = Counter(which for which, _ in old) - Counter(which for which, _ in new)
    come = Counter(which for which, _ in new) - Counter(which for which, _ in old)
    changed = [name for which, name in new if come[which]] + [name for which, name in old if gone[which]]
    names = ", ".join(list(dict.fromkeys(changed))[:3])
    if not names and [which for which, _ in old] != [which for which, _ in new]:
        names = "the order of the files"
    for split in ("train", "validation"):
        if before[split]["sha256"] != now[split]["sha256"]:
            return f"the {split} text", names or "the split"
    return ("the train text", names) if "stream" in now and names else None


def check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """
    Raises:
        UserError: two reports are not about the same text, see `changed_text`.
    """
    changed = changed_text(before, now)
    if changed is not None:
        raise UserError(
            f"{changed[0]} is not what this run began with (changed: {changed[1]}): bring it back, or start "
            "a new run"
        )
