"""Promise: every mixer computes its definition, however it is run: whole, stepwise, padded, packed, fused."""

import pytest
import torch
from support import contracts
from support.models import VOCAB, build_model, by_triton_interpreter

from hf_genlm.model import MIXERS, GenLMConfig, GenLMForCausalLM
from hf_genlm.model.mlp_genlm import squared_relu
from hf_genlm.model.recurrence_genlm import ClassicCell, RecurrentMixer, TimeLayout
from hf_genlm.model.scan_genlm import linear_scan

CLASSIC = [name for name, mixer in MIXERS.items() if issubclass(mixer, ClassicCell)]
RECURRENT = [name for name, mixer in MIXERS.items() if issubclass(mixer, RecurrentMixer)]


def test_stepwise_logits_equal_whole_row(model, tokens):
    whole = model(tokens, use_cache=False).logits
    cache, steps = None, []
    for t in range(tokens.shape[1]):
        out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=0)


def test_left_padding_changes_nothing(model, tokens):
    alone = model(tokens, use_cache=False).logits
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), tokens], dim=1)
    mask = (torch.arange(16) >= 4).long().expand(3, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for use_cache in (True, False):
        logits = model(padded, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
        torch.testing.assert_close(logits[:, 4:], alone, atol=1e-5, rtol=1e-5)


def test_right_padding_leaves_the_state_of_the_last_token(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    mask[2, 3:] = 0
    padded = model(tokens, attention_mask=mask, use_cache=True)
    cache = padded.past_key_values
    for row, length in ((0, 7), (1, 12), (2, 3)):
        by_itself = model(tokens[row : row + 1, :length], use_cache=True)
        torch.testing.assert_close(padded.logits[row, :length], by_itself.logits[0], atol=1e-5, rtol=1e-5)
        alone = by_itself.past_key_values
        n_compared = 0
        layers = zip(model.config.layer_types, cache.layers, alone.layers, strict=False)  # but the last words
        for layer_type, mixed, own in layers:
            if layer_type == "sliding_attention":  # it keeps the last keys, here those of padding
                pairs = []
            elif layer_type == "full_attention":
                pairs = [(mixed.keys[row, :, :length], own.keys[0])]
                pairs += [(mixed.values[row, :, :length], own.values[0])]
            else:
                states = own.recurrent_states.items()
                pairs = [
                    (mixed.recurrent_states[i][row], state[0]) for i, state in states if state is not None
                ]
            for found, expected in pairs:
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            n_compared += len(pairs)
        assert n_compared or set(model.config.mixer_types) == {"sliding_attention"}


def test_packed_row_equals_its_documents_alone(model, tokens):
    contracts.check_packed_row(model, tokens)


@pytest.mark.parametrize("mixer", CLASSIC)
@pytest.mark.parametrize("kind", ["plain", "packed", "padded", "many_documents"])
def test_fused_kernel_equals_the_definition_with_gradients(mixer, kind):
    torch.manual_seed(0)
    config = GenLMConfig(mixer_types=[mixer], hidden_size=8, recurrent_size=6, num_attention_heads=2)
    cell = MIXERS[mixer](config, 0).double()
    x = torch.randn(3, 17, 8, dtype=torch.double, requires_grad=True)
    states = tuple(torch.randn(3, 6, dtype=torch.double, requires_grad=True) for _ in range(cell.n_states))
    starts = torch.zeros(3, 17, dtype=torch.long)
    if kind == "packed":
        starts[0, 5] = starts[1, 0] = starts[1, 16] = 1
    if kind == "many_documents":  # one long row and many short documents: the PackedSequence form
        starts[1:, ::2] = 1
    valid = torch.rand(3, 17, generator=torch.Generator().manual_seed(1)) > 0.4
    valid[2] = False
    layout = TimeLayout(
        valid=valid if kind == "padded" else None,
        document=starts.cumsum(1) if "pack" in kind or "many" in kind else None,
    )
    inputs = [x, *states, *cell.parameters()]

    def results(run):
        outputs, last, _ = run(x, layout, states, False)
        seen = outputs * torch.linspace(-1, 1, 17, dtype=torch.double)[:, None]
        total = seen.sum() + sum((state**2).sum() for state in last)
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        return [seen, *last, *(g for g in gradients if g is not None)]

    calls = []
    kernel = cell.kernel
    cell.kernel = lambda *args: calls.append(len(args)) or kernel(*args)
    fused = results(cell.run)
    assert calls, "the fused path was not taken"
    for ours, definition in zip(fused, results(cell.run_stepwise), strict=True):
        torch.testing.assert_close(ours, definition, atol=1e-10, rtol=1e-8)


def test_every_form_of_the_kernel_is_reached():
    config = GenLMConfig(mixer_types=["gru"], hidden_size=8, num_attention_heads=2)
    cell = MIXERS["gru"](config, 0)
    seen = set()
    kernel = cell.kernel
    cell.kernel = lambda *args: (
        seen.add(torch.is_tensor(args[1]) and args[1].dtype == torch.long) or kernel(*args)
    )
    few, many = torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long)
    few[0, 8] = 1
    many[1] = 1
    for starts in (few, many):
        cell.run(torch.randn(2, 16, 8), TimeLayout(document=starts.cumsum(1)), (torch.zeros(2, 8),), False)
    assert seen == {False, True}  # padded rows, and PackedSequence


@pytest.mark.parametrize("form", ["sequential", "chunked"])
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 16, 37])
def test_scan_equals_a_loop_with_gradients(n_tokens, form, monkeypatch):
    torch.manual_seed(0)
    if form == "chunked":  # the form of accelerators
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    decay = torch.rand(2, n_tokens, 3, dtype=torch.double)
    decay[0, n_tokens // 2] = 0.0  # a document start
    decay[1, n_tokens // 3] = 1.0  # padding
    inputs = [decay, torch.randn(2, n_tokens, 3, dtype=torch.double), torch.randn(2, 3, dtype=torch.double)]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def loop(decay, new, state):
        states = []
        for t in range(n_tokens):
            state = decay[:, t] * state + new[:, t]
            states.append(state)
        return torch.stack(states, dim=1)

    weights = torch.randn(2, n_tokens, 3, dtype=torch.double)
    for run in (loop, linear_scan):
        result = run(*inputs)
        gradients = torch.autograd.grad((result * weights).sum(), inputs)
        if run is loop:
            expected = [result, *gradients]
    for ours, definition in zip([result, *gradients], expected, strict=True):
        torch.testing.assert_close(ours, definition, atol=1e-12, rtol=1e-10)


WITH_FLA = """
import torch
from hf_genlm.model import scan_genlm as scan

from fla.ops.hgrn import fused_recurrent

autotuner = fused_recurrent.fused_recurrent_hgrn_fwd_kernel.fn
autotuner.configs = autotuner.configs[:1]  # the interpreter cannot time them
torch.manual_seed(0)
decay = torch.rand(2, 37, 5)
decay[0, 20], decay[1, 7] = 0.0, 1.0  # a document start, and padding
new, initial = torch.randn(2, 37, 5), torch.randn(2, 5)
torch.testing.assert_close(scan.fused_scan(decay, new, initial), scan._sequential_scan(decay, new, initial),
                           atol=1e-5, rtol=1e-5)
print("equal")
"""


def test_fla_gives_the_same_scan():
    """By Triton's interpreter, which needs no GPU."""
    pytest.importorskip("fla", reason="fla-core is not installed")
    assert by_triton_interpreter(WITH_FLA) == "equal"


def naive_lm(model: GenLMForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits token by token through the public step form: a loop without scans, kernels or batching of
    time."""
    cache, steps = None, []
    for t in range(ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("stack", ["gated_linear", *CLASSIC])
def test_gradients_equal_those_of_the_stepwise_model(stack, tokens):
    model = build_model(stack).double()
    fused = torch.autograd.grad(model(tokens, labels=tokens, use_cache=False).loss, list(model.parameters()))
    for cell in (layer.mixer for layer in model.model.layers):
        cell.run = cell.run_stepwise if isinstance(cell, ClassicCell) else naive_gated_linear(cell)
    naive = torch.autograd.grad(model(tokens, labels=tokens, use_cache=False).loss, list(model.parameters()))
    for ours, definition in zip(fused, naive, strict=True):
        torch.testing.assert_close(ours, definition, atol=1e-10, rtol=1e-7)


def naive_gated_linear(cell):
    """The recurrence of the docstring, one token after the other."""

    def run(x, layout, states, recording):
        (h,), outputs = states, []
        for t in range(x.shape[1]):
            forget = torch.sigmoid(cell.forget_proj(x[:, t]))
            h = forget * h + (1 - forget) * cell.value_proj(x[:, t])
            outputs.append(h * torch.nn.functional.silu(cell.gate_proj(x[:, t])))
        return torch.stack(outputs, dim=1), (h,), None

    return run


@pytest.mark.parametrize("stack", ["full_attention", "sliding_attention", "hybrid"])
def test_sdpa_equals_eager_with_gradients(stack, tokens):
    gradients, logits = [], []
    for implementation in ("eager", "sdpa"):
        model = build_model(stack, attn_implementation=implementation)
        out = model(tokens, labels=tokens, use_cache=False)
        logits.append(out.logits)
        gradients.append(torch.autograd.grad(out.loss, list(model.parameters())))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
    for sdpa, eager in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(sdpa, eager, atol=1e-5, rtol=1e-4)


def test_attention_equals_its_definition(tokens):
    """Grouped heads, rotation of the config's base and window against a loop over queries, with gradients."""
    for stack, window, base in (("full_attention", 99, 10_000.0), ("sliding_attention", 5, 321.0)):
        rope = {"rope_type": "default", "rope_theta": base}
        model = build_model([stack], rope_parameters=rope, rms_norm_eps=0.1).double()
        mixer = model.model.layers[0].mixer
        x = torch.randn(1, 12, 32, dtype=torch.double, requires_grad=True)
        rotation = model.model.rotary_emb(x, torch.arange(12)[None])
        span = torch.arange(12)[:, None] - torch.arange(12)
        visible = (span >= 0) & (span < window)
        mask = torch.zeros(12, 12, dtype=torch.double).masked_fill(~visible, float("-inf"))[None, None]
        ours, _ = mixer(x, position_embeddings=rotation, attention_mask=mask)

        def unit(v):
            return v / (v.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()

        def turned(v, t, base=base):
            half = v.shape[-1] // 2
            frequency = base ** -(torch.arange(half, dtype=torch.float) / half)
            pair = torch.complex(v[..., :half], v[..., half:]) * torch.polar(
                torch.ones(half, dtype=torch.double), (t * frequency).double()
            )
            return torch.cat([pair.real, pair.imag], dim=-1)

        q = unit(mixer.q_proj(x)[0].view(12, 4, 8))
        k = unit(mixer.k_proj(x)[0].view(12, 2, 8))
        v = mixer.v_proj(x)[0].view(12, 2, 8)
        rows = []
        for t in range(12):
            heads = []
            for head in range(4):
                earlier = range(max(0, t - window + 1), t + 1)
                query = turned(q[t, head], t)
                scores = torch.stack([query @ turned(k[s, head // 2], s) for s in earlier]) / 8**0.5
                heads.append(scores.softmax(0) @ torch.stack([v[s, head // 2] for s in earlier]))
            rows.append(torch.cat(heads))
        expected = mixer.out_proj(torch.stack(rows))
        torch.testing.assert_close(ours[0], expected, atol=1e-6, rtol=1e-5)
        weights = torch.randn(12, 32, dtype=torch.double)
        inputs = [x, *mixer.parameters()]
        gradients = torch.autograd.grad((ours[0] * weights).sum(), inputs)
        for fused, naive in zip(
            gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True
        ):
            torch.testing.assert_close(fused, naive, atol=1e-5, rtol=1e-5)


def test_norms_have_the_epsilon_of_the_config():
    model = build_model("hybrid", rms_norm_eps=0.5)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    layers = model.model.layers
    for norm in (
        model.model.norm,
        *(norm for layer in layers for norm in (layer.mixer_norm, layer.mlp_norm)),
    ):
        expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt()
        torch.testing.assert_close(norm(x), expected)


def test_rope_parameters_reach_the_angles_and_the_saved_config(tmp_path):
    """theta^(-2i / head_dim) for the base of the config, the default of transformers if it has none."""
    exponents = torch.arange(0, 8, 2) / 8
    for given, base in ((None, 10_000.0), ({"rope_type": "default", "rope_theta": 77.0}, 77.0)):
        model = build_model(["full_attention"], rope_parameters=given)
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, base**-exponents)
        model.config.save_pretrained(tmp_path)
        assert GenLMConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == base


@pytest.mark.parametrize("mixer", RECURRENT)
def test_state_is_float32_at_least(mixer, tokens):
    model = build_model([mixer]).to(torch.bfloat16)
    cache = model(tokens, use_cache=True).past_key_values
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32


def test_loss_sums_over_num_items_in_batch(model, tokens):
    labels = tokens.clone()
    labels[0, 4:] = -100
    out = model(tokens, labels=labels, num_items_in_batch=7, use_cache=False)
    logp = out.logits[:, :-1].double().log_softmax(-1)
    kept = labels[:, 1:] != -100
    picked = logp.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(out.loss.double(), -picked[kept].sum() / 7, atol=1e-5, rtol=1e-5)
    mean = model(tokens, labels=labels, use_cache=False).loss
    torch.testing.assert_close(mean.double(), -picked[kept].mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_factorised_embedding_is_e_w_plus_b(tied, tokens):
    model = build_model(["gru"], embedding_size=8, tie_word_embeddings=tied, output_bias=True)
    table, projection = model.model.embed_tokens.weight, model.model.embed_proj
    assert table.shape == (VOCAB, 8)
    assert projection.weight.shape == (32, 8)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    hidden = []
    model.model.norm.register_forward_hook(lambda module, args, out: hidden.append(out))
    logits = model(tokens, use_cache=False).logits
    torch.testing.assert_close(seen[0], table[tokens] @ projection.weight.T + projection.bias)
    if tied:
        expected = hidden[0] @ projection.weight @ table.T + model.lm_head.bias
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    else:
        assert model.lm_head.weight.shape == (VOCAB, 32)


@pytest.mark.parametrize("position_type", ["learned", "none"])
def test_other_positions_step_like_the_whole_row(position_type, tokens):
    model = build_model(["full_attention", "gru"], position_type=position_type, max_position_embeddings=16)
    torch.testing.assert_close(
        naive_lm(model, tokens), model(tokens, use_cache=False).logits, atol=1e-4, rtol=0
    )


def test_adapters_on_the_projections_are_not_bypassed(tokens):
    """The fused kernels read weights: a hook or a replaced Linear must send the cell to its definition."""
    model = build_model(["lstm"])
    before = model(tokens, use_cache=False).logits
    handle = model.model.layers[0].mixer.in_proj.register_forward_hook(lambda module, args, out: out + 1.0)
    assert not torch.allclose(model(tokens, use_cache=False).logits, before)
    handle.remove()
    torch.testing.assert_close(model(tokens, use_cache=False).logits, before)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "multiple"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "multiple"),
        ({"mixer_types": ["lstmm"]}, "unknown mixer"),
        ({"decoder": "lstmm"}, "unknown decoder"),
        ({"mixer_types": ["lstm"], "num_hidden_layers": 2}, "num_hidden_layers"),
        ({"position_type": "sinus"}, "position_type"),
        ({"decoder": "transformer", "hidden_size": 20, "num_attention_heads": 4}, "even"),
        ({"hidden_size": 0, "num_attention_heads": 1}, "at least 1"),
    ],
)
def test_config_refuses_what_does_not_fit(fields, words):
    with pytest.raises(Exception, match=words) as caught:
        GenLMConfig(**fields)
    assert isinstance(caught.value, ValueError) or isinstance(caught.value.__cause__, ValueError)


def test_presets_end_on_their_last_mixer():
    assert GenLMConfig(decoder="hybrid", num_hidden_layers=4).mixer_types == [
        "full_attention", "gated_linear", "gated_linear", "full_attention",
    ]  # fmt: skip
    assert GenLMConfig(decoder="sliding", num_hidden_layers=2).layer_types == ["sliding_attention"] * 2


def test_the_squared_relu_is_its_definition_to_the_second_derivative():
    x = torch.linspace(-2, 2, 10, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(squared_relu(x), torch.relu(x).square(), rtol=0, atol=0)
    assert torch.autograd.gradcheck(squared_relu, x)
    assert torch.autograd.gradgradcheck(squared_relu, x)
    slopes = torch.func.vmap(torch.func.grad(squared_relu))(x.detach())
    torch.testing.assert_close(slopes, 2 * torch.relu(x.detach()))


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("mixer", ["elman", "gru", "lstm"])
def test_every_hook_on_a_projection_is_called(mixer, kind, is_global, tokens):
    model, seen = build_model([mixer]), set()
    names = {module: name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    expected = model(tokens, labels=tokens)

    def note(module, *args):
        seen.add(names.get(module))

    if is_global:
        handles = [getattr(torch.nn.modules.module, f"register_module_{kind}_hook")(note)]
    else:
        handles = [getattr(module, f"register_{kind}_hook")(note) for module in names]
    hooked = model(tokens, labels=tokens)
    hooked.loss.backward()
    for handle in handles:
        handle.remove()
    assert seen - {None} == set(names.values())
    torch.testing.assert_close(hooked.logits, expected.logits, atol=1e-5, rtol=1e-4)
