"""Promise: an export computes the model's logits without this package, or is refused with every reason."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import SHALLOW, STACKS, build_model
from support.runs import SMALL
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_genlm.cli.main import main
from hf_genlm.config.recipe import TokenizerRecipe
from hf_genlm.errors import UserError
from hf_genlm.exporting import gguf_file, layouts, targets
from hf_genlm.exporting.onnx_runner import OnnxRunner
from hf_genlm.exporting.onnx_step import write_onnx
from hf_genlm.exporting.targets import EXPORTS, TEXTS, export_model
from hf_genlm.text.store import Document
from hf_genlm.text.tokenizer import PATTERNS, train_tokenizer

ATTENTION = ["full_attention"] * 2
LLAMA = {"gated_mlp": True, "hidden_act": "silu", "qk_norm": False}
QWEN3 = {**LLAMA, "qk_norm": True}
# format, mixers, config
CASES = {
    "llama": ("llama", ATTENTION, LLAMA),
    "squared relu": ("llama", ATTENTION, {"qk_norm": False}),
    "untied, shared, scaled": (
        "llama",
        ATTENTION,
        {
            **LLAMA,
            "tie_word_embeddings": False,
            "shared_layers": 2,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
            "rms_norm_eps": 1e-3,
        },
    ),
    "qwen3": ("qwen3", ATTENTION, QWEN3),
    "the default MLP": ("qwen3", ATTENTION, {}),
    "factorised": ("qwen3", ATTENTION, {"embedding_size": 8, "mlp_rank": 12, "head_dim": 16}),
    "projected head of its own": ("qwen3", ATTENTION, {"embedding_size": 8, "tie_word_embeddings": False}),
    "windows": ("qwen3", ["sliding_attention", "full_attention"], QWEN3),
    "zero bias": ("qwen3", ATTENTION, {"output_bias": True}),
}
ALONE = """
import sys
sys.modules["hf_genlm"] = None  # importing it is an error
"""
READ_CASES = f"""{ALONE}
import json, numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_grad_enabled(False)
for folder, ids in json.load(open("ids.json")).items():
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(sys.argv[1]).input_ids == ids, folder
    numpy.save(folder + ".npy", model(torch.tensor([ids])).logits[0])
    print(type(model).__name__)
import os, re  # and as the page says
os.chdir("llama")
exec(re.findall(r"```python\\n(.*?)```", open("README.md").read(), flags=re.DOTALL)[0])
"""


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tokenizers():
    """One by each pattern, with merges over what they cut apart."""
    texts = [
        *TEXTS * 4,
        "It's 1999, 'tis said they'LL sing.\n    indented  code = 12345\n\treturn x_1\n" * 5,
    ]
    documents = [Document(text, str(i)) for i, text in enumerate(texts)]
    return {
        pattern: train_tokenizer(documents, TokenizerRecipe(vocab_size=420, pattern=pattern), 1000)
        for pattern in PATTERNS
    }


def build_for(tokenizer, stack, **overrides):
    """A model of the tokenizer's vocabulary."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(tokenizer, name) for name in names}
    return build_model(
        stack, **{"vocab_size": len(tokenizer), "max_position_embeddings": 256, **special, **overrides}
    )


def greedy(model, ids: list[int], n: int) -> list[int]:
    prompt = torch.tensor([ids])
    rows = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False, eos_token_id=None
    )
    return rows[0, len(ids) :].tolist()


