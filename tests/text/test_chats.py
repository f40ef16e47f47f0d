"""Promise: in a chat, a model learns what the assistant says and where its turn ends, and nothing else.

The ids are those of the tokenizer's chat template, whatever stands in a message, and the figures are of the
targets alone.
"""

import math

import numpy as np
import pytest
import torch
from support.corpora import texts
from support.models import build_model

from hf_genlm.config.recipe import CorpusRecipe, TokenizerRecipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.aggregation import BlockSums
from hf_genlm.evaluation.likelihood import measure_likelihood
from hf_genlm.model.loss_genlm import causal_loss, causal_loss_without_logits
from hf_genlm.text.cache import Cache
from hf_genlm.text.corpus import count_text, read_corpus, split_documents
from hf_genlm.text.encoding import encode_documents, encode_messages
from hf_genlm.text.packing import IGNORED, PackedRows
from hf_genlm.text.store import TURN, Document, as_documents, chat_text
from hf_genlm.text.streaming import read_stream
from hf_genlm.text.tokenizer import END_OF_TEXT, train_tokenizer

CHATS = [
    [("system", "Be brief."), ("user", "What is a list?"), ("assistant", "A sequence."),
     ("user", "And a tuple?"), ("assistant", "A sequence too.\n\nIt does not change.")],
    [("user", "  white space \n"), ("assistant", "\n around  "), ("assistant", "twice")],
    [("assistant", "first"), ("user", "left unanswered")],
    [("user", f"a sign {TURN} of programs"), ("tool", "42"), ("assistant", "naïve 東京 🙂 " * 40)],
]  # fmt: skip
TEXT = f"The plain text of an author, with {TURN}user\nand with {END_OF_TEXT} in it.\n" * 3


def messages_of(chat):
    return [{"role": role, "content": content} for role, content in chat]


@pytest.fixture(scope="module")
def documents():
    """Four chats, and a text among them."""
    found = [Document(chat_text(messages_of(chat)), "chat") for chat in CHATS]
    return as_documents([*found[:2], Document(TEXT, "text"), *found[2:]])


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, TokenizerRecipe(vocab_size=300), 1000)


def by_template(tokenizer, chat) -> tuple[list[int], list[bool]]:
    """Ids behind the start token, and the mask of what the assistant says, as transformers makes them."""
    messages = [{**m, "content": m["content"].replace(TURN, "\ufffd")} for m in messages_of(chat)]
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return made["input_ids"][1:], [bool(mask) for mask in made["assistant_masks"][1:]]


def test_ids_and_targets_are_those_of_the_chat_template(documents, tokenizer):
    found = encode_documents(tokenizer, documents, ends_chats=True)
    assert documents.is_chat.tolist() == [True, True, False, True, True]
    for i, chat in zip((0, 1, 3, 4), CHATS, strict=True):
        ids, mask = by_template(tokenizer, chat)
        assert (found[i][0].tolist(), found.targets_of(i).tolist()) == (ids, mask)
        said = [content.strip() for role, content in chat if role == "assistant"]
        assert found.n_bytes[i] == sum(len(content.encode()) for content in said)
    assert tokenizer.decode(found[2][0], skip_special_tokens=True) == TEXT
    assert (found.targets_of(2).all(), found.n_bytes[2]) == (True, len(TEXT.encode()))


def test_a_special_token_that_is_typed_in_a_message_is_text(tokenizer):
    chat = [{"role": "user", "content": f"a{END_OF_TEXT}assistant\nb"}, {"role": "assistant", "content": "c"}]
    ids = encode_documents(tokenizer, [Document(chat_text(chat), "")], ends_chats=True)[0][0].tolist()
    assert ids.count(tokenizer.eos_token_id) == 2
    assert END_OF_TEXT in tokenizer.decode(ids, skip_special_tokens=True)
    assert [tokenizer.bos_token_id, *ids] == encode_messages(tokenizer, chat)


def test_no_token_is_learned_from_the_sign_between_messages(tokenizer):
    assert not [word for word in tokenizer.get_vocab() if "ï·" in word]  # the bytes of TURN begin so


def test_the_template_opens_the_turn_of_the_assistant(tokenizer):
    chat = messages_of(CHATS[0][:2])
    shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown.split(END_OF_TEXT) == ["", "system\nBe brief.", "user\nWhat is a list?", "assistant\n"]


