"""Texts of records: objects of JSON, rows of parquet and arrow, and chats."""

import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.text.raw_files import (
    Capped,
    Damage,
    Joined,
    LeaveOut,
    Place,
    RawFile,
    content_of,
    one_line,
)
from hf_genlm.text.store import CHUNK, TURN, TextStore, chat_text

Parts = Iterable[str]  # one text, as strings that join to it

_PARQUET_ROWS = 512  # decoded at once, if the pages are small
_MAX_PAGE = 1 << 27  # bytes of an unpacked page of parquet; pyarrow holds a dictionary and a page
_MAX_PAGE_VALUES = 1 << 24
_PAGE_HEADER = 1 << 10  # bytes in which the header of a page is looked for first
_MAX_FOOTER = 1 << 24  # bytes of the table at the end of a parquet file, which takes some 30 times as many
_MAX_BATCH = 1 << 29  # bytes of a batch of arrow, which is read at once
_MAX_TEXT = 1 << 26  # bytes of the text of a row
_MAX_LINES = 20  # that are looked at
_MAX_NAMES = 8  # of a record's fields, in a message
_OTHER_FIELD = "name a field of text with --set corpus.text_column=..."
_LIKELY = {"text", "content", "body", "sentence", "document", "article", "story", "raw_content"}
CHATS = ("messages", "conversations")  # fields of chats
_OF_MESSAGE = {"role", "from", "content", "value", "text"}  # fields that are read of it, and of its parts
_OBJECT = 64  # bytes that are counted for an object of Python in a chat, which takes some 200
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}  # of ShareGPT -> of the chat templates


def check_unicode(place: Place, text: str) -> None:
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


def text_of_record(place: Place, record: dict[str, Any], recipe: CorpusRecipe) -> str:
    """
    Raises:
        Damage: `record` lacks the text column, or there is no text in it.
    """
    texts = sorted((name for name in record if isinstance(record[name], str)), key=lambda k: -len(record[k]))
    field = find_column(place, record, recipe, texts)
    return text_value(place, record[field], recipe, field)


def text_of_table(place: Place, table: Any, recipe: CorpusRecipe) -> str:
    """Text of a table of one row.

    Raises:
        Damage: as `text_of_record`, or the row is too long to be held.
    """
    return _text_of_scalar(place, table.column(find_column(place, table.column_names, recipe))[0], recipe)


def _too_long(place: Place) -> Damage:
    return Damage(place, f"has more than {_MAX_TEXT:,} bytes", "cut it into several records")


def find_column(
    place: Place, names: Iterable[str], recipe: CorpusRecipe, of_text: Sequence[str] | None = None
) -> str:
    """The text column among `names`; where the default one is not there, the one of a chat.

    Raises:
        Damage: `names` lacks both. The remedy names the first that is `of_text`, by default of all.
    """
    names = list(names)
    wanted = (recipe.text_column, *(CHATS if recipe.text_column == "text" else ()))
    found = next((name for name in wanted if name in names), None)
    if found is not None:
        return found
    shown = ", ".join(map(repr, names[:_MAX_NAMES])) or "none"
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    reason = f"has no field {recipe.text_column!r}, it has {shown}{more}"
    raise Damage(place, reason, _remedy(names if of_text is None else of_text))


def holds_records(text: str, columns: Sequence[str], is_alone: bool) -> bool:
    """True if the first lines are objects of JSON, two or more, or one with text; else all with text."""
    lines = [line for line in text.split("\n", _MAX_LINES)[:_MAX_LINES] if line.strip()]
    try:
        records = [json.loads(line) for line in lines if line.startswith("{")]
    except (ValueError, RecursionError):
        return False
    with_text = sum(any(column in record for column in columns) for record in records)
    n_wanted = len(records) if not is_alone else 1 if len(records) == 1 else 0
    return 0 < len(records) == len(lines) and with_text >= n_wanted


