"""Promise: the size of a decoder follows from the time and from what this machine was seen to do in it."""

import json
from types import SimpleNamespace

import pytest
import torch
from support.models import NETWORKS, build_model
from support.runs import SMALL

from hf_genlm.config.recipe import Recipe, load_recipe
from hf_genlm.config.settings import Facts, Settings
from hf_genlm.config.settle import SIZES, is_size_open, settle
from hf_genlm.errors import UserError
from hf_genlm.evaluation import evaluate
from hf_genlm.model import DECODERS, GenLMForCausalLM
from hf_genlm.run_folder import RunFolder
from hf_genlm.training import plan
from hf_genlm.training.budget import Budget
from hf_genlm.training.callbacks import ThreadsCallback
from hf_genlm.training.plan import LADDER, choose_threads, measure_step, plan_size
from hf_genlm.training.train import train
from hf_genlm.training.trainer import training_arguments_of

VOCAB = 2048


class Machine:
    """Steps take the time of their multiplications at `rate` a second, and longer from a width on."""

    def __init__(self, rate: float, slow_from: int = 10**9, corpus_tokens: int = 10**12):
        self.rate, self.slow_from = rate, slow_from
        self.facts = Facts(vocab_size=VOCAB, train_tokens=corpus_tokens)
        self.measured: list[int] = []

    def measure(self, settings: Settings) -> tuple[float, int]:
        width, layers = settings.model.hidden_size, settings.model.num_hidden_layers
        self.measured.append(width)
        weights = width * (VOCAB + 12 * width * layers)
        rate = self.rate / 50 if width >= self.slow_from else self.rate
        return settings.training.tokens_per_step * weights / rate, 1

    def plan(self, seconds: float, recipe: Recipe | None = None) -> plan.Plan:
        return plan_size(recipe or Recipe(), self.facts, seconds, self.measure)


@pytest.mark.parametrize("rate", [2e8, 2e10, 2e12])
def test_more_time_never_makes_a_smaller_decoder(rate):
    sizes = [LADDER.index(Machine(rate).plan(seconds).shape) for seconds in (1, 3, 10, 60, 600, 36000)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.parametrize("seconds", [2.0, 20.0, 200.0, 2000.0])
def test_it_is_the_largest_that_sees_enough_tokens_for_each_weight(seconds):
    machine = Machine(2e10)
    found = machine.plan(seconds)
    assert found.tokens >= plan.TOKENS_PER_WEIGHT * found.weights
    above = LADDER[LADDER.index(found.shape) + 1]
    weights = above.hidden_size * (VOCAB + 12 * above.hidden_size * above.num_hidden_layers)
    assert seconds * machine.rate / weights < plan.TOKENS_PER_WEIGHT * weights
    assert len(machine.measured) <= 4


def test_a_decoder_that_proves_slow_is_not_taken():
    fast = Machine(2e10).plan(200.0)
    found = Machine(2e10, slow_from=fast.shape.hidden_size).plan(200.0)
    assert found.shape.hidden_size < fast.shape.hidden_size
    assert found.tokens >= plan.TOKENS_PER_WEIGHT * found.weights


def test_a_small_text_gets_a_small_decoder_however_long_it_may_take():
    free = Machine(2e10).plan(600.0)
    bound = Machine(2e10, corpus_tokens=200_000).plan(600.0)
    assert bound.weights < free.weights
    assert bound.tokens == Recipe().training.max_epochs * 200_000 >= plan.TOKENS_PER_WEIGHT * bound.weights


def test_too_little_time_for_any_takes_the_smallest():
    assert Machine(1e3).plan(1.0).shape == LADDER[0]


def test_ladder_climbs_and_every_decoder_stands_on_every_rung():
    costs = [
        shape.hidden_size * (VOCAB + 12 * shape.hidden_size * shape.num_hidden_layers) for shape in LADDER
    ]
    assert costs == sorted(set(costs))
    for decoder in NETWORKS:
        for shape in LADDER:
            settings = settle(load_recipe(None, [f"model.decoder={decoder}"]), Facts(shape=shape))
            assert settings.model.hidden_size == shape.hidden_size
            assert settings.training.max_seq_length == shape.max_seq_length


def test_a_hybrid_is_deep_enough_to_be_one():
    found = Machine(1e3).plan(1.0, load_recipe(None, ["model.decoder=hybrid"]))
    assert found.shape.num_hidden_layers == len(DECODERS["hybrid"])


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ([], True),
        (["training.minutes=1", "model.decoder=lstm"], True),
        (["training.max_seq_length=32"], True),
        (["training.steps=9"], False),
        (["training.tokens=9"], False),
        (["model.size=tiny"], False),
        (["model.hidden_size=64"], False),
        (["model.mixers=gru"], False),
    ],
    ids=str,
)
def test_a_size_that_is_stated_is_not_planned(assignments, expected):
    assert is_size_open(load_recipe(None, assignments)) is expected


