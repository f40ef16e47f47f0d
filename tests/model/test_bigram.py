"""Promise: a bigram embedding sees each token's own predecessor in its document, and says where it cannot."""

import pytest
import torch
from support.models import VOCAB, build_model
from transformers import AutoModelForCausalLM, DynamicCache

from hf_genlm.model import GenLMConfig
from hf_genlm.model.bigram_genlm import GenLMBigramEmbedding
from hf_genlm.model.configuration_genlm import RECURRENT_MIXERS
from hf_genlm.model.layout_genlm import TimeLayout

NONE = -1


def build_table(rows: int = 4001) -> GenLMBigramEmbedding:
    torch.manual_seed(0)
    return GenLMBigramEmbedding(GenLMConfig(mixer_types=["gru"], hidden_size=8, bigram_size=rows))


def vectors_of(table: GenLMBigramEmbedding, befores: list[int], tokens: list[int]) -> torch.Tensor:
    """(T, D): each pair looked up by itself, as a row of two tokens."""
    found = []
    for before, token in zip(befores, tokens, strict=True):
        row = [token] if before == NONE else [before, token]
        found.append(table(torch.tensor([row]), TimeLayout())[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize(
    ("befores", "valid", "document"),
    [
        ([NONE, 5, 6, 7, 8], None, None),
        ([NONE, 5, NONE, 7, NONE], None, [0, 0, 1, 1, 2]),
        ([NONE, NONE, NONE, 7, 8], [0, 0, 1, 1, 1], None),
        ([NONE, 5, 5, 7, 7], [1, 0, 1, 0, 1], None),
    ],
    ids=["plain", "packed", "left padding", "padding between"],
)
def test_each_token_sees_the_one_before_it(befores, valid, document):
    table, tokens = build_table(), [5, 6, 7, 8, 9]
    layout = TimeLayout(
        None if valid is None else torch.tensor([valid]).bool(),
        None if document is None else torch.tensor([document]),
    )
    seen = table(torch.tensor([tokens]), layout)[0]
    shown = [t for t in range(5) if valid is None or valid[t]]
    torch.testing.assert_close(seen[shown], vectors_of(table, befores, tokens)[shown], rtol=0, atol=0)


def test_pairs_spread_over_the_rows_and_know_their_order():
    table = build_table(rows=4096)
    with torch.no_grad():
        table.weight[:, 0] = torch.arange(4096)
    first, second = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    rows = table(torch.stack([first, second], dim=-1).view(-1, 2), TimeLayout())[:, 1, 0].long()
    counts = torch.bincount(rows, minlength=4096).double()
    assert counts.mean() == 16
    assert counts.max() < 64
    ordered, reverse = rows.view(256, 256), rows.view(256, 256).t()
    assert (ordered == reverse).double().mean() < 2 * 1 / 256 + 0.01  # but for a pair of equal tokens


def test_a_new_table_changes_nothing_until_it_learns(tokens):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        GenLMConfig(vocab_size=VOCAB, hidden_size=32, mixer_types=["lstm"], bigram_size=64)
    )
    without = AutoModelForCausalLM.from_config(
        GenLMConfig(vocab_size=VOCAB, hidden_size=32, mixer_types=["lstm"])
    )
    without.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(tokens).logits, without(tokens).logits)
    model(tokens, labels=tokens).loss.backward()
    assert model.model.embed_bigrams.weight.grad.abs().sum() > 0


def test_a_new_vocabulary_leaves_the_pairs_in_their_rows(tokens):
    model = build_model("bigram")
    before = model.model.embed_bigrams(tokens, TimeLayout())
    model.resize_token_embeddings(VOCAB + 40)
    assert torch.equal(model.model.embed_bigrams(tokens, TimeLayout()), before)


def test_a_large_token_survives_in_the_cache():
    table = build_table()
    token = 2**24 - 2  # the last that a float32 tells from its neighbour, plus 1
    cache = DynamicCache(config=GenLMConfig(mixer_types=["gru"], hidden_size=8))
    table(torch.tensor([[token]]), TimeLayout(), cache)
    seen = table(torch.tensor([[3]]), TimeLayout(), cache)[0]
    assert torch.equal(seen, vectors_of(table, [token], [3]))


def test_embeddings_without_tokens_are_refused(tokens):
    model = build_model("bigram")
    with pytest.raises(ValueError, match="bigram_size needs input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(tokens))


@pytest.mark.parametrize("mixer", ["full_attention", "sliding_attention"])
def test_a_first_layer_without_a_state_is_refused(mixer):
    with pytest.raises(Exception, match="bigram_size needs a first layer"):
        GenLMConfig(mixer_types=[mixer, "gru"], bigram_size=64)


@pytest.mark.parametrize("mixer", RECURRENT_MIXERS)
def test_every_recurrent_first_layer_carries_the_token(mixer, tokens):
    model = build_model([mixer], bigram_size=64)

    whole = model(tokens).logits
    cache = model(tokens[:, :7]).past_key_values
    rest = model(tokens[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 7:], atol=1e-5, rtol=0)


def test_attribution_reads_both_tables(tokens):
    """Inputs of a model with pairs have two vectors for each token: their gradients predict a change."""
    model = build_model("bigram").double()
    tables = [model.model.embed_tokens, model.model.embed_bigrams]
    vectors, moves = [], [0.0, 0.0]

    def keep(vector: torch.Tensor) -> torch.Tensor:
        vectors.append(vector)
        return vector

    def logit() -> torch.Tensor:
        vectors.clear()
        hooks = [
            table.register_forward_hook(lambda module, args, out, move=move: keep(out + move))
            for table, move in zip(tables, moves, strict=True)
        ]
        found = model(tokens, use_cache=False).logits[0, -1, 7]
        for hook in hooks:
            hook.remove()
        return found

    before = logit()
    gradients = torch.autograd.grad(before, vectors)
    moves = [1e-5 * gradient for gradient in gradients]
    assert all(move.abs().sum() > 0 for move in moves)
    change = 1e-5 * sum(gradient.square().sum() for gradient in gradients)
    torch.testing.assert_close(logit() - before, change, rtol=1e-2, atol=0)
