"""Read one file as texts, a part at a time: decoding, lines, and the table of all formats.

A new format is a generator of texts and a row of FORMATS.
"""

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import PurePath

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
from hf_genlm.text.records import Parts, check_unicode, read_parquet, text_of_record

_ESCAPED_BYTE = re.compile(r"[\udc80-\udcff]")
_BINARY_PROBE = 64 * 1024  # bytes searched for NUL
_MAX_SEPARATOR = 1 << 8  # characters of a line that parts documents
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
                check_unicode(Place(file.label), part)
            yield part


def _wrong_encoding(recipe: CorpusRecipe, where: str) -> tuple[str, str]:
    """Reason and remedy."""
    other = "cp1252" if codecs.lookup(recipe.encoding).name == "utf-8" else "latin-1"
    return (
        f"is not {recipe.encoding}: {where}",
        f"name its encoding by --set corpus.encoding={other}, gbk or such; files that are UTF-8 stay so",
    )


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
}
