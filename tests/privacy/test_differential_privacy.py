"""Promise: what a private run says that it spent is what it spent, and nothing of the text gets around it."""

import dataclasses
import hashlib
import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
from support.models import build_model

from hf_genlm.cli.main import main
from hf_genlm.config.recipe import PrivacyRecipe, TrainingRecipe, load_recipe
from hf_genlm.config.settings import Facts
from hf_genlm.config.settle import settle, settle_reading
from hf_genlm.errors import Stopped, UserError
from hf_genlm.files import read_json
from hf_genlm.privacy.mechanism import (
    NOISES,
    Guarantee,
    choose_delta,
    compute_epsilon,
    draw_documents,
    find_noise_multiplier,
    plan_guarantee,
)
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.corpus import read_corpus, split_by_hash
from hf_genlm.text.encoding import TokenizedDocuments
from hf_genlm.text.packing import IGNORED, DocumentWindows, collate
from hf_genlm.text.store import Document, as_documents
from hf_genlm.training.check import check
from hf_genlm.training.private import (
    DrawnSteps,
    PrivateState,
    PrivateTrainer,
    begin_private,
    private_gradient,
    write_guarantee,
)
from hf_genlm.training.train import train

pytest.importorskip("opacus")

KEY = bytes(range(32))
SETTINGS = (
    "privacy.epsilon=8",
    "training.steps=6",
    "training.save_steps=2",
    "training.num_threads=1",
    "training.max_seq_length=16",
    "training.batch_size=4",
    "training.gradient_accumulation_steps=2",
    "training.num_samples=0",
    "training.num_validations=1",
    "model.hidden_size=16",
    "model.mixers=gated_linear,gru",
    "model.dropout=0.1",
    "corpus.cache=false",
)
PRIVACY = PrivacyRecipe(epsilon=3.0)


def guarantee(**changes) -> Guarantee:
    fields = {"epsilon": 1.0, "delta": 1e-4, "sampling_rate": 0.5, "noise_multiplier": 0.0, "clip_norm": 0.5,
              "batch_size": 4, "steps": 10, "is_noise_secure": False}  # fmt: skip
    return Guarantee(**{**fields, **changes})


