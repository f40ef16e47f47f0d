"""Read the sources that a person names, files, folders, globs and Hub data sets, into documents."""

import codecs
import contextlib
import functools
import hashlib
import itertools
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.files import open_file
from hf_genlm.text.cache import NoRoom
from hf_genlm.text.formats import format_of, is_archive, look_at, texts_of
from hf_genlm.text.locating import FoundFile, Located, check_found, first_names, locate_all, walk
from hf_genlm.text.raw_files import Damage, LeaveOut, LeftOut, Place, RawFile, one_line
from hf_genlm.text.records import Parts, count_row_groups, find_column, text_of_table, texts_of_rows
from hf_genlm.text.scrubbing import Scrubber, Tally, scrubber_of
from hf_genlm.text.store import CHUNK, DocumentWriter

Sources = Sequence[str] | Mapping[str, Sequence[str]]  # words, or words by language

# comes with CPython beside its library: its tests, and installed packages
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TOPICS_FILE = "pydoc_data/topics.py"
_BUILD_FILE = "_sysconfigdata_"  # holds paths of the machine that built this Python
MAX_DOCUMENTS = 5_000_000  # some 120 bytes of memory each until they are rows
_BY_LINE = {".txt", ".md", ".py", ".jsonl"}  # can be read from any line on
_MAX_LINE = 1 << 26  # bytes that are passed over to the end of a line
_LOOKED_AT = 1 << 22  # characters of an archive that is streamed
_SAMPLES = 16  # blocks of a streamed file that are hashed


@dataclass
class Reading:
    """Documents in the order of the sources, and the facts on their files for corpus.json."""

    writer: DocumentWriter = field(default_factory=DocumentWriter)
    files: list[dict[str, Any]] = field(default_factory=list)  # name, bytes and sha256 on disk, documents
    empty_skipped: int = 0  # empty records, and empty files inside folders
    files_skipped: int = 0  # inside folders: files of another suffix, and what is no regular file
    links_out: int = 0  # links inside a folder to a file outside it
    located: list[Located] = field(default_factory=list)  # of each source
    told: list[tuple[str, str]] = field(default_factory=list)  # told to people, and of which file
    left_out: LeftOut = field(default_factory=LeftOut)  # damaged records, and damaged files inside folders
    languages: dict[str, int] = field(default_factory=dict)  # documents by language, if languages are named
    scrubber: Scrubber | None = None
    scrubbed: Tally = field(default_factory=Tally)

    def add(
        self, name: str, texts: Iterable[Parts], n_bytes: int | None = None, sha256: str | None = None
    ) -> int:
        """Add the texts of one file; returns how many are not empty. `n_bytes` is None for a Hub data set.

        Raises:
            Damage: the file is damaged; nothing of it is added.
        """
        n_texts, n_before, tally = 0, len(self.writer), Tally()
        try:
            for parts in texts:
                self.writer.add(self.scrub(parts, tally), name)
                n_texts += 1
                if len(self.writer) > MAX_DOCUMENTS:
                    raise UserError(
                        f"the sources hold more than {MAX_DOCUMENTS:,} documents, too many to be held: "
                        "read them with --stream, or join short ones"
                    )
        except Damage:
            self.writer.truncate(n_before)
            raise
        self.scrubbed.update(tally)
        n_added = len(self.writer) - n_before
        self.empty_skipped += n_texts - n_added
        self.files.append({"name": name, "bytes": n_bytes, "sha256": sha256, "documents": n_added})
        return n_added

    def scrub(self, parts: Parts, tally: Tally) -> Parts:
        """A text without the personal data that the recipe removes."""
        return parts if self.scrubber is None else self.scrubber.scrub_parts(parts, tally)


