"""Manifest: the files of a model folder that leave the machine, and whatever in them must not be published.

`push`, `space` and `export` check their files here. A finding names file, line and kind; the secret itself is
never printed.

Code counts as this package's by its bytes alone, never by its name. A pickle is known by its opcodes.
"""

import contextlib
import fnmatch
import hashlib
import io
import itertools
import json
import os
import pickletools
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from hf_genlm.errors import (
    BEGIN_OF_PRIVATE_KEY,
    GITHUB_FINE_GRAINED,
    GOOGLE,
    UserError,
    did_you_mean,
    without_secrets,
)
from hf_genlm.files import read_json, read_tensor_sizes, refuse_links_out, sha256_of
from hf_genlm.memory import MAX_BYTES, check_sizes
from hf_genlm.run_folder import RunFolder

# files from which transformers loads a model and its tokenizer
MODEL_FILES = (
    "config.json", "generation_config.json",
    "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip
# files that belong in a model repository; any other is an `unlisted` finding
PUBLISHED_FILES = ("README.md", "LICENSE", *MODEL_FILES, "*_genlm.py", "plots/*.png")
_CHECKPOINT = ("checkpoint*/*", "optimizer.*", "scheduler.*", "rng_state*", "scaler.*", "trainer_state.json")
_PICKLE = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")
_READERS: dict[str, Callable[[Path], Any]] = {".safetensors": read_tensor_sizes, ".json": read_json}
CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh")
_OWN_CODE = Path(__file__).parents[1] / "model"
# sha256 of the code of released versions by file name, for models that these saved; none is released yet
RELEASED_CODE: dict[str, set[str]] = {}
POINTERS = ("auto_map", "custom_pipelines")  # keys of JSON files whose values name code to load
# opcodes of a pickle without a header that calls something: a name, its arguments and the call. It is matched
# from the start, where each part can match in one way: time is linear
_CALLS = re.compile(
    r"(?s)[^c\x93]*[c\x93](?:[^)t\x85-\x87]*[)t\x85-\x87][^R\x81]*[R\x81]|[^\x92]*\x92|.[^b]*b)"
    r"|[^(]*\((?:[^i]*i|[^c]*c[^o]*o)"
)
_NAME_OF_CODE = re.compile(r"[\w.]+ [\w.]+")  # module and attribute
_OPCODES = {opcode.code for opcode in pickletools.opcodes}
_MAX_OPCODES = 1_000_000
_MAX_LINE = 1 << 20
# first bytes of packed files: gzip, bzip2, xz, lzma, zlib (joblib), Zstandard, 7-Zip, RAR, compress, LZ4
_PACKED = (
    b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\0\0", b"x\x01", b"x\x9c", b"x\xda", b"\x28\xb5\x2f\xfd",
    b"7z\xbc\xaf", b"Rar!", b"\x1f\x9d", b"\x04\x22\x4d\x18",
)  # fmt: skip
_MIN_CANARY_LENGTH = 8  # characters: a shorter string of canaries.json would match ordinary text


@dataclass(frozen=True)
class Kind:
    """A kind of finding: description, remedy, and whether `allow` can let it pass."""

    description: str
    remedy: str
    is_allowable: bool = False


KINDS = {
    "canaries": Kind("the canaries planted for an audit", "move the file out of the folder"),
    "canary": Kind("a canary planted for an audit", "remove it from samples.md, or train again"),
    "checkpoint": Kind("training state", "move it out of the folder"),
    "code": Kind(
        "code that is not this package's, or a config that names such code",
        "load the model and save it again with save_pretrained, or remove it",
        True,
    ),
    "pickle": Kind(
        "a pickle, which can run code when it is loaded, or an archive, which can hold one", "remove it", True
    ),
    "format": Kind("not of the format that its name says", "save the model again"),
    "link": Kind("a link that leads out of the folder", "replace it by the file itself"),
    "unlisted": Kind("not a file of a model repository", "move it out of the folder", True),
    "token": Kind("an access token, password or private key", "remove it, and revoke it", True),
    "home-path": Kind("an absolute path below a home directory", "remove it", True),
}
# in addition to Hub tokens and logins in URLs, which `without_secrets` finds
_TOKENS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\bgh[pousr]_[A-Za-z0-9]{36}",  # GitHub
        GITHUB_FINE_GRAINED,
        r"\bglpat-[\w-]{20}",  # GitLab
        r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",  # AWS
        GOOGLE,
        r"\bsk-[\w-]{32,}",  # OpenAI, Anthropic
        r"\bxox[abeprs]-[\w-]{10,}",  # Slack
        r"\bpypi-[\w-]{50,}",
        r"\bnpm_[A-Za-z0-9]{36}",
        BEGIN_OF_PRIVATE_KEY,
    )
)
_HOME_PATHS = (
    re.compile(r"(?<![\w.~/\\-])/+(?:home|Users|root)/+[^/\s\"'`<>|)\\]+"),
    re.compile(r"(?<![A-Za-z])[A-Za-z]:[\\/]+Users[\\/]+[^\\/\s\"'`<>|)]+"),
)
_ESCAPED_SPACE = re.compile(r"\\[ntr]")


