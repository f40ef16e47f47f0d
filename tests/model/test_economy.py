"""Promise: fewer parameters, by the number that the formula says, and nothing else is different."""

import pytest
import torch
from support.models import STACKS, build_model

from hf_genlm.model import GenLMConfig, GenLMForCausalLM, GenLMModel

V, D, M, R = 97, 32, 128, 8  # vocabulary, width, width of the MLP, rank


def parameters(mixer: str = "gated_linear", layers: int = 2, **overrides) -> int:
    config = GenLMConfig(
        vocab_size=V, hidden_size=D, intermediate_size=M, mixer_types=[mixer] * layers, **overrides
    )
    return GenLMForCausalLM(config).num_parameters()


def layer(mixer: int, mlp: int = 2 * D * M) -> int:
    """Parameters of one layer: mixer, MLP and both norms."""
    return mixer + mlp + 2 * D


GATED = 3 * D * D + D + D * D  # value, forget with bias, gate; out


def attention(heads: int, key_value_heads: int) -> int:
    width = D // heads
    return 2 * D * D + 2 * D * key_value_heads * width


def test_the_plain_model_has_what_the_formula_says():
    assert parameters() == V * D + 2 * layer(GATED) + D


def test_a_factorised_embedding_has_v_r_plus_r_d_plus_d_parameters_head_included():
    """E W + b of rank d / 4, with the head tied through W."""
    assert parameters(embedding_size=R) == V * R + R * D + D + 2 * layer(GATED) + D
    assert parameters(embedding_size=R, output_bias=True) - parameters(embedding_size=R) == V
    untied = parameters(embedding_size=R, tie_word_embeddings=False)
    assert untied - parameters(embedding_size=R) == V * D


def test_layers_that_share_are_counted_once():
    assert parameters(layers=4, shared_layers=2) == parameters(layers=2)
    assert parameters(layers=4, shared_layers=4) == parameters(layers=1)


def test_low_rank_matrices_have_rank_times_both_widths():
    assert parameters(mlp_rank=R) == V * D + 2 * layer(GATED, 2 * (D * R + R * M)) + D


def test_a_gated_mlp_has_three_matrices_and_about_as_many_parameters():
    assert parameters(gated_mlp=True) == V * D + 2 * layer(GATED, 3 * D * M) + D
    width = GenLMConfig(hidden_size=768, gated_mlp=True).intermediate_size
    assert (width, 3 * width) == (2048, 2 * 4 * 768)
    assert GenLMConfig(hidden_size=100, gated_mlp=True).intermediate_size == 288  # above 266.7


@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (4, 2), (4, 1)])
def test_grouped_and_multi_query_attention(heads, key_value_heads):
    counted = parameters("full_attention", num_attention_heads=heads, num_key_value_heads=key_value_heads)
    assert counted == V * D + 2 * layer(attention(heads, key_value_heads)) + D


def test_a_tied_head_is_e_through_w(tokens):
    """Logits = (h W^T) E^T by hand."""
    model = build_model("factorised")
    out = model(tokens, output_hidden_states=True)
    base = GenLMModel(model.config).eval()
    base.load_state_dict(model.model.state_dict())
    h = base(tokens).last_hidden_state
    e, w = model.model.embed_tokens.weight, model.model.embed_proj.weight.T
    torch.testing.assert_close(out.logits, h @ w.T @ e.T + model.lm_head.bias)
    torch.testing.assert_close(model.lm_head(model.model(tokens).last_hidden_state), out.logits)
    torch.testing.assert_close(out.hidden_states[0], e[tokens] @ w + model.model.embed_proj.bias)


def test_a_new_factorised_embedding_has_the_scale_of_a_plain_one():
    """E W, and the head through it, start with the deviation that E alone would have."""
    shapes = {"vocab_size": 2000, "hidden_size": 64, "initializer_range": 0.125, "mixer_types": ["gru"]}
    h = torch.randn(100, 64)
    scales = []
    for rank in (None, 16):
        torch.manual_seed(0)
        model = GenLMForCausalLM(GenLMConfig(**shapes, embedding_size=rank))
        embedded = model.model._embed(model.model.embed_tokens(torch.arange(2000)[None]), None)
        scales.append((embedded.std().item(), model.lm_head(model.model._read_out(h)).std().item()))
    assert scales[1] == pytest.approx(scales[0], rel=0.15)


def test_shared_layers_are_the_same_layers_written_out(tokens):
    """Weights copied into layers of their own give the same logits, with and without a cache."""
    shared = build_model("shared")
    apart = build_model("shared", shared_layers=1)
    weights = shared.state_dict()
    for name in apart.state_dict():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(int(parts[2]) % 2)
        apart.state_dict()[name].copy_(weights[".".join(parts)])
    assert len(shared.model.layers) == 2
    assert len(apart.model.layers) == 4
    torch.testing.assert_close(shared(tokens).logits, apart(tokens).logits)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(shared.generate(tokens, **kwargs), apart.generate(tokens, **kwargs))
    assert len(shared(tokens, use_cache=True).past_key_values.layers) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"shared_layers": 3}, "must divide"),
        ({"shared_layers": 0}, "at least 1"),
        ({"mixer_types": ["gru", "lstm"], "shared_layers": 2}, "mixers must repeat every 1"),
        ({"mlp_rank": 0}, "mlp_rank must be at least 1"),
        ({"embedding_size": -1}, "embedding_size must be at least 1"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping must be at least"),
    ],
)
def test_what_cannot_be_shared_or_reduced_is_refused(overrides, message):
    with pytest.raises(Exception, match=message):
        GenLMConfig(**{"mixer_types": ["gru", "gru"], "hidden_size": 16, **overrides})


def test_the_contract_tests_run_over_every_means():
    """They take their models from STACKS and KINDS."""
    assert STACKS["factorised"]["embedding_size"] == 32 // 4
    means = {name for stack in STACKS.values() for name in stack}
    assert {"embedding_size", "shared_layers", "mlp_rank", "num_key_value_heads", "output_bias"} <= means
