"""Promise: one writer writes all files, whole or not at all, and never through a link; one reader reads only
regular files."""

import ast
import contextlib
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from support.corpora import write
from support.runs import SMALL

import hf_genlm
from hf_genlm import files
from hf_genlm.card.card import is_edited
from hf_genlm.cli.main import main
from hf_genlm.config.recipe import CorpusRecipe, load_recipe
from hf_genlm.errors import UserError
from hf_genlm.evaluation.aggregation import BlockSums
from hf_genlm.evaluation.benchmarks import read_pairs
from hf_genlm.files import (
    WriteError,
    append_file,
    atomic_file,
    atomic_folder,
    atomic_path,
    copy_file,
    is_private_name,
    private_name,
    read_bytes,
    read_json,
    read_text,
    refuse_links_out,
    remove_private,
    write_bytes,
    write_json,
    write_text,
)
from hf_genlm.loading import load
from hf_genlm.run import list_runs
from hf_genlm.run_folder import RunFolder
from hf_genlm.run_schemas import EnvironmentFile
from hf_genlm.text.cache import Cache
from hf_genlm.text.languages import read_parallel
from hf_genlm.text.tokenizer import load_tokenizer
from hf_genlm.training.check import check
from hf_genlm.training.checkpoints import newest_checkpoint
from hf_genlm.training.private import PrivateState

