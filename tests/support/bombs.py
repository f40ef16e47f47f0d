"""Inputs that take little disk and could take any amount of memory or time, and a reader that measures.

    PYTHONPATH=tests python tests/support/bombs.py [MB]     peak memory of each reader, format and script

Each case writes a file into a folder and returns its path. `measure` reads it in a process of its own.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import resource
import signal
import struct
import sys
import tempfile
import traceback
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

LIMIT_S = 25
MOST_MEMORY = 3 << 30  # bytes: a reader that wants more is stopped
SCRIPTS = {
    "English": "The quick brown fox jumps over the lazy dog, and then some. ",
    "Chinese": "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少",
    "Thai": "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "Arabic": "اللغةالعربيةجميلة",
    "emoji": "😀🎉🚀🐍",
    "marks": "\u0301\u0327\u0308",
    "line ends": "\n",
    "carriage returns": "\r",
    "spaces": " ",
    "digits": "0123456789",
    "one letter": "a",
}


def zipped(content: bytes, method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a.txt", content)
    return buffer.getvalue()


def zstd(content: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=1).compress(content)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, 1),
    ".bz2": lambda content: bz2.compress(content, 1),
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": zstd,
    ".zip": lambda content: zipped(content, zipfile.ZIP_DEFLATED),
}


def a_text(script: str, suffix: str, n_bytes: int) -> Callable[[Path], Path]:
    unit = SCRIPTS[script].encode()
    return lambda folder: written(
        folder / f"a.txt{suffix}", COMPRESSIONS[suffix](unit * (n_bytes // len(unit)))
    )


# files of a few bytes that expand, and files of many small parts


def in_zip(method: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "a.txt.zip"
        with (
            zipfile.ZipFile(path, "w", method) as archive,
            archive.open("a.txt", "w", force_zip64=True) as file,
        ):
            for _ in range(200):
                file.write(b"a" * (1 << 20))
        return path

    return write


def large_dictionary_in_zip(folder: Path) -> Path:
    """LZMA in zip whose header states a dictionary of 4 GB."""
    content = bytearray(zipped(b"some text " * 100, zipfile.ZIP_LZMA))
    (name,) = struct.unpack_from("<H", content, 26)
    at = 30 + name + 4 + 1
    content[at : at + 4] = b"\xff\xff\xff\xff"
    return written(folder / "a.txt.zip", bytes(content))


def many_members(folder: Path) -> Path:
    """The table of a zip archive of 100,000 members, 200 bytes each."""
    row = zipfile.ZipInfo("a.txt")
    entry = struct.pack(
        "<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 200, 0, 0, 0, 0, 0, 0
    )
    table = (entry + row.filename.ljust(200).encode()) * 100_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(table), 0, 0)
    return written(folder / "a.txt.zip", table + end)


def empty_streams(suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        empty = COMPRESSIONS[suffix](b"")
        return written(folder / f"a.txt{suffix}", empty * ((16 << 20) // len(empty)))

    return write


def large_window(folder: Path) -> Path:
    """zstd with a window of 2 GB."""
    import zstandard

    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = b"".join(packer.compress(b"a" * (1 << 20)) for _ in range(8)) + packer.flush()
    return written(folder / "a.txt.zst", content)


def json_line(line: str, n_characters: int = 1 << 26) -> Callable[[Path], Path]:
    """A .jsonl file of a healthy line and a line of many times `line`."""

    def write(folder: Path) -> Path:
        path = folder / "a.jsonl.gz"
        head, unit, tail = line.partition("…")[0], line.split("…")[1], line.split("…")[2]
        with gzip.open(path, "wt", 1, encoding="utf-8") as file:
            file.write('{"text": "healthy"}\n' + head)
            for _ in range(n_characters // (1 << 16)):
                file.write(unit * ((1 << 16) // len(unit)))
            file.write(tail + "\n")
        return path

    return write


ONE_PAGE = {"data_page_size": 1 << 30}


def parquet(make: Callable[[], object], **options) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        from pyarrow import parquet as library

        library.write_table(make(), folder / "a.parquet", **{"compression": "zstd", **options})
        return folder / "a.parquet"

    return write


def one_value_many_times(n_rows: int = 50, n_bytes: int = 16 << 20):
    import pyarrow as pa

    column = pa.DictionaryArray.from_arrays(pa.array([0] * n_rows, pa.int32()), pa.array(["x" * n_bytes]))
    return pa.table({"text": column})


def long_values(n_rows: int = 50, n_bytes: int = 16 << 20):
    """Values of zeros share one buffer here, and are a page each in the file."""
    import pyarrow as pa

    value = pa.scalar("x" * n_bytes)
    return pa.table({"text": pa.chunked_array([pa.array([value]) for _ in range(n_rows)])})


def long_lists(n_items: int = 1 << 27):
    import pyarrow as pa

    items = pa.nulls(n_items, pa.string()) if n_items < 0 else pa.nulls(n_items, pa.bool_())
    offsets = pa.array([0, n_items], pa.int64())
    return pa.table({"text": pa.LargeListArray.from_arrays(offsets, items)})


def deep_schema(depth: int = 200):
    import pyarrow as pa

    kind = pa.string()
    for _ in range(depth):
        kind = pa.struct([("a", kind)])
    return pa.table({"text": pa.array([None], kind)})


def lying_footer(folder: Path) -> Path:
    return written(folder / "a.parquet", b"PAR1" + b"\0" * (20 << 20) + struct.pack("<I", 18 << 20) + b"PAR1")


def arrow(make: Callable[[], object], compression: str | None = None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        import pyarrow as pa

        table = make()
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.ipc.new_stream(folder / "a.arrow", table.schema, options=options) as writer:
            writer.write_table(table)
        return folder / "a.arrow"

    return write


def one_long_value(n_bytes: int = 700 << 20):
    import pyarrow as pa

    return pa.table({"text": pa.array(["x" * n_bytes], pa.large_string())})


def wild_offsets(folder: Path) -> Path:
    """Arrow whose strings lie outside of the file."""
    import pyarrow as pa

    offsets = pa.py_buffer(struct.pack("<3i", 0, 1 << 30, 5))
    column = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"short"))
    return arrow(lambda: pa.table({"text": column}))(folder)


def long_row(name: str, head: str, unit: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        with gzip.open(folder / name, "wt", 1, encoding="utf-8") as file:
            file.write(head)
            for _ in range((1 << 25) >> 16):
                file.write(unit * ((1 << 16) // len(unit)))
        return folder / name

    return write


def tar_header(name: bytes, size: int, kind: bytes) -> bytes:
    import tarfile

    about = tarfile.TarInfo(name.decode())
    about.size, about.type = size, kind
    return about.tobuf(tarfile.GNU_FORMAT)


def tar_of(*parts: tuple[bytes, int]) -> Callable[[Path], Path]:
    """A compressed tar archive of `parts`, each so many times."""

    def write(folder: Path) -> Path:
        with gzip.open(folder / "a.tar.gz", "wb", 1) as file:
            for part, n_times in parts:
                at_once = max(1, (1 << 20) // len(part))
                for i in range(0, n_times, at_once):
                    file.write(part * min(at_once, n_times - i))
        return folder / "a.tar.gz"

    return write


def overlapping(folder: Path) -> Path:
    """A zip archive whose members are all the same bytes."""
    content = bytearray(zipped(b"a" * (1 << 20), zipfile.ZIP_DEFLATED))
    at = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    row = bytes(content[at:end])
    size = struct.pack("<2H2L", 1000, 1000, len(row) * 1000, at)
    return written(
        folder / "a.zip", bytes(content[:at]) + row * 1000 + content[end : end + 8] + size + b"\0\0"
    )


def pdf_stream(content: bytes, repeats: int) -> Callable[[Path], Path]:
    """A PDF whose only page is drawn by `content`, many times."""

    def write(folder: Path) -> Path:
        packer = zlib.compressobj(1)
        drawn = b"".join(packer.compress(content * 1000) for _ in range(repeats // 1000)) + packer.flush()
        head = b"%PDF-1.4\n1 0 obj\n<</Type/Catalog/Pages 2 0 R>>\nendobj\n"
        head += b"2 0 obj\n<</Type/Pages/Kids[3 0 R]/Count 1>>\nendobj\n3 0 obj\n<</Type/Page/Parent 2 0 R"
        head += b"/MediaBox[0 0 9 9]/Contents 4 0 R/Resources<</Font<</F<</Type/Font"
        head += b"/Subtype/Type1/BaseFont/Helvetica>>>>>>>>\nendobj\n4 0 obj\n<</Filter/FlateDecode"
        head += b"/Length %d>>stream\n%s\nendstream\nendobj\n" % (len(drawn), drawn)
        return written(folder / "a.pdf", head + b"trailer<</Root 1 0 R>>\nstartxref\n0\n%%EOF")

    return write


def word_file(folder: Path) -> Path:
    """A .docx of 16 million elements."""
    import docx

    docx.Document().save(folder / "empty.docx")
    with (
        zipfile.ZipFile(folder / "empty.docx") as empty,
        zipfile.ZipFile(folder / "a.docx", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for name in empty.namelist():
            with archive.open(name, "w", force_zip64=True) as file:
                head, mark, tail = empty.read(name).partition(b"<w:body>")
                file.write(head + mark)
                for _ in range(80 if mark else 0):
                    file.write(b"<w:p><w:r/></w:p>" * 100_000)
                file.write(tail)
    (folder / "empty.docx").unlink()
    return folder / "a.docx"


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# name -> (the file, words of the refusal; None: it is read)
BOMBS: dict[str, tuple[Callable[[Path], Path], str | None]] = {
    "bz2 in zip": (in_zip(zipfile.ZIP_BZIP2), None),
    "LZMA in zip": (in_zip(zipfile.ZIP_LZMA), None),
    "deflate in zip": (in_zip(zipfile.ZIP_DEFLATED), None),
    "LZMA in zip, dictionary of 4 GB": (large_dictionary_in_zip, "emory usage limit"),
    "zip of many members": (many_members, "table of members"),
    **{
        f"empty streams, {suffix}": (empty_streams(suffix), "empty streams")
        for suffix in (".gz", ".bz2", ".xz", ".zst")
    },
    "zstd with a window of 2 GB": (large_window, "not readable as zstd"),
    "JSON line of text": (json_line('{"text": "…a…"}'), "characters"),
    "JSON line of emoji": (json_line('{"text": "…😀…"}'), "characters"),
    "JSON line of lists": (json_line('{"text": "b", "a": [[]…,[]…]}'), "characters"),
    "JSON line within the limit": (json_line('{"text": "b", "a": [[]…,[]…]}', (1 << 24) - (1 << 16)), None),
    "JSON line of emoji within the limit": (json_line('{"text": "…😀…"}', (1 << 24) - (1 << 16)), None),
    "JSON line of depth": (json_line('{"text": "b", "a": …[…', 1 << 20), "not JSON"),
    "JSON line of a long number": (json_line('{"text": "b", "a": …1…}', 1 << 20), "not JSON"),
    "parquet, one value many times": (parquet(one_value_many_times), None),
    "parquet, long values": (parquet(long_values, use_dictionary=False, data_page_size=1), None),
    "parquet, long values shortened by their prefix": (
        parquet(
            lambda: long_values(5), use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY", **ONE_PAGE
        ),
        None,
    ),
    "parquet, a large page": (
        parquet(lambda: long_values(20), use_dictionary=False, data_page_size=1 << 30, write_batch_size=20),
        "smaller pages",
    ),
    "parquet, a large dictionary": (
        parquet(lambda: one_value_many_times(2, 200 << 20), dictionary_pagesize_limit=1 << 30),
        "smaller pages",
    ),
    "parquet, a long list": (parquet(long_lists), "not text"),
    "parquet, a deep schema": (parquet(deep_schema), "parquet"),
    "parquet, a large footer": (lying_footer, "table of its row groups"),
    "arrow, a long value": (arrow(one_long_value), "batch of its rows"),
    "arrow, a long value compressed": (arrow(one_long_value, "zstd"), "batch of its rows"),
    "arrow, one value many times": (arrow(one_value_many_times), None),
    "arrow, a long list": (arrow(long_lists), "not text"),
    "arrow, offsets out of bounds": (wild_offsets, "readable as arrow"),
    "csv, a quote that is not closed": (long_row("a.csv.gz", "id,text\n1,\"", "text\n"), "close its quotes"),
    "csv, a row of fields over lines": (long_row("a.csv.gz", "id,text\n\"a", "\n\",\"b"), "close its quotes"),
    "csv, a line of fields": (long_row("a.csv.gz", "id,text\n", "ab,"), "close its quotes"),
    "lines, one that is long": (long_row("a.txt.gz", "", "text "), None),
    "tar, long names": (tar_of((tar_header(b"a", 1 << 33, b"L"), 1), (bytes(512), 1 << 19)), "tar"),
    "tar, attributes": (tar_of((tar_header(b"a", 1 << 33, b"x"), 1), (b"9 abc=d\n" * 64, 1 << 19)), "tar"),
    "tar, headers of headers": (tar_of((tar_header(b"a", 512, b"L") + bytes(512), 1 << 17)), "tar"),
    "tar, many members": (
        tar_of((tar_header(b"a", 0, b"0"), 1 << 16), (bytes(1024), 1)),
        "no readable file",
    ),
    "zip, members that overlap": (overlapping, "overlap"),
    "pdf, a page of operators": (pdf_stream(b"BT (x) Tj ET q Q\n", 4_000_000), "pdf"),
    "pdf, a page that unpacks to 200 MB": (pdf_stream(b"q" * 1000, 200_000), "pdf"),
    "docx, many elements": (word_file, "docx"),
}  # fmt: skip


HEAVY = {
    name
    for name in BOMBS
    if name.startswith(("arrow, a long v", "arrow, one", "docx", "csv, a row", "tar, m", "pdf, a page of"))
}


def read_source(path: Path) -> None:
    from hf_genlm.config.recipe import CorpusRecipe
    from hf_genlm.text.corpus import read_documents

    read_documents([str(path)], CorpusRecipe())


def read_text(path: Path) -> None:
    """Read a source, and hand it out as the tokenizer's training and both ways of encoding take it."""
    from hf_genlm.config.recipe import CorpusRecipe
    from hf_genlm.text.corpus import read_documents
    from hf_genlm.text.encoding import UNCUT, pieces
    from hf_genlm.text.tokenizer import sample_evenly

    documents, _ = read_documents([str(path)], CorpusRecipe())
    longest = [max(map(len, texts)) for texts in (
        sample_evenly(documents, 50_000_000),
        *((piece for _, piece in pieces(documents, can_cut)) for can_cut in (True, False)),
    )]  # fmt: skip
    assert max(longest) <= 2 * UNCUT, longest


