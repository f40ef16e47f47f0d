"""Read one file as texts, a part at a time: decoding, lines, and the table of all formats.

A new format is a generator of texts and a row of FORMATS.
"""

import codecs
import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import PurePath

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
    extracted,
    one_line,
    tar_members,
    zip_members,
)
from hf_genlm.text.records import (
    CHATS,
    Parts,
    check_unicode,
    find_column,
    holds_records,
    read_arrow,
    read_parquet,
    seekable,
    text_of_record,
    text_value,
)
from hf_genlm.text.store import CHUNK, TextStore

_ESCAPED_BYTE = re.compile(r"[\udc80-\udcff]")
_BINARY_PROBE = 64 * 1024  # bytes searched for NUL
_MAX_SEPARATOR = 1 << 8  # characters of a line that parts documents
_PLAIN = (None, ".txt", ".md", ".py")
_POINTERS = {b"version https://git-lfs.github.com/spec/": "git lfs pull", b"/annex/objects/": "git annex get"}
_BYTE_ORDER_MARK = re.compile(rb"(\xff\xfe\0\0|\0\0\xfe\xff)|\xff\xfe|\xfe\xff")  # UTF-32, or UTF-16
_SEPARATOR = re.compile(r"<\|(?:endoftext|end_of_text|eos|endofdoc)\|>|</s>|<eos>|\[EOS\]", re.IGNORECASE)
_MARKUP = {".json", ".html", ".htm", ".xml", ".tex", ".ipynb"}
_MARKUP_BEGINS = ("<!doctype html", "<html", "<?xml", "\\documentclass")
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


def is_archive(name: str) -> bool:
    """True for a file of several files; a `.txt.zip` is one file."""
    suffix, compression = format_of(name)
    return suffix == ".tar" or (suffix is None and compression == "zip")


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


def look_at(
    file: RawFile, recipe: CorpusRecipe, is_alone: bool = True
) -> tuple[RawFile, CorpusRecipe, list[str]]:
    """Look at the beginning of a file: (file, recipe, told) by which `texts_of` reads it as what it is.

    Without a known suffix, JSON lines are read as such; unless it `is_alone`, only those that all hold text.
    Its encoding is that of its byte order mark, or UTF-8 if all its bytes are UTF-8. An archive is looked at
    member by member when it is read. `told` is for people.

    Raises:
        Damage: it stands for a file that git has not fetched.
    """
    suffix, compression = format_of(file.name)
    if is_archive(file.name):
        return file, recipe, []
    beginning = b""
    with contextlib.suppress(Damage):  # the reader meets it again
        beginning = next(content_of(file, compression, recipe), b"")
    for start, command in _POINTERS.items():
        if beginning.startswith(start):
            raise Damage(
                Place(file.label), "is a pointer, and git has not fetched its file", f"run {command}"
            )
    told = []
    encoding = _encoding_of(beginning, file, compression, recipe)
    if encoding != recipe.encoding:
        told.append(f"read as {encoding}, as its bytes say")
        recipe = recipe.model_copy(update={"encoding": encoding})
    file.stream.seek(0)
    if suffix not in _PLAIN:
        return file, recipe, told
    text = beginning.decode(encoding, "replace").removeprefix("\ufeff")
    stem = PurePath(file.name).with_suffix("") if compression else PurePath(file.name)
    whole_lines = text if len(beginning) < CHUNK else text[: text.rfind("\n") + 1]
    if holds_records(whole_lines, (recipe.text_column, *CHATS), is_alone):
        if suffix is not None:
            told.append("JSON lines, read as text; to read a document of each, rename it to .jsonl")
            return file, recipe, told
        told.append("read as JSON lines, a document of each; to read them as text, rename it to .txt")
        name = f"{stem}.jsonl{PurePath(file.name).suffix if compression else ''}"
        return replace(file, name=name), recipe, told
    if stem.suffix.lower() in _MARKUP or text[:99].lstrip().lower().startswith(_MARKUP_BEGINS):
        remedy = "to train on the text alone, write that to .txt or .jsonl"
        told.append(f"read as it stands, with the marks of its format; {remedy}")
    found = dict.fromkeys(_SEPARATOR.findall(text))
    lines = {line.strip() for line in text.split("\n")} if found else set()
    separator = next((mark for mark in found if mark in lines), None)
    if separator is not None and recipe.documents != "whole":
        remedy = "to keep it whole, --set corpus.documents=whole"
        told.append(f"cut into documents at lines of {separator}; {remedy}")
        file = replace(file, separator=separator)
    elif found and suffix != ".py":
        told.append(f"{next(iter(found))} in it is read as text; alone on a line, it parts documents")
    return file, recipe, told


