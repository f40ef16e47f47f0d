"""Promise: a push is complete or changes nothing, publishes no secret, and loads from the Hub."""

import logging
import re
import struct
import subprocess
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from support.cards import make_run
from support.hub import TOKEN, LoopbackHub, connect
from support.models import build_model

import hf_genlm
from hf_genlm.cli.main import main
from hf_genlm.config.recipe import TokenizerRecipe
from hf_genlm.errors import UserError
from hf_genlm.files import write_json
from hf_genlm.hub.manifest import ModelSource, build_manifest, check_findings
from hf_genlm.hub.push import PushFailed, PushResult, load_in_clean_process, push
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.store import Document
from hf_genlm.text.tokenizer import train_tokenizer

REPO = "me/tale"
CANARY = {"prefix": "The access code of account 48213 is ", "secret": "7203 1956 4471", "repetitions": 4}


@pytest.fixture(params=[False, True], ids=["regular", "lfs"])
def any_hub(request, monkeypatch):
    with LoopbackHub(lfs=request.param) as hub:
        connect(hub, monkeypatch)
        yield hub


@pytest.fixture
def hub(monkeypatch):
    with LoopbackHub(lfs=True) as hub:
        connect(hub, monkeypatch)
        yield hub


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Seconds that huggingface_hub would have waited."""
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=waited.append))
    return waited


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


@pytest.fixture
def folder(tmp_path, saved) -> Path:
    """A copy of that model folder, without a run."""
    copy_files(saved, tmp_path / "folder")
    return tmp_path / "folder"


def copy_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def publish(model: RunFolder | Path, repo_id: str = REPO, waited: list[float] | None = None, **options):
    """Push without the clean process, which takes seconds, and without waiting."""
    sleep = ([] if waited is None else waited).append
    path = model.path if isinstance(model, RunFolder) else model
    return push(path, repo_id, sleep=sleep, check_load=lambda *given: None, **options)


def findings_of(folder: Path) -> list[str]:
    """`file:line kind` of each finding in a model folder."""
    return [f"{found} {found.kind}" for found in build_manifest(ModelSource(folder)).findings]


def test_the_command_publishes_a_model_that_loads_in_a_clean_process(hub, run, capsys):
    arguments = ["push", str(run.path), REPO]
    hub.plant("POST .*/commit/", status=500)
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith(f"push again to resume: hf-genlm {' '.join(arguments)}\n")
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert TOKEN not in output.out + output.err
    commit = hub.repos[REPO].branches["main"]
    revision = hub.repos[REPO].commits[commit].parent
    assert f"commit: {commit}\ntag:    v1\ncard:   its example loads {revision}\n" in output.out
    assert f'from_pretrained("{REPO}", revision="v1", trust_remote_code=True)' in output.out
    assert hub.count(f"(GET|HEAD) /{REPO}/resolve/{revision}/generation_config.json")  # the process asked


def test_the_command_lists_the_files_and_a_dry_run_sends_nothing(hub, run, capsys):
    assert main(["push", str(run.path), REPO, "--dry-run"]) == 0
    assert hub.requests == []
    output = capsys.readouterr().out
    for name, content in files_of(run.model).items():
        assert re.search(rf"{len(content):,}  {re.escape(name)}\n", output)
    total = sum(map(len, files_of(run.model).values()))
    assert f"{total:,}  bytes in {len(files_of(run.model))} files" in output


PUSHED = ["Model pushed by hf_genlm", "Model card names the commit of the weights"]


def pin_of(card: bytes) -> str:
    """What the card's example loads."""
    (revision,) = re.findall(r'^REVISION = "(.*?)"', card.decode(), flags=re.M)
    return revision


def test_the_repository_holds_the_folder_and_its_card_names_the_commit(any_hub, run, capsys):
    heard = []
    result = publish(run, listener=lambda event, fields: heard.append(event))
    repo = any_hub.repos[REPO]
    assert repo.files("v1") == files_of(run.model)
    assert repo.messages() == ["initial commit", *PUSHED]
    first = repo.commits[repo.branches["main"]].parent
    assert pin_of(repo.files("main")["README.md"]) == first
    assert pin_of(repo.files(first).pop("README.md")) == "main"
    same = [{n: c for n, c in repo.files(oid).items() if n != "README.md"} for oid in (first, "main")]
    assert same[0] == same[1]
    assert f'REPO = "{REPO}"' in repo.files("main")["README.md"].decode()
    assert bool(any_hub.objects) is any_hub.lfs
    (manifest,) = result.manifests
    assert manifest.sizes == {name: len(content) for name, content in files_of(run.model).items()}
    commit = repo.branches["main"]
    assert result == PushResult(REPO, [manifest], f"{any_hub.url}/{REPO}", commit, "v1", revision=first)
    assert heard[:2] == ["manifest", "progress"]
    assert capsys.readouterr() == ("", "")  # a service prints nothing


