"""Promise: the formats in which people of the field keep text are read, or refused with a remedy."""

import csv
import gzip
import io
import json
import tarfile

import pytest
import zstandard
from support.corpora import complaint, parquet_of, read, tar_of, texts, write, zipped

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.text import formats, records
from hf_genlm.text.locating import as_sources
from hf_genlm.text.streaming import open_stream

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, what is it?"}]
AS_TEXT = "\ufdd0user\nHi\ufdd0assistant\nHello, what is it?"


def lines_of(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# chats


@pytest.mark.parametrize(
    "record",
    [
        {"id": "1", "messages": CHAT},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": CHAT[1]["content"]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, CHAT[1]]},
    ],
    ids=["OpenAI", "ShareGPT", "parts"],
)
def test_a_chat_is_a_document_of_turns(tmp_path, record):
    path = write(tmp_path / "chats.jsonl", lines_of(record, {"text": "plain"}))
    assert texts(read(path)[0]) == [AS_TEXT, "plain"]
    stream = open_stream(CorpusRecipe(sources=[str(path)], stream=True))
    assert ["".join(parts) for parts, _ in stream.shards[0].texts(None)] == [AS_TEXT, "plain"]
    (field,) = {"messages", "conversations"} & set(record)
    assert texts(read(path, text_column=field, damaged="skip")[0]) == [AS_TEXT]


ROWS = {
    "OpenAI": [{"messages": CHAT}, {"messages": [{**CHAT[0], "name": "Ann"}, *CHAT, {"role": "user"}]}],
    "ShareGPT": [{"conversations": [{"from": "gpt", "value": f"answer {i}"}]} for i in range(2)],
    "parts": [
        {"messages": [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in CHAT]}
    ],
    "stated": [{"dialog": CHAT, "id": "1"}],
    "large": [{"messages": CHAT * (10 + i)} for i in range(300)],
}


@pytest.mark.parametrize("form", ROWS)
def test_rows_of_tables_and_of_python_are_the_chats_of_json_lines(tmp_path, form):
    """The same documents, so the same token ids."""
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    rows = ROWS[form]
    fields = {"text_column": "dialog"} if form == "stated" else {}
    wanted = read(write(tmp_path / "a.jsonl", lines_of(*rows)), **fields)[0]
    assert wanted.is_chat.all()
    assert len(wanted) == len(rows)
    table, data = pa.Table.from_pylist(rows), datasets.Dataset.from_list(rows)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100, compression="zstd")
    parquet.write_table(table, tmp_path / "b.parquet", use_dictionary=False, data_page_version="2.0")
    data.save_to_disk(tmp_path / "saved")
    column = fields.get("text_column", "text")
    with as_sources(rows, column) as given, as_sources(data, column) as of_data:
        for source in (*(tmp_path / name for name in ("a.parquet", "b.parquet", "saved")), *given, *of_data):
            documents, report = read(source, **fields)
            assert texts(documents) == texts(wanted), source
            assert (documents.is_chat.all(), report["chats"]) == (True, len(rows))


def test_a_row_that_is_no_chat_is_damage_with_its_number(tmp_path):
    silent, other = [{"role": "bot", "content": "Hi"}], [{"role": "assistant", "content": None}]
    path = write(tmp_path / "a.parquet", parquet_of({"messages": [CHAT, silent, None, CHAT, other]}))
    assert "row 2' is a chat in which no message" in complaint(path)
    documents, report = read(path, damaged="skip")
    assert texts(documents) == [AS_TEXT, AS_TEXT]
    assert [place["row"] for place in report["damaged"]["places"]] == [2, 5]
    assert report["empty_skipped"] == 1
    for values in ([[1]], [[{"a": "b"}]], [[{"role": 1, "content": "a"}]]):
        path = write(tmp_path / "b.parquet", parquet_of({"messages": values, "body": ["the text"]}))
        assert "'messages'" in complaint(path)
    with (
        pytest.raises(UserError, match="item 1 of the texts has no text in 'text'"),
        as_sources([{"messages": CHAT}, {}]),
    ):
        pass


