"""Promise: Muon moves every matrix of the layers as its definition says, and Trainer sees an optimizer."""

import io
from pydoc_data.topics import topics

import pytest
import torch
from support.models import STACKS, VOCAB, build_model
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_genlm.config.recipe import TrainingRecipe, load_recipe
from hf_genlm.errors import UserError
from hf_genlm.model import MIXERS, GenLMConfig, GenLMForCausalLM
from hf_genlm.training.optimizer import Muon, OptimizerFactory, orthogonalize, split_by_role, step_scale
from hf_genlm.training.train import train

CELLS = [name for name, mixer in MIXERS.items() if getattr(mixer, "n_gates", 1) > 1]
RATES = {"learning_rate": 1e-2, "embedding_lr_ratio": 2.0, "weight_decay": 0.1}


def muon_of(model: nn.Module, **settings) -> Muon:
    return OptimizerFactory()(model, TrainingRecipe(optimizer="muon", **{**RATES, **settings}))


def take_steps(model, optimizer, tokens, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def naive_orthogonal(matrix: torch.Tensor, iterations: int) -> torch.Tensor:
    x = matrix / matrix.norm()
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def naive_muon(weight, gradients, rate, decay, n_matrices) -> None:
    """All steps of one parameter in place, gate by gate."""
    for gate, of_gate in zip(
        weight.chunk(n_matrices), zip(*(g.chunk(n_matrices) for g in gradients), strict=True), strict=True
    ):
        momentum = torch.zeros_like(gate)
        for gradient in of_gate:
            momentum = 0.95 * momentum + 0.05 * gradient
            direction = naive_orthogonal(0.95 * momentum + 0.05 * gradient, iterations=3)
            gate.mul_(1 - rate * decay)
            gate.sub_(rate * step_scale(*gate.shape) * direction)


@pytest.mark.parametrize("stack", STACKS)
def test_steps_are_those_of_the_naive_twin(stack):
    model, twin = build_model(stack).double(), build_model(stack).double()
    optimizer = muon_of(model, matrix_lr_ratio=30)
    matrices, tables, bigrams, rest = split_by_role(twin)
    names = {id(p): name for name, p in twin.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    gradients = [
        {name: torch.randn(p.shape, generator=generator).to(p) for name, p in model.named_parameters()}
        for _ in range(3)
    ]
    adamw = torch.optim.AdamW(
        [
            {"params": tables, "lr": 2e-2, "weight_decay": 0.1},
            {"params": bigrams, "lr": 2e-2, "weight_decay": 0.3},
            {"params": rest},
        ],
        lr=1e-2,
        betas=(0.9, 0.99),
        weight_decay=0.0,
    )
    for of_step in gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = of_step[name].clone()
        for parameter in [*tables, *bigrams, *rest]:
            parameter.grad = of_step[names[id(parameter)]]
        optimizer.step()
        adamw.step()
    with torch.no_grad():
        for matrix in matrices:
            name = names[id(matrix)]
            is_gated = name.endswith(("in_proj.weight", "rec_proj.weight"))
            n_matrices = twin.get_submodule(name.rsplit(".", 2)[0]).n_gates if is_gated else 1
            naive_muon(matrix, [of_step[name] for of_step in gradients], 0.3, 0.1, n_matrices)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, twin.get_parameter(name), rtol=0, atol=1e-6), name


@pytest.mark.parametrize("shape", [(24, 24), (12, 48), (48, 12), (1, 24), (24, 1)])
def test_singular_values_come_near_1(shape):
    """Also of ill-conditioned matrices: their singular values differ by a factor of 100."""
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(*shape, generator=generator), full_matrices=False)
    spread = u * torch.logspace(0, -2, min(shape)) @ vh
    found = orthogonalize(spread * torch.tensor([1e-6, 1e-2, 1, 1e2, 1e6])[:, None, None], iterations=5)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert torch.allclose(found[0], found[4], atol=1e-3)  # the size of a gradient does not matter


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (24, 96), (1, 96)])
def test_orthogonalising_is_that_of_the_naive_twin(shape):
    """In float32, with directions that the gradient does not have at all."""
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    matrices[1] = torch.outer(matrices[1, :, 0], matrices[1, 0])
    matrices[2, 1:] *= 1e-4
    expected = torch.stack([naive_orthogonal(matrix, 5) for matrix in matrices.double()])
    assert torch.allclose(orthogonalize(matrices, 5).double(), expected, rtol=0, atol=1e-4)


def test_a_gradient_of_zeros_moves_nothing():
    weight = nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.zeros_like(weight)
    Muon([{"method": "muon", "params": [weight]}]).step()
    assert torch.equal(weight, torch.ones(4, 6))


def test_equal_shapes_in_one_batch_are_as_one_by_one():
    """Tall and wide ones too, and no more batches than there are shapes."""
    torch.manual_seed(0)
    shapes = [(6, 9), (9, 6), (6, 9), (4, 4)]
    start = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    together, alone = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    for parameters in zip(together, alone, strict=True):
        gradient = torch.randn_like(parameters[0])
        for parameter in parameters:
            parameter.grad = gradient
    seen = []

    def counting(matrices_NRC, iterations):
        seen.append(tuple(matrices_NRC.shape))
        return orthogonalize(matrices_NRC, iterations)

    Muon([{"method": "muon", "params": together}], orthogonalize=counting).step()
    assert seen == [(3, 6, 9), (1, 4, 4)]
    for parameter in alone:
        Muon([{"method": "muon", "params": [parameter]}]).step()
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stack", STACKS)
def test_every_trainable_parameter_is_in_one_group(stack):
    model = build_model(stack)
    model.model.norm.weight.requires_grad_(False)
    optimizer = muon_of(model)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    names = {id(p): name for name, p in model.named_parameters()}
    methods = {names[id(p)]: group["method"] for group in optimizer.param_groups for p in group["params"]}
    for name, method in methods.items():
        assert (method == "muon") == (name.endswith("proj.weight")), name
    assert optimizer.param_groups[0]["lr"] == 1e-2  # what the log shows


