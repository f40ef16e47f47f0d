"""One file to its texts, a part at a time: decompression, decoding, and the records of JSONL and parquet."""

import codecs
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import IO, Any

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.text.compressed import COMPRESSIONS, one_line, only_member, unpacked
from hf_genlm.text.damage import Damage, LeaveOut, Place
from hf_genlm.text.store import CHUNK, spooled

Parts = Iterable[str]  # one text, in parts that join to it

_ESCAPED_BYTE = re.compile(r"[\udc80-\udcff]")
_BINARY_PROBE = 64 * 1024  # bytes looked at for NUL
_PARQUET_ROWS = 512  # decoded at once
_MAX_LINE = 1 << 28  # characters of a .jsonl line, which is held in memory
_MOST_NAMES = 8  # of a record's fields, in a message
_DOCUMENTS = {  # by their first bytes: what people take for text
    b"%PDF-": "a PDF",
    b"PK\x03\x04": "a zip archive, as .docx, .odt and .epub are",
    b"\xd0\xcf\x11\xe0": "a document of an old Office",
    b"{\\rtf": "a document of a word processor (RTF)",
}


@dataclass(frozen=True)
class RawFile:
    """One file as it lies on disk, at its beginning. `label` names it in messages."""

    label: str
    name: str  # decides the format by its suffixes
    stream: IO[bytes]