def run_alone(code: str, folder: Path, *arguments: str) -> str:
    """What `code` prints in a process without this package."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_plain_transformers_gives_the_same_logits(tokenizers, tmp_path):
    """Each case in a process that cannot import this package."""
    tokenizer, text, ids, expected = tokenizers["own"], TEXTS[0] + TEXTS[3], {}, {}
    for name, (word, mixers, overrides) in CASES.items():
        model = build_for(tokenizer, mixers, **overrides)
        if model.lm_head.bias is not None:
            model.lm_head.bias.zero_()
        found = export_model(model, tokenizer, word, tmp_path / name)
        ids[name] = tokenizer(text).input_ids
        expected[name] = model(torch.tensor([ids[name]])).logits[0]
        assert found.largest_difference < 2e-5
        assert found.n_tokens == found.n_same_choice > 100
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    *classes, written = run_alone(READ_CASES, tmp_path, text).split("\n", len(CASES))
    assert classes == [layouts.LAYOUTS[word].model_class.__name__ for word, _, _ in CASES.values()]
    assert "Once" in written
    assert "vLLM" in (tmp_path / "llama" / "README.md").read_text(encoding="utf-8")
    assert "vLLM" not in (tmp_path / "squared relu" / "README.md").read_text(encoding="utf-8")
    for name, logits in expected.items():
        got = torch.from_numpy(np.load(tmp_path / f"{name}.npy"))
        torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("word", "mixers", "overrides", "words"),
    [
        ("llama", ["lstm"], LLAMA, "lstm layers.*--decoder transformer.*--to onnx"),
        ("llama", ["sliding_attention"], LLAMA, "window of 5 tokens.*--to qwen3"),
        ("llama", ATTENTION, QWEN3, "normalised.*--to qwen3.*model.qk_norm=false"),
        ("qwen3", ATTENTION, LLAMA, "not normalised.*--to llama.*model.qk_norm=true"),
        ("qwen3", ATTENTION, {"hidden_act": "gelu"}, "gelu without a gate.*model.gated_mlp=true"),
        ("qwen3", ATTENTION, {"output_bias": True}, "bias.*model.output_bias=false"),
        ("qwen3", ATTENTION, {"final_logit_softcapping": 9.0}, "bounded by 9.0.*softcapping=null"),
        ("qwen3", ATTENTION, {"position_type": "learned"}, "positions are learned.*position_type=rotary"),
        ("gguf", ATTENTION, {"qk_norm": False}, "relu2 without a gate.*gated_mlp=true model.hidden_act=silu"),
        ("gguf", ATTENTION, {**LLAMA, "hidden_act": "gelu"}, "gelu with a gate.*hidden_act=silu"),
        ("gguf", ["sliding_attention"], QWEN3, "window of 5"),
        (
            "gguf",
            ATTENTION,
            {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
            "scaled by linear",
        ),
        (
            "onnx",
            ATTENTION,
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}},
            "dynamic change with the length",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_remedy(
    word, mixers, overrides, words, tokenizers, tmp_path
):
    with pytest.raises(UserError, match=words):
        export_model(
            build_for(tokenizers["gpt2"], mixers, **overrides), tokenizers["gpt2"], word, tmp_path / "out"
        )
    assert not list(tmp_path.iterdir())


def test_all_reasons_are_named_at_once(tokenizers, tmp_path):
    model = build_for(
        tokenizers["own"], ["lstm", "full_attention"], output_bias=True, final_logit_softcapping=5.0
    )
    with pytest.raises(UserError) as refused:
        export_model(model, tokenizers["own"], "gguf", tmp_path / "out", "q8_0")
    for words in ("lstm layers", "relu2", "bias", "bounded by 5.0", "llama-bpe"):
        assert words in str(refused.value)
    with pytest.raises(UserError, match="multiples of 32, and these are 24"):
        export_model(
            build_for(tokenizers["gpt2"], ATTENTION, hidden_size=24, **LLAMA),
            tokenizers["gpt2"],
            "gguf",
            tmp_path / "out",
            "q8_0",
        )


@pytest.mark.parametrize(
    ("switches", "pattern"), [(LLAMA, "gpt2"), (QWEN3, "qwen35")], ids=["llama", "qwen3"]
)
def test_gguf_is_read_by_transformers_and_decoded_by_llama_cpp(switches, pattern, tokenizers, tmp_path):
    """The same ids from the same text and 64 greedy tokens, by llama.cpp's own tokenizer and code."""
    tokenizer = tokenizers[pattern]
    model = build_for(tokenizer, ATTENTION, **switches)
    for dtype, least, most in (("float32", 0.0, 1e-5), ("float16", 1e-4, 0.1), ("q8_0", 0.01, 2.0)):
        found = export_model(model, tokenizer, "gguf", tmp_path / dtype, dtype)
        assert least <= found.largest_difference <= most, dtype
    file = tmp_path / "float32" / "model-F32.gguf"
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        assert read(text, add_special_tokens=False).input_ids == tokenizer(text).input_ids
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(read, name) == getattr(tokenizer, name)
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    f32 = llama_cpp.GGML_TYPE_F32
    llm = llama_cpp.Llama(str(file), n_ctx=512, n_threads=1, verbose=False, type_k=f32, type_v=f32)
    for text in TEXTS:
        ids = llm.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer(text).input_ids
    prompt = llm.tokenize(TEXTS[1].encode())
    assert prompt == [tokenizer.bos_token_id, *tokenizer(TEXTS[1]).input_ids]
    new = []
    for token in llm.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
        new.append(token)
        if len(new) == 64:
            break
    assert new == greedy(model, prompt, 64)


