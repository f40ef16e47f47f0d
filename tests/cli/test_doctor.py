"""Promise: what a model will cost is said before it is trained, and is what the real one then costs."""

import dataclasses
import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from support.command_line import last_line
from support.models import NETWORKS, STACKS, VOCAB, build_model, build_ngram
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from hf_genlm import doctor
from hf_genlm.card.wording import parts_of
from hf_genlm.cli.display import print_installation, print_model_cost
from hf_genlm.cli.main import main
from hf_genlm.config.recipe import load_recipe
from hf_genlm.config.settle import settle
from hf_genlm.files import read_tensor_sizes
from hf_genlm.model import GenLMForCausalLM, modeling_genlm
from hf_genlm.model.recurrence_genlm import ClassicCell

VOCAB_OF_BYTES = 258  # the smallest that a recipe may state
MIXED = ["gated_linear", "full_attention", "lstm", "sliding_attention"]
# what a config can change in a model's shapes, over every mixer of the table
CASES: dict[str, tuple] = {name: (name, {}) for name in STACKS} | {
    "factorised, untied": (MIXED, {"embedding_size": 24, "tie_word_embeddings": False}),
    "untied, biased": (MIXED, {"tie_word_embeddings": False, "output_bias": True}),
    "wide states": (["gru", "gated_linear"], {"recurrent_size": 48}),
    "one key-value head": (MIXED, {"num_key_value_heads": 1, "head_dim": 12}),
    "learned positions": (MIXED, {"position_type": "learned", "max_position_embeddings": 16}),
}


@pytest.fixture(params=CASES)
def case(request) -> GenLMForCausalLM:
    stack, overrides = CASES[request.param]
    return build_model(stack, **overrides)


def tokens_of(n_tokens: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (1, n_tokens), generator=torch.Generator().manual_seed(2))


def test_parameters_are_those_of_the_model_and_parts_those_of_the_card(case, tmp_path):
    parts = doctor.count_parts(case, context=12)
    assert sum(part.n_parameters for part in parts) == case.num_parameters()
    case.save_pretrained(tmp_path)
    on_card = parts_of(read_tensor_sizes(tmp_path / "model.safetensors"), case.config.mixer_types)
    assert [(part.name, part.n_parameters) for part in parts if part.n_parameters] == [
        (part.name, part.n_parameters) for part in on_card
    ]
    assert "output head" in [part.name for part in parts]  # with FLOPs, tied or not


@pytest.mark.parametrize("n_tokens", [1, 5, 12])  # the window of these models is 5
def test_flops_are_those_that_torch_counts(case, n_tokens, monkeypatch):
    """torch counts the products of a real pass, with the cells step by step and attention over the whole
    square; its real weights say which pairs of the square are seen."""
    monkeypatch.setattr(ClassicCell, "_owns_plain_projections", lambda self: False)
    monkeypatch.setattr(modeling_genlm, "is_plain_linear", lambda module: True)  # the counter's are hooks
    case.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outputs = case(tokens_of(n_tokens), use_cache=False, output_attentions=True)
    unseen = sum(int((weights[0, 0] == 0).sum()) for weights in outputs.attentions)
    hidden = 4 * case.config.num_attention_heads * case.config.head_dim * unseen

    flops = doctor.count_flops(case, n_tokens)
    assert sum(flops.values()) == counter.get_total_flops() - hidden
    counts = {module: sum(found.values()) for module, found in counter.get_flop_counts().items()}
    body = counts["GenLMForCausalLM.model"]
    assert flops["output head"] + flops["gate of the counts"] == counter.get_total_flops() - body
    assert flops["MLP"] == sum(n for module, n in counts.items() if module.endswith(".mlp"))


def test_flops_by_hand():
    """An LSTM and a window of 2, width 8, on a row of 4: the sums of a pencil."""
    model = build_model(
        ["lstm", "sliding_attention"],
        hidden_size=8,
        vocab_size=10,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=2,
        intermediate_size=16,
    )
    # in a token: input and state of 8 to 4 gates of 8, and out; queries 8, keys and values 4 each, and out
    lstm, projections = 2 * (8 * 32 + 8 * 32 + 8 * 8), 2 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8)
    attention = 4 * 2 * 4 * (1 + 2 + 2 + 2)  # in a row: two heads of 4, and the tokens that each one sees
    assert doctor.count_flops(model, 4) == {
        "mixer lstm": 4 * lstm,
        "mixer sliding_attention": 4 * projections + attention,
        "MLP": 4 * 2 * (2 * 2 * 8 * 16),
        "output head": 4 * 2 * 8 * 10,
    }


def cached_bytes(cache: DynamicCache) -> int:
    """Of every state, key and value in it."""
    found = []
    for layer in cache.layers:
        found += [layer.keys, layer.values, *getattr(layer, "recurrent_states", {}).values()]
    return sum(tensor.nbytes for tensor in found if tensor is not None)


