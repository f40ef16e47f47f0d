"""Promise: the loss that never holds all logits is the loss, with every term, and so are its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.models import VOCAB, build_model, by_triton_interpreter

from hf_genlm.model import loss_genlm
from hf_genlm.model.loss_genlm import cap_logits, causal_loss

HEADS = {
    "tied": {},
    "factorised": {"embedding_size": 8},
    "untied_with_bias": {"tie_word_embeddings": False, "output_bias": True},
    "capped": {"final_logit_softcapping": 2.0, "output_bias": True},
}
TERMS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "normalised": {"z_loss": 0.01},
    "both": {"label_smoothing": 0.1, "z_loss": 0.01},
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _several_pieces(monkeypatch):
    monkeypatch.setattr(loss_genlm, "MAX_LOGITS_AT_ONCE", 5 * VOCAB)


def masked_labels(tokens: torch.Tensor) -> torch.Tensor:
    labels = tokens.clone()
    labels[:, :3], labels[1, 7:] = -100, -100
    return labels


def by_definition(logits, labels, label_smoothing=0.0, z_loss=0.0, items=None) -> torch.Tensor:
    """The loss token by token, in Python."""
    losses = []
    for row, targets in zip(logits[:, :-1], labels[:, 1:], strict=True):
        for scores, target in zip(row, targets, strict=True):
            if target != -100:
                log_z = torch.logsumexp(scores, 0)
                spread = (1 - label_smoothing) * scores[target] + label_smoothing * scores.mean()
                losses.append(log_z - spread + z_loss * log_z**2)
    return torch.stack(losses).sum() / (items or len(losses))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_those_of_the_definition(head, terms, tokens):
    """In float64: without logits, with them, and by the definition."""
    model = build_model(["gru", "full_attention"], **HEADS[head]).double().train()
    labels = masked_labels(tokens)
    counted = {"labels": labels, "use_cache": False, "num_items_in_batch": torch.tensor(100)}
    without = model(tokens, **counted, **TERMS[terms], skip_logits=True)
    assert without.logits is None
    logits = model(tokens, use_cache=False).logits
    losses = [
        without.loss,
        causal_loss(logits, labels, **TERMS[terms], num_items_in_batch=100),
        by_definition(logits, labels, **TERMS[terms], items=100),
    ]
    gradients = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    for loss, grads in zip(losses, gradients, strict=True):
        torch.testing.assert_close(loss, losses[-1], atol=1e-12, rtol=1e-10)
        for ours, defined in zip(grads, gradients[-1], strict=True):
            torch.testing.assert_close(ours, defined, atol=1e-11, rtol=1e-8)
    with_logits = model(tokens, **counted, **TERMS[terms])
    assert with_logits.logits.shape == (*tokens.shape, VOCAB)
    torch.testing.assert_close(with_logits.loss.double(), losses[-1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_the_mean_is_over_labels_when_no_count_is_given(skip_logits, tokens):
    model = build_model(["gru"])
    labels = masked_labels(tokens)
    expected = by_definition(model(tokens).logits, labels)
    torch.testing.assert_close(model(tokens, labels=labels, skip_logits=skip_logits).loss, expected)


def test_labels_that_are_shifted_already_are_taken_as_they_are(tokens):
    model = build_model(["gru"]).double()
    shifted = F.pad(tokens, (0, 1), value=-100)[:, 1:]
    loss = model(tokens, labels=tokens, shift_labels=shifted, skip_logits=True).loss
    torch.testing.assert_close(loss, by_definition(model(tokens).logits, tokens))
    smoothed = model(tokens, labels=tokens, shift_labels=shifted, label_smoothing=0.2).loss
    torch.testing.assert_close(smoothed, by_definition(model(tokens).logits, tokens, label_smoothing=0.2))


def test_logits_are_there_whenever_there_are_no_labels(tokens):
    assert build_model(["gru"])(tokens, skip_logits=True).logits.shape == (3, 12, VOCAB)


def test_capped_logits_stay_in_their_bound_and_others_are_untouched(tokens):
    plain, capped = build_model(["gru"]), build_model(["gru"], final_logit_softcapping=2.0)
    logits = plain(tokens).logits
    assert logits.abs().max() > 2.0 > capped(tokens).logits.abs().max()
    torch.testing.assert_close(capped(tokens).logits, 2.0 * torch.tanh(logits / 2.0))
    assert cap_logits(logits, None) is logits


def test_a_loss_can_be_had_without_gradients_and_with_frozen_parts(tokens):
    model = build_model(["gru"])
    whole = model(tokens, labels=tokens, skip_logits=True).loss
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, labels=tokens, skip_logits=True).loss, whole.detach())
    model.requires_grad_(False)
    model.model.layers[0].mixer.in_proj.weight.requires_grad_(True)
    model(tokens, labels=tokens, skip_logits=True).loss.backward()
    (grad,) = torch.autograd.grad(
        by_definition(model(tokens).logits, tokens), model.model.layers[0].mixer.in_proj.weight
    )
    torch.testing.assert_close(model.model.layers[0].mixer.in_proj.weight.grad, grad)
    assert model.lm_head.weight.grad is None


@pytest.mark.parametrize("size", [5, 12, 36, 1000])
def test_the_size_of_a_piece_does_not_matter(size, tokens, monkeypatch):
    model = build_model(["gru"]).double()
    monkeypatch.setattr(loss_genlm, "MAX_LOGITS_AT_ONCE", size * VOCAB)
    loss = model(tokens, labels=tokens, skip_logits=True).loss
    torch.testing.assert_close(loss, by_definition(model(tokens).logits, tokens))


def test_extreme_logits_lose_nothing():
    """A target of probability exp(-1000), which a softmax in float32 rounds to 0, and a lead of as much."""
    states = torch.tensor([[[1000.0], [-1000.0], [0.0]]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    labels = torch.tensor([[0, 1, 0]])
    loss = loss_genlm.causal_loss_without_logits(states, weight, None, labels)
    assert loss.item() == pytest.approx((1000 + 2000) / 2, rel=1e-6)
    loss.backward()
    assert torch.isfinite(states.grad).all()
    assert states.grad[0, 0].item() == pytest.approx((1 - 0) / 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("terms", ["plain", "both"])
def test_mixed_precision_is_as_near_as_the_plain_path(device, terms, tokens):
    model = build_model(["gru", "full_attention"], output_bias=True, final_logit_softcapping=8.0).to(device)
    tokens = tokens.to(device)
    labels = masked_labels(tokens)
    exact = by_definition(model.double()(tokens).logits, labels, **TERMS[terms])
    names = [name for name, _ in model.named_parameters()]
    exact_grads = torch.autograd.grad(exact, list(model.parameters()))
    model.float()
    errors = []
    for skip_logits in (False, True):
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(tokens, labels=labels, use_cache=False, skip_logits=skip_logits, **TERMS[terms]).loss
        assert loss.dtype == torch.float32
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert {g.dtype for g in grads} == {torch.float32}
        errors.append([(g - e).norm() / e.norm() for g, e in zip(grads, exact_grads, strict=True)])
        assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    for name, plain, without in zip(names, *errors, strict=True):
        assert without < 1.5 * plain + 1e-3, name


def test_accumulated_pieces_add_up_to_one_batch(tokens):
    labels = masked_labels(tokens)
    items = (labels[:, 1:] != -100).sum()
    model = build_model(["gated_linear"], output_bias=True).double()
    terms = {"skip_logits": True, "z_loss": 0.01, "label_smoothing": 0.1, "num_items_in_batch": items}
    model(tokens, labels=labels, **terms).loss.backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for row, row_labels in zip(tokens, labels, strict=True):
        model(row[None], labels=row_labels[None], **terms).loss.backward()
    for parameter, grad in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_it_compiles_in_one_graph(tokens):
    model = build_model(["gated_linear"], final_logit_softcapping=5.0, output_bias=True)
    kwargs = {"labels": tokens, "skip_logits": True, "use_cache": False, "z_loss": 1e-3}
    eager = model(tokens, **kwargs).loss
    grads = torch.autograd.grad(eager, list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(tokens, **kwargs).loss
    torch.testing.assert_close(loss, eager)
    for ours, other in zip(torch.autograd.grad(loss, list(model.parameters())), grads, strict=True):
        torch.testing.assert_close(ours, other)


WITH_LIGER = """
import torch, itertools
from hf_genlm.model import loss_genlm as loss

