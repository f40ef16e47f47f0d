"""Promise: the embedding starts from the word vectors of a file, and a run says how much of its text they
cover."""

import json
import re

import numpy as np
import pytest
import torch
from support.command_line import SMALL_OPTIONS, last_line
from support.models import build_model
from support.runs import small_recipe
from support.vectors import text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState

from hf_genlm.card import write_card
from hf_genlm.cli.main import main
from hf_genlm.config.recipe import load_recipe
from hf_genlm.errors import UserError
from hf_genlm.text import tokenizer as tokenizer_module
from hf_genlm.text.store import Document
from hf_genlm.text.vector_files import read_vectors
from hf_genlm.training import build as build_module
from hf_genlm.training.callbacks import FrozenRowsCallback
from hf_genlm.training.train import train
from hf_genlm.training.word_vectors import (
    CASE,
    COMPOSED,
    DRAWN,
    EXACT,
    count_words,
    draw_like,
    scaled,
    token_texts,
    token_vectors,
    wanted_words,
)

MERGES = [
    "c a",
    "ca t",
    "Ġ cat",
    "a t",
    "T h",
    "Th e",
    "Ġ The",
    "Ġ s",
    "Ġs at",
    "o n",
    "on e",
    "Ġ ,",
    "P a",
    "u s",
]


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes and a few known merges: 'cats' is 'cat' 's', ' sats' is ' sat' 's'."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [tokenizer_module.END_OF_TEXT, tokenizer_module.PAD, *alphabet]
    pieces += [merge.replace(" ", "") for merge in MERGES]
    merges = [tuple(merge.split()) for merge in MERGES]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = tokenizer_module.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizer_module.END_OF_TEXT, tokenizer_module.PAD])
    return tokenizer_module.wrap_tokenizer(backend)


def compose(tokenizer, words: dict[str, list[float]], counts: dict[str, int], seed: int = 0):
    rows = {word: row for row, word in enumerate(words)}
    table, kind = token_vectors(tokenizer, rows, np.float32(list(words.values())), counts, seed)
    assert table.dtype == np.float32
    assert table.shape == (len(tokenizer), 2)
    assert np.isfinite(table).all()
    texts = token_texts(tokenizer)
    return {text: (int(kind[i]), table[i].tolist()) for i, text in enumerate(texts) if text}, table, kind


def test_a_token_is_its_word_with_or_without_a_space(tokenizer):
    found, _, _ = compose(tokenizer, {"cat": [1, 2], ",": [3, 4], "7": [5, 6]}, {})
    assert found["cat"] == found[" cat"] == (EXACT, [1, 2])
    assert found[","] == found[" ,"] == (EXACT, [3, 4])
    assert found["7"] == (EXACT, [5, 6])
    assert found["ca"][0] == found[" sat"][0] == DRAWN


def test_case_comes_after_the_word_itself(tokenizer):
    found, _, _ = compose(tokenizer, {"the": [1, 2], "Cat": [3, 4], "US": [5, 6]}, {})
    assert found["The"] == found[" The"] == (CASE, [1, 2])
    assert found["cat"] == (CASE, [3, 4])
    assert found["us"] == (CASE, [5, 6])
    found, _, _ = compose(tokenizer, {"the": [1, 2], "The": [3, 4]}, {})
    assert found["The"] == (EXACT, [3, 4])


def test_a_piece_is_the_mean_of_its_words_by_their_counts(tokenizer):
    words = {"cat": [9, 9], "cats": [1, 2], "sats": [5, 0], "bone": [3, 1]}
    counts = {" cats": 1, "cats": 2, " sats": 3, " Sats": 2, " cat": 50, "zzz": 9, "bone": 4}
    found, _, _ = compose(tokenizer, words, counts)
    # 's' ends " cats", "cats", " sats" and " Sats" (by its lower case)
    assert found["s"] == (COMPOSED, pytest.approx([(1 * 3 + 5 * 5) / 8, 2 * 3 / 8]))
    assert found[" sat"] == (COMPOSED, [5, 0])
    assert found["one"] == (COMPOSED, [3, 1])
    assert found["on"][0] == DRAWN  # a merge on the way stands in no word
    assert found["z"][0] == DRAWN  # nor has "zzz" a vector
    assert found["cat"] == (EXACT, [9, 9])  # and not a mean with "cats"


