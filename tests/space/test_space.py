"""Promise: the demo shows what the model computes, runs without the package, on laptops and phones."""

import ast
import html
import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command_line import last_line
from support.http_clients import exchange
from support.hub import LoopbackHub, Repo, connect
from support.models import STACKS, build_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

import hf_genlm
from hf_genlm.cli.main import main
from hf_genlm.config.recipe import Recipe, TokenizerRecipe
from hf_genlm.evaluation.likelihood import measure_likelihood
from hf_genlm.model.configuration_genlm import RECURRENT_MIXERS
from hf_genlm.run_folder import RunFolder
from hf_genlm.space.build import build_space, run_space
from hf_genlm.space.files.demo import page
from hf_genlm.space.files.demo.layers import (
    last_token_attention,
    list_layers,
    memory_length,
    recurrent_states,
)
from hf_genlm.space.files.demo.models import MAX_PROMPT_TOKENS, LanguageModel, decode_spans, load_models
from hf_genlm.space.files.demo.scoring import (
    Sampling,
    encode_prompt,
    generate,
    score_text,
    shared_pieces,
)
from hf_genlm.text.store import Document
from hf_genlm.text.tokenizer import train_tokenizer

FILES = Path(hf_genlm.__file__).parent / "space" / "files"
TEXT = "The value of x is 3.\ngrößer, हिन्दी — 名前 👩‍👩‍👧 é\n\tdef f(x): return x\n"
GREEDY = Sampling(max_new_tokens=9, temperature=0)
SAMPLED = Sampling(9, temperature=0.9, top_k=40, top_p=0.9, repetition_penalty=1.3, seed=7)
KINDS = [*STACKS, "gpt2"]


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, with 280 tokens: every character outside ASCII is split."""
    english = "The value of x is the value of y, and the function returns it.\n" * 20
    return train_tokenizer([Document(english, "a")], TokenizerRecipe(vocab_size=280), len(english))


def language_model(kind: str, tokenizer) -> LanguageModel:
    if kind == "gpt2":
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=48,
                            initializer_range=0.4, bos_token_id=0, eos_token_id=0)  # fmt: skip
        module = GPT2LMHeadModel(config).eval()
    else:
        module = build_model(kind, vocab_size=len(tokenizer), max_position_embeddings=32, pad_token_id=1,
                             bos_token_id=0, eos_token_id=0)  # fmt: skip
    module.set_attn_implementation("eager")
    return LanguageModel(kind, module, tokenizer)


def forward_probabilities(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Probabilities (T, V) of the token after each of `ids`, by one forward pass."""
    with torch.no_grad():
        return model.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().softmax(dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_token_scores_equal_a_forward_pass(kind, tokenizer):
    model = language_model(kind, tokenizer)
    prompt = encode_prompt(model, "The value of")[0]
    scores = [score for step in generate(model, prompt, SAMPLED) for score in step]
    ids = [0, *(score.token for score in scores)]
    probabilities = forward_probabilities(model, ids[:-1])
    assert [score.token for score in scores][: len(prompt)] == prompt
    assert len(scores) == len(prompt) + 9 or scores[-1].token == 0
    for score, row in zip(scores, probabilities, strict=True):
        assert score.probability == pytest.approx(float(row[score.token]), rel=2e-4)
        others = row > row[score.token] * 1.001
        assert int(others.sum()) + 1 <= score.rank <= int((row > row[score.token] * 0.999).sum())
        best = row.topk(5)
        assert [p for _, p in score.alternatives] == pytest.approx(best.values.tolist(), rel=2e-4)
        assert all(float(row[token]) == pytest.approx(p, rel=2e-4) for token, p in score.alternatives)


@pytest.mark.parametrize("kind", ["hybrid", "bigram", "gpt2"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_generated_tokens_equal_those_of_transformers_generate(kind, sampling, tokenizer):
    model = language_model(kind, tokenizer)
    prompt = encode_prompt(model, "The function")[0]
    torch.manual_seed(sampling.seed)
    options = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k,
               "top_p": sampling.top_p, "repetition_penalty": sampling.repetition_penalty}  # fmt: skip
    expected = model.module.generate(
        torch.tensor([[0, *prompt]]), max_new_tokens=sampling.max_new_tokens, pad_token_id=1,
        **(options if sampling.temperature else {"do_sample": False}),
    )  # fmt: skip
    written = [score.token for step in generate(model, prompt, sampling) for score in step]
    assert [0, *written] == expected[0].tolist()


def test_each_request_has_its_own_generator_and_stops_at_an_end_token(tokenizer):
    model = language_model("gru", tokenizer)
    first, second = (generate(model, [40], SAMPLED) for _ in range(2))
    pairs = list(zip(first, second, strict=True))  # interleaved, like requests of two visitors
    assert all(a == b for a, b in pairs)
    likeliest = int(forward_probabilities(model, [0, 40])[-1].argmax())
    model.module.generation_config.eos_token_id = [1, likeliest]
    steps = list(generate(model, [40], GREEDY))
    assert [score.token for score in steps[-1]] == [likeliest]
    assert len(steps) == 2


def test_a_long_prompt_is_cut_at_its_start_and_leaves_room_to_generate(tokenizer):
    long = "The value of x. " * 3000
    for kind, room in (("gpt2", 24), ("gru", MAX_PROMPT_TOKENS)):
        model = language_model(kind, tokenizer)
        ids = model.encode(long)
        assert encode_prompt(model, long) == (ids[-room:], len(ids))
    model = language_model("gpt2", tokenizer)
    written = [
        score for step in generate(model, encode_prompt(model, long)[0], Sampling(400)) for score in step
    ]
    assert len(written) == 48 - 1  # positions left by the start token
    empty = language_model("hybrid", tokenizer)
    assert next(generate(empty, [], GREEDY)) == []


@pytest.mark.parametrize("text", [TEXT, "", " ", "\ufffd \ufffd", "a\r\n\tb", "<|endoftext|> & <b>"])
def test_spans_concatenate_to_the_text_and_split_no_character(text, tokenizer):
    check_spans(text, tokenizer)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_spans_of_any_text(text):
    check_spans(text, BYTES)


def check_spans(text: str, tokenizer) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    spans = decode_spans(tokenizer, ids)
    assert "".join(span.text for span in spans) == text
    assert [span.first for span in spans] + [len(ids)] == [0] + [span.stop for span in spans]
    assert all(span.text for span in spans)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


BYTES = byte_tokenizer()


def test_invalid_bytes_become_replacement_characters_at_once():
    ids = BYTES("é名", add_special_tokens=False).input_ids
    assert [len(range(s.first, s.stop)) for s in decode_spans(BYTES, ids)] == [2, 3]
    spans = decode_spans(BYTES, [ids[0], *BYTES("ab").input_ids, *ids[2:4]])
    assert [span.text for span in spans] == ["\ufffda", "b", "\ufffd"]


def test_spans_of_a_sentencepiece_tokenizer():
    """It writes spaces as U+2581 and falls back to bytes."""
    pieces = ["<unk>", "▁a", "▁word", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    replaced = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([replaced, decoders.ByteFallback(), decoders.Fuse()])
    words = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    ids = [1, 2, 3, *(4 + byte for byte in "é".encode()), 1]
    spans = decode_spans(words, ids)
    assert [span.text for span in spans] == [" a", " word", "s", "é", " a"]
    assert (spans[3].first, spans[3].stop) == (3, 5)


def text_of(painted: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", painted))


def test_painted_text_is_exact_and_escaped(tokenizer):
    model = language_model("lstm", tokenizer)
    text = TEXT + '<script>alert("1")</script> &amp; \'"'
    painter = page.TokenPainter(model)
    steps = list(generate(model, encode_prompt(model, text)[0], GREEDY))
    painted = painter.paint(steps[0])
    painted += painter.finish()
    assert text_of(painted) == text
    assert "<script" not in painted
    details = [json.loads(html.unescape(data)) for data in re.findall(r'data-tokens="([^"]*)"', painted)]
    tokens = [token for span in details for token in span]
    assert [token["p"] for token in tokens] == [score.probability for score in steps[0]]
    assert max(len(span) for span in details) == 4  # an emoji: one token for each byte
    in_parts = page.TokenPainter(model)
    grown = "".join(in_parts.paint([score]) for score in steps[0]) + in_parts.finish()
    assert grown == painted


def test_colors_follow_the_legend():
    assert [page.probability_color(p) for p in (1.0, 0.5, 0.49, 0.05, 0.011, 0.001, 0.0)] == [
        "s0", "s0", "s1", "s2", "s3", "s4", "s5",
    ]  # fmt: skip
    assert [page.attention_color(p) for p in (0.0, 0.005, 0.03, 1.0)] == ["s0", "s1", "s3", "s5"]
    lightness = [luminance(color) for color in style_colors()]
    assert lightness == sorted(lightness, reverse=True)  # readable with any kind of color vision
    assert all(a / b > 1.2 for a, b in itertools.pairwise(lightness))


def style_colors() -> list[str]:
    """Colors of the light page, from likely to unlikely."""
    style = (FILES / "demo" / "style.css").read_text(encoding="utf-8").partition("}")[0]
    return [re.search(rf"--s{i}: #(\w+)", style)[1] for i in range(1, 6)]


def luminance(color: str) -> float:
    """Relative luminance of sRGB plus 0.05, of which ratios are contrasts (WCAG 2)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.05 + float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("kind", [*RECURRENT_MIXERS, "hybrid", "shared", "bigram"])
def test_states_equal_the_cache_after_each_token(kind, tokenizer):
    model = language_model(kind, tokenizer)
    ids = [0, *model.encode("The value of y is the")]
    for layer in list_layers(model):
        if layer.is_attention:
            continue
        cache, seen = DynamicCache(config=model.module.config), []
        for token in ids:
            with torch.no_grad():
                model.module(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            seen.append(cache.layers[layer.index].recurrent_states[0][0].clone())
        states = recurrent_states(model, ids, layer)
        torch.testing.assert_close(states.h_TR, torch.stack(seen), rtol=1e-4, atol=1e-5)
        assert (states.memory_R is None) == (layer.mixer == "elman")


@pytest.mark.parametrize("kind", ["gated_linear", "gru", "lstm"])
def test_memory_length_follows_the_forget_gate(kind, tokenizer):
    """The gate written out token by token; and a gate of known value."""
    model = language_model(kind, tokenizer)
    ids = [0, *model.encode("The value")]
    layer = list_layers(model)[1]
    mixer = model.module.model.layers[1].mixer
    inputs = []
    with mixer.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        states = recurrent_states(model, ids, layer)
    before = torch.cat([torch.zeros(1, mixer.recurrent_size), states.h_TR[:-1]])
    rows = slice(
        mixer.recurrent_size, 2 * mixer.recurrent_size
    )  # of the second gate: f of an LSTM, z of a GRU
    with torch.no_grad():
        if kind == "gated_linear":
            u = inputs[0][0] @ mixer.forget_proj.weight.T + mixer.forget_proj.bias
        else:
            u = inputs[0][0] @ mixer.in_proj.weight[rows].T + mixer.in_proj.bias[rows]
            u = u + before @ mixer.rec_proj.weight[rows].T
            u = u + (0 if mixer.rec_proj.bias is None else mixer.rec_proj.bias[rows])
    expected = -1 / torch.nn.functional.logsigmoid(u).mean(dim=0)
    torch.testing.assert_close(states.memory_R, expected, rtol=1e-3, atol=1e-4)
    assert float(memory_length(torch.full((4, 1), math.exp(-1 / 25)))) == pytest.approx(25, rel=1e-4)


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention", "hybrid", "gpt2"])
def test_attention_equals_the_models_for_the_last_token(kind, tokenizer):
    model = language_model(kind, tokenizer)
    ids = [0, *model.encode("The value of x is")]
    layers = [layer for layer in list_layers(model) if layer.is_attention]
    with torch.no_grad():
        plain = model.module(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    assert len(layers) == len(plain)
    for layer, weights in zip(layers, plain, strict=True):
        seen = last_token_attention(model, ids, layer)
        assert torch.equal(seen, weights[0, :, -1])
        torch.testing.assert_close(seen.sum(dim=1), torch.ones(len(seen)))
        if layer.mixer == "sliding_attention":
            assert not seen[:, :-5].any()
            assert seen[:, -5:].all()


@pytest.mark.parametrize("kind", ["lstm", "bigram", "gru", "sliding_attention", "gpt2"])
def test_bits_per_byte_equal_evaluate(kind, tokenizer):
    """For a text several times as long as the context."""
    model = language_model(kind, tokenizer)
    text = TEXT * 3
    ids = np.array(model.encode(text))
    (expected,) = (
        m for m in measure_likelihood(
            model.module, [(ids, len(text.encode()))], start_id=0, context=model.context,
            carry_state=model.is_recurrent,
        ) if m.name == "bits_per_byte"
    )  # fmt: skip
    score = score_text(model, text)
    assert score.bits_per_byte == pytest.approx(expected.value, rel=1e-5)
    assert (score.n_bytes, score.n_tokens, score.n_scored) == (len(text.encode()), len(ids), len(ids))


def test_two_models_are_compared_at_shared_token_boundaries(tokenizer):
    ours, theirs = language_model("gru", tokenizer), language_model("lstm", BYTES)
    a, b = score_text(ours, TEXT), score_text(theirs, TEXT)
    pieces = shared_pieces(a, b)
    assert "".join(text for text, _, _ in pieces) == TEXT
    assert [text for text, _, _ in pieces] == [text for text, _ in a.pieces]  # bytes have every boundary
    assert [bits for _, bits, _ in pieces] == pytest.approx([bits for _, bits in a.pieces])
    assert sum(bits for _, _, bits in pieces) == pytest.approx(b.bits)
    (chips,) = re.findall(
        r'<div class="written">(.*?)</div>', page.scores_view([("a", a), ("b", b)]), re.DOTALL
    )
    assert text_of(chips) == TEXT
    assert [page.gain_color(bits) for bits in (4, 2, 0, -2, -4)] == ["g0", "g1", "g2", "g3", "g4"]


def test_without_a_start_token_the_first_token_is_not_scored(tokenizer):
    model = language_model("gru", BYTES)
    score = score_text(model, "abc")
    row = forward_probabilities(model, ids := model.encode("abc"))
    expected = -sum(math.log2(row[t, ids[t + 1]]) for t in range(2))
    assert (score.bits, score.n_scored) == (pytest.approx(expected, rel=1e-4), 2)
    assert "left out" in page.scores_view([("a", score)])
    first = next(generate(model, ids, GREEDY))
    assert first[0].probability is None
    with pytest.raises(ValueError, match="give it a prompt"):
        next(generate(model, [], GREEDY))


def test_views_explain_what_they_cannot_show(tokenizer):
    interface = pytest.importorskip("hf_genlm.space.files.demo.interface", reason="gradio is missing")
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    mamba = LanguageModel("m", MambaForCausalLM(config).eval(), tokenizer)
    assert "returns neither a recurrent state" in interface.show_layer(mamba, [40], None)
    *_, (history, (text,), _) = interface.continue_text([mamba], "The", GREEDY)
    assert len(history[0]) == len(mamba.encode("The")) + 9
    assert text_of(text) == tokenizer.decode(history[0])
    elman = language_model("elman", tokenizer)
    assert "no forget gate" in interface.show_layer(elman, [40, 41], list_layers(elman)[0].label)
    assert "Write something first" in interface.show_layer(elman, [], list_layers(elman)[0].label)
    assert "no text to measure" in interface.measure([elman], "")
    assert "The first 20,000 characters" in interface.measure([elman], "a b " * 5001)
    *_, (_, (text,), _) = interface.continue_text([elman], "half \ud83d a pair", GREEDY)
    assert text_of(text).startswith("half \ufffd a pair")


def test_two_models_continue_one_prompt_from_the_same_seed(tokenizer):
    interface = pytest.importorskip("hf_genlm.space.files.demo.interface", reason="gradio is missing")
    both = [language_model(kind, tokenizer) for kind in ("gru", "gpt2")]
    *updates, (history, texts, _) = interface.continue_text(both, "The value", SAMPLED)
    for model, tokens, text in zip(both, history, texts, strict=True):
        alone = [
            s.token for step in generate(model, encode_prompt(model, "The value")[0], SAMPLED) for s in step
        ]
        assert tokens == alone
        assert text_of(text) == model.tokenizer.decode(tokens)
    for _, shown, _ in updates:
        assert all(text.startswith(part) for text, part in zip(texts, shown, strict=True))


def saved(folder: Path, kind: str, tokenizer) -> Path:
    module = language_model(kind, tokenizer).module
    module.generation_config.eos_token_id = None  # generates as many tokens as requested
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def front_matter(out: Path) -> dict:
    return yaml.safe_load((out / "README.md").read_text(encoding="utf-8").split("---")[1])


def test_the_folder_is_a_space_and_includes_only_files_that_load_the_models(tokenizer, tmp_path, capsys):
    ours, theirs = saved(tmp_path / "ours", "hybrid", tokenizer), saved(tmp_path / "gpt", "gpt2", tokenizer)
    (ours / "notes.txt").write_text("private")
    (ours / "evil.py").write_text("raise SystemExit")
    (ours / "modeling_genlm.py").write_text("raise SystemExit")
    config = json.loads((ours / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "evil.GenLMConfig"
    (ours / "config.json").write_text(json.dumps(config))
    settings = json.loads((ours / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "evil.Tokenizer"]}
    (ours / "tokenizer_config.json").write_text(json.dumps(settings))
    out = tmp_path / "demo"
    assert main(["space", str(ours), str(theirs), "--out", str(out), "--title", "Two"]) == 0
    printed = capsys.readouterr().out
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert all(f"  {name}\n" in printed for name in files)  # every file that a push sends is listed
    assert not [name for name in files if "evil" in name or "notes" in name or "__pycache__" in name]
    assert {path.name: path.read_bytes() for path in (out / "genlm").iterdir()} == {
        path.name: path.read_bytes() for path in (FILES.parents[1] / "model").glob("*.py")
    }
    assert not list((out / "models").rglob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((out / "models/ours" / name).read_text())
    data = front_matter(out)
    assert (data["sdk"], data["app_file"], data["title"]) == ("gradio", "app.py", "Two")
    pins = dict(line.split("==") for line in (out / "requirements.txt").read_text().split())
    assert pins["gradio"] == data["sdk_version"]
    assert set(pins) == {"gradio", "torch", "transformers"}
    assert "models" not in data
    assert str(tmp_path) not in "".join(path.read_text(errors="replace") for path in out.rglob("*.json"))


def test_the_beginnings_of_the_samples_of_a_run_are_examples(tokenizer, tmp_path):
    run = RunFolder.create(tmp_path / "run")
    run.recipe.write_text(Recipe().to_yaml())
    saved(run.path / "model", "lstm", tokenizer)
    run.samples.write_text(
        f"```text\nold\n```\n\n```text\nOne two {'three ' * 20}\n```\n\n```\n{'名' * 99}\n```\n"
    )
    for own, shown in ((), ["One two three three three three", "名" * 32]), (("mine",), ["mine"]):
        build_space([run.path], tmp_path / f"demo{len(own)}", examples=own)
        assert json.loads((tmp_path / f"demo{len(own)}/space.json").read_text())["examples"] == shown


def test_less_expected_tokens_stand_out_more_in_both_modes():
    style = (FILES / "demo" / "style.css").read_text()
    light, dark = re.findall(r"^(?:\:root, \.light|\.dark) \{(.*?)\}", style, re.DOTALL | re.MULTILINE)
    for block in (light, dark):
        colors = dict(re.findall(r"--(s\d|sheet): #([0-9a-f]{6})", block))
        steps = [luminance(colors[name]) for name in ("sheet", "s1", "s2", "s3", "s4", "s5")]
        assert steps == sorted(steps, reverse=block is light)
    assert "stands out" in (FILES / "demo" / "interface.py").read_text()


HF = str(Path(sys.executable).parent / "hf")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        connect(hub, monkeypatch, tmp_path / "home")
        yield hub


def test_hub_ids_replace_included_files(tokenizer, tmp_path, capsys, hub):
    """The demo names the commit that is there now; later ones, which others may make, are not read."""
    ours = saved(tmp_path / "ours", "gru", tokenizer)
    out = tmp_path / "demo"
    arguments = ["space", str(ours), "--repo-id", "me/model", "--out", str(out)]
    assert main(arguments) == 2
    assert "no config.json of 'me/model' from the Hub; push the model first" in last_line(capsys)
    hub.repos["me/model"] = Repo(private=False)
    commit = hub.repos["me/model"].add({path.name: path.read_bytes() for path in ours.iterdir()})
    assert main(arguments) == 0
    assert front_matter(out)["models"] == ["me/model"]
    assert not (out / "models").exists()
    assert (out / "genlm/modeling_genlm.py").is_file()
    (entry,) = json.loads((out / "space.json").read_text())["models"]
    assert entry == {"name": "ours", "source": "me/model", "revision": commit}
    hub.repos["me/model"].add({"config.json": b"{}"})
    shutil.rmtree(out / "genlm")  # this process has the package
    (model,) = load_models(out)
    assert model.mixers == ["gru", "gru"]
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hf ")]
    assert len(commands) == 2
    for command in commands:
        words = command.split()
        verb = words[1 : 3 if words[1] == "repos" else 2]
        described = subprocess.run([HF, *verb, "--help"], capture_output=True, text=True, check=True).stdout
        assert all(word in described for word in words if word.startswith("--"))


def test_the_config_of_a_hub_model_is_downloaded(tmp_path, monkeypatch, capsys, hub):
    hub.repos["owner/small-gpt"] = Repo(private=False)
    commit = hub.repos["owner/small-gpt"].add({"config.json": b'{"model_type": "gpt2"}'})
    build_space(["owner/small-gpt"], tmp_path / "demo")
    assert not (tmp_path / "demo" / "genlm").exists()
    (entry,) = json.loads((tmp_path / "demo" / "space.json").read_text())["models"]
    assert entry == {"name": "small-gpt", "source": "owner/small-gpt", "revision": commit}
    hub.repos["owner/list"] = Repo(private=False)
    hub.repos["owner/list"].add({"config.json": b"[]"})
    for name, message in (("absent", "no config.json of 'owner/absent'"), ("list", "is damaged")):
        assert main(["space", f"owner/{name}", "--out", str(tmp_path / "x")]) == 2
        assert message in last_line(capsys)


def test_two_models_of_one_name_are_both_included(tokenizer, tmp_path):
    folders = [saved(tmp_path / place / "small model", "gru", tokenizer) for place in "ab"]
    build_space(folders, tmp_path / "demo")
    entries = json.loads((tmp_path / "demo" / "space.json").read_text())["models"]
    assert [entry["name"] for entry in entries] == ["small-model", "small-model-2"]
    assert all((tmp_path / "demo" / entry["source"] / "config.json").is_file() for entry in entries)


def test_run_space_serves_the_app_at_the_port_and_returns_its_exit_code(tmp_path):
    (tmp_path / "app.py").write_text("import os, sys; sys.exit(int(os.environ['GRADIO_SERVER_PORT']) - 7000)")
    assert run_space(tmp_path, 7003) == 3


MISTAKES = {
    "neither out nor run": (["MODEL"], "--out DIR, or run it at once, --run"),
    "port without run": (["MODEL", "--out", "x", "--port", "7000"], "add --run"),
    "three models": (["MODEL", "MODEL", "MODEL", "--out", "x"], "one model or two"),
    "ids for some": (["MODEL", "MODEL", "--out", "x", "--repo-id", "a/b"], "once for each"),
    "no id": (["MODEL", "--out", "x", "--repo-id", "name"], "OWNER/NAME"),
    "folder in use": (["MODEL", "--out", "MODEL"], "already holds files"),
    "no model": (["nowhere", "--out", "x"], "no model at 'nowhere'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_in_one_line(mistake, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "MODEL", "elman", tokenizer)
    arguments, words = MISTAKES[mistake]
    assert main(["space", *arguments]) == 2
    assert words in last_line(capsys)
    assert not Path("x").exists()


@pytest.mark.parametrize("file", sorted(FILES.rglob("*.py")), ids=lambda file: file.name)
def test_the_demo_imports_only_its_requirements(file):
    known = {
        "gradio",
        "starlette",  # gradio is built on it
        "torch",
        "transformers",
        "tokenizers",
        "numpy",
        "PIL",
        "demo",
        *sys.stdlib_module_names,
    }
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= known
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module.split(".")[0] in known


# without this package, like on the Hub
ALONE = (
    "import sys, runpy; sys.modules['hf_genlm'] = None; sys.path.insert(0, '.');"
    "runpy.run_path('app.py', run_name='__main__')"
)


@contextmanager
def served(out: Path):
    """Serve the demo in its own process; yields the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1",
                   "HF_MODULES_CACHE": str(out.parent / "modules")}  # fmt: skip
    log = out.parent / "log.txt"
    with log.open("wb") as file, subprocess.Popen(
        [sys.executable, "-c", ALONE], cwd=out, env=environment, stdout=file, stderr=file
    ) as process:  # fmt: skip
        try:
            for _ in range(1200):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
                    break
                except OSError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


EXAMPLES = ["A <b>first</b> text", "Ein é"]


@pytest.fixture(scope="module")
def address(tokenizer, tmp_path_factory):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[space]'")
    folder = tmp_path_factory.mktemp("space")
    ours, theirs = saved(folder / "ours", "hybrid", tokenizer), saved(folder / "gpt", "gpt2", tokenizer)
    build_space([ours, theirs], folder / "demo", title="Two", examples=EXAMPLES)
    with served(folder / "demo") as url:
        yield url


def test_other_names_uploads_and_files_of_the_machine_are_refused(address):
    port = address.rsplit(":", 1)[1]
    assert exchange(address, "GET", "/config", host=f"localhost:{port}")[0] == 200
    assert exchange(address, "GET", "/config", host="evil.example")[0] == 400
    upload = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n'
        b"Content-Type: text/plain\r\n\r\n" + b"a" * 2**16 + b"\r\n--x--\r\n"
    )
    kind = (f"Content-Length: {len(upload)}", "Content-Type: multipart/form-data; boundary=x")
    assert exchange(address, "POST", "/gradio_api/upload", upload, *kind)[0] == 413
    for path in ("/etc/passwd", "space.json", "app.py", "../../../../etc/passwd", "models/ours/config.json"):
        assert exchange(address, "GET", f"/gradio_api/file={path}")[0] in (403, 404)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def new_page(browser, **options):
    view = browser.new_page(**options)
    view.set_default_timeout(120_000)  # milliseconds: the machine may be busy
    return view


SIZES = {"laptop": (1280, 800), "phone": (390, 844)}


@pytest.mark.parametrize("size", SIZES)
def test_the_page_works_at_every_width(size, browser, address, tokenizer, tmp_path):
    width, height = SIZES[size]
    view = new_page(browser, viewport={"width": width, "height": height}, has_touch=size == "phone")
    said, asked = [], []
    view.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(address)
    view.get_by_role("button", name="Try: A <b>first</b> text").or_(
        view.get_by_text(EXAMPLES[0])
    ).first.click()
    view.wait_for_function(f"document.querySelector('#prompt textarea').value === {json.dumps(EXAMPLES[0])}")
    view.fill("#prompt textarea", "The é 名前\n x")
    view.click("#go")
    view.wait_for_function(
        "document.querySelectorAll('#written-1 .token').length > 18"
        " && document.querySelector('#stop').disabled"
    )
    shown = view.evaluate("document.querySelector('#written-0 .written').textContent")
    assert shown.startswith("The é 名前\n x")
    no_overflow(view)
    view.locator("#written-0 .token").first.click()
    card = view.inner_text("#token-card")
    assert card.startswith("The")
    assert "rank" in card
    box = view.locator("#token-card").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert count_colors(view.screenshot(path=tmp_path / "page.png")) > 50
    view.get_by_role("tab", name="Look inside").click()
    view.wait_for_selector("#inside-0 .heat")
    view.wait_for_selector("#inside-1 .heat")
    no_overflow(view)
    view.get_by_role("tab", name="Measure").click()
    view.fill("#measured textarea", "The value")
    view.click("#measure")
    view.wait_for_selector("#scores .score >> nth=1")
    no_overflow(view)
    assert not said
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)  # no other host
    view.close()


def no_overflow(view) -> None:
    assert view.evaluate("document.documentElement.scrollWidth") <= view.viewport_size["width"]


def count_colors(png: bytes) -> int:
    import io

    from PIL import Image

    return len(Image.open(io.BytesIO(png)).convert("RGB").getcolors(2**24))


# the page presses the button itself, so that a slow test machine does not matter
STOP_SOON = """() => {
  const stop = document.querySelector('#stop');
  const watch = setInterval(() => {
    if (stop.disabled || document.querySelectorAll('#written-0 .token').length < 6) return;
    clearInterval(watch);
    stop.click();
  }, 5);
}"""


def test_the_stop_button_stops_generation(browser, address):
    view = new_page(browser)
    view.goto(address)
    view.get_by_text("Sampling").click()
    length = view.get_by_label("number input for New tokens")
    length.fill("400")
    length.press("Tab")
    view.evaluate(STOP_SOON)
    view.click("#go")
    view.wait_for_selector("#written-0 .token >> nth=5")
    view.wait_for_function("!document.querySelector('#go').disabled")
    view.wait_for_timeout(500)
    count = view.locator("#written-0 .token").count()
    view.wait_for_timeout(700)
    assert view.locator("#written-0 .token").count() == count < 390
    view.close()