def windows_of(lengths, max_seq_length: int = 6) -> DocumentWindows:
    """Documents of the ids 10, 11, 12, ..."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(10, 10 + offsets[-1], dtype=np.uint16)
    return DocumentWindows(
        TokenizedDocuments(ids, offsets, np.array(lengths)), max_seq_length, eos_id=1, pad_id=0
    )


# accounting


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [(1.0, 0.01, 1000, 1e-5), (0.7, 0.05, 300, 1e-4), (2.0, 0.2, 100, 1e-4), (20.0, 1.0, 100, 1e-5)],
)
def test_epsilon_is_that_of_another_library_by_another_method(noise, rate, steps, delta):
    """Privacy loss distributions of dp-accounting: pessimistic too, so that the two lie close."""
    dp_accounting = pytest.importorskip("dp_accounting")
    accountant = dp_accounting.pld.PLDAccountant()
    gaussian = dp_accounting.GaussianDpEvent(noise)
    step = dp_accounting.PoissonSampledDpEvent(rate, gaussian)
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    theirs = accountant.get_epsilon(delta)
    ours = compute_epsilon(noise, rate, steps, delta)
    print(f"{ours:.4f} {theirs:.4f} {ours / theirs - 1:+.3%}")
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(0.1, 0.01, 100), (3.0, 0.05, 300), (20.0, 0.2, 50), (8.0, 0.007, 6)]
)
def test_the_noise_is_the_least_that_keeps_to_epsilon(epsilon, rate, steps):
    noise = find_noise_multiplier(epsilon, 1e-4, rate, steps)
    assert 0.99 * epsilon <= compute_epsilon(noise, rate, steps, 1e-4) <= epsilon


def test_delta_is_below_one_over_n_and_documents_are_many():
    assert choose_delta(PRIVACY, 10_000) == pytest.approx(10_000**-1.1, rel=0.05)
    with pytest.raises(UserError, match=r"999, less than 1,000.*\.jsonl record"):
        choose_delta(PRIVACY, 999)
    with pytest.raises(UserError, match=r"--delta 0\.0001 would allow publishing one of the 10,000"):
        choose_delta(PrivacyRecipe(epsilon=3.0, delta=1e-4), 10_000)
    with pytest.raises(UserError, match=r"--delta 1e-13 is lost in rounding"):
        choose_delta(PrivacyRecipe(epsilon=3.0, delta=1e-13), 10_000)
    with pytest.raises(UserError, match=r"a step draws 2000 documents.*has 1500"):
        plan_guarantee(PRIVACY, 1500, 2000, 10)


def test_clip_norm_and_secure_noise_of_the_recipe_are_those_of_the_guarantee():
    for clip_norm, is_secure, generator in ((0.25, True, "SHAKE-256"), (2.0, False, "Philox")):
        privacy = PrivacyRecipe(epsilon=8.0, clip_norm=clip_norm, secure_noise=is_secure)
        planned = plan_guarantee(privacy, 2000, 8, 6)
        assert (planned.clip_norm, planned.is_noise_secure) == (clip_norm, is_secure)
        content = planned.to_json([])
        assert content["clip_norm"] == clip_norm
        assert content["noise"].startswith(generator)


# what is drawn


def test_each_document_is_drawn_by_itself_with_one_probability():
    drawn = np.zeros((400, 500), dtype=bool)
    for step in range(400):
        drawn[step, draw_documents(KEY, step, 500, 0.1)] = True
    sizes = drawn.sum(1)
    assert sizes.mean() == pytest.approx(50, abs=4 * math.sqrt(45 / 400))
    assert sizes.var() == pytest.approx(45, rel=0.3), "of a binomial: sizes are not fixed"
    assert drawn.mean(0).std() == pytest.approx(math.sqrt(0.09 / 400), rel=0.2)
    together = (drawn[:, :250] & drawn[:, 250:]).mean()
    assert together == pytest.approx(0.01, rel=0.1)
    assert (draw_documents(KEY, 3, 500, 0.1) == np.flatnonzero(drawn[3])).all()
    assert list(draw_documents(KEY, 0, 5, 1.0)) == [0, 1, 2, 3, 4]


def test_a_drawn_document_is_one_row_and_holds_no_other():
    windows = windows_of([2, 20, 0])
    found = windows.take(np.array([1, 0, 2]), np.array([3, 7, 7], dtype=np.uint64))
    assert found["input_ids"].tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 10, 11, 1, 0, 0],
        [14, 15, 16, 17, 18, 19],
    ]
    assert found["labels"][1].tolist() == [1, 10, 11, 1, IGNORED, IGNORED]
    assert (found["position_ids"] == np.arange(6)).all()
    seen = {
        tuple(windows.take(np.array([1]), np.array([place], dtype=np.uint64))["input_ids"][0])
        for place in range(100)
    }
    assert len(seen) == 17, "every place of 22 tokens at which 6 begin"
    assert {row[0] for row in seen} == {1, *range(12, 28)}
    assert (1, 12, 13, 14, 15, 16) in seen
    assert (27, 28, 29, 30, 31, 1) in seen


@pytest.mark.parametrize("is_secure", [False, True])
def test_noise_is_gaussian_and_follows_from_key_and_step(is_secure):
    from scipy import stats

    make = NOISES[is_secure]
    shapes, device = [(300, 100), (7,), (), (300, 100)], torch.device("cpu")
    noise = make(KEY, 5, shapes, device)
    assert [tuple(part.shape) for part in noise] == shapes
    assert len({float(part.flatten()[0]) for part in noise}) == 4
    for large in (noise[0], noise[3]):
        assert stats.kstest(large.flatten().numpy(), "norm").pvalue > 0.001
        assert stats.kstest(large.square().sum(1).numpy(), "chi2", args=(100,)).pvalue > 0.001
    for part, again in zip(noise, make(KEY, 5, shapes, device), strict=True):
        assert torch.equal(part, again)
    other_step, other_key = make(KEY, 6, shapes, device), make(KEY[::-1], 5, shapes, device)
    for i, other in ((0, noise[3]), (0, other_step[0]), (3, other_step[3]), (0, other_key[0])):
        assert abs(np.corrcoef(noise[i].flatten(), other.flatten())[0, 1]) < 0.03


# a step


def step_of(model, guarantee: Guarantee, rows_at_once: int, n_rows: int = 5, step: int = 0):
    tokens = torch.randint(2, 61, (n_rows, 8), generator=torch.Generator().manual_seed(3))
    labels = tokens.clone()
    labels[: n_rows // 2, 5:] = IGNORED
    inputs = {
        "input_ids": tokens,
        "position_ids": torch.arange(8).expand_as(tokens),
        "labels": labels,
    }
    state = PrivateState(guarantee, KEY)
    loss = private_gradient(model, inputs, state, step, TrainingRecipe(), rows_at_once)
    return loss, [parameter.grad.clone() for parameter in model.parameters()], inputs


def test_a_step_is_the_sum_of_clipped_gradients_over_the_expected_batch():
    model = build_model("hybrid")
    _, found, inputs = step_of(model, guarantee(), rows_at_once=2)
    expected = [torch.zeros_like(gradient) for gradient in found]
    norms = []
    for i in range(5):
        model.zero_grad()
        model(inputs["input_ids"][i : i + 1], labels=inputs["labels"][i : i + 1]).loss.backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
        for total, parameter in zip(expected, model.parameters(), strict=True):
            total += parameter.grad * min(1.0, 0.5 / norms[-1]) / 4
    assert max(norms) > 0.5, "something is cut down"
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_micro_batches_change_nothing():
    model, noisy = build_model("factorised", tie_word_embeddings=True), guarantee(noise_multiplier=2.0)
    loss, whole, _ = step_of(model, noisy, rows_at_once=5)
    again, parts, _ = step_of(model, noisy, rows_at_once=2)
    torch.testing.assert_close(loss, again)
    for mine, theirs in zip(whole, parts, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("is_secure", [False, True])
def test_a_step_without_documents_is_noise_on_every_parameter(is_secure):
    """Standard deviation sigma C / expected batch, by the generator that the guarantee names."""
    model = build_model("factorised", tie_word_embeddings=True)
    noisy = guarantee(noise_multiplier=3.0, clip_norm=0.5, batch_size=4, is_noise_secure=is_secure)
    loss, noise, _ = step_of(model, noisy, rows_at_once=2, n_rows=0, step=7)
    assert loss == 0
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    expected = NOISES[is_secure](KEY, 7, shapes, torch.device("cpu"))
    assert max(part.numel() for part in noise[1:]) > 1000
    for mine, standard in zip(noise, expected, strict=True):
        assert mine.count_nonzero() == mine.numel()
        torch.testing.assert_close(mine, standard * 3.0 * 0.5 / 4)


def test_one_document_more_moves_the_sum_by_the_clip_norm_at_most():
    model = build_model("lstm")
    state = PrivateState(guarantee(clip_norm=0.1, sampling_rate=1.0), KEY)
    sums = []
    for n_documents in (5, 6):
        steps = DrawnSteps(windows_of([9, 3, 7, 8, 4, 9][:n_documents], max_seq_length=8), state)
        private_gradient(model, steps[0], state, 0, TrainingRecipe(), 3)
        sums.append(torch.cat([parameter.grad.flatten() * 4 for parameter in model.parameters()]))
    assert (sums[1] - sums[0]).norm() == pytest.approx(0.1, rel=1e-3)


# a run


def recipe_of(text, *settings):
    recipe = load_recipe(None, (*SETTINGS, *settings))
    recipe.corpus.sources = [str(text)]
    return recipe


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": f"{i} times {i % 7} is {i * (i % 7)}."}) for i in range(1200)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from hf_genlm.text.tokenizer import train_tokenizer

    documents = [Document("what everyone may read, 0123456789 times. " * 20, "public")]
    path = tmp_path_factory.mktemp("tokenizer")
    recipe = load_recipe(None, ["tokenizer.vocab_size=270"]).tokenizer
    train_tokenizer(documents, recipe, 1000).save_pretrained(path)
    return f"tokenizer.path={path}"


@pytest.fixture
def fixed_key(monkeypatch):
    monkeypatch.setattr("hf_genlm.training.private.os.urandom", lambda n: bytes(range(n)))


def test_a_resumed_run_comes_to_the_same_weights_and_the_same_epsilon(
    text, tokenizer, tmp_path, fixed_key, monkeypatch
):
    whole = train(recipe_of(text, tokenizer), tmp_path / "whole")

    def stop(event, fields):
        if event == "checkpoint" and fields["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        train(recipe_of(text, tokenizer), tmp_path / "stopped", stop)
    monkeypatch.setattr("hf_genlm.training.private.os.urandom", lambda n: bytes(n))  # the key is the old one
    resumed = train(recipe_of(text, tokenizer), tmp_path / "stopped", resume=True)
    files = [(run.model / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert files[0] == files[1]
    said = read_json(whole.privacy)
    assert said == read_json(resumed.privacy)
    assert said["steps"] == 6
    assert said["sampling_rate"] == 8 / read_json(whole.corpus)["train"]["documents"]
    spent = compute_epsilon(said["noise_multiplier"], said["sampling_rate"], 6, said["delta"])
    assert said["epsilon"] == math.ceil(spent * 1e4) / 1e4
    assert 0.99 * 8 < spent <= 8
    seen = [event for event in whole.read_log() if event["event"] == "validation"]
    assert seen[0]["epsilon"] == round(
        compute_epsilon(said["noise_multiplier"], said["sampling_rate"], seen[0]["step"], said["delta"]), 4
    )
    assert not resumed.checkpoints.exists(), "the key went with them"
    assert KEY.hex() not in "".join(path.read_text("utf-8") for path in resumed.path.glob("*.json*"))


class Killed(Exception):
    """In place of the end of a process between two steps."""


@pytest.fixture(scope="module")
def killed(text, tokenizer, tmp_path_factory):
    """(folder of a run that was killed before its step of number 5, {step: hash of what it read})."""
    folder, seen = tmp_path_factory.mktemp("killed"), {}

    def recorded(model, inputs, private, step, *args):
        if step == 5:
            raise Killed
        seen[step] = hashlib.sha256(inputs["input_ids"].numpy().tobytes()).hexdigest()
        return private_gradient(model, inputs, private, step, *args)

    own = folder / "text.jsonl"
    shutil.copy(text, own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_genlm.training.private.private_gradient", recorded)
        with pytest.raises(Killed):
            train(recipe_of(own, tokenizer), folder / "run")
    assert list(seen) == [0, 1, 2, 3, 4], "each step has the noise of its own number"
    assert len(set(seen.values())) == 5
    return folder, seen


def copy_of(killed, tmp_path):
    """(the text, the run folder) of a copy, which may be changed."""
    shutil.copytree(killed[0], tmp_path / "copy")
    own, run = tmp_path / "copy" / "text.jsonl", RunFolder(tmp_path / "copy" / "run")
    recipe = run.recipe.read_text().replace(str(killed[0] / "text.jsonl"), str(own))
    run.recipe.write_text(recipe)
    return own, run


def test_steps_that_a_kill_undid_are_made_again_of_the_same_documents(killed, tmp_path, monkeypatch):
    """The kill came after step 5; the checkpoint is that of step 4."""
    _, run = copy_of(killed, tmp_path)
    again = {}

    def recorded(model, inputs, private, step, *args):
        again[step] = hashlib.sha256(inputs["input_ids"].numpy().tobytes()).hexdigest()
        return private_gradient(model, inputs, private, step, *args)

    monkeypatch.setattr("hf_genlm.training.private.private_gradient", recorded)
    train(load_recipe(run.recipe), run.path, resume=True)
    assert list(again) == [4, 5]
    assert again[4] == killed[1][4]
    assert read_json(run.privacy)["steps"] == 6


def swap_words(own, run):
    """As many documents, bytes and tokens as before; its hash is forged below."""
    own.write_text(own.read_text().replace("12 times", "21 times"))


def edit_recipe(field, value):
    def edit(own, run):
        section, _, key = field.partition(".")
        recipe = load_recipe(run.recipe)
        setattr(getattr(recipe, section), key, value)
        run.recipe.write_text(recipe.to_yaml())

    return edit


def add_a_token(own, run):
    path = run.tokenizer / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))


# change between kill and resumption -> how it is made
CHANGES = {
    "text": swap_words,
    "batch size": edit_recipe("training.batch_size", 2),
    "accumulation": edit_recipe("training.gradient_accumulation_steps", 4),
    "row length": edit_recipe("training.max_seq_length", 8),
    "clip norm": edit_recipe("privacy.clip_norm", 0.5),
    "loss": edit_recipe("training.label_smoothing_factor", 0.1),
    "learning rate": edit_recipe("training.learning_rate", 0.1),
    "tokenizer": add_a_token,
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_noise_is_used_again_for_other_data_or_settings(change, killed, tmp_path, monkeypatch):
    own, run = copy_of(killed, tmp_path)
    CHANGES[change](own, run)
    if change == "text":
        with pytest.raises(UserError, match="train text is not what this run began with"):
            train(load_recipe(run.recipe), run.path, resume=True)
        # as if corpus.json had been written for the new text
        monkeypatch.setattr("hf_genlm.training.corpus.check_same", lambda before, now: None)
    monkeypatch.setattr(
        "hf_genlm.training.private.private_gradient", lambda *args: pytest.fail("a step was made")
    )
    with pytest.raises(UserError, match="drawn for another text, tokenizer or recipe"):
        train(load_recipe(run.recipe), run.path, resume=True)


def test_what_decides_nothing_may_change(killed, tmp_path):
    _, run = copy_of(killed, tmp_path)
    recipe = load_recipe(run.recipe, ["training.save_steps=1", "training.logging_steps=2"])
    train(recipe, run.path, resume=True)
    assert read_json(run.privacy)["steps"] == 6


def test_each_run_has_a_key_of_its_own_whatever_its_seed(tmp_path):
    settings = settle(load_recipe(None, (*SETTINGS, "training.seed=7")))
    run = RunFolder.create(tmp_path / "run")
    first, second = (begin_private(run, settings, n_documents=2000) for _ in "ab")
    assert first.key != second.key
    assert first.guarantee == second.guarantee
    assert first.guarantee.sampling_rate == 8 / 2000


def test_more_steps_than_the_noise_is_for_are_refused(tmp_path):
    PrivateState(guarantee(steps=10), KEY).save(tmp_path)
    assert PrivateState.load(tmp_path, steps=10) == PrivateState(guarantee(steps=10), KEY)
    with pytest.raises(UserError, match="noise for 10 steps, and the run would make 11"):
        PrivateState.load(tmp_path, steps=11)
    with pytest.raises(UserError, match="no guarantee"):
        PrivateState.load(tmp_path / "nothing", steps=1)
    assert (tmp_path / "privacy_state.json").stat().st_mode & 0o077 == 0


def test_a_loss_that_is_no_number_ends_a_private_run(text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(PrivateTrainer, "training_step", lambda *args, **kwargs: torch.tensor(math.nan))
    with pytest.raises(UserError, match="does not go back"):
        train(recipe_of(text, tokenizer), tmp_path / "run")
    assert not RunFolder(tmp_path / "run").privacy.exists()


def test_a_run_by_the_clock_counts_its_steps_out_beforehand(text, tokenizer, tmp_path, capsys):
    """By the command line, with noise of the cryptographic generator."""
    settings = [*SETTINGS[2:], tokenizer, "training.num_validations=0", "privacy.secure_noise=true"]
    settings.append("privacy.clip_norm=0.3")
    words = ["train", str(text), "--minutes", "0.05", "--epsilon", "8", "--out", str(tmp_path / "run")]
    assert main([*words, *(word for setting in settings for word in ("--set", setting))]) == 0
    run = RunFolder(tmp_path / "run")
    (promised,) = [event for event in run.read_log() if event["event"] == "guarantee"]
    said = read_json(run.privacy)
    assert said["steps"] == promised["steps"]
    assert said["epsilon"] - 1e-4 < promised["epsilon"] <= said["epsilon"] <= 8
    assert (said["clip_norm"], said["noise"]) == (0.3, "SHAKE-256")
    line = f"privacy:  epsilon {said['epsilon']:g}, delta {said['delta']:g}, for one document"
    printed = capsys.readouterr()
    assert line in printed.out
    assert f"the run makes {promised['steps']:,} steps, however long they take" in printed.err
    assert "ends early" not in printed.err


@pytest.mark.parametrize("step_s", [0.002, 0.4])  # much less and much more than a step takes
def test_steps_counted_beforehand_decide_rate_and_end_whatever_the_clock_shows(
    step_s, text, tokenizer, tmp_path, fixed_key, monkeypatch
):
    """The time of a step depends on the documents that it draws: by the clock, the rate would reveal them."""
    monkeypatch.setattr("hf_genlm.training.plan.measure_private_step", lambda *args: step_s)
    monkeypatch.setattr("hf_genlm.training.plan.measure_step", lambda *args: (step_s, 1))
    common = ["training.logging_steps=1", "training.num_validations=0", "training.weight_decay=0.1"]
    settings = [tokenizer, *common, "training.steps=null", "training.minutes=0.02", "training.max_epochs=0.2"]
    by_clock = train(recipe_of(text, *settings), tmp_path / "clock")
    said = read_json(by_clock.privacy)
    (planned,) = [event for event in by_clock.read_log() if event["event"] == "guarantee"]
    assert said["steps"] == planned["steps"]
    assert said["steps"] == 31 if step_s == 0.002 else 1 <= said["steps"] <= 3
    by_steps = train(
        recipe_of(text, tokenizer, *common, f"training.steps={said['steps']}"), tmp_path / "steps"
    )
    rates = [
        [event["learning_rate"] for event in run.read_log() if event["event"] == "step"]
        for run in (by_clock, by_steps)
    ]
    assert rates[0] == rates[1]
    files = [(run.model / "model.safetensors").read_bytes() for run in (by_clock, by_steps)]
    assert files[0] == files[1]


def test_a_run_is_planned_by_the_number_of_its_documents_not_by_their_lengths():
    facts = Facts(train_tokens=10**9, private_documents=2000)
    assert facts.epoch_tokens(16) == 16 * 2000
    recipe = load_recipe(None, ["privacy.epsilon=3", "training.minutes=1", "training.max_seq_length=16"])
    steps = settle(recipe, facts).length.max_steps
    assert steps == math.ceil(recipe.training.max_epochs * 16 * 2000 / (16 * 15))


@pytest.mark.parametrize("n_beginnings", [1, 2])
def test_a_beginning_that_was_lost_is_not_covered(tmp_path, n_beginnings):
    run = RunFolder.create(tmp_path / "run")
    for _ in range(n_beginnings):
        run.log("guarantee", **dataclasses.asdict(guarantee(steps=10)))
    run.log("trained", steps=10, tokens=100, epochs=0.1, seconds=1.0, tokens_per_s=100)
    small = guarantee(noise_multiplier=50.0, sampling_rate=0.01)
    write_guarantee(run, PrivateState(small, KEY), settle(load_recipe(None, ["corpus.damaged=skip"])))
    said = read_json(run.privacy)
    assert said["epsilon"] - 1e-4 < small.spent(10) <= said["epsilon"], "rounded upwards"
    lost = [line for line in said["not_covered"] if "lost before its first checkpoint" in line]
    assert len(lost) == n_beginnings - 1
    assert any("which files were left out" in line for line in said["not_covered"])


def test_the_vocabulary_is_not_learned_from_the_private_text(text, tmp_path, monkeypatch):
    learned = []

    def train_tokenizer(documents, *args):
        learned.append(documents[0].source)
        raise UserError("enough")

    monkeypatch.setattr("hf_genlm.training.corpus.train_tokenizer", train_tokenizer)
    with pytest.raises(UserError, match="enough"):
        train(recipe_of(text), tmp_path / "run")
    assert learned[0].endswith((".py", ".rst", ".txt"))


@pytest.mark.parametrize(
    "setting",
    [
        "training.init=bigrams",
        "vectors.path=vectors.txt",
        "corpus.stream=true",
        "corpus.near_duplicates=0.8",
        "corpus.temperature=2",
        "training.carry_state=true",
        "training.torch_compile_backend=inductor",
        "training.milestone_words=1K",
    ],
)
def test_what_goes_around_the_guarantee_is_refused_by_name(setting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vectors.txt").write_text("word 1 2\nother 3 4\n")
    with pytest.raises(UserError, match=rf"--epsilon and {setting.partition('=')[0]}"):
        check(load_recipe(None, ("privacy.epsilon=3", setting)))


def test_one_document_more_moves_no_other_to_the_other_side_of_the_split(tmp_path):
    """One in the middle, longer than half of the text: by sizes and places it would move all others."""
    recipe = settle_reading(load_recipe(None, ["privacy.epsilon=3"]), Facts()).corpus
    lines = [json.dumps({"text": f"document {i}"}) for i in range(300)] * 2
    more = [*lines[:50], json.dumps({"text": "another one\n" * 1000}), *lines[50:]]
    sides = []
    for written in (lines, more):
        path = tmp_path / "text.jsonl"
        path.write_text("\n".join(written), encoding="utf-8")
        recipe.sources = [str(path)]
        corpus = read_corpus(recipe)
        assert corpus.report["duplicates_removed"] == 0, "copies are on one side"
        sides.append([[document.text for document in side] for side in (corpus.train, corpus.validation)])
    assert 15 <= len(sides[0][1]) <= 50
    added = [len(after) - len(before) for before, after in zip(*sides, strict=True)]
    assert sorted(added) == [0, 1]
    for before, after in zip(*sides, strict=True):
        assert [text for text in after if not text.startswith("another")] == before


def test_a_split_by_hash_that_leaves_a_side_empty_says_what_to_do():
    documents = as_documents([Document(f"document {i}", "x") for i in range(5)])
    with pytest.raises(UserError, match=r"of 5 documents.* 0 are: hold out a file of your own by --valid"):
        split_by_hash(documents, 1e-9, 0)


def test_the_default_recipe_of_a_private_run_passes_and_starts_at_random():
    check(load_recipe(None, ["privacy.epsilon=3"]))
    settings = settle(load_recipe(None, ["privacy.epsilon=3"]))
    assert (settings.training.init, settings.model.bigram_size) == ("random", 0)


def test_trainer_gets_batches_of_any_size(tokenizer):
    state = PrivateState(guarantee(sampling_rate=0.05, steps=200), KEY)
    steps = DrawnSteps(windows_of([5] * 20), state)
    sizes = [len(steps[i]["input_ids"]) for i in range(len(steps))]
    assert {0, 1, 2} <= set(sizes)
    assert collate(steps.windows.take(np.array([], dtype=int), np.array([]))).keys() == steps[0].keys()
