"""Read one file as texts, a part at a time: decoding, lines, and the table of all formats.

A new format is a generator of texts and a row of FORMATS.
"""

import codecs
import csv
import inspect
import io
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import PurePath
from typing import IO

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError, install_command
from hf_genlm.text.cache import scratch_file
from hf_genlm.text.raw_files import (
    COMPRESSIONS,
    Damage,
    Joined,
    LeaveOut,
    Place,
    RawFile,
    content_of,
    one_line,
    tar_members,
    zip_members,
)
from hf_genlm.text.records import (
    Parts,
    check_unicode,
    find_column,
    read_arrow,
    read_parquet,
    seekable,
    text_of_record,
    text_value,
)
from hf_genlm.text.store import CHUNK

_ESCAPED_BYTE = re.compile(r"[\udc80-\udcff]")
_BINARY_PROBE = 64 * 1024  # bytes searched for NUL
_MAX_SEPARATOR = 1 << 8  # characters of a line that parts documents
_MAX_MEMORY = 1 << 30  # bytes, of the process that reads a PDF or Word file
_MAX_SECONDS = 600  # of a processor, likewise
_MAX_REASON = 500  # bytes of its message
# of a folder that holds any of these, the other formats are not read: a table may be about the texts
COMMON = (".txt", ".md", ".py", ".jsonl", ".ndjson", ".parquet", ".arrow")
CONTINUES = "hf_genlm.continues"  # field of a .jsonl record whose text goes on in the next record
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
    path = PurePath(re.sub(r"\.t(gz|bz2|xz|zst)$", r".tar.\1", name.lower()))
    compression = COMPRESSIONS.get(path.suffix)
    if compression is not None:
        path = path.with_suffix("")
    return (path.suffix if path.suffix in FORMATS else None), compression