@pytest.mark.parametrize(
    ("switches", "pattern"), [(LLAMA, "gpt2"), (QWEN3, "qwen35")], ids=["llama", "qwen3"]
)
def test_gguf_holds_config_and_special_tokens(switches, pattern, tokenizers, tmp_path):
    """Every value that llama.cpp reads, each another one than llama.cpp's own default."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install '.[export]'")
    tokenizer = copy.deepcopy(tokenizers[pattern])
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)  # three special tokens of three ids, none 0
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(7)
    rope = {"rope_type": "default", "rope_theta": 321.0}
    sizes = {"head_dim": 16, "num_key_value_heads": 1, "intermediate_size": 48, "max_position_embeddings": 77}
    model = build_for(tokenizer, ATTENTION, rope_parameters=rope, rms_norm_eps=1e-3, **sizes, **switches)
    found = export_model(model, tokenizer, "gguf", tmp_path / "out")
    assert found.largest_difference < 1e-4
    fields = gguf.GGUFReader(tmp_path / "out" / gguf_file.file_name("float32")).fields
    name = "qwen3" if switches["qk_norm"] else "llama"
    expected = {
        f"{name}.context_length": 77,
        f"{name}.embedding_length": 32,
        f"{name}.block_count": 2,
        f"{name}.feed_forward_length": 48,
        f"{name}.attention.head_count": 4,
        f"{name}.attention.head_count_kv": 1,
        f"{name}.attention.key_length": 16,
        f"{name}.attention.value_length": 16,
        f"{name}.attention.layer_norm_rms_epsilon": pytest.approx(1e-3),
        f"{name}.rope.dimension_count": 16,
        f"{name}.rope.freq_base": 321.0,
        f"{name}.vocab_size": len(tokenizer),
        "general.architecture": name,
        "tokenizer.ggml.bos_token_id": 5,
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.pre": {"gpt2": "gpt-2", "qwen35": "qwen35"}[pattern],
    }
    assert {key: fields[key].contents() for key in expected} == expected
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert [tokens[i] for i in (5, 7, 1)] == [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]


@pytest.mark.parametrize("rope_theta", [321.0, 50_000.0])
def test_gguf_read_back_uses_the_rotary_base_and_epsilon_of_the_file(rope_theta, tokenizers, tmp_path):
    """A file whose config differs from the model's gives other logits, so that an export notices it."""
    tokenizer = tokenizers["gpt2"]
    model = build_for(tokenizer, ATTENTION, **LLAMA)
    wrong_rope = {"rope_type": "default", "rope_theta": rope_theta}
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    expected = model(ids).logits
    for name, changes in (
        ("right", {}),
        ("base", {"rope_parameters": wrong_rope}),
        ("epsilon", {"rms_norm_eps": 0.1}),
    ):
        converted = layouts.convert(model, layouts.LAYOUTS["llama"])
        for key, value in changes.items():
            setattr(converted.config, key, value)
        (tmp_path / name).mkdir()
        file = tmp_path / name / gguf_file.file_name("float32")
        gguf_file.write_converted(converted, file, "llama", tokenizer)
        difference = (gguf_file.read_back(file.parent, model, "float32")(ids).logits - expected).abs().max()
        assert (difference > 0.01) == bool(changes), name


