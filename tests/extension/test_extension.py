"""Promise: a trained model gets tokens for another language, and what it knew stays as it was."""

import json

import numpy as np
import pytest
import torch
from support.language_texts import SENTENCES, SMALL, lines_of, trained_on
from support.models import build_model
from support.resuming import weights_of
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_genlm.cli.main import main
from hf_genlm.config.recipe import load_recipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.extension import extend_bpe, extend_model
from hf_genlm.text.encoding import encode_documents
from hf_genlm.text.fast_bpe import MAX_TOKEN, ranks_of
from hf_genlm.text.store import Document
from hf_genlm.training.train import train

OLD = [lines_of("eng", 60)]
NEW = [lines_of("rus", 60), lines_of("hin", 30)]
KIN = [
    "humans and beings have all the rights that they reasonably have\n" * 5
]  # in the letters of the old text


def extended(new, n_tokens, keep=()):
    tokenizer = trained_on(OLD, vocab_size=290)
    extension = extend_bpe(tokenizer.backend_tokenizer, new, n_tokens, keep)
    return tokenizer.backend_tokenizer, Tokenizer.from_str(json.dumps(extension.state)), extension


def random_texts(n: int):
    """Mixtures of all scripts, spaces, signs and whatever else Unicode has."""
    draw = np.random.default_rng(3)
    letters = list("".join(SENTENCES.values()) + " \n\t.,'0123é日本🙂\u0301\U0010ffff")
    return ["".join(draw.choice(letters, int(draw.integers(1, 60)))) for _ in range(n)]


@pytest.mark.parametrize("new", [NEW, KIN])
def test_new_tokens_are_joined_from_what_there_was(new):
    """With new tokens written as their pieces, the ids of any text are the old ones; and it decodes."""
    before, after, extension = extended(new, 20)
    assert after.get_vocab_size() == before.get_vocab_size() + 20
    n_new = 0
    for text in [*OLD, *new, *SENTENCES.values(), *random_texts(300)]:
        ids = after.encode(text, add_special_tokens=False).ids
        n_new += sum(i in extension.pieces for i in ids)
        written = [piece for i in ids for piece in extension.pieces.get(i, [i])]
        assert written == before.encode(text, add_special_tokens=False).ids
        assert after.decode(ids, skip_special_tokens=False) == text
    assert n_new > 100


def test_text_of_another_script_keeps_its_ids_and_text_that_is_to_keep_them_does():
    before, after, _ = extended(NEW, 60)
    assert after.encode(OLD[0]).ids == before.encode(OLD[0]).ids
    before, after, _ = extended(KIN, 10)
    assert after.encode(OLD[0]).ids != before.encode(OLD[0]).ids
    before, after, _ = extended(KIN, 10, keep=OLD)
    assert after.encode(OLD[0]).ids == before.encode(OLD[0]).ids
    assert len(after.encode(KIN[0]).ids) < len(before.encode(KIN[0]).ids)


@pytest.mark.parametrize("unit", ["x", "xy", "=", "\u2764\ufe0f"])
def test_a_run_of_one_character_does_not_become_one_token(unit):
    text = unit * (100_000 // len(unit))
    _, after, extension = extended([text, *KIN * 40], 20)
    assert max(len(after.id_to_token(i)) for i in extension.pieces) <= MAX_TOKEN
    assert after.decode(after.encode(text[:5000]).ids) == text[:5000]


def test_the_second_engine_follows_an_extended_tokenizer():
    """tiktoken's ranks are those of the merges still, so that encoding stays fast."""
    _, after, _ = extended(NEW, 60)
    ranks = ranks_of(json.loads(after.to_str()))
    assert ranks is not None
    assert len(ranks) == after.get_vocab_size() - 2


def test_the_most_frequent_pair_comes_first():
    """By hand: in `xy xy xyz` the pair (x, y) occurs 3 times, (Ġ, xy) then 2 times, and (xy, z) once."""
    _, _, extension = extended(["xy xy xyz"], 2)
    merges = [tuple(merge) for merge in extension.state["model"]["merges"][-2:]]
    assert merges == [("x", "y"), ("Ġ", "xy")]
    with pytest.raises(UserError, match="2 more tokens to learn at most"):
        extended(["xy xy xyz"], 3)


def test_a_tokenizer_of_another_kind_is_refused():
    from tokenizers import models

    with pytest.raises(UserError, match="WordLevel"):
        extend_bpe(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), ["a"], 1)


