"""Promise: what a person sees first is readable: no noise, tables with heads, files and the next steps."""

import inspect
import io
import json
import logging
import re
import sys
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import typer

import hf_genlm
from hf_genlm import api
from hf_genlm.card.front_matter import language_name, languages_of
from hf_genlm.card.wording import language_table
from hf_genlm.cli.display import Display, print_measurements
from hf_genlm.cli.main import app, main
from hf_genlm.config.recipe import load_recipe
from hf_genlm.errors import UserError, install_command, quiet_libraries
from hf_genlm.evaluation.measurement import Measurement, figures, tabulate
from hf_genlm.report.document import code, prose
from hf_genlm.run_folder import RunFolder, describe_step
from hf_genlm.run_schemas import LanguageCounts, LanguageSplitCounts

PATHS = dict(typer.main.get_command(app).commands)
STEP = {"step": 40, "loss": 5.3451, "tokens_per_s": 3252, "left_s": 11.0, "progress": 0.2}


def measured(name: str, value: float = 1.36824, stderr: float | None = 0.07211, **more) -> Measurement:
    interval = None if stderr is None else (value - 2 * stderr, value + 2 * stderr)
    fields = {"unit": "bits/byte", "n": 589617, "split": "validation", "higher_is_better": False}
    return Measurement(name, value, stderr=stderr, interval=interval, **{**fields, **more})


# ---- noise of libraries


def test_what_libraries_say_is_hidden_and_comes_back():
    from transformers.utils import logging as of_transformers

    of_transformers.enable_progress_bar()
    of_transformers.set_verbosity_warning()
    loggers = [logging.getLogger(name) for name in ("torchao.x", "torch.utils._pytree", "transformers.x")]
    before = [logger.getEffectiveLevel() for logger in loggers]
    with quiet_libraries():
        assert [logger.getEffectiveLevel() for logger in loggers] == [logging.ERROR] * 3
        assert not of_transformers.is_progress_bar_enabled()
        logging.getLogger("of a person").warning("shown")
    assert [logger.getEffectiveLevel() for logger in loggers] == before
    assert of_transformers.is_progress_bar_enabled()
    of_transformers.set_verbosity_info()
    with quiet_libraries():
        assert loggers[2].getEffectiveLevel() == logging.INFO, "what a person asks for is shown"
    of_transformers.set_verbosity_warning()


def test_a_python_user_sees_no_reminder_of_the_length(trained, capfd):
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_warning()
    hf_genlm.generate(trained.path, "import", max_new_tokens=80, seed=0)  # the context is 32
    assert capfd.readouterr() == ("", "")


# ---- hints


def test_hints_name_libraries_that_any_folder_and_index_can_install():
    from importlib.metadata import metadata

    for extra in metadata("hf_genlm").get_all("Provides-Extra"):
        words = install_command(extra)
        assert words.startswith("pip install ")
        assert words.endswith(f"  # the extra [{extra}]")
        assert "genlm" not in words.partition("#")[0]
        assert "'.[" not in words
    assert install_command("zstd") == "pip install 'zstandard>=0.23'  # the extra [zstd]"


