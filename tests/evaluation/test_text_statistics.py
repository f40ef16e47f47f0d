"""Promise: figures of texts are those of their definitions, counted exactly."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_genlm.errors import UserError
from hf_genlm.evaluation.aggregation import calibration_error
from hf_genlm.evaluation.benchmarks import pair_accuracy
from hf_genlm.evaluation.measurement import jackknife_stderr
from hf_genlm.evaluation.text_statistics import (
    SpanMatcher,
    distinct_n,
    match_texts,
    measure_overlap,
    repetition,
    self_bleu,
    split_words,
    split_words_of_parts,
)

# few different words and lengths, so that ties, empty texts and repeats are common
TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=9), min_size=2, max_size=7)


def random_texts(count: int, longest: int, words: int = 40, seed: int = 0) -> list[list[str]]:
    draw = random.Random(seed)
    frequent = [f"w{int(draw.paretovariate(0.7)) % words}" for _ in range(1000)]
    return [[draw.choice(frequent) for _ in range(draw.randint(0, longest))] for _ in range(count)]


def grams(text: list[str], n: int) -> list[tuple]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def left_out(figure, texts: list) -> np.ndarray:
    return np.array([figure(texts[:i] + texts[i + 1 :]).value for i in range(len(texts))])


@given(TEXTS, st.integers(1, 4))
@settings(deadline=None, max_examples=150)
def test_distinct_and_repetition_are_as_counted_by_hand(texts, n):
    every = [gram for text in texts for gram in grams(text, n)]
    found, repeated = distinct_n(texts, n), repetition(texts, n)
    if not every:
        assert found is None
        assert repeated is None
        return
    assert (found.value, found.n) == (pytest.approx(len(set(every)) / len(every)), len(every))
    shares = [1 - len(set(g)) / len(g) for g in (grams(text, n) for text in texts) if g]
    assert (repeated.value, repeated.n) == (pytest.approx(np.mean(shares), abs=1e-12), len(shares))


def nltk_self_bleu(texts: list[list[str]], n: int) -> float:
    """Texygen's: each text by nltk against all others."""
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    scores = [
        bleu.sentence_bleu(texts[:i] + texts[i + 1 :], text, (1 / n,) * n, bleu.SmoothingFunction().method1)
        for i, text in enumerate(texts)
    ]
    return float(np.mean(scores))


@given(TEXTS, st.integers(1, 5))
@settings(deadline=None, max_examples=100)
def test_self_bleu_is_that_of_nltk(texts, n):
    assert self_bleu(texts, n).value == pytest.approx(nltk_self_bleu(texts, n), abs=1e-12)


def test_self_bleu_of_longer_texts_is_that_of_nltk():
    texts = random_texts(40, 60)
    assert self_bleu(texts).value == pytest.approx(nltk_self_bleu(texts, 4), abs=1e-12)


@pytest.mark.parametrize("texts", [random_texts(12, 30), random_texts(9, 6, words=4, seed=3)], ids=len)
@pytest.mark.parametrize(
    "figure", [lambda t: distinct_n(t, 1), lambda t: distinct_n(t, 2), self_bleu], ids=["1", "2", "bleu"]
)
def test_the_jackknife_leaves_each_text_out(texts, figure):
    """As if the figure were computed again without each."""
    texts = [text for text in texts if len(text) > 1]  # those without an n-gram take no part
    again = left_out(figure, texts)
    assert figure(texts).stderr == pytest.approx(jackknife_stderr(again), rel=1e-9)
    assert jackknife_stderr(again) > 0


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).normal(size=50)
    without = (x.sum() - x) / 49
    assert jackknife_stderr(without) == pytest.approx(x.std(ddof=1) / np.sqrt(50))


def test_extremes():
    same, apart = [list("abcdefgh")] * 50, [[f"{i}/{k}" for k in range(8)] for i in range(50)]
    assert distinct_n(same, 1).value == pytest.approx(8 / 400)
    assert self_bleu(same).value == pytest.approx(1)
    assert distinct_n(apart, 1).value == 1
    assert self_bleu(apart).value == 0
    assert repetition([["a"] * 100], 4).value == pytest.approx(1 - 1 / 97)
    assert repetition(apart, 1).value == 0
    assert repetition([["a"] * 100], 4).stderr is None
    assert self_bleu(same[:2]).stderr is None
    assert self_bleu(same[:1]) is None
    assert distinct_n([], 1) is None


def brute_overlap(texts: list[list[str]], training: list[list[str]], length: int) -> tuple[int, int]:
    known = {gram for text in training for gram in grams(text, length)}
    every = [gram for text in texts for gram in grams(text, length)]
    return sum(gram in known for gram in every), len(every)


def longest_common(texts: list[list[str]], training: list[list[str]]) -> int:
    longest = max(map(len, texts), default=0)
    return max((n for n in range(1, longest + 1) if brute_overlap(texts, training, n)[0]), default=0)