def test_state_and_cache_are_those_of_a_real_cache(case):
    """Beyond the window of 5 too."""
    parts = doctor.count_parts(case, context=12)
    cache = DynamicCache(config=case.config)
    with torch.no_grad():
        for n_tokens, ids in enumerate(tokens_of(9).split(1, dim=1), start=1):
            case(ids, past_key_values=cache)
            if n_tokens in (1, 3, 4, 5, 7, 9):
                assert sum(part.memory_bytes(n_tokens) for part in parts) == cached_bytes(cache)


def test_half_precision_halves_keys_and_values_but_no_state():
    model = build_model(MIXED).bfloat16()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens_of(7), past_key_values=cache)
    assert sum(part.memory_bytes(7) for part in doctor.count_parts(model, 12)) == cached_bytes(cache)


def test_layers_that_share_cost_as_much_as_others_but_have_fewer_parameters():
    shared, apart = (
        {part.name: part for part in doctor.count_parts(build_model("shared", shared_layers=n), 12)}
        for n in (2, 1)
    )
    assert shared.keys() == apart.keys()
    for name, part in shared.items():
        costs = ("flops_per_token", "state_bytes", "cache_bytes_per_token")
        assert [getattr(part, cost) for cost in costs] == [getattr(apart[name], cost) for cost in costs]
        if "mixer" in name or name == "MLP":
            assert 2 * part.n_parameters == apart[name].n_parameters


@pytest.mark.parametrize("window", [None, 1, 3, 8, 20])
def test_visible_pairs(window):
    for n_tokens in (1, 2, 8):
        seen = [min(token, window or token) for token in range(1, n_tokens + 1)]
        assert doctor.visible_pairs(n_tokens, window) == sum(seen)


@pytest.mark.parametrize("decoder", NETWORKS)
def test_the_described_model_is_the_one_that_train_makes(decoder):
    recipe = load_recipe(
        None,
        [
            f"model.decoder={decoder}",
            "model.hidden_size=64",
            "training.max_seq_length=32",
            "model.ngram_order=0",
        ],
    )
    cost = doctor.describe_model(recipe)
    model = GenLMForCausalLM(settle(recipe).architecture)
    assert cost.n_parameters == model.num_parameters()
    assert cost.parts == doctor.count_parts(model, 32)
    assert cost.training_bytes == 4 * sum(4 * p.numel() for p in model.parameters())
    assert cost.training_flops_per_token * 32 == 3 * sum(doctor.count_flops(model, 32).values())
    assert (cost.is_vocab_size_assumed, cost.context) == (True, 32)


@pytest.mark.parametrize(("order", "entries"), [(1, 5), (2, 50), (4, 300)])
def test_tables_of_counts_take_at_most_what_is_said_before_they_are_counted(order, entries, capsys):
    model, counts = build_ngram(order, entries)
    stated = ["model.decoder=ngram", f"model.ngram_order={order}", f"model.ngram_entries={entries}"]
    cost = doctor.describe_model(load_recipe(None, [*stated, f"tokenizer.vocab_size={VOCAB_OF_BYTES}"]))
    more = VOCAB_OF_BYTES - VOCAB  # rows: of words, counts, totals and backoffs
    most = sum(sizes.numel() for sizes in model.parameters()) + more * (4 if order > 1 else 2)
    assert most <= cost.n_parameters <= most + 4 * sum(map(len, counts.keys)) + 4 * order
    assert cost.weight_bytes <= 20 * entries + 20 * VOCAB_OF_BYTES + 200
    assert (cost.n_trained, cost.training_bytes) == (0, 0)
    print_model_cost(cost)
    shown = capsys.readouterr().out
    assert f"{cost.n_parameters:,} numbers" in shown
    assert "AdamW" not in shown