def memory_mb(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) // 1024  # type: ignore[index]


def in_child(function: Callable[[], object]) -> tuple[int, str]:
    """(MB of memory that a call takes at most, the error or "") in a process of its own, on Linux."""
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        outcome, before = "", memory_mb("VmRSS")
        try:
            function()
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
            if type(error).__name__ not in ("Damage", "UserError", "NoSource", "NoRoom"):
                traceback.print_exc()
        taken = memory_mb("VmHWM") - before
        os.write(sink, json.dumps([taken, outcome[:2000]]).encode())
        os._exit(0)
    os.close(sink)
    with os.fdopen(source, "rb") as answer:
        content = answer.read()
    os.waitpid(child, 0)
    return tuple(json.loads(content)) if content else (0, f"did not end in {LIMIT_S} s")


def measure(
    write: Callable[[Path], Path], folder: Path, read: Callable[[Path], None] = read_source
) -> tuple[int, str]:
    """`in_child` of reading what `write` writes into an empty folder."""

    def bounded() -> None:
        signal.alarm(LIMIT_S)
        most = MOST_MEMORY + memory_mb("VmSize") * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        (path,) = folder.iterdir()
        read(path)

    _, fault = in_child(lambda: write(folder))
    assert not fault, fault
    try:
        return in_child(bounded)
    finally:
        for path in folder.iterdir():
            path.unlink()


def main(megabytes: int) -> None:
    print(f"| input, {megabytes} MB of text unpacked | memory taken, MB | outcome |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for script in SCRIPTS:
            for suffix in COMPRESSIONS:
                row(
                    f"{script} {suffix}", *measure(a_text(script, suffix, megabytes << 20), folder, read_text)
                )
        for case, (write, _) in BOMBS.items():
            row(case, *measure(write, folder))


def row(case: str, peak: int, outcome: str) -> None:
    print(f"| {case} | {peak:,} | {outcome[-120:] or 'read'} |", flush=True)


if __name__ == "__main__":
    import hf_genlm.cli  # noqa: F401  without the model

    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
