"""Promise: nothing that a person was sent is executed, fills the disk, or is written where it should not be;
and no access token leaves the machine with a run."""

import ast
import gzip
import http.server
import json
import os
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from support.corpora import complaint, read, texts, write, zipped
from support.models import build_model
from support.runs import SMALL

import hf_genlm
from hf_genlm.cli.main import main
from hf_genlm.config.recipe import CorpusRecipe, Recipe, TokenizerRecipe
from hf_genlm.errors import UserError
from hf_genlm.loading import check_files
from hf_genlm.text import cache as cache_module
from hf_genlm.text.store import Document, TextStore
from hf_genlm.text.tokenizer import load_tokenizer, train_tokenizer
from hf_genlm.text.vector_files import read_vectors
from hf_genlm.training.checkpoints import refuse_code

PACKAGE = Path(hf_genlm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# what executes what it reads: names of modules, of functions by their dotted end, and of arguments
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "np.load", "numpy.load",
         "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.load",
         "torch.hub.load"}  # fmt: skip
# what makes such a call safe; it has to be said
SAFE = {"torch.load": {"weights_only": "True"}, "np.load": {"allow_pickle": "False"}}
NONE = {"": "nothing does"}
ARGUMENTS = {"trust_remote_code": True, "allow_pickle": True, "shell": True, "weights_only": False,
             "use_safetensors": False}  # fmt: skip


# what a person asked for: a push runs the code that it has just sent, to see that it runs
ASKED = {
    "hub/push.py": {
        "AutoModelForCausalLM.from_pretrained(trust_remote_code=)",
        "AutoTokenizer.from_pretrained(trust_remote_code=)",
    }
}