PACKAGE = Path(hf_genlm.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


# the writer


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(path: Path, content: str) -> None:
    with atomic_folder(path, replace=True) as folder:
        write_text(folder / "a.txt", content)


def write_by_path(path: Path, content: str) -> None:
    with atomic_path(path) as private:
        private.write_text(content)


WRITERS = {
    "text": write_text,
    "json": lambda path, content: write_json(path, content),
    "bytes": lambda path, content: write_bytes(path, content.encode()),
    "copy": lambda path, content: copy_file(write(path.parent / "source", content), path),
    "folder": write_folder,
    "by path": write_by_path,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_leaves_the_new_content_and_nothing_beside_it(writer, tmp_path):
    path = tmp_path / "deep" / "new"
    for content in ("one", "two"):
        WRITERS[writer](path, content)
        read = path / "a.txt" if path.is_dir() else path
        assert read.read_text().strip('"\n') == content
        assert set(names_in(path.parent)) <= {"new", "source"}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_at_the_place_is_replaced_and_not_followed(writer, tmp_path):
    outside = write(tmp_path / "outside.txt", "precious")
    path = tmp_path / "run" / "new"
    path.parent.mkdir()
    path.symlink_to(outside)
    try:
        WRITERS[writer](path, "content")
    except WriteError:
        assert writer == "folder"
    assert outside.read_text() == "precious"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_failed_write_leaves_the_old_content(writer, tmp_path, monkeypatch):
    path = tmp_path / "new"
    WRITERS[writer](path, "old")

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"new' cannot be written \(No space left on device\): make room"):
        WRITERS[writer](path, "content")
    assert (path / "a.txt" if path.is_dir() else path).read_text().strip('"\n') == "old"
    assert set(names_in(tmp_path)) <= {"new", "source"}


def test_what_the_block_raises_leaves_nothing(tmp_path):
    for writer in (atomic_file, atomic_folder, atomic_path):
        with pytest.raises(ZeroDivisionError), writer(tmp_path / "new"):
            raise ZeroDivisionError
        with pytest.raises(WriteError, match="No space left"), writer(tmp_path / "new"):
            raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors says it
    assert names_in(tmp_path) == []


def test_a_private_name_cannot_be_foreseen_and_is_cleared_away(tmp_path):
    path = tmp_path / "recipe.yaml"
    names = {private_name(path) for _ in range(100)}
    assert len(names) == 100
    assert all(is_private_name(name) and name.parent == tmp_path for name in names)
    assert not is_private_name(tmp_path / "recipe.yaml.part")
    write(private_name(path), "half")
    write(private_name(path) / "file", "half")
    private_name(path).symlink_to(write(tmp_path / "kept" / "file", "x").parent)
    remove_private(tmp_path)
    assert names_in(tmp_path) == ["kept"]
    assert names_in(tmp_path / "kept") == ["file"]


def test_permissions_are_those_of_the_umask_or_less(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
        write_bytes(tmp_path / "b", b"x", mode=0o600)
        write_folder(tmp_path / "c", "x")
    finally:
        os.umask(before)
    assert [oct((tmp_path / name).stat().st_mode & 0o777) for name in "abc"] == ["0o640", "0o600", "0o750"]


def test_an_append_follows_no_link(tmp_path):
    outside = write(tmp_path / "outside.txt", "precious")
    (tmp_path / "log.jsonl").symlink_to(outside)
    with pytest.raises(WriteError, match="link"), append_file(tmp_path / "log.jsonl") as file:
        file.write(b"x")
    assert outside.read_text() == "precious"
    for _ in range(2):
        with append_file(tmp_path / "new.jsonl") as file:
            file.write(b"x\n")
    assert (tmp_path / "new.jsonl").read_text() == "x\nx\n"


def test_links_that_stay_inside_are_let_pass_and_others_named(tmp_path):
    run = tmp_path / "run"
    write(run / "model/config.json", "{}")
    (run / "latest").symlink_to("model")
    (run / "loop").symlink_to(".")
    (tmp_path / "link").symlink_to(run)
    refuse_links_out(run)
    refuse_links_out(tmp_path / "link")
    for target in ("../..", "/etc/passwd", "../../run-2/x", "nowhere/../../../x"):
        (run / "model/out").symlink_to(target)
        with pytest.raises(UserError, match=r"model/out' is a link to .*, outside of .*run'"):
            refuse_links_out(run)
        (run / "model/out").unlink()
    os.mkfifo(run / "pipe")
    with pytest.raises(UserError, match="pipe' is neither a file nor a folder"):
        refuse_links_out(run)


# prepared run folders


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_folder) -> Path:
    """A finished run, and a half one that can be resumed, on the same text."""
    folder = tmp_path_factory.mktemp("trained")
    small = [word for assignment in SMALL[:-2] for word in ("--set", assignment)]
    options = ["train", str(text_folder), *small, "--steps", "2", "--set", "training.num_validations=0"]
    assert main([*options, "--out", str(folder / "run")]) == 0
    half = folder / "half"
    half.mkdir()
    for name in ("recipe.yaml", "log.jsonl", "environment.json", "corpus.json"):
        shutil.copyfile(folder / "run" / name, half / name)
    shutil.copytree(folder / "run/tokenizer", half / "tokenizer")
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


WRITING_VERBS = {
    "card": lambda run: ["card", run, "--force"],
    "evaluate": lambda run: ["evaluate", run],
    "audit": lambda run: ["audit", run, "--limit", "4"],
    "plot": lambda run: ["plot", run],
    "push": lambda run: ["push", run, "owner/name", "--dry-run"],
    "resume": lambda run: ["train", "--resume", "--out", run],
}
PLACES = (
    "recipe.yaml", "recipe.yaml.part", "evaluation.json", "evaluation.json.part", "log.jsonl", "audit.json",
    "plots", "plots/curves.png", "model/README.md", "model/README.md.part", "model/plots", "checkpoints",
    "milestones", "tokenizer", ".lock", "samples.md", "tensorboard",
)  # fmt: skip


def plant(run: Path, place: str, outside: Path) -> None:
    """Put a link at `place` to a copy outside of what lies there, or to anything where nothing does."""
    path = run / place
    target = outside / Path(place).name
    if path.is_dir() or "." not in Path(place).name:
        write(target / "curves.png", "precious")
        write(target / "checkpoint-2" / "manifest.json", "precious")
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
            shutil.rmtree(path)
    else:
        write(target, path.read_text(errors="replace") if path.is_file() else "precious")
        path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("verb", WRITING_VERBS)
def test_a_run_with_a_link_out_is_refused_and_nothing_outside_changes(verb, trained, tmp_path, capsys):
    for number, place in enumerate(PLACES):
        run, outside = tmp_path / f"run-{number}", tmp_path / f"outside-{number}"
        shutil.copytree(trained / ("half" if verb == "resume" else "run"), run)
        plant(run, place, outside)
        before = snapshot(outside)
        assert before
        assert main(WRITING_VERBS[verb](str(run))) == 2, place
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{place.split('/')[-1]}' is a link to" in message, message
        assert snapshot(outside) == before, place


def test_a_new_run_does_not_begin_through_a_link(text_folder, tmp_path, capsys):
    outside = write(tmp_path / "outside.txt", "precious")
    for name in ("log.jsonl", ".lock", f".recipe.yaml.{0:016x}.part"):
        run = tmp_path / f"run{name}"
        run.mkdir()
        (run / name).symlink_to(outside)
        assert main(["train", str(text_folder), "--out", str(run), "--steps", "1"]) == 2
        assert "is a link to" in capsys.readouterr().err
    assert outside.read_text() == "precious"


def test_a_text_may_be_a_link(trained, text_folder, tmp_path):
    (tmp_path / "text.txt").symlink_to(next(text_folder.glob("*.txt")))
    assert main(["evaluate", str(trained / "run"), str(tmp_path / "text.txt")]) == 0


@pytest.fixture
def read_only(monkeypatch):
    """A function that makes a folder read-only, as on a disk that is mounted so, for root too."""
    opened = os.open

    def seal(folder: Path) -> None:
        def refuse(path, flags, *more, **keywords):
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(folder)):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return opened(path, flags, *more, **keywords)

        monkeypatch.setattr(os, "open", refuse)

    return seal


