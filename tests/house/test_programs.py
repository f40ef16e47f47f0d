"""Promise: no program or module that another user could have written is executed."""

import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from support.corpora import write
from support.models import build_model

from hf_genlm.cli.launch import package_command
from hf_genlm.comparison.runs import run_in_process
from hf_genlm.decoding import FastGenerator
from hf_genlm.decoding.step import program_file
from hf_genlm.errors import UserError
from hf_genlm.files import (
    WriteError,
    _is_own_group,
    find_open_path,
    program_folder,
    use_private_compiler_caches,
)
from hf_genlm.loading import load

COMPILERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_GENLM_CACHE", str(tmp_path / "cache"))
    for name in COMPILERS:
        monkeypatch.setenv(name, "")
    return tmp_path / "cache"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def give_away(path: Path, monkeypatch) -> None:
    """Let `path` belong to another user, as root, or else let this process be another user."""
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        other = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: other)


FAULTS = {
    "the cache folder is open": lambda file, patch: file.parent.parent.chmod(0o777),
    "the folder is open": lambda file, patch: file.parent.chmod(0o777),
    "the folder is open, and sticky": lambda file, patch: file.parent.chmod(0o1777),
    "the file is open": lambda file, patch: file.chmod(0o666),
    "another user's file": lambda file, patch: give_away(file, patch),
    "another user's folder": lambda file, patch: give_away(file.parent, patch),
    "another user's cache": lambda file, patch: give_away(file.parent.parent, patch),
}


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """Paths of the programs that torch was to load; it loads none."""
    paths: list[str] = []

    def load_package(path: str):
        paths.append(path)
        raise InterruptedError

    monkeypatch.setattr(torch._inductor, "aoti_load_package", load_package)
    return paths


def plant_program(model, monkeypatch) -> Path:
    """Put a file at the place of the compiled program of `model`."""
    places = []

    def record(step, inputs):
        places.append(program_file(step, inputs))
        return places[-1]

    with monkeypatch.context() as patch:
        patch.setattr("hf_genlm.decoding.program_file", record)
        generate(model)
    places[0].parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(places[0], "w") as archive:
        archive.writestr("library.so", "machine code")
    for folder in (places[0].parent, places[0].parent.parent):
        folder.chmod(0o700)
    places[0].chmod(0o600)
    return places[0]


def generate(model, program: str | None = None) -> None:
    ids = torch.tensor([[2, 3]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "do_sample": False}
    FastGenerator(model, program=program).generate(ids, **options)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="a system without such owners")
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_compiled_program_is_loaded_only_from_files_of_this_user(fault, cache, loaded, monkeypatch):
    model = build_model("gru")
    file = plant_program(model, monkeypatch)
    if fault is None:
        with pytest.raises(InterruptedError):
            generate(model)
        assert loaded == [str(file)]
        return
    FAULTS[fault](file, monkeypatch)
    generate(model)  # by the trace
    assert loaded == []


@pytest.mark.parametrize("fault", ["the cache folder is open", "the folder is open", "another user's folder"])
def test_compiling_into_a_folder_of_others_is_refused(fault, cache, loaded, monkeypatch):
    model = build_model("gru")
    FAULTS[fault](plant_program(model, monkeypatch), monkeypatch)
    with pytest.raises(UserError, match=r"can be written by other users.*HF_GENLM_CACHE"):
        generate(model, "compiled")
    assert loaded == []


def test_the_folder_of_programs_is_for_this_user_alone(cache, monkeypatch):
    cache.mkdir()
    for found in (None, 0o755, 0o700):
        if found is not None:
            (cache / "programs").chmod(found)
        assert program_folder() == cache / "programs"
        assert mode_of(cache / "programs") == 0o700
    (cache / "programs").rmdir()
    other = cache.parent / "other"
    other.mkdir(mode=0o755)
    (cache / "programs").symlink_to(other)
    with pytest.raises(UserError, match="is a link"):
        program_folder()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    use_private_compiler_caches()
    assert (mode_of(other), list(other.iterdir())) == (0o755, [])
    write(cache.parent / "file", "x")
    monkeypatch.setenv("HF_GENLM_CACHE", str(cache.parent / "file"))
    with pytest.raises(WriteError):
        program_folder()