def test_special_tokens_and_parts_of_characters_have_no_word(tokenizer):
    words = {"<|endoftext|>": [1, 2], "\ufffd": [3, 4], "é": [5, 6], "cat": [0, 0]}
    _, table, kind = compose(tokenizer, words, {"é": 3, "<|endoftext|>": 2})
    assert (kind[tokenizer.all_special_ids] == DRAWN).all()
    ids = tokenizer("é").input_ids
    assert len(ids) == 2
    assert (kind[ids] == COMPOSED).all()
    assert np.array_equal(table[ids], [[5, 6], [5, 6]])


def test_what_is_wanted_is_what_can_be_used(tokenizer):
    wanted = wanted_words(tokenizer, {" Cats": 3, "नमस्ते": 1})
    assert {"cat", "Cat", "CAT", "The", "the", "THE", ",", "7", "Cats", "cats", "नमस्ते"} <= wanted
    assert " cat" in wanted
    assert "" not in wanted


def test_words_are_counted_in_every_script_with_their_space():
    text = "The cat, the_cat नमस्ते दुनिया naïve naïve ไทยที่ 12ab it's\nThe " + "x" * 65
    counts = count_words([Document(text, "a"), Document(" cat", "b")])
    assert counts == {
        "The": 2, " cat": 2, " naïve": 2, " the": 1, "cat": 1, " नमस्ते": 1, " दुनिया": 1, " ไทยที่": 1, "ab": 1,
        " it": 1, "s": 1,
    }  # fmt: skip


def test_only_the_most_frequent_words_are_kept():
    rare = " ".join(chr(97 + i) + chr(97 + j) for i in range(9) for j in range(9))
    documents = [Document(f"one one one one two two two three three {rare}", "a")] * 3
    assert count_words(documents, max_words=3) == {" one": 9, " two": 9, " three": 6}


def test_drawn_rows_have_the_mean_and_covariance_of_the_others():
    rng = np.random.default_rng(0)
    sample = (rng.standard_normal((500, 4)) @ rng.standard_normal((4, 4)) + [1, 2, 3, 4]).astype(np.float32)
    drawn = draw_like(sample, 200_000, seed=1)
    assert drawn.mean(axis=0) == pytest.approx(sample.mean(axis=0), abs=0.03)
    assert np.cov(drawn.T) == pytest.approx(np.cov(sample.T), rel=0.03, abs=0.03)
    assert np.array_equal(drawn[:5], draw_like(sample, 200_000, seed=1)[:5])
    assert not np.array_equal(drawn[:5], draw_like(sample, 200_000, seed=2)[:5])


@pytest.mark.parametrize("sample", [[[1, 2, 3]], [[1, 1, 1], [2, 2, 2], [4, 4, 4]], [[0, 0, 0]] * 5])
def test_a_covariance_that_is_singular_stays_in_its_directions(sample):
    sample = np.float32(sample)
    drawn = draw_like(sample, 50, seed=0)
    centred, rank = sample - sample.mean(axis=0), np.linalg.matrix_rank(sample - sample.mean(axis=0))
    assert np.linalg.matrix_rank(np.concatenate([centred, drawn - sample.mean(axis=0)]), tol=1e-3) == rank


def test_too_few_found_rows_draw_from_all_words_that_were_kept(tokenizer):
    words = {"cat": [1, 1], **{f"zzz{i}": [i, -i] for i in range(40)}}
    _, table, kind = compose(tokenizer, words, {})
    assert (kind != DRAWN).sum() == 2
    drawn = table[kind == DRAWN]
    assert np.std(drawn, axis=0) == pytest.approx(np.std(list(words.values()), axis=0), rel=0.2)


def test_no_word_in_common_is_refused(tokenizer):
    with pytest.raises(UserError, match="none of the 272 tokens has a word vector"):
        compose(tokenizer, {"schön": [1, 2]}, {"cat": 3})
    with pytest.raises(UserError, match="zero"):
        scaled(np.zeros((3, 2), dtype=np.float32), 0.02)


