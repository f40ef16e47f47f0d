"""Locate the sources that a person names: files, folders, globs and Hub data sets. Strings and datasets that
Python users give become files, so that they can be read again."""

import contextlib
import glob
import hashlib
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import NoSource, UserError
from hf_genlm.files import atomic_file, sha256_of
from hf_genlm.text.formats import COMMON, CONTINUES, FORMATS, format_of
from hf_genlm.text.records import CHATS, messages_of

Texts = Any  # a path, several paths, strings, a datasets.Dataset, or None

_ANY_FOLDERS = re.compile(r"(?:^|(?<=/))\*\*(?:/\*\*)*(?:/|$)")  # in a glob
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
# files that stand together in what this package writes, and in any model folder
_OURS = (
    "recipe.yaml log.jsonl", "compare.yaml log.jsonl", "range.json report.md", "space.json app.py",
    "tokenizer.json tokenizer_config.json", "config.json model.safetensors", "config.json pytorch_model.bin",
    "config.json model.safetensors.index.json", "config.json configuration_genlm.py", "adapter_config.json",
)  # fmt: skip
_EXPORTED = re.compile(r"model-\w+\.gguf|model\.onnx")
_PACKAGES = re.compile(
    r"node_modules|bower_components|(site|dist)-packages|__pycache__|__MACOSX|.+\.(egg|dist)-info"
)
_PACKAGES_HOLD = {"pyvenv.cfg", "conda-meta", "CACHEDIR.TAG"}  # bford.info/cachedir
_OUTPUT, _INSTALLED = "output", "installed"  # kinds of folders without text of a person
_REASONS = {
    _OUTPUT: "runs, comparisons and models are no text; to read a file there, name it",
    _INSTALLED: "installed packages and caches; to read such a folder, name it alone, or as 'FOLDER/**'",
}
_SPLITS = (
    dict.fromkeys(("train", "training", "trainset", "trn"), "train")
    | dict.fromkeys(("valid", "validation", "val", "dev", "devel", "devset", "eval", "heldout"), "validation")
    | dict.fromkeys(("test", "testing", "testset", "tst"), "test")
)
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
    split: str | None = None  # train, validation or unused, if names tell the splits of a folder apart


@dataclass(frozen=True)
class LeftFolder:
    """A folder inside a source that is not read; `name` is shown to people."""

    name: str
    kind: str
    n_files: int


@dataclass(frozen=True)
class Located:
    """Target of a source: files, the number of files skipped, and folders left out; or a Hub data set."""

    files: list[FoundFile]
    n_skipped: int = 0
    is_hub: bool = False
    left: Sequence[LeftFolder] = ()


def locate_all(words: Sequence[str]) -> list[Located]:
    """`locate` each source, and leave out a folder of installed packages that stands beside another source in
    its parent folder, as a shell makes of `*`."""
    paths = [os.path.abspath(os.path.expanduser(word)) for word in words]
    parents = [os.path.dirname(path) for path in paths]
    return [
        Located([], left=[LeftFolder(_shown(Path(word)), _INSTALLED, _count_files(path))])
        if parents.count(parent) > 1 and os.path.isdir(path) and _kind_at(path) == _INSTALLED
        else locate(word)
        for word, path, parent in zip(words, paths, parents, strict=True)
    ]


def locate(word: str, is_named: bool = True) -> Located:
    """Find the files or the Hub data set that a source refers to, or that a glob matches (not `is_named`).

    Raises:
        UserError: nothing is there, and `word` is no id of a Hub data set either.
    """
    path = Path(os.path.expanduser(word))
    # os.path answers False where pathlib raises: for a name too long, or a closed parent folder
    if word and os.path.isdir(path):
        return _in_folder(word, path, is_named)
    if word and os.path.lexists(path):
        return Located([FoundFile(path, _shown(path), is_named)])
    if glob.has_magic(word):
        pattern = os.path.expanduser(word)
        matches, left = _without_left(pattern, _matches(pattern))
        parts = [locate(match, is_named=False) for match in matches]
        found = [file for part in parts for file in part.files]
        left += [folder for part in parts for folder in part.left]
        if found:
            return Located(_with_splits(found), sum(part.n_skipped for part in parts), left=left)
        why = (
            "; ".join(lines_on([Located([], left=left)])) or "check the pattern and the folder it starts from"
        )
        raise NoSource(word, f"no file matches {word!r}: {why}")
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


