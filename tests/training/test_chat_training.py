"""Promise: `train --from MODEL chats.jsonl` teaches a model turns, and its figures are of its answers."""

import asyncio
import json
import re
import signal

import pytest
from support.http_clients import call
from support.resuming import at_step, weights_of
from support.runs import SMALL

from hf_genlm import api
from hf_genlm.cli.main import main
from hf_genlm.config.recipe import load_recipe
from hf_genlm.errors import Stopped, UserError
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.loading import load
from hf_genlm.privacy.audit import audit
from hf_genlm.serving import Server
from hf_genlm.text.corpus import read_corpus
from hf_genlm.text.encoding import encode_documents
from hf_genlm.text.store import Document, chat_text
from hf_genlm.text.tokenizer import load_tokenizer
from hf_genlm.training.corpus import TokenizedCorpus
from hf_genlm.training.train import train

ANSWER = "It is blue."


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Sixty chats of two turns, with one answer."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = [("user", "The sky?"), ("assistant", ANSWER), ("user", "And the sea?"), ("assistant", ANSWER)]
    messages = [{"role": role, "content": content} for role, content in turns]
    with path.open("w") as file:
        for i in range(60):
            numbered = [{"role": "system", "content": f"Chat {i}."}, *messages]
            file.write(json.dumps({"messages": numbered}) + "\n")
    return path


def recipe_of(chats, trained, *assignments):
    small = [word for word in SMALL if word.startswith("training.")]
    return load_recipe(
        None,
        [*small, f"model.init_from={trained.path}", f"corpus.sources={chats}", "training.steps=40",
         "training.learning_rate=0.02", "training.max_seq_length=64", "training.save_steps=5", *assignments],
    )  # fmt: skip


@pytest.fixture(scope="module")
def taught(chats, trained, tmp_path_factory):
    return train(recipe_of(chats, trained, "training.num_samples=1"), tmp_path_factory.mktemp("runs") / "run")


def test_the_model_answers_and_ends_its_turn(taught):
    server = Server(*load(taught.path), "m", "localhost")
    messages = [{"role": "system", "content": "Chat 7."}, {"role": "user", "content": "The sky?"}]
    asked = {"messages": messages, "temperature": 0, "max_tokens": 60}
    sent = asyncio.run(call(server, "/v1/chat/completions", asked))
    choice = json.loads(b"".join(each.get("body", b"") for each in sent))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER, "stop")


def test_the_end_of_a_run_on_chats_names_the_verb_that_talks(taught, monkeypatch, capsys):
    monkeypatch.setattr(api, "run_training", lambda *args, **more: api.Run(taught.path))
    assert main(["train", "x.jsonl", "--out", str(taught.path)]) == 0
    assert f"hf-genlm chat {taught.path}" in capsys.readouterr().out


def test_figures_samples_and_card_are_of_the_answers(taught, chats, trained):
    held_out = read_corpus(load_recipe(None, [f"corpus.sources={chats}"]).corpus).validation
    found = {m.name: m for m in read_measurements(taught.evaluation)}
    assert found["bits_per_byte"].n == 2 * len(held_out) * len(ANSWER)
    assert found["bits_per_byte"].value < 0.1
    assert "word_perplexity" not in found
    samples = [event for event in taught.read_log() if event["event"] == "sample"]
    prompt = r"system\nChat \d+\.<.endoftext.>user\nThe sky\?<.endoftext.>assistant\n"
    assert re.fullmatch(prompt, samples[-1]["prompt"])
    assert samples[-1]["text"] == ANSWER
    assert main(["card", str(taught.path)]) == 0
    card = (taught.model / "README.md").read_text(encoding="utf-8")
    for words in ("60 documents are chats", "apply_chat_template", "a turn of the assistant is scored too"):
        assert words in card
    assert "follow instructions" not in card


def test_a_run_on_chats_resumes_with_the_same_weights(taught, chats, trained, tmp_path):
    recipe = recipe_of(chats, trained, "training.num_samples=1")
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "run", at_step(10, lambda: signal.raise_signal(signal.SIGTERM)))
    assert weights_of(train(recipe, tmp_path / "run", resume=True)) == weights_of(taught)


def test_what_is_not_of_chats_says_so(chats, taught):
    tokenizer = load_tokenizer(str(taught.tokenizer))
    encoded = encode_documents(tokenizer, [Document(chat_text([{"role": "assistant", "content": "a"}]), "")])
    with pytest.raises(UserError, match="--epsilon is for text"):
        TokenizedCorpus(tokenizer, encoded, encoded[:0], {}).windows(None)
    with pytest.raises(UserError, match="audit are for text"):
        audit(taught.path)
    assert main(["evaluate", str(taught.path), str(chats), "--suite", "range"]) == 2


def test_an_evaluation_of_chats_is_that_of_the_run(taught, capsys):
    assert main(["evaluate", str(taught.path), "--json"]) == 0
    found = {m["name"]: m["value"] for m in json.loads(capsys.readouterr().out)["measurements"]}
    before = {m.name: m.value for m in read_measurements(taught.evaluation)}
    assert found["nats_per_token"] == pytest.approx(before["nats_per_token"], rel=1e-5)