def texts_of(file: RawFile, recipe: CorpusRecipe, leave_out: LeaveOut | None = None) -> Iterator[Parts]:
    """Texts of a file, unchanged: one of a text file, one per record of .jsonl and tables.

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
        members = list(zip_members(file.label, file.stream, recipe.unpack_memory_mb << 20))
        default = ".txt" if len(members) == 1 else None
        return _archived(file, None, recipe, leave_out or stop, members, default)
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
    if recipe.documents != "lines":
        parts = _decoded(file, compression, recipe)
        yield from (parts,) if file.separator is None else _separated(parts, file.separator)
        return
    for number, line in enumerate(_lines(_decoded(file, compression, recipe), file.max_line), start=1):
        if line is None:
            leave_out(_too_long(Place(file.label, "line", number), file.max_line))
        elif line.strip("\r\ufeff") and line.strip() != file.separator:
            yield (line.strip("\r\ufeff"),)


def _separated(parts: Parts, separator: str) -> Iterator[Parts]:
    """Documents between lines that hold `separator` alone, without empty lines at their beginnings."""
    cuts = re.compile(rf"^[ \t\r]*{re.escape(separator)}[ \t\r]*(?:\n|\Z)", re.MULTILINE)

    def pieces() -> Iterator[str | None]:
        """Text, and None at each separator."""
        begun, is_within_line = "", False
        for part in itertools.chain(parts, [None]):
            text = begun + (part or "")
            if is_within_line and "\n" not in text and part is not None:
                yield text
                begun = ""
                continue
            start = text.find("\n") + 1 or len(text) if is_within_line else 0
            stop = len(text) if part is None else max(start, text.rfind("\n") + 1)
            is_within_line = len(text) - stop > _MAX_SEPARATOR
            stop = len(text) if is_within_line else stop
            yield text[:start]
            for number, piece in enumerate(cuts.split(text[start:stop])):
                if number:
                    yield None
                yield piece
            begun = text[stop:]

    found = pieces()

    def document(piece: str | None) -> Iterator[str]:
        while piece is not None:
            yield piece
            piece = next(found, None)

    for piece in found:
        if piece is not None and piece.strip():
            yield document(piece.lstrip("\r\n"))


def _too_long(place: Place, n_characters: int) -> Damage:
    return Damage(place, f"has more than {n_characters:,} characters", "cut it into several records")


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
    for content in itertools.chain(content_of(file, compression, recipe), [b""]):
        kind = None if n_read or by_line else next((k for k in OTHER_PROGRAMS if content.startswith(k)), None)
        if kind is not None:
            reason = f"is {OTHER_PROGRAMS[kind]}, not text"
            raise Damage(Place(file.label), reason, "name it by its suffix, or save its text as .txt")
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
                check_unicode(Place(file.label), part)
            yield part


def _wrong_encoding(recipe: CorpusRecipe, where: str) -> tuple[str, str]:
    """Reason and remedy."""
    other = "cp1252" if codecs.lookup(recipe.encoding).name == "utf-8" else "latin-1"
    return (
        f"is not {recipe.encoding}: {where}",
        f"name its encoding by --set corpus.encoding={other}, gbk or such; files that are UTF-8 stay so",
    )


def _archived(
    file: RawFile,
    compression: str | None,
    recipe: CorpusRecipe,
    leave_out: LeaveOut,
    members: Iterable[tuple[str, Iterator[bytes]]] | None = None,
    default: str | None = None,
) -> Iterator[Parts]:
    """Texts of the files in an archive, by default a tar, by their suffixes. Archives, and files of another
    suffix if `default` is None, are counted in `file.skipped`."""
    if members is None:
        members = tar_members(file.label, content_of(file, compression, recipe))
    n_read = 0
    for name, content in members:
        suffix, packed = format_of(name)
        suffix = suffix or default
        if suffix in (None, ".tar") or packed == "zip":
            file.skipped["files"] += 1
            continue
        n_read += 1
        inner = replace(file, label=f"{file.label}/{name}", name=name, stream=Joined(content))
        yield from FORMATS[suffix](inner, packed, recipe, leave_out)
    if not n_read:
        reason = f"holds no readable file ({file.skipped['files']:,} others)"
        raise Damage(Place(file.label), reason, "unpack it, and name the files that hold text")


def _csv(
    file: RawFile, compression: str | None, recipe: CorpusRecipe, leave_out: LeaveOut
) -> Iterator[Parts]:
    """Text column of a table whose first line holds the names, after `sep=;` as Excel writes it or not."""
    lines = _lines(_decoded(file, compression, recipe), file.max_line)
    head = (next(lines) or "").removeprefix("\ufeff").rstrip("\r")
    n_before = int(head.lower().startswith("sep=") and len(head) == 5)
    delimiter = head[4] if n_before else max("\t,;|", key=head.count)
    size, where = 0, Place(file.label)

    def bounded() -> Iterator[str]:
        nonlocal size
        for line in lines if n_before else itertools.chain([head], lines):
            size += file.max_line if line is None else len(line) + 1
            if size >= file.max_line:  # the library holds a row, which has several lines within quotes
                raise _too_long(where, file.max_line)
            yield f"{line}\n"

    csv.field_size_limit(2 * file.max_line)  # of the whole process; `bounded` is the limit
    rows = csv.reader(bounded(), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        size, where = 0, Place(file.label, "line", n_before + rows.line_num + 1)
        try:
            row = next(rows, None)
            if row is None:
                return
            if not names:
                names = row
                column = find_column(Place(file.label), names, recipe)
            elif row and not names.index(column) < len(row) <= len(names):
                reason = f"has {len(row)} fields, and the first line {len(names)}"
                raise Damage(where, reason, "put fields that hold the delimiter in quotes")
            elif row:
                yield (text_value(where, row[names.index(column)], recipe, column),)
        except (csv.Error, Damage) as error:
            reason, damage = f"is not readable as a table ({error})", error
            if not isinstance(damage, Damage):
                damage = Damage(where, reason, "double the quotes inside of quotes")
            if size >= file.max_line or "end of data" in str(error):  # all lines behind a quote are lost
                reason = f"{damage.reason} from line {where.number:,} on"
                damage = Damage(Place(file.label), reason, "close its quotes")
            if damage.place.unit is None or not names:
                raise damage from error
            leave_out(damage)


def _document(
    kind: str, file: RawFile, compression: str | None, recipe: CorpusRecipe, leave_out: LeaveOut
) -> Iterator[Parts]:
    """Text of a PDF or Word file by a library, in a process whose memory and time are bounded."""
    if find_spec({"pdf": "pypdf", "docx": "docx"}[kind]) is None:
        raise UserError(f"{file.label!r} needs more packages to be read: {install_command('documents')}")
    stream = seekable(file, compression, recipe)
    if isinstance(stream, io.BytesIO):  # of no use to another process
        held, stream = stream, scratch_file()
        stream.write(held.getbuffer())
        stream.seek(0)
    yield _extracted(kind, file.label, stream)


def _extracted(kind: str, label: str, stream: IO[bytes]) -> Iterator[str]:
    arguments = f"{kind!r}, {sys.path!r}, {_MAX_MEMORY}, {_MAX_SECONDS}"
    command = [sys.executable, "-I", "-c", f"{inspect.getsource(_extract)}\n_extract({arguments})"]
    decode, is_empty = codecs.getincrementaldecoder("utf-8")("replace").decode, True
    with (
        scratch_file() as errors,
        subprocess.Popen(command, stdin=stream, stdout=subprocess.PIPE, stderr=errors) as child,
    ):
        assert child.stdout is not None
        try:
            while content := child.stdout.read(CHUNK):
                part = decode(content)
                is_empty = is_empty and not part.strip()
                yield part
            status = child.wait()
        finally:
            child.kill()
        errors.seek(0)
        reason = " ".join(errors.read(_MAX_REASON).decode("utf-8", "replace").split())
    if status < 0 or "MemoryError" in reason:
        reason = f"it takes more than {_MAX_MEMORY >> 20:,} MB of memory or {_MAX_SECONDS:,} s"
    if status:
        reason = f"is not readable as .{kind} ({reason})"
    elif is_empty:
        reason = "holds no text, only pictures as of a scan"
    else:
        return
    raise Damage(Place(label), reason, "save its text as .txt, and name that")


def _extract(kind: str, paths: list[str], max_memory: int, max_seconds: int) -> None:
    """Write the text of the document on standard input to standard output.

    The source of this function is a program of its own: a process that loads no more starts at once.
    """
    import contextlib
    import logging
    import os
    import sys

    sys.path[:] = paths
    with contextlib.suppress(ImportError, ValueError, OSError):  # ImportError: on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_memory, max_memory))
        resource.setrlimit(resource.RLIMIT_CPU, (max_seconds, max_seconds))
    logging.disable()
    try:
        if kind == "pdf":
            import pypdf

            texts = (page.extract_text() for page in pypdf.PdfReader(sys.stdin.buffer).pages)
        else:
            import docx

            texts = (
                "\n".join("\t".join(cell.text for cell in row.cells) for row in block.rows)
                if hasattr(block, "rows")
                else block.text
                for block in docx.Document(sys.stdin.buffer).iter_inner_content()
            )
        for text in texts:
            os.write(1, f"{text}\n".encode("utf-8", "replace"))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


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
                raise _too_long(place, file.max_line)
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
    return text_of_record(place, record, recipe), record.get(CONTINUES) is True


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


FORMATS: dict[str, Callable[[RawFile, str | None, CorpusRecipe, LeaveOut], Iterator[Parts]]] = {
    ".txt": _text,
    ".md": _text,
    ".py": _text,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".csv": _csv,
    ".tsv": _csv,
    ".pdf": partial(_document, "pdf"),
    ".docx": partial(_document, "docx"),
    ".tar": _archived,
}