def read_sources(words: Sources, recipe: CorpusRecipe, split: str, by_name: bool = False) -> Reading:
    """Read every source once, in the order given; folders and globs in the order of their names.

    `split` ("train" or "validation") is preferred of a Hub data set that has several. A file that turns out
    to be damaged in the middle is left out whole. With `by_name`, only the files of that split are read, and
    those whose names say none for training.

    Raises:
        UserError: a source is missing, unreadable or not text; it is damaged and `corpus.damaged` is "stop";
            or a language has no text.
    """
    reading = Reading(scrubber=scrubber_of(recipe))
    seen: set[str] = set()
    for code, of_language in words.items() if isinstance(words, Mapping) else [(None, words)]:
        n_documents, n_files = len(reading.writer), len(reading.files)
        for word, located in zip(of_language, locate_all(of_language), strict=True):
            reading.files_skipped += located.n_skipped
            reading.located.append(located)
            if located.is_hub:
                batches = open_hub(word, recipe, split).with_format("arrow").iter(batch_size=1000)
                values = (value for batch in batches for value in batch[recipe.text_column])
                leave_out = _leave_out(reading.left_out, word, recipe)
                reading.add(word, texts_of_rows(word, values, recipe, leave_out))
            for file in located.files:
                if by_name and (file.split or "train") != split:
                    continue
                identity = os.path.realpath(file.path)
                if identity not in seen:
                    seen.add(identity)
                    reading.links_out += file.links_out
                    _read_file(file, recipe, reading)
        if code is None:
            continue
        reading.languages[code] = len(reading.writer) - n_documents
        if not reading.languages[code]:
            raise UserError(
                f"no text of {code!r} was found in {', '.join(map(repr, of_language))} that is not of a "
                "language before it: name other sources"
            )
        for entry in reading.files[n_files:]:
            entry["language"] = code
    check_found(reading.located)
    return reading


def read_standard_library(recipe: CorpusRecipe) -> Reading:
    """Read the embedded default corpus: the library source of this CPython, and its reference topics.

    Raises:
        UserError: this Python comes without the source of its library.
    """
    from pydoc_data import topics

    root = Path(sysconfig.get_path("stdlib"))
    reading = Reading(scrubber=scrubber_of(recipe))
    for path in walk(root, pruned=_NOT_LIBRARY)[0]:
        name = path.relative_to(root).as_posix()
        if path.suffix != ".py" or path.name.startswith(_BUILD_FILE):
            continue
        content = path.read_bytes()
        of_file = len(content), hashlib.sha256(content).hexdigest()
        if name == _TOPICS_FILE:
            texts = {f"topics:{topic}": text for topic, text in sorted(topics.topics.items()) if text}
            for topic, text in texts.items():
                reading.writer.add(reading.scrub((text,), reading.scrubbed), topic)
            reading.add(name, [], *of_file)
            reading.files[-1]["documents"] = len(texts)
        elif content:
            try:
                reading.add(name, [(content.decode("utf-8"),)], *of_file)
            except UnicodeDecodeError:  # declares another encoding; no file of CPython 3.10 to 3.14 does
                reading.files_skipped += 1
    if not len(reading.writer):
        raise UserError(
            "this Python comes without the source of its library: name a file or folder of text to read"
        )
    return reading


def _read_file(file: FoundFile, recipe: CorpusRecipe, reading: Reading) -> None:
    label, left_out = str(file.path), LeftOut()
    n_bytes, digest = 0, hashlib.sha256()
    try:
        with opened(file) as stream:
            while content := stream.read(CHUNK):
                digest.update(content)
                n_bytes += len(content)
            stream.seek(0)
            raw, of_file, told = look_at(RawFile(label, file.path.name, stream, shown=file.name), recipe)
            leave_out = _leave_out(left_out, file.name, recipe, label)
            texts = texts_of(raw, of_file, leave_out) if n_bytes else [()]
            n_added = reading.add(file.name, texts, n_bytes, digest.hexdigest())
    except NoRoom as error:
        raise NoRoom(f"{label!r}, which has {n_bytes:,} bytes, holds more text than fits: {error}") from error
    except Damage as damage:
        if file.is_named and damage.place.unit is None:
            raise
        _leave_out(reading.left_out, file.name, recipe, label)(damage)
        return
    reading.left_out.update(left_out)
    reading.told += [(each, file.name) for each in told] + raw.told
    reading.files_skipped += raw.skipped["files"]
    if file.is_named and not n_added:
        if not left_out.places:
            raise empty_file(file)
        n, what = (left_out.files, "files in it") if left_out.files else (left_out.records, "records")
        raise UserError(
            f"{label!r} holds no text that can be used: {n:,} {what} are damaged, "
            f"the first one {left_out.places[0]['reason']}; mend the file, or leave it out"
        )


def _leave_out(left_out: LeftOut, name: str, recipe: CorpusRecipe, label: str = "") -> LeaveOut:
    """A function that counts damage in the file `name`, or in a member of it, or raises it if the recipe says
    so; `label` is the name of the file in messages."""

    def take(damage: Damage) -> None:
        if recipe.damaged == "stop":
            raise UserError(
                f"{damage}; or leave out what is damaged with --set corpus.damaged=skip"
            ) from damage
        left_out.add(name + damage.place.label.removeprefix(label) if label else name, damage)

    return take


