"""Promise: the formats in which people of the field keep text are read, or refused with a remedy."""

import json

import pytest
from support.corpora import complaint, parquet_of, read, texts, write, zipped

from hf_genlm.config.recipe import CorpusRecipe
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
    path = write(tmp_path / "d.parquet", parquet_of({"id": ["1"], "messages": [CHAT]}))
    assert "to_json" in complaint(path)
    message = complaint(write(tmp_path / "a.jsonl", lines_of({"id": "1", "n": 2, "story": "long " * 9})))
    assert "text_column=story" in message
    assert "none of its fields is text" in complaint(write(tmp_path / "b.jsonl", '{"n": 2}'))


# archives and windows


def test_a_zip_of_one_file_made_by_finder_is_that_file(tmp_path):
    junk = (("__MACOSX/._a.txt", b"\0\5"), ("._a.txt", b"\0\5"), (".DS_Store", b"\0\0\0\1Bud1"))
    for name in ("novel.txt.zip", "novel.zip"):
        path = write(tmp_path / name, zipped(("texts/", b""), ("texts/novel.txt", b"the novel"), *junk))
        assert texts(read(path)[0]) == ["the novel"]
    assert "holds 0 members" in complaint(write(tmp_path / "b.txt.zip", zipped(*junk)))


def test_a_long_window_of_zstd_is_refused_with_the_command_that_unpacks_it(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=31)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = write(tmp_path / "a.jsonl.zst", packer.compress(b'{"text": "a post"}\n') + packer.flush())
    assert "zstd -d --long=31" in complaint(path)