@pytest.mark.parametrize("kind", SHALLOW)
def test_onnx_step_gives_the_logits_and_64_greedy_tokens(kind, tokenizers, tmp_path):
    check_onnx(build_for(tokenizers["own"], SHALLOW[kind]), tokenizers["own"], tmp_path / "out")


def test_large_weights_go_to_a_file_beside_the_graph(tokenizers, tmp_path):
    """Read with the shortest text, which is one token."""
    model = build_for(tokenizers["own"], ["gru"])
    write_onnx(model, tokenizers["own"], tmp_path, max_inline_bytes=0)
    assert (tmp_path / "model.onnx.data").stat().st_size > 4 * len(tokenizers["own"]) * 32
    got = torch.from_numpy(OnnxRunner(tmp_path).read(1))
    torch.testing.assert_close(got, model(torch.tensor([[1]])).logits[0, 0], atol=1e-4, rtol=0)


def test_an_onnx_text_ends_where_learned_positions_do(tokenizers, tmp_path):
    model = build_for(
        tokenizers["own"], ["full_attention"], position_type="learned", max_position_embeddings=16
    )
    export_model(model, tokenizers["own"], "onnx", tmp_path / "out")
    runner = OnnxRunner(tmp_path / "out")
    for token in range(16):
        runner.read(token)
    with pytest.raises(ValueError, match="positions for 16 tokens"):
        runner.read(16)
    vocab_size = model.config.vocab_size
    for token in (-1, vocab_size):  # onnxruntime reads -1 as the last token
        with pytest.raises(IndexError, match=f"token {token} is out of range: the model has {vocab_size}"):
            runner.read(token)
    with pytest.raises(ValueError, match="the prompt is empty"):
        runner.generate([], 1)


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
def test_onnx_takes_every_stack(stack, tokenizers, tmp_path):
    check_onnx(build_for(tokenizers["own"], stack), tokenizers["own"], tmp_path / "out")


def check_onnx(model, tokenizer, folder: Path) -> None:
    found = export_model(model, tokenizer, "onnx", folder)
    assert found.largest_difference < 1e-4
    assert found.n_same_choice == found.n_tokens > 200
    runner = OnnxRunner(folder)
    runner.description["eos_token_ids"] = []  # as `greedy` goes on
    prompt = tokenizer(TEXTS[0]).input_ids[:12]
    assert runner.generate(prompt, 64) == greedy(model, prompt, 64)  # beyond the first slots
    assert runner.n_tokens == 12 + 63


def test_the_page_of_an_onnx_export_runs_where_this_package_is_not(tokenizers, tmp_path):
    tokenizer = tokenizers["own"]
    model = build_for(tokenizer, ["gated_linear", "full_attention"])
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: cc0-1.0\nlanguage: [en]\nmodel_name: Tiny\ntags: [x]\n---\n# Tiny\n")
    out = tmp_path / "out"
    export_model(model, tokenizer, "onnx", out, card=card)
    page = (out / "README.md").read_text(encoding="utf-8")
    assert "# Tiny, as ONNX" in page
    assert "license: cc0-1.0" in page
    assert (out / "model_card.md").read_text() == card.read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(example.splitlines()) <= 28
    without = "sys.modules |= dict.fromkeys(['torch', 'transformers'])\n"
    ids = [tokenizer.bos_token_id, *tokenizer("Once").input_ids]
    new = greedy(model, ids, 64)
    if tokenizer.eos_token_id in new:
        new = new[: new.index(tokenizer.eos_token_id) + 1]
    expected = tokenizer.decode(ids + new, skip_special_tokens=True)
    assert run_alone(ALONE + without + example, out).rstrip("\n") == expected.rstrip("\n")