def test_folders_of_the_users_own_group_are_private(tmp_path, monkeypatch):
    """Many systems give each user a group of that name, and let it write to all folders of the user."""
    import grp
    import pwd
    from types import SimpleNamespace

    tmp_path.chmod(0o775)
    me = pwd.getpwuid(os.geteuid()).pw_name

    def own_group_but_roots(number: int, real=_is_own_group) -> bool:
        return real(number or 12345)

    for name, members, is_private in ((me, [], True), (me, [me], True), (me, ["x"], False), ("x", [], False)):
        group = SimpleNamespace(gr_name=name, gr_mem=members)
        monkeypatch.setattr(grp, "getgrgid", lambda number, group=group: group)
        monkeypatch.setattr("hf_genlm.files._is_own_group", own_group_but_roots)
        assert (find_open_path(tmp_path) is None) == is_private
    link = tmp_path.parent / "link"
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    link.symlink_to(tmp_path / "open")
    assert find_open_path(link) == (tmp_path / "open").resolve()


def test_the_compilers_of_torch_keep_their_programs_there(cache, monkeypatch, tmp_path):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    use_private_compiler_caches()
    assert {Path(os.environ[name]).parent for name in COMPILERS} == {cache / "programs"}
    assert Path(cache_dir()).parent == cache / "programs"
    mine, theirs = tmp_path / "mine", tmp_path / "torchinductor_me"
    mine.mkdir()
    theirs.mkdir()
    theirs.chmod(0o777)  # as another user prepares it in /tmp
    for name in COMPILERS:
        monkeypatch.setenv(name, str(mine))
    use_private_compiler_caches()
    assert {os.environ[name] for name in COMPILERS} == {str(mine)}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(theirs))
    use_private_compiler_caches()
    assert Path(cache_dir()).parent == cache / "programs"
    cache.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(theirs))
    use_private_compiler_caches()
    other = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert not other.is_relative_to(cache)
    assert find_open_path(other) is None


def test_loading_a_model_and_training_choose_these_folders(cache, tmp_path, monkeypatch):
    from hf_genlm.config.recipe import Recipe
    from hf_genlm.training.train import train

    with pytest.raises(UserError):
        train(Recipe(), tmp_path / "none", resume=True)
    assert Path(os.environ[COMPILERS[0]]).parent == cache / "programs"
    for name in COMPILERS:
        monkeypatch.setenv(name, "")
    build_model("gru", vocab_size=300).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="cannot load"):  # there is no tokenizer
        load(tmp_path / "model")
    assert Path(os.environ[COMPILERS[0]]).parent == cache / "programs"


@pytest.fixture
def strangers_folder(tmp_path, monkeypatch) -> Path:
    """The current folder: it has modules by the names of those that a start imports."""
    folder = tmp_path / "strange"
    touch = f"open({str(tmp_path / 'touched')!r}, 'w').close()\n"
    for name in ("hf_genlm/__init__", "hf_genlm/__main__", "multiprocessing/__init__", "typer", "yaml"):
        write(folder / f"{name}.py", touch)
    monkeypatch.chdir(folder)
    return tmp_path / "touched"


def test_processes_of_a_run_do_not_import_the_current_folder(strangers_folder):
    command = [sys.executable, *package_command(), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert not strangers_folder.exists()
    subprocess.run([sys.executable, "-m", "hf_genlm"], check=False)  # it would have
    assert strangers_folder.exists()


def read_variable(name: str, listener) -> str | None:
    return os.environ.get(name)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="older Pythons cannot leave the current folder out")
def test_processes_of_a_comparison_do_not_import_the_current_folder(strangers_folder, tmp_path):
    messages = tmp_path / "messages.txt"
    found = run_in_process(read_variable, "PYTHONSAFEPATH", listener=lambda *event: None, messages=messages)
    assert found == "1"
    assert not strangers_folder.exists()
    assert not os.environ.get("PYTHONSAFEPATH")