def test_a_size_without_time_is_the_named_one():
    settings = settle(load_recipe(None, ["training.steps=10"]))
    assert settings.model.hidden_size == SIZES["tiny"].hidden_size


def test_a_measured_step_is_a_step_of_training():
    model = build_model(["gru", "full_attention"]).train()
    before = [parameter.clone() for parameter in model.parameters()]
    recipe = settle(load_recipe(None, [*SMALL, "training.gradient_accumulation_steps=2"])).training
    seconds, threads = measure_step(model, recipe)
    assert seconds > 0
    assert 1 <= threads <= torch.get_num_threads()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(changed)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", True), ("float32", False)])
def test_a_step_is_measured_in_the_precision_of_training(dtype, expected):
    model, seen = build_model(["gru"]), []
    model.model.register_forward_hook(lambda *args: seen.append(torch.is_autocast_enabled("cpu")))
    measure_step(model, settle(load_recipe(None, [*SMALL, f"training.dtype={dtype}"])).training)
    assert set(seen) == {expected}


@pytest.mark.parametrize(
    ("has_units", "width", "dtype", "expected"),
    [
        (True, 96, "auto", True),
        (True, 95, "auto", False),
        (False, 96, "auto", False),
        (True, 96, "float32", False),
        (False, 95, "bfloat16", True),
    ],
)
def test_a_cpu_with_matrix_units_trains_wide_decoders_in_bfloat16(
    monkeypatch, tmp_path, has_units, width, dtype, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_units})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    training = settle(load_recipe(None, [*SMALL, f"training.dtype={dtype}"])).training
    found = training_arguments_of(RunFolder(tmp_path), training, Budget(steps=1), width)
    assert found.bf16 is expected


class Cores:
    """Torch's threads, and steps whose seconds depend on them."""

    def __init__(self, monkeypatch, threads: int, **keywords):
        self.now, self.threads, self.heard = 0.0, threads, []
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(self, "threads", n))
        run = SimpleNamespace(
            log=lambda event, **fields: self.heard.append((fields["step"], fields["threads"]))
        )
        self.callback, self.step = ThreadsCallback(run, most=2, **keywords), 0
        self.callback.on_train_begin(None, SimpleNamespace(global_step=0), None)

    def train(self, steps: int, alone_s: float, together_s: float) -> list[int]:
        """Train; returns the threads of each step."""
        used = []
        for _ in range(steps):
            self.step += 1
            used.append(self.threads)
            self.callback.on_step_begin(None, None, None)
            self.now += alone_s if self.threads == 1 else together_s
            self.callback.on_step_end(None, SimpleNamespace(global_step=self.step), None)
            self.now += 0.5  # a validation between the steps
        return used


def test_threads_go_down_while_cores_are_taken_and_up_when_they_are_free(monkeypatch):
    cores = Cores(monkeypatch, threads=2)
    assert cores.train(100, 0.15, 0.1) == [2] * 100, "an idle machine tries nothing: sums are rounded alike"
    assert cores.train(20, 0.3, 5.0)[-15:] == [1] * 15
    cores.train(200, 0.3, 5.0)
    assert cores.threads == 1
    assert cores.train(300, 0.15, 0.1)[-50:] == [2] * 50
    assert [n for _, n in cores.heard] == [2, 1, 2]


def test_trials_of_threads_cost_a_run_little(monkeypatch):
    cores = Cores(monkeypatch, threads=1)
    used = cores.train(3000, 0.1, 5.0)
    assert cores.threads == 1
    assert 2 <= used.count(2) <= 8, "tried again, and seldom: each trial takes 50 times a step"