def test_a_card_loads_without_this_package_first(trained):
    text = (trained.model / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition("## Load it")[2].partition("```python")
    assert "pip install torch transformers" in before
    assert "hf_genlm" not in rest.partition("```")[0]


# ---- tables


@pytest.mark.parametrize(
    ("number", "stderr", "shown"),
    [
        (1.36824, 0.07211, "1.368"), (4175881.92, 2429784.7, "4,200,000"), (221.9025, 26.6021, "222"),
        (0.72461, None, "0.7246"), (11.5285, None, "11.53"), (0.0, 0.0, "0"),
        (1e-9, None, "1e-09"), (1.5e40, 1e39, "1.5e+40"),
        (-0.00004, 0.1, "0.00"), (None, None, "unknown"), (float("nan"), 1.0, "unknown"),
        (589617.0, None, "589,600"),
        (3.2, float("inf"), "3.200"),
    ],
)  # fmt: skip
def test_numbers_have_the_digits_that_their_error_gives_them(number, stderr, shown):
    assert figures(number, stderr) == shown


def test_results_have_a_head_and_a_row_for_each_language_and_milestone(capsys):
    of_languages = [
        measured(f"{name}/{language}", value)
        for name, value in (("nats_per_token", 3.1), ("bits_per_byte", 1.5))
        for language in ("fra", "swh")
    ]
    others = [measured("bits_per_byte"), measured("nats_per_token/2x_yarn", 4.0, None)]
    later = [
        measured("bits_per_byte@chck_1M", 2.0),
        measured("accuracy/a@chck_1M"),
        measured("bits_per_byte@chck_2M"),
    ]
    (head, rows), languages, milestones = tabulate([*others, *of_languages, *later])
    assert head == ["measurement", "value", "std. error", "95 % interval", "unit", "n", "split"]
    assert [row[0] for row in rows] == ["bits_per_byte", "nats_per_token/2x_yarn"]
    assert rows[0][1:] == ["1.368", "± 0.072", "[1.224, 1.512]", "bits/byte", "589,617", "validation"]
    assert languages == (
        ["language", "nats_per_token", "bits_per_byte"],
        [["fra", "3.100 ± 0.072", "1.500 ± 0.072"], ["swh", "3.100 ± 0.072", "1.500 ± 0.072"]],
    )
    assert milestones == (
        ["milestone", "bits_per_byte"], [["chck_1M", "2.000 ± 0.072"], ["chck_2M", "1.368 ± 0.072"]],
    )  # fmt: skip
    print_measurements([replace(m, stderr=None, interval=None) for m in [*others, *of_languages]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["measurement", "value", "unit", "n", "split"], (
        "no empty column, no empty line"
    )
    assert [line.split()[0] for line in lines[4:]] == ["language", "fra", "swh"]
    assert tabulate([]) == []


# ---- progress


def test_progress_names_the_step_of_the_steps():
    assert describe_step({**STEP, "steps": 1200}).startswith("step 40 of 1,200  loss 5.345  3,252 tokens/s")
    assert describe_step({**STEP, "steps": None}).startswith("step 40 of about 200  ")
    assert describe_step({**STEP, "progress": 0.0}).startswith("step 40  ")


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", None])
def test_a_file_holds_lines_and_no_frames_of_a_bar(variable, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    with Display() as display:
        display.show("loading")
        display.hear("step", {**STEP, "steps": 200})
    assert "step 40 of 200" in file.getvalue()
    assert not re.search("[\r\u2501\x1b]", file.getvalue())


def test_the_share_of_held_out_text_in_training_stands_below_its_split(capfd):
    split = {"documents": 2, "bytes": 90}
    event = {"description": "a file", "train": split, "validation": split, "held_out_in_training": 0.012}
    with Display() as display:
        display.hear("corpus", event)
        display.hear("corpus", {**event, "held_out_in_training": None})
        display.hear("corpus", {**event, "held_out_in_training": 0.112})  # a note says so with its remedy
    lines = [line.strip() for line in capfd.readouterr().err.splitlines()]
    below = lines.index("1.2 % of it stands in the training text too")
    assert lines[below - 1].startswith("validation")
    assert "stands in" not in " ".join(lines[below + 1 :])


def test_a_script_writes_lines_into_a_file(monkeypatch, capfd):
    with api._progress_bar(True, None) as hear:
        for done in range(3):
            hear("progress", {"task": "encoding", "done": done, "total": 3})
        hear("step", {**STEP, "steps": 200})
        hear("step", {**STEP, "steps": 200, "step": 41})
    assert capfd.readouterr().err.splitlines() == [
        "encoding",
        f"training: {describe_step({**STEP, 'steps': 200})}",
    ]


def test_the_end_of_a_run_names_its_files_and_the_next_verbs(trained, monkeypatch, capsys):
    monkeypatch.setattr(api, "run_training", lambda *args, **more: api.Run(trained.path))
    assert main(["train", "x.txt", "--out", str(trained.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, path in {
        "curves": "plots/curves.png",
        "samples": "samples.md",
        "card": "model/README.md",
    }.items():
        assert f"{name + ':':<9} {trained.path / path}" in lines
    verbs = [line.split()[1] for line in lines if line.startswith("hf-genlm ")]
    assert verbs == ["generate", "evaluate", "push"]
    assert main(["train", "x.txt", "--out", str(trained.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == str(trained.samples)
    assert {m["name"] for m in found["measurements"]} >= {"bits_per_byte"}


# ---- cards


def test_languages_have_their_shortest_codes_and_plain_names(tmp_path):
    recipe = load_recipe(None, ["card.language=fra,swh,swa,ell,pt-BR,code,fre"])
    assert languages_of(recipe) == ["fr", "swh", "sw", "el", "pt", "code"]
    assert [language_name(each) for each in ("ell", "swa", "fre", "code", "qqq")] == [
        "Modern Greek", "Swahili", "French", "source code", None,
    ]  # fmt: skip
    counts = LanguageCounts(LanguageSplitCounts(1, 2), LanguageSplitCounts(1, 2), 1.0)
    rows = language_table({"fra": counts, "mine": counts}, [], language_name)
    assert [row[0] for row in rows] == ["language", "French (fra)", "mine"]


@pytest.mark.parametrize(
    "text", ["0.0085 at its peak", "0.1", "-0.5", "1.368", "3.11 of Python", "+5", "7", "007)x"]
)
def test_a_number_is_written_as_it_is(text):
    assert prose(text) == text


def test_what_begins_a_list_or_a_heading_is_escaped_without_its_digits():
    assert prose("3. model") == "3&#46; model"
    assert prose("12)") == "12&#41;"
    assert prose("- a") == "&#45; a"
    assert prose("===") == "&#61;&#61;&#61;"
    assert code("0. Once, (upon") == "<code>0. Once, (upon</code>"


# ---- one word, one meaning


def test_an_option_takes_the_same_kind_of_value_in_every_verb():
    """A path here and a list of numbers there cannot have one name, nor can an option be called as a verb."""
    kinds = defaultdict(set)
    for command in PATHS.values():
        for parameter in command.params:
            for name in parameter.opts:
                if name.startswith("--"):
                    kinds[name].add((parameter.metavar or "").strip())
    assert {name.removeprefix("--") for name in kinds}.isdisjoint(PATHS)
    specialised = {"--out": {"DIR", "FILE"}, "--vocab-size": {"N", "+N"}}
    specialised["--set"] = {"SECTION.KEY=VALUE", "card.KEY=VALUE"}
    assert {name: found for name, found in kinds.items() if len(found) > 1} == specialised


def test_results_are_printed_as_json_and_what_is_drawn_has_a_seed():
    def verbs_with(option: str) -> set[str]:
        return {verb for verb, command in PATHS.items() if any(option in p.opts for p in command.params)}

    talking, naming_a_path = {"chat", "serve", "space"}, {"plot", "card"}
    assert verbs_with("--json") == PATHS.keys() - talking - naming_a_path
    assert verbs_with("--seed") | verbs_with("--seeds") == {
        "train", "evaluate", "audit", "generate", "compare", "range",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["generate", "MODEL", "import", "--max-new-tokens", "3", "--seed", "1"], {"prompt", "text"}),
        (["tokenizer", "TEXT", "--vocab-size", "300", "--out", "NEW"], {"tokenizer", "vocab_size", "bytes"}),
        (["push", "MODEL", "me/mine", "--dry-run", "--keep-card"], {"repo_id", "commit", "manifests"}),
        (["doctor", "MODEL"], {"n_parameters", "parts"}),
    ],
)
def test_json_of_a_verb_is_json_alone(words, keys, trained, text_folder, tmp_path, capsys):
    places = {"MODEL": trained.path, "TEXT": text_folder, "NEW": tmp_path / "new"}
    assert main([*(str(places.get(word, word)) for word in words), "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() >= keys


def test_doctor_describes_a_model_without_a_flag(capsys):
    assert main(["doctor", "--decoder", "lstm", "--size", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mixer_types"][0] == "lstm"


# ---- milestones


def test_milestones_of_a_run_are_found_in_order(trained, tmp_path):
    with pytest.raises(UserError, match=r"no milestones: .*training\.milestone_words"):
        hf_genlm.evaluate(trained.path, milestones=True, progress=False)
    run = RunFolder(tmp_path / "run")
    for name in ("chck_1M", "chck_20", "chck_500K", ".chck_7.part", "chck_x"):
        (run.milestones / name).mkdir(parents=True)
    assert [path.name for path in run.list_milestones()] == ["chck_20", "chck_500K", "chck_1M"]


def test_evaluate_measures_each_milestone(trained, text_folder, tmp_path, monkeypatch, capsys):
    before = trained.evaluation.read_bytes()
    monkeypatch.setattr(RunFolder, "list_milestones", lambda run: [trained.model])
    file = str(sorted(text_folder.iterdir())[0])
    assert main(["evaluate", str(trained.path), file, "--milestones"]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    (head, row) = tables[-1].splitlines()
    assert head.split()[:2] == ["milestone", "nats_per_token"]
    assert row.split()[0] == "model"
    assert trained.evaluation.read_bytes() == before


# ---- intervals


def test_few_cases_have_no_interval_and_others_stay_on_their_scale():
    from hf_genlm.comparison.results import Estimate
    from hf_genlm.evaluation.aggregation import WindowSums, aggregate
    from hf_genlm.privacy.statistics import auc, mean_interval

    assert mean_interval(np.array([3.0, 50.2]), 33.2)[2] is None
    low, high = mean_interval(np.array([0.0, 0.0, 0.0, 9.0, 9.0]), 9.0)[2]
    assert low == 0.0 < high == 9.0
    assert auc(np.array([1.0, 3.0]), np.array([2.0, 0.0]))[2] is None
    assert Estimate(0.7, 0.1, 1.0, minimum=0.0).interval[0] == 0.0
    for n, is_known in ((4, False), (5, True)):
        column = np.arange(1.0, n + 1)
        sums = WindowSums(column * 10, column * 25, column, column, np.zeros((n, 15)))
        sizes = {"tokens": sums.tokens, "bytes": sums.tokens * 3}
        found = aggregate(sums, np.zeros(n, int), {k: np.array([v.sum()]) for k, v in sizes.items()}, "x")
        assert {m.interval is not None for m in found} == {is_known}
        assert all(m.stderr is not None for m in found)


def test_intervals_of_exposure_end_where_exposure_ends():
    from hf_genlm.privacy.exposure import CanaryLosses, measure_exposure
    from hf_genlm.text.canaries import BITS

    draw = np.random.default_rng(0)
    others = draw.normal(50.0, 2.0, (6, 63))
    own = np.array([50.0, 52.0, 49.0, 20.0, 21.0, 51.0])
    canaries = tuple(SimpleNamespace(repetitions=4, is_planted=True) for _ in own)
    found = {m.name: m for m in measure_exposure(CanaryLosses(canaries, own, others))}
    assert 0.0 <= found["exposure/4"].interval[0] < found["exposure/4"].interval[1] <= 6.0
    assert found["exposure_extrapolated/4"].interval[0] >= 0.0
    assert found["exposure_extrapolated/4"].interval[1] <= BITS
    few = measure_exposure(CanaryLosses(canaries[:3], own[:3], others[:3]))
    assert {m.interval for m in few} == {None}


def test_milestones_that_were_not_reached_are_told(tmp_path):
    from hf_genlm.training.budget import Budget
    from hf_genlm.training.callbacks import MilestoneCallback, Pace, WordRate

    for last, is_told in ((10, True), (4, False)):  # a run that a signal stopped goes on later
        run, budget = RunFolder.create(tmp_path / str(last)), Budget(steps=10)
        budget.start()
        callback = MilestoneCallback(
            run, budget, Pace(None, 2, 5), WordRate(1, 1), [20, 200, 10**6], lambda *a: None
        )
        state = SimpleNamespace(global_step=0)
        callback.on_train_begin(None, state, None)
        for state.global_step in range(1, last + 1):
            callback.on_step_end(None, state, SimpleNamespace(), model=None)
        callback.on_train_end(None, state, None)
        told = [event["message"] for event in run.read_log() if event["event"] == "note"]
        assert bool(told) == is_told
        if is_told:
            assert "chck_200, chck_1M" in told[0]
            assert "100 words" in told[0]
            assert "--steps" in told[0]


def test_signatures_name_what_the_options_name():
    assert "trained_on" in inspect.signature(hf_genlm.audit).parameters
    assert "recall_pairs" in inspect.signature(hf_genlm.measure_range).parameters