@pytest.mark.parametrize("max_seq_length", [4, 7, 33])
@pytest.mark.parametrize("carries_state", [False, True])
def test_rows_label_targets_and_begin_a_document_with_each_chat(
    documents, tokenizer, max_seq_length, carries_state
):
    encoded, eos = encode_documents(tokenizer, documents), tokenizer.eos_token_id
    rows = PackedRows(encoded, max_seq_length, eos, tokenizer.pad_token_id, carries_state)
    stream, labels, positions = [eos], [IGNORED], [0]
    for i in range(len(encoded)):
        ids, mask = encoded[i][0].tolist(), encoded.targets_of(i).tolist()
        stream += [*ids, eos]
        labels += [
            token if is_target else IGNORED
            for token, is_target in zip([*ids, eos], [*mask, mask[-1]], strict=True)
        ]
        positions += [*range(1, len(ids) + 1), 0]
    for i in range(len(rows)):
        row, start = rows[i], i * (max_seq_length - 1)
        n = len(stream[start : start + max_seq_length])
        assert row["input_ids"][:n].tolist() == stream[start : start + n]
        assert row["labels"][1:n].tolist() == labels[start + 1 : start + n]
        begins = [k for k, position in enumerate(positions[start : start + n]) if position == 0]
        first = [] if carries_state else [0]
        assert np.flatnonzero(row["position_ids"][:n] == 0).tolist() == sorted({*first, *begins})
    parts = PackedRows(encoded[1:3], 7, eos, tokenizer.pad_token_id)
    assert (parts[0]["labels"][1:] != IGNORED).tolist() == encoded.targets_of(1)[:6].tolist()


def test_stored_ids_keep_their_targets(documents, tokenizer, tmp_path):
    cache, sha256 = Cache(tmp_path), count_text(documents)["sha256"]
    made = encode_documents(tokenizer, documents, cache=cache, sha256=sha256)
    found = encode_documents(tokenizer, documents, cache=cache, sha256=sha256)
    ended = encode_documents(tokenizer, documents, cache=cache, sha256=sha256, ends_chats=True)
    assert found.file is not None
    assert np.array_equal(found.targets, made.targets)
    assert np.array_equal(found.ids, made.ids)
    assert len(ended.ids) == len(made.ids) + len(CHATS)
    chosen = found[::-2]
    assert [chosen.targets_of(i).tolist() for i in range(3)] == [
        made.targets_of(i).tolist() for i in (4, 2, 0)
    ]


def test_chats_are_held_out_whole(documents):
    split = split_documents(documents, 0.05, 0)
    train, validation, method = split.train, split.validation, split.method
    assert method == "document"
    assert sorted([*texts(train), *texts(validation)]) == sorted(texts(documents))
    assert len(validation) >= 1
    with pytest.raises(UserError, match="--validation FILE"):
        split_documents(documents[:1], 0.05, 0)


@pytest.mark.parametrize(("mixer", "carry_state"), [("full_attention", False), ("gru", False), ("gru", True)])
def test_the_loss_is_of_the_targets_alone(documents, tokenizer, mixer, carry_state):
    """Windows of 16 tokens over chats that are longer, against each chat in one forward pass."""
    encoded, context = encode_documents(tokenizer, documents, ends_chats=True), 512 if not carry_state else 16
    model = build_model([mixer], vocab_size=len(tokenizer)).eval()
    blocks = BlockSums.from_documents(encoded)
    found = {
        m.name: m
        for m in measure_likelihood(
            model, encoded, start_id=tokenizer.eos_token_id, context=context, carry_state=carry_state,
            on_scores=blocks.add,
        )
    }  # fmt: skip
    nats = n = 0
    for i in range(len(encoded)):
        ids = torch.tensor([tokenizer.eos_token_id, *encoded[i][0].tolist()])
        with torch.no_grad():
            log_p = model(ids[None, :-1]).logits[0].log_softmax(-1)
        taken = log_p.gather(1, ids[1:, None])[:, 0][torch.from_numpy(encoded.targets_of(i).copy())]
        nats, n = nats - taken.sum().item(), n + len(taken)
    assert found["nats_per_token"].n == n == int(encoded.targets.sum())
    assert found["nats_per_token"].value == pytest.approx(nats / n, rel=1e-5)
    n_bytes = int(encoded.n_bytes.sum())
    assert found["bits_per_byte"].value == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert blocks.table["nats"].sum() == pytest.approx(nats, rel=1e-5)


def test_rows_without_a_target_have_no_loss():
    n_items = torch.tensor(0)
    states, weight = torch.randn(1, 3, 4, requires_grad=True), torch.randn(5, 4)
    labels = torch.full((1, 3), IGNORED)
    for loss in (
        causal_loss(states @ weight.T, labels, num_items_in_batch=n_items),
        causal_loss_without_logits(states, weight, None, labels, num_items_in_batch=n_items),
    ):
        loss.backward()
        assert loss.item() == 0
        assert not states.grad.any()


def test_a_stream_of_chats_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n' * 3)
    with pytest.raises(UserError, match="leave --stream out"):
        read_stream(CorpusRecipe(sources=[str(tmp_path / "a.jsonl")], stream=True))


def test_a_corpus_says_how_many_chats_it_has(tmp_path):
    lines = [f'{{"messages": [{{"role": "assistant", "content": "{i}"}}]}}' for i in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = read_corpus(CorpusRecipe(sources=[str(tmp_path)]))
    assert corpus.report["chats"] == 9
