"""One file to its texts, a part at a time: decompression, decoding, and the records of JSONL and parquet."""

import codecs
import io
import itertools
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import IO, Any

from hf_genlm.errors import UserError
from hf_genlm.recipe import CorpusRecipe
from hf_genlm.text.store import CHUNK, spooled

Parts = Iterable[str]  # one text, in parts that join to it

COMPRESSIONS = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".zst": "zstd",
    ".zip": "zip",
}  # suffix: fsspec's word
_BINARY_PROBE = 64 * 1024  # bytes looked at for NUL
_PARQUET_ROWS = 512  # decoded at once


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


def texts_of(file: RawFile, recipe: CorpusRecipe) -> Iterator[Parts]:
    """The texts of a file, unchanged: one of a text file, one per record of .jsonl and .parquet.

    A file of an unknown suffix is text. Records without text are given as empty ones. The parts of a
    text are to be taken before the next text.

    Raises:
        UserError: damaged archive, binary or wrongly encoded text, a record that does not hold the text
            column. Not before the place of the fault is read.
    """
    suffix, compression = format_of(file.name)
    if compression == "zip" and suffix is None:
        suffix, _ = format_of(_only_member(file))
    return FORMATS[suffix or ".txt"](file, compression, recipe)


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


def _chunks(file: RawFile, compression: str | None) -> Iterator[bytes]:
    """The content of a file, decompressed, in parts."""
    if compression is None:
        while content := file.stream.read(CHUNK):
            yield content
        return
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
            yield from _zstd_chunks(file.stream)
            return
        with compr[compression](file.stream, mode="rb") as stream:
            while content := stream.read(CHUNK):
                yield content
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


def _zstd_chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """All frames; `zstandard`'s stream reader stops after the first and takes a cut-off file for whole."""
    try:
        import zstandard
    except ImportError:
        from fsspec.compression import compr

        with compr["zstd"](stream, mode="rb") as unpacked:
            while content := unpacked.read(CHUNK):
                yield content
        return
    frame = None
    try:
        while content := stream.read(CHUNK):
            while content:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(content)
                content, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")


def _only_member(file: RawFile) -> str:
    """Name of the one member of a zip archive. It is never used as a path."""
    try:
        with zipfile.ZipFile(file.stream) as archive:
            members = archive.namelist()
        file.stream.seek(0)
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


def _decoded(file: RawFile, compression: str | None, recipe: CorpusRecipe) -> Iterator[str]:
    """The text of a file in parts, strictly decoded, without newline translation."""
    # utf-16 and utf-32 write NUL bytes for plain text
    wide = b"\0" in "a".encode(recipe.encoding, errors="replace")
    decoder = _decoder(recipe.encoding)
    n_read = 0
    for content in itertools.chain(_chunks(file, compression), [b""]):
        if not wide and b"\0" in content[: max(0, _BINARY_PROBE - n_read)]:
            raise UserError(
                f"{file.label!r} is binary (it holds NUL bytes), not text: leave it out, "
                "or name its encoding with --set corpus.encoding=utf-16"
            )
        n_read += len(content)
        try:
            part = decoder(content, not content)
        except UnicodeError as error:
            # the decoder has put what it held back before `content`
            seen = getattr(error, "object", content) or b"\0"
            start = getattr(error, "start", 0)
            remedy = "latin-1" if recipe.encoding.lower() in ("utf-8", "utf8") else "utf-8"
            raise UserError(
                f"{file.label!r} is not {recipe.encoding}: byte 0x{seen[start]:02x} at offset "
                f"{n_read - len(seen) + start}; "
                f"name its encoding, for example --set corpus.encoding={remedy}"
            ) from error
        if part:
            _check_unicode(file.label, part)
            yield part


def _decoder(encoding: str) -> Callable[[bytes, bool], str]:
    """`decode(content, is_last)`, part by part; of an encoding that cannot do that, all at the end."""
    make = codecs.lookup(encoding).incrementaldecoder
    if make is not None:
        return make("strict").decode
    held = io.BytesIO()

    def decode(content: bytes, is_last: bool) -> str:
        held.write(content)
        return held.getvalue().decode(encoding) if is_last else ""

    return decode


def _check_unicode(label: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{label!r} holds the lone surrogate U+{ord(text[error.start]):04X}, which is half a character: "
            "write the file anew from its source"
        ) from error


def _whole_text(file: RawFile, compression: str | None, recipe: CorpusRecipe) -> Iterator[Parts]:
    yield _decoded(file, compression, recipe)


def _jsonl(file: RawFile, compression: str | None, recipe: CorpusRecipe) -> Iterator[Parts]:
    for number, line in enumerate(_lines(_decoded(file, compression, recipe)), start=1):
        if number == 1:
            line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        where = f"{file.label}, line {number}"
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
        yield (text_value(where, record[recipe.text_column], recipe),)


def _lines(parts: Parts) -> Iterator[str]:
    """What lies between line feeds."""
    begun: list[str] = []
    for part in parts:
        first, *others = part.split("\n")
        begun.append(first)
        if others:
            yield "".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    yield "".join(begun)


def _parquet(file: RawFile, compression: str | None, recipe: CorpusRecipe) -> Iterator[Parts]:
    import pyarrow as pa
    from pyarrow import parquet

    stream = file.stream
    if compression is not None:
        stream = spooled(_chunks(file, compression))
    label = file.label
    try:
        table = parquet.ParquetFile(stream, buffer_size=CHUNK, pre_buffer=False)
        check_column(label, table.schema_arrow.names, recipe)
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[recipe.text_column]):
            for value in batch.column(0).to_pylist():
                yield (text_value(label, value, recipe),)
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


FORMATS: dict[str, Callable[[RawFile, str | None, CorpusRecipe], Iterator[Parts]]] = {
    ".txt": _whole_text,
    ".md": _whole_text,
    ".py": _whole_text,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