@pytest.mark.parametrize("mixer", CELLS)
def test_gates_are_matrices_of_their_own(mixer):
    model = build_model([mixer])
    number = {id(p): g.get("n_matrices") for g in muon_of(model).param_groups for p in g["params"]}
    cell = model.model.layers[0].mixer
    assert number[id(cell.in_proj.weight)] == number[id(cell.rec_proj.weight)] == cell.n_gates
    assert number[id(cell.out_proj.weight)] == 1


def test_saved_state_goes_on_bit_for_bit(tokens):
    straight, first, second = (build_model("hybrid") for _ in range(3))
    curve = take_steps(straight, muon_of(straight), tokens, 6)
    optimizer = muon_of(first)
    before = take_steps(first, optimizer, tokens, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second.load_state_dict(first.state_dict())
    resumed = muon_of(second, learning_rate=1.0, matrix_lr_ratio=1.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert before + take_steps(second, resumed, tokens, 3) == curve
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_trainer_resumes_bit_for_bit(tmp_path):
    rows = torch.randint(2, VOCAB, (24, 12), generator=torch.Generator().manual_seed(1))
    dataset = [{"input_ids": row, "labels": row} for row in rows]

    def run(steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        model = build_model("hybrid").train()
        recipe = TrainingRecipe(optimizer="muon", **RATES)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=3, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, report_to="none", disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            optimizer_cls_and_kwargs=(OptimizerFactory, {"recipe": recipe}),
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        return model.state_dict()

    straight = run(6)
    run(3)
    resumed = run(6, resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_scheduler_sets_the_rate_of_both_methods(tokens):
    model = build_model("hybrid")
    optimizer = muon_of(model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.0][step])
    for share in (1.0, 0.5, 0.0):
        assert [group["lr"] for group in optimizer.param_groups] == [share * peak for peak in peaks]
        before = [p.clone() for p in model.parameters()]
        take_steps(model, optimizer, tokens, 1)
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert all(moved) if share else not any(moved)
        if share:
            scheduler.step()


def test_parameters_without_gradient_stay(tokens):
    model = build_model("hybrid")
    frozen, unused = model.model.layers[0].mlp.up_proj.weight, nn.Parameter(torch.ones(3, 3))
    frozen.requires_grad_(False)
    model.register_parameter("unused", unused)
    before = frozen.clone()
    take_steps(model, muon_of(model), tokens, 2)
    assert torch.equal(frozen, before)
    assert torch.equal(unused, torch.ones(3, 3))


@pytest.mark.parametrize("stack", STACKS)
def test_every_decoder_learns(stack, tokens):
    model = build_model(stack).train()
    curve = take_steps(model, muon_of(model), tokens, 40)
    assert curve[-1] < curve[0] / 4


def test_it_learns_faster_than_adamw():
    """On text that does not repeat."""
    steps = 60
    text = "".join(topics[name] for name in sorted(topics)).encode()[: steps * 8 * 64]
    last = {}
    for name in ("adamw", "muon"):
        torch.manual_seed(0)
        config = GenLMConfig(
            vocab_size=256, mixer_types=["gated_linear"], hidden_size=64, initializer_range=0.125
        )
        model = GenLMForCausalLM(config)
        optimizer = OptimizerFactory()(
            model, TrainingRecipe(optimizer=name, **{**RATES, "learning_rate": 6e-3})
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        curve = []
        for rows in torch.tensor(list(text)).view(steps, 8, 64):
            curve += take_steps(model, optimizer, rows, 1)
            scheduler.step()
        last[name] = sum(curve[-10:]) / 10
    assert last["muon"] < last["adamw"]


def test_a_recipe_trains_with_it_and_accumulation_changes_nothing(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(topics[name] for name in sorted(topics)[:20]))
    curves = []
    for batch, accumulation in ((8, 1), (4, 2)):
        settings = [
            "tokenizer.vocab_size=400", "model.hidden_size=32", "model.num_hidden_layers=2",
            "training.max_seq_length=32", "training.steps=12", "training.num_validations=0",
            "training.optimizer=muon", "training.init=random", "training.logging_steps=1",
            f"corpus.sources={tmp_path / 'text.txt'}",
            f"training.batch_size={batch}", f"training.gradient_accumulation_steps={accumulation}",
        ]  # fmt: skip
        run = train(load_recipe(None, settings), tmp_path / str(batch))
        steps = [event for event in run.read_log() if event["event"] == "step"]
        assert max(step["learning_rate"] for step in steps) == load_recipe(run.recipe).training.learning_rate
        curves.append([step["loss"] for step in steps])
    assert curves[0][-1] < curves[0][0] - 0.5
    assert curves[1] == pytest.approx(curves[0], abs=1e-3)


def test_parts_of_matrices_are_refused():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
        for weight in (sharded, nn.Parameter(torch.ones(16))):
            optimizer = Muon([{"method": "muon", "params": [weight]}])
            weight.grad = torch.ones_like(weight)
            with pytest.raises(UserError, match="whole matrices"):
                optimizer.step()
    finally:
        dist.destroy_process_group()


def test_groups_name_their_method():
    with pytest.raises(ValueError, match="known: muon, adamw"):
        Muon([{"params": [nn.Parameter(torch.ones(2, 2))]}])