@pytest.mark.parametrize("stack", ["lstm", "hybrid", "factorised", "bigram"])
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_their_pieces_and_old_logits_stay(stack, tied):
    model = build_model(stack, tie_word_embeddings=tied)
    tokens = torch.randint(2, 61, (2, 9))
    with torch.no_grad():
        before = model(tokens).logits
        rows = model.get_input_embeddings().weight[[4, 5, 5]].mean(0)
        extend_model(model, {61: [4, 5, 5], 62: [7, 8]})
        after = model(tokens).logits
    assert after.shape[-1] == model.config.vocab_size == 63
    assert torch.allclose(after[..., :61], before, atol=1e-6)
    assert torch.equal(model.get_input_embeddings().weight[61], rows)
    assert torch.allclose(after[..., 62], before[..., [7, 8]].mean(-1), atol=1e-5) or stack == "shared"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model of English."""
    folder = tmp_path_factory.mktemp("extension")
    (folder / "eng.txt").write_text(lines_of("eng", 100), encoding="utf-8")
    (folder / "rus.txt").write_text(lines_of("rus", 100), encoding="utf-8")
    run = train(load_recipe(None, [*SMALL, f"corpus.languages=eng={folder}/eng.txt"]), folder / "run")
    return folder, run


def test_the_verb_makes_an_ordinary_model_that_training_goes_on_from(trained, tmp_path, capsys):
    folder, run = trained
    out = tmp_path / "extended"
    arguments = ["extend", str(run.path), "--source", f"rus={folder}/rus.txt", "--vocab-size", "+40"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert "40 of them new" in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    old = AutoTokenizer.from_pretrained(run.model)
    assert len(tokenizer) == len(old) + 40 == model.config.vocab_size
    text = lines_of("rus", 3, seed=5)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) < len(old(text)["input_ids"])
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (old.eos_token_id, old.pad_token_id)
    ids = encode_documents(
        tokenizer, [Document(lines_of("rus", 100) * 50, "rus")]
    ).ids  # by the second engine
    assert ids.tolist() == tokenizer(lines_of("rus", 100) * 50)["input_ids"]
    settings = [*SMALL[5:], f"corpus.sources={folder}/rus.txt", f"model.init_from={out}"]
    still = train(
        load_recipe(None, [*settings, "training.learning_rate=1e-30", "training.steps=1"]), tmp_path / "a"
    )
    assert weights_of(still)[-1000:] == (out / "model.safetensors").read_bytes()[-1000:]
    again = train(load_recipe(None, settings), tmp_path / "b")
    bits = [
        next(m.value for m in read_measurements(r.evaluation) if m.name == "bits_per_byte")
        for r in (still, again)
    ]
    assert bits[1] < bits[0] - 0.5


def test_what_a_model_has_is_not_said_again(trained, tmp_path):
    _, run = trained
    recipe = load_recipe(None, [f"model.init_from={run.path}", "model.hidden_size=64"])
    with pytest.raises(UserError, match="hidden_size is that of the model"):
        train(recipe, tmp_path / "run")
    with pytest.raises(UserError, match="no model at"):
        train(load_recipe(None, ["model.init_from=nowhere"]), tmp_path / "run")
    assert main(["extend", str(run.path), "x.txt", "--vocab-size", "40", "--out", str(tmp_path / "o")]) == 2
