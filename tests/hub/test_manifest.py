"""Promise: what leaves by push, space or export is checked by content, and what is refused can be allowed by
name."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from support.command_line import last_line
from support.models import build_model

import hf_genlm
from hf_genlm.cli.main import main
from hf_genlm.config.recipe import TokenizerRecipe
from hf_genlm.hub import manifest
from hf_genlm.hub.manifest import ModelSource, build_manifest, check_findings
from hf_genlm.model.bundle import bundle
from hf_genlm.text.store import Document
from hf_genlm.text.tokenizer import train_tokenizer

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\n-----END OPENSSH PRIVATE KEY-----\n"
CODE = Path(hf_genlm.__file__).parent / "model" / "mlp_genlm.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    llama = {"gated_mlp": True, "hidden_act": "silu", "qk_norm": False}
    build_model(["full_attention"], vocab_size=300, **llama).save_pretrained(folder)
    train_tokenizer([Document("a text", "here")], TokenizerRecipe(), 6).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    for path in saved.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "model"


def findings_of(folder: Path, **options) -> list[str]:
    return [f"{found} {found.kind}" for found in build_manifest(ModelSource(folder), **options).findings]


def kinds_of(folder: Path, name: str, content: bytes) -> list[str]:
    """Kinds of finding of a folder that holds this file alone."""
    path = folder / name
    path.write_bytes(content)
    found = [each.kind for each in build_manifest(ModelSource(folder)).findings]
    path.unlink()
    return found


class Malicious:
    def __reduce__(self):
        return os.system, ("true",)


def tarred(content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo("data.json")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def zipped(content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("data.json", content)
    return packed.getvalue()


def saved_by(write, value, **options) -> bytes:
    packed = io.BytesIO()
    write(*((value, packed) if write is torch.save else (packed, value)), **options)
    return packed.getvalue()


PICKLES = {f"protocol {number}": pickle.dumps(Malicious(), number) for number in range(6)}
PICKLES |= {f"data, protocol {number}": pickle.dumps({"a": [1, "x"]}, number) for number in range(6)}
PICKLES |= {
    "INST": b"(S'true'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'true'\no.",
    "without an end": b"cos\nsystem\n(S'true'\ntR",
    "many opcodes before the call": b"N0" * 600_000 + b"cos\nsystem\n(S'true'\ntR.",
    "torch": saved_by(torch.save, {"w": torch.ones(1)}),
    "torch before 1.6": saved_by(torch.save, {"w": torch.ones(1)}, _use_new_zipfile_serialization=False),
    "numpy": saved_by(np.save, np.array([Malicious()], dtype=object), allow_pickle=True),
}
NAMES = ["model.safetensors", "config.json", "vocab.txt", "README.md", "tokenizer.model", "notes", "x.PKL"]


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_found_by_every_name(kind, tmp_path):
    for name in NAMES:
        assert kinds_of(tmp_path, name, PICKLES[kind]) == ["pickle"], name


PACKED = {
    "tar": tarred, "zip": zipped, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress,
    "zlib": zlib.compress, "lzma": lambda content: lzma.compress(content, format=lzma.FORMAT_ALONE),
    "tar.gz": lambda content: gzip.compress(tarred(content)),
    "zip behind a text": lambda content: b"a text\n" + zipped(content),
}  # fmt: skip


@pytest.mark.parametrize("packed", PACKED)
def test_a_pickle_in_an_archive_is_found_by_every_name(packed, tmp_path):
    for name in ["data.tar", "data.gz", *NAMES[:-1]]:
        assert kinds_of(tmp_path, name, PACKED[packed](PICKLES["protocol 2"])) == ["pickle"], name


@pytest.mark.parametrize("n_bytes", [640, 896, 1152, 1408])
def test_a_header_of_safetensors_that_begins_like_a_pickle_is_none(n_bytes, folder):
    """One-layer LSTMs of width 64 have such headers."""
    path = folder / "model.safetensors"
    tensors = build_model(["lstm"], hidden_size=64).state_dict()
    tensors = dict(list(tensors.items())[:3])
    short = int.from_bytes(save(tensors, {"x": ""})[:8], "little")
    for length in range(n_bytes - short - 8, n_bytes - short + 1):
        save_file(tensors, path, {"x": "y" * length})
        if path.read_bytes()[:8] == n_bytes.to_bytes(8, "little"):
            break
    assert path.read_bytes()[:8] == n_bytes.to_bytes(8, "little")
    assert path.read_bytes()[0] == 0x80
    assert findings_of(folder) == []


@pytest.mark.parametrize(
    "text",
    ["cat\ndog\nRat\nbird\n", "(c) 2026 Ada\nAll rights\nobtained", "1.0", "N.B. this", "i am\nhere\n",
     "(img src\nx\n", "", "---\nlicense: mit\n---\n", "\0" * 40],
)  # fmt: skip
def test_ordinary_files_are_no_pickles(text, tmp_path):
    assert kinds_of(tmp_path, "vocab.txt", text.encode()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 200),
        ("config.json", b"{"),
        ("vocab.json", b"\xff"),
    ],
)
def test_a_file_is_of_the_format_that_its_name_says(name, content, folder):
    (folder / name).write_bytes(content)
    assert findings_of(folder) == [f"{name} format"]


def test_a_pickle_is_allowed_by_name_alone(folder):
    (folder / "training_args.bin").write_bytes(PICKLES["protocol 2"])
    (folder / "vocab.txt").write_bytes(PICKLES["protocol 0"])
    found = [build_manifest(ModelSource(folder))]
    with pytest.raises(hf_genlm.UserError, match=r"vocab\.txt: pickle \(.*--allow FILE:pickle"):
        check_findings(found, ["training_args.bin:pickle"])
    check_findings(found, ["training_args.bin:pickle", "vocab.txt:pickle"])


def pointing(**content) -> bytes:
    return json.dumps({"model_type": "genlm", **content}).encode()


ELSEWHERE = {"auto_map": {"AutoModelForCausalLM": "evil/x--modeling_genlm.GenLMForCausalLM"}}
TASK = {"mine": {"impl": "pipeline.Mine", "pt": ["AutoModelForCausalLM"], "type": "text"}}
STRANGE = {
    "one byte more": ("mlp_genlm.py", CODE.read_bytes() + b"\n"),
    "the name of another file": ("loss_genlm.py", CODE.read_bytes()),
    "our bytes by a new name": ("more_genlm.py", CODE.read_bytes()),
    "our bytes in a folder": ("more/mlp_genlm.py", CODE.read_bytes()),
    "a name like ours": ("evil_genlm.py", b""),
    "a module": ("modeling_evil.py", b""),
    "upper case": ("SETUP.PY", b""),
    "compiled": ("__pycache__/mlp_genlm.cpython-311.pyc", b""),
    "a library": ("fast.so", b""),
    "a generation loop": ("custom_generate/generate.py", b""),
    "another repository": ("config.json", pointing(**ELSEWHERE)),
    "within a part of the config": ("config.json", pointing(text_config=ELSEWHERE)),
    "two keys of one name": ("config.json", b'{"auto_map": {"AutoModel": "e.M"}, "auto_map": {}}'),
    "a short name": ("config.json", pointing(auto_map={"AutoConfig": "e.C"})),
    "a pipeline": ("config.json", pointing(custom_pipelines=TASK)),
    "a tokenizer": ("tokenizer_config.json", pointing(auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]})),
    "an old tokenizer": ("tokenizer_config.json", pointing(auto_map=["evil.Tokenizer", None])),
    "generation": ("generation_config.json", pointing(**ELSEWHERE)),
}


@pytest.mark.parametrize("case", STRANGE)
def test_code_of_others_is_found_and_allowed_by_name(case, folder, tmp_path, capsys):
    name, content = STRANGE[case]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    assert findings_of(folder) == [f"{name} code"]
    assert main(["push", str(folder), "me/tale", "--dry-run"]) == 2
    assert f"{name}: code (" in last_line(capsys)
    assert main(["push", str(folder), "me/tale", "--dry-run", "--allow", f"{name}:code"]) == 0


@pytest.mark.parametrize(
    "name", ["processor_config.json", "preprocessor_config.json", "adapter_config.json", "modules.json"]
)
def test_other_files_that_name_code_are_found_even_if_the_file_is_allowed(name, folder):
    (folder / name).write_bytes(pointing(auto_map={"AutoProcessor": "evil.Processor"}))
    assert findings_of(folder) == [f"{name} code", f"{name} unlisted"]


def test_our_code_as_it_is_saved_and_as_it_stands_here_is_no_finding(folder):
    for name, text in bundle().items():
        (folder / name).write_text(text, encoding="utf-8")
    assert findings_of(folder) == []
    for path in CODE.parent.glob("*_genlm.py"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert findings_of(folder) == []
    (folder / "modeling_genlm.py").write_text(bundle()["modeling_genlm.py"] + "\n", encoding="utf-8")
    assert findings_of(folder) == ["modeling_genlm.py code"]


def test_our_code_and_that_of_a_release_is_no_finding(folder, monkeypatch):
    assert findings_of(folder) == []
    old = b"# an older version\n"
    (folder / "mlp_genlm.py").write_bytes(old)
    (folder / "gone_genlm.py").write_bytes(old)
    assert findings_of(folder) == ["gone_genlm.py code", "mlp_genlm.py code"]
    known = {hashlib.sha256(old).hexdigest()}
    monkeypatch.setattr(manifest, "RELEASED_CODE", {"mlp_genlm.py": known, "gone_genlm.py": known})
    assert findings_of(folder) == []


# what leaves by a demo or an export


def leave(verb: str, folder: Path, *options: str) -> int:
    to = ["--to", "llama"] if verb == "export" else []
    return main([verb, str(folder), "--out", str(folder.parent / "out"), *to, *options])


@pytest.fixture
def key(tmp_path) -> Path:
    (tmp_path / "ssh").mkdir()
    (tmp_path / "ssh" / "id_ed25519").write_text(KEY)
    return tmp_path / "ssh" / "id_ed25519"


@pytest.mark.parametrize("verb", ["space", "export"])
@pytest.mark.parametrize(
    "name", ["vocab.txt", "chat_template.jinja", "tokenizer_config.json", "config.json", "README.md"]
)
def test_what_a_link_leads_to_does_not_leave(name, verb, folder, key, capsys):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(key)
    code = leave(verb, folder)
    assert KEY.encode() not in b"".join(
        p.read_bytes() for p in folder.parent.rglob("out/**/*") if p.is_file()
    )
    assert code == 2
    assert "link" in last_line(capsys) or name == "config.json"
    assert not (folder.parent / "out").exists()


def test_a_link_at_model_of_a_run_does_not_leave(folder, saved, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("")
    (run / "model").symlink_to(saved)
    assert leave("space", run) == 2
    assert "is a link to" in last_line(capsys)


@pytest.mark.parametrize("verb", ["space", "export"])
@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("merges.txt", KEY.encode(), "token"),
        ("vocab.txt", PICKLES["protocol 0"], "pickle"),
        ("chat_template.jinja", b"{# /home/ann/novel #}", "home-path"),
    ],
)
def test_secrets_and_pickles_do_not_leave_unless_allowed(name, content, kind, verb, folder, capsys):
    (folder / name).write_bytes(content)
    assert leave(verb, folder) == 2
    assert f"{name}{':1' if kind != 'pickle' else ''}: {kind} (" in last_line(capsys)
    assert not (folder.parent / "out").exists()
    if verb == "space":
        assert leave(verb, folder, "--allow", f"{name}:{kind}") == 0


def test_the_card_of_an_export_is_checked(folder, capsys):
    (folder / "README.md").write_text("the text was /home/ann/novel.txt\n")
    assert leave("export", folder) == 2
    assert "README.md:1: home-path" in last_line(capsys)
    assert leave("export", folder, "--allow", "README.md:home-path") == 0
    assert "/home/ann" in (folder.parent / "out" / "model_card.md").read_text()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_long_line_is_searched_in_parts(encoding, tmp_path):
    """A file of 1 GB without a line end is not held."""
    token = "hf_" + "aB3" * 12
    path = tmp_path / "notes.txt"
    path.write_bytes(("x" * 3_000_000 + "\n" + f"key {token}\n").encode(encoding))
    assert max(map(len, manifest._lines_of(path))) <= 1 << 20
    assert "token" in {finding.kind for finding in manifest._scan_lines(path, "notes.txt", [])}
    header = json.dumps({"__metadata__": {"note": token}}).encode()
    tensors = tmp_path / "model.safetensors"
    tensors.write_bytes(len(header).to_bytes(8, "little") + header)
    assert [finding.kind for finding in manifest._scan_lines(tensors, "model.safetensors", [])] == ["token"]
    tensors.write_bytes(b"\xff" * 8 + header)
    assert list(manifest._lines_of(tensors)) == [header.decode()]