@given(TEXTS, TEXTS, st.integers(1, 9), st.sampled_from([1, 2, 3, 1 << 18]))
@settings(deadline=None, max_examples=300)
def test_overlap_is_as_found_by_hand_wherever_the_reading_is_cut(texts, training, length, at_once):
    counter = SpanMatcher(texts, lengths=(length,), buffer_size=at_once)
    for text in training:
        for first in range(0, len(text), 2):
            counter.read(text[first : first + 2])
        counter.end_text()
    found, total = brute_overlap(texts, training, length)
    figure = counter.share(length)
    assert (figure and (figure.value, figure.n)) == ((pytest.approx(found / total), total) if total else None)
    longest = counter.longest()
    assert len(longest) == longest_common(texts, training)
    if longest:
        assert brute_overlap([longest], training, len(longest)) == (1, 1)
        assert brute_overlap([longest], texts, len(longest)) == (1, 1)


def test_a_long_copy_is_found_in_a_long_text():
    draw = random.Random(1)
    training = [" ".join(f"w{draw.randrange(3000)}" for _ in range(200_000)) for _ in range(3)]
    words = split_words(training[1])
    copied = words[77_777 : 77_777 + 123]
    texts = [" ".join(["new", *copied, "new"]), "w1 w2"]
    shares, longest = measure_overlap(texts, training)
    assert longest == copied
    assert shares[32].value == pytest.approx((123 - 31) / (125 - 31))
    assert shares[1].n == 127
    # two halves of it in two texts are no copy of the whole
    _, longest = measure_overlap([" ".join(copied)], [" ".join(copied[:60]), " ".join(copied[60:])])
    assert len(longest) == 63


def test_words_are_the_same_wherever_a_text_is_cut():
    text = "Don't stop: naïve «élève» snake_case 3.14\n\n किताब है। ሰላም፡ለዓለም 我爱你 สวัสดี  end"
    whole = split_words(text)
    assert whole[:6] == ["Don", "'", "t", "stop", ":", "naïve"]
    assert {"snake_case", "किताब", "है", "।", "ሰላም", "ለዓለም", "我", "爱", "你"} <= set(whole)
    for size in (1, 2, 3, 7):
        parts = [(5, text[i : i + size]) for i in range(0, len(text), size)] + [(6, "x")]
        found: dict[int, list[str]] = {}
        for number, words in split_words_of_parts(parts):
            found.setdefault(number, []).extend(words)
        assert found == {5: whole, 6: ["x"]}


def test_counters_share_one_reading():
    counters = [SpanMatcher([["a", "b"]], (2,)), SpanMatcher([["b", "c"]], (2,))]
    match_texts(counters, iter(["a b", "c"]))
    assert [counter.share(2).value for counter in counters] == [1, 0]


def test_lengths_below_one_are_refused():
    for figure in (distinct_n, repetition, self_bleu):
        with pytest.raises(UserError, match="n = 0"):
            figure([["a"], ["b"]], 0)
    with pytest.raises(UserError, match="at least 1 word"):
        measure_overlap(["a"], ["a"], [0, 2])


def test_pairs():
    """Sums of float32 that differ by their rounding alone are as likely."""
    assert pair_accuracy([-1000.0001], [-1000.0]).value == 0.5

    figure = pair_accuracy([-1.0, -5.0, -2.0, -2.0], [-2.0, -4.0, -3.0, -2.0])
    worth = np.array([1, 0, 1, 0.5])
    assert (figure.value, figure.n) == (worth.mean(), 4)
    assert figure.stderr == pytest.approx(worth.std(ddof=1) / 2)
    for good, bad in [([], []), ([-1.0], [-1.0, -2.0]), ([float("nan")], [-1.0])]:
        with pytest.raises(UserError):
            pair_accuracy(good, bad)


def brute_calibration(confidence, correct, bins: int) -> float:
    total = 0.0
    for k in range(bins):
        chosen = [
            i for i, c in enumerate(confidence) if k / bins < c <= (k + 1) / bins or (k == 0 and c == 0)
        ]
        if chosen:
            gap = np.mean([correct[i] for i in chosen]) - np.mean([confidence[i] for i in chosen])
            total += len(chosen) / len(confidence) * abs(gap)
    return total


def test_calibration_error():
    generator = np.random.default_rng(0)
    confidence = generator.random(4000)
    calibrated = generator.random(4000) < confidence
    overconfident = generator.random(4000) < confidence**2
    for correct in (calibrated, overconfident):
        found = calibration_error(confidence, correct)
        assert found.value == pytest.approx(brute_calibration(confidence, correct, 15))
    assert calibration_error(confidence, calibrated).value < 0.03
    # E[c - c^2] = 1/6
    assert calibration_error(confidence, overconfident).value == pytest.approx(1 / 6, abs=0.02)
    assert calibration_error([1.0, 0.0, 0.5, 0.5], [1, 0, 1, 0]).value == 0
    for bad in ([1.5], [-0.1], [float("nan")]):
        with pytest.raises(UserError):
            calibration_error(bad, [1])
    with pytest.raises(UserError, match="right or wrong"):
        calibration_error([0.5], [0.5])


def test_counts_do_not_depend_on_what_tokens_are():
    texts = random_texts(10, 30)
    ids = {word: i for i, word in enumerate(Counter(w for text in texts for w in text))}
    numbered = [[ids[word] for word in text] for text in texts]
    assert distinct_n(texts, 2) == distinct_n(numbered, 2)
    assert self_bleu(texts) == self_bleu(numbered)
