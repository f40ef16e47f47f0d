"""Promise: what is pushed is what was there, whole or not at all, without a secret, and it loads from the Hub."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import build_model
from hub import TOKEN, LoopbackHub
from huggingface_hub import constants
from test_card import make_run

from hf_genlm.cli import main
from hf_genlm.publish import hub as hub_of_ours
from hf_genlm.run_folder import RunFolder, write_json

REPO = "me/tale"
WHOLE = "whole"


@pytest.fixture(params=[False, True], ids=["regular", "lfs"])
def any_hub(request):
    with LoopbackHub(lfs=request.param) as hub:
        yield hub


@pytest.fixture
def hub():
    with LoopbackHub(lfs=True) as hub:
        yield hub


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Seconds that were waited for, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time", SimpleNamespace(sleep=waited.append, time=lambda: 0.0)
    )
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


def lead_to(hub: LoopbackHub, monkeypatch, token: str = TOKEN) -> None:
    """huggingface_hub in this process, whose constants are read at import, and in those that it starts."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", token)


@pytest.fixture
def unproved(monkeypatch) -> list[str]:
    """The proof in another process takes seconds: only asked for, by commit."""
    commits: list[str] = []
    monkeypatch.setattr(hub_of_ours.Hub, "prove", lambda self, commit, files: commits.append(commit))
    return commits


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run with a model and a tokenizer that can be loaded."""
    run = make_run(tmp_path)
    build_model("hybrid").save_pretrained(run.model)
    write_tokenizer(run.model)
    return run


def write_tokenizer(folder: Path) -> None:
    from hf_genlm.recipe import TokenizerRecipe
    from hf_genlm.text.sources import Document
    from hf_genlm.text.tokenizer import train_tokenizer

    train_tokenizer([Document("a text", "here")], TokenizerRecipe(), 6).save_pretrained(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def push(*words: object) -> int:
    return main(["push", *map(str, words)])


def test_a_pushed_model_is_proved_where_we_are_not(any_hub, run, monkeypatch, capsys):
    """By the verb's own process: every file back, its code from the Hub, and tokens written."""
    lead_to(any_hub, monkeypatch)
    found = []
    load = hub_of_ours._load_in_clean_process
    monkeypatch.setattr(
        hub_of_ours, "_load_in_clean_process", lambda *given: found.append(load(*given)) or found[-1]
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