def test_a_chat_without_an_answer_is_damage(tmp_path):
    path = write(tmp_path / "a.jsonl", lines_of({"messages": [{"role": "bot", "content": "Hi"}]}))
    assert "roles: 'bot'" in complaint(path)


@pytest.mark.parametrize("messages", ["[1]", [], [1], ["a"], [{"role": "user", "content": 1}], {"role": "a"}])
def test_messages_of_another_form_are_damage(tmp_path, messages):
    message = complaint(write(tmp_path / "a.jsonl", lines_of({"messages": messages})))
    assert "line 1" in message
    assert "'messages'" in message


def test_a_text_column_that_was_stated_is_not_replaced_by_a_chat(tmp_path):
    path = write(tmp_path / "a.jsonl", lines_of({"messages": CHAT, "id": "1", "body": "the text"}))
    assert "text_column=body" in complaint(path, text_column="content")


# a line as a document


def test_a_line_is_a_document(tmp_path):
    path = write(tmp_path / "names.txt", "\ufeffAnna\r\nBerta\r\n\r\n  Carl Otto \n\nDora")
    wanted = ["Anna", "Berta", "  Carl Otto ", "Dora"]
    assert texts(read(path, documents="lines")[0]) == wanted
    assert len(read(path)[0]) == 1
    stream = open_stream(CorpusRecipe(sources=[str(path)], stream=True, documents="lines"))
    assert ["".join(parts) for parts, _ in stream.shards[0].texts(2)] == wanted[2:]
    path = write(tmp_path / "long.txt", "CCO\n" + "C" * (17 << 20) + "\nCCN")
    assert "line 2' has more than" in complaint(path, documents="lines")
    assert texts(read(path, documents="lines", damaged="skip")[0]) == ["CCO", "CCN"]
    assert len(complaint(write(tmp_path / "latin.txt", b"caf\xe9\n"), documents="lines"))


# fields of parquet


def test_a_remedy_names_a_field_of_text(tmp_path):
    lists = {"id": ["1"], "n": [1], "text": [["a", "b"]], "meta": [{"url": "u", "body": "the body"}]}
    path = write(tmp_path / "a.parquet", parquet_of(lists))
    message = complaint(path)
    assert "field 'text' is list<" in message
    assert "--set corpus.text_column=meta.body" in message
    assert texts(read(path, text_column="meta.body")[0]) == ["the body"]
    path = write(tmp_path / "b.parquet", parquet_of({"n": [1], "meta": [{"url": ["u"]}]}))
    assert "none of its fields is text" in complaint(path)
    path = write(
        tmp_path / "c.parquet",
        parquet_of(
            {
                "n": [1],
                "m": [
                    {"a": {"b": "x"}},
                ][:1],
            }
        ),
    )
    assert "text_column=m.a.b" in complaint(path)
    assert texts(read(path, text_column="m.a.b")[0]) == ["x"]
    message = complaint(write(tmp_path / "a.jsonl", lines_of({"id": "1", "n": 2, "story": "long " * 9})))
    assert "text_column=story" in message
    assert "none of its fields is text" in complaint(write(tmp_path / "b.jsonl", '{"n": 2}'))


# tables


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "excel.csv", "stated.csv", "a.csv.gz", "bom.csv"])
def test_the_text_column_of_a_table_is_read(tmp_path, name):
    wanted = ["one, two", 'she said "hi"', "a line\nand another", "caf\u00e9; au lait", "last"]
    delimiter = {"a.tsv": "\t", "excel.csv": ";", "stated.csv": "|"}.get(name, ",")
    buffer = io.StringIO(newline="")
    rows = csv.writer(buffer, delimiter=delimiter)
    rows.writerows([["id", "text", "more"], *([i, text, ""] for i, text in enumerate(wanted))])
    content = buffer.getvalue().replace('last"', "last").encode()
    content = {"stated.csv": b"sep=|\r\n" + content, "bom.csv": b"\xef\xbb\xbf" + content}.get(name, content)
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert texts(read(path)[0]) == wanted
    assert texts(read(path, text_column="id")[0]) == list("01234")
    stream = open_stream(CorpusRecipe(sources=[str(path)], stream=True))
    assert ["".join(parts) for parts, _ in stream.shards[0].texts(3)] == wanted[3:]