def doctored(capsys, *arguments: str) -> dict:
    assert main(["doctor", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_folder_is_described_as_it_was_trained(trained, capsys):
    found = doctored(capsys, "--cost", str(trained.path))
    sizes = read_tensor_sizes(trained.model / "model.safetensors")
    parts = {part["name"]: part["n_parameters"] for part in found["parts"]}
    counts = parts.pop("n-gram counts")  # at most, by the recipe
    assert sum(parts.values()) == sum(size for name, size in sizes.items() if "ngrams" not in name)
    assert counts > sum(size for name, size in sizes.items() if "ngrams" in name)
    assert (found["vocab_size"], found["is_vocab_size_assumed"]) == (400, False)
    wider = doctored(capsys, "--cost", str(trained.path), "--set", "model.hidden_size=48")
    assert wider["hidden_size"] == 48


def test_the_vocabulary_is_given_or_that_of_the_tokenizer(trained, capsys):
    path = f"tokenizer.path={trained.tokenizer}"
    assert doctored(capsys, "--cost", "--set", path)["vocab_size"] == 400
    assert doctored(capsys, "--cost", "--vocab-size", "300")["vocab_size"] == 300


def test_a_size_that_train_would_choose_by_its_time_is_assumed(capsys):
    assert doctored(capsys, "--cost")["is_size_assumed"] is True
    assert doctored(capsys, "--cost", "--size", "tiny")["is_size_assumed"] is False


def test_the_table_says_what_the_json_says(capsys):
    arguments = ["--cost", "--mixers", "gated_linear,sliding_attention,gated_linear"]
    found = doctored(capsys, *arguments)
    assert main(["doctor", *arguments]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == (
        "2 gated_linear, 1 sliding_attention layers, width 192, context 128, "
        "vocabulary 4,096 assumed: --vocab-size, width assumed: --size"
    )
    rows = lines[: lines.index("")]
    assert len({len(row) for row in rows}) == 1  # aligned
    cells = [re.split(r"\s{2,}", row) for row in rows]
    assert [row[0] for row in cells[1:]] == [
        "token embedding",
        "bigram embedding",
        "mixer gated_linear x2",
        "mixer sliding_attention x1",
        "norms",
        "MLP",
        "output head",
        "n-gram counts",
        "gate of the counts",
        "total",
    ]
    total = [float(cell.replace(",", "")) for cell in cells[-1][1:] if "%" not in cell]
    names = ("n_parameters", "flops_per_token", "state_bytes", "cache_bytes_per_token")
    assert total == [round(found[name]) for name in names]
    below = "\n".join(lines)
    assert f"{found['training_flops_per_token']:,.0f} FLOPs per token" in below
    assert f"{found['training_bytes'] / 2**20:.1f} MiB of weights" in below
    assert f"{found['memory_bytes_at_context'] / 2**10:.1f} KiB of state and cache" in below
    assert "mixer sliding_attention keeps the last 31 tokens" in below


MISTAKES = {
    "unknown decoder": (["--cost", "--decoder", "lstmm"], "did you mean 'lstm'"),
    "unknown mixer": (["--cost", "--mixers", "gru,attention"], "unknown model.mixers 'attention'"),
    "unknown size": (["--cost", "--size", "smal"], "did you mean 'small'"),
    "unknown option": (["--paramters"], "--paramters"),
    "small vocabulary": (["--cost", "--vocab-size", "9"], "from 258 to"),
    "shapes that do not fit": (
        ["--cost", "--set", "model.num_attention_heads=5"],
        "must be a multiple",
    ),
    "no run folder": (["--cost", "nowhere"], "is not a run folder"),
    "run folder and a size": (["--cost", "my-run", "--size", "small"], "states it already"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_option_is_one_line_and_exit_2(mistake, capsys):
    arguments, words = MISTAKES[mistake]
    assert main(["doctor", *arguments]) == 2
    assert words in last_line(capsys)


def test_doctor_alone_describes_the_installation():
    done = subprocess.run(
        [sys.executable, "-m", "hf_genlm", "doctor"], capture_output=True, text=True, check=True
    )
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert facts["python"] == sys.version.split()[0]
    assert facts["torch"] == str(torch.__version__)
    assert facts["train"].startswith("on cuda" if torch.cuda.is_available() else "on cpu")
    assert {f"[{extra.name}]" for extra in doctor.list_extras()} <= set(facts)
    assert done.stderr == ""  # the libraries that it imports are silent


def without_zstandard(distribution: str) -> str:
    """Find every distribution but one."""
    if distribution == "zstandard":
        raise PackageNotFoundError(distribution)
    return "1.0"


def test_extras_with_a_missing_distribution_name_it_and_the_command():
    missing = {extra.name: extra for extra in doctor.list_extras(without_zstandard) if extra.missing}
    assert set(missing) == {"zstd", "test"}
    assert missing["zstd"].missing == ["zstandard"]
    assert missing["zstd"].command == "pip install 'zstandard>=0.23'  # the extra [zstd]"


def test_extras_of_other_packages_are_followed():
    """The extra serve needs transformers[serving], which needs openai."""

    def find_version(distribution: str) -> str:
        if distribution == "openai":
            raise PackageNotFoundError(distribution)
        return "1.0"

    missing = {extra.name: extra.missing for extra in doctor.list_extras(find_version)}
    assert missing["serve"] == ["openai"]
    assert missing["zstd"] == []


def test_every_extra_of_the_package_has_a_purpose():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert list(doctor.PURPOSES) == list(project["project"]["optional-dependencies"])


def test_the_installation_is_printed(capsys):
    found = dataclasses.replace(
        doctor.describe_installation(),
        is_bfloat16_native=True,
        extras=doctor.list_extras(without_zstandard),
        training_device="cuda",
        n_training_gpus=2,
    )
    print_installation(found)
    printed = capsys.readouterr().out
    assert "missing zstandard: pip install 'zstandard>=0.23'" in printed
    assert re.search(r"^\[serve\] .*: installed *$", printed, flags=re.MULTILINE)
    assert re.search(r"^train .* in bfloat16 by training.dtype=auto *$", printed, flags=re.MULTILINE)
    assert "--processes 2" in printed.splitlines()[-1]
    assert found.to_json()["training_dtype"] == "bfloat16"
    print_installation(dataclasses.replace(found, n_training_gpus=1))
    assert "--processes" not in capsys.readouterr().out