def _without_left(pattern: str, matches: Iterable[str]) -> tuple[list[str], list[LeftFolder]]:
    """(sorted matches of a glob, folders left out) without what lies in folders that are not read, unless
    the pattern names them up to its first wildcard."""
    base = os.path.dirname(re.split(r"[*?[]", pattern, maxsplit=1)[0])
    kinds: dict[str, str | None] = {}
    n_files: dict[str, int] = {}
    kept = []
    is_installed = _kind_at(base or os.curdir) == _INSTALLED
    for match in sorted(matches):
        steps = os.path.relpath(match, base or os.curdir).split(os.sep)
        for n in range(1, len(steps) + 1):
            folder = os.path.join(base, *steps[:n])
            if folder not in kinds:
                kinds[folder] = _kind_at(folder) if os.path.isdir(folder) else None
            if kinds[folder] == _OUTPUT or (kinds[folder] == _INSTALLED and not is_installed):
                n_files[folder] = n_files.get(folder, 0) + (_count_files(match) if n == len(steps) else 1)
                break
        else:
            kept.append(match)
    return kept, [LeftFolder(_shown(Path(name)), str(kinds[name]), n) for name, n in n_files.items()]


def _in_folder(word: str, folder: Path, is_named: bool) -> Located:
    paths, n_others, left = walk(folder)
    base, inside = _shown(folder), os.path.realpath(folder)
    left = [replace(each, name=f"{base}{each.name}" or "./") for each in left]
    is_cache = re.compile(r"cache-\w+\.arrow").fullmatch  # beside a saved data set: results of `datasets`
    formats = [(format_of(path.name)[0], path) for path in paths if not is_cache(path.name)]
    known = [path for suffix, path in formats if suffix in COMMON]
    known = known or [path for suffix, path in formats if suffix is not None]
    n_skipped = len(paths) - len(known) + n_others
    if is_named and not known and not left:  # else other sources may hold text
        raise UserError(
            f"folder {word!r} holds no readable file ({n_skipped} others): put "
            f"{', '.join(FORMATS)} there, also compressed, or name a file of another suffix itself"
        )

    def links_out(path: Path) -> bool:
        return path.is_symlink() and os.path.commonpath([inside, os.path.realpath(path)]) != inside

    found = [
        FoundFile(path, f"{base}{path.relative_to(folder).as_posix()}", False, links_out(path))
        for path in known
    ]
    return Located(_with_splits(found), n_skipped, left=left)


def walk(folder: Path, pruned: Iterable[str] = ()) -> tuple[list[Path], int, list[LeftFolder]]:
    """(files, number of others, folders left out) below `folder`.

    Files are regular and sorted by relative path, without hidden ones and `pruned` folders; links to files
    are followed. Others are pipes, devices, links to folders and broken links. Left out are what this package
    wrote, also `folder` itself, and installed packages, unless `folder` is of them. Their names are relative.
    """

    def stop(error: OSError) -> NoReturn:
        raise UserError(
            f"{error.filename!r} cannot be read ({error.strerror}): change its permissions"
        ) from error

    found: list[Path] = []
    left: list[LeftFolder] = []
    n_others = 0
    for parent, folders, files in os.walk(folder, onerror=stop):
        kind = _kind_of(parent, files, folders)
        name = os.path.relpath(parent, folder)
        if name == os.curdir:
            is_installed, name = kind == _INSTALLED, ""
        if kind == _OUTPUT or (kind == _INSTALLED and not is_installed):
            folders.clear()
            left.append(LeftFolder(f"{Path(name).as_posix()}/" if name else "", kind, _count_files(parent)))
            continue
        folders[:] = [name for name in folders if not name.startswith(".") and name not in pruned]
        n_others += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    try:
        regular = [path for path in found if path.is_file()]
    except OSError as error:  # a folder that may be listed but not entered
        stop(error)
    regular.sort(key=lambda path: path.relative_to(folder).as_posix())
    left.sort(key=lambda each: each.name)
    return regular, n_others + len(found) - len(regular), left


def _kind_of(folder: str, files: Iterable[str], folders: Iterable[str]) -> str | None:
    """Kind of a folder without text of a person, from the names in it; None for any other folder."""
    name, inside = os.path.basename(os.path.abspath(folder)), {*files, *folders}
    is_export = "README.md" in inside and any(map(_EXPORTED.fullmatch, inside))
    if is_export or any(inside.issuperset(marks.split()) for marks in _OURS):
        return _OUTPUT
    return _INSTALLED if _PACKAGES.fullmatch(name) or _PACKAGES_HOLD & inside else None


def _kind_at(folder: str) -> str | None:
    _, folders, files = next(os.walk(folder), (folder, [], []))
    return _kind_of(folder, files, folders)


