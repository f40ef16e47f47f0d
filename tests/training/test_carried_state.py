"""Promise: a state carried from row to row is that of one endless row, in training and in evaluation, in any
batches, passes and processes and through interruptions; and what cannot carry one is refused."""

import itertools
import math
import socket
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file, save_file
from support.launching import environment
from support.models import EOS, PAD, STACKS, VOCAB, build_model
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler
from transformers import DynamicCache, TrainerCallback, TrainingArguments

from hf_genlm.config.recipe import Recipe, TrainingRecipe, load_recipe
from hf_genlm.config.settle import settle
from hf_genlm.errors import UserError
from hf_genlm.evaluation.likelihood import measure_likelihood
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.exporting.targets import network_of
from hf_genlm.model import RECURRENT_MIXERS, CarriedState
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.encoding import TokenizedDocuments
from hf_genlm.text.packing import PackedRows, collate, position_ids_of
from hf_genlm.training.budget import Budget, trapezoid
from hf_genlm.training.carried_state import STATE_FILE, ContiguousSampler, StateCallback
from hf_genlm.training.optimizer import OptimizerFactory
from hf_genlm.training.train import train
from hf_genlm.training.trainer import BudgetTrainer

RECURRENT = {name: {"mixer_types": [name, name]} for name in RECURRENT_MIXERS} | {
    "bigram": {"mixer_types": ["gated_linear", "lstm"], "bigram_size": 32},
    "shared": {"mixer_types": ["gru", "gated_linear"] * 2, "shared_layers": 2},
    "factorised": {"mixer_types": ["lstm"], "embedding_size": 8, "final_logit_softcapping": 20.0},
}
ATTENDING = [name for name, stack in STACKS.items() if set(stack["mixer_types"]) - set(RECURRENT_MIXERS)]
ROW = 8
DOCUMENTS = [3, 30, 1, 9, 13, 14, 2, 40, 6]


def recurrent_model(name: str):
    stack = dict(RECURRENT[name])
    return build_model(stack.pop("mixer_types"), **stack).double()


def documents_of(lengths: list[int]) -> TokenizedDocuments:
    ids = np.random.default_rng(0).integers(2, VOCAB, size=sum(lengths)).astype(np.uint16)
    offsets = np.array([0, *np.cumsum(lengths)], dtype=np.int64)
    return TokenizedDocuments(ids, offsets, np.array(lengths, dtype=np.int64))


def packed(lengths: list[int] = DOCUMENTS, carries_state: bool = True) -> PackedRows:
    return PackedRows(documents_of(lengths), ROW, EOS, PAD, carries_state=carries_state)


def batch_of(rows: PackedRows, chosen) -> dict[str, torch.Tensor]:
    return collate(rows.__getitems__(list(chosen)))


def read(model, batch: dict[str, torch.Tensor], carried: CarriedState) -> torch.Tensor:
    """The logits (B, T - 1, V) of rows to their last token but one."""
    given = {name: batch[name][:, :-1] for name in ("input_ids", "position_ids")}
    return model(**given, past_key_values=carried).logits


