"""Packing: every token is predicted once, positions restart with every document, padding is never learned."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_genlm.errors import UserError
from hf_genlm.text.encoding import TokenizedDocuments
from hf_genlm.text.packing import IGNORED, PackedRows, collate, position_ids_of

EOS, PAD = 0, 1
DOCUMENTS = st.lists(st.lists(st.integers(2, 500), max_size=30), min_size=1, max_size=12)


def tokenized(documents: list[list[int]], dtype=np.uint16) -> TokenizedDocuments:
    lengths = [len(document) for document in documents]
    return TokenizedDocuments(
        np.array([token for document in documents for token in document], dtype=dtype),
        np.array([0, *np.cumsum(lengths)], dtype=np.int64),
        np.array(lengths, dtype=np.int64),
    )


def stream_of(documents: list[list[int]]) -> list[int]:
    """The naive twin."""
    stream = [EOS]
    for document in documents:
        stream += [*document, EOS]
    return stream


def naive_positions(row: list[int]) -> list[int]:
    positions: list[int] = []
    for token in row:
        positions.append(0 if token == EOS or not positions else positions[-1] + 1)
    return positions


@settings(max_examples=100, deadline=None)
@given(DOCUMENTS, st.integers(2, 9), st.integers(1, 60))
def test_first_tokens_are_the_beginning_of_the_stream(documents, max_seq_length, count):
    stream = stream_of(documents)
    if len(stream) >= max_seq_length:
        rows = PackedRows(tokenized(documents), max_seq_length, EOS, PAD)
        assert rows.first_tokens(count).tolist() == stream[:-1][:count]


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.integers(2, 40))
def test_every_token_but_the_first_is_a_target_once(documents, max_seq_length):
    stream = stream_of(documents)
    if len(stream) < max_seq_length:
        with pytest.raises(UserError, match="max_seq_length"):
            PackedRows(tokenized(documents), max_seq_length, EOS, PAD)
        return
    rows = PackedRows(tokenized(documents), max_seq_length, EOS, PAD)
    inputs, targets = [], []
    for row in (rows[i] for i in range(len(rows))):
        # as a causal model shifts: position t predicts label t + 1
        for token, label in zip(row["input_ids"][:-1], row["labels"][1:], strict=True):
            if label != IGNORED:
                inputs.append(int(token))
                targets.append(int(label))
    assert inputs == stream[:-1]
    assert targets == stream[1:]
    assert rows.n_targets == len(targets)


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.integers(2, 40))
def test_rows(documents, max_seq_length):
    if len(stream_of(documents)) < max_seq_length:
        return
    rows = PackedRows(tokenized(documents), max_seq_length, EOS, PAD)
    for i in range(len(rows)):
        row = rows[i]
        assert {key: (value.shape, value.dtype) for key, value in row.items()} == {
            key: ((max_seq_length,), np.dtype(np.int64)) for key in ("input_ids", "position_ids", "labels")
        }
        assert row["position_ids"].tolist() == naive_positions(row["input_ids"].tolist())
        is_pad = row["input_ids"] == PAD
        assert (row["labels"] == np.where(is_pad, IGNORED, row["input_ids"])).all()
        assert i == len(rows) - 1 or not is_pad.any()
        assert not is_pad[0]
    with pytest.raises(IndexError):
        rows[len(rows)]


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.integers(2, 40), st.data())
def test_a_batch_is_its_rows_in_the_stream(documents, max_seq_length, data):
    stream = stream_of(documents)
    if len(stream) < max_seq_length:
        return
    rows = PackedRows(tokenized(documents), max_seq_length, EOS, PAD)
    chosen = data.draw(st.lists(st.integers(-len(rows), len(rows) - 1), min_size=1, max_size=9))
    batch = collate(rows.__getitems__(chosen))
    for k, index in enumerate(chosen):
        start = (index % len(rows)) * (max_seq_length - 1)
        row = stream[start : start + max_seq_length]
        n_padding = max_seq_length - len(row)
        assert batch["input_ids"][k].tolist() == row + [PAD] * n_padding
        assert batch["labels"][k].tolist() == row + [IGNORED] * n_padding
        assert batch["position_ids"][k].tolist() == naive_positions(row + [PAD] * n_padding)


def test_neighbouring_rows_share_one_token_and_the_last_is_padded():
    rows = PackedRows(tokenized([[5, 6, 7], [8, 9]]), 4, EOS, PAD)
    assert [rows[i]["input_ids"].tolist() for i in range(len(rows))] == [
        [0, 5, 6, 7],
        [7, 0, 8, 9],
        [9, 0, 1, 1],
    ]
    assert [rows[i]["position_ids"].tolist() for i in range(3)] == [[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 1, 2]]
    assert rows[-1]["labels"].tolist() == [9, 0, IGNORED, IGNORED]


def test_positions_do_not_change_the_row():
    row = np.array([4, 4, EOS, 4, EOS, EOS, 4])
    assert position_ids_of(row, EOS).tolist() == [0, 1, 0, 1, 0, 0, 1]
    assert row.tolist() == [4, 4, EOS, 4, EOS, EOS, 4]
    assert position_ids_of(np.array([], dtype=np.uint16), EOS).tolist() == []


def test_large_ids_survive():
    rows = PackedRows(tokenized([[2, 70_000, 3]], np.uint32), 5, EOS, PAD)
    assert rows[0]["input_ids"].tolist() == [0, 2, 70_000, 3, 0]


def test_text_shorter_than_a_row():
    with pytest.raises(
        UserError, match=r"training.max_seq_length = 64: .*only 5 tokens.*--set training.max_seq_length="
    ) as e:
        PackedRows(tokenized([[5, 6, 7]]), 64, EOS, PAD)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="at least 2"):
        PackedRows(tokenized([[5, 6, 7]]), 1, EOS, PAD)


def test_collate_and_loader(monkeypatch):
    rows = PackedRows(tokenized([list(range(2, 60))]), 8, EOS, PAD)
    batch = collate([rows[0], rows[1]])
    assert sorted(batch) == [
        "input_ids",
        "labels",
        "position_ids",
    ]  # a mask would hide the documents of a row
    assert all(value.shape == (2, 8) and value.dtype == torch.int64 for value in batch.values())
    asked = []
    fetch = rows.__getitems__
    monkeypatch.setattr(
        PackedRows, "__getitems__", lambda self, chosen: asked.append(chosen) or fetch(chosen)
    )
    loader = torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=collate)
    together = torch.cat([batch["input_ids"] for batch in loader])
    assert asked == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]  # a batch at once
    assert together.tolist() == [rows[i]["input_ids"].tolist() for i in range(len(rows))]