def messages_of(value: Any) -> list[dict[str, str]] | None:
    """Messages of a chat as {"role", "content"}, from a list in OpenAI's or ShareGPT's form; None if it is
    another thing. Of content in several parts, the text is kept."""
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for message in value:
        if not isinstance(message, dict):
            return None
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "\n".join(part for part in parts if isinstance(part, str))
        if not isinstance(role, str) or not isinstance(content, str | None):
            return None
        messages.append({"role": _ROLES.get(role, role), "content": content or ""})
    return messages


def text_value(place: Place, value: Any, recipe: CorpusRecipe, field: str | None = None) -> str:
    """Text of a record's `field`, by default the text column; null is the empty text. The text of a chat is
    that of `chat_text`.

    Raises:
        Damage: `value` is not text.
    """
    if value is None:
        return ""
    messages, field = messages_of(value), field or recipe.text_column
    if messages is not None:
        value = chat_text(messages)
        if f"{TURN}assistant\n" not in value:
            roles = ", ".join(sorted({repr(each["role"][:40]) for each in messages}))
            reason = f"is a chat in which no message of the role 'assistant' says something (roles: {roles})"
            raise Damage(place, reason, "name the role that the model is to learn 'assistant'")
    elif not isinstance(value, str) or field != recipe.text_column:
        wanted = "text" if field == recipe.text_column else "a list of messages"
        raise Damage(place, f"field {field!r} is {type(value).__name__}, not {wanted}", _OTHER_FIELD)
    check_unicode(place, value)
    return value


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
        Damage: the scalar is neither text nor a chat, or too long to be held.
    """
    import pyarrow as pa

    left = _MAX_TEXT

    def value_of(scalar: Any) -> Any:
        """Text, message or list of them as an object of Python."""
        nonlocal left
        scalar = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
        if not scalar.is_valid:
            return None
        if isinstance(scalar, pa.BinaryScalar):
            content = scalar.as_buffer()
            left -= content.size
        left -= _OBJECT if is_nested else 0
        if left < 0:
            raise _too_long(place)
        if isinstance(scalar, pa.StringScalar):
            with contextlib.suppress(UnicodeDecodeError):
                return str(content, "utf-8")
        if isinstance(scalar, pa.ListScalar):
            return [value_of(each) for each in scalar.values]
        if isinstance(scalar, pa.StructScalar):
            fields = {name: value_of(scalar[i]) for i, name in enumerate(scalar) if name in _OF_MESSAGE}
            return {name: value for name, value in fields.items() if value is not None}
        return scalar.as_py() if pa.types.is_primitive(scalar.type) else b""

    is_nested = not isinstance(scalar, pa.BinaryScalar | pa.DictionaryScalar)
    return text_value(place, value_of(scalar), recipe)


def read_parquet(
    file: RawFile, compression: str | None, recipe: CorpusRecipe, leave_out: LeaveOut
) -> Iterator[Parts]:
    from pyarrow import parquet

    stream, place = seekable(file, compression, recipe), Place(file.label)
    n_rows = 0
    with _reading(place, "parquet"):
        _check_footer(stream)
        options = {"buffer_size": CHUNK, "pre_buffer": False, "page_checksum_verification": True}
        table = parquet.ParquetFile(stream, **options)
        name = _text_path(place, table.schema_arrow, recipe)
        recipe = recipe.model_copy(update={"text_column": name})
        paths = [table.schema.column(i).path for i in range(len(table.schema))]
        leaves = [i for i, path in enumerate(paths) if path == name or path.startswith(f"{name}.")]
        is_chat = name not in paths
        if not leaves or (len(leaves) > 1 and not is_chat):
            raise OSError(f"{len(leaves)} of its columns are named {name!r}")
        if is_chat:  # a text of a dictionary is not copied for each message
            table = parquet.ParquetFile(stream, read_dictionary=[paths[i] for i in leaves], **options)
        for group in range(round(file.start * table.num_row_groups), table.num_row_groups):
            about = table.metadata.row_group(group)
            pages = [(0, 0), *(page for leaf in leaves for page in _page_sizes(stream, about.column(leaf)))]
            n_bytes, n_values = map(sum, zip(*pages, strict=True))
            if is_chat and (n_bytes > _MAX_BATCH or n_values > _MAX_PAGE_VALUES):
                raise ValueError(
                    f"a row group has {n_bytes:,} bytes and {n_values:,} values, more than {_MAX_BATCH:,} or "
                    f"{_MAX_PAGE_VALUES:,}: write it with row_group_size=1000"
                )
            # no text is larger than a page; a chat may have several
            row = n_bytes // max(1, about.num_rows) if is_chat else max(n for n, _ in pages)
            rows = max(1, min(_PARQUET_ROWS, _MAX_TEXT // max(row, 1)))
            for batch in table.iter_batches(rows, [group], [name]):
                yield from texts_of_rows(file.label, _leaf_of(batch, name), recipe, leave_out, n_rows)
                n_rows += len(batch)
        if n_rows != table.metadata.num_rows and not file.start:
            raise OSError(f"it holds {n_rows:,} rows and says {table.metadata.num_rows:,}")


def read_arrow(
    file: RawFile, compression: str | None, recipe: CorpusRecipe, leave_out: LeaveOut
) -> Iterator[Parts]:
    """Rows of Arrow's IPC stream, as `datasets` saves it, or of its IPC file, a stream in a frame."""
    import pyarrow as pa

    place, n_rows = Place(file.label), 0
    with _reading(place, "arrow"):
        source: Any = Capped(seekable(file, compression, recipe), _MAX_BATCH, "a batch of its rows")
        start = 8 if source.read(8)[:6] == b"ARROW1" else source.seek(0)
        _check_batches(source)
        source.seek(start)
        reader = pa.ipc.open_stream(pa.PythonFile(source, "r"))
        name = _text_path(place, reader.schema, recipe)
        recipe = recipe.model_copy(update={"text_column": name})
        for batch in reader:
            batch.validate(full=True)  # or an offset could point anywhere in memory
            yield from texts_of_rows(file.label, _leaf_of(batch, name), recipe, leave_out, n_rows)
            n_rows += len(batch)