def check_encoding(encoding: str) -> None:
    """
    Raises:
        UserError: Python has no text encoding of that name.
    """
    try:
        "a".encode(encoding).decode(encoding)
        codecs.getincrementaldecoder(encoding)
    except (LookupError, ValueError) as error:
        raise UserError(
            f"corpus.encoding = {encoding!r} is no text encoding that Python knows: "
            "name one such as utf-8, utf-16 or latin-1"
        ) from error


def lines_told(told: Iterable[tuple[str, str]]) -> list[str]:
    """Lines for people, from pairs of what is told and the name of a file."""
    names: dict[str, list[str]] = {}
    for each, name in told:
        names.setdefault(each, []).append(name)
    return [f"{first_names(of_line)}: {each}" for each, of_line in names.items()]


@contextlib.contextmanager
def opened(file: FoundFile) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes.

    Raises:
        UserError: it is no regular file, or an OSError is met while it is opened or read.
    """
    label = str(file.path)
    try:
        if not stat.S_ISREG(file.path.stat().st_mode):
            raise UserError(
                f"{label!r} is neither a file nor a folder: save the text to a file and name that"
            )
        with open_file(file.path) as stream:
            yield stream
    except OSError as error:
        raise UserError(
            f"{label!r} cannot be read ({error.strerror}): check the file's permissions"
        ) from error


def empty_file(file: FoundFile) -> UserError:
    """The error to raise for a named file without text."""
    return UserError(f"{str(file.path)!r} is empty: a source must hold text, leave it out or fill it")


def open_hub(word: str, recipe: CorpusRecipe, split: str, streaming: bool = False) -> Any:
    """Text column of a split of a Hub data set: a `datasets.Dataset`, or an `IterableDataset`.

    Raises:
        UserError: it cannot be loaded, has no such split, or is known to lack the column.
    """
    import datasets
    from huggingface_hub import HfApi, constants

    name, _, config = word.partition(":")
    try:
        if not constants.HF_HUB_OFFLINE:  # load_dataset asks an unreachable Hub for half a minute
            HfApi().dataset_info(name, timeout=10)
        options = {"streaming": True} if streaming else {}
        splits = datasets.load_dataset(name, config or None, **options)
    except Exception as error:  # any error in there is one of the id or of the network
        raise UserError(
            f"{word!r} is no path here, and as a Hub dataset it cannot be loaded ({one_line(error)}): "
            "check the path, or the id owner/name:config and the network (HF_HUB_OFFLINE=1 uses a "
            "downloaded copy)"
        ) from error
    wanted = {"train": ("train",), "validation": ("validation", "test", "train")}[split]
    chosen = next((key for key in wanted if key in splits), None)
    if chosen is None and len(splits) == 1:
        (chosen,) = splits
    if chosen is None:
        raise UserError(
            f"{word!r} has no split {split!r}, it has {', '.join(splits)}: save the one you mean to a "
            ".jsonl file"
        )
    if splits[chosen].column_names is not None:  # a stream may learn them from its first record
        name = find_column(Place(word), splits[chosen].column_names, recipe)
        if name != recipe.text_column:
            return splits[chosen].select_columns([name]).rename_column(name, recipe.text_column)
    return splits[chosen].select_columns([recipe.text_column])


@dataclass(frozen=True)
class FileShard:
    """A local file; its state is the number of records read. `texts` raises at a record that is damaged."""

    file: FoundFile
    recipe: CorpusRecipe
    sample_bytes = 1 << 16  # of each block that is hashed

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def n_bytes(self) -> int:
        with opened(self.file):
            return self.file.path.stat().st_size

    def fingerprint(self) -> dict[str, Any]:
        """`samples_sha256` of 16 blocks of 64 KiB, the first and the last among them, which is all of a file
        of 1 MiB; for a larger file also the time it was `modified`, in nanoseconds."""
        digest = hashlib.sha256()
        with opened(self.file) as stream:
            about = self.file.path.stat()
            for number in range(_SAMPLES):
                stream.seek(max(0, about.st_size - self.sample_bytes) * number // (_SAMPLES - 1))
                digest.update(stream.read(self.sample_bytes))
        found: dict[str, Any] = {"samples_sha256": digest.hexdigest()}
        return found | (
            {"modified": about.st_mtime_ns} if about.st_size > _SAMPLES * self.sample_bytes else {}
        )

    def told(self) -> list[tuple[str, str]]:
        """Lines for people about how the file is read, each with its name."""
        with opened(self.file) as stream:
            raw, recipe, told = look_at(self._raw(stream), self.recipe)
            if is_archive(raw.name):  # of its first members
                sizes = itertools.accumulate(map(len, itertools.chain.from_iterable(texts_of(raw, recipe))))
                next((size for size in sizes if size > _LOOKED_AT), None)
            return [(each, self.name) for each in told] + raw.told

    def beginnings(self, n: int) -> "list[Beginning]":
        """At most `n` places, evenly over the file, from which its texts can be read: of what is compressed,
        only the first."""
        with opened(self.file) as stream:
            raw, recipe, _ = look_at(self._raw(stream), self.recipe)
            suffix, compression = format_of(raw.name)
            is_text = (suffix or ".txt") in _BY_LINE and codecs.lookup(recipe.encoding).name == "utf-8"
            if suffix == ".parquet" and compression is None:
                n = min(n, count_row_groups(stream))
            elif not is_text or compression is not None:
                n = 1
        return [functools.partial(self.texts, None, i / n) for i in range(n)]

    def _raw(self, stream: IO[bytes]) -> RawFile:
        return RawFile(str(self.file.path), self.file.path.name, stream, shown=self.name)

    def texts(self, state: int | None, start: float = 0.0) -> Iterator[tuple[Parts, int]]:
        """Texts behind the record of number `state`, or from the first line, or row group, behind the share
        `start` of the file on."""
        if not self.n_bytes:
            if self.file.is_named:
                raise empty_file(self.file)
            return
        with opened(self.file) as stream:
            raw, recipe, _ = look_at(self._raw(stream), self.recipe)
            suffix = format_of(raw.name)[0] or ".txt"
            if start and suffix in _BY_LINE:
                stream.seek(int(start * self.n_bytes))
                stream.readline(_MAX_LINE if suffix == ".jsonl" else CHUNK)
                while (byte := stream.read(1)) and byte[0] & 0xC0 == 0x80:  # inside a longer line
                    pass
                stream.seek(-len(byte), os.SEEK_CUR)
                # the first text may be the rest of the one before
                state = int(suffix == ".jsonl" or raw.separator is not None)
            if start:
                raw = replace(raw, label=f"{raw.label} from {start:.1%} of it on", start=start)
            for number, parts in enumerate(texts_of(raw, recipe), start=1):
                if number > (state or 0):
                    yield parts, number
                else:
                    for _ in parts:
                        pass


@dataclass(frozen=True)
class HubShard:
    """A Hub data set, of which nothing is stored on disk; `datasets` retries when the network fails."""

    name: str
    recipe: CorpusRecipe
    n_bytes: int | None = None

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def told(self) -> list[tuple[str, str]]:
        return []

    def beginnings(self, n: int) -> "list[Beginning]":
        """At most `n` places from which the texts can be read: the first of each of its files."""
        dataset = self._open()
        n_files = max(1, getattr(dataset, "num_shards", 1))
        n = min(n, n_files)
        parts = [dataset.shard(n_files, i * n_files // n) for i in range(n)] if n > 1 else [dataset]
        return [functools.partial(self.texts, None, part) for part in parts]

    def _open(self) -> Any:
        """Tables of one row, whose size is known before they become objects of Python."""
        return open_hub(self.name, self.recipe, "train", streaming=True).with_format("arrow")

    def texts(self, state: dict[str, Any] | None, dataset: Any = None) -> Iterator[tuple[Parts, dict]]:
        """Texts behind `state`, of all of the data set or a part of it."""
        dataset = self._open() if dataset is None else dataset
        if state is not None:
            dataset.load_state_dict(state["dataset"])
        records = iter(dataset)
        for number in itertools.count(1 if state is None else state["record"] + 1):
            place = Place(self.name, "row", number)
            try:
                record = next(records, None)
            except Exception as error:  # of the network, of a decoder, of the data set's own reader
                raise UserError(
                    f"{str(place)!r} cannot be read ({one_line(error)}): check the network and the data set"
                ) from error
            if record is None:
                return
            text = text_of_table(place, record, self.recipe)
            yield (text,), {"record": number, "dataset": dataset.state_dict()}


# a part of a source: its name, its bytes on disk (None if it is not there), facts for corpus.json that tell a
# changed shard, `texts(state)`: (text, JSON state behind it) from a state on, and `beginnings(n)`
Shard = FileShard | HubShard
Beginning = Callable[[], Iterator[tuple[Parts, Any]]]
