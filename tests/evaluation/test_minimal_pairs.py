"""The promise: of two sentences the likelier one is found, exactly, whatever the batches; ties count half."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.models import build_model

from hf_genlm.errors import UserError
from hf_genlm.evaluation.benchmarks import Pair, measure_minimal_pairs, read_pairs

START, CONTEXT = 1, 12


def letters(texts, add_special_tokens, split_special_tokens=True, verbose=False):
    """A tokenizer of letters."""
    assert add_special_tokens is False
    assert split_special_tokens, "special words in a text are text"
    return {"input_ids": [[2 + ord(letter) % 50 for letter in text] for text in texts]}


def make_pairs(count: int, uid: str = "one", term: str = "all", seed: int = 0) -> list[Pair]:
    generator = np.random.default_rng(seed)

    def sentence() -> str:
        return "".join(generator.choice(list("abcdefgh"), size=generator.integers(1, 20)))

    return [Pair(sentence(), sentence(), uid, term) for _ in range(count)]


def measure(model, pairs, **options):
    found = measure_minimal_pairs(model, letters, pairs, **{"start_id": START, "context": CONTEXT, **options})
    return {m.name: m for m in found}


@torch.no_grad()
def naive_log_p(model, text: str) -> float:
    """One forward pass per token; of a text beyond the context, the half of it that a window slides by."""
    ids = [START, *letters([text], False)["input_ids"][0]]
    total = 0.0
    for t in range(1, len(ids)):
        begin = max(0, math.ceil((t - CONTEXT) / (CONTEXT // 2))) * (CONTEXT // 2)
        logits = model(torch.tensor([ids[begin:t]]), use_cache=False).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[ids[t]])
    return total


class UnigramModel(torch.nn.Module):
    """Logits by token alone: the order of a sentence makes no difference."""

    def __init__(self, logits_V: torch.Tensor):
        super().__init__()
        self.logits_V = torch.nn.Parameter(logits_V)
        self.config = SimpleNamespace(vocab_size=len(logits_V))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits_V.expand(*input_ids.shape, -1))


@pytest.mark.parametrize("stack", ["hybrid", "lstm", "full_attention"])
def test_equals_the_definition_and_no_batch_changes_it(stack):
    model, pairs = build_model(stack), make_pairs(25)
    expected = np.mean([naive_log_p(model, p.good) > naive_log_p(model, p.bad) for p in pairs])
    for batch_size in (1, 3, 256):
        found = measure(model, pairs, batch_size=batch_size)["minimal_pairs_accuracy"]
        assert found.value == pytest.approx(expected)
        assert (found.n, found.unit, found.split, found.higher_is_better) == (25, "fraction", "pairs", True)


def test_ties_count_half():
    model = UnigramModel(torch.randn(61, generator=torch.Generator().manual_seed(0)))
    same = [Pair(word, word[::-1], "turned", "order") for word in ("abcdefgh", "hgab", "abccba", "dadcb")]
    assert measure(model, same)["minimal_pairs_accuracy"].value == 0.5
    flat = UnigramModel(torch.zeros(61))
    pairs = [Pair("ab", "cd", "x", "t"), Pair("a", "cd", "x", "t"), Pair("abc", "d", "x", "t")]
    assert measure(flat, pairs)["minimal_pairs_accuracy"].value == pytest.approx((0.5 + 1 + 0) / 3)


def test_means_over_pairs_phenomena_and_paradigms():
    """Shorter is likelier: each pair's outcome is known."""
    flat = UnigramModel(torch.zeros(61))
    right, wrong = ("a", "bb"), ("bb", "a")
    pairs = [
        *[Pair(*right, "u1", "t1")] * 3, Pair(*wrong, "u1", "t1"),
        *[Pair(*right, "u2", "t1")] * 4,
        Pair(*right, "u3", "t2"), Pair(*wrong, "u3", "t2"),
    ]  # fmt: skip
    found = measure(flat, pairs, split="mine")
    values = {name: (m.value, m.n) for name, m in found.items()}
    name = "minimal_pairs_accuracy"
    assert values == {
        name: (0.8, 10),
        f"{name}_macro": ((7 / 8 + 1 / 2) / 2, 10),
        f"{name}/t1": (7 / 8, 8),
        f"{name}/t2": (1 / 2, 2),
        f"{name}/u1": (3 / 4, 4),
        f"{name}/u2": (1.0, 4),
        f"{name}/u3": (1 / 2, 2),
    }
    assert {m.split for m in found.values()} == {"mine"}
    # the pairs of a paradigm are drawn, not the paradigms: variances of u1, u2 and u3 by the textbook
    variances = {"u1": 0.75 * 0.25 / 3, "u2": 0.0, "u3": 0.25}
    assert found[f"{name}/u1"].stderr == pytest.approx(math.sqrt(variances["u1"]))
    micro = sum(variances[u] * share**2 for u, share in (("u1", 0.4), ("u2", 0.4), ("u3", 0.2)))
    assert found[name].stderr == pytest.approx(math.sqrt(micro))
    macro = (variances["u1"] / 4 + variances["u2"] / 4 + variances["u3"]) / 4
    assert found[f"{name}_macro"].stderr == pytest.approx(math.sqrt(macro))
    assert found[f"{name}/u2"].interval is None, "four pairs are too few"
    assert found[name].interval is not None