def _check_batches(source: Any) -> None:
    """
    Raises:
        ValueError: a batch, or the dictionaries together, take too much memory when they are unpacked.
    """
    import pyarrow as pa

    n_dictionaries = 0
    for message in pa.ipc.MessageReader.open_stream(pa.PythonFile(source, "r")):
        if message.type == "schema":
            continue
        # FlatBuffers: Message.header, which is a RecordBatch or DictionaryBatch.data
        content = message.metadata.to_pybytes()
        batch = _flat_table(content, _number(content, 0), 2)
        if message.type != "record batch":
            batch = _flat_table(content, batch, 1)
        n_bytes = message.body.size
        if _flat_field(content, batch, 3):  # RecordBatch.compression: each buffer begins with its size
            buffers = _flat_table(content, batch, 2)
            for i in range(_number(content, buffers)):
                at = _number(content, buffers + 4 + 16 * i, 8)
                n_bytes += max(0, _number(message.body[at : at + 8].to_pybytes(), 0, 8))
        n_dictionaries += n_bytes if message.type != "record batch" else 0
        if max(n_bytes, n_dictionaries) > _MAX_BATCH:
            raise ValueError(f"a batch of its rows takes {n_bytes:,} bytes, more than {_MAX_BATCH:,}")


def _number(content: bytes, at: int, size: int = 4) -> int:
    return int.from_bytes(content[at : at + size], "little", signed=size == 8)


def _flat_field(content: bytes, table: int, number: int) -> int:
    """Index of a field of a FlatBuffers table; 0 if it has its default."""
    fields = table - int.from_bytes(content[table : table + 4], "little", signed=True)
    is_there = 4 + 2 * number < _number(content, fields, 2)
    at = _number(content, fields + 4 + 2 * number, 2) if is_there else 0
    return table + at if at else 0


