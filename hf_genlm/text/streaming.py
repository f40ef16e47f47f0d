"""The documents of sources as a stream: read while they are used, and never held, on disk or in memory.

A walk through a stream can begin at any position that another one had, which is a few numbers for each
source. A file is read from its beginning to get there, a data set of the Hub as `datasets` does it.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError, without_secrets
from hf_genlm.text.damage import Place as RecordPlace
from hf_genlm.text.encoding import pieces_of_parts
from hf_genlm.text.formats import Parts, RawFile, check_column, check_encoding, text_value, texts_of
from hf_genlm.text.scrubbing import Scrubber, scrubber_of
from hf_genlm.text.sources import FoundFile, empty_file, locate, open_hub, opened
from hf_genlm.text.store import Document

_SAMPLES, _SAMPLE = 16, 1 << 16  # of a file: blocks, and the bytes of each


class Shard(Protocol):
    """A part of a source: a file, or a data set. `n_bytes` as it lies on disk, None where it does not."""

    @property
    def name(self) -> str: ...
    @property
    def n_bytes(self) -> int | None: ...
    def sampled(self) -> dict[str, Any]:
        """What tells it from another of its size without reading all of it, for corpus.json."""
        ...

    def texts(self, state: Any) -> Iterator[tuple[Parts, Any]]:
        """Each text from a state on (None: all of them), and the state behind it, which JSON can hold."""
        ...


@dataclass(frozen=True)
class FileShard:
    """A local file; its state is the number of records that were read.

    Raises:
        UserError: from `texts`, at a record that cannot be read.
    """

    file: FoundFile
    recipe: CorpusRecipe

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def n_bytes(self) -> int:
        with opened(self.file):
            return self.file.path.stat().st_size

    def sampled(self) -> dict[str, Any]:
        """`samples_sha256` of 16 blocks of 64 KiB, the first and the last among them: of all of a file of 1
        MiB. Of a larger one, when it was `modified` too, in nanoseconds."""
        digest = hashlib.sha256()
        with opened(self.file) as stream:
            about = self.file.path.stat()
            for number in range(_SAMPLES):
                stream.seek(max(0, about.st_size - _SAMPLE) * number // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE))
        found: dict[str, Any] = {"samples_sha256": digest.hexdigest()}
        return found | ({"modified": about.st_mtime_ns} if about.st_size > _SAMPLES * _SAMPLE else {})

    def texts(self, state: int | None) -> Iterator[tuple[Parts, int]]:
        if not self.n_bytes:
            if self.file.named:
                raise empty_file(self.file)
            return
        with opened(self.file) as stream:
            raw = RawFile(str(self.file.path), self.file.path.name, stream)
            for number, parts in enumerate(texts_of(raw, self.recipe), start=1):
                if number > (state or 0):
                    yield parts, number


@dataclass(frozen=True)
class HubShard:
    """A data set of the Hub, of which nothing is kept on disk; a network that fails is asked again by
    `datasets`.

    Raises:
        UserError: from `texts`, at a record that cannot be read.
    """

    name: str
    recipe: CorpusRecipe
    n_bytes: int | None = None

    def sampled(self) -> dict[str, Any]:
        return {}

    def texts(self, state: dict[str, Any] | None) -> Iterator[tuple[Parts, dict[str, Any]]]:
        dataset = open_hub(self.name, self.recipe, "train", streaming=True)
        if state is not None:
            dataset.load_state_dict(state["dataset"])
        records = iter(dataset)
        for number in itertools.count(1 if state is None else state["record"] + 1):
            where = RecordPlace(self.name, "row", number)
            try:
                record = next(records, None)
            except Exception as error:  # of the network, of a decoder, of the data set's own reader
                reason = without_secrets(" ".join(str(error).split()))[:200] or type(error).__name__
                raise UserError(
                    f"{str(where)!r} cannot be read ({reason}): check the network and the data set"
                ) from error
            if record is None:
                return
            check_column(where, record, self.recipe)
            text = text_value(where, record[self.recipe.text_column], self.recipe)
            yield (text,), {"record": number, "dataset": dataset.state_dict()}


class HeldOut:
    """The texts that are never trained on: those of `documents`."""

    def __init__(self, documents: Iterable[Document] = ()):
        self._digests: dict[int, set[bytes]] = {}  # by their characters
        for document in documents:
            self.add(document.text)

    def add(self, text: str) -> None:
        self._digests.setdefault(len(text), set()).add(digest_of(text))

    def __contains__(self, text: str) -> bool:
        return len(text) in self._digests and digest_of(text) in self._digests[len(text)]

    def unless_held(self, parts: Parts) -> Parts | None:
        """The same text; None where it is held out, or empty."""
        longest = max(self._digests, default=0)
        parts, begun, size = iter(parts), [], 0
        for part in parts:
            begun.append(part)
            size += len(part)
            if size > longest:
                return itertools.chain(begun, parts)
        text = "".join(begun)
        return None if not text or text in self else (text,)

    @property
    def sha256(self) -> str:
        """Of all digests."""
        digests = sorted(itertools.chain.from_iterable(self._digests.values()))
        return hashlib.sha256(b"".join(digests)).hexdigest()


@dataclass(frozen=True)
class Place:
    """Where a lane stands: before record `state` of a shard, in its pass number `passes` (from 0)."""

    shard: int = 0
    state: Any = None
    passes: int = 0


class Lane:
    """The texts of some shards, one after the other, again and again."""

    def __init__(
        self, shards: Sequence[Shard], held: HeldOut, place: Place, scrubber: Scrubber | None = None
    ):
        self.shards, self.held, self.scrubber = shards, held, scrubber
        self.before = self.behind = place  # around the text that was given last

    def texts(self) -> Iterator[Parts | None]:
        """Each text, and None at the end of each pass.

        Raises:
            UserError: a whole pass has none.
        """
        is_empty = self.behind == Place(passes=self.behind.passes)
        while True:
            begin = self.behind
            for number in range(begin.shard, len(self.shards)):
                state = begin.state if number == begin.shard else None
                for parts, behind in self.shards[number].texts(state):
                    if self.scrubber is not None:
                        parts = self.scrubber.scrub_parts(parts)
                    text = self.held.unless_held(parts)
                    if text is not None:
                        self.before, self.behind = self.behind, Place(number, behind, begin.passes)
                        is_empty = False
                        yield text
            if is_empty:
                names = ", ".join(repr(shard.name) for shard in self.shards[:3])
                raise UserError(
                    f"no training text was found in {names}: every record is empty or held out, "
                    "name other sources"
                )
            self.before = self.behind = Place(passes=begin.passes + 1)
            is_empty = True
            yield None


class Piece(NamedTuple):
    """A part of a document as it is encoded."""

    text: str
    ends_document: bool
    ends_pass: bool = False  # then it is not of a document


@dataclass(frozen=True)
class DocumentStream:
    """What the sources hold, again and again. `weights` are the shares of the lanes in the characters."""

    lanes: Sequence[Sequence[Shard]]
    weights: Sequence[float]
    held: HeldOut = field(default_factory=HeldOut)
    scrubber: Scrubber | None = None

    @property
    def shards(self) -> list[Shard]:
        return [shard for lane in self.lanes for shard in lane]

    @property
    def n_bytes(self) -> int:
        """Of the files on disk."""
        return sum(shard.n_bytes or 0 for shard in self.shards)

    @property
    def sha256(self) -> str:
        """Of what decides the texts and their order, but for what files hold."""
        files = [[(shard.name, shard.n_bytes) for shard in lane] for lane in self.lanes]
        scrubbed = [] if self.scrubber is None else [self.scrubber.to_json(None)]
        content = json.dumps([files, list(self.weights), self.held.sha256, *scrubbed])
        return hashlib.sha256(content.encode()).hexdigest()

    def walk(self, position: dict[str, Any] | None = None) -> "Walk":
        """From a position on that another walk had; None: from the beginning."""
        return Walk(self, position)

    def without(self, held: HeldOut) -> "DocumentStream":
        """The same with other texts held out."""
        return replace(self, held=held)


class Walk:
    """A way through a stream. The next text is of the lane that is furthest behind its share."""

    def __init__(self, stream: DocumentStream, position: dict[str, Any] | None):
        position = position or {
            "lane": 0,
            "pieces": 0,
            "lanes": [{**asdict(Place()), "taken": 0}] * len(stream.lanes),
        }
        self._weights = stream.weights
        self._lane: int = position["lane"]
        self._pieces: int = position["pieces"]  # of the document that was begun
        self._taken: list[int] = [lane["taken"] for lane in position["lanes"]]  # characters
        self._taken_before = 0  # by this lane, when its document began
        places = [Place(lane["shard"], lane["state"], lane["passes"]) for lane in position["lanes"]]
        self._lanes = [
            Lane(shards, stream.held, place, stream.scrubber)
            for shards, place in zip(stream.lanes, places, strict=True)
        ]
        self._texts = [lane.texts() for lane in self._lanes]

    @property
    def position(self) -> dict[str, Any]:
        """Where a walk has to begin to go on from here; JSON can hold it."""
        lanes = [
            {**asdict(lane.behind), "taken": taken}
            for lane, taken in zip(self._lanes, self._taken, strict=True)
        ]
        if self._pieces:  # then its document is read again
            lanes[self._lane] = {**asdict(self._lanes[self._lane].before), "taken": self._taken_before}
        return {"lane": self._lane, "pieces": self._pieces, "lanes": lanes}

    @property
    def passes(self) -> int:
        """How many times every lane has been read to its end."""
        return min(lane.behind.passes for lane in self._lanes)

    def pieces(self, cuts: bool) -> Iterator[Piece]:
        """All documents as they are encoded; with `cuts`, long ones in several pieces."""
        for parts in self.texts():
            if parts is None:
                yield Piece("", ends_document=False, ends_pass=True)
                continue
            n_before = self._pieces
            for number, (text, is_last) in enumerate(_with_last(pieces_of_parts(parts, cuts)), start=1):
                if number > n_before:
                    self._pieces = 0 if is_last else number
                    yield Piece(text, is_last)

    def texts(self) -> Iterator[Parts | None]:
        """The parts of each document, all to be taken before the next; None at the end of a pass."""
        while True:
            if not self._pieces:
                self._lane = self._furthest_behind()
            self._taken_before = self._taken[self._lane]
            parts = next(self._texts[self._lane])
            if parts is not None:
                yield self._counted(parts)
            elif len(self._lanes) == 1:
                yield None

    def _furthest_behind(self) -> int:
        shares = [taken / weight for taken, weight in zip(self._taken, self._weights, strict=True)]
        return shares.index(min(shares))

    def _counted(self, parts: Parts) -> Iterator[str]:
        for part in parts:
            self._taken[self._lane] += len(part)
            yield part


def open_stream(recipe: CorpusRecipe) -> DocumentStream:
    """The stream of a recipe's sources, nothing held out yet.

    Raises:
        UserError: a source that does not exist, or fields that do not fit each other.
    """
    check_stream(recipe)
    check_encoding(recipe.encoding)
    seen: set[str] = set()
    sources: list[list[Shard]] = []
    for word in recipe.sources:
        files = locate(word).files
        new = [file for file in files if str(file.path.resolve()) not in seen]
        seen |= {str(file.path.resolve()) for file in new}
        sources.append([FileShard(file, recipe) for file in new] if files else [HubShard(word, recipe)])
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
        UserError: fields of the corpus section that do not make a stream.
    """
    n_sources = len(recipe.sources)
    if not n_sources:
        raise UserError("--stream needs a SOURCE: the text that Python brings is small, leave --stream out")
    if recipe.weights is not None and len(recipe.weights) != n_sources:
        raise UserError(
            f"corpus.weights has {len(recipe.weights)} numbers for {n_sources} sources: give one for each"
        )
    if any(not 0 < weight < float("inf") for weight in recipe.weights or ()):
        raise UserError(
            f"corpus.weights = {recipe.weights}: each must be more than 0, or leave its source out"
        )
    if recipe.near_duplicates is not None:
        raise UserError(
            f"corpus.near_duplicates = {recipe.near_duplicates:g} compares all documents, and --stream has "
            "none of them at hand: leave one out"
        )
    if recipe.damaged == "skip":
        raise UserError(
            "corpus.damaged = 'skip' is not for a stream, where nothing is counted: mend what is damaged, or "
            "leave --stream out"
        )


def digest_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _with_last(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each text, and whether it is the last."""
    texts = iter(texts)
    text = next(texts)
    for following in texts:
        yield text, False
        text = following
    yield text, True
