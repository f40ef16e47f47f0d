"""Read one file as texts, a part at a time: decoding, and the records of JSONL and parquet.

A new format is a generator of texts and a row of FORMATS.
"""

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.text.raw_files import (
    COMPRESSIONS,
    Damage,
    LeaveOut,
    Place,
    RawFile,
    one_line,
    only_member,
    unpacked,
)
from hf_genlm.text.store import CHUNK, TextStore

Parts = Iterable[str]  # one text, as strings that join to it

_ESCAPED_BYTE = re.compile(r"[\udc80-\udcff]")
_BINARY_PROBE = 64 * 1024  # bytes searched for NUL
_PARQUET_ROWS = 512  # decoded at once
_MAX_NAMES = 8  # of a record's fields, in a message
_BINARY = (  # reason and remedy
    "is binary (it holds NUL bytes), not text",
    "leave it out, or name its encoding with --set corpus.encoding=utf-16",
)
OTHER_PROGRAMS = {  # first bytes -> kind of a file that people take for text
    b"%PDF-": "a PDF",
    b"PK\x03\x04": "a zip archive, as .docx, .odt and .epub are",
    b"\xd0\xcf\x11\xe0": "a document of an old Office",
    b"{\\rtf": "a document of a word processor (RTF)",
}


def format_of(name: str) -> tuple[str | None, str | None]:
    """(`.txt`, `gzip`) for `a.txt.gz`: format suffix and compression, each None if not known."""
    path = PurePath(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    if compression is not None:
        path = path.with_suffix("")
    return (path.suffix if path.suffix in FORMATS else None), compression


def texts_of(file: RawFile, recipe: CorpusRecipe, leave_out: LeaveOut | None = None) -> Iterator[Parts]:
    """Texts of a file, unchanged: one of a text file, one per record of .jsonl and .parquet.

    A file of an unknown suffix is read as text. A record without text is an empty text. The parts of a text
    must be consumed before the next text is asked for. `leave_out` receives each damaged record, and reading
    continues behind it; without `leave_out`, a damaged record is raised.

    Raises:
        Damage: the file is a damaged archive, binary, wrongly encoded, or lacks the text column. It is raised
            where the fault is read: the texts before it are then not the whole file.
        UserError: the compression needs a package that is not installed.
    """

    def stop(damage: Damage) -> None:
        raise damage

    suffix, compression = format_of(file.name)
    if compression == "zip" and suffix is None:
        suffix, _ = format_of(only_member(file.label, file.stream))
    return FORMATS[suffix or ".txt"](file, compression, recipe, leave_out or stop)


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


def _text(
    file: RawFile, compression: str | None, recipe: CorpusRecipe, leave_out: LeaveOut
) -> Iterator[Parts]:
    yield _decoded(file, compression, recipe)


def _decoded(
    file: RawFile, compression: str | None, recipe: CorpusRecipe, by_line: bool = False
) -> Iterator[str]:
    """Text of a file in parts, strictly decoded, without newline translation.

    With `by_line`, bytes that are not UTF-8 become lone surrogates and NUL stays, so that `_text_of_line` can
    blame the line that holds them.
    """
    # utf-16 and utf-32 write NUL bytes for plain text
    wide = b"\0" in "a".encode(recipe.encoding, errors="replace")
    escapes = by_line and codecs.lookup(recipe.encoding).name == "utf-8"
    make_decoder = codecs.getincrementaldecoder(recipe.encoding)
    decode = make_decoder("surrogateescape" if escapes else "strict").decode
    n_read = 0
    for content in itertools.chain(unpacked(file.label, file.stream, compression), [b""]):
        kind = None if n_read or by_line else next((k for k in OTHER_PROGRAMS if content.startswith(k)), None)
        if kind is not None:
            reason = f"is {OTHER_PROGRAMS[kind]}, not text"
            raise Damage(Place(file.label), reason, "save its text as .txt, and name that")
        if not wide and not by_line and b"\0" in content[: max(0, _BINARY_PROBE - n_read)]:
            raise Damage(Place(file.label), *_BINARY)
        n_read += len(content)
        try:
            part = decode(content, not content)
        except UnicodeError as error:
            # the decoder puts the bytes that it had kept before `content`
            seen = getattr(error, "object", content) or b"\0"
            start = getattr(error, "start", 0)
            where = f"byte 0x{seen[start]:02x} at offset {n_read - len(seen) + start}"
            raise Damage(Place(file.label), *_wrong_encoding(recipe, where)) from error
        if part:
            if not escapes:
                _check_unicode(Place(file.label), part)
            yield part


def _wrong_encoding(recipe: CorpusRecipe, where: str) -> tuple[str, str]:
    """Reason and remedy."""
    other = "latin-1" if recipe.encoding.lower() in ("utf-8", "utf8") else "utf-8"
    return (
        f"is not {recipe.encoding}: {where}",
        f"name its encoding, for example --set corpus.encoding={other}",
    )


def _check_unicode(place: Place, text: str) -> None:
    """
    Raises:
        Damage: `text` has no UTF-8 form.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Damage(
            place,
            f"holds the lone surrogate U+{ord(text[error.start]):04X}, which is half a character",
            "write the file anew from its source",
        ) from error


def _jsonl(
    file: RawFile, compression: str | None, recipe: CorpusRecipe, leave_out: LeaveOut
) -> Iterator[Parts]:
    lines = _lines(_decoded(file, compression, recipe, by_line=True), file.max_line)
    for number, line in enumerate(lines, start=1):
        place = Place(file.label, "line", number)
        if number == 1 and line is not None:
            line = line.removeprefix("\ufeff")
        if line is not None and not line.strip():
            continue
        try:
            if line is None:
                reason = f"has more than {file.max_line:,} characters"
                raise Damage(place, reason, "cut it into several records")
            text = _text_of_line(place, line, recipe)
        except Damage as damage:
            leave_out(damage)
            continue
        yield (text,)


def _text_of_line(place: Place, line: str, recipe: CorpusRecipe) -> str:
    """
    Raises:
        Damage: the line is not a JSON object that holds text.
    """
    if "\0" in line:
        raise Damage(place, *_BINARY)
    bad = None if line.isascii() else _ESCAPED_BYTE.search(line)
    if bad is not None:
        raise Damage(place, *_wrong_encoding(recipe, f"byte 0x{ord(bad[0]) - 0xDC00:02x}"))
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Damage(
            place,
            f"is not JSON ({one_line(error)})",
            "a .jsonl file holds one object a line; mend the line, or rename the file to .txt to read it as "
            "text",
        ) from error
    if not isinstance(record, dict):
        raise Damage(place, f"is {type(record).__name__}, not an object", 'write {"text": ...}')
    check_column(place, record, recipe)
    return text_value(place, record[recipe.text_column], recipe)


def _lines(parts: Parts, max_line: int) -> Iterator[str | None]:
    """Lines without their line feed; None for a line of more than `max_line` characters."""
    begun: list[str] = []
    n_begun = 0
    for part in parts:
        first, *others = part.split("\n")
        n_begun += len(first)
        if n_begun <= max_line:
            begun.append(first)
        else:
            begun.clear()
        if others:
            yield "".join(begun) if n_begun <= max_line else None
            yield from (line if len(line) <= max_line else None for line in others[:-1])
            begun, n_begun = [others[-1]], len(others[-1])
    yield "".join(begun) if n_begun <= max_line else None


def _parquet(
    file: RawFile, compression: str | None, recipe: CorpusRecipe, leave_out: LeaveOut
) -> Iterator[Parts]:
    import pyarrow as pa
    from pyarrow import parquet

    stream, place = file.stream, Place(file.label)
    if compression is not None:  # parquet is read at its end first
        store = TextStore()
        for content in unpacked(file.label, stream, compression):
            store.append(content)
        store.file.seek(0)
        stream = store.file
    n_rows = 0
    try:
        table = parquet.ParquetFile(
            stream, buffer_size=CHUNK, pre_buffer=False, page_checksum_verification=True
        )
        check_column(place, table.schema_arrow.names, recipe)
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[recipe.text_column]):
            yield from texts_of_rows(file.label, _values(batch.column(0)), recipe, leave_out, n_rows)
            n_rows += len(batch)
        if n_rows != table.metadata.num_rows:
            raise OSError(f"it holds {n_rows:,} rows and says {table.metadata.num_rows:,}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Damage(
            place,
            f"is not readable as parquet ({one_line(error)})",
            "the file is damaged or misnamed, copy it anew",
        ) from error


def _values(column: Any) -> Iterable[Any]:
    """Python values of a pyarrow array; a text that is not UTF-8 comes as bytes."""
    import pyarrow as pa

    def as_text(content: bytes | None) -> str | bytes | None:
        try:
            return content if content is None else content.decode("utf-8")
        except UnicodeDecodeError:
            return content

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        return map(as_text, column.cast(binary).to_pylist())


def texts_of_rows(
    label: str, values: Iterable[Any], recipe: CorpusRecipe, leave_out: LeaveOut, n_before: int = 0
) -> Iterator[Parts]:
    """Text of each value of a column; `n_before` rows of the same source came before."""
    for number, value in enumerate(values, start=n_before + 1):
        try:
            text = text_value(Place(label, "row", number), value, recipe)
        except Damage as damage:
            leave_out(damage)
            continue
        yield (text,)


def check_column(place: Place, names: Iterable[str], recipe: CorpusRecipe) -> None:
    """
    Raises:
        Damage: `names` lacks the text column.
    """
    names = list(names)
    if recipe.text_column not in names:
        shown = ", ".join(map(repr, names[:_MAX_NAMES])) or "none"
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        raise Damage(
            place,
            f"has no field {recipe.text_column!r}, it has {shown}{more}",
            f"name the one that holds the text, --set corpus.text_column={names[0] if names else 'text'}",
        )


def text_value(place: Place, value: Any, recipe: CorpusRecipe) -> str:
    """Text of a record; null is the empty text.

    Raises:
        Damage: `value` is not text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Damage(
            place,
            f"field {recipe.text_column!r} is {type(value).__name__}, not text",
            "name a field of text with --set corpus.text_column=...",
        )
    _check_unicode(place, value)
    return value


FORMATS: dict[str, Callable[[RawFile, str | None, CorpusRecipe, LeaveOut], Iterator[Parts]]] = {
    ".txt": _text,
    ".md": _text,
    ".py": _text,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