def test_rows_of_a_table_that_do_not_fit_are_told_with_their_line(tmp_path):
    path = write(tmp_path / "a.csv", 'id,text\n1,one\n2,two, and three\n\n3,"torn" text\n4,four\n5\n6,six\n')
    assert "line 3' has 3 fields" in complaint(path)
    documents, report = read(path, damaged="skip")
    assert texts(documents) == ["one", "four", "six"]
    assert [place["line"] for place in report["damaged"]["places"]] == [3, 5, 7]
    assert "text_column=story" in complaint(write(tmp_path / "b.csv", "id,story\n1,a\n"))
    message = complaint(write(tmp_path / "open.csv", 'id,text\n1,one\n2,"two\n3,three\n'), damaged="skip")
    assert "from line 3 on" in message
    message = complaint(write(tmp_path / "chat.csv", 'id,messages\n1,"[{""role"": ""user""}]"\n'))
    assert "'messages' is str" in message
    assert "utf-8" in complaint(write(tmp_path / "latin.csv", b"id,text\n1,caf\xe9\n"), damaged="skip")


def test_arrow_of_both_kinds_is_read(tmp_path):
    import pyarrow as pa

    values = ["one", None, "two", "", "three " * 1000]
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"id": range(5), "text": pa.array(values, pa.string()).cast(kind)})
        for new, packed in ((pa.ipc.new_stream, None), (pa.ipc.new_file, None), (pa.ipc.new_file, "zstd")):
            sink = io.BytesIO()
            with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=packed)) as writer:
                writer.write_table(table, max_chunksize=2)
            for name in ("a.arrow", "a.arrow.gz"):
                content = gzip.compress(sink.getvalue(), 1) if name.endswith(".gz") else sink.getvalue()
                documents, report = read(write(tmp_path / name, content))
                assert texts(documents) == ["one", "two", "three " * 1000]
                assert report["empty_skipped"] == 2
    for cut in (9, 60, len(sink.getvalue()) // 2):
        assert "readable as arrow" in complaint(write(tmp_path / "cut.arrow", sink.getvalue()[:cut]))


@pytest.mark.parametrize("packed", [None, "lz4"])
@pytest.mark.parametrize("is_dictionary", [False, True])
def test_a_batch_of_arrow_too_large_to_hold_is_refused(tmp_path, monkeypatch, packed, is_dictionary):
    import pyarrow as pa

    column = pa.array([f"{i} words of a text" for i in range(4)])
    large = pa.array(["large " * 1000])
    values = pa.concat_arrays([column, large])
    column, values = (each.dictionary_encode() if is_dictionary else each for each in (column, values))
    for rows, is_refused in ((column, False), (values, True)):
        sink = io.BytesIO()
        options = pa.ipc.IpcWriteOptions(compression=packed)
        with pa.ipc.new_file(sink, pa.schema([("text", rows.type)]), options=options) as writer:
            writer.write_table(pa.table({"text": rows}))
        path = write(tmp_path / "a.arrow", sink.getvalue())
        monkeypatch.setattr(records, "_MAX_BATCH", 5000)
        assert len(sink.getvalue()) < 5000 or not packed
        if is_refused:
            assert "more than 5,000" in complaint(path)
        else:
            assert len(read(path)[0]) == 4


def test_a_saved_data_set_is_read(tmp_path):
    import datasets

    lines = [f"document {i}" for i in range(30)]
    data = datasets.Dataset.from_dict({"text": lines})
    datasets.DatasetDict({"a": data, "b": data.map(lambda row: {"text": row["text"].upper()})}).save_to_disk(
        tmp_path / "saved"
    )
    saved = datasets.load_from_disk(tmp_path / "saved")["a"]
    saved.map(lambda row: {"text": "of a cache"})
    assert list((tmp_path / "saved/a").glob("cache-*.arrow"))
    documents, report = read(tmp_path / "saved")
    assert texts(documents) == lines + [line.upper() for line in lines]
    assert [file["documents"] for file in report["files"]] == [30, 30]


# documents


def pdf_of(*pages: str) -> bytes:
    """A PDF of a line a page, without compression."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for i, page in enumerate(pages):
        drawn = f"BT /F1 12 Tf 72 700 Td ({page}) Tj ET" if page else ""
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents {5 + 2 * i} 0 R"
            "/Resources<</Font<</F1 3 0 R>>>>>>"
        )
        objects.append(f"<</Length {len(drawn)}>>stream\n{drawn}\nendstream")
    content = b"%PDF-1.4\n"
    places = []
    for number, each in enumerate(objects, start=1):
        places.append(len(content))
        content += f"{number} 0 obj\n{each}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"trailer<</Size {len(objects) + 1}/Root 1 0 R>>\nstartxref\n{len(content)}\n%%EOF"
    return content + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}".encode() + end.encode()


def test_pdf_and_word_files_are_read_by_a_library(tmp_path, monkeypatch):
    docx = pytest.importorskip("docx")
    pytest.importorskip("pypdf")
    (tmp_path / "papers").mkdir()
    write(tmp_path / "papers/a.pdf", pdf_of("The first page", "The second page"))
    document = docx.Document()
    document.add_paragraph("Before a table")
    document.add_table(1, 2).rows[0].cells[1].text = "in a cell"
    document.add_paragraph("behind it")
    document.save(tmp_path / "papers/b.docx")
    write(tmp_path / "papers/c.pdf.gz", gzip.compress(pdf_of("Compressed")))
    for name in ("pypdf.py", "logging.py"):  # of the folder where the command is called
        write(tmp_path / name, "raise SystemExit")
    monkeypatch.chdir(tmp_path)
    documents, _ = read("papers")
    assert texts(documents) == [
        "The first page\nThe second page\n", "Before a table\n\tin a cell\nbehind it\n", "Compressed\n",
    ]  # fmt: skip
    assert "holds no text" in complaint(write(tmp_path / "scan.pdf", pdf_of("")))
    assert "not readable as .pdf" in complaint(write(tmp_path / "bad.pdf", b"%PDF-1.4 and no more"))
    assert "not readable as .docx" in complaint(write(tmp_path / "bad.docx", b"PK no more"))
    write(tmp_path / "papers/notes.txt", "only the notes")  # as before there were other formats
    documents, report = read("papers")
    assert texts(documents) == ["only the notes"]
    assert report["files_skipped"] == 3
    assert texts(read("papers/*.docx")[0]) == ["Before a table\n\tin a cell\nbehind it\n"]
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    assert "pip install" in complaint(tmp_path / "papers/a.pdf")


# archives


FILES = (
    ("texts/a.txt", b"text a"),
    ("texts/b.jsonl", b'{"text": "b1"}\n{"text": "b2"}\n'),
    ("texts/c.txt.gz", gzip.compress(b"text c")),
    ("texts/d.parquet", parquet_of({"text": ["d1", "d2"]})),
    ("__MACOSX/texts/._a.txt", b"\0\5\x16\7"),
    ("texts/._a.txt", b"\0\5\x16\7"),
    ("texts/.DS_Store", b"\0\0\0\1Bud1"),
    ("texts/picture.png", b"\x89PNG"),
    ("../../texts/e.md", b"text e"),
)
OF_FILES = ["text a", "b1", "b2", "text c", "d1", "d2", "text e"]


def test_archives_of_several_files_are_read(tmp_path):
    archives = {"a.zip": zipped(*FILES)}
    archives |= {f"a.tar{s}": tar_of(*FILES, mode=f"w:{s[1:]}") for s in ("", ".gz", ".bz2", ".xz")}
    archives |= {"a.tgz": archives["a.tar.gz"], "a.txz": archives["a.tar.xz"]}
    archives["a.tar.zst"] = zstandard.ZstdCompressor().compress(archives["a.tar"])
    for name, content in archives.items():
        path = write(tmp_path / name, content)
        documents, report = read(path)
        assert texts(documents) == OF_FILES, name
        assert report["files_skipped"] == 1
        stream = open_stream(CorpusRecipe(sources=[str(path)], stream=True))
        assert ["".join(parts) for parts, _ in stream.shards[0].texts(2)] == OF_FILES[2:]
    folder = tmp_path / "data"
    write(folder / "a.txt", "in the folder")
    write(folder / "a.tar", archives["a.tar"])  # perhaps of these very texts
    assert texts(read(folder)[0]) == ["in the folder"]


def test_a_zip_of_one_file_made_by_finder_is_that_file(tmp_path):
    junk = FILES[4:7]
    for name in ("novel.txt.zip", "novel.zip"):
        path = write(tmp_path / name, zipped(("novel.txt", b"the novel"), *junk))
        assert texts(read(path)[0]) == ["the novel"]
    assert texts(read(write(tmp_path / "b.zip", zipped(("README", b"no suffix"), *junk)))[0]) == ["no suffix"]
    assert "no readable file" in complaint(write(tmp_path / "c.zip", zipped(("a.png", b"1"), ("b", b"2"))))
    assert "no readable file" in complaint(write(tmp_path / "d.zip", zipped(*junk)))
    assert "no readable file" in complaint(write(tmp_path / "e.zip", zipped(("a.zip", zipped(*FILES)))))
    assert "name it .zip" in complaint(write(tmp_path / "f.txt.zip", zipped(*FILES)))


def test_no_link_or_device_of_an_archive_is_followed(tmp_path):
    secret = write(tmp_path / "secret.txt", "of another folder")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            about = tarfile.TarInfo(f"{kind!r}.txt")
            about.type, about.linkname = kind, str(secret)
            archive.addfile(about)
        about = tarfile.TarInfo("good.txt")
        about.size = 4
        archive.addfile(about, io.BytesIO(b"good"))
    assert texts(read(write(tmp_path / "a.tar", buffer.getvalue()))[0]) == ["good"]


def test_damaged_archives_are_not_read_in_part(tmp_path):
    many = [(f"{i}.txt", b"text %d" % i * 300) for i in range(20)]
    whole = tar_of(*many)
    for cut in (300, 1024, len(whole) // 2, whole.rindex(b"ustar") - 257):
        assert "not readable as tar" in complaint(write(tmp_path / "a.tar", whole[:cut]))
    changed = bytearray(whole)
    changed[whole.rindex(b"ustar") - 200] ^= 1  # in the header of the last member
    assert "not readable as tar" in complaint(write(tmp_path / "a.tar", bytes(changed)))
    assert "mark of its end" in complaint(write(tmp_path / "a.tar", whole + whole))
    assert "gzip" in complaint(write(tmp_path / "a.tar.gz", gzip.compress(whole)[:-4]))
    changed = bytearray(zipped(*FILES))
    changed[changed.index(b"text e")] ^= 1
    assert "checksum" in complaint(write(tmp_path / "a.zip", bytes(changed)))


def test_a_long_window_is_read_where_the_recipe_allows_it(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=31)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = write(tmp_path / "a.jsonl.zst", packer.compress(b'{"text": "a post"}\n') + packer.flush())
    message = complaint(path)
    assert "--set corpus.unpack_memory_mb=2048" in message
    assert texts(read(path, unpack_memory_mb=2048)[0]) == ["a post"]