@dataclass(frozen=True)
class ModelSource:
    """A model folder to publish, and the run that trained it, if any."""

    folder: Path
    run: RunFolder | None = None

    @classmethod
    def find(cls, path: str | Path) -> "ModelSource":
        """Find the model of a run folder, of its model/, or of any other model folder.

        Raises:
            UserError: there is no complete model, or a link leads out of the run.
        """
        given = Path(path)
        run = None
        for candidate in map(RunFolder, (given, given.parent)):
            own_paths = (candidate.path.resolve(), candidate.model.resolve())
            if run is None and candidate.recipe.is_file() and given.resolve() in own_paths:
                run = candidate
        if run is not None:
            refuse_links_out(run.path)
        folder = given if run is None else run.model
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise UserError(
                f"{str(path)!r} holds no complete model: neither it nor its model/ has config.json and "
                "weights in safetensors; 'train' writes them"
            )
        return cls(folder, run)

    def milestones(self) -> list["ModelSource"]:
        """Return the run's models after given numbers of words, ascending.

        Raises:
            UserError: there are none.
        """
        found = [] if self.run is None else self.run.list_milestones()
        if not found:
            raise UserError(
                f"--branches: {str(self.folder)!r} belongs to no run with milestones/; set "
                "training.milestone_words to train one"
            )
        return [ModelSource(folder, self.run) for folder in found]

    def canaries(self) -> list[str]:
        """Return the texts in canaries.json of the run that the model or milestone lies in."""
        runs = [RunFolder(parent) for parent in list(self.folder.resolve().parents)[:2]]
        files = [run.canaries for run in runs if run.canaries.is_file()]
        return sorted({text for file in files for text in _strings(read_json(file), _MIN_CANARY_LENGTH)})


@dataclass(frozen=True, order=True)
class Finding:
    """Something that must not be published: a file, or one line of it."""

    kind: str  # key of KINDS
    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Manifest:
    """Files to upload from a model folder: size in bytes by relative path, and findings."""

    folder: Path
    sizes: dict[str, int]
    findings: list[Finding]

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def paths(self) -> dict[str, Path]:
        """Local file by path in the repository."""
        return {name: self.folder / name for name in self.sizes}


def build_manifest(source: ModelSource, only: Sequence[str] | None = None) -> Manifest:
    """List the files of a model folder that leave, and scan them for whatever must not be published.

    Args:
        only: patterns of the files that leave, data without the code that loads them; None: all files.

    Raises:
        UserError: a file of text is too large to be scanned.
    """
    check_sizes(source.folder)
    canaries = source.canaries()
    sizes: dict[str, int] = {}
    findings: set[Finding] = set()
    root = source.folder.resolve()
    for path in sorted(source.folder.rglob("*")):
        name = path.relative_to(source.folder).as_posix()
        if only is not None and not _matches(name, only):
            continue
        if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
            findings.add(Finding("link", name))
        elif path.is_file():
            sizes[name] = path.stat().st_size
            findings.update(_scan_file(path, name))
            if only is None and path.suffix == ".json":
                findings.update(_scan_pointers(path, name))
            findings.update(_scan_lines(path, name, canaries))
    in_order = sorted(findings, key=lambda found: (found.file, found.line or 0, found.kind))
    return Manifest(source.folder, sizes, in_order)


