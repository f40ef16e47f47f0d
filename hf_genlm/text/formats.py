"""Bytes of one file to its texts: decompression, decoding, and the records of JSONL and parquet."""

import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from hf_genlm.errors import UserError
from hf_genlm.recipe import CorpusRecipe

COMPRESSIONS = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".zst": "zstd",
    ".zip": "zip",
}  # suffix: fsspec's word
_BINARY_PROBE = 64 * 1024  # bytes looked at for NUL


@dataclass(frozen=True)
class RawFile:
    """One file as it lies on disk. `label` names it in messages."""

    label: str
    name: str  # decides the format by its suffixes
    content: bytes


def format_of(name: str) -> tuple[str | None, str | None]:
    """(`.txt`, `gzip`) for `a.txt.gz`: the known format suffix and the compression, each None when absent."""
    path = PurePath(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    if compression is not None:
        path = path.with_suffix("")
    return (path.suffix if path.suffix in FORMATS else None), compression


def texts_of(file: RawFile, recipe: CorpusRecipe) -> list[str]:
    """The texts of a file, unchanged: one of a text file, one per record of .jsonl and .parquet.

    A file of an unknown suffix is text. Records without text are given as empty strings.

    Raises:
        UserError: damaged archive, binary or wrongly encoded text, a record that does not hold the text
            column.
    """
    suffix, compression = format_of(file.name)
    content = file.content
    if compression is not None:
        if compression == "zip" and suffix is None:
            suffix, _ = format_of(_only_member(file))
        content = _decompress(file, compression)
    return FORMATS[suffix or ".txt"](file.label, content, recipe)


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


def _decompress(file: RawFile, compression: str) -> bytes:
    from fsspec.compression import compr

    if compression == "zip":
        _only_member(file)
    if compression not in compr:
        extra = " (pip install 'hf_genlm[zstd]')" if compression == "zstd" else ""
        raise UserError(
            f"{file.label!r} is {compression}-compressed, which this Python cannot read: unpack it{extra}"
        )
    try:
        if compression == "zstd":
            return _decompress_zstd(file.content)
        with compr[compression](io.BytesIO(file.content), mode="rb") as stream:
            return stream.read()
    # RuntimeError and NotImplementedError: zipfile on a password and on a method it does not know
    except (
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        zlib.error,
        lzma.LZMAError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(
            f"{file.label!r} is not readable as {compression} ({_one_line(error)}): "
            "the file is damaged or misnamed, copy it anew or unpack it"
        ) from error


def _decompress_zstd(content: bytes) -> bytes:
    """All frames; `zstandard`'s stream reader stops after the first and takes a cut-off file for whole."""
    try:
        import zstandard
    except ImportError:
        from fsspec.compression import compr

        with compr["zstd"](io.BytesIO(content), mode="rb") as stream:
            return stream.read()
    parts = []
    try:
        while content:
            frame = zstandard.ZstdDecompressor().decompressobj()
            parts.append(frame.decompress(content))
            if not frame.eof:
                raise EOFError("it ends in the middle of a frame")
            content = frame.unused_data
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    return b"".join(parts)


def _only_member(file: RawFile) -> str:
    """Name of the one member of a zip archive. It is never used as a path."""
    try:
        with zipfile.ZipFile(io.BytesIO(file.content)) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(
            f"{file.label!r} is not readable as zip ({_one_line(error)}): the file is damaged, copy it anew"
        ) from error
    if len(members) != 1:
        raise UserError(
            f"{file.label!r} holds {len(members)} members, and only a .zip of one file is read: unpack it "
            "to a folder"
        )
    return members[0]


def _decode(label: str, content: bytes, recipe: CorpusRecipe) -> str:
    """Strict, without newline translation."""
    wide = b"\0" in "a".encode(
        recipe.encoding, errors="replace"
    )  # utf-16 and utf-32 write NUL bytes for plain text
    if not wide and b"\0" in content[:_BINARY_PROBE]:
        raise UserError(
            f"{label!r} is binary (it holds NUL bytes), not text: leave it out, "
            "or name its encoding with --set corpus.encoding=utf-16"
        )
    try:
        text = content.decode(recipe.encoding)
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        remedy = "latin-1" if recipe.encoding.lower() in ("utf-8", "utf8") else "utf-8"
        raise UserError(
            f"{label!r} is not {recipe.encoding}: byte 0x{content[start]:02x} at offset {start}; "
            f"name its encoding, for example --set corpus.encoding={remedy}"
        ) from error
    _check_unicode(label, text)
    return text


def _check_unicode(label: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{label!r} holds the lone surrogate U+{ord(text[error.start]):04X}, which is half a character: "
            "write the file anew from its source"
        ) from error


def _whole_text(label: str, content: bytes, recipe: CorpusRecipe) -> list[str]:
    return [_decode(label, content, recipe)]


def _jsonl(label: str, content: bytes, recipe: CorpusRecipe) -> list[str]:
    lines = _decode(label, content, recipe).removeprefix("\ufeff").split("\n")
    texts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{label}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where!r} is not JSON ({_one_line(error)}): a .jsonl file holds one object a line; "
                "mend the line, or rename the file to .txt to read it as text"
            ) from error
        if not isinstance(record, dict):
            raise UserError(f'{where!r} is {type(record).__name__}, not an object: write {{"text": ...}}')
        check_column(where, record, recipe)
        texts.append(text_value(where, record[recipe.text_column], recipe))
    return texts


def _parquet(label: str, content: bytes, recipe: CorpusRecipe) -> list[str]:
    import pyarrow as pa
    from pyarrow import parquet

    texts: list[str] = []
    try:
        table = parquet.ParquetFile(pa.BufferReader(content))
        check_column(label, table.schema_arrow.names, recipe)
        for batch in table.iter_batches(batch_size=4096, columns=[recipe.text_column]):
            texts.extend(text_value(label, value, recipe) for value in batch.column(0).to_pylist())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{label!r}, column {recipe.text_column!r}, is not UTF-8 (byte "
            f"0x{error.object[error.start]:02x}): "
            "parquet text must be UTF-8, write it anew"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{label!r} is not readable as parquet ({_one_line(error)}): the file is damaged or misnamed, "
            "copy it anew"
        ) from error
    return texts


def check_column(where: str, names: Iterable[str], recipe: CorpusRecipe) -> None:
    """
    Raises:
        UserError: `names` lacks the text column.
    """
    names = list(names)
    if recipe.text_column not in names:
        example = names[0] if names else "text"
        raise UserError(
            f"{where!r} has no field {recipe.text_column!r}, it has {', '.join(map(repr, names)) or 'none'}: "
            f"name the one that holds the text, --set corpus.text_column={example}"
        )


def text_value(where: str, value: Any, recipe: CorpusRecipe) -> str:
    """The text of a record; null is the empty text.

    Raises:
        UserError: `value` is not text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{where!r}: field {recipe.text_column!r} is {type(value).__name__}, not text: "
            "name a field of text with --set corpus.text_column=..."
        )
    _check_unicode(where, value)
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


FORMATS: dict[str, Callable[[str, bytes, CorpusRecipe], list[str]]] = {
    ".txt": _whole_text,
    ".md": _whole_text,
    ".py": _whole_text,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
