"""Promise: with `corpus.near_duplicates`, no two training documents are that similar, none is like one of the
validation split, and none goes without a twin that stays."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_genlm.config.recipe import CorpusRecipe, Recipe, load_recipe
from hf_genlm.errors import UserError
from hf_genlm.text import duplicates
from hf_genlm.text.corpus import read_corpus
from hf_genlm.text.duplicates import (
    MAX_MISS_RATE,
    PERMUTATIONS,
    ShingledDocuments,
    bands_of,
    find_near_duplicates,
    shingles_of,
    units_of,
)
from hf_genlm.text.store import Document, as_documents
from hf_genlm.training.check import check

pytest.importorskip("datasketch")
WORDS = [f"word{i}" for i in range(2000)]


def documents_of(texts):
    return as_documents([Document(text, "here") for text in texts])


def similarity(one: str, other: str) -> float:
    return ShingledDocuments(documents_of([one]), documents_of([other])).similarity(0, 1)


def some_text(generator: random.Random, n: int = 120) -> str:
    return " ".join(generator.choices(WORDS, k=n))


def changed(text: str, n: int, generator: random.Random) -> str:
    """With other words at `n` places."""
    words = text.split()
    for place in generator.sample(range(len(words)), n):
        words[place] = "other" + str(generator.random())
    return " ".join(words)


def by_sets(one: str, other: str) -> float:
    """The definition, on sets of the shingles themselves."""
    sets = []
    for text in (one, other):
        units = units_of(text)
        runs = {tuple(units[i : i + 5]) for i in range(len(units) - 4)}
        sets.append(runs or ({tuple(units)} if units else set()))
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1]) if all(sets) else 0.0


def greedily(train, validation, threshold: float) -> list[bool]:
    """Every pair compared: who stays."""
    stay = list(validation)
    kept = []
    for text in train:
        kept.append(all(by_sets(text, other) < threshold for other in stay))
        if kept[-1]:
            stay.append(text)
    return kept


few_words = st.lists(st.sampled_from("abcd"), max_size=12)


@given(few_words, few_words)
def test_similarity_is_its_definition(one, other):
    one, other = " ".join(one), " ".join(other)
    assert similarity(one, other) == by_sets(one, other)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_the_same_documents_stay_as_when_all_pairs_are_compared(seed, threshold):
    generator = random.Random(seed)
    texts = [some_text(generator) for _ in range(20)]
    texts += [
        changed(generator.choice(texts), generator.choice([0, 1, 2, 4, 8, 16]), generator) for _ in range(60)
    ]
    generator.shuffle(texts)
    train, validation = texts[10:], texts[:10]
    found = find_near_duplicates(documents_of(train), documents_of(validation), threshold)
    wanted = greedily(train, validation, threshold)
    assert found.kept.tolist() == wanted
    assert 0 < found.to_json()["removed"] == wanted.count(False)
    again = find_near_duplicates(documents_of(train), documents_of(validation), threshold)
    assert again.to_json() == found.to_json()


def test_the_first_of_a_cluster_stays_and_validation_comes_first():
    generator = random.Random(1)
    one, held, alone = (some_text(generator) for _ in range(3))
    train = [
        one,
        changed(one, 1, generator),
        alone,
        changed(held, 1, generator),
        changed(one, 1, generator),
        one,
    ]
    found = find_near_duplicates(documents_of(train), documents_of([held, held]), 0.8)
    assert found.kept.tolist() == [True, False, True, False, False, False]
    assert found.to_json() == {
        "removed": 4, "of_validation": 1, "clusters": 2, "threshold": 0.8, "shingle": 5
    }  # fmt: skip


def test_a_chain_is_not_one_cluster():
    """What is like something that went, and unlike all that stays, stays."""
    words = [f"w{i}" for i in range(130)]
    chain = [" ".join(words[start : start + 100]) for start in (0, 6, 12)]
    assert similarity(*chain[:2]) > 0.8 > similarity(chain[0], chain[2])
    found = find_near_duplicates(documents_of(chain), documents_of([]), 0.8)
    assert found.kept.tolist() == [True, False, True]


def test_bands_miss_no_more_than_they_say():
    for threshold in np.linspace(0.05, 1, 40):
        bands, rows = bands_of(threshold)
        assert bands * rows <= PERMUTATIONS
        assert (1 - threshold**rows) ** bands <= MAX_MISS_RATE or rows == 1
    assert bands_of(0.8) == (25, 5)


def test_candidates_alone_take_nothing_out(monkeypatch):
    """The signatures may say what they like: the documents themselves decide."""
    generator = random.Random(2)
    text = some_text(generator, 60)
    train = [text, changed(text, 6, generator), changed(text, 12, generator)]
    assert 0.2 < similarity(train[0], train[1]) < 0.8
    compared = Counter()
    exact = ShingledDocuments.similarity

    def counted(self, i, j):
        compared["pairs"] += 1
        return exact(self, i, j)

    monkeypatch.setattr(ShingledDocuments, "similarity", counted)
    bands = PERMUTATIONS, 1
    found = find_near_duplicates(documents_of(train), documents_of([]), 0.8, bands=bands, margin=1000)
    assert found.kept.all()
    assert compared["pairs"] == 3


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("人人生而自由\uff0c在尊严和权利上一律平等。", "人人生而自由,在尊严和权利上一律平等\uff01", True),
        ("人人生而自由\uff0c在尊严和权利上一律平等。", "今天天气很好\uff0c我们一起去公园散步吧", False),
        ("มนุษย์ทั้งหลายเกิดมามีอิสระ", "มนุษย์ทั้งหลาย เกิดมามีอิสระ ", True),
        ("มนุษย์ทั้งหลายเกิดมามีอิสระ", "เสมอภาคกันในเกียรติศักดิ์", False),
        ("One two, three (four) FIVE six.", "one two three four five six", True),
        ("सभी मनुष्यों को गौरव और अधिकारों के मामले में", "सभी मनुष्यों को गौरव और अधिकारों के मामले में।", True),
        ("short text", "Short text!", True),
        ("short text", "other text", False),
        ("... !!!", "... !!!", False),
        ("", "", False),
    ],
)  # fmt: skip
def test_texts_of_other_scripts_and_short_ones(one, other, alike):
    assert (similarity(one, other) == 1) == alike
    found = find_near_duplicates(documents_of([one or " ", other or " "]), documents_of([]), 0.9)
    assert found.kept.tolist() == [True, not alike]


def test_a_character_is_a_unit_where_words_are_not_parted():
    assert units_of("Ça va, 人生abc ไทย!") == ["ça", "va", "人", "生", "abc", "ไ", "ท", "ย"]


def test_parts_do_not_matter():
    generator = random.Random(4)
    letters = [*"ab ,.人ไéÀΣİ\n", "x" * 1000, " " * 600]
    for _ in range(1000):
        text = "".join(generator.choices(letters, k=generator.randrange(40)))
        cuts = sorted(generator.randrange(len(text) + 1) for _ in range(generator.randrange(5)))
        parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        whole, by_parts = ([h for run in shingles_of(each) for h in run] for each in ([text], parts))
        assert whole == by_parts
        assert len(whole) == max(len(units_of(text)) - 4, min(1, len(units_of(text))))


def test_long_documents_are_compared_by_a_sample():
    """Of a long document the least hashes decide, in bounded memory: exactly if they are all."""
    generator = random.Random(3)
    text = some_text(generator, 3000)
    texts = [text, changed(text, 60, generator), some_text(generator, 40), " ".join(text.split()[:1500])]
    exact = ShingledDocuments(documents_of(texts), documents_of([]))
    sampled = ShingledDocuments(documents_of(texts), documents_of([]), max_shingles=1000)
    for i, j in itertools.product(range(4), repeat=2):
        wanted = by_sets(texts[i], texts[j])
        assert exact.similarity(i, j) == wanted
        assert abs(sampled.similarity(i, j) - wanted) <= 4 * (wanted * (1 - wanted) / 1000) ** 0.5
        assert max(len(sampled.hashes(i)), len(sampled.hashes(j))) <= 1000 < len(exact.hashes(0))
    repeating = " ".join(["a b c d e f"] * 5000)
    short = ShingledDocuments(documents_of([repeating, repeating + " a b"]), documents_of([]), max_shingles=9)
    assert short.similarity(0, 1) == 1, "few distinct shingles, however long the text"


def test_the_cache_is_bounded_by_bytes():
    generator = random.Random(7)
    texts = [some_text(generator, 200) for _ in range(20)]
    documents = ShingledDocuments(documents_of(texts), documents_of([]), cache_bytes=8 * 700)
    for i in range(20):
        documents.hashes(i)
        held = [hashes.nbytes for hashes in documents._sets.values()]
        assert sum(held) == documents._n_bytes <= 8 * 700
    assert 2 <= len(held) <= 4


def boilerplate(n: int, n_words: int = 400) -> list[str]:
    """Texts that share about two thirds of their shingles with each other: alike, but for the threshold."""
    generator = random.Random(8)
    same = some_text(generator, n_words).split()
    return [" ".join([*same, *some_text(generator, n_words // 10).split()]) for _ in range(n)]


def counting(monkeypatch, **bounds: int) -> Counter:
    counts: Counter[str] = Counter()

    class Counted(ShingledDocuments):
        def similarity(self, i, j):
            counts["compared"] += 1
            return super().similarity(i, j)

        def _document(self, i):
            counts["read"] += 1
            return super()._document(i)

    monkeypatch.setattr(duplicates, "ShingledDocuments", Counted)
    for name, value in bounds.items():
        monkeypatch.setattr(duplicates, name, value)
    return counts


@pytest.mark.parametrize("n", [40, 80])
def test_boilerplate_is_compared_in_linear_time(monkeypatch, n):
    """All documents are candidates of each other, and none is a near-duplicate."""
    counts = counting(monkeypatch, MAX_MEMBERS=16, MAX_COMPARED=8)
    texts = boilerplate(n)
    assert 0.75 < similarity(*texts[:2]) < 0.88
    found = find_near_duplicates(documents_of(texts), documents_of([]), 0.9)
    assert found.kept.all()
    assert 4 * n < counts["compared"] <= 8 * n, "all pairs would be n^2 / 2"
    assert counts["read"] <= n, "each is read once, and not for each pair"


def test_near_duplicates_among_boilerplate_are_found(monkeypatch):
    """The most similar signatures are compared first, whatever the number of candidates."""
    counting(monkeypatch, MAX_MEMBERS=64, MAX_COMPARED=4)
    texts = boilerplate(60)
    generator = random.Random(9)
    copies = [changed(text, 1, generator) for text in texts[20:40]]
    held = changed(texts[5], 1, generator)
    found = find_near_duplicates(documents_of([*texts, *copies]), documents_of([held]), 0.95)
    assert found.kept.tolist() == [i != 5 and i < 60 for i in range(80)]
    assert found.of_validation == 1


# the corpus


def write_texts(folder: Path) -> tuple[list[str], list[str]]:
    generator = random.Random(5)
    texts = [some_text(generator, 60) for _ in range(40)]
    copies = [changed(text, 1, generator) for text in texts[:15]]
    lines = (json.dumps({"text": text}) + "\n" for text in texts + copies)
    (folder / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    return texts, copies


def test_a_corpus_without_near_duplicates(tmp_path):
    texts, copies = write_texts(tmp_path)
    plain = read_corpus(CorpusRecipe(sources=[str(tmp_path)], validation_fraction=0.2))
    told = []
    corpus = read_corpus(
        CorpusRecipe(sources=[str(tmp_path)], validation_fraction=0.2, near_duplicates=0.7),
        lambda done, total: told.append((done, total)),
    )
    assert corpus.report["validation"] == plain.report["validation"], "what is measured is the same text"
    report = corpus.report["near_duplicates"]
    assert report["threshold"] == 0.7
    assert report["of_validation"] > 0
    assert len(corpus.train) + len(corpus.validation) + report["removed"] == len(texts) + len(copies)
    train, validation = ([d.text for d in split] for split in (corpus.train, corpus.validation))
    assert max(by_sets(one, other) for one in train for other in validation) < 0.7
    assert max(by_sets(one, other) for i, one in enumerate(train) for other in train[:i]) < 0.7
    assert corpus.report["train"]["documents"] == len(train)
    assert told == [(0, 55)]
    json.dumps(corpus.report)


def test_scrubbing_comes_first(tmp_path):
    """Documents that differ in what is replaced alone are copies, exact ones of a validation document too."""
    lines = [json.dumps({"text": f"a letter to nobody{i}@example.org"}) + "\n" for i in range(30)]
    (tmp_path / "a.jsonl").write_text(
        "".join(lines) + json.dumps({"text": "all other words stay as they are"})
    )
    (tmp_path / "held.txt").write_text("something else that is not like it")
    recipe = CorpusRecipe(sources=[str(tmp_path / "a.jsonl")], validation=[str(tmp_path / "held.txt")])
    recipe.scrub, recipe.near_duplicates = ["email"], 0.9
    report = read_corpus(recipe).report
    assert report["train"]["documents"] == 2
    assert (report["near_duplicates"]["removed"], report["near_duplicates"]["clusters"]) == (29, 1)
    (tmp_path / "held.txt").write_text("a letter to <EMAIL>")
    report = read_corpus(recipe).report
    assert (report["duplicates_removed"], report["near_duplicates"]["removed"]) == (30, 0)


def test_languages_are_counted_after_it(tmp_path):
    texts, _ = write_texts(tmp_path)
    generator = random.Random(6)
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": text + f" {i}"}) + "\n" for i, text in enumerate(texts[:5]))
        + "".join(json.dumps({"text": some_text(generator, 60)}) + "\n" for _ in range(25))
    )
    recipe = CorpusRecipe(near_duplicates=0.7, validation_fraction=0.1)
    recipe.languages = {"eng": [str(tmp_path / "a.jsonl")], "deu": [str(tmp_path / "b.jsonl")]}
    report = read_corpus(recipe).report
    of_each = [report["languages"][code]["train"]["documents"] for code in ("eng", "deu")]
    assert sum(of_each) == report["train"]["documents"]
    n_held = sum(report["languages"][code]["validation"]["documents"] for code in ("eng", "deu"))
    assert sum(of_each) + n_held + report["near_duplicates"]["removed"] == 85


def test_nothing_left_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten")
    (tmp_path / "held.txt").write_text("One two three four five six seven eight nine ten.")
    recipe = CorpusRecipe(sources=[str(tmp_path / "a.txt")], validation=[str(tmp_path / "held.txt")])
    assert len(read_corpus(recipe).train) == 1
    recipe.near_duplicates = 0.9
    with pytest.raises(UserError, match="no training text is left"):
        read_corpus(recipe)


def test_a_stream_is_refused_by_name():
    recipe = Recipe(corpus=CorpusRecipe(sources=["x"], stream=True, near_duplicates=0.8))
    recipe.training.steps = 1
    from hf_genlm.text.streaming import check_stream

    with pytest.raises(UserError, match=r"corpus\.near_duplicates = 0\.8 .* --stream"):
        check_stream(recipe.corpus)


def test_a_missing_library_names_its_extra(monkeypatch):
    recipe = Recipe(corpus=CorpusRecipe(near_duplicates=0.8))
    recipe.training.steps = 1
    check(recipe)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"datasketch: pip install .*datasketch>="):
        check(recipe)


@pytest.mark.parametrize("value", ["0", "1.1", "-0.5", "nan"])
def test_a_threshold_is_a_share(value):
    with pytest.raises(UserError, match=r"corpus\.near_duplicates"):
        load_recipe(None, [f"corpus.near_duplicates={value}"])


# a run


def test_the_command_the_card_and_resuming(tmp_path, capsys):
    from hf_genlm.cli.main import main
    from hf_genlm.files import read_json
    from hf_genlm.run_folder import RunFolder

    write_texts(tmp_path)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"text": f"{some_text(random.Random(i), 60)} me{i}@example.org"}) + "\n"
            for i in range(9)
        )
    out = tmp_path / "run"
    shape = ["model.hidden_size=16", "model.num_hidden_layers=1", "tokenizer.vocab_size=300",
             "training.num_samples=0", "training.max_seq_length=32", "training.batch_size=4"]  # fmt: skip
    command = ["train", str(tmp_path / "a.jsonl"), "--steps", "2", "--out", str(out)]
    for setting in shape:
        command += ["--set", setting]
    assert main([*command, "--scrub", "--near-duplicates", "0.7"]) == 0
    report = read_json(RunFolder(out).corpus)
    assert report["scrubbed"]["types"]["email"] == 9
    removed = report["near_duplicates"]["removed"]
    assert removed > 0
    said = capsys.readouterr().err
    assert f"note          {removed} training documents left out that are near-duplicates\n" in said
    assert "note          replaced by placeholders: 9 email\n" in said
    card = (RunFolder(out).model / "README.md").read_text(encoding="utf-8")
    assert "`email` 9" in card
    assert f"Near-duplicates removed: {report['near_duplicates']['removed']}, of" in card
    for option, name in (
        (["--near-duplicates", "0.9"], "near_duplicates"),
        (["--set", "corpus.scrub=ip"], "scrub"),
    ):
        capsys.readouterr()
        assert main(["train", "--resume", "--out", str(out), *option]) == 2
        assert f"corpus.{name}" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(out), "--scrub", "--near-duplicates", "0.7"]) == 0


# parts that two texts share


def novel(seed: int, n_lines: int = 400) -> str:
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 9))) for _ in range(2000)]
    return "".join(" ".join(generator.choices(words, k=12)) + ".\n" for _ in range(n_lines))


def edited(text: str, every: int) -> str:
    words = text.split(" ")
    words[::every] = ["XX"] * len(words[::every])
    return " ".join(words)


def naive_share(held_out: list[str], train: list[str]) -> float | None:
    """The naive twin: all runs as bytes."""

    def runs(text: str) -> list[bytes]:
        text = "".join(c.lower() if c.isascii() else c for c in text if not c.isascii() or c.isalnum())
        letters = text.encode()
        return [letters[i : i + duplicates.RUN] for i in range(len(letters) - duplicates.RUN + 1)]

    known = {run for text in train for run in runs(text)}
    wanted = [run for text in held_out for run in runs(text)]
    return sum(run in known for run in wanted) / len(wanted) if wanted else None


@pytest.mark.parametrize(("most", "letters_at_once"), [(10**9, 1 << 16), (10**9, 100), (600, 5000)])
def test_the_share_is_that_of_all_runs(monkeypatch, most, letters_at_once):
    monkeypatch.setattr(duplicates, "_LETTERS_AT_ONCE", letters_at_once)
    monkeypatch.setattr(duplicates._sampling, "__defaults__", (most,))
    text = novel(1, 120)
    held = [text[100:1500].upper().replace(" ", "\r\n"), novel(2, 15), "人人生而自由" * 9, "short", ""]
    train = ["short", text, edited(novel(2, 15), 20), "人人生而自由" * 8, novel(3, 20)]
    found = duplicates.share_found(documents_of(held), documents_of(train))
    assert found == pytest.approx(naive_share(held, train), abs=0.06 if most < 10**9 else 1e-4)
    assert 0.4 < found < 0.95
    assert duplicates.share_found(documents_of(held), documents_of([novel(4, 50)])) == 0
    assert duplicates.share_found(documents_of(["short"] * 9), documents_of(train)) is None


def test_runs_end_with_the_document():
    half = novel(1, 1).replace(" ", "")[:40]
    other = novel(2, 1).replace(" ", "")[:40]
    held = documents_of([half + other])
    assert duplicates.share_found(held, documents_of([half + other])) == 1
    assert duplicates.share_found(held, documents_of([half, other])) == 0
    assert duplicates.share_found(documents_of([half, other]), held) is None


def test_copies_are_found_whatever_their_form():
    text, other = novel(1), novel(2)
    forms = [
        other,
        text,
        "\ufeff" + text.upper().replace("\n", "\r\n"),
        text[: len(text) // 3],
        edited(text, 200),
    ]
    found = duplicates.find_copies(documents_of([*forms, text + novel(3, 40), edited(text, 9), "a", ""]))
    assert found.tolist() == [False, True, True, True, True, False, False, False, False]


@pytest.mark.parametrize("form", ["same", "gz", "crlf", "part", "edited"])
def test_a_copy_of_a_file_is_left_out_before_it_is_cut(tmp_path, form):
    """Else most lines that are held out of one stand in the other, which is trained on."""
    import gzip

    from hf_genlm.text.corpus import notes_on

    text, content = novel(1), novel(1).encode()
    (tmp_path / "novel.txt").write_bytes(content)
    (tmp_path / "other.txt").write_text(novel(2))
    alone = read_corpus(CorpusRecipe(sources=[str(tmp_path)]))
    name, copy = {
        "same": ("novel (1).txt", content),
        "gz": ("novel.txt.gz", gzip.compress(content)),
        "crlf": ("novel2.txt", text.replace("\n", "\r\n").encode()),
        "part": ("z.txt", content[: len(content) // 2]),
        "edited": ("z.txt", edited(text, 25).encode()),
    }[form]
    (tmp_path / name).write_bytes(copy)
    recipe = CorpusRecipe(sources=[str(tmp_path)])
    corpus = read_corpus(recipe)
    if form == "edited":  # it is kept and told, and the switch that is named leaves it out
        assert corpus.report["copies_removed"] == 0
        assert corpus.report["held_out_in_training"] > 0.1
        assert "--near-duplicates 0.5" in " ".join(notes_on(corpus.report))
        recipe.near_duplicates = 0.5
        corpus = read_corpus(recipe)
    train = "".join(document.text for document in corpus.train).splitlines()
    held = "".join(document.text for document in corpus.validation).splitlines()
    assert held
    assert not set(held) & set(train)
    assert corpus.report["copies_removed"] == 1
    assert corpus.report["held_out_in_training"] == 0
    notes = " ".join(notes_on(corpus.report))
    assert "1 copy of other text here left out" in notes
    assert "stands in the training text too" not in notes
    if form in ("gz", "part"):  # of equal ones, the first by name stays
        assert (corpus.report["train"], corpus.report["validation"]) == (
            alone.report["train"], alone.report["validation"]
        )  # fmt: skip


@pytest.mark.parametrize("method", ["given", "hash", "document", "block"])
def test_the_share_is_measured_and_told_for_every_split(tmp_path, method):
    from hf_genlm.text.corpus import notes_on

    shared, fields = novel(1, 40), {}
    texts = [novel(seed, 40) + shared for seed in range(2, 62)]
    if method == "block":
        texts = ["".join(novel(seed, 4) + shared[:800] for seed in range(200))]
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text("".join(lines))
    if method == "given":
        (tmp_path / "held.txt").write_text(novel(99, 40) + shared)
        fields = {"validation": [str(tmp_path / "held.txt")]}
    recipe = CorpusRecipe(sources=[str(tmp_path / "a.jsonl")], split_by_hash=method == "hash", **fields)
    report = read_corpus(recipe).report
    assert report["split"]["method"] == method
    assert 0.4 < report["held_out_in_training"] < 0.8
    assert "of the held-out text stands in the training text too" in " ".join(notes_on(report))
