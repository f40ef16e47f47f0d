"""Promise: the fast step gives the tokens of plain generate, and stands aside where it cannot."""

import pytest
import torch
from support.models import EOS, PAD, STACKS, VOCAB, build_model
from torch.nn.utils import parametrize
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from hf_genlm.config.recipe import TokenizerRecipe
from hf_genlm.decoding import PROGRAMS, FastGenerator, step
from hf_genlm.decoding.step import SLOTS_AT_ONCE, DecodeStep, Int8Linear, RowSums, StepCache, StepState
from hf_genlm.errors import UserError
from hf_genlm.exporting.targets import network_of
from hf_genlm.text.store import Document
from hf_genlm.text.tokenizer import train_tokenizer

N = SLOTS_AT_ONCE - 6  # with the prompt of 12, past the first slots of attention, and past the window of 5
GREEDY = {"max_new_tokens": N, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def padded(tokens) -> dict[str, torch.Tensor]:
    """Three prompts of 12, 9 and 5 tokens, padded on the left."""
    prompt = tokens.clone()
    prompt[1, :3], prompt[2, :7] = PAD, PAD
    return {"input_ids": prompt, "attention_mask": (prompt != PAD).long()}


def text_of(generate, prompt: dict, seed: int = 0, **options) -> torch.Tensor:
    torch.manual_seed(seed)
    return generate(**prompt, **{**GREEDY, **options})


def assert_fast_and_equal(fast: FastGenerator, prompt: dict, **options) -> torch.Tensor:
    text = text_of(lambda input_ids, **rest: fast.generate(input_ids, **rest), prompt, **options)
    assert fast.plain_because is None
    assert torch.equal(text, text_of(fast.model.generate, prompt, **options))
    return text


def test_greedy_tokens_are_those_of_generate(model, padded):
    fast = FastGenerator(model, program="traced")
    assert_fast_and_equal(fast, padded)
    assert_fast_and_equal(fast, {name: tensor[2:] for name, tensor in padded.items()})


def test_a_prompt_may_come_in_chunks(padded):
    assert_fast_and_equal(FastGenerator(build_model("hybrid")), padded, prefill_chunk_size=5)


@pytest.mark.slow
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("stack", STACKS)
def test_greedy_tokens_of_a_compiled_step(stack, n_rows, padded, tmp_path, monkeypatch):
    needs_compiler()
    monkeypatch.setenv("HF_GENLM_CACHE", str(tmp_path))
    model = build_model(stack)
    prompt = {name: tensor[-n_rows:] for name, tensor in padded.items()}
    assert_fast_and_equal(FastGenerator(model, program="compiled"), prompt)
    (library,) = tmp_path.iterdir()
    made = library.stat().st_mtime_ns
    other = build_model(stack, seed=7)  # the library holds no weights: another model of this shape takes it
    fast = FastGenerator(other)
    assert_fast_and_equal(fast, prompt)
    assert library.stat().st_mtime_ns == made
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    assert_fast_and_equal(fast, prompt)


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["hybrid", "factorised"])
def test_a_compiled_int8_step_is_the_module_compiled(stack, tokens, tmp_path, monkeypatch):
    needs_compiler()
    monkeypatch.setenv("HF_GENLM_CACHE", str(tmp_path))
    model = build_model(stack, hidden_size=64)
    texts = []
    for form in ("compiled", "module"):
        fast = FastGenerator(model, program=form, int8=True)
        texts.append([fast.generate(tokens[:1], **GREEDY) for _ in range(2)])
        assert fast.plain_because is None
    assert all(torch.equal(text, texts[0][0]) for text in texts[0] + texts[1])


def needs_compiler() -> None:
    try:
        step.check_compiler()
    except UserError:
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize("row_sums", [False, True])
def test_logits_of_a_step_are_those_of_the_whole_text(model, tokens, row_sums):
    """In float64, so that a rounding error is no excuse."""
    model = model.double()
    whole = (model if model.mixture is None else network_of(model))(
        tokens
    ).logits  # counts are looked up apart
    state, position, slot = StepState(model.config, model.lm_head.weight, 3, 12), 5, 5
    state.fill(model(tokens[:, :5]).past_key_values, torch.ones(3, 5, dtype=torch.bool))
    one_step = DecodeStep(model, row_sums=row_sums)
    position, slot = torch.full((3, 1), 5), torch.tensor([5])
    with torch.no_grad():
        for t in range(5, 12):
            logits = one_step(tokens[:, t : t + 1], position, slot, *state.buffers(t + 1))
            torch.testing.assert_close(logits[:, :VOCAB], whole[:, t].detach(), atol=1e-5, rtol=1e-5)
    assert slot.item() == 12
    assert position.tolist() == [[12]] * 3