def weights_of(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# The model


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_rows_with_a_carried_state_equal_one_long_row(name):
    model, rows = recurrent_model(name), packed()
    stream = [EOS, *(t for ids, _ in rows.documents for t in (*ids.tolist(), EOS))]
    batch = batch_of(rows, range(len(rows)))
    starts = batch["position_ids"][:, :-1] == 0
    assert starts[:, 0].any(), "a document starts with a row"
    assert {0, 1, 2} <= set(starts.sum(1).tolist()), "rows without, with one and with more of them"
    long_row = torch.tensor([stream[:-1]])
    positions = torch.from_numpy(position_ids_of(long_row.numpy(), EOS))
    expected = model(long_row, position_ids=positions).logits[0]
    carried = CarriedState()
    found = [read(model, batch_of(rows, [i]), carried) for i in range(len(rows))]
    found = torch.cat(found, dim=1)[0, : len(expected)]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    alone = torch.cat([read(model, batch_of(rows, [i]), CarriedState()) for i in range(len(rows))], dim=1)
    assert (alone[0, : len(expected)] - expected).abs().max() > 1e-3, "the state makes a difference"


@pytest.mark.parametrize("name", RECURRENT)
def test_loss_and_gradients_are_those_of_the_row_given_the_state_as_it_is(name):
    """The twin reads what the document holds before the row by transformers' cache, without gradients."""
    model, rows = recurrent_model(name), packed()
    stream = [EOS, *(t for ids, _ in rows.documents for t in (*ids.tolist(), EOS))]
    carried = CarriedState()
    for i in range(6):
        batch = batch_of(rows, [i])
        targets = batch["labels"][0, 1:]
        model.zero_grad()
        found = cross_entropy(read(model, batch, carried)[0], targets, reduction="sum")
        found.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        begins = (batch["position_ids"][0, :-1] == 0).nonzero().flatten().tolist()
        edges = sorted({0, *begins, ROW - 1})
        expected = 0.0
        for begin, end in itertools.pairwise(edges):
            cache = DynamicCache(config=model.config)
            if begin not in begins:
                before = stream[: i * (ROW - 1)]
                before = before[max(k for k, token in enumerate(before) if token == EOS) :]
                with torch.no_grad():
                    model(torch.tensor([before]), past_key_values=cache)
            logits = model(batch["input_ids"][:, begin:end], past_key_values=cache).logits[0]
            expected = expected + cross_entropy(logits, targets[begin:end], reduction="sum")
        expected.backward()
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ATTENDING)
@torch.no_grad()
def test_attention_sees_its_row_alone(name):
    """Where recurrent layers say nothing a row is what it is without a carried state, and else it is not."""
    model, rows, plain = build_model(name).double(), packed(), packed(carries_state=False)

    def distance() -> float:
        carried = CarriedState()
        return max(
            (
                read(model, batch_of(rows, [i]), carried)
                - model(**{k: v[:, :-1] for k, v in batch_of(plain, [i]).items() if k != "labels"}).logits
            )
            .abs()
            .max()
            .item()
            for i in range(4)
        )

    if set(model.config.mixer_types) & set(RECURRENT_MIXERS):
        assert distance() > 1e-3
    for layer, mixer in zip(model.model.layers, model.config.mixer_types, strict=False):
        if mixer in RECURRENT_MIXERS:
            layer.mixer.out_proj.weight.zero_()
    if model.model.embed_bigrams is not None:
        model.model.embed_bigrams.weight.zero_()
    if model.mixture is not None:  # the last words are carried, too
        model = network_of(model)
    assert distance() < 1e-5, "but for the rounding of rotary positions, which are float32"


def test_rows_that_cannot_go_on_are_refused():
    model, ids = build_model("lstm"), torch.arange(2, 8)[None]
    positions = torch.arange(6)[None]
    with pytest.raises(ValueError, match="needs position_ids"):
        model(ids, past_key_values=CarriedState())
    with pytest.raises(ValueError, match="no attention_mask"):
        model(
            ids, position_ids=positions, attention_mask=torch.ones_like(ids), past_key_values=CarriedState()
        )
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids, position_ids=positions, past_key_values=CarriedState())
    model.eval()(ids, position_ids=positions, past_key_values=CarriedState())


@pytest.mark.parametrize(
    ("stack", "backend"),
    [("bigram", "eager"), *(pytest.param(s, "aot_eager", marks=pytest.mark.slow) for s in STACKS)],
)
def test_a_compiled_model_carries_too(stack, backend):
    torch._dynamo.reset()  # of the programs of other tests, which count towards its limit
    model, rows = build_model(stack).double(), packed()
    results = []
    for forward in (model, torch.compile(model, backend=backend, fullgraph=True)):
        model.zero_grad()
        carried = CarriedState()
        losses = []
        for i in range(3):
            losses.append(read(forward, batch_of(rows, [i, i + 8]), carried)[..., 5].square().sum())
            losses[-1].backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((torch.stack(losses).detach(), gradients))
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-9)


# Training


@pytest.mark.parametrize(("n_rows", "n_sequences"), [(23, 4), (24, 4), (9, 4), (5, 1), (100, 7)])
def test_every_sequence_reads_contiguous_rows_and_an_epoch_leaves_out_less_than_a_step(n_rows, n_sequences):
    order = ContiguousSampler(n_rows, n_sequences, seed=3)
    left_out = []
    for epoch in range(40):
        order.epoch = epoch
        steps = np.array(list(order)).reshape(-1, n_sequences)
        assert len(order) == steps.size
        assert (np.diff(steps, axis=0) % n_rows == 1).all()
        assert len(np.unique(steps)) == steps.size > n_rows - n_sequences
        left_out.append(tuple(sorted(set(range(n_rows)) - set(steps.flatten()))))
    assert list(order) == list(order)
    if n_rows % n_sequences:
        assert len(set(left_out)) > 3