def test_one_factor_for_all_keeps_every_direction(tokenizer):
    _, table, kind = compose(tokenizer, {"cat": [1, 2], "the": [-30, 4], ",": [0.5, 0]}, {" cats": 1})
    start = scaled(table, 0.05)
    assert start.dtype == np.float32
    assert np.sqrt(np.mean(start.astype(np.float64) ** 2)) == pytest.approx(0.05, rel=1e-6)
    factor = np.float32(0.05 / np.sqrt(np.mean(table.astype(np.float64) ** 2)))
    assert np.array_equal(start, table * factor)
    cosines = [
        np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
        for a, b in ((t[kind == EXACT][0], t[kind == EXACT][-1]) for t in (table, start))
    ]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_clipping_does_not_see_frozen_rows(tied, tokens):
    model = build_model(["gated_linear"], embedding_size=8, tie_word_embeddings=tied)
    weight = model.get_input_embeddings().weight
    frozen = torch.zeros(weight.shape[0], dtype=torch.bool)
    frozen[::2] = True
    callback = FrozenRowsCallback(frozen)
    callback.on_train_begin(None, TrainerState(), TrainerControl(), model=model)
    for _ in range(2):  # accumulated
        model(tokens, labels=tokens).loss.backward()
    assert (weight.grad[frozen] == 0).all()
    assert weight.grad[~frozen].norm() > 0
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    callback.on_train_end(None, TrainerState(), TrainerControl())
    model.zero_grad()
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
    assert (weight.grad[frozen] != 0).any()
    weight.grad[frozen] = 0
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) == pytest.approx(float(norm))


@pytest.fixture(scope="session")
def vector_file(text_folder, tmp_path_factory):
    """Half of the words of the text, in lower case, and punctuation, of 6 numbers each."""
    path = tmp_path_factory.mktemp("vectors") / "small.vec"
    texts = [Document(file.read_text(encoding="utf-8"), "") for file in sorted(text_folder.iterdir())]
    words = sorted({word.strip().lower() for word in count_words(texts)})[::2]
    words = list(dict.fromkeys([*words, "the", ",", "."]))
    vectors = np.random.default_rng(5).standard_normal((len(words), 6)).astype(np.float32)
    path.write_bytes(b"%d 6\n" % len(words) + text(words, vectors))
    return path


@pytest.fixture
def started(monkeypatch):
    """The model, which rows were found, and the table, as they were when training began."""
    seen = {}
    start = build_module.start_from_vectors

    def spy(run, model, *others):
        seen["found"] = start(run, model, *others)
        seen["model"] = model
        seen["before"] = model.model.embed_tokens.weight.detach().clone()
        return seen["found"]

    monkeypatch.setattr(build_module, "start_from_vectors", spy)
    return seen


def test_a_run_from_text_and_vectors_to_a_model_anyone_loads(text_folder, vector_file, tmp_path, started):
    heard = {}
    recipe = small_recipe(text_folder, f"vectors.path={vector_file}")
    run = train(recipe, tmp_path / "run", lambda event, fields: heard.setdefault(event, fields))
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert (model.config.embedding_size, model.config.embedding_projection) == (6, True)
    assert model.model.embed_proj.weight.shape == (32, 6)
    assert not model.config.tie_word_embeddings  # word vectors are a poor head
    before, found = started["before"].numpy(), started["found"]
    assert np.sqrt(np.mean(before**2)) == pytest.approx(model.config.initializer_range, rel=1e-4)
    (row,) = AutoTokenizer.from_pretrained(run.model)(" the").input_ids
    the = read_vectors(vector_file, {"the"}).vectors[0]
    assert found[row]
    assert np.ptp(before[row] / the) < 1e-6
    after = model.model.embed_tokens.weight.detach().numpy()
    assert (np.abs(after - before)[found] > 0).any()
    ids = AutoTokenizer.from_pretrained(run.model)("import", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]

    report = json.loads(run.vectors.read_text())
    assert report == {name: heard["vectors"][name] for name in report}
    (logged,) = [event for event in run.read_log() if event["event"] == "vectors"]
    assert report == {name: logged[name] for name in report}
    assert sum(report["tokens"].values()) == 400
    assert report["tokens"]["drawn"] == int((~found).sum())
    assert min(report["tokens"].values()) > 0
    assert sum(report["share_of_text"].values()) == pytest.approx(1, abs=1e-4)
    assert report["file"] == "small.vec"
    assert report["dimension"] == 6

    card = write_card(run).read_text()
    section = card[card.index("## Word vectors") : card.index("## Parameters")]
    assert "`small.vec`" in section
    assert report["sha256"] in section
    for kind, n in report["tokens"].items():
        assert f"| {n} | {100 * report['share_of_text'][kind]:.1f} % |" in section
    assert "All of them were trained further." in section
    assert str(vector_file.parent) not in card
    again = train(load_recipe(run.recipe), tmp_path / "again")
    assert (again.model / "model.safetensors").read_bytes() == (run.model / "model.safetensors").read_bytes()


