"""Promise: one call goes from text to a measured model, the same way every time."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from support.models import NETWORKS, build_model
from support.runs import losses, small_recipe
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerControl,
    TrainingArguments,
)

from hf_genlm.api import generate
from hf_genlm.config.recipe import Recipe, TrainingRecipe, load_recipe
from hf_genlm.config.settings import Facts, Pace
from hf_genlm.config.settle import decay_for, settle
from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.training import budget as budget_module
from hf_genlm.training.budget import Budget, trapezoid
from hf_genlm.training.callbacks import ValidationCallback
from hf_genlm.training.optimizer import OptimizerFactory
from hf_genlm.training.train import train
from hf_genlm.training.trainer import BudgetTrainer


@pytest.mark.parametrize("decoder", NETWORKS)
def test_every_decoder_trains_and_is_measured(decoder, text_folder, tmp_path):
    heard = []
    recipe = small_recipe(text_folder, f"model.decoder={decoder}", "training.num_samples=2")
    run = train(recipe, tmp_path / "run", lambda event, fields: heard.append(event))
    curve = losses(run)
    assert len(curve) == 30
    assert sum(curve[-5:]) / 5 < min(curve[0], math.log(400) - 1.0)
    values = {m.name: m for m in read_measurements(run.evaluation)}
    assert set(values) == {
        "nats_per_token", "perplexity", "bits_per_byte", "word_perplexity",
        "top1_accuracy", "top5_accuracy", "calibration_error",
    }  # fmt: skip
    assert all(m.interval[0] <= m.value <= m.interval[1] for m in values.values())
    assert {m.split for m in values.values()} == {"validation"}
    corpus = json.loads(run.corpus.read_text())
    assert values["bits_per_byte"].n == corpus["validation"]["bytes"]
    assert values["nats_per_token"].n == corpus["validation"]["tokens"]
    for part in ("recipe", "environment", "corpus", "log_file", "evaluation", "samples"):
        assert getattr(run, part).is_file(), part
    for event in (
        "started",
        "corpus",
        "tokenized",
        "model",
        "step",
        "validation",
        "sample",
        "trained",
        "evaluated",
    ):
        assert event in heard
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert type(model) is GenLMForCausalLM
    assert model.config.use_cache
    assert load_recipe(run.recipe).model.decoder == decoder
    ids = AutoTokenizer.from_pretrained(run.model)("import", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


def test_accumulation_gives_the_same_losses(text_folder, tmp_path):
    curves = {}
    for batch, accumulation in ((8, 1), (4, 2)):
        recipe = small_recipe(
            text_folder,
            "training.steps=20",
            f"training.batch_size={batch}",
            f"training.gradient_accumulation_steps={accumulation}",
        )
        curves[accumulation] = losses(train(recipe, tmp_path / str(accumulation)))
    assert len(curves[1]) == 20
    assert max(abs(a - b) for a, b in zip(curves[1], curves[2], strict=True)) < 1e-5


def test_the_same_recipe_gives_the_same_weights_and_another_seed_does_not(text_folder, tmp_path):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = train(small_recipe(text_folder, "training.steps=5", f"training.seed={seed}"), tmp_path / name)
        weights.append((run.model / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_a_resolved_recipe_repeats_its_run(text_folder, tmp_path):
    first = train(small_recipe(text_folder, "training.steps=5"), tmp_path / "a")
    again = train(load_recipe(first.recipe), tmp_path / "b")
    assert (first.model / "model.safetensors").read_bytes() == (
        again.model / "model.safetensors"
    ).read_bytes()
    assert first.recipe.read_text() == again.recipe.read_text()


def test_a_tokenizer_of_ones_own_is_used(text_folder, tmp_path):
    """One of GPT-2's kind, which names no beginning of text."""
    first = train(small_recipe(text_folder, "training.steps=2"), tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(first.tokenizer)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = train(
        small_recipe(text_folder, "training.steps=2", f"tokenizer.path={tmp_path / 'tokenizer'}"),
        tmp_path / "b",
    )
    assert read_measurements(again.evaluation) == read_measurements(first.evaluation)


def test_samples_and_validations_do_not_change_training(text_folder, tmp_path):
    recipe = small_recipe(text_folder, "training.steps=8", "model.dropout=0.1", "training.num_samples=2")
    with_them = train(recipe, tmp_path / "a")
    recipe.training.num_validations = 0
    recipe.training.num_samples = 1
    assert losses(train(recipe, tmp_path / "b")) == losses(with_them)


def test_minutes_end_the_run_with_the_rate_at_zero(text_folder, tmp_path, monkeypatch):
    """By a clock of our own, which a busy machine does not move."""
    now = itertools.count(0.0, 0.01)
    monkeypatch.setattr(budget_module.time, "monotonic", lambda: next(now))
    settings = ["training.minutes=0.05", "training.max_epochs=1000", "training.warmup_steps=0"]
    recipe = small_recipe(text_folder, *settings)
    recipe.training.steps = None
    run = train(recipe, tmp_path / "run")
    steps = [event for event in run.read_log() if event["event"] == "step"]
    (trained,) = [event for event in run.read_log() if event["event"] == "trained"]
    assert trained["seconds"] == pytest.approx(3.0, abs=0.5)
    assert trained["steps"] == steps[-1]["step"]
    peak = settle(recipe).training.learning_rate
    assert steps[-1]["learning_rate"] < 0.2 * max(step["learning_rate"] for step in steps) <= peak


def test_a_small_text_ends_a_run_by_the_clock_and_that_is_told(text_folder, tmp_path):
    recipe = small_recipe(text_folder, "training.minutes=5", "training.max_epochs=0.2")
    recipe.training.steps = None
    events = train(recipe, tmp_path / "run").read_log()
    (note,) = [event["message"] for event in events if "ends early" in event.get("message", "")]
    assert note.endswith("is read 0.2 times at most (training.max_epochs)")
    (trained,) = [event for event in events if event["event"] == "trained"]
    assert trained["seconds"] < 60
    rates = [event["learning_rate"] for event in events if event["event"] == "step"]
    assert rates[-1] < 0.3 * max(rates), "the rate falls to the end of the text, not to that of the time"


def test_budget_by_the_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(budget_module.time, "monotonic", lambda: now[0])
    budget = Budget(seconds=10.0)
    assert budget.progress(5) == pytest.approx(0.0, abs=1e-6)
    budget.start()
    now[0] += 4.0
    budget.note_step()
    assert budget.progress(1) == pytest.approx(0.4)
    assert budget.left_s(1) == pytest.approx(6.0)
    assert not budget.is_spent(1)
    now[0] += 4.2
    budget.note_step()  # another step of 4.2 s from 8.2 s would end at 12.4 s: more than half of it too late
    assert budget.is_spent(2)


def test_budget_by_tokens_rounds_up_to_whole_steps():
    rows = {"max_seq_length": 31, "batch_size": 10}
    assert settle(Recipe(training=TrainingRecipe(tokens=1000, **rows))).length.max_steps == 4
    with pytest.raises(UserError, match="--minutes and --steps"):
        settle(Recipe(training=TrainingRecipe(minutes=1, steps=3)))


def test_planning_counts_as_training_time():
    recipe = Recipe(training=TrainingRecipe(minutes=1))
    length = settle(recipe, Facts(step_s=0.1, planning_s=20.0)).length
    assert length.seconds == 40.0
    assert length.expected_steps == 400
    assert settle(recipe, Facts(step_s=0.1, planning_s=80.0)).length.seconds == 0.1, "at least a step"


def test_validation_counts_as_training_time():
    now = [0.0]
    budget = Budget(seconds=100.0, clock=lambda: now[0])
    budget.start()

    def validate(model, step):
        now[0] += 30.0

    callback = ValidationCallback(budget, 1, validate)
    now[0] = 51.0
    callback.on_step_end(None, type("State", (), {"global_step": 5}), TrainerControl())
    assert budget.elapsed_s == pytest.approx(81.0)
    assert budget.progress(5) == pytest.approx(0.81)


def test_trapezoid():
    assert [trapezoid(p, 0.1, 0.5) for p in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0)] == [
        0.0,
        0.5,
        1.0,
        1.0,
        0.5,
        0.0,
    ]
    assert trapezoid(0.0, 0.0, 0.0) == trapezoid(1.0, 0.0, 0.0) == 1.0
    # the longer of both ways up, and never above the way down
    ways = [
        (0.5, 0.0, 0.5, 10, 40),
        (0.05, 0.2, 0.5, 10, 20),
        (0.9, 0.1, 0.5, 90, 40),
        (0.9, 0.0, 0.5, 9, 40),
    ]
    assert [trapezoid(*way) for way in ways] == pytest.approx([0.25, 0.25, 0.2, 0.2])


