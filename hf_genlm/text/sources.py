"""From the words a person names as sources to documents: files, folders, globs, Hub ids, the default."""

import contextlib
import glob
import hashlib
import os
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NoReturn

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import NoSource, UserError, without_secrets
from hf_genlm.text.cache import NoRoom
from hf_genlm.text.damage import Damage, LeaveOut, LeftOut, Place
from hf_genlm.text.formats import Parts, RawFile, check_column, format_of, texts_of, texts_of_rows
from hf_genlm.text.scrubbing import Scrubber, Tally, scrubber_of
from hf_genlm.text.store import CHUNK, Document, DocumentWriter

__all__ = [
    "Document",
    "FoundFile",
    "Located",
    "Reading",
    "locate",
    "open_hub",
    "opened",
    "read_sources",
    "read_standard_library",
]

# what CPython brings beside its library: its tests, and what was installed into it
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TOPICS_FILE = "pydoc_data/topics.py"
_BUILD_FILE = "_sysconfigdata_"  # what the build wrote: paths of the machine that built this Python
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")


@dataclass
class Reading:
    """Documents in the order of the sources, and what a report tells about their files."""

    writer: DocumentWriter = field(default_factory=DocumentWriter)
    files: list[dict[str, Any]] = field(
        default_factory=list
    )  # name, bytes, sha256 (both as on disk), documents
    empty_skipped: int = 0  # empty records, and empty files inside folders
    files_skipped: int = 0  # files inside folders whose suffix is not a text's, and what is no file
    links_out: int = 0  # files that a link inside a folder leads to, out of it
    left_out: LeftOut = field(default_factory=LeftOut)  # damaged records, and damaged files inside folders
    languages: dict[str, int] = field(default_factory=dict)  # documents of each, where they are named
    scrubber: Scrubber | None = None
    scrubbed: Tally = field(default_factory=Tally)  # what it replaced

    def add(
        self, name: str, texts: Iterable[Parts], n_bytes: int | None = None, sha256: str | None = None
    ) -> int:
        """Take in the texts of one file; how many are not empty. No `n_bytes` where no file is on this
        disk.

        Raises:
            Damage: the file is no whole one; nothing of it is taken in then.
        """
        n_texts, before, of_file = 0, len(self.writer), Tally()
        try:
            for parts in texts:
                self.writer.add(self.cleaned(parts, of_file), name)
                n_texts += 1
        except Damage:
            self.writer.keep(before)
            raise
        self.scrubbed.join(of_file)
        n_kept = len(self.writer) - before
        self.empty_skipped += n_texts - n_kept
        self.files.append({"name": name, "bytes": n_bytes, "sha256": sha256, "documents": n_kept})
        return n_kept

    def cleaned(self, parts: Parts, tally: Tally) -> Parts:
        """A text as it is taken in."""
        return parts if self.scrubber is None else self.scrubber.scrub_parts(parts, tally)


@dataclass(frozen=True)
class FoundFile:
    """A file of a source; `name` is shown to people."""

    path: Path
    name: str
    named: bool  # by the person, not met inside a folder or through a glob
    links_out: bool = False  # a link inside a folder, to a file elsewhere


@dataclass(frozen=True)
class Located:
    """What a source stands for: files, and the number of others skipped; or a Hub data set."""

    files: list[FoundFile]
    n_skipped: int = 0
    is_hub: bool = False


def read_sources(
    words: Iterable[str] | Mapping[str, Iterable[str]], recipe: CorpusRecipe, split: str
) -> Reading:
    """Read every source once, in the order given; folders and globs in the order of their names.

    `words` may be by language. `split` ("train" or "validation") is the one to take of a Hub data set that
    has several. A file is read to its end or left out: of one that turns out to be damaged in the middle
    nothing is taken.

    Raises:
        UserError: a source is missing, unreadable, or not text; or, with `corpus.damaged` "stop", a record
            or a file of it is damaged; or there is no text of a language.
    """
    reading = Reading(scrubber=scrubber_of(recipe))
    seen: set[str] = set()
    if not isinstance(words, Mapping):
        _take_sources(words, recipe, split, reading, seen)
        return reading
    for code, of_language in words.items():
        n_documents, n_files = len(reading.writer), len(reading.files)
        _take_sources(of_language, recipe, split, reading, seen)
        reading.languages[code] = len(reading.writer) - n_documents
        if not reading.languages[code]:
            raise UserError(
                f"no text of {code!r} was found in {', '.join(map(repr, of_language))} that is not of a "
                "language before it: name other sources"
            )
        for file in reading.files[n_files:]:
            file["language"] = code
    return reading


