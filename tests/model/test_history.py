"""Promise: a network with counts also predicts what followed the same words earlier in this text."""

import math
import random

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from support.models import EOS, VOCAB, build_model
from support.runs import small_recipe

from hf_genlm.config.recipe import load_recipe
from hf_genlm.config.settle import settle
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.model import GenLMConfig, history_genlm
from hf_genlm.model.history_genlm import MATCHED, GenLMHistory
from hf_genlm.training.train import train

NONE = -1


def history_of(n_words: int) -> GenLMHistory:
    history = GenLMHistory(n_words)
    with torch.no_grad():
        history.theta.copy_(torch.tensor([0.1, 0.05, 0.2, 0.3]))
    return history


def told(history: GenLMHistory, text: list[int]) -> list[float]:
    """Features by the definition."""
    words = ([NONE] * (40 - len(text)) + text)[-history.n_words :]
    context, n_after = words[::-1], [0] * (MATCHED + 1)
    for place in range(1, len(words)):
        before = words[:place][::-1]
        for k in range(MATCHED + 1):
            n_after[k] += words[place] != NONE and k <= place and before[:k] == context[:k]
    total = sum(n * math.exp(8 * theta) for n, theta in zip(n_after, history.theta.tolist(), strict=True))
    return [math.log(total) / 4, *(math.log1p(n) for n in n_after[1:])]


def defined(history: GenLMHistory, words: list[int]) -> list[float]:
    """P by the definition, of the words of one text so far, NONE before its first."""
    weight, words = [0.0] * VOCAB, words[-history.n_words :]
    for place in range(1, len(words)):
        for k in range(MATCHED + 1):
            is_after = place >= k and words[place - k : place] == words[len(words) - k :]
            if is_after and words[place] != NONE:
                weight[words[place]] += math.exp(8 * history.theta[k].item())
    return [each / (sum(weight) or 1) for each in weight]


@pytest.mark.parametrize("n_words", [2, 3, 5, 20, 64])
def test_it_is_what_the_definition_says(n_words, monkeypatch):
    history, draw = history_of(n_words), random.Random(0)
    texts = [[draw.randrange(4) for _ in range(n_read)] for n_read in (1, 2, 3, 8, 40)]
    contexts = torch.zeros(len(texts), 40)
    for row, text in zip(contexts, texts, strict=True):
        row[40 - len(text) :] = torch.tensor(text) + 1
    p, features = history.of_contexts(contexts, VOCAB)
    expected = torch.tensor([defined(history, [NONE] * (40 - len(text)) + text) for text in texts])
    torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(p.sum(1), torch.ones(5))
    torch.testing.assert_close(features, torch.tensor([told(history, text) for text in texts]))
    for word in range(5):
        monkeypatch.setattr(history_genlm, "_MAX_ENTRIES", (1, 100, 1 << 22)[word % 3])
        of_word, same = history.of_words(contexts, torch.full((5,), word))
        torch.testing.assert_close(of_word, p[:, word])
        torch.testing.assert_close(same, features)


def test_it_ends_where_the_document_begins_and_after_its_number_of_words():
    model = build_model("counts", ngram_history=4)
    rows = torch.tensor([[7, 8, 9, 7, 8, EOS, 7, 8, 9, 10]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    contexts = model.model(rows, position_ids=positions).contexts[0]

    def after(place: int) -> set[int]:
        p, _ = model.mixture.history.of_contexts(contexts[place : place + 1], VOCAB)
        return set(p[0].nonzero().flatten().tolist())

    assert after(3) == {7, 8, 9}
    assert after(4) == {7, 8, 9}
    assert after(5) == {EOS}
    assert after(7) == {EOS, 7, 8}
    assert after(9) == {8, 9, 10}  # of the last four words, the first has none before it


def test_it_lowers_bits_per_byte_where_texts_repeat_themselves(tmp_path):
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=5)) for _ in range(3000)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(150):
        few = draw.sample(words, 4)
        folder.joinpath(f"{number}.txt").write_text(" ".join(draw.choices(few, k=60)))
    bits = {}
    for history in (0, 64):
        stated = ["training.steps=60", "training.max_seq_length=64", f"model.ngram_history={history}"]
        run = train(small_recipe(folder, *stated), tmp_path / str(history))
        bits[history] = next(m.value for m in read_measurements(run.evaluation) if m.name == "bits_per_byte")
    assert bits[64] < 0.8 * bits[0]


def test_a_recipe_states_it_and_none_stands_without_counts():
    assert settle(load_recipe(None, [])).architecture.ngram_history == 1024
    assert settle(load_recipe(None, [])).evaluation.context_length == 1024
    for stated in ("model.ngram_history=0", "model.ngram_order=0", "model.decoder=ngram"):
        settings = settle(load_recipe(None, [stated]))
        assert settings.architecture.ngram_history is None
        assert settings.model.ngram_history == 0
    with pytest.raises(UserError, match="beside the counts"):
        settle(load_recipe(None, ["model.ngram_history=9", "model.ngram_order=0"]))
    with pytest.raises(StrictDataclassError, match="give ngram_order"):
        GenLMConfig(ngram_history=9)