def test_intervals_are_those_of_drawn_pairs():
    model, pairs = build_model("elman"), make_pairs(60, "u1") + make_pairs(30, "u2", seed=1)
    found = measure(model, pairs)["minimal_pairs_accuracy"]
    right = np.array([naive_log_p(model, p.good) > naive_log_p(model, p.bad) for p in pairs])
    generator = np.random.default_rng(3)
    drawn = [
        (right[:60][generator.integers(0, 60, 60)].sum() + right[60:][generator.integers(0, 30, 30)].sum())
        / 90
        for _ in range(4000)
    ]
    assert found.interval == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=1.5 / 90)
    assert found.stderr == pytest.approx(np.std(drawn), rel=0.06)


def test_one_pair_has_no_error():
    found = measure(build_model("gru"), make_pairs(1))
    assert {(m.stderr, m.interval) for m in found.values()} == {(None, None)}


def line(**fields) -> str:
    return json.dumps(
        {"sentence_good": "a", "sentence_bad": "b", "UID": "u", "linguistics_term": "t"} | fields
    )


def test_a_folder_is_all_its_files(tmp_path):
    (tmp_path / "b.jsonl").write_text(line() + "\n\n" + line(UID="v") + "\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"sentence_good": "é", "sentence_bad": "c"}', encoding="utf-8")
    (tmp_path / "README.md").write_text("no pairs")
    assert read_pairs(tmp_path) == [
        Pair("é", "c", "a", "a"),
        Pair("a", "b", "u", "t"),
        Pair("a", "b", "v", "t"),
    ]
    assert read_pairs(tmp_path / "a.jsonl") == [Pair("é", "c", "a", "a")]
    # a phenomenon that is one paradigm of the same name has one row
    found = measure(build_model("gru"), read_pairs(tmp_path))
    assert [name.partition("/")[2] for name in found] == ["", "", "t", "a", "u", "v"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (line() + "\n{", r"x\.jsonl', line 2: not JSON"),
        (line() + "\n\n[1]", "line 3: must be an object"),
        (line(sentence_bad=None), "line 1: sentence_bad must be a text, not None"),
        (line(sentence_good=""), "line 1: sentence_good"),
        ("\n", "holds no pairs"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, words):
    (tmp_path / "x.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        read_pairs(tmp_path)


def test_nothing_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no pairs at"):
        read_pairs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no pairs"):
        read_pairs(tmp_path)


def test_diverged_logits_are_named():
    with pytest.raises(UserError, match="diverged"):
        measure(UnigramModel(torch.full((61,), math.nan)), make_pairs(2))