def check_findings(manifests: Sequence[Manifest], allow: Sequence[str] = ()) -> None:
    """Refuse manifests with findings, except those in `allow`, such as `README.md:home-path`.

    Raises:
        UserError: names each finding with its remedy; or an entry of `allow` that matches nothing.
    """
    allowed = set()
    for entry in allow:
        file, _, kind = entry.rpartition(":")
        if kind not in KINDS or not KINDS[kind].is_allowable:
            known = [name for name, row in KINDS.items() if row.is_allowable]
            raise UserError(f"--allow {entry!r} is not FILE:KIND{did_you_mean(kind, known)}")
        if not any((found.file, found.kind) == (file, kind) for each in manifests for found in each.findings):
            raise UserError(f"--allow {entry!r}: no {kind} was found in that file; omit it")
        allowed.add((file, kind))
    refused = []
    for each in manifests:
        findings = [found for found in each.findings if (found.file, found.kind) not in allowed]
        for name, row in KINDS.items():
            places = ", ".join(str(found) for found in findings if found.kind == name)
            if places:
                remedy = row.remedy + (f", or --allow FILE:{name}" if row.is_allowable else "")
                refused.append(f"{str(each.folder)!r}: {places}: {name} ({row.description}; {remedy})")
    if refused:
        raise UserError(f"not published: {'; '.join(refused)}")


def _scan_file(path: Path, name: str) -> Iterator[Finding]:
    """Classify a file by its name and first bytes."""
    if path.name == "canaries.json":
        yield Finding("canaries", name)
        return
    if any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(path.name, pattern) for pattern in _CHECKPOINT):
        yield Finding("checkpoint", name)
        return
    suffix = path.suffix.lower()
    is_damaged, is_pickle = True, any(fnmatch.fnmatch(path.name, pattern) for pattern in _PICKLE)
    with contextlib.suppress(UserError):
        is_damaged = _READERS[suffix](path) is None if suffix in _READERS else False
    if is_damaged or suffix not in _READERS:
        with path.open("rb") as file:
            is_pickle = is_pickle or _may_be_unpickled(file)
    if is_pickle:
        yield Finding("pickle", name)
    elif is_damaged:
        yield Finding("format", name)
    if suffix in CODE and sha256_of(path) not in _hashes_of_own_code(name):
        yield Finding("code", name)
    elif not is_pickle and not _matches(name, PUBLISHED_FILES):
        yield Finding("unlisted", name)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name.count("/") == p.count("/") and fnmatch.fnmatchcase(name, p) for p in patterns)


def _hashes_of_own_code(name: str) -> set[str]:
    """Hashes of a file of this package that travels with a model, in this version and in released ones: as it
    is saved, and as it stands here, which earlier saves held."""
    from hf_genlm.model.bundle import bundle

    own = _OWN_CODE / name
    is_own = fnmatch.fnmatchcase(name, "*_genlm.py") and "/" not in name and own.is_file()
    hashes = {sha256_of(own)} if is_own else set()
    if name in (saved := bundle()):
        hashes.add(hashlib.sha256(saved[name].encode()).hexdigest())
    return RELEASED_CODE.get(name, set()) | hashes


def _scan_pointers(path: Path, name: str) -> Iterator[Finding]:
    """Find keys of JSON, also repeated ones, by which transformers loads code that is not this package's."""
    named: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        named.extend(text for key, value in pairs if key in POINTERS for text in _strings(value, 1))
        return dict(pairs)

    with contextlib.suppress(ValueError, RecursionError):  # a `format` finding
        json.loads(path.read_bytes(), object_pairs_hook=collect)
    if any(not _hashes_of_own_code(f"{text.partition('.')[0]}.py") for text in named):
        yield Finding("code", name)