def by_path(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


def executes(source: str) -> list[str]:
    """What of `source` could execute what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            said = {argument: ast.unparse(value) for argument, value in given.items()}
            found += [name] if name in CALLS and not SAFE.get(name, NONE).items() <= said.items() else []
            for argument, value in given.items():
                if argument in ARGUMENTS and ARGUMENTS[argument] is getattr(value, "value", None):
                    found.append(f"{name}({argument}=)")
    return found


@pytest.mark.parametrize("file", FILES, ids=by_path)
def test_nothing_of_ours_executes_what_it_reads(file):
    assert set(executes(file.read_text(encoding="utf-8"))) == ASKED.get(by_path(file), set())


def loads_unsaid(source: str) -> list[str]:
    """Calls that load a model and leave open whose code they run, or which weights they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and dotted(node.func).endswith(".from_pretrained"):
            name = dotted(node.func).split(".")[-2]
            said = {keyword.arg for keyword in node.keywords}
            needed = {"trust_remote_code"} if name.startswith("Auto") else set()
            needed |= {"use_safetensors"} if re.fullmatch(r"(Auto|GenLM)\w*(Model|For)\w*", name) else set()
            found += [] if needed <= said else [ast.unparse(node)]
    return found


@pytest.mark.parametrize("file", FILES, ids=by_path)
def test_every_load_says_whose_code_runs_and_reads_only_safetensors(file):
    asked = ["AutoModelForCausalLM.from_pretrained(repo_id, revision=revision, trust_remote_code=True)"]
    assert loads_unsaid(file.read_text(encoding="utf-8")) == (asked if by_path(file) in ASKED else [])


@pytest.mark.parametrize(
    "fault",
    ["AutoTokenizer.from_pretrained(name)", "GenLMForCausalLM.from_pretrained(name)",
     "transformers.AutoModel.from_pretrained(name, trust_remote_code=False)"],
)  # fmt: skip
def test_that_check_of_loads_can_fail(fault):
    assert loads_unsaid(fault)


@pytest.mark.parametrize(
    "fault",
    ["import pickle", "from dill import loads", "torch.load(path)", "torch.load(path, weights_only=False)",
     "np.load(path, allow_pickle=True)", "yaml.load(text)", "eval(text)", "os.system(text)",
     "subprocess.run(text, shell=True)", "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_that_check_can_fail(fault):
    assert executes(fault)
    assert not executes("torch.load(path, weights_only=True); model.eval(); re.compile(x); yaml.safe_load(x)")


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    build_model("gru", vocab_size=300).save_pretrained(folder)
    text = "a line of words\n" * 50
    train_tokenizer([Document(text, "x")], TokenizerRecipe(), len(text)).save_pretrained(folder)
    return folder


def refused(verb: str, folder: Path, capsys) -> str:
    source = [write(folder.parent / "text.txt", "some words\n").as_posix()] if verb == "evaluate" else []
    capsys.readouterr()
    assert main([verb, str(folder), *source]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("hf-genlm: ")
    return message


@pytest.mark.parametrize(
    ("verb", "beside"),
    [(verb, False) for verb in ("generate", "evaluate", "serve", "chat")]
    + [("generate", True), ("evaluate", True)],
)
def test_weights_in_a_pickle_are_refused_unread(model_folder, verb, beside, capsys):
    """`beside`: a file by the name of safetensors stands beside it, and the config points to the pickle."""
    touched = model_folder.parent / "touched"
    with (model_folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"weight": Malicious(touched)}, file)
    (model_folder / "model.safetensors").unlink()
    if beside:
        (model_folder / "other.safetensors").write_bytes(b"")
        config = json.loads((model_folder / "config.json").read_text())
        config["transformers_weights"] = "pytorch_model.bin"
        (model_folder / "config.json").write_text(json.dumps(config))
    message = refused(verb, model_folder, capsys)
    assert beside or "pickle" in message
    assert not touched.exists()
    with (model_folder / "pytorch_model.bin").open("rb") as file:
        pickle.load(file)  # noqa: S301  it would have
    assert touched.exists()


@pytest.fixture
def states(tmp_path) -> Path:
    """Where DeepSpeed keeps the states of a checkpoint, and those of one."""
    folder = tmp_path / "checkpoint-4" / "global_step4"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text(folder.name)
    torch.save({"step": 4, "weights": [torch.ones(2)]}, folder / "states.pt")
    return folder


@pytest.mark.parametrize(
    ("protocol", "message"), [(2, "would execute builtins.getattr"), (4, "is not as DeepSpeed writes it")]
)
def test_a_checkpoint_that_deepspeed_would_execute_is_refused_unread(states, tmp_path, protocol, message):
    refuse_code(states.parent)
    torch.save({"step": Malicious(tmp_path / "touched")}, states / "zz.pt", pickle_protocol=protocol)
    with pytest.raises(UserError, match=f"zz.pt {message}"):
        refuse_code(states.parent)
    assert not (tmp_path / "touched").exists()


def test_a_checkpoint_for_deepspeed_reads_nothing_beside_it(states):
    states.rename(states.parent.parent / "elsewhere")
    (states.parent / "latest").write_text("../elsewhere")
    with pytest.raises(UserError, match="a place outside the checkpoint"):
        refuse_code(states.parent)


@pytest.mark.parametrize("known", [True, False], ids=["our kind", "a kind of its own"])
@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_code_beside_the_weights_is_not_executed(model_folder, known, verb, capsys):
    touched = model_folder.parent / "touched"
    code = f"import pathlib; pathlib.Path({str(touched)!r}).touch()\n"
    for file in model_folder.glob("*.py"):
        file.write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((model_folder / name).read_text())
        content["auto_map"] = {
            "AutoConfig": "configuration_genlm.GenLMConfig",
            "AutoModelForCausalLM": "modeling_genlm.GenLMForCausalLM",
            "AutoTokenizer": [None, "modeling_genlm.Tokenizer"],
        }
        if not known and name == "config.json":
            content["model_type"] = "evil"
        (model_folder / name).write_text(json.dumps(content))
    (model_folder / "custom_generate").mkdir()
    (model_folder / "custom_generate/generate.py").write_text(code)
    if known:
        source = [str(write(model_folder.parent / "t.txt", "words\n"))] if verb == "evaluate" else []
        assert main([verb, str(model_folder), *source]) == 0
    else:
        assert "cannot load" in refused(verb, model_folder, capsys)
    assert not touched.exists()


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path):
    touched = tmp_path / "touched"
    write(tmp_path / "own/evil.py", f"import pathlib; pathlib.Path({str(touched)!r}).touch()\n")
    own = {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}, "tokenizer_class": "Evil"}
    write(tmp_path / "own/tokenizer_config.json", json.dumps(own))
    with pytest.raises(UserError):
        load_tokenizer(tmp_path / "own")
    assert not touched.exists()


def test_damaged_weights_are_one_line(model_folder, capsys):
    path = model_folder / "model.safetensors"
    content = path.read_bytes()
    for damaged in (b"", content[:100], b"\xff" * 200, pickle.dumps([1])):
        path.write_bytes(damaged)
        assert "cannot load" in refused("generate", model_folder, capsys)


def test_word_vectors_in_a_pickle_are_refused(tmp_path):
    touched = tmp_path / "touched"
    for name in ("vectors.bin", "vectors.txt", "vectors.npy", "vectors.kv"):
        path = write(tmp_path / name, pickle.dumps([Malicious(touched)]))
        with pytest.raises(UserError):
            read_vectors(path, {"word"})
    assert not touched.exists()


# archives and folders


def everything_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "name", ["../../x.txt", "/tmp/genlm-outside.txt", "..\\..\\x.txt", "a/../../x.jsonl", "x\0.txt"]
)
def test_the_name_of_a_member_is_no_path(tmp_path, name):
    folder = tmp_path / "deep/er/data"
    write(folder / "a.txt.zip", zipped((name, b'{"text": "inside"}')))
    write(folder / "b.zip", zipped((name, b'{"text": "inside"}')))
    before = everything_below(tmp_path)
    for source in (folder, folder / "b.zip"):
        documents, _ = read(source)
        assert "inside" in texts(documents)[0]
        assert {document.source for document in documents} <= {"data/a.txt.zip", "b.zip"}
    assert everything_below(tmp_path) == before
    assert not Path("/tmp/genlm-outside.txt").exists()