def _encoding_of(beginning: bytes, file: RawFile, compression: str | None, recipe: CorpusRecipe) -> str:
    """Encoding by the byte order mark, else UTF-8 if the whole file is that, else the one of the recipe."""
    stated = codecs.lookup(recipe.encoding).name
    is_wide = stated.startswith(("utf-16", "utf-32"))
    mark = None if is_wide else _BYTE_ORDER_MARK.match(beginning)
    if mark is not None:
        return "utf-32" if mark[1] else "utf-16"
    if stated == "utf-8":
        return recipe.encoding
    decode, is_ascii = codecs.getincrementaldecoder("utf-8")().decode, True
    file.stream.seek(0)
    try:
        for content in itertools.chain(content_of(file, compression, recipe), [b""]):
            decode(content, not content)
            is_ascii = is_ascii and content.isascii()
            if b"\0" in content:
                return recipe.encoding
    except (UnicodeDecodeError, Damage):
        return recipe.encoding
    return recipe.encoding if is_ascii and not is_wide else "utf-8"  # wide, ASCII would be other bytes


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

    def all_pieces() -> Iterator[str | None]:
        """The text between separators, and None for each of them."""
        line, is_long = "", False  # the line that is not ended yet; it is too long for a separator
        for part in itertools.chain(parts, [""]):
            if is_long:
                rest, end, part = part.partition("\n")
                yield rest + end
                is_long = not end
            text = line + part
            stop = text.rfind("\n") + 1 if part else len(text)
            for number, piece in enumerate(cuts.split(text[:stop])):
                if number:
                    yield None
                yield piece
            line = text[stop:]
            if len(line) > _MAX_SEPARATOR:
                yield line
                line, is_long = "", True

    pieces = all_pieces()

    def document(piece: str | None) -> Iterator[str]:
        while piece is not None:
            yield piece
            piece = next(pieces, None)

    for piece in pieces:
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


class Member(Joined):
    """Content of a member of an archive, read forwards, as a file that can be looked at before.

    What is read while `is_kept`, damage included, is read again behind `seek(0)`.
    """

    def __init__(self, parts: Iterator[bytes]):
        super().__init__(parts)
        self.is_kept, self._kept, self._place = True, TextStore(), 0
        self._damage: Damage | None = None

    def seek(self, at: int) -> None:
        self._place = at

    def read(self, n: int) -> bytes:
        if self._place < self._kept.n_bytes:
            content = self._kept.read(self._place, min(self._place + n, self._kept.n_bytes))
        elif self._damage is not None:
            raise self._damage
        else:
            try:
                content = super().read(n)
            except Damage as damage:
                self._damage = damage
                raise
            if self.is_kept:
                self._kept.append(content)
        self._place += len(content)
        return content


def _archived(
    file: RawFile,
    compression: str | None,
    recipe: CorpusRecipe,
    leave_out: LeaveOut,
    members: Iterable[tuple[str, Iterator[bytes]]] | None = None,
    default: str | None = None,
) -> Iterator[Parts]:
    """Texts of the files in an archive, by default a tar, each looked at as a file is. Archives, and files of
    another suffix if `default` is None, are counted in `file.skipped`, unless they hold JSON lines."""
    if members is None:
        members = tar_members(file.label, content_of(file, compression, recipe))
    n_read = 0
    for name, content in members:
        member = replace(file, label=f"{file.label}/{name}", name=name, stream=Member(content))
        try:
            member, its_recipe, told = look_at(member, recipe, is_alone=default is not None)
        except Damage as damage:
            n_read += 1
            leave_out(damage)
            continue
        suffix, packed = format_of(member.name)
        suffix = suffix or default
        if suffix in (None, ".tar") or packed == "zip":
            file.skipped["files"] += 1
            continue
        n_read += 1
        file.told.extend((each, f"{file.shown}/{name}") for each in told)
        member.stream.is_kept = False
        yield from FORMATS[suffix](member, packed, its_recipe, leave_out)
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
    if find_spec({"pdf": "pypdf", "docx": "docx"}[kind]) is None:
        raise UserError(f"{file.label!r} needs more packages to be read: {install_command('documents')}")
    stream = seekable(file, compression, recipe)
    if isinstance(stream, io.BytesIO):  # of no use to another process
        held, stream = stream, scratch_file()
        stream.write(held.getbuffer())
        stream.seek(0)
    yield extracted(kind, file.label, stream)


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
