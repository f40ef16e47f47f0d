"""Promise: code of others is run by no verb, whatever a model on the Hub or in a folder says of itself."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from support.command_line import last_line
from support.hub import TOKEN, LoopbackHub, Repo, connect
from support.models import build_model

from hf_genlm.cli.main import main
from hf_genlm.config.recipe import TokenizerRecipe
from hf_genlm.errors import UserError
from hf_genlm.hub.push import load_in_clean_process, push
from hf_genlm.loading import source_of
from hf_genlm.text.store import Document
from hf_genlm.text.tokenizer import train_tokenizer

TEXT = "a line of words, and one more line of them\n" * 300


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, bytes]:
    """Files of a sound model."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = train_tokenizer([Document(TEXT, "x")], TokenizerRecipe(), len(TEXT))
    build_model(
        ["gru"], vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=1
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def marker(tmp_path) -> Path:
    """Where code that runs writes the access token that it finds."""
    return tmp_path / "marker"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        connect(hub, monkeypatch, tmp_path / "home")
        yield hub


def armed(saved: dict[str, bytes], marker: Path) -> dict[str, bytes]:
    """The model with code in every place where transformers looks for some."""
    code = (
        f"import os\nfor name, value in os.environ.items():\n"
        f"    if 'TOKEN' in name: open({str(marker)!r}, 'a').write(name + value)\n"
        f"open({str(marker)!r}, 'a').write('ran with ' + os.path.expanduser('~'))\n"
    ).encode()
    files = {name: code + content if name.endswith(".py") else content for name, content in saved.items()}
    files |= {"evil.py": code, "custom_generate/generate.py": code, "sitecustomize.py": code}
    files |= {"handler.py": code, "setup.py": code}
    classes = dict.fromkeys(("AutoConfig", "AutoProcessor", "AutoImageProcessor"), "evil.X")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json",
                 "preprocessor_config.json"):  # fmt: skip
        content = json.loads(files.get(name, b"{}"))
        content["auto_map"] = {**content.get("auto_map", {}), **classes, "AutoTokenizer": [None, "evil.X"]}
        if name == "config.json":
            content["auto_map"] |= {"AutoConfig": "configuration_genlm.GenLMConfig"}
            content["custom_pipelines"] = {
                "text-generation": {"impl": "evil.X", "pt": ["AutoModelForCausalLM"]}
            }
            content["trust_remote_code"] = True
        files[name] = json.dumps(content).encode()
    return files


