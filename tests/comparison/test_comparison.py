"""Promise: a comparison says what was equal and how sure it is, loses nothing to a kill, and outlives a run
that fails."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from scipy import stats
from support import killing

from hf_genlm.cli.main import main
from hf_genlm.comparison import compare
from hf_genlm.comparison.plan import Plan, make_plan
from hf_genlm.comparison.prepare import prepare
from hf_genlm.comparison.report import _describe_equality, write_comparison
from hf_genlm.comparison.results import (
    Estimate,
    difference_in_bits,
    holm,
    mean_bits,
    read_results,
    verdict,
)
from hf_genlm.comparison.runs import ComparisonFolder, ProcessCrash, run_in_process, train_run
from hf_genlm.config.recipe import Recipe, load_recipe
from hf_genlm.doctor import describe_model
from hf_genlm.errors import UserError
from hf_genlm.evaluation.aggregation import BLOCK_BYTES, BlockSums
from hf_genlm.evaluation.likelihood import make_windows
from hf_genlm.evaluation.measurement import read_measurements
from hf_genlm.files import read_json, write_json
from hf_genlm.run_folder import RunFolder
from hf_genlm.run_schemas import CorpusFile
from hf_genlm.training.train import train

pytestmark = pytest.mark.usefixtures("drawn")

SMALL = (
    "training.save_steps=1",
    "training.num_threads=1",
    "training.max_seq_length=16",
    "training.batch_size=4",
    "training.num_validations=2",
    "tokenizer.vocab_size=300",
    "model.hidden_size=32",
    "model.num_hidden_layers=1",
)
BITS = math.log(2)


def small_plan(decoders=("lstm", "transformer"), settings=SMALL, text=(), **kwargs) -> Plan:
    budget = {} if {"minutes", "tokens", "flops"} & kwargs.keys() else {"steps": 4}
    return make_plan(text, decoders=decoders, assignments=settings, **{**budget, **kwargs})


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    killing.write_text(path)
    return path


# --- what is compared


def test_candidates_are_the_product_of_decoders_and_sizes():
    plan = make_plan(["x.txt"], decoders=["lstm", "gru"], sizes=["tiny", "small"], seeds=2, tokens="1e6")
    assert list(plan.candidates) == ["lstm-tiny", "lstm-small", "gru-tiny", "gru-small"]
    for name, fields in plan.candidates.items():
        decoder, size = name.split("-")
        assert fields == {
            "corpus.sources": ["x.txt"],
            "model.decoder": decoder,
            "model.size": size,
            "training.tokens": 1_000_000,
            "training.num_samples": 0,
        }
    recipe = plan.recipe("gru-small", {"model.hidden_size": 64}, seed=1)
    assert (recipe.model.decoder, recipe.model.hidden_size, recipe.training.seed) == ("gru", 64, 1)


def test_seeds_are_interleaved_and_each_round_begins_with_another_candidate():
    names = [run.name for run in small_plan(("lstm", "gru", "elman")).runs()]
    rounds = (("lstm", "gru", "elman"), ("gru", "elman", "lstm"), ("elman", "lstm", "gru"))
    assert names == [f"{decoder}-seed{seed}" for seed, order in enumerate(rounds) for decoder in order]


def test_recipes_keep_what_they_say_but_for_what_ends_them(tmp_path):
    (tmp_path / "slow.yaml").write_text("training: {learning_rate: 1e-4, steps: 7, seed: 5}\n")
    (tmp_path / "fast.yaml").write_text("training: {learning_rate: 1e-2, num_samples: 1}\n")
    paths = [str(tmp_path / name) for name in ("slow.yaml", "fast.yaml")]
    plan = make_plan(recipes=paths, assignments=["model.dropout=0.1"], minutes="0.5")
    assert plan.candidates == {
        "slow": {"model.dropout": 0.1, "training.minutes": 0.5, "training.learning_rate": 1e-4,
                 "training.num_samples": 0},
        "fast": {"model.dropout": 0.1, "training.minutes": 0.5, "training.learning_rate": 1e-2,
                 "training.num_samples": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"decoders": []}, "nothing to compare: name the candidates"),
        ({"decoders": ["lstm"]}, "needs two candidates, and there is 1"),
        ({"decoders": ["lstm", "lstm"]}, "'lstm' is named twice"),
        ({"decoders": ["lstm", "../x"]}, "unknown model.decoder '../x'"),
        ({"decoders": [], "sizes": ["tiny", "../x"]}, "'../x' cannot name a folder"),
        ({"minutes": 1, "steps": 5}, "--minutes and --steps are budgets of a run"),
        ({"minutes": 0}, "training.minutes = 0"),
        ({"flops": "many"}, "--flops many: must be a number above 0"),
        ({"assignments": ["training.seed=3"]}, "training.seed is set by --seeds"),
        ({"assignments": ["model.decoder=gru"]}, "model.decoder is set by the candidates"),
        ({"assignments": ["model.mixers=gru"]}, "overrides --decoders"),
        ({"decoders": [], "sizes": ["tiny", "small"], "parameters": "3M"}, "--parameters chooses the width"),
        ({"parameters": "tiny"}, "write a count such as 300K"),
        ({"decoders": [], "recipes": ["a.yaml"], "sizes": ["tiny"]}, "leave --decoders and --sizes out"),
        ({"assignments": ["training.stepps=3"]}, "did you mean 'training.steps'"),
    ],
)
def test_what_cannot_be_compared_is_refused(stated, message):
    with pytest.raises(UserError) as refused:
        make_plan(**{"decoders": ["lstm", "gru"], **stated})
    assert message in str(refused.value)


@pytest.mark.parametrize("section", ["corpus: {split_seed: 3}", "tokenizer: {vocab_size: 500}"])
def test_recipes_of_several_texts_or_tokenizers_are_refused(section, tmp_path):
    (tmp_path / "a.yaml").write_text(section)
    (tmp_path / "b.yaml").write_text("")
    recipes = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    with pytest.raises(UserError, match="a and b differ in"):
        make_plan(recipes=recipes, steps=3)
    if section.startswith("tokenizer"):
        assert len(make_plan(recipes=recipes, steps=3, own_tokenizers=True).candidates) == 2


@pytest.mark.parametrize("text", ["[" * 100_000, "a: &x [1]\nb: *x\n", "{a: " * 50 + "1" + "}" * 50])
def test_a_plan_that_would_take_hours_to_parse_is_damaged(text, tmp_path):
    (tmp_path / "compare.yaml").write_text(text)
    with pytest.raises(UserError, match=r"compare\.yaml' is damaged: it holds an alias, or is nested"):
        Plan.read(tmp_path / "compare.yaml")


def test_a_plan_comes_back_from_its_file_and_names_what_differs(tmp_path):
    plan = small_plan(parameters=None)
    (tmp_path / "compare.yaml").write_text(plan.to_yaml())
    begun = Plan.read(tmp_path / "compare.yaml")
    assert begun == plan
    for other, said in (
        (small_plan(steps=5), "steps = 5.0 is not 4.0"),
        (small_plan(seeds=4), "seeds = 4 is not 3"),
        (small_plan(("lstm", "gru")), "candidates = 'lstm, gru' is not 'lstm, transformer'"),
        (small_plan(settings=(*SMALL, "model.dropout=0.5")), "lstm: model.dropout = 0.5 is not None"),
        (small_plan(minutes=4), "steps = None is not 4.0"),
    ):
        with pytest.raises(UserError, match="name another --out") as refused:
            other.check_same(begun, tmp_path)
        assert said in str(refused.value)


# --- what is equal


def test_equal_parameters_and_equal_flops(text, tmp_path):
    settings = ("tokenizer.vocab_size=300", "model.bigram_size=0")
    decoders = ("elman", "lstm", "gated_linear", "transformer", "hybrid")
    plan = small_plan(decoders, settings, [str(text)], flops=1e11, parameters="300K")
    settled = prepare(plan, tmp_path)
    assert list(settled) == list(decoders)
    counts = {name: found["parameters"] for name, found in settled.items()}
    assert max(abs(count - 300_000) for count in counts.values()) < 10_000, counts
    for name, found in settled.items():
        recipe = plan.recipe(name, {**found["fields"], "tokenizer.path": str(tmp_path / "tokenizer")})
        cost = describe_model(recipe)
        assert cost.n_trained == found["parameters"]
        assert (
            0 <= 1e11 - recipe.training.tokens * cost.training_flops_per_token < cost.training_flops_per_token
        )
    assert settled["lstm"]["hidden_size"] < settled["elman"]["hidden_size"]
    assert json.loads((tmp_path / "corpus.json").read_text())["validation"]["bytes"] > 0


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"parameters": "2K"}, "the nearest count of lstm"),
        ({"flops": 1e3}, "less than one step"),
        ({"decoders": ("lstm", "transfomer")}, "did you mean 'transformer'"),
    ],
)
def test_what_cannot_be_made_equal_is_refused(kwargs, said, text, tmp_path):
    settings = ("tokenizer.vocab_size=300",)
    with pytest.raises(UserError) as refused:
        prepare(small_plan(**{"settings": settings, "text": [str(text)], **kwargs}), tmp_path)
    assert said in str(refused.value)


def test_the_size_of_a_run_by_the_clock_is_planned_once_for_all_seeds(text, tmp_path):
    settings = ("tokenizer.vocab_size=300", "training.batch_size=4")
    settled = prepare(small_plan(("lstm", "hybrid"), settings, [str(text)], minutes=0.02), tmp_path)
    for found in settled.values():
        assert found["fields"]["training.batch_size"] == 4
        assert found["fields"]["model.hidden_size"] == found["hidden_size"] >= 32
    assert settled["hybrid"]["fields"]["model.num_hidden_layers"] >= 3


# --- how sure it is


def test_holm_by_hand():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5})
    assert found == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_between_seeds_alone_it_is_the_test_of_welch():
    draw = np.random.default_rng(0)
    bytes_C = np.array([100.0, 300.0])
    ours, others = draw.normal(2.0, 0.1, 3), draw.normal(2.2, 0.3, 4)
    found = difference_in_bits(np.outer(ours, bytes_C) * BITS, np.outer(others, bytes_C) * BITS, bytes_C)
    wanted = stats.ttest_ind(ours, others, equal_var=False)
    # each text has the same bits per byte for a seed: what is left of its variance is rounding
    assert found.value == pytest.approx(ours.mean() - others.mean())
    assert found.p_value == pytest.approx(wanted.pvalue, rel=1e-6)
    assert found.interval == pytest.approx(tuple(wanted.confidence_interval(0.95)), rel=1e-6)


def test_over_the_text_alone_it_is_the_paired_test():
    draw = np.random.default_rng(0)
    bytes_C = np.full(30, 50.0)
    ours, others = draw.normal(2.0, 0.3, (2, 1, 30))
    found = difference_in_bits(ours * 50 * BITS, others * 50 * BITS, bytes_C)
    wanted = stats.ttest_rel(ours[0], others[0])
    assert found.p_value == pytest.approx(wanted.pvalue)
    assert found.interval == pytest.approx(tuple(wanted.confidence_interval(0.95)))


def test_one_seed_of_several_is_taken_to_vary_as_the_others():
    bytes_C = np.array([100.0, 300.0])
    ours, others = np.array([2.0]), np.array([2.1, 2.2, 2.6])
    found = difference_in_bits(np.outer(ours, bytes_C) * BITS, np.outer(others, bytes_C) * BITS, bytes_C)
    assert found.p_value == pytest.approx(stats.ttest_ind(ours, others).pvalue, rel=1e-6)


def test_nothing_is_known_of_one_seed_and_one_piece():
    found = mean_bits(np.array([[100.0 * BITS]]), np.array([50.0]))
    assert (found.value, found.interval, found.p_value) == (pytest.approx(2.0), None, None)
    assert Estimate(0.0, 0.0, 1.0).p_value == 1.0


@pytest.mark.parametrize("n_texts", [400, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("seed_sd", "text_sd"), [(0.02, 0.02), (0.02, 0.2), (0.005, 0.3)])
def test_intervals_of_three_seeds_hold_the_truth(seed_sd, text_sd, n_texts):
    """Two candidates of 3 seeds on 40 pieces: piece, seed, and their interaction vary; the true difference is
    0.05."""
    draw = np.random.default_rng(1)
    pieces, seeds = 40, 3
    bytes_C = draw.integers(500, 3000, pieces).astype(float)
    held = 0
    for _ in range(n_texts):
        shared = draw.normal(0, 1.0, pieces)  # how hard each piece is, for both
        nats = []
        for mean in (2.0, 2.05):
            own = draw.normal(0, text_sd, pieces)
            each = draw.normal(0, seed_sd, (seeds, 1)) + draw.normal(0, text_sd / 3, (seeds, pieces))
            nats.append((mean + shared + own + each) * bytes_C * BITS)
        low, high = difference_in_bits(nats[1], nats[0], bytes_C).interval
        held += low <= 0.05 <= high
    error = math.sqrt(0.95 * 0.05 / n_texts)
    assert 0.95 - 3 * error <= held / n_texts <= 0.99 + 3 * error, held / n_texts


# --- pieces of text


def test_blocks_hold_each_token_once_and_the_same_whatever_the_windows():
    draw = np.random.default_rng(0)
    documents = [
        (np.zeros(n, dtype=np.int64), n_bytes) for n, n_bytes in ((900, 3 * BLOCK_BYTES), (0, 0), (5, 9))
    ]
    nats = [draw.random(len(ids)) for ids, _ in documents]
    tables = []
    for context, stride in ((64, 32), (1000, 500), (7, 3)):
        sums = BlockSums.from_documents(documents)
        windows = make_windows([len(ids) for ids, _ in documents], context, stride)
        for some in (windows[::2], windows[1::2]):
            scored = [nats[w.document][w.first : w.stop] for w in some]
            if some:
                sums.add(some, np.concatenate(scored))
        tables.append(sums.table)
    assert tables[0]["document"].tolist() == [0, 0, 0, 2]
    assert tables[0]["bytes"].tolist() == [BLOCK_BYTES] * 3 + [9]
    assert tables[0]["tokens"].tolist() == [300, 300, 300, 5]
    wanted = [*(nats[0][start : start + 300].sum() for start in (0, 300, 600)), nats[2].sum()]
    for table in tables:
        np.testing.assert_allclose(table["nats"], wanted, rtol=1e-12)


def test_a_file_of_blocks_comes_back_and_damage_is_named(tmp_path):
    sums = BlockSums.from_documents([(np.arange(10), 5000)])
    sums.save(tmp_path / "blocks.npy")
    assert BlockSums.load(tmp_path / "blocks.npy").table.tolist() == sums.table.tolist()
    (tmp_path / "blocks.npy").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is damaged"):
        BlockSums.load(tmp_path / "blocks.npy")


# --- a process of its own


def ends_by_kill(listener):
    os.kill(os.getpid(), signal.SIGKILL)


def divides(listener):
    listener("note", {"message": "about to"})
    return 1 / 0


def refuses(word, listener):
    raise UserError(f"{word} cannot be used")


def test_what_ends_a_process_is_told(tmp_path):
    heard = []

    def run(function, *arguments):
        def listener(event, fields):
            heard.append((event, fields))

        return run_in_process(function, *arguments, listener=listener, messages=tmp_path / "messages.txt")

    with pytest.raises(ProcessCrash, match="ended by SIGKILL, as the system does when memory is short"):
        run(ends_by_kill)
    with pytest.raises(ProcessCrash, match="ZeroDivisionError: division by zero") as crashed:
        run(divides)
    assert "in divides" in crashed.value.details
    assert heard == [("note", {"message": "about to"})]
    with pytest.raises(UserError, match="lstm cannot be used"):
        run(refuses, "lstm")


# --- comparisons


def words_of(text: Path, out: Path, *more: str) -> list[str]:
    settings = [word for setting in SMALL for word in ("--set", setting)]
    return ["compare", str(text), "--out", str(out), *settings, *more]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def in_the_middle(out: Path) -> Path | None:
    """The folder of a run that has begun and is not finished."""
    done = json.loads((out / "finished.json").read_text()) if (out / "finished.json").is_file() else {}
    for folder in (out / "runs").glob("*"):
        if done and folder.name not in done and (folder / "checkpoints" / "checkpoint-3").is_dir():
            return folder
    return None


def wait_for_the_middle(command: subprocess.Popen, out: Path) -> Path:
    while not (half := in_the_middle(out)):
        assert command.poll() is None, command.stderr.read()
        time.sleep(0.005)
    return half


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_comparison_that_was_ended_goes_on(number, text, tmp_path, capsys):
    out = tmp_path / "out"
    words = words_of(text, out, "--decoders", "lstm,transformer", "--seeds", "2", "--steps", "10")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    command = subprocess.Popen(
        [sys.executable, "-m", "hf_genlm", *words], stderr=subprocess.PIPE, env=environment
    )
    half = wait_for_the_middle(command, out)
    command.send_signal(number)
    said = command.communicate(timeout=60)[1].decode()
    assert command.returncode == (-9 if number == signal.SIGKILL else 0)
    if number == signal.SIGTERM:
        assert said.endswith(f"stopped; the same command goes on in {out}\n")
    done = {name: contents(out / "runs" / name) for name in json.loads((out / "finished.json").read_text())}
    assert 1 <= len(done) < 4
    assert half.name not in done
    assert main(words) == 0
    for name, was in done.items():
        assert contents(out / "runs" / name) == was, "what is finished is not touched"
    assert "resumed" in [event["event"] for event in RunFolder(half).read_log()]
    undisturbed = train(load_recipe(half / "recipe.yaml"), tmp_path / "undisturbed")
    for name in ("model/model.safetensors", "evaluation_blocks.npy"):
        assert (half / name).read_bytes() == (undisturbed.path / name).read_bytes()
    check_report(out, capsys.readouterr().out)
    before = contents(out)
    assert main(words) == 0, "nothing is left to do"
    after = contents(out)
    for name in ("comparison.json", "report.html", "report.md", "plots/scores.png", "log.jsonl"):
        assert after[name][0] == before[name][0]
    with pytest.raises(UserError, match="seeds = 3 is not 2"):
        compare(str(text), out=out, decoders=["lstm", "transformer"], seeds=3, steps=10, assignments=SMALL)
    (half / "model" / "model.safetensors").write_bytes(b"other")
    assert main(words) == 2
    assert "finished.json', one of them was changed" in capsys.readouterr().err


def check_report(out: Path, printed: str):
    """The numbers are those of the runs, and the verdict is theirs."""
    results = json.loads((out / "comparison.json").read_text())
    assert printed.splitlines()[0] == results["verdict"]
    assert {c["name"] for c in results["candidates"]} == {"lstm", "transformer"}
    for candidate in results["candidates"]:
        assert [run["seed"] for run in candidate["runs"]] == [0, 1]
        for run in candidate["runs"]:
            measured = read_measurements(out / "runs" / run["name"] / "evaluation.json")
            values = {m.name: m.value for m in measured}
            assert run["bits_per_byte"] == pytest.approx(values["bits_per_byte"], rel=1e-9)
            assert run["nats_per_token"] == pytest.approx(values["nats_per_token"], rel=1e-9)
            assert run["steps"] == 10
        mean = np.mean([run["bits_per_byte"] for run in candidate["runs"]])
        assert candidate["bits_per_byte"]["value"] == pytest.approx(mean)
    best, other = results["candidates"]
    assert best["bits_per_byte"]["value"] <= other["bits_per_byte"]["value"]
    assert results["verdict"].startswith(f"{best['name']} ")
    page = (out / "report.html").read_text()
    markdown = (out / "report.md").read_text()
    for words in ("10 optimizer steps", f"{best['parameters'] / 1000:.3g}k", "Satterthwaite", "2 of 2"):
        assert words in page
        assert words in markdown
    assert page.count("data:image/png;base64,") == 2
    tokenizers = {(out / "runs" / name / "tokenizer" / "tokenizer.json").read_bytes() for name in
                  ("lstm-seed0", "transformer-seed1")}  # fmt: skip
    assert tokenizers == {(out / "tokenizer" / "tokenizer.json").read_bytes()}


CANDIDATES = {"first": 2.0, "second": 2.02, "third": 2.04}  # bits per byte, before chance


@pytest.fixture
def three_candidates(tmp_path) -> tuple[Path, Plan, dict[str, np.ndarray]]:
    """A finished comparison of three candidates: its folder and plan, bits (seeds, documents) of each."""
    draw, plan = np.random.default_rng(7), Plan({name: {} for name in CANDIDATES}, "steps", 10.0)
    folder = ComparisonFolder.open_or_create(tmp_path / "out", plan)
    prepared = {"parameters": 1000, "training_flops_per_token": 6000.0, "hidden_size": 8, "layers": 2}
    write_json(folder.prepared, {name: {"text": ".", "fields": {}, **prepared} for name in CANDIDATES})
    by_document = draw.normal(0, 0.5, 25)
    bits = {}
    for name, mean in CANDIDATES.items():
        bits[name] = mean + by_document + draw.normal(0, 0.008, (3, 1)) + draw.normal(0, 0.03, (3, 25))
    for run in plan.runs():
        path = folder.run(run)
        path.model.mkdir(parents=True)
        sums = BlockSums.from_documents([(np.zeros(200), 1000)] * 25)
        sums.table["nats"] = bits[run.candidate][run.seed] * 1000 * BITS
        sums.save(path.blocks)
        path.recipe.write_text(Recipe().to_yaml())
        write_json(path.model / "config.json", {"vocab_size": 300})
        text = {"documents": 25, "bytes": 25_000, "sha256": "ab" * 32}
        split = {"method": "documents", "seed": 0, "fraction": 0.5}
        report = {"description": "made", "files": [], "split": split, "train": text, "validation": text}
        write_json(path.corpus, report, CorpusFile)
        packages = dict.fromkeys(("hf_genlm", "torch", "transformers"), "1.0")
        machine = {"device": "cpu", "cpu_count": 2, "platform": "x", "python": "3"}
        write_json(path.environment, {**machine, "packages": packages})
        facts = {"steps": 10, "tokens": 640, "epochs": 1.5, "seconds": 6.0, "tokens_per_s": 100 + run.seed}
        path.log("step", step=1, tokens=64, elapsed_s=0.5, loss=3.0)
        path.log("step", step=10, tokens=640, elapsed_s=6.0, loss=2.0)
        path.log("trained", **facts)
    return folder, plan, bits


def test_three_candidates_are_compared_in_pairs_and_adjusted_by_holm(three_candidates):
    """All numbers by another way: one difference is significant only before the adjustment."""
    folder, plan, bits = three_candidates
    results = read_results(folder, plan, {})
    assert [c.name for c in results.candidates] == ["first", "second", "third"]
    for candidate in results.candidates:
        own = bits[candidate.name]
        assert [run.name for run in candidate.runs] == [f"{candidate.name}-seed{seed}" for seed in range(3)]
        assert [run.bits_per_byte for run in candidate.runs] == pytest.approx(own.mean(axis=1))
        assert candidate.mean.value == pytest.approx(own.mean())
        assert candidate.average("tokens_per_s") == 101
        assert candidate.training_flops == 6000 * 640
    raw = {}
    for one, other in (("first", "second"), ("first", "third"), ("second", "third")):
        parts = [(bits[name].mean(axis=1).var(ddof=1) / 3, 2) for name in (one, other)]
        paired = bits[other].mean(axis=0) - bits[one].mean(axis=0)  # by document
        parts.append((paired.var(ddof=1) / 25, 24))
        total = sum(part for part, _ in parts)
        degrees = total**2 / sum(part**2 / n for part, n in parts)
        raw[one, other] = 2 * stats.t.sf(abs(paired.mean()) / math.sqrt(total), degrees)
    assert sorted(raw, key=raw.get) == [("first", "third"), ("first", "second"), ("second", "third")]
    assert raw["first", "second"] < 0.05 < 2 * raw["first", "second"] < raw["second", "third"]
    adjusted = {"second": 2 * raw["first", "second"], "third": 3 * raw["first", "third"]}
    found = {d.name: d for d in results.differences}
    assert list(found) == ["second", "third"]
    for name in found:
        assert found[name].estimate.p_value == pytest.approx(raw["first", name])
        assert found[name].p_value == pytest.approx(adjusted[name])
    assert [found[name].is_significant for name in ("second", "third")] == [False, True]
    assert read_json(folder.results)["worse_than_best"][1]["p_value_holm"] == found["third"].p_value


def test_the_report_of_three_candidates_has_their_numbers(three_candidates):
    folder, plan, bits = three_candidates
    results = read_results(folder, plan, {})
    second, third = results.differences
    assert not second.is_significant
    assert verdict(results) == (
        f"first has the lowest mean: {bits['first'].mean():.3f} bits per byte [{{:.3f}}, {{:.3f}}]; ".format(
            *results.best.mean.interval
        )
        + f"third is {third.estimate.value:.3f} "
        + "[{:.3f}, {:.3f}] worse, ".format(*third.estimate.interval)
        + f"p = {third.p_value:.2g}; "
        + f"not significantly different from it: second (+{second.estimate.value:.3f} "
        + "[{:.3f}, {:.3f}], ".format(*second.estimate.interval)
        + f"p = {second.p_value:.2g})."
    )
    _, markdown = write_comparison(folder, plan, results)
    tables: dict[str, list[list[str]]] = {}
    for line in markdown.read_text().splitlines():
        if line.startswith("|"):
            cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
            tables.setdefault(cells[0], []).append(cells[1:])
    for candidate in results.candidates:
        scores, *_ = tables[candidate.name]
        assert scores[0] == f"{candidate.mean.value:.3f}"
        assert scores[-2:] == [f"{candidate.nats_per_token:.3f}", "3 of 3"]
        quantities = tables[candidate.name][-1]
        assert quantities[:6] == ["2 x 8", "1k", "640", "1.50", "101", "3.84M"]
    assert [row[-1] for row in (tables["second"][1], tables["third"][1])] == ["not significant", "worse"]
    assert tables["third"][1][0] == f"{third.estimate.value:+.3f}"


def test_a_run_that_fails_is_named_and_the_others_go_on(text, tmp_path, capsys):
    (tmp_path / "good.yaml").write_text("training: {learning_rate: 1e-3}")
    (tmp_path / "bad.yaml").write_text("training: {learning_rate: 1e30, max_grad_norm: 1e30}")
    recipes = f"{tmp_path / 'bad.yaml'},{tmp_path / 'good.yaml'}"
    words = words_of(text, tmp_path / "out", "--recipes", recipes, "--steps", "6", "--seeds", "1")
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "failed        bad-seed0: " in captured.err
    assert captured.out.startswith("good is the only one that finished")
    results = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [c["name"] for c in results["candidates"]] == ["good"]
    assert "finite" in results["failed"]["bad-seed0"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 of 2 runs failed" in page
    assert "finite" in page


def test_a_refused_comparison_leaves_nothing(text, tmp_path, capsys):
    words = words_of(text, tmp_path / "out", "--decoders", "lstm,transfomer", "--steps", "3")
    assert main(words) == 2
    assert "did you mean 'transformer'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    assert main(words_of(text, tmp_path / "full", "--decoders", "lstm,gru", "--steps", "3")) == 2
    assert "already holds files" in capsys.readouterr().err


def test_by_the_clock_a_half_run_begins_again_and_a_trained_one_is_only_measured(text, tmp_path):
    recipe = load_recipe(None, [*SMALL, "training.minutes=0.02", "training.num_samples=0"])
    recipe.corpus.sources = [str(text)]
    path = tmp_path / "run"
    path.mkdir()
    (path / "recipe.yaml").write_text(yaml.safe_dump({"training": {"minutes": 5}}))
    (path / "log.jsonl").write_text('{"event": "of before"}\n')
    train_run(recipe, path, True, lambda event, fields: None)
    events = [event["event"] for event in RunFolder(path).read_log()]
    assert "of before" not in events
    assert events.count("trained") == 1
    weights = (path / "model" / "model.safetensors").read_bytes()
    measured = (path / "evaluation_blocks.npy").read_bytes()
    (path / "evaluation.json").unlink()
    train_run(recipe, path, True, lambda event, fields: None)
    assert (path / "model" / "model.safetensors").read_bytes() == weights
    assert (path / "evaluation_blocks.npy").read_bytes() == measured
    assert [event["event"] for event in RunFolder(path).read_log()].count("trained") == 1


def records(path: Path) -> Path:
    path.write_text("".join(f'{{"text": "The {n} houses had {n + 1} doors."}}\n' for n in range(200)))
    return path


def test_a_comparison_over_a_stream_and_a_file_of_it_that_was_edited(tmp_path, capsys):
    source, out = records(tmp_path / "text.jsonl"), tmp_path / "out"
    words = words_of(source, out, "--decoders", "gru,transformer", "--steps", "3", "--seeds", "1")
    words += ["--set", "corpus.stream=true"]
    assert main(words) == 0
    results = json.loads((out / "comparison.json").read_text())
    assert [run["steps"] for c in results["candidates"] for run in c["runs"]] == [3, 3]
    tokenizers = {file.read_bytes() for file in out.glob("**/tokenizer/tokenizer.json")}
    assert len(tokenizers) == 1
    assert "unknown" not in (out / "report.md").read_text().split("## How to repeat it")[1]
    shutil.rmtree(out / "runs" / "gru-seed0")
    source.write_text(source.read_text().replace("The 150 houses", "The 150 horses"))
    assert main(words) == 2
    assert "the train text has changed since this comparison began (changed: " in capsys.readouterr().err
    assert not (out / "runs" / "gru-seed0").exists()


def test_a_comparison_of_recipes_with_a_tokenizer_each(tmp_path, capsys):
    source, out = records(tmp_path / "text.jsonl"), tmp_path / "out"
    for size in (270, 300):
        (tmp_path / f"of{size}.yaml").write_text(f"tokenizer: {{vocab_size: {size}}}")
    recipes = f"{tmp_path / 'of270.yaml'},{tmp_path / 'of300.yaml'}"
    settings = [word for setting in SMALL if "vocab_size" not in setting for word in ("--set", setting)]
    words = ["compare", str(source), "--recipes", recipes, "--own-tokenizers", "--steps", "3", *settings]
    assert main([*words, "--seeds", "1", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("of")
    for size in (270, 300):
        files = [out / where / "tokenizer" / "tokenizer.json" for where in
                 (f"tokenizers/of{size}", f"runs/of{size}-seed0")]  # fmt: skip
        assert files[0].read_bytes() == files[1].read_bytes()
        assert len(json.loads(files[0].read_text())["model"]["vocab"]) == size
    assert "a tokenizer for each" in (out / "report.md").read_text()


def test_a_comparison_that_starts_from_word_vectors(tmp_path):
    source, out = records(tmp_path / "text.jsonl"), tmp_path / "out"
    (tmp_path / "vectors.txt").write_text("The 0.1 0.2 0.3\nhouses 1 0 1\ndoors 0 1 1\nhad 1 1 0\n")
    words = words_of(source, out, "--decoders", "gru,transformer", "--steps", "3", "--seeds", "1")
    assert main([*words, "--set", f"vectors.path={tmp_path / 'vectors.txt'}"]) == 0
    for name in ("gru-seed0", "transformer-seed0"):
        assert json.loads((out / "runs" / name / "vectors.json").read_text())
        assert json.loads((out / "runs" / name / "model" / "config.json").read_text())["embedding_size"] == 3


def test_contexts_that_differ_are_not_called_equal():
    class Candidate(SimpleNamespace):
        def average(self, name):
            return 100.0

    plan = SimpleNamespace(
        until="steps", amount=4, parameters=None, one_tokenizer=True, has_time_budget=False
    )
    said = {}
    for name, contexts in {"one": (64, 64), "two": (64, 128), "all": (64, None)}.items():
        candidates = [Candidate(parameters=9, training_flops=1e9, context=context) for context in contexts]
        said[name] = _describe_equality(SimpleNamespace(candidates=candidates, vocab_size=300), plan)
    assert (
        "Equal within 1 %: parameters, tokens seen, epochs, tokens/s, training FLOPs, minutes, context."
        in said["one"]
    )
    assert "Not equal: context (64 to 128)." in said["two"]
    assert "Not equal: context (64 to all before)." in said["all"]