def test_too_few_rows_are_refused():
    with pytest.raises(UserError, match="7 rows of text are less than two for each of the 4"):
        ContiguousSampler(7, 4, seed=0)


@pytest.mark.parametrize(("per_device", "passes"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_each_process_keeps_to_its_sequences(per_device, passes):
    """accelerate distributes Trainer's batches: pass m of every step must have the same sequences."""
    processes, n_rows = 3, 97
    order = ContiguousSampler(n_rows, per_device * passes * processes, seed=0)
    every = []
    for process in range(processes):
        shard = BatchSamplerShard(BatchSampler(order, per_device, False), processes, process)
        rows = np.array(list(shard)).reshape(order.n_steps, passes, per_device)
        assert (np.diff(rows, axis=0) % n_rows == 1).all()
        every.append(rows)
    # and all sequences of a step, as `StateCallback.save` puts them together: passes, processes, rows
    together = np.stack(every, axis=2).reshape(order.n_steps, -1)
    assert together.flatten().tolist() == list(order)


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


RECIPE = TrainingRecipe(learning_rate=0.01, embedding_lr_ratio=1.0, weight_decay=0.1, carry_state=True)
STEPS = 12  # the rows make 4 steps of an epoch for 4 sequences
N_SEQUENCES = 4


def trainer_of(
    model, folder, passes: int = 1, stop: int | None = None, processes: int = 1, save_steps: int = 7
) -> BudgetTrainer:
    rows, run = packed(), RunFolder(folder)
    run.path.mkdir(exist_ok=True)
    args = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=N_SEQUENCES // passes // processes, use_cpu=True,
        gradient_accumulation_steps=passes, save_strategy="steps", save_steps=save_steps, disable_tqdm=True,
        remove_unused_columns=False, learning_rate=RECIPE.learning_rate,
    )  # fmt: skip
    return BudgetTrainer(
        run=run, budget=Budget(steps=STEPS), recipe=RECIPE, carried=StateCallback(args, len(rows)),
        model=model, args=args, train_dataset=rows, data_collator=collate,
        callbacks=[] if stop is None else [StopAt(stop)],
        optimizer_cls_and_kwargs=(OptimizerFactory, {"recipe": RECIPE}),
    )  # fmt: skip


def by_a_plain_loop(model) -> torch.Tensor:
    """The weights after STEPS steps, each of one batch."""
    rows = packed()
    optimizer = OptimizerFactory()(model.train(), RECIPE)
    rates = [group["lr"] for group in optimizer.param_groups]
    order = ContiguousSampler(len(rows), N_SEQUENCES, seed=42)  # Trainer's default
    step = 0
    for order.epoch in range(3):
        carried = CarriedState()
        for chosen in np.array(list(order)).reshape(-1, N_SEQUENCES):
            share = trapezoid((step + 0.5) / STEPS, RECIPE.warmup_ratio, RECIPE.decay_ratio)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            batch = batch_of(rows, chosen)
            logits = read(model, batch, carried)
            cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    assert step == STEPS
    return weights_of(model)


@pytest.mark.parametrize("name", ["lstm", "bigram"])
def test_training_equals_a_plain_loop_however_the_sequences_are_accumulated(name, tmp_path):
    expected = by_a_plain_loop(recurrent_model(name))
    for passes in (1, 2, 4):
        trainer = trainer_of(recurrent_model(name), tmp_path / str(passes), passes)
        trainer.train()
        torch.testing.assert_close(weights_of(trainer.model), expected, atol=1e-9, rtol=0)
    states = [load_file(tmp_path / f"{passes}/checkpoints/checkpoint-7/{STATE_FILE}") for passes in (1, 2, 4)]
    torch.testing.assert_close(states[1:], states[:1] * 2, atol=1e-8, rtol=0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> torch.Tensor:
    trainer = trainer_of(build_model("hybrid"), tmp_path_factory.mktemp("whole"), passes=2)
    trainer.train()
    return weights_of(trainer.model)


@pytest.mark.parametrize("stop", [6, 8])
def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(stop, undisturbed, tmp_path):
    """Stopped in mid-epoch and at the end of an epoch."""
    stopped = trainer_of(build_model("hybrid"), tmp_path, passes=2, stop=stop, save_steps=stop)
    stopped.train()
    assert stopped.state.global_step == stop
    checkpoint = tmp_path / f"checkpoints/checkpoint-{stop}"

    def resume() -> torch.Tensor:
        trainer = trainer_of(build_model("hybrid", seed=1), tmp_path, passes=2, save_steps=STEPS)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == STEPS
        return weights_of(trainer.model)

    assert torch.equal(resume(), undisturbed)
    # the states are part of that, but where an epoch begins
    states = load_file(checkpoint / STATE_FILE)
    assert all(len(state) == N_SEQUENCES for state in states.values())
    save_file({name: torch.zeros_like(state) for name, state in states.items()}, checkpoint / STATE_FILE)
    assert torch.equal(resume(), undisturbed) == (stop == 8)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    trainer = trainer_of(build_model("gru"), tmp_path, stop=1, save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "checkpoints/checkpoint-1"
    args = TrainingArguments(tmp_path, per_device_train_batch_size=2, use_cpu=True)
    with pytest.raises(UserError, match="has the states of 4 rows a step, and this run takes 2"):
        StateCallback(args, 40).load(checkpoint, build_model("gru").config)
    for other in ("lstm", "elman", "hybrid"):
        with pytest.raises(UserError, match="has the states of another model"):
            trainer_of(build_model(other, recurrent_size=40), tmp_path).carried.load(
                checkpoint, build_model(other, recurrent_size=40).config
            )
    for damaged in (b"", b"no tensors"):
        (checkpoint / STATE_FILE).write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            trainer_of(build_model("gru"), tmp_path).carried.load(checkpoint, build_model("gru").config)
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(UserError, match="its run carried no states"):
        trainer_of(build_model("gru"), tmp_path).train(resume_from_checkpoint=str(checkpoint))


def _as_a_process(folder: str) -> None:
    """What each of two processes runs: two sequences of the four."""
    trainer = trainer_of(recurrent_model("bigram"), folder, passes=1, processes=2)
    trainer.train()
    if trainer.args.process_index == 0:
        save_file({"weights": weights_of(trainer.model)}, Path(folder) / "weights.safetensors")


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(tmp_path):
    one = trainer_of(recurrent_model("bigram"), tmp_path / "one")
    one.train()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", __file__]
    subprocess.run([sys.executable, *launch, str(tmp_path)], check=True, timeout=240, env=environment())
    found = load_file(tmp_path / "weights.safetensors")["weights"]
    torch.testing.assert_close(found, weights_of(one.model), atol=1e-9, rtol=0)
    states = [
        load_file(folder / f"checkpoints/checkpoint-7/{STATE_FILE}")
        for folder in (tmp_path, tmp_path / "one")
    ]
    torch.testing.assert_close(*states, atol=1e-8, rtol=0)


def recipe_of(*assignments: str) -> Recipe:
    return load_recipe(None, ["training.steps=1", "model.size=tiny", *assignments])


def test_who_can_carry_a_state_is_told_before_anything_is_read():
    for decoder in ("transformer", "sliding"):
        with pytest.raises(UserError, match=r"training.carry_state = true: \w+ layers keep no state"):
            settle(recipe_of(f"model.decoder={decoder}", "training.carry_state=true"))
    with pytest.raises(UserError, match=r"evaluation.carry_state = true: full_attention layers"):
        settle(recipe_of("model.decoder=hybrid", "evaluation.carry_state=true"))
    with pytest.raises(UserError, match=r"evaluation.carry_state = true: learned positions"):
        settle(recipe_of("evaluation.carry_state=true", "model.position_type=learned"))
    for trained, decoder, evaluated in (
        ("true", "lstm", True),
        ("false", "lstm", False),
        ("true", "hybrid", False),
    ):
        resolved = settle(recipe_of(f"model.decoder={decoder}", f"training.carry_state={trained}"))
        assert resolved.evaluation.carry_state is evaluated
    kept = settle(recipe_of("training.carry_state=true", "evaluation.carry_state=false"))
    assert kept.evaluation.carry_state is False


def test_a_run_carries_from_recipe_to_card(tmp_path):
    from hf_genlm.card import write_card

    text = tmp_path / "text"
    text.mkdir()
    for name, topic in sorted(topics.items())[:20]:
        (text / f"{name}.txt").write_text(topic, encoding="utf-8")
    settings = ["tokenizer.vocab_size=400", "model.hidden_size=32", "model.num_hidden_layers=1",
                "model.decoder=lstm", "training.max_seq_length=16", "training.batch_size=4",
                "training.gradient_accumulation_steps=2", "training.steps=8",
                "training.num_validations=1", "training.num_samples=0",
                "training.carry_state=true", f"corpus.sources={text}"]  # fmt: skip
    run = train(load_recipe(None, settings), tmp_path / "run")
    values = {m.name: m.value for m in read_measurements(run.evaluation)}
    assert values["nats_per_token"] < math.log(400)
    assert load_recipe(run.recipe).evaluation.carry_state is True
    write_card(run)
    card = (run.model / "README.md").read_text()
    assert "given the tokens before it in its document; the end" in card
    with pytest.raises(UserError, match="less than two for each of the 4000"):
        train(load_recipe(None, [*settings, "training.batch_size=2000"]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


# Evaluation


def whole(model, documents) -> list[torch.Tensor]:
    """Nats of each token, each document by one forward pass."""
    nats = []
    for ids, _ in documents:
        text = torch.tensor([EOS, *ids.tolist()])
        with torch.no_grad():
            logits = model(text[None, :-1], use_cache=False).logits[0]
        nats.append(cross_entropy(logits, text[1:], reduction="none"))
    return nats


def measured(model, documents, **options) -> dict:
    found = measure_likelihood(model, documents, **{"start_id": EOS, "carry_state": True, **options})
    return {m.name: m for m in found}


@pytest.mark.parametrize("name", RECURRENT)
def test_each_token_is_scored_given_all_before_it(name):
    model, documents = recurrent_model(name), documents_of(DOCUMENTS)
    expected = torch.cat(whole(model, documents)).mean().item()
    for context in (2, 5, 1000):
        for batch_size in (1, 4, 64):
            found = measured(model, documents, context=context, batch_size=batch_size)
            assert found["nats_per_token"].value == pytest.approx(expected, abs=1e-10)
            assert found["nats_per_token"].n == sum(DOCUMENTS)
    by_windows = measured(model, documents, context=5, carry_state=False)
    assert abs(by_windows["nats_per_token"].value - expected) > 1e-4


def test_many_documents_have_the_same_errors_in_any_chunks():
    model = recurrent_model("gated_linear")
    documents = documents_of([int(n) for n in np.random.default_rng(1).integers(0, 25, size=60)])
    first, *others = (
        measured(model, documents, context=context, batch_size=batch_size)
        for context, batch_size in ((3, 7), (4, 60), (100, 1))
    )
    for other in others:
        for name, measurement in first.items():
            assert other[name].value == pytest.approx(measurement.value, rel=1e-10)
            assert other[name].stderr == pytest.approx(measurement.stderr, rel=1e-10)
            assert other[name].n == measurement.n


def test_a_part_is_of_whole_documents_and_each_token_as_in_the_whole():
    model, documents = recurrent_model("gru"), documents_of(DOCUMENTS)
    nats = whole(model, documents)
    order = np.argsort(np.arange(len(DOCUMENTS)) * (math.sqrt(5) - 1) / 2 % 1.0)
    for most in (1, 4, 20, 60, 1000):
        left, parts = most, []
        for document in order:
            n = min(DOCUMENTS[document], 4 * math.ceil(left / 4)) if left > 0 else 0
            parts.append(nats[document][:n])
            left -= n
        expected = torch.cat(parts)
        found = measured(model, documents, context=4, max_tokens=most)["nats_per_token"]
        assert found.n == len(expected)
        assert found.value == pytest.approx(expected.mean().item(), abs=1e-10)
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = measured(model, documents, context=4, max_logits=2 * 4 * VOCAB)["nats_per_token"]
    assert max(rows for rows, _ in shapes) == 2
    assert found.value == pytest.approx(torch.cat(nats).mean().item(), abs=1e-10)


@pytest.mark.parametrize("name", ATTENDING)
def test_a_model_that_does_not_keep_all_in_states_is_refused(name):
    with pytest.raises(
        UserError, match=r"carry_state = true: a model with .*attention.* is not purely recurrent"
    ):
        measured(build_model(name), documents_of([5]), context=4)


if __name__ == "__main__":
    _as_a_process(sys.argv[1])