def _take_sources(
    words: Iterable[str], recipe: CorpusRecipe, split: str, reading: Reading, seen: set[str]
) -> None:
    for word in words:
        located = locate(word)
        reading.files_skipped += located.n_skipped
        if located.is_hub:
            _read_hub(word, recipe, split, reading)
        for file in located.files:
            identity = os.path.realpath(file.path)
            if identity not in seen:
                seen.add(identity)
                reading.links_out += file.links_out
                _read_file(file, recipe, reading)


def read_standard_library(recipe: CorpusRecipe) -> Reading:
    """The embedded default: the library source that this CPython brings, and its reference topics.

    Raises:
        UserError: this Python comes without the source of its library.
    """
    from pydoc_data import topics

    root = Path(sysconfig.get_path("stdlib"))
    reading = Reading(scrubber=scrubber_of(recipe))
    for path in _walk(root, pruned=_NOT_LIBRARY)[0]:
        name = path.relative_to(root).as_posix()
        if path.suffix != ".py" or path.name.startswith(_BUILD_FILE):
            continue
        content = path.read_bytes()
        of_file = len(content), hashlib.sha256(content).hexdigest()
        if name == _TOPICS_FILE:
            texts = {f"topics:{topic}": text for topic, text in sorted(topics.topics.items()) if text}
            for topic, text in texts.items():
                reading.writer.add(reading.cleaned((text,), reading.scrubbed), topic)
            reading.add(name, [], *of_file)
            reading.files[-1]["documents"] = len(texts)
        elif content:
            try:
                reading.add(name, [(content.decode("utf-8"),)], *of_file)
            except UnicodeDecodeError:  # a file with another encoding declared; none in CPython 3.10 to 3.14
                reading.files_skipped += 1
    if not len(reading.writer):
        raise UserError(
            "this Python comes without the source of its library: name a file or folder of text to read"
        )
    return reading


def locate(word: str) -> Located:
    """What a source stands for.

    Raises:
        UserError: nothing is there, and `word` is no id of a Hub data set either.
    """
    path = Path(os.path.expanduser(word))
    if word and os.path.isdir(
        path
    ):  # pathlib's own questions raise on a name too long or a closed parent folder
        return _in_folder(word, path)
    if word and os.path.lexists(path):
        return Located([FoundFile(path, _shown(path), named=True)])
    if glob.has_magic(word):
        matches = sorted(glob.glob(os.path.expanduser(word), recursive=True))
        parts = [locate(match) for match in matches]
        found = [replace(file, named=False) for part in parts for file in part.files]
        if found:
            return Located(found, sum(part.n_skipped for part in parts))
        raise NoSource(word, f"no file matches {word!r}: check the pattern and the folder it starts from")
    if _HUB_ID.fullmatch(word) and format_of(word) == (None, None):
        return Located([], is_hub=True)
    raise NoSource(
        word,
        f"{word!r} does not exist: name a file, a folder or a glob, "
        "or a Hub dataset id, which looks like owner/name",
    )


def _in_folder(word: str, folder: Path) -> Located:
    paths, n_others = _walk(folder)
    known = [path for path in paths if format_of(path.name)[0] is not None]
    n_skipped = len(paths) - len(known) + n_others
    if not known:
        raise UserError(
            f"folder {word!r} holds no readable file ({n_skipped} others): put .txt, .md, .py, .jsonl "
            "or .parquet there, also compressed, or name a file of another suffix itself"
        )
    base, inside = _shown(folder), os.path.realpath(folder)
    found = [
        FoundFile(path, f"{base}{path.relative_to(folder).as_posix()}", False, _leads_out(path, inside))
        for path in known
    ]
    return Located(found, n_skipped)


def _leads_out(path: Path, folder: str) -> bool:
    """True if a path inside `folder` is a link to a file elsewhere."""
    return path.is_symlink() and os.path.commonpath([folder, os.path.realpath(path)]) != folder


def _walk(folder: Path, pruned: Iterable[str] = ()) -> tuple[list[Path], int]:
    """Regular files below `folder`, but hidden ones and `pruned` folders, sorted by relative path; and how
    many pipes, devices, links to folders and links to nothing stand among them. Links to files are followed.
    """

    def stop(error: OSError) -> NoReturn:
        raise UserError(
            f"{error.filename!r} cannot be read ({error.strerror}): change its permissions"
        ) from error

    found: list[Path] = []
    n_others = 0
    for parent, folders, files in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in pruned]
        n_others += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    try:
        regular = [path for path in found if path.is_file()]
    except OSError as error:  # a folder that may be listed but not entered
        stop(error)
    by_name = sorted(regular, key=lambda path: path.relative_to(folder).as_posix())
    return by_name, n_others + len(found) - len(regular)