def _count_files(folder: str) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def _with_splits(files: Sequence[FoundFile]) -> list[FoundFile]:
    """Set `split` of files whose names differ in one word: `train.txt`, `valid.txt` and `test.txt`, also
    `train-00000-of-00004.parquet`, or folders of such names. Without a validation file, test is validation.
    """
    of_files, groups = [], defaultdict(set)
    for file in files:
        of_files.append(list(_split_words(file.name)))
        for template, split in of_files[-1]:
            groups[template].add(split)

    def split_of(found: list[tuple[str, str]]) -> str | None:
        for template, split in found:
            if "train" in groups[template] and len(groups[template]) > 1:
                held_out = "validation" if "validation" in groups[template] else "test"
                return {"train": "train", held_out: "validation"}.get(split, "unused")
        return None

    return [replace(file, split=split_of(found)) for file, found in zip(files, of_files, strict=True)]


def _split_words(name: str) -> Iterator[tuple[str, str]]:
    """(name with the word replaced, split) for each part of a path that holds one word for a split."""
    parts = name.split("/")
    if format_of(name)[0] == ".py":
        return  # train.py and test.py are programs
    for i, part in enumerate(parts):
        words = re.split(r"([^a-z]+)", part.lower())
        found = [j for j, word in enumerate(words) if word in _SPLITS]
        if len(found) == 1:
            split, words[found[0]] = _SPLITS[words[found[0]]], "*"
            end = [""] if i < len(parts) - 1 else []
            yield "/".join([*parts[:i], re.sub(r"\d+", "#", "".join(words)), *end]), split


def lines_on(
    located: Sequence[Located], recipe: CorpusRecipe | None = None, by_name: bool = False
) -> list[str]:
    """Lines for people about folders left out, and, with the recipe of training sources, about files whose
    names say their split."""
    lines = []
    for kind, reason in _REASONS.items():
        n_files = {
            folder.name: folder.n_files for each in located for folder in each.left if folder.kind == kind
        }
        if n_files:
            n, names = sum(n_files.values()), sorted(n_files, key=lambda name: -n_files[name])
            lines.append(f"{n:,} file{'' if n == 1 else 's'} of {first_names(names)} left out: {reason}")
    files = [file for each in located for file in each.files]
    files = files if by_name else _with_splits(files)  # also of files and folders that were named
    train, validation, unused = (
        first_names([file.name for file in files if file.split == split])
        for split in ("train", "validation", "unused")
    )
    mixed = unused if recipe is not None and recipe.validation else validation
    if by_name:
        others = f", not read: {unused}" if unused else ""
        lines.append(
            f"held out by name: {validation}{others}; to mix such files and split them at random, name each "
            "file, or --set corpus.split_by_hash=true"
        )
    elif recipe is not None and mixed:
        remedy = "to hold it out, name it by --validation, and the others as sources"
        lines.append(f"{mixed}: trained on with {train}; {remedy}")
    return lines


def check_found(located: Sequence[Located]) -> None:
    """
    Raises:
        UserError: all that was located is left out.
    """
    if located and not any(each.files or each.is_hub for each in located):
        raise UserError(f"there is no text to read: {'; '.join(lines_on(located))}")


def first_names(names: Iterable[str]) -> str:
    """The first names, and how many there are more."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def splits_by_name(recipe: CorpusRecipe) -> bool:
    """True if the names of the files say what is held out: they do unless the recipe says it."""
    is_stated = recipe.validation or recipe.split_by_hash or recipe.languages
    return not is_stated and any(
        file.split == "validation" for each in locate_all(recipe.sources) for file in each.files
    )


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
    if isinstance(word, Mapping):
        return False
    if not isinstance(word, str):
        raise UserError(f"texts hold {word!r}: every item must be a string, a path or a record")
    if "\n" in word or len(word) > _MAX_PATH:
        return False
    return os.path.exists(os.path.expanduser(word)) or _PATH_FORM.fullmatch(word) is not None


def write_texts(texts: Any, path: Path, column: str, is_resuming: bool = False) -> None:
    """Write strings, or the text or chats of records, as JSON lines.

    Raises:
        UserError: an item without text; or, if `is_resuming`, other texts than those at `path`.
    """
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        for number, item in enumerate(texts):
            text = item
            if isinstance(item, Mapping):
                fields = (column, *(CHATS if column == "text" else ()))
                text = next((item[name] for name in fields if name in item), None)
            chat = messages_of(text)
            if chat is None and not isinstance(text, str):
                raise UserError(
                    f"item {number} of the texts has no text in {column!r}: set corpus.text_column"
                )
            for start in range(0, max(1, len(text)), _MAX_PART) if chat is None else [0]:
                more = {CONTINUES: True} if chat is None and start + _MAX_PART < len(text) else {}
                record = {column: chat or text[start : start + _MAX_PART], **more}
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
