"""Promise: a text in several languages is split, balanced and measured language by language, exactly."""

import json
import math
import signal

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from support.language_texts import SENTENCES, SMALL, WORDS, lines_of, trained_on
from support.launching import compare_with_one
from support.models import EOS, build_model
from support.resuming import at_step, weights_of

from hf_genlm.card import write_card
from hf_genlm.cli.main import main, parse
from hf_genlm.cli.options import stated_recipe
from hf_genlm.config.recipe import CorpusRecipe, load_recipe
from hf_genlm.errors import Stopped, UserError
from hf_genlm.evaluation.languages import (
    SCRIPTS,
    measure_parallel,
    measure_tokenization,
    scripts_of,
    summarize_languages,
)
from hf_genlm.evaluation.likelihood import measure_likelihood
from hf_genlm.evaluation.measurement import Measurement, read_measurements
from hf_genlm.text.corpus import notes_on, read_corpus
from hf_genlm.text.encoding import TokenizedDocuments
from hf_genlm.text.languages import (
    BalancedRows,
    balance,
    check_languages,
    premiums_of,
    read_parallel,
    repeat_documents,
    spans,
)
from hf_genlm.text.packing import PackedRows
from hf_genlm.training.processes import PaddedSampler
from hf_genlm.training.train import train

LINES = {"eng": 100, "rus": 30, "hin": 15}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file for each language, of unlike sizes; and parallel ones."""
    folder = tmp_path_factory.mktemp("languages")
    for code, n in LINES.items():
        (folder / f"{code}.txt").write_text(lines_of(code, n), encoding="utf-8")
        (folder / f"{code}-held.txt").write_text(lines_of(code, 12, seed=1), encoding="utf-8")
        sentences = [" ".join(WORDS[code][i : i + 4]) for i in range(8)]
        (folder / f"{code}-parallel.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return folder


def recipe_for(folder, *assignments, named=True):
    sources = ",".join(f"{code}={folder}/{code}.txt" for code in LINES)
    plain = ",".join(f"{folder}/{code}.txt" for code in LINES)
    stated = f"corpus.languages={sources}" if named else f"corpus.sources={plain}"
    return load_recipe(None, [*SMALL, stated, *assignments])


def test_a_parallel_text_that_is_trained_on_is_told(folder):
    files = ",".join(f"{code}={folder}/{code}-parallel.txt" for code in LINES)
    report = read_corpus(recipe_for(folder, f"corpus.parallel={files}").corpus).report
    assert not notes_on(report)
    sources = files.replace("eng-parallel", "eng")  # of English another text
    recipe = load_recipe(None, [f"corpus.languages={sources}", f"corpus.parallel={files}"])
    report = read_corpus(recipe.corpus).report
    others = ", ".join(code for code in LINES if code != "eng")
    assert notes_on(report)[-1].startswith(f"the parallel text of {others} is trained on too")


def test_yaml_set_and_options_say_the_same(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("corpus: {languages: {no: [a.txt, b/], zh-Hans: [c.txt]}, byte_premiums: {no: 1.1}}\n")
    by_set = ["corpus.languages=no=a.txt,no=b/,zh-Hans=c.txt", "corpus.byte_premiums={no: 1.1}"]
    options = parse(
        ["train", "--source", "no=a.txt", "--source", "no=b/", "--source", "zh-Hans=c.txt",
         "--set", "corpus.byte_premiums=no=1.1"]
    )  # fmt: skip
    recipes = [load_recipe(file), load_recipe(None, by_set), stated_recipe(options)]
    for recipe in recipes:
        assert recipe.corpus.languages == {"no": ["a.txt", "b/"], "zh-Hans": ["c.txt"]}
        assert recipe.corpus.byte_premiums == {"no": 1.1}
    again = tmp_path / "again.yaml"
    again.write_text(recipes[0].to_yaml())
    assert load_recipe(again) == recipes[0]


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        (["corpus.languages=French=a"], "'French'"),
        (["corpus.languages=fra_Latn=a"], "'fra_Latn'"),
        (["corpus.languages=fra"], "key=value"),
        (["corpus.languages=fra=a", "corpus.sources=b"], "'b' names no language"),
        (["corpus.sources=b", "corpus.temperature=3"], "corpus.temperature = 3"),
        (["corpus.languages=fra=a", "corpus.temperature=0.5"], "corpus.temperature = 0.5"),
        (["corpus.languages=fra=a", "corpus.byte_premiums=deu=2"], "'deu'"),
        (["corpus.languages=fra=a", "corpus.byte_premiums=fra=0"], "more than 0"),
        (["corpus.languages=fra=a,deu=b", "corpus.byte_premiums=deu=2", "corpus.temperature=2"], "'fra'"),
        (["corpus.languages=fra=a", "corpus.stream=true"], "--stream"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(stated, named):
    with pytest.raises(UserError) as caught:
        check_languages(load_recipe(None, stated).corpus)
    assert named in str(caught.value)


def test_usual_codes_are_taken():
    codes = ["en", "fra", "pt-BR", "zh-Hans", "sr-Latn-RS", "es-419", "de-1996", "sl-rozaj"]
    check_languages(CorpusRecipe(languages={code: ["a"] for code in codes}))


def test_every_language_is_held_out_in_proportion(folder):
    """Each file is one document; both sides of each language, put together, are all of its lines."""
    corpus = read_corpus(recipe_for(folder).corpus)
    report = corpus.report["languages"]
    for split, documents in (("train", corpus.train), ("validation", corpus.validation)):
        for code, span in spans({code: of[split]["documents"] for code, of in report.items()}).items():
            texts = [document.text for document in documents[span]]
            assert all(set(text.split()) <= set(WORDS[code]) for text in texts)
            counts = [len(texts), sum(len(t.encode()) for t in texts), sum(map(len, texts))]
            assert [report[code][split][key] for key in ("documents", "bytes", "characters")] == counts
    for code, n in LINES.items():
        n_bytes = len(lines_of(code, n).encode())
        both = [report[code][split]["bytes"] for split in ("train", "validation")]
        assert sum(both) == n_bytes
        assert both[1] / n_bytes == pytest.approx(0.2, abs=0.1)
    assert [file["language"] for file in corpus.report["files"]] == list(LINES)


def test_validation_of_ones_own_names_every_language(folder):
    held = ",".join(f"{code}={folder}/{code}-held.txt" for code in LINES)
    corpus = read_corpus(recipe_for(folder, f"corpus.validation={held}").corpus)
    assert [of["validation"]["documents"] for of in corpus.report["languages"].values()] == [1, 1, 1]
    for held, named in ((f"eng={folder}/eng-held.txt", "'rus'"), (f"{folder}/eng-held.txt", "no language")):
        with pytest.raises(UserError, match=named):
            read_corpus(recipe_for(folder, f"corpus.validation={held}").corpus)
    held = ",".join(f"{code}={folder}/{code}{'' if code == 'hin' else '-held'}.txt" for code in LINES)
    with pytest.raises(UserError, match="no training text of 'hin' is left"):
        read_corpus(recipe_for(folder, f"corpus.validation={held}").corpus)


def test_shares_by_temperature_and_byte_premium():
    """By hand: sizes 8 and 1 at T = 3 are 2 to 1; with premiums 1 and 2 the contents are 8 and 0.5."""
    shares, repeats = balance([8000, 1000], [1, 1], 3)
    assert shares == pytest.approx([2 / 3, 1 / 3])
    assert repeats == pytest.approx([9 * (2 / 3) / 8, 9 * (1 / 3)])
    shares, repeats = balance([8000, 1000], [1, 2], 1e9)
    assert shares == pytest.approx([1 / 2, 1 / 2])
    assert repeats == pytest.approx([3 / 8, 6.0])  # 3,000 and 6,000 bytes: as much content
    shares, repeats = balance([8000, 1000], [1, 2], 1)
    assert shares == pytest.approx([16 / 17, 1 / 17])
    assert repeats == [1, 1]


def test_byte_premiums_are_measured_on_the_parallel_text(folder):
    files = ",".join(f"{code}={folder}/{code}-parallel.txt" for code in reversed(LINES))
    recipe = recipe_for(folder, f"corpus.parallel={files}").corpus
    n_bytes = {
        code: sum(len(line.encode()) for line in lines) for code, lines in read_parallel(recipe).items()
    }
    assert premiums_of(recipe) == pytest.approx({code: n / n_bytes["eng"] for code, n in n_bytes.items()})
    assert premiums_of(recipe)["hin"] > 2
    (folder / "short.txt").write_text("one\n")
    recipe.parallel["eng"] = str(folder / "short.txt")
    with pytest.raises(UserError, match="'eng' has 1 lines and"):
        read_parallel(recipe)


def test_the_tokenizer_sees_each_language_as_often_as_training(folder):
    corpus = read_corpus(recipe_for(folder).corpus)
    counts = {code: of["train"]["documents"] for code, of in corpus.report["languages"].items()}
    repeats = {"eng": 0.3, "rus": 2.0, "hin": 3.6}
    repeated = repeat_documents(corpus.train, counts, repeats)
    texts = [document.text for document in repeated]
    for code, span in spans(counts).items():
        n_bytes = corpus.train[span].n_bytes.sum()
        seen = sum(len(text.encode()) for text in texts if set(text.split()) <= set(WORDS[code]))
        assert seen / n_bytes == pytest.approx(repeats[code], abs=0.1)
    rus = [document.text for document in corpus.train[spans(counts)["rus"]]]
    assert [text for text in texts if set(text.split()) <= set(WORDS["rus"])] == rus * 2


@pytest.fixture(scope="module")
def balanced():
    """Three languages of 60, 12 and 5 rows of 8 tokens; the ids of each are its own."""
    draw = np.random.default_rng(0)
    lengths = [100] * 4 + [40, 38] + [31]
    language = [0] * 4 + [1] * 2 + [2]
    ids = np.concatenate(
        [draw.integers(10 + 10 * k, 20 + 10 * k, n) for k, n in zip(language, lengths, strict=True)]
    )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    documents = TokenizedDocuments(ids.astype(np.uint16), offsets, np.array(lengths))
    counts, repeats = {"eng": 4, "rus": 2, "hin": 1}, {"eng": 0.5, "rus": 2.0, "hin": 4.0}
    return documents, counts, BalancedRows(documents, counts, repeats, 8, eos_id=1, pad_id=0)


def test_a_row_is_of_one_language_and_as_packed(balanced):
    documents, counts, rows = balanced
    packed = [PackedRows(documents[span], 8, 1, 0) for span in spans(counts).values()]
    expected = [part[i] for part in packed for i in range(len(part))]
    batch = rows.__getitems__(list(range(len(rows))))
    for i, row in enumerate(expected):
        for key, values in row.items():
            assert (batch[key][i] == values).all()
            assert (rows[i][key] == values).all()
        assert len({t // 10 for t in row["input_ids"] if t > 1}) == 1


def test_every_pass_has_each_language_in_its_share_and_no_row_waits_for_another(balanced):
    _, _, rows = balanced
    n_rows = [len(part) for part in rows.parts.values()]
    wanted = np.array(n_rows) * [0.5, 2.0, 4.0]
    exact = wanted / wanted.sum() * len(rows)
    assert np.abs(rows.rows_per_epoch - exact).max() < 1
    language = np.repeat(np.arange(3), n_rows)
    read = np.zeros(len(rows), dtype=int)
    for epoch in range(7):
        order = rows.order(5, epoch)
        assert len(order) == len(rows)
        assert (np.bincount(language[order], minlength=3) == rows.rows_per_epoch).all()
        read += np.bincount(order, minlength=len(rows))
        for k in range(3):
            assert np.ptp(read[language == k]) <= 1
    assert (rows.order(5, 3) == rows.order(5, 3)).all()
    assert (rows.order(5, 3) != rows.order(6, 3)).any()
    assert len(rows.first_tokens(60)) == pytest.approx(60, abs=3)
    tokens = rows.first_tokens(10**6)
    shares = [(tokens // 10 == k + 1).sum() / (tokens > 1).sum() for k in range(3)]
    assert shares == pytest.approx(rows.rows_per_epoch / len(rows), abs=0.03)


def test_several_processes_read_the_same_order_filled_to_whole_steps(balanced):
    _, _, rows = balanced
    order = list(PaddedSampler(len(rows), 8, 5, lambda: 2, rows.order))
    assert order[: len(rows)] == rows.order(5, 2).tolist()
    assert set(order[len(rows) :]) <= {len(rows)}
    assert len(order) % 8 == 0


def test_languages_alone_change_nothing_of_a_training(folder, tmp_path):
    """At temperature 1 the weights are those of the same sources without names, bit for bit."""
    named = ",".join(f"{code}={folder}/{code}-held.txt" for code in LINES)
    plain = ",".join(f"{folder}/{code}-held.txt" for code in LINES)
    a = train(recipe_for(folder, f"corpus.validation={named}"), tmp_path / "a")
    b = train(recipe_for(folder, f"corpus.validation={plain}", named=False), tmp_path / "b")
    assert weights_of(a) == weights_of(b)
    values = {m.name: m.value for m in read_measurements(a.evaluation)}
    assert values.items() >= {m.name: m.value for m in read_measurements(b.evaluation)}.items()


def test_a_balanced_run_that_was_stopped_comes_to_the_same_weights(folder, tmp_path, capsys):
    """In its third pass: the place in the walk through each language is found again."""
    files = ",".join(f"{code}={folder}/{code}-parallel.txt" for code in LINES)
    settings = [f"corpus.parallel={files}", "corpus.temperature=1000", "training.steps=80"]
    whole = train(recipe_for(folder, *settings), tmp_path / "whole")
    (trained,) = [event for event in whole.read_log() if event["event"] == "trained"]
    assert trained["epochs"] > 2
    listener = at_step(int(160 / trained["epochs"]) + 1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        train(recipe_for(folder, *settings), tmp_path / "stopped", listener)
    resumed = train(recipe_for(folder, *settings), tmp_path / "stopped", resume=True)
    assert weights_of(resumed) == weights_of(whole)
    report = json.loads(whole.corpus.read_text())["languages"]
    assert report["hin"]["repeats"] > report["rus"]["repeats"] > 1 > report["eng"]["repeats"]
    names = {m.name for m in read_measurements(whole.evaluation)}
    for code in LINES:
        parts = ("bits_per_byte", "nats_per_token", "bits_per_character", "bits_per_sentence")
        assert names >= {f"{part}/{code}" for part in parts}
    assert names >= {"information_parity/rus", "mean_language_bits_per_byte", "worst_language_bits_per_byte"}
    measured = json.loads(whole.evaluation.read_text())
    assert main(["evaluate", str(whole.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == measured
    card = write_card(whole)
    assert ModelCard.load(card).data.language == ["en", "ru", "hi"]  # ISO 639-1
    values = {m.name: m.value for m in read_measurements(whole.languages)}
    row = next(line for line in card.read_text().splitlines() if line.startswith("| Hindi (hin) |"))
    assert row.split(" | ")[2] == f"{report['hin']['repeats']:.2f} times"
    assert f"{values['bytes_per_token/hin']:.2f}" in row


def test_what_does_not_go_with_balancing_is_refused_before_anything_is_read(tmp_path):
    recipe = load_recipe(
        None, ["corpus.languages=fra=no,deu=where", "corpus.temperature=2", "training.carry_state=true"]
    )
    with pytest.raises(UserError, match="carry_state"):
        train(recipe, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_balance_as_one(folder, tmp_path, monkeypatch):
    settings = [*SMALL, "corpus.temperature=1000", "training.steps=60", "training.num_validations=1"]
    settings.append("corpus.languages=" + ",".join(f"{code}={folder}/{code}.txt" for code in LINES))
    jobs = [{"name": "balanced", "assignments": settings, "sharded": False}]
    compare_with_one(jobs, tmp_path, monkeypatch)


DOCUMENTS = [
    (np.arange(2, 40), 50),
    (np.arange(5, 30), 30),
    (np.arange(3, 60, 2), 90),
    (np.arange(9, 40), 60),
]
PARTS = {"eng": 2, "rus": 1, "hin": 1}


@pytest.mark.parametrize("stack", ["lstm", "hybrid"])
def test_the_numbers_of_a_language_are_those_of_its_text_alone(stack):
    """And in one pass: no window is read twice."""
    model = build_model(stack)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    options = {"start_id": EOS, "context": 12, "batch_size": 3}
    plain = measure_likelihood(model, DOCUMENTS, **options)
    n_calls = len(calls)
    found = measure_likelihood(model, DOCUMENTS, **options, parts=PARTS)
    assert len(calls) == 2 * n_calls
    assert found[: len(plain)] == plain
    values = {m.name: m for m in found}
    for code, span in spans(PARTS).items():
        for alone in measure_likelihood(model, DOCUMENTS[span], **options):
            if alone.name in ("bits_per_byte", "nats_per_token"):
                m = values[f"{alone.name}/{code}"]
                assert m.value == pytest.approx(alone.value, rel=1e-6)
                assert m.n == alone.n
                assert m.stderr == pytest.approx(alone.stderr, rel=1e-4)
    bits = sum(values[f"bits_per_byte/{code}"].value * values[f"bits_per_byte/{code}"].n for code in PARTS)
    assert bits == pytest.approx(values["bits_per_byte"].value * 230, rel=1e-9)


def test_what_follows_from_the_numbers_of_each_language():
    """By hand, of 2 and 1 bits per byte."""
    measured = [
        Measurement("bits_per_byte/eng", 2.0, "bits/byte", 100, 0.3, "validation", False),
        Measurement("bits_per_byte/hin", 1.0, "bits/byte", 300, 0.4, "validation", False),
    ]
    languages = {"eng": {"validation": {"bytes": 100, "characters": 100}},
                 "hin": {"validation": {"bytes": 300, "characters": 120}}}  # fmt: skip
    found = {m.name: m for m in summarize_languages(measured, languages)}
    assert found["bits_per_character/eng"].value == 2.0
    assert found["bits_per_character/hin"].value == 2.5
    assert found["bits_per_character/hin"].stderr == pytest.approx(1.0)
    assert found["bits_per_character/hin"].n == 120
    assert found["mean_language_bits_per_byte"].value == 1.5
    assert found["mean_language_bits_per_byte"].stderr == pytest.approx(0.25)
    assert found["worst_language_bits_per_byte"].value == 2.0
    assert found["worst_language_bits_per_byte"].n == 100


def test_bits_of_a_sentence_by_plain_cross_entropy():
    model = build_model("hybrid")
    sentences = {"eng": [[2, 3, 4, 5], [6, 7]], "rus": [[8, 9, 10, 11, 12, 13], [14, 15, 16, 17]]}
    found = measure_parallel(model, sentences, "eng", start_id=EOS, context=16)
    values = {m.name: m for m in found}
    bits = {}
    for code, lines in sentences.items():
        with torch.no_grad():
            nats = [
                torch.nn.functional.cross_entropy(
                    model(torch.tensor([[EOS, *ids]])).logits[0, :-1], torch.tensor(ids), reduction="sum"
                ).item()
                for ids in lines
            ]
        bits[code] = sum(nats) / math.log(2)
        assert values[f"bits_per_sentence/{code}"].value == pytest.approx(bits[code] / 2, rel=1e-5)
    assert values["information_parity/rus"].value == pytest.approx(bits["eng"] / bits["rus"], rel=1e-5)
    assert "information_parity/eng" not in values


def test_every_script_is_known_to_regex_and_characters_find_theirs():
    by_hand = {"a": "Latin", "ж": "Cyrillic", "अ": "Devanagari", "人": "Han", "ひ": "Hiragana",
               "カ": "Katakana",
               "ع": "Arabic", "7": "Common", " ": "Common", "𐎀": "Other", "\u0301": "Inherited"}  # fmt: skip
    assert scripts_of(by_hand) == by_hand
    assert len(set(SCRIPTS)) == len(SCRIPTS)


def test_whole_characters_and_premiums_by_hand():
    """The tokenizer knows one Cyrillic letter whole, the others as two bytes."""
    tokenizer = trained_on(["жж ж " * 40], vocab_size=259)
    assert tokenizer.tokenize("ж") != ["Ð", "¶"]
    texts = {"rus": ["жжы ж"], "eng": ["ab ab ab"]}
    parallel = {"rus": ["ж", "ы"], "eng": ["abc", "abc"]}  # 1 + 2 and 3 + 3 tokens
    measured = measure_tokenization(tokenizer, texts, parallel, "eng")
    found = {m.name: m.value for m in measured}
    assert found["bytes_per_token/eng"] == 1.0
    assert found["bytes_per_token/rus"] == 9 / 6
    assert found["whole_characters/Cyrillic"] == 3 / 4
    assert found["whole_characters/Latin"] == found["whole_characters/Common"] == 1
    assert found["tokens_per_sentence/rus"] == 3 / 2
    assert found["tokens_per_sentence/eng"] == 6 / 2
    assert found["tokenization_premium/rus"] == 3 / 6
    assert {m.name: m.n for m in measured}["whole_characters/Cyrillic"] == 4


def test_a_character_is_whole_exactly_where_a_token_has_all_of_it():
    """Against a walk over the tokens of a random mixture, one by one."""
    draw = np.random.default_rng(0)
    every = "".join(SENTENCES.values())
    tokenizer = trained_on([every * 3], vocab_size=300)
    text = "".join(draw.choice(list(every), 400))
    letters = [tokenizer.convert_ids_to_tokens(i) for i in tokenizer(text)["input_ids"]]
    inside = [k for k, letter in enumerate(letters) for _ in letter]  # the token of each byte
    n_whole = at = 0
    for character in text:
        size = len(character.encode())
        n_whole += len(set(inside[at : at + size])) == 1
        at += size
    measured = measure_tokenization(tokenizer, {"mul": [text]})
    found = [m for m in measured if m.name.startswith("whole_characters/")]
    assert sum(m.n for m in found) == len(text)
    assert sum(m.value * m.n for m in found) == pytest.approx(n_whole)
    assert 0 < n_whole < len(text)


def test_the_tokenizer_verb_writes_what_it_measured(folder, tmp_path, capsys):
    arguments = [
        "tokenizer",
        "--vocab-size",
        "300",
        "--out",
        str(tmp_path / "t"),
        "--set",
        "corpus.temperature=99",
    ]
    for code in LINES:
        arguments += ["--source", f"{code}={folder}/{code}.txt"]
        arguments += ["--parallel", f"{code}={folder}/{code}-parallel.txt"]
    assert main(arguments) == 0
    names = {m.name for m in read_measurements(tmp_path / "t" / "languages.json")}
    assert names >= {"bytes_per_token/hin", "tokenization_premium/rus", "whole_characters/Devanagari"}
    (head,) = [line for line in capsys.readouterr().out.splitlines() if "tokenization" in line]
    assert "premium" in head