def _shown(path: Path) -> str:
    """A name for people: a relative path as given, the last part of any other. A folder ends with `/`."""
    within = not path.is_absolute() and ".." not in path.parts
    name = path.as_posix() if within else path.resolve().name
    if not path.is_dir():
        return name
    return "" if name == "." else f"{name}/"


def _read_file(file: FoundFile, recipe: CorpusRecipe, reading: Reading) -> None:
    label, of_file = str(file.path), LeftOut()
    leave_out = _leave_out(of_file, file.name, recipe)
    n_bytes = 0
    try:
        with opened(file) as stream:
            n_bytes, sha256 = _measure(stream)
            texts = texts_of(RawFile(label, file.path.name, stream), recipe, leave_out) if n_bytes else [()]
            n_kept = reading.add(file.name, texts, n_bytes, sha256)
    except NoRoom as error:
        raise NoRoom(f"{label!r}, which has {n_bytes:,} bytes, holds more text than fits: {error}") from error
    except Damage as damage:
        if file.named and damage.place.unit is None:
            raise
        _leave_out(reading.left_out, file.name, recipe)(damage)
        return
    reading.left_out.join(of_file)
    if file.named and not n_kept:
        _refuse_hollow(file, of_file)


def _leave_out(left_out: LeftOut, name: str, recipe: CorpusRecipe) -> LeaveOut:
    """What is done with damage in the file `name`."""

    def take(damage: Damage) -> None:
        if recipe.damaged == "stop":
            raise UserError(
                f"{damage}; or leave out what is damaged with --set corpus.damaged=skip"
            ) from damage
        left_out.take(name, damage)

    return take


@contextlib.contextmanager
def opened(file: FoundFile) -> Iterator[IO[bytes]]:
    """The bytes of a file.

    Raises:
        UserError: it is no regular file, or opening or what is done inside meets an OSError.
    """
    label = str(file.path)
    try:
        if not stat.S_ISREG(file.path.stat().st_mode):
            raise UserError(
                f"{label!r} is neither a file nor a folder: save the text to a file and name that"
            )
        with file.path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise UserError(
            f"{label!r} cannot be read ({error.strerror}): check the file's permissions"
        ) from error


def _refuse_hollow(file: FoundFile, left_out: LeftOut) -> NoReturn:
    if left_out.records:
        raise UserError(
            f"{str(file.path)!r} holds no text that can be used: {left_out.records:,} records are damaged, "
            f"the first one {left_out.places[0]['reason']}; mend the file, or leave it out"
        )
    raise empty_file(file)


def empty_file(file: FoundFile) -> UserError:
    """What to raise at a named file without text."""
    return UserError(f"{str(file.path)!r} is empty: a source must hold text, leave it out or fill it")


def _measure(stream: IO[bytes]) -> tuple[int, str]:
    """Bytes and sha256 of a file, which is left at its beginning."""
    digest, n_bytes = hashlib.sha256(), 0
    while content := stream.read(CHUNK):
        digest.update(content)
        n_bytes += len(content)
    stream.seek(0)
    return n_bytes, digest.hexdigest()


def _read_hub(word: str, recipe: CorpusRecipe, split: str, reading: Reading) -> None:
    """A data set of the Hub, one document a record."""
    batches = open_hub(word, recipe, split).iter(batch_size=1000)
    values = (value for batch in batches for value in batch[recipe.text_column])
    reading.add(word, texts_of_rows(word, values, recipe, _leave_out(reading.left_out, word, recipe)))


def open_hub(word: str, recipe: CorpusRecipe, split: str, streaming: bool = False) -> Any:
    """The text column of a split of a Hub data set: a `datasets.Dataset`, or its `IterableDataset`.

    Raises:
        UserError: it cannot be loaded, has no such split, or is known to lack the column.
    """
    import datasets

    name, _, config = word.partition(":")
    try:
        _check_reachable(name)
        options = {"streaming": True} if streaming else {}
        splits = datasets.load_dataset(name, config or None, **options)
    except Exception as error:  # whatever goes wrong inside lies with the id or the way to the Hub
        # a part of a token would not be known for one: it goes before the end is cut off
        reason = without_secrets(" ".join(str(error).split()))[:200] or type(error).__name__
        raise UserError(
            f"{word!r} is no path here, and as a Hub dataset it cannot be loaded ({reason}): "
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
    if splits[chosen].column_names is not None:  # a stream may know them from its first record alone
        check_column(Place(word), splits[chosen].column_names, recipe)
    return splits[chosen].select_columns([recipe.text_column])


def _check_reachable(name: str) -> None:
    """One quick question: `load_dataset` alone asks an unreachable Hub again and again for half a minute."""
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:
        HfApi().dataset_info(name, timeout=10)