def publish(hub: LoopbackHub, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
    hub.repos[repo_id] = Repo(private=private)
    return hub.repos[repo_id].add(files)


AUDIT = ["--trained-on", "text", "--held-out", "other", "--attacks", "membership", "--out", "audit"]
VERBS = {
    "generate": ["generate", "MODEL", "a", "--max-new-tokens", "2"],
    "evaluate": ["evaluate", "MODEL", "text.txt"],
    "evaluate of pairs": ["evaluate", "MODEL", "--pairs", "pairs.jsonl"],
    "audit": ["audit", "MODEL", *AUDIT],
    "audit against": ["audit", "plain", "--reference", "MODEL", *AUDIT],
    "extend": ["extend", "MODEL", "new.txt", "--vocab-size", "+3", "--out", "more"],
    "export": ["export", "MODEL", "--to", "llama", "--out", "llama"],
    "train --from": ["train", "text.txt", "--from", "MODEL", "--out", "run", "--steps", "1"],
    "compare": ["compare", "text.txt", "--recipes", "from.yaml", "--steps", "1", "--out", "both"],
    "space": ["space", "MODEL", "--out", "demo"],
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch, saved) -> Path:
    """The files that the verbs name."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    Path("new.txt").write_text("entirely unknown, undoubtedly new: quaint zebras, jumping quickly " * 50)
    for name in ("text", "other"):
        Path(name).mkdir()
        for number in range(25):
            Path(name, f"{number}.txt").write_text(f"{name} {number} is a line of words. " * 20)
    Path("pairs.jsonl").write_text('{"sentence_good": "a b", "sentence_bad": "b a", "UID": "x"}\n')
    Path("plain").mkdir()
    for name, content in saved.items():
        Path("plain", name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("where", ["hub", "folder"])
@pytest.mark.parametrize("kind", ["our kind", "a kind of its own"])
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_runs_code_of_others(verb, kind, where, hub, place, saved, marker, capsys):
    files = armed(saved, marker)
    if kind != "our kind":
        config = json.loads(files["config.json"]) | {"model_type": "evil", "architectures": ["Evil"]}
        files["config.json"] = json.dumps(config).encode()
    publish(hub, "evil/tale", files)
    for name, content in files.items():
        path = place / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    model = "evil/tale" if where == "hub" else "local"
    Path("from.yaml").write_text(f"model: {{init_from: {model}}}\n")
    words = [word.replace("MODEL", model) for word in VERBS[verb]]
    code = main(words)
    error = capsys.readouterr().err
    assert code in (0, 2)
    assert code == 0 or "hf-genlm: " in error.splitlines()[-1], error
    assert "Traceback" not in error
    assert not marker.exists()
    if kind == "our kind" and verb not in ("export", "train --from", "compare"):
        assert code == 0, error


def in_new_process(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


# without this package, as on the Hub
OPEN_DEMOS = """
import os, sys; sys.modules['hf_genlm'] = None
from pathlib import Path
import transformers.generation, transformers.masking_utils, transformers.modeling_utils  # once for all
for folder in sys.argv[1:]:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    os.chdir(folder); sys.path.insert(0, '.')
    from demo.models import load_models
    (model,) = load_models(Path('.'))
    written = model.module.generate(model.tensor([2, 3]), max_new_tokens=3)
    print(type(model.module).__module__, written.shape)
    break
"""


def test_a_demo_runs_no_code_of_the_hub(hub, place, saved, marker):
    """A stranger's config says genlm, and after the demo was built, the repository changes."""
    files = armed(saved, marker)
    publish(hub, "evil/tale", files)
    for name, content in files.items():
        path = place / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    demos = {"evil/tale": "demo-of-hub", "local": "demo-of-folder"}
    for model, out in demos.items():
        assert main(["space", model, "--out", out]) == 0
    hub.repos["evil/tale"].add({**files, "config.json": b'{"model_type": "other"}'})
    done = in_new_process(OPEN_DEMOS, place, *demos.values())
    assert done.returncode == 0, done.stderr[-2000:]
    opened = [line.split()[0] for line in done.stdout.splitlines()]
    assert opened == ["genlm.modeling_genlm"] * 2, done.stderr[-2000:]
    assert not marker.exists()
    for out in demos.values():
        code = {path.name for path in (place / out).rglob("*.py")}
        assert code.isdisjoint({"evil.py", "generate.py", "handler.py"})


def test_a_push_of_code_of_others_is_refused_before_it_runs(hub, place, saved, marker, capsys):
    for name, content in armed(saved, marker).items():
        path = place / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert main(["push", "local", "me/tale"]) == 2
    error = last_line(capsys)
    for name in ("modeling_genlm.py", "evil.py", "custom_generate/generate.py", "tokenizer_config.json"):
        assert name in error.partition(": code (")[0]
    assert hub.requests == []
    assert not marker.exists()


@pytest.mark.parametrize("private", [False, True], ids=["public", "private"])
def test_the_proof_of_a_push_has_no_token(private, hub, place, saved, marker, monkeypatch):
    """Code that was allowed by name runs there: it is real code, and finds neither token nor home."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "secret-of-another-service")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
    files = dict(saved)
    files["modeling_genlm.py"] = armed(saved, marker)["modeling_genlm.py"]
    for name, content in files.items():
        Path("plain", name).write_bytes(content)
    with pytest.raises(UserError, match=r"modeling_genlm\.py: code"):
        push("plain", "me/tale", private=private)
    push("plain", "me/tale", private=private, allow=["modeling_genlm.py:code"])
    assert hub.repos["me/tale"].private is private
    ran = marker.read_text()
    assert "ran with" in ran  # so the proof is one
    assert TOKEN not in ran
    assert "TOKEN" not in ran
    assert os.path.expanduser("~") not in ran.split()
    assert hub.repos["me/tale"].tags


def test_the_proof_names_the_commit(hub, place, saved, marker, tmp_path):
    """Somebody else pushes code in between."""
    commit = publish(hub, "me/tale", saved)
    hub.repos["me/tale"].add(armed(saved, marker))
    (tmp_path / "other").mkdir(exist_ok=True)
    load_in_clean_process("me/tale", commit, tmp_path / "other", hub.url)
    assert not marker.exists()


def test_an_adapter_leads_to_no_other_model(hub, place, saved):
    """Neither alone nor beside a model; its `base_model_name_or_path` is read by PEFT otherwise."""
    adapter = {"adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "evil/base"}',
               "adapter_model.safetensors": saved["model.safetensors"]}  # fmt: skip
    publish(hub, "evil/adapter", adapter)
    publish(hub, "evil/both", {**saved, **adapter})
    Path("plain", "adapter_config.json").write_bytes(adapter["adapter_config.json"])
    for name in ("evil/adapter", "evil/both", "plain"):
        with pytest.raises(UserError, match=r"adapter_config\.json, which names another model"):
            source_of(name)
    assert not hub.count(".*evil/base")
    shutil.rmtree("home")
    publish(hub, "me/tale", saved)
    assert source_of("me/tale") == "me/tale"


@pytest.mark.slow
def test_a_server_runs_no_code_of_others(hub, place, saved, marker):
    from hf_genlm.serving import background_server

    publish(hub, "evil/tale", armed(saved, marker))
    with contextlib.suppress(UserError), background_server("evil/tale") as url:  # refused, or served
        body = {"model": "evil/tale", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=120).read()
    assert hub.count("(GET|HEAD) /evil/tale/resolve/")
    assert not marker.exists()