def _may_be_unpickled(file: BinaryIO) -> bool:
    """True if a file is a pickle, an array of objects, or an archive, whatever it is called.

    A pickle has the header of one, or its opcodes call something, or they end where the file ends.
    """
    head, codes = file.read(256), []
    is_object_array = head.startswith(b"\x93NUMPY") and b"|O" in head
    has_header = len(head) > 2 and head[0] == 0x80 and head[1] <= 5 and chr(head[2]) in _OPCODES
    if is_object_array or has_header or head.startswith(_PACKED):
        return True
    file.seek(0)
    with contextlib.suppress(ValueError, OverflowError, MemoryError):
        for opcode, argument, _ in itertools.islice(pickletools.genops(file), _MAX_OPCODES):
            if opcode.code in "ci" and not _NAME_OF_CODE.fullmatch(str(argument)):
                break
            codes.append(opcode.code)
    is_whole = codes[-1:] == ["."] and len(codes) > 1 and not file.read(1)
    if is_whole or len(codes) == _MAX_OPCODES or _CALLS.match("".join(codes)):
        return True
    file.seek(0)
    if zipfile.is_zipfile(file):
        return True
    file.seek(0)
    with contextlib.suppress(tarfile.TarError):  # not is_tarfile, which searches zeros for a compressed one
        return bool(tarfile.open(fileobj=file, mode="r:"))
    return False


def _scan_lines(path: Path, name: str, canaries: Sequence[str]) -> Iterator[Finding]:
    """Search the text of a file; a finding in a PNG has no line number."""
    spellings = [
        spelling for text in canaries for spelling in (text, json.dumps(text, ensure_ascii=False)[1:-1])
    ]
    home = os.path.expanduser("~")
    for count, line in enumerate(_lines_of(path), 1):
        number = None if path.suffix == ".png" else count
        unescaped = _ESCAPED_SPACE.sub(" ", line)
        if without_secrets(line) != line or any(pattern.search(line) for pattern in _TOKENS):
            yield Finding("token", name, number)
        if any(p.search(unescaped) for p in _HOME_PATHS) or (home.count("/") > 1 and home in unescaped):
            yield Finding("home-path", name, number)
        if any(spelling in line for spelling in spellings):
            yield Finding("canary", name, number)


def _lines_of(path: Path) -> Iterator[str]:
    """Read a file as text, line by line, a line of more than `_MAX_LINE` bytes in parts: of safetensors only
    the header, of a PNG also the texts it holds compressed."""
    with path.open("rb") as file:
        contents: list[IO[bytes]] = [file]
        if path.suffix == ".safetensors":
            (n_bytes,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            contents = [io.BytesIO(file.read(min(n_bytes, MAX_BYTES)))]
        if path.suffix == ".png":
            contents += map(io.BytesIO, _png_texts(path))
        for content in contents:
            while line := content.readline(_MAX_LINE):
                text = line.decode("utf-8", errors="replace").rstrip("\r\n")
                yield text if path.suffix == ".png" else text.replace("\0", "")  # of UTF-16


def _png_texts(path: Path) -> list[bytes]:
    """Return every text and profile in a PNG, inflated.

    Raises:
        UserError: it is not a PNG, or not a sound one.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # texts may follow the pixels
            values = list(image.info.values())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{str(path)!r} is not a readable PNG: remove it from the model folder") from error
    return [value if isinstance(value, bytes) else str(value).encode() for value in values]


def _strings(content: Any, min_length: int) -> Iterator[str]:
    """Yield every string value in parsed JSON that has at least `min_length` characters."""
    if isinstance(content, str):
        if len(content.strip()) >= min_length:
            yield content.strip()
    elif isinstance(content, (list, dict)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _strings(item, min_length)
