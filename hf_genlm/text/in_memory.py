"""Text that Python users give as strings or datasets, as sources that can be read again."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_genlm.errors import UserError
from hf_genlm.files import atomic_file, sha256_of
from hf_genlm.text.formats import CONTINUES

Texts = Any  # a path, several paths, strings, a datasets.Dataset, or None

_MAX_PATH = 4096  # characters
_MAX_PART = 1 << 21  # characters of a text in one record; escaped they are at most six times as many
# no part can match in two ways: time is linear
_PATH_FORM = re.compile(
    r"[\w.~*?\[\]{}:\\-]*(/[\w.~*?\[\]{}:\\-]+)+/?|[\w.~*?\[\]{}:-]*\\[\w.~*?\[\]{}:\\-]+/?"
    r"|[\w~-]+(\.[A-Za-z]\w{0,7}){1,2}",
    re.ASCII,
)


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