FAULTS = {
    "a state that is not kept": (StepCache, "update_recurrent_state", lambda *args, **kwargs: None, "gru"),
    "a token that is not remembered": (
        step,
        "slots_of",
        lambda config, slots_of=step.slots_of: [
            step.Slots("recurrent", (0,)), *slots_of(config)[1:]
        ],
        "bigram",
    ),
    "padding that is seen": (
        StepState,
        "fill",
        lambda self, cache, valid, fill=StepState.fill: fill(self, cache, torch.ones_like(valid)),
        "full_attention",
    ),
    "slots in the wrong turn": (
        StepState,
        "_write",
        staticmethod(lambda buffer, rows, n: buffer[: len(rows[-len(buffer) :])].copy_(rows[-len(buffer) :])),
        "sliding_attention",
    ),
    "a position that stands still": (
        torch.Tensor, "add_", lambda self, *args, **kwargs: self, "full_attention"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_test_of_tokens_can_fail(fault, padded, monkeypatch):
    owner, name, wrong, stack = FAULTS[fault]
    fast = FastGenerator(build_model(stack), program="module")
    prompt = {key: tensor.clone() for key, tensor in padded.items()}
    expected = text_of(fast.model.generate, prompt)
    monkeypatch.setattr(owner, name, wrong)
    try:
        text = text_of(lambda input_ids, **rest: fast.generate(input_ids, **rest), prompt)
    except (KeyError, StopIteration):
        return  # the model asks for what is not there
    assert not torch.equal(text, expected)


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.7}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.05}, {"repetition_penalty": 1.3}],
    ids=lambda sampling: next(iter(sampling)),
)
def test_sampled_tokens_are_those_of_generate(sampling, padded):
    fast = FastGenerator(build_model("hybrid"), program="traced")
    options = {"do_sample": True, "num_return_sequences": 2, **sampling}
    texts = [assert_fast_and_equal(fast, padded, seed=seed, **options) for seed in (1, 2)]
    assert not torch.equal(*texts)


def test_rows_end_by_themselves(padded):
    """Each at its own end of text, then padding; generation stops with the last."""
    model = build_model("hybrid")
    plain = text_of(model.generate, padded)[:, 12:]
    ends = [plain[0, 3].item(), plain[1, 8].item(), plain[2, 5].item()]
    text = assert_fast_and_equal(FastGenerator(model), padded, eos_token_id=ends)[:, 12:]
    assert text.shape[1] <= 9
    assert (text == PAD).any()


class AfterTwoOf(StoppingCriteria):
    """Ends a row that has a token twice."""

    def __call__(self, input_ids, scores, **kwargs):
        assert input_ids.shape[0] == 3
        return torch.tensor([len(set(row[12:])) < len(row[12:]) for row in input_ids.tolist()])


def test_stopping_criteria_of_the_caller_are_asked(padded):
    fast = FastGenerator(build_model("lstm"))
    criteria = StoppingCriteriaList([AfterTwoOf()])
    for ends in (EOS, None):  # only with an end of text is a row padded that has ended
        text = assert_fast_and_equal(fast, padded, stopping_criteria=criteria, eos_token_id=ends)
        assert text.shape[1] < 12 + N


class Heard:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.pieces = []

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.pieces.append("end")


def test_stop_strings_and_token_healing_have_the_tokenizer():
    """transformers' generate loses `tokenizer` beside a loop of ours."""
    tokenizer = train_tokenizer([Document("some words in the house", "here")], TokenizerRecipe(), 6)
    model = build_model(["gru"], vocab_size=len(tokenizer))
    fast = FastGenerator(model, program="module")
    prompt = tokenizer("in the", return_tensors="pt")
    whole = tokenizer.decode(text_of(model.generate, prompt, do_sample=True)[0])
    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter in whole[10:40]][:2]
    text = assert_fast_and_equal(fast, prompt, stop_strings=letters, tokenizer=tokenizer, do_sample=True)
    assert text.shape[1] < prompt["input_ids"].shape[1] + N
    for more in ({}, {"stop_strings": letters}):
        options = {"token_healing": True, "tokenizer": tokenizer, **more}
        healed = text_of(lambda input_ids, **rest: fast.generate(input_ids, **rest), prompt, **options)
        assert torch.equal(healed, text_of(model.generate, prompt, **options))
        assert fast.plain_because is not None


