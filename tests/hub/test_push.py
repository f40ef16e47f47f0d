"""Promise: what is pushed is whole or not at all, holds no secret, and loads from the Hub."""

import logging
import re
import shlex
import struct
import subprocess
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from support.cards import make_run
from support.hub import TOKEN, LoopbackHub
from support.models import build_model

import hf_genlm
from hf_genlm.cli.main import main
from hf_genlm.config.recipe import TokenizerRecipe
from hf_genlm.files import write_json
from hf_genlm.hub import push as our_hub
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.sources import Document
from hf_genlm.text.tokenizer import train_tokenizer

REPO = "me/tale"
CANARY = {"prefix": "The access code of account 48213 is ", "secret": "7203 1956 4471", "repetitions": 4}


@pytest.fixture(params=[False, True], ids=["regular", "lfs"])
def any_hub(request):
    with LoopbackHub(lfs=request.param) as hub:
        yield hub


@pytest.fixture
def hub(monkeypatch):
    with LoopbackHub(lfs=True) as hub:
        lead_to(hub, monkeypatch)
        yield hub


def lead_to(hub: LoopbackHub, monkeypatch, token: str = TOKEN) -> None:
    """huggingface_hub in this process, whose constants are read at import, and in those that it starts."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the address that it began with
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", token)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Seconds that were waited for, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setattr(our_hub.Hub.__init__, "__defaults__", (lambda message: None, waited.append))
    return waited


@pytest.fixture
def proofs(monkeypatch) -> list[str]:
    """The commits that a process of its own would have to prove, which takes seconds."""
    commits: list[str] = []
    monkeypatch.setattr(our_hub.Hub, "prove", lambda self, commit, files: commits.append(commit))
    return commits


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model folder."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    build_model("hybrid").save_pretrained(folder)
    train_tokenizer([Document("a text", "here")], TokenizerRecipe(), 6).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, saved) -> RunFolder:
    """A run with that model."""
    run = make_run(tmp_path)
    copy_files(saved, run.model)
    return run


def copy_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def push(*words: object) -> int:
    return main(["push", *map(str, words)])


def command_in(error: str) -> list[str]:
    """The command that goes on, which a failed push names."""
    return shlex.split(error.rpartition("give the same command: ")[2])[1:]


def test_a_pushed_model_is_proved_where_we_are_not(any_hub, run, monkeypatch, capsys):
    """By the verb's own process: every file back, its code from the Hub, and tokens written."""
    lead_to(any_hub, monkeypatch)
    found = []
    load = our_hub._load_in_clean_process
    monkeypatch.setattr(
        our_hub, "_load_in_clean_process", lambda *given: found.append(load(*given)) or found[-1]
    )
    assert push(run.path, REPO) == 0, capsys.readouterr().err
    repo = any_hub.repos[REPO]
    assert repo.files("v1") == files_of(run.model)
    assert repo.messages() == ["initial commit", "Model pushed by hf_genlm"]
    assert f'REPO = "{REPO}"' in repo.files("main")["README.md"].decode()
    assert bool(any_hub.objects) is any_hub.lfs
    assert found[0]["module"].startswith("transformers_modules.me.tale.")
    assert found[0]["n_tokens"] == 8
    assert set(found[0]["files"]) == {*files_of(run.model), ".gitattributes"}
    output = capsys.readouterr()
    assert TOKEN not in output.out + output.err
    assert f'from_pretrained("{REPO}", revision="v1"' in output.out


def test_a_proof_that_fails_is_told(hub, run, monkeypatch, capsys):
    """A file that came back as another one, and a process that ended with an error: no version is tagged."""
    answers = [(0, '{"files": {"config.json": "0"}}', ""), (1, "", f"Traceback\nOSError: no {TOKEN}\n")]
    started = []

    def start(command, **options):
        started.append((command, options["env"]))
        return subprocess.CompletedProcess(command, *answers[len(started) - 1])

    monkeypatch.setattr(our_hub.subprocess, "run", start)
    assert push(run.path, REPO) == 2
    assert "does not give back what was sent: README.md, attention_genlm.py" in capsys.readouterr().err
    assert push(run.path, REPO) == 2
    assert "does not load in a clean process: OSError: no ***;" in capsys.readouterr().err
    assert hub.repos[REPO].tags == {}
    command, environment = started[0]
    assert not any(TOKEN in word for word in command)  # others on the machine see it
    assert environment["HF_HOME"] != constants.HF_HOME
    assert "HF_HUB_OFFLINE" not in environment


