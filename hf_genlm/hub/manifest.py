"""Upload manifest: the files of a model folder, their sizes, and whatever must not be published.

A finding names file, line and kind; the secret itself is never printed.
"""

import fnmatch
import json
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_genlm.errors import (
    BEGIN_OF_PRIVATE_KEY,
    GITHUB_FINE_GRAINED,
    GOOGLE,
    UserError,
    did_you_mean,
    without_secrets,
)
from hf_genlm.files import read_json, refuse_links_out
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
_PICKLE_HEADER = re.compile(rb"\x80[\x02-\x05]")
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
    "pickle": Kind("a pickle, which can run code when it is loaded", "remove it"),
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
        """Return the run's models after given numbers of words, oldest first.

        Raises:
            UserError: there are none.
        """
        folders = [] if self.run is None else self.run.milestones.glob("chck_*")
        found = sorted(folders, key=lambda folder: (folder.stat().st_mtime, folder.name))
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
        return sorted({text for file in files for text in _strings(read_json(file))})


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


def build_manifest(source: ModelSource) -> Manifest:
    """List all files of a model folder and scan them for whatever must not be published."""
    canaries = source.canaries()
    sizes: dict[str, int] = {}
    findings: set[Finding] = set()
    root = source.folder.resolve()
    for path in sorted(source.folder.rglob("*")):
        name = path.relative_to(source.folder).as_posix()
        if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
            findings.add(Finding("link", name))
        elif path.is_file():
            sizes[name] = path.stat().st_size
            findings.update(_scan_file(path, name))
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
    with path.open("rb") as file:
        is_pickle = _PICKLE_HEADER.match(file.read(2)) is not None
    if is_pickle or any(fnmatch.fnmatch(path.name, pattern) for pattern in _PICKLE):
        yield Finding("pickle", name)
    elif not any(name.count("/") == p.count("/") and fnmatch.fnmatchcase(name, p) for p in PUBLISHED_FILES):
        yield Finding("unlisted", name)


def _scan_lines(path: Path, name: str, canaries: Sequence[str]) -> Iterator[Finding]:
    """Search the text of a file; a finding in a PNG has no line number."""
    spellings = [
        spelling for text in canaries for spelling in (text, json.dumps(text, ensure_ascii=False)[1:-1])
    ]
    home = str(Path.home())
    for count, line in enumerate(_read_text(path).split("\n"), 1):
        number = None if path.suffix == ".png" else count
        unescaped = _ESCAPED_SPACE.sub(" ", line)
        if without_secrets(line) != line or any(pattern.search(line) for pattern in _TOKENS):
            yield Finding("token", name, number)
        if any(p.search(unescaped) for p in _HOME_PATHS) or (home.count("/") > 1 and home in unescaped):
            yield Finding("home-path", name, number)
        if any(spelling in line for spelling in spellings):
            yield Finding("canary", name, number)


def _read_text(path: Path) -> str:
    """Read a file as text: of safetensors only the header, of a PNG also the texts it holds compressed."""
    if path.suffix == ".png":
        return b"\n".join([path.read_bytes(), *_png_texts(path)]).decode("utf-8", errors="replace")
    if path.suffix != ".safetensors":
        return path.read_text(encoding="utf-8", errors="replace")
    with path.open("rb") as file:
        prefix = file.read(8)
        num_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        return file.read(min(num_bytes, path.stat().st_size)).decode("utf-8", errors="replace")


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


def _strings(content: Any) -> Iterator[str]:
    """Yield every string value in parsed JSON that is long enough to identify a canary."""
    if isinstance(content, str):
        if len(content.strip()) >= _MIN_CANARY_LENGTH:
            yield content.strip()
    elif isinstance(content, (list, dict)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _strings(item)