def test_an_export_with_other_logits_is_a_fault_and_leaves_nothing(tokenizers, tmp_path, monkeypatch):
    """A format that writes another model."""
    tokenizer = tokenizers["own"]
    model, other = (build_for(tokenizer, ATTENTION, seed=seed, **LLAMA) for seed in (0, 1))
    llama = EXPORTS["llama"]
    wrong = replace(llama, write=lambda model, *arguments: llama.write(other, *arguments))
    monkeypatch.setitem(EXPORTS, "llama", wrong)
    with pytest.raises(RuntimeError, match="logits differ from the model's by"):
        export_model(model, tokenizer, "llama", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "lama"], "did you mean 'llama'"),
        (["--to", "gguf", "--dtype", "int4"], "'int4' is none that --to gguf writes: float32, float16, q8_0"),
        (["--to", "onnx", "--dtype", "q8_0"], "--to onnx writes: float32"),
        (["--to", "llama", "--out", "full"], "already holds files"),
        (["--to", "llama"], "LlamaForCausalLM, not one of this package"),
    ],
)
def test_what_the_verb_refuses(options, words, tokenizers, tmp_path, monkeypatch, capsys):
    """The last one is a foreign model, to be exported by its own library."""
    monkeypatch.chdir(tmp_path)
    export_model(
        build_for(tokenizers["own"], ATTENTION, **LLAMA), tokenizers["own"], "llama", Path("foreign")
    )
    Path("full").mkdir()
    Path("full", "file").touch()
    assert main(["export", "foreign", "--out", "new", *options]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "full"]


def test_a_folder_that_cannot_be_made_is_named(tokenizers, tmp_path):
    (tmp_path / "file").touch()
    model = build_for(tokenizers["own"], ATTENTION, **LLAMA)
    with pytest.raises(UserError, match=r"--out .* cannot be written \(Not a directory|File exists"):
        export_model(model, tokenizers["own"], "llama", tmp_path / "file" / "out")


def test_a_missing_library_is_named_with_its_extra(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    for word in ("onnx", "gguf"):
        with pytest.raises(UserError, match=rf"--to {word} needs .*pip install .*onnxruntime>="):
            export_model(None, tokenizers["own"], word, tmp_path / "out")
    assert EXPORTS["llama"].needs == ()


def test_the_recipe_trains_what_every_runtime_takes(tmp_path, monkeypatch, capsys):
    """From text to a checkpoint, by the two commands of recipes/llama.yaml."""
    recipe = Path(__file__).parents[2] / "recipes" / "llama.yaml"
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The quick brown fox, it's 12 years old.\n" * 400)
    small = [word for assignment in SMALL if "vocab" not in assignment for word in ("--set", assignment)]
    steps = ["--set", "training.steps=3", "--set", "tokenizer.vocab_size=270"]
    with torch.enable_grad():
        assert main(["train", "text.txt", "--recipe", str(recipe), "--out", "run", *small, *steps]) == 0
    capsys.readouterr()
    for word in ("llama", "gguf"):
        assert main(["export", "run", "--to", word, "--out", f"as-{word}"]) == 0
        out = capsys.readouterr().out
        assert re.search(r"largest difference of a logit from the model's own: \S+, on \d+ tokens of 5", out)
        assert "left out" not in out
    assert Path("as-gguf", "model-F32.gguf").is_file()
    assert Path("as-llama", "model_card.md").read_bytes() == Path("run", "model", "README.md").read_bytes()
    assert isinstance(LlamaForCausalLM.from_pretrained("as-llama").config, LlamaConfig)
    counted = ["--set", "model.ngram_order=2", "--out", "counted"]
    with torch.enable_grad():
        assert main(["train", "text.txt", "--recipe", str(recipe), *small, *steps, *counted]) == 0
    assert main(["export", "counted", "--to", "llama", "--out", "alone"]) == 0
    assert "left out: the n-gram counts of this model" in capsys.readouterr().out
    assert "It is the network of that model alone" in Path("alone", "README.md").read_text()
