"""Promise: a stream gives the rows of a text in memory, and goes on at any row as if nothing had been."""

import dataclasses
import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from accelerate.data_loader import prepare_data_loader
from pyarrow import parquet
from support.streams import lanes, text_of, write_files_of_every_kind, write_jsonl
from torch.utils.data import DataLoader

from hf_genlm.config.recipe import CorpusRecipe, TokenizerRecipe, load_recipe
from hf_genlm.errors import UserError
from hf_genlm.text.corpus import read_documents
from hf_genlm.text.encoding import encode_documents
from hf_genlm.text.packed_stream import PackedStream
from hf_genlm.text.packing import PackedRows, collate
from hf_genlm.text.store import Document
from hf_genlm.text.streaming import HeldOut, hold_out, open_stream, read_stream, sample
from hf_genlm.text.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    write_files_of_every_kind(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    documents = [Document(text_of(seed, 100), "x") for seed in range(20)]
    return train_tokenizer(documents, TokenizerRecipe(vocab_size=300), 10_000)


SMALL_BATCH = 200  # characters: many places to resume from, instead of one per megabyte


def taken(stream, count: int) -> list[dict]:
    return list(itertools.islice(stream, count))


def assert_same_rows(rows, others) -> None:
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            assert row[name].dtype == other[name].dtype
            assert np.array_equal(row[name], other[name])


def rows_in_memory(recipe, tokenizer, max_seq_length) -> PackedRows:
    documents, _ = read_documents(recipe.sources, recipe)
    encoded = encode_documents(tokenizer, documents)
    return PackedRows(encoded, max_seq_length, tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize("max_seq_length", [2, 33, 257])
def test_rows_are_those_of_a_text_in_memory(max_seq_length, folder, tokenizer):
    """Two passes, the padded row at the end of each."""
    recipe = CorpusRecipe(sources=[str(folder / "a.jsonl"), str(folder)])  # the first is met twice
    if max_seq_length == 2:
        recipe.sources = [str(folder / name) for name in ("a.jsonl", "d.parquet", "e.md")]
    rows = rows_in_memory(recipe, tokenizer, max_seq_length)
    stream = PackedStream(open_stream(recipe), tokenizer, max_seq_length)
    expected = [rows[i] for i in range(len(rows))]
    assert_same_rows(taken(stream, 2 * len(rows)), expected * 2)
    assert stream.first_tokens(10**9).tolist() == rows.first_tokens(10**9).tolist()
    assert stream.first_tokens(rows.n_targets).tolist() == rows.first_tokens(rows.n_targets).tolist()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_the_tokens_to_count_are_of_all_of_a_stream(tmp_path, tokenizer, name):
    """Of two sources in one file, one behind the other, unless its middle cannot be reached."""
    words = ["river " * 9 + "\n"] * 3000 + ["tower " * 9 + "\n"] * 3000
    content = "".join(
        json.dumps({"text": word}) + "\n" if "json" in name else word for word in words
    ).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    recipe = CorpusRecipe(sources=[str(path)])
    stream, untouched = (PackedStream(open_stream(recipe), tokenizer, 33, 5, batch=4000) for _ in range(2))
    before = taken(stream, 3)
    found = stream.first_tokens(20_000)
    assert len(found) <= 20_000
    first, second = (tokenizer.decode(half.tolist()) for half in (found[:9_600], found[10_400:]))
    assert ("river" in first, "tower" in first) == (True, False)
    assert ("river" in second, "tower" in second) == (name.endswith("gz"), not name.endswith("gz"))
    assert len(found) > 15_000
    assert_same_rows([*before, *taken(stream, 10)], [*taken(untouched, 3), *taken(untouched, 10)])


def test_rows_in_small_batches(folder, tokenizer):
    """As above, where a batch ends nearly everywhere."""
    recipe = CorpusRecipe(sources=[str(folder / name) for name in ("a.jsonl", "d.parquet", "e.md")])
    rows = rows_in_memory(recipe, tokenizer, 33)
    stream = PackedStream(open_stream(recipe), tokenizer, 33, batch=SMALL_BATCH)
    assert_same_rows(taken(stream, len(rows)), [rows[i] for i in range(len(rows))])


def test_a_tokenizer_that_is_not_cut(folder, tokenizer):
    """Another pre-tokenizer: long texts are encoded whole."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    recipe = CorpusRecipe(sources=[str(folder / name) for name in ("a.jsonl", "b.txt", "e.md")])
    rows = rows_in_memory(recipe, other, 65)
    stream = PackedStream(open_stream(recipe), other, 65)
    assert not stream._encoder.can_cut
    assert_same_rows(taken(stream, len(rows)), [rows[i] for i in range(len(rows))])


def test_shuffled_blocks_are_those_rows_in_another_order(folder, tokenizer):
    recipe = CorpusRecipe(sources=[str(folder / "a.jsonl")])
    rows = rows_in_memory(recipe, tokenizer, 17)
    assert len(rows) > 25
    assert len(rows) % 10

    def ids(stream, count):
        return [tuple(row["input_ids"]) for row in taken(stream, count)]

    ordered = [tuple(rows[i]["input_ids"]) for i in range(len(rows))]
    shuffled = ids(PackedStream(open_stream(recipe), tokenizer, 17, 10, seed=3), 2 * len(rows))
    first, second = shuffled[: len(rows)], shuffled[len(rows) :]
    for begin in range(0, len(rows), 10):
        block = slice(begin, begin + 10)  # the last one is shorter, and ends with the pass
        assert sorted(first[block]) == sorted(second[block]) == sorted(ordered[block])
    assert first != ordered
    assert first != second
    assert first == ids(PackedStream(open_stream(recipe), tokenizer, 17, 10, seed=3), len(rows))
    assert first != ids(PackedStream(open_stream(recipe), tokenizer, 17, 10, seed=4), len(rows))


@pytest.mark.parametrize("shuffle_buffer", [0, 1, 16, 1000])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_stream_goes_on_at_any_row(shuffle_buffer, is_mixed, tmp_path, tokenizer):
    recipe = lanes(tmp_path)
    if not is_mixed:
        recipe.weights = None

    def opened():
        return PackedStream(open_stream(recipe), tokenizer, 9, shuffle_buffer, seed=1, batch=SMALL_BATCH)

    undisturbed = opened()
    rows = taken(undisturbed, 3000)  # several passes
    for n in [0, 1, 15, 16, 17, *range(40, 2900, 571)]:
        state = json.loads(json.dumps(undisturbed.state_after(n)))
        again = opened()
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert_same_rows(taken(again, 60), rows[n : n + 60])
        # and from there, by the state behind what was given out
        third = opened()
        third.load_state_dict(again.state_dict())
        assert_same_rows(taken(third, 20), rows[n + 60 : n + 80])


def test_a_stream_goes_on_inside_a_long_text(folder, tokenizer):
    recipe = CorpusRecipe(sources=[str(folder / "b.txt"), str(folder / "e.md")])
    undisturbed = PackedStream(open_stream(recipe), tokenizer, 129, 8, batch=1 << 16)
    rows = taken(undisturbed, 5000)
    states = [undisturbed.state_after(n) for n in (1500, 3001, 4444)]
    assert any(state["mark"]["place"]["documents"]["pieces"] for state in states)
    for state in states:
        again = PackedStream(open_stream(recipe), tokenizer, 129, 8, batch=1 << 16)
        again.load_state_dict(state)
        assert_same_rows(taken(again, 50), rows[state["rows"] : state["rows"] + 50])


def test_old_states_are_forgotten_and_the_others_stay_small(tmp_path, tokenizer):
    stream = PackedStream(open_stream(lanes(tmp_path)), tokenizer, 9, batch=SMALL_BATCH, max_remembered=100)
    for _ in taken(stream, 5000):
        assert len(stream._marks) < 50
    assert len(json.dumps(stream.state_after(4900))) < 2000


def test_a_state_of_other_rows_is_refused(tmp_path, tokenizer):
    recipe = lanes(tmp_path)
    stream = PackedStream(open_stream(recipe), tokenizer, 9, 4)
    state = stream.state_dict()
    with pytest.raises(UserError, match=r"another max seq length \(9, now 10\)"):
        PackedStream(open_stream(recipe), tokenizer, 10, 4).load_state_dict(state)
    with pytest.raises(UserError, match="another shuffle buffer"):
        PackedStream(open_stream(recipe), tokenizer, 9, 5).load_state_dict(state)
    old = {**state, "of": {**state["of"], "text": stream.documents.sha256}}
    PackedStream(open_stream(recipe), tokenizer, 9, 4).load_state_dict(old)  # by names, as once
    write_jsonl(tmp_path / "two.jsonl", range(4))
    with pytest.raises(UserError, match="another text"):
        PackedStream(open_stream(recipe), tokenizer, 9, 4).load_state_dict(state)


def test_a_mixture_keeps_its_shares_of_the_text(tmp_path):
    """At every document, each source has what its weight says, but for a document."""
    recipe = lanes(tmp_path)
    walk = open_stream(recipe).walk()
    longest = max(len(text_of(seed, 1 + seed % 30)) for seed in range(400))
    seen = set()
    for parts in itertools.islice(walk.texts(), 1000):
        seen.add("".join(parts))
        shares = np.array([lane["taken"] for lane in walk.position["lanes"]])
        wanted = shares.sum() * np.array(recipe.weights) / sum(recipe.weights)
        assert (abs(shares - wanted) <= longest).all()
    assert {text_of(seed, 1 + seed % 30) for seed in (*range(50), *range(200, 210), *range(300, 340))} <= seen
    assert walk.passes >= 2  # each begins again by itself


@pytest.mark.parametrize("shuffle_buffer", [0, 32])
@pytest.mark.parametrize("split_batches", [False, True])
def test_processes_share_the_rows_of_one(shuffle_buffer, split_batches, tmp_path, tokenizer):
    """As Trainer prepares a loader with dispatch_batches=False: together, each step has the same rows."""
    recipe = lanes(tmp_path)

    def batches(n_processes, process, size):
        stream = PackedStream(open_stream(recipe), tokenizer, 9, shuffle_buffer, batch=SMALL_BATCH)
        loader = prepare_data_loader(
            DataLoader(stream, batch_size=size, collate_fn=collate),
            num_processes=n_processes,
            process_index=process,
            split_batches=split_batches,
            put_on_device=False,
            dispatch_batches=False,
        )
        return [batch["input_ids"].tolist() for batch in itertools.islice(loader, 40)]

    alone = batches(1, 0, 12)
    for n_processes in (2, 3):
        size = 12 if split_batches else 12 // n_processes
        parts = [batches(n_processes, process, size) for process in range(n_processes)]
        assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == alone


def texts_of_a_pass(stream) -> list[str]:
    return [
        "".join(parts)
        for parts in itertools.takewhile(lambda parts: parts is not None, stream.walk().texts())
    ]


def test_what_is_held_out_is_never_trained_on(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*range(1000, 1500), *range(1000, 1200)])  # copies among them
    recipe = CorpusRecipe(sources=[str(tmp_path)], validation_fraction=0.1, validation_bytes=3000)
    found = read_stream(recipe)
    held = [document.text for document in found.validation]
    trained = texts_of_a_pass(found.stream)
    everything = texts_of_a_pass(open_stream(recipe))
    assert len(set(held)) == len(held) > 5
    assert 1500 < found.report["validation"]["bytes"] == sum(len(text.encode()) for text in held) <= 3000
    assert not set(held) & set(trained)
    assert trained == [text for text in everything if text not in set(held)]
    assert [document.text for document in read_stream(recipe).validation] == held
    recipe.split_seed = 1
    assert [document.text for document in read_stream(recipe).validation] != held


def test_a_share_of_a_small_stream_is_held_out(tmp_path):
    seeds = range(2000, 4000)
    write_jsonl(tmp_path / "a.jsonl", seeds)
    recipe = CorpusRecipe(sources=[str(tmp_path)], validation_fraction=0.1)
    assert 150 < len(hold_out(open_stream(recipe), recipe)[0]) < 250  # of about 1,900 different texts
    write_jsonl(tmp_path / "a.jsonl", [11, 12])
    recipe.validation_fraction = 1e-9  # at least one
    assert len(hold_out(open_stream(recipe), recipe)[0]) == 1


def test_named_validation_files_are_left_out_of_the_stream(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", range(20))
    write_jsonl(tmp_path / "v.jsonl", range(15, 25))
    recipe = CorpusRecipe(sources=[str(tmp_path / "a.jsonl")], validation=[str(tmp_path / "v.jsonl")])
    found = read_stream(recipe)
    assert found.report["split"]["method"] == "given"
    assert len(found.validation) == 10
    assert texts_of_a_pass(found.stream) == [text_of(seed, 1 + seed % 30) for seed in range(15)]


def test_the_sample_is_bounded(folder):
    stream = open_stream(CorpusRecipe(sources=[str(folder / "a.jsonl"), str(folder / "b.txt")]))
    assert sample(stream, 500_000)[0].n_characters == pytest.approx(500_000, rel=0.01)
    short = open_stream(CorpusRecipe(sources=[str(folder / "a.jsonl")]))
    assert [document.text for document in sample(short, 500_000)[0]] == texts_of_a_pass(short)


def test_texts_are_compared_whole():
    held = HeldOut([Document("abc", "x")])
    assert held.filter(iter(["a", "b", "c"])) is None
    assert held.filter(iter([])) is None
    assert "".join(held.filter(iter(["abc", "d", "e"]))) == "abcde"
    assert "".join(held.filter(iter(["ab"]))) == "ab"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set of the Hub that is local files of two shards; what was asked for is in `asked`."""
    for number in range(2):
        write_jsonl(tmp_path / f"shard-{number}.jsonl", range(100 * number, 100 * number + 40))
    files = {"train": [str(tmp_path / f"shard-{number}.jsonl") for number in range(2)]}
    asked, load = [], datasets.load_dataset

    def load_dataset(name, config=None, **options):
        asked.append((name, config, options))
        return load("json", data_files=files, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the Hub is not asked
    return asked


def test_a_data_set_of_the_hub_is_streamed(hub, tmp_path, tokenizer):
    recipe = CorpusRecipe(sources=["owner/name:part"])
    local = CorpusRecipe(sources=[str(tmp_path / "shard-*.jsonl")])
    undisturbed = PackedStream(open_stream(recipe), tokenizer, 9, 16, batch=SMALL_BATCH)
    rows = taken(undisturbed, 700)
    assert hub
    assert all(call == ("owner/name", "part", {"streaming": True}) for call in hub)
    assert_same_rows(rows, taken(PackedStream(open_stream(local), tokenizer, 9, 16, batch=SMALL_BATCH), 700))
    assert len(hub) == 2  # the second pass
    for n in (0, 5, 123, 301, 640):
        again = PackedStream(open_stream(recipe), tokenizer, 9, 16, batch=SMALL_BATCH)
        again.load_state_dict(json.loads(json.dumps(undisturbed.state_after(n))))
        assert_same_rows(taken(again, 50), rows[n : n + 50])


def test_faults_of_a_hub_stream(hub, tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"'owner/name.* has no field 'body', it has 'text', 'id'"):
        texts_of_a_pass(open_stream(CorpusRecipe(sources=["owner/name"], text_column="body")))
    with pytest.raises(UserError, match="'owner/name, row 1' field 'id' is int, not text"):
        texts_of_a_pass(open_stream(CorpusRecipe(sources=["owner/name"], text_column="id")))
    (tmp_path / "shard-1.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(UserError, match=r"'owner/name, row 41' cannot be read \(.*check the network") as e:
        texts_of_a_pass(open_stream(CorpusRecipe(sources=["owner/name"])))
    assert "\n" not in str(e.value)


def test_a_record_that_cannot_be_read_is_named(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 5 + '{"text": 3}\n', encoding="utf-8")
    stream = PackedStream(open_stream(CorpusRecipe(sources=[str(tmp_path / "a.jsonl")])), tokenizer, 9)
    with pytest.raises(UserError, match=r"a.jsonl, line 6' field 'text' is int, not text"):
        taken(stream, 100)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": []}, "--stream needs a SOURCE"),
        ({"weights": [1.0, 2.0]}, "corpus.weights has 2 numbers for 1 sources"),
        ({"weights": [0.0]}, r"corpus.weights = \[0.0\]: it must be more than 0"),
        ({"damaged": "skip"}, "corpus.damaged = 'skip' is not for a stream"),
        ({"encoding": "utf-99"}, "corpus.encoding = 'utf-99'"),
        ({"sources": ["nowhere.txt"]}, "'nowhere.txt' does not exist"),
    ],
)
def test_recipes_that_make_no_stream(fields, message, folder):
    with pytest.raises(UserError, match=message) as e:
        read_stream(CorpusRecipe(**{"sources": [str(folder / "a.jsonl")], **fields}))
    assert "\n" not in str(e.value)


def test_streams_without_text(tmp_path, tokenizer):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty.txt' is empty"):
        texts_of_a_pass(open_stream(CorpusRecipe(sources=[str(tmp_path / "empty.txt")])))
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 9, encoding="utf-8")
    with pytest.raises(UserError, match=r"no training text was found in '.*a\.jsonl'"):
        texts_of_a_pass(open_stream(CorpusRecipe(sources=[str(tmp_path / "a.jsonl")])))
    (tmp_path / "b.txt").write_text(text_of(1, 5), encoding="utf-8")
    one = CorpusRecipe(sources=[str(tmp_path / "b.txt")])
    with pytest.raises(UserError, match=r"nothing can be held out .*--validation FILE"):
        read_stream(one)
    with pytest.raises(UserError, match=r"training.max_seq_length = 500: all the text has less than one row"):
        taken(PackedStream(open_stream(one), tokenizer, 500), 1)


def test_weights_are_numbers_of_the_recipe():
    recipe = load_recipe(None, ["corpus.weights=[0.7, 3e-1]", "corpus.stream=true"])
    assert recipe.corpus.weights == [0.7, 0.3]
    assert load_recipe(None, ["corpus.weights=2,1"]).corpus.weights == [2.0, 1.0]
    with pytest.raises(UserError, match=r"corpus.weights = \['x'\]: expected numbers"):
        load_recipe(None, ["corpus.weights=[x]"])


READER = r"""
import re, sys
import hf_genlm.cli  # the rooms of text alone, not our model
from pathlib import Path
from hf_genlm.config.recipe import CorpusRecipe, TokenizerRecipe
from hf_genlm.text.streaming import read_stream, sample
from hf_genlm.text.packed_stream import PackedStream
from hf_genlm.text.tokenizer import train_tokenizer

found = read_stream(CorpusRecipe(sources=sys.argv[1:]))
text, _ = sample(found.stream, 200_000)
tokenizer = train_tokenizer(text, TokenizerRecipe(vocab_size=300), 200_000)
stream = PackedStream(found.stream, tokenizer, 129, 4096)
n_rows = 0
for row in stream:
    n_rows += 1
    if row["labels"][-1] == -100:  # the pass is over, but for what is left of its last block
        break
status = Path("/proc/self/status").read_text()
print(n_rows, re.search(r"VmHWM:\s+(\d+) kB", status)[1])
"""


def peak_kb(paths) -> int:
    command = [sys.executable, "-c", READER, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
    n_rows, peak = map(int, done.stdout.split())
    assert n_rows > sum(path.stat().st_size for path in paths) / 129 / 8
    return peak


def assert_memory_does_not_grow(folder, small_mb: int, large_mb: int, at_most_kb: int) -> None:
    """So many megabytes of records, and as many of one document, of which nothing may stay."""
    lines = [json.dumps({"text": text_of(seed, 200)}, ensure_ascii=False) for seed in range(700)]
    peaks = []
    for n_mb in (small_mb, large_mb):
        paths = [folder / f"{n_mb}.jsonl", folder / f"{n_mb}.txt"]
        for path in paths:
            with path.open("w", encoding="utf-8") as file:
                while file.tell() < n_mb * 1_000_000:
                    file.write("\n".join(lines) + "\n")
        peaks.append(peak_kb(paths))
    print(f"peak of {2 * small_mb} and {2 * large_mb} MB: {peaks} KiB")
    assert peaks[1] - peaks[0] < at_most_kb


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read where Linux tells it")
def test_memory_does_not_grow_with_the_text(tmp_path):
    assert_memory_does_not_grow(tmp_path, 3, 15, at_most_kb=16_000)


@pytest.mark.slow
def test_memory_does_not_grow_with_a_large_text(tmp_path):
    assert_memory_does_not_grow(tmp_path, 15, 150, at_most_kb=25_000)


# a sample of all of a stream

KINDS = ("alpha", "beta", "gamma", "delta", "omega")


def write_sorted(folder, form: str) -> None:
    """Documents sorted by their kind, 1,000 of each, in one file or one of each kind."""
    from support.corpora import parquet_of

    texts = [f"{kind} {i} " + text_of(i, 6) for kind in KINDS for i in range(1000)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    if form == "a.jsonl":
        (folder / form).write_text("".join(lines), encoding="utf-8")
    elif form == "a.parquet":
        table = pa.table({"text": texts})
        parquet.write_table(table, folder / form, row_group_size=500)
    elif form == "gz":
        for i in range(len(KINDS)):
            content = "".join(lines[1000 * i : 1000 * (i + 1)]).encode()
            (folder / f"{i}.jsonl.gz").write_bytes(gzip.compress(content))
    elif form == "a.jsonl.gz":
        (folder / form).write_bytes(gzip.compress("".join(lines).encode()))
    elif form == "one group":
        (folder / "a.parquet").write_bytes(parquet_of({"text": texts}))
    else:
        (folder / "a.txt").write_text("\n".join(texts), encoding="utf-8")


def shares(documents) -> list[float]:
    text = " ".join(document.text for document in documents)
    counts = np.array([text.count(kind) for kind in KINDS])
    return (counts / counts.sum()).tolist()


@pytest.mark.parametrize("form", ["a.jsonl", "a.parquet", "gz", "a.txt"])
def test_a_sample_of_a_stream_is_taken_from_all_of_it(tmp_path, form):
    """Its beginning is of one kind alone."""
    write_sorted(tmp_path, form)
    recipe = CorpusRecipe(sources=[str(tmp_path)], validation_fraction=0.2, validation_bytes=8000)
    stream = open_stream(recipe)
    found, is_all = sample(stream, 50_000)
    assert not is_all
    assert 45_000 < found.n_characters <= 50_001
    assert max(shares(found)) < 0.3
    assert min(shares(found)) > 0.1
    assert stream.stretches()[1] == (
        [f"{tmp_path.name}/{i}.jsonl.gz" for i in range(5)] if form == "gz" else []
    )
    if form == "a.txt":  # one document
        return
    held, is_all = hold_out(stream, recipe)
    assert not is_all
    assert 4000 < held.n_bytes.sum() <= 8000
    assert min(shares(held)) > 0.05
    read = read_stream(recipe)
    trained = texts_of_a_pass(read.stream)
    assert not {document.text for document in read.validation} & set(trained)
    assert [document.text for document in held] == [document.text for document in read.validation]
    assert len(trained) + len(held) == 1000 * len(KINDS)


@pytest.mark.parametrize("form", ["a.jsonl.gz", "one group"])
def test_where_the_beginning_alone_is_reached_it_is_told(tmp_path, form):
    from hf_genlm.training.corpus import _sampling_note

    write_sorted(tmp_path, form)
    stream = open_stream(CorpusRecipe(sources=[str(tmp_path)]))
    found, is_all = sample(stream, 20_000)
    assert not is_all
    assert shares(found)[0] == 1
    assert stream.stretches()[1] == [f"{tmp_path.name}/{file.name}" for file in tmp_path.iterdir()]
    note = _sampling_note(stream)
    assert "only the beginning can be reached" in note
    assert "unpack" in note


def test_a_sample_keeps_the_weights_and_what_is_held_out(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", range(4000, 7000))
    write_jsonl(tmp_path / "b.jsonl", range(9000, 9500))
    for path, mark in ((tmp_path / "a.jsonl", "AAA "), (tmp_path / "b.jsonl", "BBB ")):
        path.write_text(
            path.read_text(encoding="utf-8").replace('"text": "', f'"text": "{mark}'), encoding="utf-8"
        )
    recipe = CorpusRecipe(sources=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], weights=[1.0, 3.0])
    held = HeldOut(document for document in sample(open_stream(recipe), 10**7)[0] if len(document.text) % 2)
    stream = dataclasses.replace(open_stream(recipe), held_out=held)
    found, is_all = sample(stream, 20_000)
    assert not is_all
    size = {mark: sum(len(d.text) for d in found if d.text.startswith(mark)) for mark in ("AAA", "BBB")}
    assert size["BBB"] / size["AAA"] == pytest.approx(3, rel=0.15)
    cut = 2  # the last text of a stretch may be cut
    assert sum(document.text in held for document in found) <= cut


def test_a_data_set_of_the_hub_is_sampled_by_its_files(hub, tmp_path):
    recipe = CorpusRecipe(sources=["owner/name"])
    both = [len(text_of(seed, 1 + seed % 30)) for seed in (*range(40), *range(100, 140))]
    found, is_all = sample(open_stream(recipe), sum(both) // 3)
    assert not is_all
    texts = {document.text for document in found}
    assert {text_of(3, 4), text_of(103, 14)} <= texts
    assert open_stream(recipe).stretches()[1] == []
    assert sample(open_stream(recipe), 10**6)[1]


def test_a_place_inside_a_long_line_and_a_continued_record_gives_whole_texts(tmp_path):
    """Characters are not cut, and no record that continues another stands alone."""
    from hf_genlm.text.formats import CONTINUES

    (tmp_path / "a.txt").write_text("日本語" * 1_500_000, encoding="utf-8")
    (shard,) = open_stream(CorpusRecipe(sources=[str(tmp_path / "a.txt")])).shards
    texts = [begin() for begin in shard.beginnings(7)]
    parts = [next(iter(next(each)[0])) for each in texts]
    assert len(parts) == 7
    assert all(set(part) == set("日本語") for part in parts)
    lines = [{"text": f"{i} " + "x" * 60, **({CONTINUES: True} if i % 10 else {})} for i in range(1000)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (shard,) = open_stream(CorpusRecipe(sources=[str(tmp_path / "b.jsonl")])).shards
    whole = {"".join(parts) for parts, _ in shard.beginnings(1)[0]()}
    for begin in shard.beginnings(9):
        assert {"".join(parts) for parts, _ in begin()} <= whole
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n' * 500 + "[1]\n" + '{"text": "a"}\n' * 500)
    with pytest.raises(UserError, match=r"b\.jsonl from 33\.3% of it on, line \d+' is list, not an object"):
        list(shard.beginnings(3)[1]())