def test_a_text_that_would_fill_the_disk_is_refused_before_it_does(tmp_path, monkeypatch):
    bomb = write(tmp_path / "data/bomb.txt.gz", gzip.compress(b"0" * 5_000_000))
    monkeypatch.setattr(TextStore, "max_in_memory", 1000)
    monkeypatch.setattr(TextStore, "check_room_every", 100_000)
    room = [3_000_000]

    def disk(handle):
        used = os.fstat(handle).st_size
        return os.statvfs_result((1, 1, 0, 0, cache_module.SPARE_BYTES + room[0] - used, 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "fstatvfs", disk)
    for source in (bomb, bomb.parent):
        for damaged in ("stop", "skip"):  # it is not damaged: no other file would fit either
            message = complaint(source, damaged=damaged)
            assert "bomb.txt.gz" in message
            assert "HF_GENLM_CACHE" in message
            (written,) = (int(word.replace(",", "")) for word in message.split("after ")[1].split()[:1])
            assert 2_000_000 < written <= room[0]
    room[0] = 6_000_000
    assert read(bomb)[1]["bytes"] == 5_000_000


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst", ".zip", "bz2.zip"])
def test_unpacking_takes_bounded_memory(tmp_path, suffix):
    """Of a file that is up to 40,000 times as large as it looks, no part is larger than the largest block."""
    import bz2
    import io
    import lzma
    import zipfile

    import zstandard

    from hf_genlm.text.raw_files import COMPRESSIONS, unpacked

    zeros = bytes(120_000_000)
    packed = io.BytesIO()
    if suffix.endswith(".zip"):
        method = zipfile.ZIP_BZIP2 if suffix.startswith("bz2") else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(packed, "w", method) as archive:
            archive.writestr("a", zeros)
    else:
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lambda c: lzma.compress(c, preset=0),
                ".zst": zstandard.ZstdCompressor().compress}[suffix]  # fmt: skip
        packed.write(pack(zeros))
    packed.seek(0)
    compression = COMPRESSIONS["." + suffix.rsplit(".", 1)[1]]
    parts = [len(part) for part in unpacked("a", packed, compression)]
    assert sum(parts) == len(zeros)
    assert max(parts) < 100_000_000


