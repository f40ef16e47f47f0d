"""Locate the sources that a person names: files, folders, globs and Hub data sets. Strings and datasets that
Python users give become files, so that they can be read again."""

import contextlib
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from hf_genlm.errors import NoSource, UserError
from hf_genlm.files import atomic_file, sha256_of
from hf_genlm.text.formats import CONTINUES, format_of

Texts = Any  # a path, several paths, strings, a datasets.Dataset, or None

_ANY_FOLDERS = re.compile(r"(?:^|(?<=/))\*\*(?:/\*\*)*(?:/|$)")  # in a glob
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_MAX_PATH = 4096  # characters
_MAX_PART = 1 << 21  # characters of a text in one record; escaped they are at most six times as many
# no part can match in two ways: time is linear
_PATH_FORM = re.compile(
    r"[\w.~*?\[\]{}:\\-]*(/[\w.~*?\[\]{}:\\-]+)+/?|[\w.~*?\[\]{}:-]*\\[\w.~*?\[\]{}:\\-]+/?"
    r"|[\w~-]+(\.[A-Za-z]\w{0,7}){1,2}",
    re.ASCII,
)


@dataclass(frozen=True)
class FoundFile:
    """A file of a source; `name` is shown to people."""

    path: Path
    name: str
    is_named: bool  # by the person, not found in a folder or by a glob
    links_out: bool = False  # a link inside a folder to a file outside it


@dataclass(frozen=True)
class Located:
    """Target of a source: files, and the number of files skipped; or a Hub data set."""

    files: list[FoundFile]
    n_skipped: int = 0
    is_hub: bool = False


def locate(word: str) -> Located:
    """Find the files or the Hub data set that a source refers to.

    Raises:
        UserError: nothing is there, and `word` is no id of a Hub data set either.
    """
    path = Path(os.path.expanduser(word))
    # os.path answers False where pathlib raises: for a name too long, or a closed parent folder
    if word and os.path.isdir(path):
        return _in_folder(word, path)
    if word and os.path.lexists(path):
        return Located([FoundFile(path, _shown(path), is_named=True)])
    if glob.has_magic(word):
        parts = [locate(match) for match in sorted(_matches(os.path.expanduser(word)))]
        found = [replace(file, is_named=False) for part in parts for file in part.files]
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


def _matches(pattern: str) -> set[str]:
    """Paths that match a glob. `**` stands for any folders, without hidden ones and without links to folders,
    which may form loops; at the end, for all files below."""
    before, *after = _ANY_FOLDERS.split(pattern, maxsplit=1)
    if not after:
        return set(glob.glob(pattern))
    found: set[str] = set()
    for base in glob.glob(before) if before else [os.curdir]:
        for parent, folders, files in os.walk(base):
            folders[:] = [name for name in folders if not name.startswith(".")]
            inside = os.path.join("" if parent == os.curdir else parent.removeprefix(f".{os.sep}"), "")
            if after[0]:
                found |= _matches(glob.escape(inside) + after[0])
            else:
                found |= {inside + name for name in files if not name.startswith(".")}
    return found


def _in_folder(word: str, folder: Path) -> Located:
    paths, n_others = walk(folder)
    known = [path for path in paths if format_of(path.name)[0] is not None]
    n_skipped = len(paths) - len(known) + n_others
    if not known:
        raise UserError(
            f"folder {word!r} holds no readable file ({n_skipped} others): put .txt, .md, .py, .jsonl "
            "or .parquet there, also compressed, or name a file of another suffix itself"
        )
    base, inside = _shown(folder), os.path.realpath(folder)

    def links_out(path: Path) -> bool:
        return path.is_symlink() and os.path.commonpath([inside, os.path.realpath(path)]) != inside

    found = [
        FoundFile(path, f"{base}{path.relative_to(folder).as_posix()}", False, links_out(path))
        for path in known
    ]
    return Located(found, n_skipped)


def walk(folder: Path, pruned: Iterable[str] = ()) -> tuple[list[Path], int]:
    """Regular files below `folder`, without hidden ones and `pruned` folders, sorted by relative path; and
    the number of pipes, devices, links to folders and broken links. Links to files are followed."""

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
    regular.sort(key=lambda path: path.relative_to(folder).as_posix())
    return regular, n_others + len(found) - len(regular)


def _shown(path: Path) -> str:
    """Name for people: a relative path as given, the last part of any other. A folder ends with `/`."""
    is_within = not path.is_absolute() and ".." not in path.parts
    name = path.as_posix() if is_within else path.resolve().name
    if not path.is_dir():
        return name
    return "" if name == "." else f"{name}/"


# texts given in Python


def source_words(texts: Texts) -> list[str] | None:
    """Return the paths, globs and Hub ids of `texts`; None if they are strings or records with text.

    Raises:
        UserError: a list that mixes paths with text, or a dataset of several splits.
    """
    if texts is None:
        return []
    if isinstance(texts, (str, os.PathLike)):
        return [os.fspath(texts)]
    if isinstance(texts, Mapping):
        raise UserError(
            f"this dataset has the splits {', '.join(map(str, texts))}: give one of them, as texts['train']"
        )
    if hasattr(texts, "column_names"):
        return None
    if not isinstance(texts, Sequence):
        raise UserError(
            f"texts are {type(texts).__name__}: give a path, a list of paths or strings, or a Dataset"
        )
    paths = [isinstance(item, os.PathLike) or _is_path(item) for item in texts]
    if all(paths):
        return [os.fspath(item) for item in texts]
    if not any(paths):
        return None
    path, text = texts[paths.index(True)], texts[paths.index(False)]
    raise UserError(
        f"texts mix a path ({os.fspath(path)!r}) and text ({str(text)[:40]!r}): give only one of both"
    )


def _is_path(word: Any) -> bool:
    """Return True if `word` names something that exists, or has the form of a path, glob or Hub id."""
    if not isinstance(word, str):
        raise UserError(f"texts hold {word!r}: every item must be a string or a path")
    if "\n" in word or len(word) > _MAX_PATH:
        return False
    return os.path.exists(os.path.expanduser(word)) or _PATH_FORM.fullmatch(word) is not None


def write_texts(texts: Any, path: Path, column: str, is_resuming: bool = False) -> None:
    """Write strings, or the text column of a dataset, as JSON lines.

    Raises:
        UserError: an item without text; or, if `is_resuming`, other texts than those at `path`.
    """
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        for number, item in enumerate(texts):
            text = item.get(column) if isinstance(item, Mapping) else item
            if not isinstance(text, str):
                raise UserError(
                    f"item {number} of the texts has no text in {column!r}: set corpus.text_column"
                )
            for start in range(0, max(1, len(text)), _MAX_PART):
                more = {CONTINUES: True} if start + _MAX_PART < len(text) else {}
                record = {column: text[start : start + _MAX_PART], **more}
                line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
                digest.update(line)
                file.write(line)
        if is_resuming and path.is_file() and sha256_of(path) != digest.hexdigest():
            raise UserError("these are not the texts that the run began with: resume it without them")


@contextlib.contextmanager
def as_sources(texts: Texts, column: str = "text") -> Iterator[list[str]]:
    """Give the source words of `texts`; strings and datasets lie in a temporary file meanwhile."""
    words = source_words(texts)
    if words is not None:
        yield words
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        write_texts(texts, path, column)
        yield [os.fspath(path)]
