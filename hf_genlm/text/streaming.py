"""Documents as a stream: read while they are used; only the validation text and a sample are stored.

A walk through a stream can resume at any position of another walk, a few numbers per source. To get there, a
file is read again from its beginning; a Hub data set resumes as `datasets` does.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.text.corpus import count_text, describe_files, read_documents, seeded_order, share_of
from hf_genlm.text.encoding import pieces_of_parts
from hf_genlm.text.locating import check_found, lines_on, locate_all, splits_by_name
from hf_genlm.text.records import Parts
from hf_genlm.text.scrubbing import Scrubber, scrubber_of
from hf_genlm.text.sources import Beginning, FileShard, HubShard, Shard, check_encoding, lines_told
from hf_genlm.text.store import TURN, Document, Documents, DocumentWriter, as_documents

_MAX_HELD_SHARE = 0.25  # of `validation_bytes`: a longer document is trained on
_COMPARED = 1 << 22  # characters of a text that are compared: of a longer one, its beginning
_PLACES = 64  # from which a sample of a stream is read, evenly over all of it
_SEARCH_FACTOR = 4  # times the text in which the validation text is expected to be found


class HeldOut:
    """Set of texts that are never trained on.

    Of a text of more than `_COMPARED` characters the beginning decides, so that no text is held in memory:
    texts that begin alike for so long are one text.
    """

    def __init__(self, documents: Iterable[Document] = ()):
        self._digests: dict[int, set[bytes]] = {}  # length in characters, at most _COMPARED -> digests
        self.n_left_out = Counter[bytes]()  # copies that `filter` met, by their digests
        for _, texts in itertools.groupby(as_documents(documents).texts(), key=lambda part: part[0]):
            self.add("".join(_first((text for _, text in texts), _COMPARED)))

    def add(self, text: str) -> None:
        """Add a text, or the first `_COMPARED` characters of it."""
        text = text[:_COMPARED]
        self._digests.setdefault(len(text), set()).add(_digest(text))

    def __contains__(self, text: str) -> bool:
        text = text[:_COMPARED]
        return len(text) in self._digests and _digest(text) in self._digests[len(text)]

    def _leaves_out(self, text: str) -> bool:
        is_held = text in self
        if is_held:
            self.n_left_out[_digest(text[:_COMPARED])] += 1
        return is_held

    def filter(self, parts: Parts, scrubber: Scrubber | None = None) -> Parts | None:
        """The text that `parts` join to, scrubbed; None if it is held out or empty."""
        parts = parts if scrubber is None else scrubber.scrub_parts(parts)
        longest = max(self._digests, default=0)
        parts, begun, size = iter(parts), [], 0
        for part in parts:
            begun.append(part)
            size += len(part)
            if size > longest or size >= _COMPARED:
                if size < _COMPARED or not self._leaves_out("".join(begun)):
                    return itertools.chain(begun, parts)
                for _ in parts:  # the rest of it
                    pass
                return None
        text = "".join(begun)
        return None if not text or self._leaves_out(text) else (text,)

    @property
    def sha256(self) -> str:
        """Hash of the set."""
        digests = sorted(itertools.chain.from_iterable(self._digests.values()))
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@dataclass(frozen=True)
class Position:
    """A position in a lane: before record `state` of a shard, in epoch `passes` (from 0)."""

    shard: int = 0
    state: Any = None
    passes: int = 0


class Lane:
    """The texts of some shards, one shard after another, epoch after epoch."""

    def __init__(
        self, shards: Sequence[Shard], held_out: HeldOut, at: Position, scrubber: Scrubber | None = None
    ):
        self.shards, self.held_out, self.scrubber = shards, held_out, scrubber
        self.before = self.behind = at  # positions around the last text

    def texts(self) -> Iterator[Parts | None]:
        """Each text, and None at the end of each epoch.

        Raises:
            UserError: a whole epoch has no text.
        """
        is_empty = self.behind == Position(passes=self.behind.passes)
        while True:
            begin = self.behind
            for number in range(begin.shard, len(self.shards)):
                state = begin.state if number == begin.shard else None
                for parts, behind in self.shards[number].texts(state):
                    if isinstance(parts, tuple) and "".join(parts[:1]).startswith(TURN):
                        raise UserError(f"{self.shards[number].name!r} holds chats: leave --stream out")
                    text = self.held_out.filter(parts, self.scrubber)
                    if text is not None:
                        self.before, self.behind = self.behind, Position(number, behind, begin.passes)
                        is_empty = False
                        yield text
            if is_empty:
                names = ", ".join(repr(shard.name) for shard in self.shards[:3])
                raise UserError(
                    f"no training text was found in {names}: every record is empty or held out, "
                    "name other sources"
                )
            self.before = self.behind = Position(passes=begin.passes + 1)
            is_empty = True
            yield None


class Piece(NamedTuple):
    """A part of a document, to be encoded by itself; or the end of an epoch, with an empty text."""

    text: str
    ends_document: bool
    ends_pass: bool = False


# a part of a stream, and its share in a sample of all of it
Stretch = tuple[float, Generator[Parts, None, None]]


@dataclass(frozen=True)
class DocumentStream:
    """Endless stream of the documents of some lanes, mixed by `weights`, their shares of the characters."""

    lanes: Sequence[Sequence[Shard]]
    weights: Sequence[float]
    held_out: HeldOut = field(default_factory=HeldOut)
    scrubber: Scrubber | None = None

    @property
    def shards(self) -> list[Shard]:
        return [shard for lane in self.lanes for shard in lane]

    @property
    def n_bytes(self) -> int:
        """Bytes of the files on disk."""
        return sum(shard.n_bytes or 0 for shard in self.shards)

    @property
    def sha256(self) -> str:
        """Hash of all that decides the texts and their order, except the content of the files."""
        return self._hash([[(shard.name, shard.n_bytes) for shard in lane] for lane in self.lanes])

    @property
    def sha256_without_names(self) -> str:
        """`sha256` without the names of files, which are others in another folder."""
        known = [[(shard.name, shard.n_bytes) for shard in lane] for lane in self.lanes]
        return self._hash([[name if size is None else size for name, size in lane] for lane in known])

    def _hash(self, files: list[list[Any]]) -> str:
        scrubbed = [] if self.scrubber is None else [self.scrubber.to_json(None)]
        content = json.dumps([files, list(self.weights), self.held_out.sha256, *scrubbed])
        return hashlib.sha256(content.encode()).hexdigest()

    def first_epoch(self) -> Generator[Parts, None, None]:
        """All texts once, in the order of a walk, in which a short lane begins again meanwhile."""
        walk = self.walk()
        for parts in walk.texts():
            if parts is None or walk.passes:
                return
            yield parts

    def stretches(self) -> tuple[list[Stretch], list[str]]:
        """(parts of the stream to take a sample from, names of shards of which only the beginning can be
        reached). The parts begin evenly over all of it, each lane in its share."""
        found, partly = [], []
        for lane, weight in zip(self.lanes, self.weights, strict=True):
            known = [shard.n_bytes for shard in lane]
            sizes = np.array([1 if None in known else n_bytes for n_bytes in known])
            n_places = max(1, round(_PLACES * weight / sum(self.weights)))
            places = (np.arange(n_places) + 0.5) / n_places * sizes.sum()
            chosen = np.bincount(np.searchsorted(np.cumsum(sizes), places, side="right"), minlength=len(lane))
            for shard, n in zip(lane, chosen.tolist(), strict=True):
                beginnings = shard.beginnings(n) if n else []
                if n > len(beginnings) == 1:
                    partly.append(shard.name)
                share = weight / sum(self.weights) * n / n_places
                found += [(share / len(beginnings), self._to_train_on(each)) for each in beginnings]
        return found, partly

    def _to_train_on(self, beginning: Beginning) -> Generator[Parts, None, None]:
        for parts, _ in beginning():
            text = self.held_out.filter(parts, self.scrubber)
            if text is not None:
                yield text

    def walk(self, position: dict[str, Any] | None = None) -> "Walk":
        """Start a walk, at `position` of another walk or at the beginning."""
        return Walk(self, position)


class Walk:
    """A walk through a stream. The next text comes from the lane that is furthest behind its share."""

    def __init__(self, stream: DocumentStream, position: dict[str, Any] | None):
        position = position or {
            "lane": 0,
            "pieces": 0,
            "lanes": [{**asdict(Position()), "taken": 0}] * len(stream.lanes),
        }
        self._weights = stream.weights
        self._lane: int = position["lane"]
        self._pieces: int = position["pieces"]  # taken of the document that was begun
        self._taken: list[int] = [lane["taken"] for lane in position["lanes"]]  # characters
        self._taken_before = 0  # by this lane, when its document began
        starts = [Position(lane["shard"], lane["state"], lane["passes"]) for lane in position["lanes"]]
        self._lanes = [
            Lane(shards, stream.held_out, start, stream.scrubber)
            for shards, start in zip(stream.lanes, starts, strict=True)
        ]
        self._texts = [lane.texts() for lane in self._lanes]

    @property
    def position(self) -> dict[str, Any]:
        """JSON from which a new walk continues here."""
        taken = zip(self._lanes, self._taken, strict=True)
        lanes = [{**asdict(lane.behind), "taken": n_characters} for lane, n_characters in taken]
        if self._pieces:  # then its document is read again
            lanes[self._lane] = {**asdict(self._lanes[self._lane].before), "taken": self._taken_before}
        return {"lane": self._lane, "pieces": self._pieces, "lanes": lanes}

    @property
    def passes(self) -> int:
        """Epochs that every lane has finished."""
        return min(lane.behind.passes for lane in self._lanes)

    def pieces(self, can_cut: bool) -> Iterator[Piece]:
        """All documents for encoding; with `can_cut`, long ones in several pieces."""
        for parts in self.texts():
            if parts is None:
                yield Piece("", ends_document=False, ends_pass=True)
                continue
            n_before, number = self._pieces, 0
            texts = pieces_of_parts(parts, can_cut)
            text: str | None = next(texts)
            while text is not None:
                following = next(texts, None)
                number += 1
                if number > n_before:
                    self._pieces = 0 if following is None else number
                    yield Piece(text, ends_document=following is None)
                text = following

    def texts(self) -> Iterator[Parts | None]:
        """Parts of each document, to be consumed before the next; None at the end of an epoch of one lane."""
        while True:
            if not self._pieces:
                shares = [taken / weight for taken, weight in zip(self._taken, self._weights, strict=True)]
                self._lane = shares.index(min(shares))
            self._taken_before = self._taken[self._lane]
            parts = next(self._texts[self._lane])
            if parts is not None:
                yield self._counted(parts)
            elif len(self._lanes) == 1:
                yield None

    def _counted(self, parts: Parts) -> Iterator[str]:
        for part in parts:
            self._taken[self._lane] += len(part)
            yield part


def open_stream(recipe: CorpusRecipe) -> DocumentStream:
    """Open the stream of a recipe's sources, with nothing held out yet.

    Raises:
        UserError: a source does not exist, or fields contradict each other.
    """
    check_stream(recipe)
    check_encoding(recipe.encoding)
    seen: set[str] = set()
    sources: list[list[Shard]] = []
    by_name, targets = splits_by_name(recipe), locate_all(recipe.sources)
    check_found(targets)
    for word, located in zip(recipe.sources, targets, strict=True):
        files = [file for file in located.files if not by_name or file.split in (None, "train")]
        new = [file for file in files if str(file.path.resolve()) not in seen]
        seen |= {str(file.path.resolve()) for file in new}
        is_hub = located.is_hub
        sources.append([HubShard(word, recipe)] if is_hub else [FileShard(file, recipe) for file in new])
    scrubber = scrubber_of(recipe)
    if recipe.weights is None:
        return DocumentStream([list(itertools.chain(*sources))], [1.0], scrubber=scrubber)
    for word, shards in zip(recipe.sources, sources, strict=True):
        if not shards:
            raise UserError(
                f"{word!r} has no file that is not of a source before it: leave it and its weight out"
            )
    return DocumentStream(sources, recipe.weights, scrubber=scrubber)


def check_stream(recipe: CorpusRecipe) -> None:
    """
    Raises:
        UserError: fields of the corpus section do not make a stream.
    """
    n_sources, weights = len(recipe.sources), recipe.weights
    if not n_sources:
        raise UserError("--stream needs a SOURCE: the text that Python brings is small, leave --stream out")
    if weights is not None and len(weights) != n_sources:
        raise UserError(
            f"corpus.weights has {len(weights)} numbers for {n_sources} sources: give one for each"
        )
    if recipe.near_duplicates is not None:
        raise UserError(
            f"corpus.near_duplicates = {recipe.near_duplicates:g} compares all documents, and --stream has "
            "none of them at hand: leave one out"
        )
    if recipe.keep_held_out and not (recipe.validation or splits_by_name(recipe)):
        raise UserError(
            "corpus.keep_held_out: a stream leaves out all copies of what it holds out by itself; hold out a "
            "file of your own by --validation too, or leave --stream out"
        )
    if recipe.damaged == "skip":
        raise UserError(
            "corpus.damaged = 'skip' is not for a stream, where nothing is counted: mend what is damaged, or "
            "leave --stream out"
        )


@dataclass
class StreamedText:
    """A stream without its validation text, that text, and the content of corpus.json; `is_all_searched` if
    the text was chosen from all of the stream, and not from a sample."""

    stream: DocumentStream
    validation: Documents
    report: dict[str, Any]
    is_all_searched: bool


def read_stream(recipe: CorpusRecipe) -> StreamedText:
    """Open the stream of a recipe, and read its validation text: `recipe.validation`, or what is held out.

    The same recipe over the same files gives the same text. None of it is trained on, wherever it occurs,
    unless `recipe.keep_held_out`.

    Raises:
        UserError: a source cannot be used, or nothing can be held out.
    """
    stream = open_stream(recipe)
    by_name, located = splits_by_name(recipe), locate_all(recipe.sources)
    if recipe.validation or by_name:
        sources = recipe.sources if by_name else recipe.validation
        validation, read = read_documents(sources, recipe, "validation", by_name)
        files, is_all_searched = read["files"], True
    else:
        (validation, is_all_searched), files = hold_out(stream, recipe), []
    told = [each for shard in stream.shards for each in shard.told()]
    shards = [
        {"name": shard.name, "bytes": shard.n_bytes, "sha256": None, "documents": None, **shard.fingerprint()}
        for shard in stream.shards
    ]
    report = {
        "sources": list(recipe.sources),
        "description": describe_files(shards),
        "python": None,
        "encoding": recipe.encoding,
        "stream": {"weights": recipe.weights, "shuffle_buffer": recipe.shuffle_buffer},
        "split": {
            "method": "names" if by_name else "given" if recipe.validation else "hash",
            "seed": recipe.split_seed,
            "fraction": recipe.validation_fraction,
        },
        "train": dict.fromkeys(("documents", "bytes", "characters", "tokens", "sha256")),
        "validation": count_text(validation),
        "files": [*shards, *files],
        "notices": lines_on(located, recipe, by_name) + lines_told(told),
    }
    if stream.scrubber is not None:
        report["scrubbed"] = stream.scrubber.to_json(None)
    stream = replace(stream, held_out=HeldOut(() if recipe.keep_held_out else validation))
    return StreamedText(stream, validation, report, is_all_searched)


def hold_out(stream: DocumentStream, recipe: CorpusRecipe) -> tuple[Documents, bool]:
    """Take the validation text from a stream: documents whose hash is low, up to `validation_bytes`; and tell
    whether all of the stream was searched for them.

    The beginning is searched first. Where that ends before the stream, they are taken from a sample of all of
    it, as far as it can be reached. A text is held out once, however often it occurs, and `HeldOut` keeps all
    its copies from training. Documents longer than a quarter of `validation_bytes`, or than `_COMPARED`
    characters, are left to training. If no hash is low, the document with the lowest is taken.

    Raises:
        UserError: there are not two different documents that are short enough.
    """
    return _of_all(stream, lambda stretches: _choose_held_out(stretches, recipe))


def sample(stream: DocumentStream, n_characters: int) -> tuple[Documents, bool]:
    """(at most `n_characters` for the training of a tokenizer, True if that is all of the stream).

    Of a longer stream they are taken evenly over all of it, as far as it can be reached.
    """
    return _of_all(stream, lambda stretches: _take(stretches, n_characters))


def _of_all(
    stream: DocumentStream, choose: Callable[[Sequence[Stretch]], tuple[Documents, bool]]
) -> tuple[Documents, bool]:
    """Choose from the first epoch, or where that is too long, from a sample of it."""
    found, is_all = choose([(1.0, stream.first_epoch())])
    if not is_all and len(stretches := stream.stretches()[0]) > 1:
        stream.held_out.n_left_out.clear()
        # in a seeded order: what is wanted may be found before the last one
        found, _ = choose([stretches[i] for i in seeded_order(len(stretches), 0)])
    return found, is_all


def _choose_held_out(stretches: Sequence[Stretch], recipe: CorpusRecipe) -> tuple[Documents, bool]:
    """(documents to hold out of `stretches`, True if all of their text was searched)."""
    writer, held_out, is_all = DocumentWriter(), HeldOut(), True
    max_bytes = recipe.validation_bytes
    longest = min(int(_MAX_HELD_SHARE * max_bytes), _COMPARED)
    lowest: tuple[float, str] | None = None
    n_bytes = n_all_walked = n_different = 0
    for share_of_all, texts in stretches:
        wanted, n_walked = n_bytes + share_of_all * max_bytes, 0
        max_walked = _SEARCH_FACTOR * share_of_all * max_bytes / recipe.validation_fraction
        for parts in texts:
            if n_walked > max_walked or n_bytes > min(max_bytes, wanted):
                is_all = False
                break
            text, is_whole = _up_to(parts, longest)
            n_walked += len(text)
            is_new = text not in held_out
            n_different += is_new
            n_text = len(text.encode())
            if not is_whole or n_text > longest or not is_new:
                continue
            share = share_of(_digest(text), recipe.split_seed)
            if lowest is None or share < lowest[0]:
                lowest = share, text
            if share < recipe.validation_fraction:
                n_bytes += n_text
                if n_bytes <= max_bytes:
                    held_out.add(text)
                    writer.add((text,), "stream")
        texts.close()  # a file and a part of it
        n_all_walked += n_walked
    if not len(writer) and lowest is not None:
        writer.add((lowest[1],), "stream")
    if not len(writer) or n_different < 2:
        raise UserError(
            f"nothing can be held out of the {n_all_walked:,} characters searched: there are not two "
            f"documents, one of them of at most {longest:,} bytes; hold out a file of your own by "
            "--validation FILE"
        )
    return writer.documents(), is_all


def _take(stretches: Sequence[Stretch], n_characters: int) -> tuple[Documents, bool]:
    """(the beginning of each of `stretches`, True if that is all of them)."""
    writer, is_all = DocumentWriter(), True
    for share, texts in stretches:
        left, n_taken = round(share * n_characters), 0

        def counted(parts: Parts, left: int = left) -> Iterator[str]:
            nonlocal n_taken, is_all
            for part in parts:
                taken = part[: left - n_taken]
                n_taken += len(taken)
                yield taken
                if len(taken) < len(part):
                    is_all = False
                    return

        for parts in texts:
            if n_taken >= left:
                is_all = False
                break
            writer.add(counted(parts), "stream")
        texts.close()
    return writer.documents(), is_all


def _first(parts: Parts, n_characters: int) -> Iterator[str]:
    """At most `n_characters` of a text."""
    for part in parts:
        yield part[:n_characters]
        n_characters -= len(part)
        if n_characters <= 0:
            return


def _up_to(parts: Parts, n_characters: int) -> tuple[str, bool]:
    """(at most `n_characters` of a text, True if that is all of it)."""
    text = "".join(_first(parts, n_characters + 1))
    return text[:n_characters], len(text) <= n_characters