def test_the_width_of_the_model_itself_gets_a_projection_too(text_folder, tmp_path):
    path = tmp_path / "v.txt"
    path.write_bytes(text(["the", "of", "a"], np.random.default_rng(0).standard_normal((3, 32))))
    run = train(small_recipe(text_folder, f"vectors.path={path}", "training.steps=1"), tmp_path / "run")
    assert AutoModelForCausalLM.from_pretrained(run.model).model.embed_proj.weight.shape == (32, 32)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_frozen_rows_are_bit_equal_after_training(tied, text_folder, vector_file, tmp_path, started):
    recipe = small_recipe(
        text_folder,
        f"vectors.path={vector_file}",
        "vectors.frozen=true",
        f"model.tie_word_embeddings={tied}",
        "training.gradient_accumulation_steps=2",
        "training.steps=8",
    )
    run = train(recipe, tmp_path / "run")
    before, found, model = started["before"], torch.from_numpy(started["found"]), started["model"]
    after = AutoModelForCausalLM.from_pretrained(run.model).model.embed_tokens.weight.detach()
    assert torch.equal(after[found], before[found])
    assert (after != before)[~found].any()
    assert (model.model.embed_proj.bias != 0).any()
    assert not model.model.embed_tokens.weight._backward_hooks
    assert not list(model.buffers())
    assert "The vectors from the file were frozen; " in write_card(run).read_text()


@pytest.mark.parametrize(("release", "moved"), [(3, False), (2, True)])
def test_rows_are_released_after_the_step(release, moved, text_folder, vector_file, tmp_path, started):
    recipe = small_recipe(
        text_folder,
        f"vectors.path={vector_file}",
        "vectors.frozen=true",
        f"vectors.unfreeze_step={release}",
        "training.steps=3",
    )
    run = train(recipe, tmp_path / "run")
    found = torch.from_numpy(started["found"])
    after = started["model"].model.embed_tokens.weight.detach()
    assert bool((after != started["before"])[found].any()) is moved
    assert not started["model"].model.embed_tokens.weight._backward_hooks
    assert f"were frozen for {release} steps" in write_card(run).read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--vectors", "nowhere.txt"], "'nowhere.txt' is no file: name one"),
        (["--vectors", "FILE", "--set", "model.embedding_size=7"], "embedding_size = 7, .* have 6 numbers"),
        (["--vectors", "FILE", "--set", "vectors.unfreeze_step=9"], "--set vectors.frozen=true"),
        (["--set", "vectors.frozen=true"], "add --vectors FILE"),
        (["--set", "vectors.frozen=1"], "true or false"),
        (
            ["--vectors", "FILE", "--set", "vectors.frozen=true", "--set", "vectors.unfreeze_step=0"],
            "at least 1",
        ),
        (["--vectors", "FILE", "--set", "vectors.damaged=skipp"], "did you mean 'skip'"),
        (["--set", "vector.path=x"], "did you mean 'vectors'"),
        (["--vectors", "CUT"], "holds .* words and its first line says"),
        (["--vectors", "OTHER"], "none of the 400 tokens has a word vector"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(options, words, text_folder, vector_file, tmp_path, capsys):
    lines = vector_file.read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.vec").write_bytes(b"".join(lines[:-3]))
    (tmp_path / "other.vec").write_bytes("żółć 1 2 3\n".encode())
    names = {"FILE": vector_file, "CUT": tmp_path / "cut.vec", "OTHER": tmp_path / "other.vec"}
    options = [str(names.get(option, option)) for option in options]
    out = tmp_path / "run"
    assert main(["train", str(text_folder), "--out", str(out), *SMALL_OPTIONS, *options]) == 2
    assert re.search(words, last_line(capsys))
    assert not out.exists()


def test_the_command_shows_what_the_vectors_cover(text_folder, vector_file, tmp_path, capsys):
    damaged = tmp_path / "damaged.vec"
    damaged.write_bytes(vector_file.read_bytes() + b"short 1 2\n")
    options = ["--vectors", str(damaged), "--set", "vectors.damaged=skip", "--set", "training.steps=1"]
    out = tmp_path / "run"
    assert main(["train", str(text_folder), "--out", str(out), *SMALL_OPTIONS, *options]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vectors ")]
    report = json.loads((out / "vectors.json").read_text())
    assert report["words"]["skipped"] == {"wrong_dimension": 1}
    assert line.startswith(f"vectors       400 tokens: {report['tokens']['exact']} exact, ")
    assert line.endswith(f"; {report['words']['read']:,} words of 6 in damaged.vec, 1 skipped")
    card = (out / "model" / "README.md").read_text()
    assert "1 left out as `wrong_dimension`" in card