def test_a_streamer_hears_what_it_hears_from_generate(tokens):
    fast = FastGenerator(build_model("gru"))
    heard, expected = Heard(), Heard()
    fast.generate(tokens[:1], streamer=heard, **GREEDY)
    fast.model.generate(tokens[:1], streamer=expected, **GREEDY)
    assert fast.plain_because is None
    assert heard.pieces == expected.pieces
    assert len(heard.pieces) == N + 2


def double(module, args, output):
    return output * 2


def hooked(model):
    model.model.layers[0].mlp.up_proj.register_forward_hook(double)


def parametrised(model):
    class Double(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model.model.layers[0].mlp.down_proj, "weight", Double())


def offloaded(model):
    norm = model.model.layers[0].mlp_norm
    norm.forward = lambda hidden, forward=norm.forward: 2 * forward(hidden)


def adapted(model):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[test]'")
    config = peft.LoraConfig(r=2, target_modules=["value_proj", "q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


def in_training(model):
    model.train()


MODEL_REASONS = {
    hooked: "up_proj",
    parametrised: "down_proj",
    offloaded: "mlp_norm",
    adapted: "proj",
    in_training: "training mode",
}


@pytest.mark.parametrize("change", MODEL_REASONS, ids=lambda change: change.__name__)
def test_what_stands_before_a_weight_is_not_passed_by(change, tokens):
    model = build_model("hybrid")
    untouched = text_of(model.generate, {"input_ids": tokens})
    fast = FastGenerator(model)
    change(model)
    text = text_of(lambda input_ids, **rest: fast.generate(input_ids, **rest), {"input_ids": tokens})
    assert MODEL_REASONS[change] in fast.plain_because
    assert torch.equal(text, text_of(model.generate, {"input_ids": tokens}))
    assert change is in_training or not torch.equal(text, untouched)


def test_rotations_that_depend_on_the_length_are_left_to_generate(tokens):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = build_model("full_attention", rope_parameters=rope, max_position_embeddings=14)
    fast = FastGenerator(model)
    text = fast.generate(tokens, **GREEDY)
    assert "rotary" in fast.plain_because
    assert torch.equal(text, model.generate(tokens, **GREEDY))


REQUESTS = {
    "beams": ({"num_beams": 2}, "beam"),
    "no cache": ({"use_cache": False}, "use_cache"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "assisted"),
    "a static cache": ({"cache_implementation": "static"}, "cache_implementation"),
    "a cache": ({"past_key_values": "new"}, "past_key_values"),
    "a draft model": ({"assistant_model": "new"}, "assistant_model"),
}


@pytest.mark.parametrize("request_of", REQUESTS)
def test_other_requests_are_left_to_generate(request_of, tokens):
    model, options = build_model("hybrid"), dict(REQUESTS[request_of][0])
    fast = FastGenerator(model)

    def given():
        new = {"past_key_values": DynamicCache(config=model.config), "assistant_model": build_model("gru")}
        return {name: new[name] if value == "new" else value for name, value in options.items()}

    text = fast.generate(tokens[:1], **GREEDY, **given())
    assert REQUESTS[request_of][1] in fast.plain_because
    assert torch.equal(text, model.generate(tokens[:1], **GREEDY, **given()))
    asked = fast.generate(tokens[:1], return_dict_in_generate=True, output_scores=True, **GREEDY)
    assert len(asked.scores) == N
    assert "return_dict_in_generate" in fast.plain_because


def test_a_model_of_transformers_is_left_to_generate(tokens):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2)).eval()
    fast = FastGenerator(model)
    options = {**GREEDY, "pad_token_id": PAD}
    assert torch.equal(fast.generate(tokens, **options), model.generate(tokens, **options))
    assert "GPT2" in fast.plain_because


@pytest.mark.parametrize("form", ["module", "traced"])
def test_the_step_has_the_weights_that_the_model_has_now(form, padded):
    model = build_model("hybrid")
    fast = FastGenerator(model, program=form)
    before = assert_fast_and_equal(fast, padded)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    assert not torch.equal(assert_fast_and_equal(fast, padded), before)
    model.resize_token_embeddings(VOCAB + 3)
    assert_fast_and_equal(fast, padded)


