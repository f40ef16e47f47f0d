"""Read one file as texts, a part at a time: decoding, and the records of JSONL and parquet.

A new format is a generator of texts and a row of FORMATS.
"""

import codecs
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import IO, Any

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
_PARQUET_ROWS = 512  # decoded at once, if the pages are small
_MAX_PAGE = 1 << 27  # bytes of an unpacked page of parquet; pyarrow holds a dictionary and a page
_MAX_PAGE_VALUES = 1 << 24
_PAGE_HEADER = 1 << 10  # bytes in which the header of a page is looked for first
_MAX_FOOTER = 1 << 24  # bytes of the table at the end of a parquet file, which takes some 30 times as many
_MAX_TEXT = 1 << 26  # bytes of the text of a row
CONTINUES = "hf_genlm.continues"  # field of a .jsonl record whose text goes on in the next record
_MAX_NAMES = 8  # of a record's fields, in a message
_BINARY = (  # reason and remedy
    "is binary (it holds NUL bytes), not text",
    "leave it out, or name its encoding with --set corpus.encoding=utf-16",
)
_OTHER_FIELD = "name a field of text with --set corpus.text_column=..."
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
    records = _records(file, compression, recipe, leave_out)

    def continued(text: str) -> Iterator[str]:
        yield text
        for more, continues in records:
            yield more
            if not continues:
                return

    for text, continues in records:
        yield continued(text) if continues else (text,)


def _records(
    file: RawFile, compression: str | None, recipe: CorpusRecipe, leave_out: LeaveOut
) -> Iterator[tuple[str, bool]]:
    """(text, True if it goes on in the next one) of each record."""
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
            yield _text_of_line(place, line, recipe)
        except Damage as damage:
            leave_out(damage)


def _text_of_line(place: Place, line: str, recipe: CorpusRecipe) -> tuple[str, bool]:
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
    return text_value(place, record[recipe.text_column], recipe), record.get(CONTINUES) is True


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
        _check_footer(stream)
        table = parquet.ParquetFile(
            stream, buffer_size=CHUNK, pre_buffer=False, page_checksum_verification=True
        )
        name = recipe.text_column
        check_column(place, table.schema_arrow.names, recipe)
        leaf = [i for i in range(len(table.schema)) if table.schema.column(i).path == name]
        kinds = [field.type for field in table.schema_arrow if field.name == name]
        if len(leaf) != 1 or len(kinds) != 1 or not _is_text(kinds[0]):
            kind = " and ".join(map(str, kinds))[:200]
            raise Damage(place, f"field {name!r} is {kind}, not text", _OTHER_FIELD)
        for group in range(table.num_row_groups):
            page = max(_page_sizes(stream, table.metadata.row_group(group).column(leaf[0])), default=1)
            rows = max(1, min(_PARQUET_ROWS, _MAX_TEXT // max(page, 1)))  # no value is larger than a page
            for batch in table.iter_batches(rows, [group], [name]):
                yield from texts_of_rows(file.label, batch.column(0), recipe, leave_out, n_rows)
                n_rows += len(batch)
        if n_rows != table.metadata.num_rows:
            raise OSError(f"it holds {n_rows:,} rows and says {table.metadata.num_rows:,}")
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise Damage(
            place,
            f"is not readable as parquet ({one_line(error)})",
            "the file is damaged or misnamed, copy it anew",
        ) from error


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _check_footer(stream: IO[bytes]) -> None:
    """
    Raises:
        ValueError: the table at the end of a parquet file is too large to be held.
    """
    stream.seek(max(0, stream.seek(0, io.SEEK_END) - 8))
    length = int.from_bytes(stream.read(8)[:4], "little")
    if length > _MAX_FOOTER:
        raise ValueError(f"the table of its row groups has {length:,} bytes, more than {_MAX_FOOTER:,}")


def _page_sizes(stream: IO[bytes], column: Any) -> Iterator[int]:
    """Unpacked bytes of each page of a column chunk, from the page headers: pyarrow allocates as they say.

    Raises:
        ValueError: a header is damaged, or a page is too large to be held.
    """
    start, left = column.data_page_offset, column.total_compressed_size
    if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < start:
        start = column.dictionary_page_offset
    while left > 0:
        stream.seek(start)
        content = stream.read(_PAGE_HEADER)
        try:
            try:
                header, length = _thrift_struct(content, 0)
            except IndexError:  # long statistics
                header, length = _thrift_struct(content + stream.read(CHUNK), 0)
            n_bytes, n_on_disk = header[2], header[3]
            # of a page of data, of a dictionary, of data in version 2
            n_values = max((header[i][1] for i in (5, 7, 8) if i in header), default=0)
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError("the header of a page is damaged") from error
        if not 0 <= n_bytes <= _MAX_PAGE or not 0 <= n_values <= _MAX_PAGE_VALUES or n_on_disk < 0:
            raise ValueError(
                f"a page has {n_bytes:,} bytes and {n_values:,} values, more than {_MAX_PAGE:,} or "
                f"{_MAX_PAGE_VALUES:,}: write it with smaller pages"
            )
        yield n_bytes
        start, left = start + length + n_on_disk, left - length - n_on_disk


def _thrift_struct(content: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """(fields by number, the index behind) of a struct in Thrift's compact protocol, as page headers are.

    Raises:
        IndexError: `content` ends before.
        ValueError: it holds what no page header has.
    """

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (content[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if content[at - 1] < 0x80:
                return value
            if shift > 63:
                raise ValueError("the header of a page holds a number of more than 64 bits")

    def signed() -> int:
        value = varint()
        return value >> 1 ^ -(value & 1)

    fields: dict[int, Any] = {}
    number = 0
    while content[at]:
        kind, step = content[at] & 15, content[at] >> 4
        at += 1
        number = number + step if step else signed()
        if kind == 5:  # 32 bits: a reader ignores a field of another type
            fields[number] = signed()
        elif kind in (4, 6):
            signed()
        elif kind == 8:  # a minimum or maximum
            length = varint()
            at += length
        elif kind == 12 and depth < 4:
            fields[number], at = _thrift_struct(content, at, depth + 1)
        elif kind not in (1, 2):  # true and false
            raise ValueError(f"the header of a page holds the type {kind}")
    return fields, at + 1


def texts_of_rows(
    label: str, values: Iterable[Any], recipe: CorpusRecipe, leave_out: LeaveOut, n_before: int = 0
) -> Iterator[Parts]:
    """Text of each scalar of a pyarrow column; `n_before` rows of the same source came before."""
    for number, value in enumerate(values, start=n_before + 1):
        try:
            text = _text_of_scalar(Place(label, "row", number), value, recipe)
        except Damage as damage:
            leave_out(damage)
            continue
        yield (text,)


def _text_of_scalar(place: Place, scalar: Any, recipe: CorpusRecipe) -> str:
    """
    Raises:
        Damage: the scalar is not text, or too long to be held.
    """
    import pyarrow as pa

    scalar = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
    if not isinstance(scalar, (pa.StringScalar, pa.LargeStringScalar)) or not scalar.is_valid:
        return text_value(place, scalar.as_py(), recipe)
    content = scalar.as_buffer()
    if content.size > _MAX_TEXT:
        raise Damage(place, f"has more than {_MAX_TEXT:,} bytes", "cut it into several records")
    try:
        return text_value(place, str(content, "utf-8"), recipe)
    except UnicodeDecodeError:
        return text_value(place, content.to_pybytes(), recipe)


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
            _OTHER_FIELD,
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