def test_pipes_devices_and_links_in_a_folder(tmp_path):
    folder = tmp_path / "data"
    write(folder / "a.txt", "text a")
    os.mkfifo(folder / "pipe.txt")
    (folder / "zero.txt").symlink_to("/dev/zero")
    (folder / "nowhere.txt").symlink_to("missing.txt")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "round").symlink_to(folder)
    (folder / "twice.txt").symlink_to("a.txt")
    secret = write(tmp_path / "secret.txt", "text of another folder")
    (folder / "z.txt").symlink_to(secret)
    documents, report = read(folder)
    assert texts(documents) == ["text a", "text of another folder"]
    assert report["files_skipped"] == 5
    assert report["links_out"] == 1


# the access token

TOKEN = "marker-of-a-secret-token"


class Echo(http.server.BaseHTTPRequestHandler):
    """A Hub that answers every question with the token it was asked by."""

    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.headers.get("authorization", ""))
        body = json.dumps({"error": f"refused: {self.asked[-1]}"}).encode()
        self.send_response(401)
        self.send_header("X-Error-Message", f"refused: {self.asked[-1]}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def echoing_hub(monkeypatch):
    import huggingface_hub

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    real = huggingface_hub.HfApi
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint=address))
    Echo.asked.clear()
    yield Echo.asked
    server.shutdown()
    server.server_close()


def test_the_token_is_in_no_file_and_no_output(echoing_hub, tmp_path, capfd, caplog):
    write(tmp_path / "data.txt", "".join(f"line {i} of some text\n" for i in range(400)))
    small = [word for assignment in SMALL[1:-2] for word in ("--set", assignment)]
    options = [*small, "--steps", "2", "--set", "training.num_validations=0"]
    assert main(["train", str(tmp_path / "data.txt"), "--out", str(tmp_path / "run"), *options]) == 0
    assert main(["train", "owner/poems", "--out", str(tmp_path / "no"), *options]) == 2
    assert any(TOKEN in header for header in echoing_hub)  # it was sent, and came back in the answer
    shown = capfd.readouterr()
    assert "cannot be loaded" in shown.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    for content in (shown.out, shown.err, caplog.text, *(path.read_bytes() for path in files)):
        assert (TOKEN[:5] if isinstance(content, str) else TOKEN.encode()) not in content  # nor a part of it
    with pytest.raises(UserError) as caught:
        read("owner/poems")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("source", ["https://me:word-of-mine@host/owner/name", "hf_" + "a1B2" * 8])
def test_a_source_that_holds_a_login_is_refused(source, tmp_path, capsys):
    with pytest.raises(UserError, match="access token or a login"):
        CorpusRecipe(sources=[source])
    recipe = Recipe()
    with pytest.raises(UserError, match="access token or a login"):
        recipe.corpus.sources = [source]
    write(tmp_path / "recipe.yaml", f"corpus: {{validation: ['{source}']}}\n")
    places = [[source], ["--validation", source], [f"--{source}"], ["--set", source]]
    places += [["--set", f"corpus.sources={source}"], ["--recipe", str(tmp_path / "recipe.yaml")]]
    for arguments in places:
        assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert main(["evaluate", str(tmp_path), source]) == 2
    assert main(["tokenizer", source, "--out", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr()
    assert "word-of-mine" not in shown.err
    assert source not in shown.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("output_hidden_states", float("nan")), ("output_scores", "x"), ("min_p", "x"), ("use_cache", 1)],
)
def test_generation_settings_of_other_types_are_refused(field, value, tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({field: value}))
    with pytest.raises(UserError, match=field):
        check_files(tmp_path)