def format_of(name: str) -> tuple[str | None, str | None]:
    """(`.txt`, `gzip`) for `a.txt.gz`: the known format suffix and the compression, each None when absent."""
    path = PurePath(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    if compression is not None:
        path = path.with_suffix("")
    return (path.suffix if path.suffix in FORMATS else None), compression


def texts_of(file: RawFile, recipe: CorpusRecipe, leave_out: LeaveOut | None = None) -> Iterator[Parts]:
    """The texts of a file, unchanged: one of a text file, one per record of .jsonl and .parquet.

    A file of an unknown suffix is text. Records without text are given as empty ones. The parts of a
    text are to be taken before the next text. `leave_out` is told each damaged record, and the reading goes
    on behind it; without it, a damaged record is raised.

    Raises:
        Damage: damaged archive, binary or wrongly encoded text, a record that does not hold the text
            column. Not before the place of the fault is read: what came before is no whole file then.
        UserError: a compression that needs another package.
    """
    suffix, compression = format_of(file.name)
    if compression == "zip" and suffix is None:
        suffix, _ = format_of(only_member(file.label, file.stream))
    return FORMATS[suffix or ".txt"](file, compression, recipe, leave_out or _stop)


def _stop(damage: Damage) -> None:
    raise damage


def check_encoding(encoding: str) -> None:
    """
    Raises:
        UserError: Python knows no text encoding of that name.
    """
    try:
        "a".encode(encoding).decode(encoding)
    except (LookupError, ValueError) as error:
        raise UserError(
            f"corpus.encoding = {encoding!r} is no text encoding that Python knows: "
            "name one such as utf-8, utf-16 or latin-1"
        ) from error


def _decoded(
    file: RawFile, compression: str | None, recipe: CorpusRecipe, by_line: bool = False
) -> Iterator[str]:
    """The text of a file in parts, strictly decoded, without newline translation.

    `by_line`: bytes that are not UTF-8 come as lone surrogates, and NUL as it is, for `_check_line` to find.
    """
    # utf-16 and utf-32 write NUL bytes for plain text
    wide = b"\0" in "a".encode(recipe.encoding, errors="replace")
    escapes = by_line and codecs.lookup(recipe.encoding).name == "utf-8"
    decoder = _decoder(recipe.encoding, "surrogateescape" if escapes else "strict")
    n_read = 0
    for content in itertools.chain(unpacked(file.label, file.stream, compression), [b""]):
        kind = None if n_read or by_line else next((k for k in _DOCUMENTS if content.startswith(k)), None)
        if kind is not None:
            raise Damage(
                Place(file.label), f"is {_DOCUMENTS[kind]}, not text", "save its text as .txt, and name that"
            )
        if not wide and not by_line and b"\0" in content[: max(0, _BINARY_PROBE - n_read)]:
            raise Damage(Place(file.label), *_BINARY)
        n_read += len(content)
        try:
            part = decoder(content, not content)
        except UnicodeError as error:
            # the decoder has put what it held back before `content`
            seen = getattr(error, "object", content) or b"\0"
            start = getattr(error, "start", 0)
            where = f"byte 0x{seen[start]:02x} at offset {n_read - len(seen) + start}"
            raise Damage(Place(file.label), *_wrong_encoding(recipe, where)) from error
        if part:
            if not escapes:
                _check_unicode(Place(file.label), part)
            yield part


def _decoder(encoding: str, errors: str) -> Callable[[bytes, bool], str]:
    """`decode(content, is_last)`, part by part; of an encoding that cannot do that, all at the end."""
    make = codecs.lookup(encoding).incrementaldecoder
    if make is not None:
        return make(errors).decode
    held = io.BytesIO()

    def decode(content: bytes, is_last: bool) -> str:
        held.write(content)
        return held.getvalue().decode(encoding, errors) if is_last else ""

    return decode


_BINARY = (
    "is binary (it holds NUL bytes), not text",
    "leave it out, or name its encoding with --set corpus.encoding=utf-16",
)


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
        Damage: UTF-8 cannot hold `text`.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Damage(
            place,
            f"holds the lone surrogate U+{ord(text[error.start]):04X}, which is half a character",
            "write the file anew from its source",
        ) from error


def _whole_text(
    file: RawFile, compression: str | None, recipe: CorpusRecipe, leave_out: LeaveOut
) -> Iterator[Parts]:
    yield _decoded(file, compression, recipe)


def _jsonl(
    file: RawFile, compression: str | None, recipe: CorpusRecipe, leave_out: LeaveOut
) -> Iterator[Parts]:
    for number, line in enumerate(_lines(_decoded(file, compression, recipe, by_line=True)), start=1):
        if number == 1 and line is not None:
            line = line.removeprefix("\ufeff")
        if line is not None and not line.strip():
            continue
        try:
            text = _text_of_line(Place(file.label, "line", number), line, recipe)
        except Damage as damage:
            leave_out(damage)
            continue
        yield (text,)


def _text_of_line(place: Place, line: str | None, recipe: CorpusRecipe) -> str:
    """
    Raises:
        Damage: the line is no object that holds text.
    """
    if line is None:
        raise Damage(place, f"has more than {_MAX_LINE:,} characters", "cut it into several records")
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


def _lines(parts: Parts) -> Iterator[str | None]:
    """What lies between line feeds; None for what has more than `_MAX_LINE` characters."""
    begun: list[str] = []
    n_begun = 0

    def whole() -> str | None:
        return "".join(begun) if n_begun <= _MAX_LINE else None

    for part in parts:
        first, *others = part.split("\n")
        n_begun += len(first)
        if n_begun <= _MAX_LINE:
            begun.append(first)
        else:
            begun.clear()
        if others:
            yield whole()
            yield from (line if len(line) <= _MAX_LINE else None for line in others[:-1])
            begun, n_begun = [others[-1]], len(others[-1])
    yield whole()


def _parquet(
    file: RawFile, compression: str | None, recipe: CorpusRecipe, leave_out: LeaveOut
) -> Iterator[Parts]:
    import pyarrow as pa
    from pyarrow import parquet

    stream, place = file.stream, Place(file.label)
    if compression is not None:
        stream = spooled(unpacked(file.label, stream, compression))
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


def texts_of_rows(
    label: str, values: Iterable[Any], recipe: CorpusRecipe, leave_out: LeaveOut, n_before: int = 0
) -> Iterator[Parts]:
    """The text of each value of a column, of which `n_before` came before."""
    for number, value in enumerate(values, start=n_before + 1):
        try:
            text = text_value(Place(label, "row", number), value, recipe)
        except Damage as damage:
            leave_out(damage)
            continue
        yield (text,)


def _values(column: Any) -> Iterable[Any]:
    """Of a pyarrow array; a text that is not UTF-8 comes as its bytes."""
    import pyarrow as pa

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        return [_as_text(value) for value in column.cast(binary).to_pylist()]


def _as_text(content: bytes | None) -> str | bytes | None:
    try:
        return content if content is None else content.decode("utf-8")
    except UnicodeDecodeError:
        return content


def check_column(place: Place, names: Iterable[str], recipe: CorpusRecipe) -> None:
    """
    Raises:
        Damage: `names` lacks the text column.
    """
    names = list(names)
    if recipe.text_column not in names:
        shown = ", ".join(map(repr, names[:_MOST_NAMES])) or "none"
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        raise Damage(
            place,
            f"has no field {recipe.text_column!r}, it has {shown}{more}",
            f"name the one that holds the text, --set corpus.text_column={names[0] if names else 'text'}",
        )


def text_value(place: Place, value: Any, recipe: CorpusRecipe) -> str:
    """The text of a record; null is the empty text.

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
    ".txt": _whole_text,
    ".md": _whole_text,
    ".py": _whole_text,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