torch.manual_seed(0)
states, weight, bias = torch.randn(40, 8), torch.randn(61, 8), torch.randn(61)
inputs = [tensor.requires_grad_() for tensor in (states, weight, bias)]
targets = torch.randint(0, 61, (40,))
targets[:4] = -100
for smoothing, z_loss in itertools.product((0.0, 0.1), (0.0, 0.01)):
    terms = loss._Terms(None, smoothing, z_loss, -100, True)
    totals = [total(*inputs, targets, terms) for total in (loss.liger_loss, loss._HeadLoss.apply)]
    torch.testing.assert_close(*totals)
    for ours, theirs in zip(*(torch.autograd.grad(total, inputs) for total in totals)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
print("equal")
"""


def test_liger_gives_the_same_loss():
    """By Triton's interpreter, which needs no GPU but cannot run the soft cap."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    assert by_triton_interpreter(WITH_LIGER) == "equal"


def test_liger_kernels_see_no_target_beyond_the_vocabulary(monkeypatch):
    """They write the gradient at it, into whatever memory is there."""
    seen = []
    monkeypatch.setattr(loss_genlm, "_liger_kernel", lambda: lambda *args, **kwargs: seen.append(args))
    terms = loss_genlm._Terms(None, 0.0, 0.0, -100, True)
    loss_genlm.liger_loss(torch.zeros(3, 8), torch.zeros(VOCAB, 8), None, torch.tensor([0, -100, 60]), terms)
    assert len(seen) == 1
    for target in (VOCAB, -1, -101, 2**40):
        with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
            loss_genlm.liger_loss(
                torch.zeros(2, 8), torch.zeros(VOCAB, 8), None, torch.tensor([3, target]), terms
            )
    assert len(seen) == 1


@pytest.mark.parametrize("skip_logits", [False, True])
def test_labels_of_another_shape_or_beyond_the_vocabulary_are_refused(skip_logits, tokens):
    model = build_model(["gru"])
    for shape in ((3, 11), (3, 13), (1, 12), (4, 12)):
        labels = torch.full(shape, 5)
        with pytest.raises(
            ValueError, match=rf"batch_size \(36\) to match target batch_size \({labels.numel()}\)"
        ):
            model(tokens, labels=labels, skip_logits=skip_logits)
    for label in (VOCAB, -1, -101):
        with pytest.raises((IndexError, RuntimeError), match=f"{label} is out of bounds"):
            model(tokens, labels=torch.full_like(tokens, label), skip_logits=skip_logits)


def test_an_empty_piece_of_labels_is_nan_as_in_transformers(tokens):
    labels = torch.full_like(tokens, -100)
    model = build_model(["gru"])
    assert math.isnan(model(tokens, labels=labels).loss.item())
    assert math.isnan(model(tokens, labels=labels, skip_logits=True).loss.item())


@pytest.mark.parametrize("change", ["hook", "adapter", "wrapped"])
def test_changes_of_the_head_are_not_passed_by(change, tokens):
    """A hook, a LoRA adapter or a replaced forward of the head acts on the loss without logits too."""
    model = build_model(["gru"], tie_word_embeddings=False)
    if change == "hook":
        model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif change == "wrapped":
        forward = model.lm_head.forward
        model.lm_head.forward = lambda states: 2 * forward(states)
    else:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    outputs = model(input_ids=tokens, labels=tokens, skip_logits=True)
    assert outputs.logits is None
    logits = model(input_ids=tokens).logits
    torch.testing.assert_close(outputs.loss, by_definition(logits, tokens))


def test_a_loss_of_the_user_and_backward_hooks_are_not_passed_by(tokens):
    model, seen = build_model(["gru"]), []
    model.lm_head.register_full_backward_hook(lambda *args: seen.append(args))
    model(tokens, labels=tokens, skip_logits=True).loss.backward()
    assert len(seen) == 1
    model.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    outputs = model(tokens, labels=tokens, skip_logits=True)
    torch.testing.assert_close(outputs.loss, model(tokens).logits.square().mean())