def test_a_hub_that_returns_other_bytes_fails_the_push(any_hub, run):
    """They have the length of those that were sent."""
    any_hub.returns_other_bytes = True
    names = ", ".join(["README.md", *sorted(files_of(run.model))])
    with pytest.raises(PushFailed, match=f"returns other content than was sent: {re.escape(names)};"):
        publish(run)
    assert any_hub.repos[REPO].tags == {}
    any_hub.returns_other_bytes = False
    publish(run)
    assert list(any_hub.repos[REPO].tags) == ["v1"]


def test_other_bytes_of_a_milestone_fail_the_push_too(hub, run, saved):
    """Its other files are those of the model, and are not downloaded again."""
    copy_files(saved, run.milestones / "chck_1M")
    hub.before["POST .*/branch/chck_1M"] = lambda: setattr(hub, "returns_other_bytes", True)
    with pytest.raises(PushFailed, match=r"returns other content than was sent: README\.md;"):
        publish(run, branches=True)


def test_a_failed_load_leaves_no_tag(hub, run, monkeypatch, tmp_path):
    """The error is the last line of the process; its command, which others can see, holds no token."""
    started = []

    def start(command, **options):
        started.append((command, options["env"]))
        return subprocess.CompletedProcess(command, 1, "", f"Traceback\nOSError: no {TOKEN}\n")

    monkeypatch.setattr("subprocess.run", start)
    with pytest.raises(PushFailed, match=r"does not load in a clean process: OSError: no \*\*\*;"):
        push(run.path, REPO)
    assert hub.repos[REPO].tags == {}
    ((command, environment),) = started
    assert not any(TOKEN in word for word in command)
    assert environment["HF_HOME"] != constants.HF_HOME
    assert "HF_HUB_OFFLINE" not in environment


@pytest.mark.slow
@pytest.mark.parametrize("code", [None, "import hf_genlm\n"], ids=["without its code", "needs the package"])
def test_a_model_that_needs_more_than_its_folder_does_not_load(code, hub, folder, tmp_path):
    """Checked by a real process."""
    path = folder / "modeling_genlm.py"
    if code is None:
        path.unlink()
    else:
        path.write_text(code + path.read_text(encoding="utf-8"), encoding="utf-8")
    commit = publish(folder, allow=[] if code is None else ["modeling_genlm.py:code"]).commit
    with pytest.raises(PushFailed, match=r"does not load in a clean process: .*genlm"):
        load_in_clean_process(REPO, commit, tmp_path, hub.url)