@pytest.mark.parametrize("verb", ["evaluate", "audit"])
def test_figures_of_a_run_on_a_read_only_disk_are_printed(verb, trained, tmp_path, capsys, read_only):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    before = snapshot(run)
    read_only(run)
    assert main(WRITING_VERBS[verb](str(run))) == 0
    shown = capsys.readouterr()
    assert {"evaluate": "bits_per_byte", "audit": "membership_auc"}[verb] in shown.out
    notes = " ".join(shown.err.split())
    assert "not kept" in notes
    assert "Read-only file system" in notes
    assert "audit:" not in shown.out, "it does not name a file that was not written"
    assert snapshot(run) == before


def test_what_cannot_be_written_is_one_line(trained, tmp_path, capsys, read_only):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    read_only(run)
    for verb, name in (
        ("card", "plots/curves.png"),
        ("plot", "plots/curves.png"),
        ("push", "model/README.md"),
    ):
        assert main(WRITING_VERBS[verb](str(run))) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{name}' cannot be written (Read-only file system): name a place" in line
    assert main(["plot", str(run), "--out", str(tmp_path / "elsewhere.png")]) == 0


# what is read


@pytest.fixture
def alarm():
    """Fail, instead of waiting for ever at a pipe."""

    def ring(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read_parallel_text(path: Path) -> None:
    read_parallel(CorpusRecipe(parallel={"a": str(path)}))


READERS = {
    "bytes": read_bytes,
    "text": read_text,
    "json": read_json,
    "schema": lambda path: files.read(path, EnvironmentFile),
    "copy": lambda path: copy_file(path, path.with_name("copy")),
    "hash": files.sha256_of,
    "safetensors": files.read_tensor_sizes,
    "recipe": load_recipe,
    "blocks": BlockSums.load,
    "parallel text": read_parallel_text,
    "pairs": read_pairs,
    "card": is_edited,
    "private state": lambda path: PrivateState.load(path.parent, 1),
    "log": lambda path: RunFolder(path.parent).read_log(),
    "cached arrays": lambda path: Cache(path.parent).load("key"),
}
NAMES = {"private state": "privacy_state.json", "log": "log.jsonl", "cached arrays": "key.arrays"}
SPECIAL = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: path.symlink_to("missing"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_read(reader, kind, tmp_path, alarm):
    """A pipe would hold a verb for ever, and a device would fill the memory."""
    path = tmp_path / "in" / NAMES.get(reader, "file")
    path.parent.mkdir()
    SPECIAL[kind](path)
    with contextlib.suppress(UserError, OSError):
        assert READERS[reader](path) in (None, False, [])  # is taken as missing
    assert names_in(tmp_path / "in") == [path.name]


def test_a_list_of_runs_waits_for_no_pipe(tmp_path, alarm):
    for name in ("recipe.yaml", "log.jsonl"):
        run = tmp_path / name.split(".")[0]
        write(run / "recipe.yaml", "")
        write(run / "log.jsonl", "")
        (run / name).unlink()
        os.mkfifo(run / name)
    assert [summary.state for summary in list_runs(tmp_path)] != []
    assert all("neither a file nor a folder" in summary.state for summary in list_runs(tmp_path))


def test_a_checkpoint_may_name_no_device(tmp_path, alarm):
    folder = tmp_path / "checkpoint-2"
    progress = {"step": 2, "elapsed_s": 1.0, "seconds": None, "steps": 4}
    write(folder / "manifest.json", json.dumps({**progress, "files": {"/dev/zero": [0, "0"]}}))
    notes: list[str] = []
    assert newest_checkpoint(tmp_path, notes.append) is None
    assert "checkpoint-2 is damaged" in notes[0]


@pytest.mark.parametrize("field", ["step", "elapsed_s", "seconds", "steps"])
@pytest.mark.parametrize("value", ["1e400", "Infinity", "NaN", "-1", "1" + "0" * 400, '"7"', "true"])
def test_numbers_of_a_checkpoint_are_bounded(tmp_path, field, value):
    kept = {"a": [1, files.sha256_of(write(tmp_path / "checkpoint-2" / "a", "x"))]}
    progress = {"step": 2, "elapsed_s": 1.0, "seconds": 9.5, "steps": 4, "files": kept}
    write(tmp_path / "checkpoint-2" / "manifest.json", json.dumps(progress))
    assert newest_checkpoint(tmp_path) is not None
    content = json.dumps({**progress, field: "here"}).replace('"here"', value)
    write(tmp_path / "checkpoint-2" / "manifest.json", content)
    notes: list[str] = []
    assert newest_checkpoint(tmp_path, notes.append) is None
    assert "checkpoint-2 is damaged" in notes[0]


@pytest.mark.parametrize("name", [".metadata", "optimizer_0/.metadata", "optimizer_0/__0_0.distcp"])
def test_shards_of_a_checkpoint_are_refused_where_it_is_found(tmp_path, name):
    """The reader of torch.distributed.checkpoint unpickles them."""
    file = write(tmp_path / "checkpoint-2" / name, "pickle")
    progress = {"step": 2, "elapsed_s": 1.0, "seconds": None, "steps": 4}
    content = {**progress, "files": {name: [file.stat().st_size, files.sha256_of(file)]}}
    write(tmp_path / "checkpoint-2" / "manifest.json", json.dumps(content))
    with pytest.raises(UserError, match=r"shard of FSDP.*FULL_STATE_DICT"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("version", "kind"), [("2", None), ("2", "SHARDED_STATE_DICT"), ("1", "SHARDED_STATE_DICT")]
)
def test_a_run_that_would_write_such_shards_does_not_begin(version, kind, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    check(load_recipe(None, SMALL))
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", kind) if kind else monkeypatch.delenv("FSDP_STATE_DICT_TYPE")
    with pytest.raises(UserError, match="fsdp_state_dict_type: FULL_STATE_DICT"):
        check(load_recipe(None, SMALL))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.link(path.with_name("outside.txt"), path)])
def test_an_append_changes_no_other_file(tmp_path, make, alarm):
    outside = write(tmp_path / "outside.txt", "precious")
    make(tmp_path / "log.jsonl")
    message = r"hard link: .*put a copy|neither a file nor a folder"
    with pytest.raises(WriteError, match=message), append_file(tmp_path / "log.jsonl") as file:
        file.write(b"x")
    assert outside.read_text() == "precious"


# model folders

MODEL_VERBS = {
    "generate": lambda model, text, out: ["generate", model],
    "evaluate": lambda model, text, out: ["evaluate", model, text],
    "audit": lambda model, text, out: ["audit", model, "--trained-on", text, "--held-out", text],
    "export": lambda model, text, out: ["export", model, "--to", "llama", "--out", out],
    "extend": lambda model, text, out: ["extend", model, text, "--vocab-size", "+5", "--out", out],
    "space": lambda model, text, out: ["space", model, "--out", out],
    "from": lambda model, text, out: ["train", text, "--from", model, "--steps", "1", "--out", out],
    "serve": lambda model, text, out: ["serve", model],
    "chat": lambda model, text, out: ["chat", model],
}
OUTSIDE = {
    "chat_template.jinja": "is a link to",
    "tokenizer.json": "is a link to",
    "model.safetensors": "is neither a file nor a folder",
    "config.json": "is a link to",
}


@pytest.mark.parametrize("is_run", [False, True], ids=["model", "run"])
@pytest.mark.parametrize("verb", MODEL_VERBS)
def test_a_model_whose_files_lie_elsewhere_is_refused(verb, is_run, trained, tmp_path, capsys, alarm):
    """A copy of what a link leads to would be in the export, the demo and the extended model."""
    secret = write(tmp_path / "id_ed25519", "-----BEGIN PRIVATE KEY-----")
    text = str(write(tmp_path / "text.txt", "some words\n" * 50))
    for name, message in OUTSIDE.items():
        home = tmp_path / f"{name}-folder"
        shutil.copytree(trained / "run", home)
        file = home / "model" / name
        content = file.read_bytes()
        file.unlink()
        if "link" in message:
            if name == "config.json":
                secret.write_bytes(content)
            file.symlink_to(secret)
        else:
            os.mkfifo(file)
        out = tmp_path / f"{name}-out"
        model = str(home if is_run else home / "model")
        assert main(MODEL_VERBS[verb](model, text, str(out))) == 2, name
        assert message in capsys.readouterr().err.strip().splitlines()[-1], name
        assert not out.exists()


def test_a_tokenizer_whose_files_lie_elsewhere_is_refused(trained, tmp_path):
    shutil.copytree(trained / "run/tokenizer", tmp_path / "tokenizer")
    load_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer/chat_template.jinja").unlink()
    (tmp_path / "tokenizer/chat_template.jinja").symlink_to(write(tmp_path / "secret", "key"))
    with pytest.raises(UserError, match=r"chat_template.jinja' is a link to"):
        load_tokenizer(tmp_path / "tokenizer")


def test_the_links_of_a_hub_cache_are_followed_to_its_blobs_only(trained, tmp_path):
    for name in ("models--owner--name", "elsewhere"):
        repository = tmp_path / name
        folder = repository / "snapshots" / ("0" * 40)
        for number, file in enumerate(sorted((trained / "run/model").glob("*.*"))):
            if file.is_file():
                blob = repository / "blobs" / str(number)
                write(blob, file.read_bytes())
                folder.mkdir(parents=True, exist_ok=True)
                (folder / file.name).symlink_to(f"../../blobs/{number}")
        if name == "elsewhere":
            with pytest.raises(UserError, match="is a link to"):
                load(folder)
            continue
        load(folder)
        (folder / "README.md").unlink()
        for target in (repository / "refs/main", tmp_path / "models--owner--name-2/blobs/0"):
            (folder / "README.md").symlink_to(write(target, "x"))
            with pytest.raises(UserError, match=r"README.md' is a link to"):
                load(folder)
            (folder / "README.md").unlink()


# no other writer

WRITING_METHODS = {
    "write_text", "write_bytes", "savefig", "save_pretrained", "tofile", "touch", "symlink_to", "hardlink_to",
    "to_csv", "to_parquet", "save_to_disk", "rename",
}  # fmt: skip
WRITING_FUNCTIONS = {
    "shutil.copyfile", "shutil.copy", "shutil.copy2", "shutil.copytree", "shutil.move", "shutil.make_archive",
    "copyfile", "copytree", "os.rename", "os.replace", "os.renames", "os.link", "os.symlink", "os.truncate",
    "np.save", "np.savez", "np.savetxt", "np.memmap", "torch.save", "save_file", "json.dump", "yaml.dump",
    "tempfile.mkstemp", "tempfile.mkdtemp", "tempfile.NamedTemporaryFile", "mkstemp", "mkdtemp",
    "NamedTemporaryFile", "SummaryWriter", "FileLock", "gguf.GGUFWriter", "program.save",
}  # fmt: skip
# a block in which a library may write by itself: what it is given is private
PRIVATE = {"atomic_file", "atomic_folder", "atomic_path", "append_file", "tempfile.TemporaryDirectory"}
# file -> what writes there, and why that is no fault
ALLOWED = {
    "cli/main.py": {"open"},  # /dev/null, in the place of an output that nobody reads any more
    "cli/display.py": {"open"},  # likewise
    "comparison/runs.py": {"FileLock"},  # an empty file; the folder was looked through for links
    "run_folder.py": {"FileLock"},  # likewise
    "training/trackers.py": {"SummaryWriter"},  # TensorBoard's own files, in a folder that was looked through
    "training/checkpoints.py": {"rename"},  # of whole folders in checkpoints/, which was looked through
    "exporting/targets.py": {"save_pretrained"},  # into the folder of an atomic_folder of the same file
    "exporting/onnx_step.py": {"save_pretrained", "program.save"},  # likewise
    "exporting/gguf_file.py": {"gguf.GGUFWriter"},  # likewise
    "model/modeling_genlm.py": {"save_pretrained"},  # what is called there
    "model/configuration_genlm.py": {"save_pretrained"},  # likewise
    "model/bundle.py": {"write_text"},  # what save_pretrained has just written
}


def name_of(function: ast.expr) -> str:
    return ast.unparse(function) if isinstance(function, (ast.Name, ast.Attribute)) else ""


def opens_for_writing(call: ast.Call, name: str) -> bool:
    """True for open(path, "w"), path.open("a"), os.open(path, os.O_WRONLY) and open(path, mode)."""
    is_method = isinstance(call.func, ast.Attribute) and name != "os.open"
    modes = [keyword.value for keyword in call.keywords if keyword.arg in ("mode", "flags")]
    modes += call.args[0 if is_method else 1 :][:1]
    if name == "os.open":
        return not modes or ast.unparse(modes[0]) != "os.O_RDONLY"
    return any(
        bool(set(str(mode.value)) & set("wax+")) if isinstance(mode, ast.Constant) else not is_method
        for mode in modes
    )


def writers_in(source: str) -> set[str]:
    """Calls that write, rename or link a file outside of a private block."""
    found = set()

    def visit(node: ast.AST, is_private: bool) -> None:
        if isinstance(node, ast.With):
            names = [name_of(i.context_expr.func) for i in node.items if isinstance(i.context_expr, ast.Call)]
            is_private = is_private or bool(PRIVATE & set(names))
        if isinstance(node, ast.Call) and not is_private:
            name = name_of(node.func)
            last = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if name in WRITING_FUNCTIONS:
                found.add(name)
            elif last in WRITING_METHODS:
                found.add(last)
            elif last == "replace" and len(node.args) == 1 and not node.keywords:  # of a path: text takes two
                found.add("replace")
            elif (name in ("open", "os.open", "io.open") or last == "open") and opens_for_writing(node, name):
                found.add("open")
        for child in ast.iter_child_nodes(node):
            visit(child, is_private)

    visit(ast.parse(source), False)
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_no_other_module_writes_files(file):
    name = file.relative_to(PACKAGE).as_posix()
    if name != "files.py":
        assert writers_in(file.read_text(encoding="utf-8")) == ALLOWED.get(name, set())


@pytest.mark.parametrize(
    "fault",
    ["open(path, 'w')", "path.open('ab')", "open(path, mode='r+')", "open(path, mode)", "path.write_text(x)",
     "shutil.copyfile(a, b)", "np.save(path, x)", "figure.savefig(path)", "model.save_pretrained(folder)",
     "aside.replace(path)", "os.replace(a, b)", "tempfile.mkstemp()", "os.open(path, os.O_WRONLY)",
     "aside.rename(path)", "path.touch()", "SummaryWriter(folder)"],
)  # fmt: skip
def test_that_check_can_fail(fault):
    assert writers_in(fault)
    assert writers_in(f"with atomic_folder(x) as folder:\n    {fault}") == set()


def test_that_check_lets_readers_pass():
    source = "open(path); path.open('rb'); text.replace('a', 'b'); os.open(x, os.O_RDONLY); write_text(p, t)"
    assert writers_in(source) == set()


def test_every_exception_names_a_file():
    assert all((PACKAGE / name).is_file() for name in ALLOWED)


# no other reader

# file -> why its own readers can wait for no pipe
READS_ITSELF = {
    "files.py": "the reader",
    "evaluation/aggregation.py": "np.load gets a file that files.py has opened",
    "text/vector_files.py": "is_file() comes first",
    "text/sources.py": "the library source of this Python",
    "hub/manifest.py": "the manifest lists regular files",
    "training/callbacks.py": "the .gitignore of a folder that it writes",
    "decoding/step.py": "/proc/cpuinfo and the source of this package",
    "exporting/onnx_runner.py": "it travels to folders where this package is not installed",
    "exporting/targets.py": "a template of this package",
    "model/bundle.py": "the source of this package",
    "card/card.py": "likewise",
    "report/document.py": "templates and pictures that it has just written",
    "space/files/demo/interface.py": "it runs where this package is not installed",
    "space/files/demo/models.py": "likewise",
}


def readers_in(source: str) -> set[str]:
    """Calls that open a file for reading by themselves."""
    found = set()
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = name_of(call.func)
        last = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if name in ("read_text", "read_bytes", "open_file", "open_text"):
            continue  # of files.py
        is_method = last == "open" and bool(call.args) and isinstance(call.args[0], ast.Constant)
        if is_method or last in ("read_text", "read_bytes") or name in ("open", "io.open", "np.load"):
            found.add(name or last)
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_no_other_module_opens_files_for_reading(file):
    name = file.relative_to(PACKAGE).as_posix()
    found = readers_in(file.read_text(encoding="utf-8"))
    assert not found or name in READS_ITSELF, found


def test_that_check_of_readers_can_fail():
    for fault in (
        "open(path)",
        "path.open('rb')",
        "Path(x).read_text()",
        "path.read_bytes()",
        "np.load(path)",
    ):
        assert readers_in(fault)
    assert not readers_in("open_file(path); read_text(path); RunFolder.open(path)")
    assert all((PACKAGE / name).is_file() for name in READS_ITSELF)


def test_a_folder_in_the_place_of_the_lock_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(UserError, match=r"\.lock' cannot be locked \(Is a directory\)"),
        RunFolder(tmp_path).locked(),
    ):
        pass