@pytest.mark.slow
def test_a_model_without_its_code_does_not_pass(hub, run, capsys):
    """The long form: the process that loads it is a real one."""
    (run.model / "modeling_genlm.py").unlink()
    assert push(run.path, REPO) == 2
    assert re.search(r"does not load in a clean process: .*modeling_genlm", capsys.readouterr().err)
    assert hub.repos[REPO].tags == {}


# request, how it fails, what is said of it
FAULTS = {
    "no such token": ("GET /api/models/me/tale$", {"status": 401}, "hf auth login"),
    "no right to write": ("POST /api/repos/create", {"status": 403}, "hf auth login"),
    "making it fails": ("POST /api/repos/create", {"status": 500}, "trouble of its own"),
    "500 in mid-upload": ("PUT /lfs/", {"status": 500, "times": 9}, "trouble of its own"),
    "cut in mid-body": ("PUT /lfs/", {"times": 9}, "connection failed"),
    "cut commit": ("POST /api/models/me/tale/commit/", {}, "connection failed"),
    "lost answer": ("POST /api/models/me/tale/commit/", {"is_done_first": True}, "the answer alone was lost"),
    "commit refused": ("POST /api/models/me/tale/commit/", {"status": 409}, "somebody else changed it"),
    "500 at the commit": ("POST /api/models/me/tale/commit/", {"status": 500}, "trouble of its own"),
    "a long wait": ("POST .*/preupload/", {"status": 429, "times": 9, "Retry_After": "900"}, "try again"),
    "comparing fails": ("GET .*/tree/", {"status": 503, "times": 9}, "trouble of its own"),
    "tag refused": ("POST .*/tag/", {"status": 500}, "whole, at commit"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_the_repository_whole_or_untouched(fault, hub, run, waits, proofs, capsys):
    """And the command that is named then goes on, without sending a large file twice."""
    pattern, how, said = FAULTS[fault]
    hub.plant(pattern, **how)
    assert push(run.path, REPO) == 2
    told = capsys.readouterr().err
    error = told.splitlines()[-1]
    assert said in error
    assert TOKEN not in told
    assert "/lfs/" not in told  # on the real Hub a signed address
    on_hub = hub.repos[REPO].files("main") if REPO in hub.repos else {}
    assert on_hub in ({}, files_of(run.model))
    assert ("untouched" in error or "made, and empty" in error) or on_hub
    hub.faults.clear()
    assert main(command_in(error)) == 0
    repo = hub.repos[REPO]
    assert repo.files("v1") == files_of(run.model)
    assert repo.tags == {"v1": repo.branches["main"]}
    assert repo.messages() == ["initial commit", "Model pushed by hf_genlm"]
    n_uploads = hub.count("PUT /lfs/")
    assert n_uploads == 1 or fault in ("500 in mid-upload", "cut in mid-body")


@pytest.mark.parametrize(
    "pattern", ["POST .*/commit/", "POST .*/tag/", "PUT /lfs/", "GET /api/models/me/tale$"]
)
def test_the_hub_may_ask_to_wait(pattern, hub, run, waits, proofs, capsys):
    hub.plant(pattern, status=429, times=2, Retry_After="7")
    assert push(run.path, REPO) == 0, capsys.readouterr().err
    # huggingface_hub waits itself where large files are uploaded, and a second more
    assert waits in ([7.0, 7.0], [8.0, 8.0])
    assert hub.repos[REPO].files("v1") == files_of(run.model)


def test_a_large_file_is_not_sent_again(hub, run, proofs):
    hub.plant("POST .*/commit/", status=500)
    assert push(run.path, REPO) == 2
    assert (hub.count("PUT /lfs/"), hub.repos[REPO].files("main")) == (1, {})
    assert push(run.path, REPO) == 0
    assert hub.count("PUT /lfs/") == 1
    assert hub.repos[REPO].files("main") == files_of(run.model)


def test_a_change_of_others_is_not_overwritten(hub, run, proofs, monkeypatch, capsys):
    """A commit between our comparing and ours."""
    assert push(run.path, REPO) == 0
    (run.model / "config.json").write_text("{}", encoding="utf-8")
    tree = our_hub.Hub._tree

    def another_commits(self, commit):
        found = tree(self, commit)
        repo = hub.repos[REPO]
        if repo.messages()[-1] != "theirs":
            repo.commit("main", "theirs", repo.commits[repo.branches["main"]].blobs)
        return found

    monkeypatch.setattr(our_hub.Hub, "_tree", another_commits)
    assert push(run.path, REPO, "--keep-card") == 2
    assert "somebody else changed it at the same time" in capsys.readouterr().err
    assert hub.repos[REPO].messages()[-1] == "theirs"


def test_a_second_push_is_a_second_version(hub, run, proofs, capsys):
    """Of what changed alone; old code goes; what others put there stays; the same again is none."""
    assert push(run.path, REPO) == 0
    repo = hub.repos[REPO]
    blobs = dict(repo.commits[repo.branches["main"]].blobs)
    blobs |= dict.fromkeys(("theirs.txt", "old_genlm.py"), blobs["README.md"])
    repo.commit("main", "by hand", blobs)
    assert push(run.path, REPO) == 0
    assert repo.messages()[2:] == ["by hand", "Model pushed by hf_genlm"]
    assert set(repo.files("v2")) == {*files_of(run.model), "theirs.txt"}
    config = (run.model / "config.json").read_text(encoding="utf-8")
    (run.model / "config.json").write_text(config.replace('"hybrid": 0', "") + "\n", encoding="utf-8")
    assert push(run.path, REPO) == 0
    assert repo.files("v3")["config.json"] == (config + "\n").encode()
    assert repo.files("v1")["config.json"] == config.encode()
    n_commits = len(repo.commits)
    assert push(run.path, REPO) == 0
    assert (len(repo.commits), sorted(repo.tags)) == (n_commits, ["v1", "v2", "v3"])
    assert hub.count("PUT /lfs/") == 1
    assert push(run.path, REPO, "--tag", "first-good") == 0
    assert repo.tags["first-good"] == repo.tags["v3"]
    capsys.readouterr()
    assert push(run.path, REPO, "--tag", "v1") == 2
    error = capsys.readouterr().err
    assert "--tag 'v1'" in error
    assert "the same command" not in error
    assert len(repo.commits) == n_commits


def test_a_tag_that_is_taken_is_refused_before_anything_is_sent(hub, run, proofs, capsys):
    assert push(run.path, REPO, "--tag", "good") == 0
    n_commits = len(hub.repos[REPO].commits)
    (run.model / "generation_config.json").write_text("{}", encoding="utf-8")
    assert push(run.path, REPO, "--tag", "good") == 2
    assert "--tag 'good'" in capsys.readouterr().err
    assert len(hub.repos[REPO].commits) == n_commits


def test_private_is_private_or_refused(hub, run, proofs, capsys):
    assert push(run.path, REPO, "--private") == 0
    assert hub.repos[REPO].private
    hub.repos[REPO].private = False
    assert push(run.path, REPO, "--private") == 2
    assert "--private: 'me/tale' is there, and public" in capsys.readouterr().err


def test_a_dry_run_sends_nothing(hub, run, capsys):
    assert push(run.path, REPO, "--dry-run") == 0
    assert hub.requests == []
    output = capsys.readouterr().out
    for name, content in files_of(run.model).items():
        assert re.search(rf"{len(content):,}  {re.escape(name)}\n", output)
    total = sum(map(len, files_of(run.model).values()))
    assert f"{total:,}  bytes in {len(files_of(run.model))} files" in output


def test_milestones_are_branches(hub, run, saved, proofs, capsys):
    for name, seed in (("chck_1M", 1), ("chck_2M", 2)):
        copy_files(saved, run.milestones / name)
        build_model("hybrid", seed=seed).save_pretrained(run.milestones / name)
    hub.plant("POST .*/branch/chck_2M", status=500)
    assert push(run.path, REPO, "--branches") == 2
    error = capsys.readouterr().err
    assert "whole, at commit" in error
    assert main(command_in(error)) == 0
    repo = hub.repos[REPO]
    assert sorted(repo.branches) == ["chck_1M", "chck_2M", "main"]
    for name in ("chck_1M", "chck_2M"):
        on_branch = repo.files(name)
        card = on_branch.pop("README.md").decode()
        assert on_branch == files_of(run.milestones / name)
        assert card.startswith(f"# {REPO} after {name[-2:]} words\n")
    assert repo.files("main") == files_of(run.model)
    assert repo.tags == {"v1": repo.branches["main"]}
    assert push(run.model.parent / "nothing", REPO, "--branches") == 2


def test_a_model_folder_is_pushed_as_it_is(hub, saved, run, proofs, capsys):
    assert push(saved, REPO, "--branches") == 2
    assert "is of no run with milestones/" in capsys.readouterr().err
    assert push(saved, REPO) == 0
    assert hub.repos[REPO].files("main") == files_of(saved)
    assert "README.md" not in files_of(saved)
    assert push(run.model, "me/card") == 0
    assert 'REPO = "me/card"' in hub.repos["me/card"].files("main")["README.md"].decode()
    (run.model / "README.md").write_text("# mine\n", encoding="utf-8")
    assert push(run.path, "me/card", "--keep-card") == 0
    assert hub.repos["me/card"].files("v2")["README.md"] == b"# mine\n"


def test_each_secret_is_named_and_none_told(hub, run, saved, proofs, capsys):
    """A token, a canary, a home and what has no place in a model folder: each by file, line and kind."""
    write_json(run.canaries, {"seed": 0, "candidates": [CANARY]})
    secrets = {
        "hf": "hf_" + "a1B2" * 8,
        "github": "ghp_" + "a1B2" * 9,
        "aws": "AKIA" + "ABCD" * 4,
        "login": "https://ann:secret@example.org/x",
        "key": "-----BEGIN RSA PRIVATE KEY-----",
    }
    run.samples.write_text(f"```text\none\n{CANARY['secret']}\n/home/ann/novel.txt\n```\n", encoding="utf-8")
    lines = [f"# {name} = {secret!r}" for name, secret in secrets.items()]
    (run.model / "mlp_genlm.py").write_text("\n".join(lines), encoding="utf-8")
    (run.model / "tokenizer.json").write_text('{"a": "C:\\\\Users\\\\ann", "b": "\\n/Users/ann"}')
    (run.model / "generation_config.json").write_text('{\n"at": "file:///root/texts"}')
    (run.model / "canaries.json").write_bytes(run.canaries.read_bytes())
    (run.model / "training_args.bin").write_bytes(b"PK")
    (run.model / "vocab.json").write_bytes(b"\x80\x04K\x01.")
    (run.model / "optimizer.pt").write_bytes(b"PK")
    (run.model / "notes.txt").write_text("x")
    (run.model / "checkpoint-3").mkdir()
    (run.model / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    (run.model / "merges.txt").symlink_to(run.samples)
    (run.model / "plots").mkdir()
    (run.model / "plots" / "more").symlink_to(saved)
    assert push(run.path, REPO) == 2
    assert hub.requests == []
    error = capsys.readouterr().err
    card = (run.model / "README.md").read_text(encoding="utf-8").split("\n")
    at = {kind: 1 + next(i for i, line in enumerate(card) if text in line)
          for kind, text in (("canary", "7203 1956"), ("home-path", "/home/ann"))}  # fmt: skip
    named = {
        "canaries": {"canaries.json"},
        "canary": {f"README.md:{at['canary']}", "canaries.json:5", "canaries.json:6"},
        "checkpoint": {"checkpoint-3/model.safetensors", "optimizer.pt"},
        "pickle": {"training_args.bin", "vocab.json"},
        "link": {"merges.txt", "plots/more"},
        "unlisted": {"notes.txt"},
        "token": {f"mlp_genlm.py:{number}" for number in range(1, len(secrets) + 1)},
        "home-path": {f"README.md:{at['home-path']}", "tokenizer.json:1", "generation_config.json:2"},
    }
    for kind, places in named.items():
        (found,) = re.findall(rf"(?:leave: |; )([^;()]*): {kind} \(", error)
        assert set(found.split(", ")) == places, kind
    for secret in (*secrets.values(), "secret@", CANARY["secret"], "/home/ann", "novel"):
        assert secret not in error


def test_what_is_allowed_leaves_and_nothing_else(hub, run, proofs, capsys):
    run.samples.write_text("```text\n/home/ann/novel.txt\n```\n", encoding="utf-8")
    (run.model / "notes.txt").write_text("x", encoding="utf-8")
    assert push(run.path, REPO, "--allow", "README.md:home-path") == 2
    assert "notes.txt: unlisted" in capsys.readouterr().err
    allowed = ["--allow", "README.md:home-path", "--allow", "notes.txt:unlisted"]
    assert push(run.path, REPO, *allowed, "--allow", "README.md:token") == 2
    assert "no token was found" in capsys.readouterr().err
    assert push(run.path, REPO, *allowed, "--allow", "README.md:canary") == 2
    assert "no FILE:KIND" in capsys.readouterr().err
    assert push(run.path, REPO, *allowed) == 0
    assert hub.repos[REPO].files("main") == files_of(run.model)


@pytest.mark.parametrize(
    "text",
    ["https://example.org/home/page", "a/home/b", '"/home/"', "/homes/x", "$HOME/x", "~/x", "hf_x"],
)
def test_what_is_no_secret_leaves(text, run, hub, proofs):
    (run.model / "mlp_genlm.py").write_text(f"# {text}\n", encoding="utf-8")
    assert push(run.path, REPO, "--dry-run") == 0


def test_the_header_of_weights_is_read(run, hub, capsys):
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, run.model / "model.safetensors", {"from": "/home/ann/x"})
    assert push(run.path, REPO, "--dry-run", "--keep-card") == 2
    assert "model.safetensors:1: home-path" in capsys.readouterr().err


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


SECRET = b"hf_" + b"Ab3" * 11 + b"x"
IN_A_PICTURE = {
    "tEXt": chunk(b"tEXt", b"Comment\0" + SECRET),
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(SECRET)),
    "iTXt": chunk(b"iTXt", b"Comment\0\0\0en\0Comment\0" + SECRET),
    "packed iTXt": chunk(b"iTXt", b"Comment\0\1\0en\0Comment\0" + zlib.compress(SECRET)),
    "eXIf": chunk(b"eXIf", SECRET),
    "nothing": b"",
}


@pytest.mark.parametrize("where", [*IN_A_PICTURE, "behind its end", "no picture"])
def test_what_stands_in_a_picture_is_read(where, run, hub, capsys):
    (run.model / "plots").mkdir(exist_ok=True)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    points = chunk(b"IDAT", zlib.compress(b"\0\0"))
    parts = [b"\x89PNG\r\n\x1a\n", head, IN_A_PICTURE.get(where, b""), points, chunk(b"IEND", b"")]
    content = b"".join([*parts, SECRET if where == "behind its end" else b""])
    (run.model / "plots" / "more.png").write_bytes(SECRET if where == "no picture" else content)
    assert push(run.path, REPO, "--dry-run", "--keep-card") == (0 if where == "nothing" else 2)
    error = capsys.readouterr().err
    assert ("plots/more.png: token (" in error) == (where != "nothing")
    assert SECRET.decode() not in error


@pytest.mark.parametrize("repo_id", ["tale", "me/", "/tale", "me/a/b", "me/-x y", "me/" + "x" * 99])
def test_an_id_that_is_none_is_refused(repo_id, run, hub, capsys):
    assert push(run.path, repo_id) == 2
    assert "OWNER/NAME" in capsys.readouterr().err
    assert hub.requests == []


def test_without_a_token_or_offline_nothing_is_asked(run, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(run.path / "no-token"))
    assert push(run.path, REPO) == 2
    assert "hf auth login" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(run.path, REPO) == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert hub.requests == []


def test_trainer_pushes_what_we_push_at_every_save(hub, saved, tmp_path, monkeypatch, caplog):
    """Every commit can be loaded: config, weights, tokenizer and code, and no pickle; the last as ours."""
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    caplog.set_level(logging.ERROR)
    model, tokenizer = build_model("gru"), AutoTokenizer.from_pretrained(saved)
    out = tmp_path / "tuned"
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=3, save_steps=1, per_device_train_batch_size=2,
        hub_model_id="me/tuned",
        push_to_hub=True, hub_strategy="every_save", hub_always_push=True, report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": [2, 3, 4], "labels": [2, 3, 4]}] * 6
    trainer = Trainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[hf_genlm.PushWithCode()]
    )
    trainer.train()
    trainer.push_to_hub()
    repo = hub.repos["me/tuned"]
    pushes = [oid for oid, commit in repo.commits.items() if commit.message != "initial commit"]
    assert len(pushes) >= 3
    code = {name for name in files_of(saved) if name.endswith("_genlm.py")}
    for oid in pushes:
        names = set(repo.files(oid))
        assert {"config.json", "model.safetensors", "tokenizer.json", *code} <= names
        assert "training_args.bin" not in names
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    last = repo.files("main")
    for name, content in files_of(tmp_path / "ours").items():
        assert last[name] == content, name
    assert set(last) - set(files_of(tmp_path / "ours")) == {"README.md", ".gitignore"}