def test_pace_counts_the_short_step_at_the_end_of_an_epoch():
    pace = Pace(n_rows=10, rows_per_step=4, targets_per_row=3)
    assert [pace.tokens(step) for step in (0, 1, 2, 3, 4)] == [0, 12, 24, 30, 42]
    padded = dataclasses.replace(pace, n_targets=28)  # of the last row, one token is predicted
    assert [padded.tokens(step) for step in (0, 1, 2, 3, 4)] == [0, 12, 24, 28, 40]


@pytest.mark.parametrize("n_rows", [None, 1, 2, 3, 4, 5, 11])
@pytest.mark.parametrize("n_missing", [0, 2])
def test_the_steps_of_a_budget_are_the_fewest_that_train_its_tokens(n_rows, n_missing):
    pace = Pace(n_rows, 4, 3, None if n_rows is None else 3 * n_rows - n_missing)
    for tokens in range(1, 100):
        steps = pace.steps(tokens)
        assert pace.tokens(steps - 1) < tokens <= pace.tokens(steps)


@pytest.mark.parametrize("n_targets", [(40,), (254,), (2540,), (2032,), (100, 130, 3), (10**7,)])
@pytest.mark.parametrize("carries_state", [False, True])
def test_a_budget_counts_the_rows_that_a_small_text_has(n_targets, carries_state):
    """16 rows of 127 a step, where a text has as many."""
    facts = Facts(train_tokens=sum(n_targets), train_targets=n_targets)
    stated = {"max_seq_length": 128, "batch_size": 16, "carry_state": carries_state}
    length = settle(Recipe(training=TrainingRecipe(tokens=400_000, **stated)), facts).length
    assert length.pace.tokens(length.max_steps - 1) < 400_000 <= length.pace.tokens(length.max_steps)
    n_rows = sum(math.ceil(n / 127) for n in n_targets)
    epoch = max(1, n_rows // 16) if carries_state else math.ceil(n_rows / 16)
    assert length.max_steps == math.ceil(400_000 / (16 * 127)) or n_rows < 500
    length = settle(Recipe(training=TrainingRecipe(minutes=1, **stated)), facts).length
    assert (length.max_steps, length.epochs) == (8 * epoch, 8.0)


@pytest.mark.parametrize("end", ["tokens=3000", "max_epochs=9"])
def test_tokens_of_a_small_text_are_those_that_were_trained(end, tmp_path, monkeypatch):
    """A few rows, where a step has room for sixteen."""
    trained = []

    def count_labels(self, model, inputs, *args, **kwargs):
        trained.append(int((inputs["labels"][:, 1:] != -100).sum()))
        return compute_loss(self, model, inputs, *args, **kwargs)

    compute_loss = BudgetTrainer.compute_loss
    monkeypatch.setattr(BudgetTrainer, "compute_loss", count_labels)
    path = tmp_path / "poem.txt"
    path.write_text("".join(f"line {i} of the poem, {i * i}\n" for i in range(40)), encoding="utf-8")
    ends = ["training.steps=null", "training.minutes=1"] if "epochs" in end else ["training.steps=null"]
    rows = ["training.max_seq_length=64", "training.batch_size=16", "tokenizer.vocab_size=null"]
    run = train(small_recipe(path, *ends, f"training.{end}", *rows), tmp_path / "run")
    (done,) = [event for event in run.read_log() if event["event"] == "trained"]
    assert (done["tokens"], done["steps"], done["epochs"]) == (sum(trained), len(trained), len(trained))
    assert trained[0] < 16 * 63 / 2
    if "tokens" in end:
        assert 3000 <= sum(trained) < 3000 + trained[0]
    else:
        assert len(trained) == 9


# Felicia Hemans, 1826
POEM = """\
The boy stood on the burning deck
Whence all but he had fled;
The flame that lit the battle's wreck
Shone round him o'er the dead.

Yet beautiful and bright he stood,
As born to rule the storm;
A creature of heroic blood,
A proud, though childlike form.

The flames rolled on; he would not go
Without his father's word;
That father, faint in death below,
His voice no longer heard.

He called aloud, "Say, father, say,
If yet my task is done!"
He knew not that the chieftain lay
Unconscious of his son.

"Speak, father!" once again he cried,
"If I may yet be gone!"
And but the booming shots replied,
And fast the flames rolled on.

Upon his brow he felt their breath,
And in his waving hair,
And looked from that lone post of death
In still yet brave despair;

And shouted but once more aloud,
"My father! must I stay?"
While o'er him fast, through sail and shroud,
The wreathing fires made way.

They wrapt the ship in splendour wild,
They caught the flag on high,
And streamed above the gallant child,
Like banners in the sky.
"""


@pytest.mark.slow
def test_a_poem_is_memorised(tmp_path):
    """By a run of which no more is stated than its tokens, and continued from its start."""
    (tmp_path / "poem.txt").write_text(POEM, encoding="utf-8")
    recipe = load_recipe(None, [f"corpus.sources={tmp_path / 'poem.txt'}", "training.tokens=40000"])
    run = train(recipe, tmp_path / "run")
    n_bytes = json.loads(run.corpus.read_text())["train"]["bytes"]
    assert n_bytes > 0.9 * len(POEM)
    assert generate(str(run.path), max_new_tokens=600, temperature=0)[:n_bytes] == POEM[:n_bytes]


def test_validations_come_once_each_and_never_at_the_end():
    seen, budget = [], Budget(steps=100)
    callback = ValidationCallback(budget, 4, lambda model, step: seen.append(step))
    for step in range(1, 101):
        state = type("State", (), {"global_step": step})
        callback.on_step_end(None, state, TrainerControl())
    assert seen == [20, 40, 60, 80]


def test_a_validation_that_there_is_no_time_for_is_skipped():
    now = [0.0]
    budget = Budget(seconds=100.0, clock=lambda: now[0])
    budget.start()
    seen = []

    def validate(model, step):
        seen.append(step)
        now[0] += 7.0

    callback = ValidationCallback(budget, 4, validate)
    for step in range(1, 80):
        now[0] += 1.0
        callback.on_step_end(None, type("State", (), {"global_step": step}), TrainerControl())
    # at 20 s; at 40 s with 60 s left, less than ten times the 7 s of the first: not done, nor later
    assert seen == [20]


@pytest.mark.parametrize(("size", "millions"), [("tiny", None), ("2M", 2), ("30M", 30), ("120M", 120)])
def test_sizes_are_what_they_say(size, millions):
    recipe = Recipe()
    recipe.model.size = size
    model = settle(recipe).model
    if millions is not None:
        assert 12 * model.hidden_size**2 * model.num_hidden_layers == pytest.approx(millions * 1e6, rel=0.35)


def test_plain_trainer_fine_tunes_a_saved_model(text_folder, tmp_path):
    """What the README shows: nothing of ours but the import that registers the model."""
    run = train(small_recipe(text_folder, "training.steps=10", "model.decoder=lstm"), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(run.model)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = ["The quick brown fox jumps over the lazy dog.", "A short one."] * 8
    dataset = [tokenizer(text + tokenizer.eos_token) for text in texts]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "tuned"), max_steps=30, per_device_train_batch_size=4,
            learning_rate=1e-2, gradient_accumulation_steps=2, logging_steps=1, report_to="none",
            disable_tqdm=True, save_steps=30,
        ),
        train_dataset=dataset,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert curve[-1] < curve[0] / 2
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned" / "checkpoint-30")
    prompt = tokenizer("The quick brown", return_tensors="pt")
    text = tokenizer.decode(
        tuned.generate(**prompt, max_new_tokens=30, do_sample=False)[0], skip_special_tokens=True
    )
    assert text == texts[0]


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["model.decoder=lstmm"], "did you mean 'lstm'"),
        (["model.mixers=lstm,full_atention"], "did you mean 'full_attention'"),
        (["model.decoder=transformer", "model.num_attention_heads=5"], "multiple of num_attention_heads"),
        (["training.optimizer=adam"], "did you mean 'adamw'"),
        (["training.max_seq_length=100000000"], "max_seq_length"),
        (["tokenizer.vocab_size=30000"], "vocab"),
        (["model.size=tinny"], "did you mean 'tiny'"),
        (["training.dtype=float15"], "dtype"),
    ],
)
def test_recipes_that_cannot_work_leave_no_folder(assignments, words, text_folder, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        train(small_recipe(text_folder, *assignments), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_left_alone(text_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("mine")
    with pytest.raises(UserError, match="already holds a run"):
        train(small_recipe(text_folder), tmp_path / "run")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "mine"


def test_recipe_fields_cover_each_other():
    """Every field of the model section is a field of the config, so that none is silently ignored."""
    from hf_genlm.model import GenLMConfig

    names = {*Recipe().model.model_fields} - {
        "decoder",
        "mixers",
        "size",
        "init_from",
        "ngram_entries",
    }
    assert names <= {field.name for field in dataclasses.fields(GenLMConfig)}


def test_the_loss_of_training_is_that_of_the_plain_path(text_folder, tmp_path, monkeypatch):
    """Without logits, which are never made, and with every term."""
    terms = (
        "training.z_loss=0.001",
        "training.label_smoothing_factor=0.1",
        "model.final_logit_softcapping=20",
        "model.ngram_order=0",
    )
    recipe = small_recipe(text_folder, "training.steps=6", "training.num_validations=0", *terms)
    without = losses(train(recipe, tmp_path / "a"))
    monkeypatch.setattr(
        BudgetTrainer,
        "compute_loss",
        lambda self, model, inputs, num_items_in_batch=None, **_: (
            model(**inputs, num_items_in_batch=num_items_in_batch, z_loss=1e-3, label_smoothing=0.1).loss
        ),
    )
    assert losses(train(recipe, tmp_path / "b")) == pytest.approx(without, abs=1e-5)
    recipe.training.label_smoothing_factor = recipe.training.z_loss = 0.0
    monkeypatch.undo()
    assert losses(train(recipe, tmp_path / "c"))[0] != pytest.approx(without[0], abs=1e-3)


@pytest.mark.parametrize(
    "economy",
    [
        ["model.embedding_size=8", "model.output_bias=true"],
        ["model.shared_layers=2", "model.mlp_rank=8"],
        ["model.decoder=transformer", "model.num_key_value_heads=1"],
    ],
)
def test_smaller_models_train(economy, text_folder, tmp_path):
    run = train(small_recipe(text_folder, *economy), tmp_path / "run")
    curve = losses(run)
    assert sum(curve[-5:]) / 5 < min(curve[0], math.log(400) - 1.0)
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert load_recipe(run.recipe).model.shared_layers == model.config.shared_layers


@pytest.mark.parametrize(
    "setting", ["training.label_smoothing_factor=1", "training.z_loss=-1", "model.shared_layers=3"]
)
def test_terms_outside_their_range_are_refused(setting, text_folder, tmp_path):
    with pytest.raises(UserError, match=setting.split("=")[0].split(".")[1]):
        train(small_recipe(text_folder, setting), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_biases_and_norms_do_not_decay_and_matrices_do(optimizer):
    model = build_model("bigram", tie_word_embeddings=False)
    recipe = TrainingRecipe(optimizer=optimizer, learning_rate=1e-3, embedding_lr_ratio=3.0, weight_decay=0.5)
    groups = OptimizerFactory()(model, recipe).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (decays[id(parameter)] > 0) == (parameter.ndim >= 2), name


def test_each_role_has_its_rate_and_its_decay():
    model = build_model("bigram", tie_word_embeddings=False)
    recipe = TrainingRecipe(
        learning_rate=1e-3,
        embedding_lr_ratio=3.0,
        weight_decay=0.5,
        embedding_decay_ratio=2.0,
        bigram_decay_ratio=4.0,
    )
    optimizer = OptimizerFactory()(model, recipe)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert rates.keys() == {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        is_pairs = name == "model.embed_bigrams.weight"
        is_table = name in ("model.embed_tokens.weight", "lm_head.weight") or is_pairs
        decay = 0.0 if parameter.ndim < 2 else 2.0 if is_pairs else 1.0 if is_table else 0.5
        assert rates[id(parameter)] == pytest.approx(3e-3 if is_table else 1e-3), name
        assert decays[id(parameter)] == decay, name


def test_decay_comes_in_with_the_passes():
    """After four of them, AdamW forgets a weight within 0.63 of a pass."""
    assert decay_for(1.0, epoch_steps=400, learning_rate=4e-3) == 0.1
    by_passes = [decay_for(passes, 400, 4e-3) for passes in (0.5, 1.5, 2.0, 3.0, 4.0, 8.0)]
    assert by_passes == sorted(by_passes)
    assert by_passes[-2] == by_passes[-1] == pytest.approx(1 / (4e-3 * 0.63 * 400), rel=0.01)
    assert decay_for(8.0, 4000, 4e-3) == 0.1  # a long text is forgotten soon enough
    assert decay_for(8.0, 1, 4e-3) == 6.0


@pytest.mark.parametrize("stated", [[], ["training.weight_decay=0.2"]])
def test_a_run_of_many_passes_decays_more_unless_it_is_stated(stated, text_folder, tmp_path):
    large = ("training.max_seq_length=256", "training.batch_size=32")
    recipe = small_recipe(text_folder, "training.steps=1", *large, *stated)
    one = train(recipe, tmp_path / "one")
    tokens = next(event["train_tokens"] for event in one.read_log() if event["event"] == "tokenized")
    recipe.training.steps, recipe.training.tokens = None, 2 * tokens
    many = train(recipe, tmp_path / "many")
    once, often = [load_recipe(run.recipe).training.weight_decay for run in (one, many)]
    assert once == often == 0.2 if stated else once < often


def test_a_recipe_trains_compiled(text_folder, tmp_path):
    """The same steps as without, and nothing of the compiler in what is saved."""
    torch._dynamo.reset()  # after compilations of other shapes, these would be dynamic: three times the cost
    torch._dynamo.utils.counters.clear()
    short = ("training.steps=3", "model.num_hidden_layers=1")
    runs = [
        train(small_recipe(text_folder, *short, *more), tmp_path / f"run-{len(more)}")
        for more in ([], ["training.torch_compile_backend=aot_eager"])
    ]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    plain, compiled = [load_file(run.model / "model.safetensors") for run in runs]
    assert plain.keys() == compiled.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, atol=1e-4, rtol=1e-3)


def test_an_unknown_compiler_is_refused(text_folder, tmp_path):
    with pytest.raises(
        UserError, match=r"training\.torch_compile_backend 'inductr'; did you mean 'inductor'"
    ):
        train(small_recipe(text_folder, "training.torch_compile_backend=inductr"), tmp_path / "run")