def test_weights_are_shared():
    model = build_model("shared")
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    for row_sums in (False, True):
        copied = DecodeStep(model, row_sums=row_sums)
        assert {parameter.data_ptr() for parameter in copied.parameters()} == shared
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("stack", ["gated_linear", "lstm", "sliding_attention", "bigram"])
def test_memory_per_token(stack):
    """Constant but for full attention, which keeps 2 K H numbers and a mark for each token."""
    model = build_model(stack)
    state = StepState(model.config, model.lm_head.weight, 1, 16)
    n_bytes = [sum(b.numel() * b.element_size() for b in state.buffers(n_tokens)) for n_tokens in (64, 4096)]
    config = model.config
    n_full = config.mixer_types.count("full_attention")
    per_token = n_full * 2 * config.num_key_value_heads * config.head_dim * 4 + (n_full > 0)
    assert n_bytes[1] - n_bytes[0] == per_token * (4096 - 64)


def test_int8_matrices_have_a_scale_for_each_row():
    """Rows of sizes from 0.001 to 10 all keep their precision: one scale for all would round some to 0."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-3, 1, 48)[:, None])
        linear.bias.mul_(torch.logspace(-3, 1, 48))
    x = torch.randn(3, 2, 64)
    quantised = Int8Linear(linear)
    assert (quantised.weight.abs().amax(1) == 127).all()
    dequantised = quantised.weight.float() * quantised.scale.float()[:, None]
    expected, exact = torch.nn.functional.linear(x, dequantised, linear.bias), linear(x)
    size = exact.flatten(0, 1).norm(dim=0)  # of each row's outputs
    assert ((quantised(x) - expected).flatten(0, 1).norm(dim=0) / size).max() < 0.02  # bfloat16
    error = (expected - exact).flatten(0, 1).norm(dim=0) / size
    assert error.min() > 0
    assert error.max() < 0.02
    torch.testing.assert_close(RowSums(linear)(x), exact)


def test_int8_steps_follow_the_weights(tokens):
    model = build_model("hybrid")
    fast = FastGenerator(model, program="module", int8=True)
    first = fast.generate(tokens, **GREEDY)
    assert fast.plain_because is None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)
    again = FastGenerator(model, program="module", int8=True).generate(tokens, **GREEDY)
    assert not torch.equal(first, again)
    assert torch.equal(fast.generate(tokens, **GREEDY), again)
    with pytest.raises(UserError, match="int8"):
        fast.generate(tokens, num_beams=2, **GREEDY)
    with pytest.raises(UserError, match="float32"):
        FastGenerator(model.double(), int8=True)


def test_a_library_is_named_by_what_it_depends_on(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_GENLM_CACHE", str(tmp_path))

    def file_of(model, n_rows=1, **forms):
        return step.program_file(DecodeStep(model, **forms), [torch.zeros(n_rows, 1)])

    same = [file_of(build_model("hybrid", seed=seed), row_sums=True) for seed in (0, 1)]
    assert same[0] == same[1]
    assert same[0].is_relative_to(tmp_path)
    others = {
        file_of(build_model("hybrid"), n_rows=2, row_sums=True),
        file_of(build_model("hybrid")),
        file_of(build_model("hybrid"), int8=True),
        file_of(build_model("hybrid").double(), row_sums=True),
        file_of(build_model("hybrid", final_logit_softcapping=9.0), row_sums=True),
    }
    monkeypatch.setattr(torch, "__version__", "9.9")
    others.add(file_of(build_model("hybrid"), row_sums=True))
    assert len(others | {same[0]}) == 7


def test_a_missing_compiler_is_named(tokens, monkeypatch, tmp_path):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setenv("HF_GENLM_CACHE", str(tmp_path))
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    model = build_model("gru")
    with pytest.raises(UserError, match="C\\+\\+ compiler"):
        FastGenerator(model, program="compiled").generate(tokens, **GREEDY)
    with pytest.raises(UserError, match="known: module, traced, compiled"):
        FastGenerator(model, program="fast")


def test_nothing_is_compiled_unasked(tokens, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_GENLM_CACHE", str(tmp_path))
    monkeypatch.delitem(PROGRAMS, "compiled")
    assert_fast_and_equal(FastGenerator(build_model("gru")), {"input_ids": tokens})
    assert not list(tmp_path.iterdir())