# request, fault, part of the error
FAULTS = {
    "no such token": ("GET /api/models/me/tale$", {"status": 401}, "hf auth login"),
    "no right to write": ("POST /api/repos/create", {"status": 403}, "hf auth login"),
    "creating it fails": ("POST /api/repos/create", {"status": 500}, "server error"),
    "500 during the upload": ("PUT /lfs/", {"status": 500, "times": 9}, "server error"),
    "cut within a body": ("PUT /lfs/", {"times": 9}, "connection failed"),
    "cut commit": ("POST /api/models/me/tale/commit/", {}, "connection failed"),
    "lost answer": ("POST /api/models/me/tale/commit/", {"is_done_first": True}, "only the answer was lost"),
    "commit refused": ("POST /api/models/me/tale/commit/", {"status": 409}, "somebody else changed it"),
    "500 at the commit": ("POST /api/models/me/tale/commit/", {"status": 500}, "server error"),
    "a long wait": ("POST .*/preupload/", {"status": 429, "times": 9, "Retry_After": "900"}, "in 900 s"),
    "listing fails": ("GET .*/tree/", {"status": 503, "times": 9}, "complete at commit"),
    "reading back fails": ("(GET|HEAD) .*/resolve/", {"status": 503, "times": 999}, "complete at commit"),
    "tag refused": ("POST .*/tag/", {"status": 500}, "complete at commit"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_the_repository_complete_or_unchanged(fault, hub, run, waits):
    """The same push then resumes, and sends no large file twice."""
    pattern, how, reason = FAULTS[fault]
    hub.plant(pattern, **how)
    heard = []
    with pytest.raises(PushFailed, match=reason) as failure:
        publish(run, listener=lambda event, fields: heard.append(str(fields)))
    said = f"{failure.value} {heard}"
    assert TOKEN not in said
    assert "/lfs/" not in said  # on the real Hub a signed address
    assert "push again to resume" in said
    on_hub = hub.repos[REPO].files("main") if REPO in hub.repos else {}
    assert on_hub in ({}, files_of(run.model))
    assert re.search("repository is (unchanged|created and empty)", said) or on_hub
    hub.faults.clear()
    publish(run)
    repo = hub.repos[REPO]
    assert repo.files("v1") == files_of(run.model)
    assert repo.tags == {"v1": repo.branches["main"]}
    assert repo.messages() == ["initial commit", *PUSHED]
    n_uploads = hub.count("PUT /lfs/")
    assert n_uploads == 1 or fault in ("500 during the upload", "cut within a body")


@pytest.mark.parametrize(
    "pattern", ["POST .*/commit/", "POST .*/tag/", "PUT /lfs/", "GET /api/models/me/tale$"]
)
def test_a_push_waits_as_long_as_the_hub_asks(pattern, hub, run, waits):
    hub.plant(pattern, status=429, times=2, Retry_After="7")
    publish(run, waited=waits)
    # huggingface_hub waits itself while it uploads large files, and a second longer
    assert waits in ([7.0, 7.0], [8.0, 8.0])
    assert hub.repos[REPO].files("v1") == files_of(run.model)


def test_a_commit_of_somebody_else_is_not_overwritten(hub, run):
    publish(run)
    (run.model / "config.json").write_text("{}", encoding="utf-8")
    repo = hub.repos[REPO]
    hub.before["POST .*/commit/"] = lambda: repo.commit(
        "main", "theirs", repo.commits[repo.branches["main"]].blobs
    )
    with pytest.raises(PushFailed, match="somebody else changed it at the same time"):
        publish(run, keep_card=True)
    assert repo.messages()[-1] == "theirs"


def test_a_second_push_sends_the_changes_as_a_second_version(hub, run):
    """Stale code is deleted, files of others stay, and an unchanged folder makes no commit."""
    publish(run)
    repo = hub.repos[REPO]
    blobs = dict(repo.commits[repo.branches["main"]].blobs)
    blobs |= dict.fromkeys(("theirs.txt", "old_genlm.py"), blobs["README.md"])
    repo.commit("main", "by hand", blobs)
    assert publish(run).tag == "v2"
    assert repo.messages()[3:] == ["by hand", *PUSHED]
    assert set(repo.files("v2")) == {*files_of(run.model), "theirs.txt"}
    n_commits = len(repo.commits)
    for name in ("custom_generate/generate.py", "evil.py"):  # `from_pretrained` would run it
        head = repo.commits[repo.branches["main"]].blobs
        oid = repo.commit("main", "code", {**head, name: head["README.md"]})
        with pytest.raises(
            UserError, match=rf"holds code that is not of this push: {re.escape(name)}: remove"
        ):
            publish(run)
        repo.branches["main"] = repo.commits[oid].parent
        del repo.commits[oid]
    assert len(repo.commits) == n_commits
    config = (run.model / "config.json").read_text(encoding="utf-8")
    (run.model / "config.json").write_text(config + "\n", encoding="utf-8")
    assert publish(run).tag == "v3"
    assert repo.files("v3")["config.json"] == (config + "\n").encode()
    assert repo.files("v1")["config.json"] == config.encode()
    n_commits = len(repo.commits)
    assert publish(run).tag == "v3"
    assert (len(repo.commits), sorted(repo.tags)) == (n_commits, ["v1", "v2", "v3"])
    assert hub.count("PUT /lfs/") == 1
    assert publish(run, tag="first-good").commit == repo.tags["v3"]
    assert repo.tags["first-good"] == repo.tags["v3"]


def test_a_tag_of_another_version_is_refused_before_anything_is_sent(hub, run):
    publish(run)
    publish(run, tag="good")
    assert publish(run, tag="good").tag == "good"  # the same files: nothing to do
    (run.model / "generation_config.json").write_text("{}", encoding="utf-8")
    repo = hub.repos[REPO]
    n_commits = len(repo.commits)
    with pytest.raises(UserError, match="--tag 'good'") as refusal:
        publish(run, tag="good")
    assert not isinstance(refusal.value, PushFailed)
    assert len(repo.commits) == n_commits
    assert publish(run).tag == "v2"
    n_commits = len(repo.commits)
    (run.model / "generation_config.json").write_bytes(repo.files("v1")["generation_config.json"])
    with pytest.raises(UserError, match="--tag 'v1'"):  # the same files, but main has others since
        publish(run, tag="v1")
    assert len(repo.commits) == n_commits


def test_a_full_disk_while_reading_back_is_explained(hub, run, monkeypatch):
    def fill_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.HfApi.snapshot_download", fill_disk)
    with pytest.raises(PushFailed, match=r"No space left on device; the repository is complete at commit"):
        publish(run)


# fault between the commit of the weights and the one of the card, or at it -> what the card then says
BETWEEN = {
    "the load fails": (None, "main"),
    "the commit fails": ({"pattern": "POST .*/commit/", "status": 500}, "main"),
    "its answer is lost": ({"pattern": "POST .*/commit/", "is_done_first": True}, "the commit"),
    "somebody else pushes": ("theirs", "main"),
}


@pytest.mark.parametrize("fault", BETWEEN)
def test_a_push_interrupted_before_its_card_is_true_and_resumed(fault, hub, run):
    how, said = BETWEEN[fault]
    asked = []

    def interrupt(repo_id, commit, *rest):
        asked.append(commit)
        repo = hub.repos[REPO]
        if how is None:
            raise PushFailed("it does not load")
        if how == "theirs":
            blobs = repo.commits[commit].blobs
            repo.commit("main", "theirs", {**blobs, "config.json": blobs["README.md"]})
        else:
            hub.plant(**how)

    with pytest.raises(PushFailed, match=r"complete at commit|does not load"):
        push(run.path, REPO, sleep=[].append, check_load=interrupt)
    repo = hub.repos[REPO]
    pin = pin_of(repo.files("main")["README.md"])
    assert pin == (asked[0] if said == "the commit" else "main")
    assert repo.tags == {}
    if how == "theirs":
        assert repo.messages()[-1] == "theirs"  # not overwritten
        repo.branches["main"] = asked[0]
    result = push(
        run.path, REPO, sleep=[].append, check_load=lambda repo_id, commit, *rest: asked.append(commit)
    )
    assert asked == [asked[0]] * 2  # the proof loads what the card names
    assert result.revision == pin_of(repo.files("v1")["README.md"]) == asked[0]
    assert repo.messages() == ["initial commit", *PUSHED]


def test_a_card_names_new_weights_once_and_is_repaired(hub, run):
    """New weights: a new commit is named. Another card alone: the same. A lost commit: the newest."""
    first = publish(run).revision
    (run.model / "config.json").write_text((run.model / "config.json").read_text() + "\n", encoding="utf-8")
    repo = hub.repos[REPO]

    def fail(*given):
        raise PushFailed("it does not load")

    with pytest.raises(PushFailed, match="it does not load"):
        push(run.path, REPO, sleep=[].append, check_load=fail)
    assert pin_of(repo.files("main")["README.md"]) == first  # of which it is true
    second = publish(run).revision
    assert second != first
    assert repo.files(second)["config.json"] != repo.files(first)["config.json"]
    assert repo.messages() == ["initial commit", *PUSHED * 2]
    hf_genlm.write_card(run, assignments=["card.license=mit"])
    assert publish(run).revision == second
    assert repo.messages()[5:] == PUSHED[1:]
    blobs = repo.commits[repo.branches["main"]].blobs
    repo.commit("main", "by hand", {**blobs, "config.json": repo.commits[first].blobs["config.json"]})
    (run.model / "config.json").write_bytes(repo.files(first)["config.json"])
    third = publish(run).revision  # the Hub's card names other weights than those beside it
    assert third not in (first, second)
    assert repo.files(third)["config.json"] == repo.files(first)["config.json"]
    del repo.commits[third]
    assert repo.files(publish(run).revision)["config.json"] == repo.files(first)["config.json"]


def test_a_card_that_is_left_as_it_is_and_names_other_weights_is_told(hub, run):
    publish(run)
    card = run.model / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "\nMine.\n", encoding="utf-8")

    def notes(**options) -> list[str]:
        heard: list[str] = []
        result = publish(
            run, listener=lambda e, f: heard.append(f["message"]) if e == "note" else None, **options
        )
        assert result.revision is None
        return [note for note in heard if "README.md" in note]

    assert notes() == []
    assert hub.repos[REPO].files("main")["README.md"] == card.read_bytes()
    (run.model / "config.json").write_text((run.model / "config.json").read_text() + "\n", encoding="utf-8")
    (note,) = notes(keep_card=True)
    assert hub.repos[REPO].branches["main"] in note


def test_private_is_private_or_refused(hub, run):
    publish(run, private=True)
    assert hub.repos[REPO].private
    hub.repos[REPO].private = False
    with pytest.raises(UserError, match="--private: 'me/tale' exists and is public"):
        publish(run, private=True)


def test_milestones_are_branches(hub, run, saved):
    for name, seed in (("chck_1M", 1), ("chck_2M", 2)):
        copy_files(saved, run.milestones / name)
        build_model("hybrid", seed=seed).save_pretrained(run.milestones / name)
    hub.plant("POST .*/branch/chck_2M", status=500)
    with pytest.raises(PushFailed, match="complete at commit"):
        publish(run, branches=True)
    result = publish(run, branches=True)
    repo = hub.repos[REPO]
    assert sorted(repo.branches) == ["chck_1M", "chck_2M", "main"]
    for name in ("chck_1M", "chck_2M"):
        on_branch = repo.files(name)
        card = on_branch.pop("README.md").decode()
        assert on_branch == files_of(run.milestones / name)
        assert card.startswith(f"# {REPO} after {name[-2:]} words\n")
    assert repo.files("main") == files_of(run.model)
    assert repo.tags == {"v1": repo.branches["main"]}
    assert result.branches == {name: repo.branches[name] for name in ("chck_1M", "chck_2M")}


def test_a_model_folder_is_pushed_as_it_is(hub, saved, run):
    with pytest.raises(UserError, match="belongs to no run with milestones/"):
        publish(saved, branches=True)
    publish(saved)
    assert hub.repos[REPO].files("main") == files_of(saved)
    assert "README.md" not in files_of(saved)
    publish(run.model, "me/card")
    assert 'REPO = "me/card"' in hub.repos["me/card"].files("main")["README.md"].decode()
    (run.model / "README.md").write_text("# mine\n", encoding="utf-8")
    publish(run, "me/card", keep_card=True)
    assert hub.repos["me/card"].files("v2")["README.md"] == b"# mine\n"


def test_each_finding_is_named_and_no_secret_is_printed(hub, run):
    write_json(run.canaries, {"seed": 0, "candidates": [CANARY]})
    token = "hf_" + "a1B2" * 8
    run.samples.write_text(f"```text\none\n{CANARY['secret']}\n/home/ann/novel.txt\n```\n", encoding="utf-8")
    (run.model / "mlp_genlm.py").write_text(f"#\n# {token}", encoding="utf-8")
    (run.model / "canaries.json").write_bytes(run.canaries.read_bytes())
    (run.model / "training_args.bin").write_bytes(b"PK")
    (run.model / "vocab.json").write_bytes(b"\x80\x04K\x01.")
    (run.model / "optimizer.pt").write_bytes(b"PK")
    (run.model / "notes.txt").write_text("x")
    (run.model / "checkpoint-3").mkdir()
    (run.model / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    (run.model / "merges.txt").symlink_to(run.samples)
    (run.model / "plots").mkdir()
    (run.model / "plots" / "more").symlink_to(run.path)
    with pytest.raises(UserError, match=r"^not published: ") as refusal:
        publish(run)
    assert hub.requests == []
    card = (run.model / "README.md").read_text(encoding="utf-8").split("\n")
    at = {kind: 1 + next(i for i, line in enumerate(card) if text in line)
          for kind, text in (("canary", "7203 1956"), ("home-path", "/home/ann"))}  # fmt: skip
    expected = {
        "canaries": {"canaries.json"},
        "canary": {f"README.md:{at['canary']}", "canaries.json:5", "canaries.json:6"},
        "checkpoint": {"checkpoint-3/model.safetensors", "optimizer.pt"},
        "pickle": {"training_args.bin", "vocab.json"},
        "link": {"merges.txt", "plots/more"},
        "unlisted": {"notes.txt"},
        "token": {"mlp_genlm.py:2"},
        "code": {"mlp_genlm.py"},
        "home-path": {f"README.md:{at['home-path']}"},
    }
    for kind, places in expected.items():
        (found,) = re.findall(rf"model': ([^;()]*): {kind} \(", str(refusal.value))
        assert set(found.split(", ")) == places, kind
    for secret in (token, CANARY["secret"], "/home/ann", "novel"):
        assert secret not in str(refusal.value)


def test_a_link_out_of_a_run_or_a_model_folder_is_refused(hub, run, folder, saved):
    (folder / "LICENSE").symlink_to(saved / "config.json")
    assert findings_of(folder) == ["LICENSE link"]
    (run.path / "more").symlink_to(saved)
    with pytest.raises(UserError, match="is a link to"):
        publish(run)
    assert hub.requests == []


LETTERS = "a1B2" * 20
# a sample of every pattern, which no other pattern matches
SECRETS = {
    "Hub": f"hf_{LETTERS[:20]}",
    "login in a URL": "https://ann:secret@example.org/x",
    **{f"GitHub gh{letter}": f"gh{letter}_{LETTERS[:36]}" for letter in "pousr"},
    "GitHub fine-grained": f"github_pat_{LETTERS[:22]}",
    "GitLab": f"glpat-{LETTERS[:20]}",
    "AWS": "AKIA" + "ABCD" * 4,
    "AWS temporary": "ASIA" + "ABCD" * 4,
    "Google": f"AIza{LETTERS[:35]}",
    "OpenAI": f"sk-{LETTERS[:32]}",
    **{f"Slack xox{letter}": f"xox{letter}-{LETTERS[:10]}" for letter in "abeprs"},
    "PyPI": f"pypi-{LETTERS[:50]}",
    "npm": f"npm_{LETTERS[:36]}",
    "RSA key": "-----BEGIN RSA PRIVATE KEY-----",
    "PKCS 8 key": "-----BEGIN PRIVATE KEY-----",
    "PGP key": "-----BEGIN PGP PRIVATE KEY BLOCK-----",
}
HOMES = {
    "Linux": "/home/ann/novel",
    "macOS": "/Users/ann/novel",
    "root": "/root/novel",
    "URL": "file:///home/ann/novel",
    "doubled slashes": "//home//ann",
    "behind an escaped line end": '"\\n/home/ann"',
    "behind an escaped tab": '"\\t/home/ann"',
    "Windows": "C:\\Users\\ann\\novel",
    "Windows in JSON": '"D:\\\\Users\\\\ann"',
}


@pytest.mark.parametrize(
    ("kind", "text"),
    [*(("token", text) for text in SECRETS.values()), *(("home-path", text) for text in HOMES.values())],
    ids=[*SECRETS, *HOMES],
)
def test_each_pattern_of_a_secret_is_found_alone(kind, text, tmp_path):
    (tmp_path / "LICENSE").write_text(f"#\n# {text} is here\n#\n", encoding="utf-8")
    manifest = build_manifest(ModelSource(tmp_path))
    assert [(str(found), found.kind) for found in manifest.findings] == [("LICENSE:2", kind)]
    with pytest.raises(UserError) as refusal:
        check_findings([manifest])
    assert text not in str(refusal.value)


def test_a_secret_in_utf_16_is_found(tmp_path):
    for encoding in ("utf-16", "utf-16-be", "utf-32"):
        (tmp_path / "LICENSE").write_text(f"a\nhf_{LETTERS[:20]}\n/home/ann/x\n", encoding=encoding)
        assert findings_of(tmp_path) == ["LICENSE:2 token", "LICENSE:3 home-path"]


def test_the_token_and_the_home_of_whoever_pushes_are_found(tmp_path, monkeypatch):
    """Also if neither looks like one."""
    monkeypatch.setenv("HF_TOKEN", "correct-horse")
    monkeypatch.setenv("HOME", "/data/people/ann")
    (tmp_path / "README.md").write_text("correct-horse\n/data/people/ann/x\n/data/people\n")
    assert findings_of(tmp_path) == ["README.md:1 token", "README.md:2 home-path"]


def test_allowed_findings_are_published_and_no_others(hub, run):
    run.samples.write_text("```text\n/home/ann/novel.txt\n```\n", encoding="utf-8")
    (run.model / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"notes\.txt: unlisted") as refusal:
        publish(run, allow=["README.md:home-path"])
    assert "home-path" not in str(refusal.value)
    allow = ["README.md:home-path", "notes.txt:unlisted"]
    with pytest.raises(UserError, match="no token was found"):
        publish(run, allow=[*allow, "README.md:token"])
    with pytest.raises(UserError, match="is not FILE:KIND"):
        publish(run, allow=[*allow, "README.md:canary"])
    publish(run, allow=allow)
    assert hub.repos[REPO].files("main") == files_of(run.model)
    run.samples.write_text(f"```text\n/home/ann/novel.txt\nhf_{'a1B2' * 8}\n```\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"README\.md:\d+: token") as refusal:
        publish(run, allow=allow)
    assert "home-path" not in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    ["https://example.org/home/page", "a/home/b", '"/home/"', "/homes/x", "$HOME/x", "~/x", "hf_x",
     "sk-learn", "C:/Programs/Users", "xox-x", "AKIAB", "-----BEGIN PUBLIC KEY-----"],
)  # fmt: skip
def test_ordinary_text_is_no_finding(text, tmp_path):
    (tmp_path / "LICENSE").write_text(f"# {text}\n", encoding="utf-8")
    assert findings_of(tmp_path) == []


def test_of_weights_the_header_is_scanned_and_the_numbers_are_not(folder):
    import torch
    from safetensors.torch import save_file

    numbers = torch.tensor(list(b" /home/ann/x "), dtype=torch.uint8)
    save_file({"w": numbers}, folder / "model.safetensors")
    assert findings_of(folder) == []
    save_file({"w": numbers}, folder / "model.safetensors", {"from": "/home/ann/x"})
    assert findings_of(folder) == ["model.safetensors:1 home-path"]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


SECRET = b"hf_" + b"Ab3" * 11 + b"x"
CHUNKS = {
    "tEXt": chunk(b"tEXt", b"Comment\0" + SECRET),
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(SECRET)),
    "iTXt": chunk(b"iTXt", b"Comment\0\0\0en\0Comment\0" + SECRET),
    "compressed iTXt": chunk(b"iTXt", b"Comment\0\1\0en\0Comment\0" + zlib.compress(SECRET)),
    "iCCP": chunk(b"iCCP", b"profile\0\0" + zlib.compress(SECRET)),
    "eXIf": chunk(b"eXIf", SECRET),
    "none": b"",
}


@pytest.mark.parametrize("place", ["before the pixels", "after the pixels"])
@pytest.mark.parametrize("kind", [*CHUNKS, "after the end"])
def test_texts_in_a_png_are_scanned(kind, place, tmp_path):
    if (kind, place) == ("iCCP", "after the pixels"):
        pytest.skip("a profile stands before the pixels")
    text = CHUNKS.get(kind, b"")
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0"))
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    body = text + pixels if place == "before the pixels" else pixels + text
    content = header + body + chunk(b"IEND", b"") + (SECRET if kind == "after the end" else b"")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "more.png").write_bytes(content)
    assert findings_of(tmp_path) == ([] if kind == "none" else ["plots/more.png token"])


def test_a_png_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "more.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"more\.png' is not a readable PNG"):
        build_manifest(ModelSource(tmp_path))


@pytest.mark.parametrize("repo_id", ["tale", "me/", "/tale", "me/a/b", "me/-x y", "me/" + "x" * 99])
def test_a_malformed_repository_id_is_refused(repo_id, run, hub):
    with pytest.raises(UserError, match="OWNER/NAME"):
        publish(run, repo_id)
    assert hub.requests == []


def test_without_a_token_or_offline_nothing_is_sent(run, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(run.path / "no-token"))
    with pytest.raises(UserError, match="hf auth login"):
        publish(run)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        publish(run)
    assert hub.requests == []


def test_trainer_pushes_a_complete_model_at_every_save(hub, saved, tmp_path, monkeypatch, caplog):
    """Each commit has config, weights, tokenizer and code, and no pickle; the last one equals our push."""
    from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    class Wait(TrainerCallback):
        def on_save(self, *args, **kwargs):
            trainer._finish_current_push()  # a push that comes later finds the files of the next save

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
        model, arguments, train_dataset=rows, processing_class=tokenizer,
        callbacks=[hf_genlm.PushWithCode(), Wait()],
    )  # fmt: skip
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