def test_one_thread_that_is_no_faster_is_left_again(monkeypatch):
    cores = Cores(monkeypatch, threads=2)
    cores.train(50, 0.1, 0.1)
    used = cores.train(50, 1.0, 1.0)
    assert cores.threads == 2
    assert 1 <= used.count(1) <= 3


def test_a_stated_number_of_threads_is_kept(monkeypatch):
    cores = Cores(monkeypatch, threads=2, is_stated=True)
    cores.train(50, 0.1, 0.1)
    assert cores.train(50, 0.1, 5.0) == [2] * 50


@pytest.mark.parametrize(("together_s", "stated", "expected"), [(0.12, None, 2), (4.0, None, 1), (4.0, 2, 2)])
def test_threads_are_measured_before_a_run_by_steps(monkeypatch, together_s, stated, expected):
    """Two threads are kept unless one is twice as fast; random numbers are left as they were."""
    threads, now = [2], [0.0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: threads.__setitem__(0, n))
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    model = build_model(["gru"]).train()
    forward = model.forward

    def timed(*args, **kwargs):
        now[0] += 0.1 if threads[0] == 1 else together_s
        return forward(*args, **kwargs)

    model.forward = timed
    settings = settle(load_recipe(None, [*SMALL, f"training.num_threads={stated or 'null'}"]))
    before = torch.get_rng_state()
    assert choose_threads(lambda: model, settings) == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_plans_says_so_and_repeats(text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "LADDER", LADDER[:2])
    settings = [f"corpus.sources={text_folder}", "tokenizer.vocab_size=400", "training.num_samples=1"]
    run = train(load_recipe(None, [*settings, "training.minutes=0.03"]), tmp_path / "run")
    log = {event["event"]: event for event in run.read_log()}
    planned = log["planned"]
    written = load_recipe(run.recipe)
    assert written.model.hidden_size == planned["hidden_size"] in (32, 48)
    assert written.training.max_seq_length == planned["max_seq_length"]
    tokenizer = json.loads((run.model / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == planned["max_seq_length"]
    assert planned["seconds"] < 1.8
    train_tokens = log["tokenized"]["train_tokens"]  # the validation text has no part in it
    # the last step of a pass has fewer tokens than the others
    assert planned["passes"] == pytest.approx(planned["tokens"] / train_tokens, abs=0.02)
    assert log["trained"]["seconds"] > 0
    # by steps, the resolved recipe gives the same model again
    steps = log["trained"]["steps"]
    first, second = (
        train(load_recipe(run.recipe, [f"training.steps={steps}"]), tmp_path / name) for name in "ab"
    )
    assert load_recipe(first.recipe).model == written.model
    assert (first.model / "model.safetensors").read_bytes() == (
        second.model / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("stated", [None, 1])
def test_threads_are_as_stated_and_given_back(text_folder, tmp_path, stated, monkeypatch):
    monkeypatch.setattr(plan, "LADDER", LADDER[:1])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        settings = [
            f"corpus.sources={text_folder}",
            "tokenizer.vocab_size=400",
            "training.minutes=0.01",
            "training.num_samples=0",
            f"training.num_threads={'null' if stated is None else stated}",
        ]
        run = train(load_recipe(None, settings), tmp_path / "run")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert load_recipe(run.recipe).training.num_threads == stated, "a measured number binds no other run"
    taken = [event["threads"] for event in run.read_log() if event["event"] == "threads"]
    assert taken
    assert set(taken) <= ({1, 2} if stated is None else {stated})


@pytest.mark.parametrize("decoder", NETWORKS)
def test_learned_positions_bound_the_context_of_evaluation(decoder, monkeypatch):
    recipe = Recipe()
    recipe.model.decoder, recipe.model.position_type, recipe.training.max_seq_length = decoder, "learned", 16
    settings = settle(recipe)
    assert settings.evaluation.context_length == 16
    recipe.evaluation.context_length = 17
    with pytest.raises(UserError, match=r"context_length = 17: the model learns 16 positions"):
        settle(recipe)
    model = GenLMForCausalLM(settings.architecture)
    monkeypatch.setattr(
        evaluate, "load", lambda name: (model, SimpleNamespace(bos_token_id=0, eos_token_id=0))
    )
    assert evaluate.load_subject("x", 16).context == 16
    with pytest.raises(UserError, match="has learned 16 positions"):
        evaluate.load_subject("x", 17)