def _flat_table(content: bytes, table: int, number: int) -> int:
    """Index of the table or vector that a field refers to."""
    at = _flat_field(content, table, number)
    return at + _number(content, at)


@contextlib.contextmanager
def _reading(place: Place, kind: str) -> Iterator[None]:
    """Raise Damage for the errors of pyarrow."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        is_large = "batch of its rows" in str(error)
        remedy = "write smaller batches" if is_large else "the file is damaged or misnamed, copy it anew"
        raise Damage(place, f"is not readable as {kind} ({one_line(error)})", remedy) from error


def seekable(file: RawFile, compression: str | None, recipe: CorpusRecipe) -> IO[bytes]:
    """The open file, or what is unpacked of it, for a format that is not read forwards only."""
    if compression is None and not isinstance(file.stream, Joined):
        return file.stream
    store = TextStore()
    for content in content_of(file, compression, recipe):
        store.append(content)
    store.file.seek(0)
    return store.file


def count_row_groups(stream: IO[bytes]) -> int:
    """Number of parts at which the reading of a parquet file can begin; 1 if it is damaged, which its reader
    tells."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        _check_footer(stream)
        return max(1, parquet.read_metadata(stream).num_row_groups)
    except (pa.ArrowException, OSError, ValueError):
        return 1


def _text_path(place: Place, schema: Any, recipe: CorpusRecipe) -> str:
    """The column of text or chats of a table: a name such as `text`, or a path into a struct, `meta.text`.

    Raises:
        Damage: it is not there, not text, or there more than once.
    """

    def paths(fields: Iterable[Any], above: str = "") -> Iterator[str]:
        for field in fields:
            if _is_text(field.type) or _is_chat(field.type):
                yield above + field.name
            elif str(field.type).startswith("struct<"):
                yield from paths(field.type, f"{above}{field.name}.")

    texts = list(paths(schema))
    if texts.count(recipe.text_column) == 1:
        return recipe.text_column
    name = find_column(place, schema.names, recipe, texts)
    kinds = [field.type for field in schema if field.name == name]
    if len(kinds) == 1 and _is_chat(kinds[0]):
        return name
    kind = " and ".join(map(str, kinds))[:200]
    raise Damage(place, f"field {name!r} is {kind}, not text", _remedy(texts))


def _leaf_of(batch: Any, path: str) -> Any:
    """Column of a record batch, or field of its struct column."""
    names = [path] if path in batch.schema.names else path.split(".")
    column = batch.column(names[0])
    for name in names[1:]:
        column = column.flatten()[column.type.get_field_index(name)]
    return column


def _remedy(of_text: Sequence[str]) -> str:
    if not of_text:
        return 'none of its fields is text; write {"text": ...}, one a line, to a .jsonl file'
    likely = (name for name in of_text if name.rpartition(".")[2].lower() in _LIKELY)
    return f"name the one that holds the text, --set corpus.text_column={next(likely, of_text[0])}"


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return str(kind) in ("string", "large_string", "string_view", "null")


def _is_chat(kind: Any) -> bool:
    """True for lists of messages, which `messages_of` reads."""
    import pyarrow as pa

    of_list = getattr(kind, "value_type", None)
    return isinstance(of_list, pa.StructType) and not {"role", "from"}.isdisjoint(of_list.names)


def _check_footer(stream: IO[bytes]) -> None:
    """
    Raises:
        ValueError: the table at the end of a parquet file is too large to be held.
    """
    stream.seek(max(0, stream.seek(0, io.SEEK_END) - 8))
    length = int.from_bytes(stream.read(8)[:4], "little")
    if length > _MAX_FOOTER:
        raise ValueError(f"the table of its row groups has {length:,} bytes, more than {_MAX_FOOTER:,}")


def _page_sizes(stream: IO[bytes], column: Any) -> Iterator[tuple[int, int]]:
    """(unpacked bytes, values) of each page of a column chunk, from their headers: pyarrow allocates so much.

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
        yield n_bytes, n_values
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
