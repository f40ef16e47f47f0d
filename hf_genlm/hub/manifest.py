"""What leaves with a push: every file and its size, and what must not leave, named by file, line and kind.

A secret is never part of what is said about it.
"""

import fnmatch
import json
import re
import struct
import zlib
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
from hf_genlm.run_folder import read_json

# what loads a model and its tokenizer
LOADED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
# what a model folder has; anything else is named before it leaves
LISTED = ("README.md", "LICENSE", *LOADED, "*_genlm.py", "plots/*.png")
_CHECKPOINT = ("checkpoint*/*", "optimizer.*", "scheduler.*", "rng_state*", "scaler.*", "trainer_state.json")
_PICKLE = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")
_CANARIES = "canaries.json"
_PICTURE = ".png"
_PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins
_MOST_TEXT = 1 << 24  # bytes that a packed text of a picture is unpacked to
_WEIGHTS = ".safetensors"
_LEAST_CANARY = 8  # characters: a shorter string of canaries.json would be found in any text


@dataclass(frozen=True)
class Kind:
    """Something that must not leave: what it is, what to do, and whether a person may let it pass."""

    what: str
    remedy: str
    may_pass: bool = False


KINDS = {
    "canaries": Kind("the secrets that an audit planted", "move the file out of the folder"),
    "canary": Kind("a secret that an audit planted", "take it out of samples.md, or train again"),
    "checkpoint": Kind("the state of a training", "move it out of the folder"),
    "pickle": Kind("a pickle, which can run code where it is loaded", "remove it"),
    "link": Kind("a link that leads out of the folder", "put the file itself there"),
    "unlisted": Kind("no file that a model folder has", "move it out of the folder", True),
    "token": Kind("an access token, password or private key", "take it out, and revoke it", True),
    "home-path": Kind("an absolute path below somebody's home", "take it out", True),
}
_TOKENS = tuple(  # besides those that `without_secrets` knows
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
_HOMES = (
    re.compile(r"(?:(?<![\w.~/\\-])|(?<=file:/)|(?<=file://))/+(?:home|Users|root)/+[^/\s\"'`<>|)\\]+"),
    re.compile(r"(?<![A-Za-z])[A-Za-z]:[\\/]+Users[\\/]+[^\\/\s\"'`<>|)]+"),
)
_ESCAPED_SPACE = re.compile(r"\\[ntr]")


@dataclass(frozen=True, order=True)
class Finding:
    """Something of a kind, in a line of a file, or the file itself where `line` is None."""

    kind: str
    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Leaving:
    """Sizes in bytes by path in the folder, and what must not leave."""

    folder: Path
    sizes: dict[str, int]
    findings: list[Finding]


def check(folders: Sequence[Leaving], allowed: Sequence[str] = ()) -> None:
    """Refuse what was found, but for `allowed`, as `README.md:home-path`, in any of the folders.

    Raises:
        UserError: it names each finding and its remedy; or an entry of `allowed` that allows nothing.
    """
    passing = set()
    for entry in allowed:
        file, _, kind = entry.rpartition(":")
        if kind not in KINDS or not KINDS[kind].may_pass:
            known = [name for name, row in KINDS.items() if row.may_pass]
            raise UserError(f"--allow {entry!r} is no FILE:KIND{did_you_mean(kind, known)}")
        if not any((found.file, found.kind) == (file, kind) for each in folders for found in each.findings):
            raise UserError(f"--allow {entry!r}: no {kind} was found in that file; leave it away")
        passing.add((file, kind))
    refused = []
    for each in folders:
        kept = [found for found in each.findings if (found.file, found.kind) not in passing]
        if kept:
            refused.append(f"{str(each.folder)!r} must not leave: {_in_words(kept)}")
    if refused:
        raise UserError("; ".join(refused))


def _in_words(findings: Sequence[Finding]) -> str:
    parts = []
    for name, kind in KINDS.items():
        places = [str(found) for found in findings if found.kind == name]
        if places:
            allow = f", or --allow FILE:{name}" if kind.may_pass else ""
            parts.append(f"{', '.join(places)}: {name} ({kind.what}; {kind.remedy}{allow})")
    return "; ".join(parts)


def canary_texts(canaries: Path) -> list[str]:
    """Every string in a run's canaries.json that would tell a secret; none where there is no such file."""
    return sorted(set(_strings(read_json(canaries)))) if canaries.is_file() else []


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        if len(content.strip()) >= _LEAST_CANARY:
            yield content.strip()
    elif isinstance(content, (list, dict)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _strings(item)


def inspect(folder: Path, secrets: Sequence[str] = ()) -> Leaving:
    """All files of `folder`, and what of them must not leave.

    Args:
        folder: of a model, as `save_pretrained` writes it.
        secrets: texts that may stand in no file, as canaries.
    """
    sizes: dict[str, int] = {}
    findings: set[Finding] = set()
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
            findings.add(Finding("link", name))
        elif path.is_file():
            sizes[name] = path.stat().st_size
            kind = _kind_of(path, name)
            if kind is not None:
                findings.add(Finding(kind, name))
            findings.update(_found_in(path, name, secrets))
    return Leaving(
        folder, sizes, sorted(findings, key=lambda found: (found.file, found.line or 0, found.kind))
    )


def _kind_of(path: Path, name: str) -> str | None:
    """What a file is by its name and first bytes; None: one that belongs to a model."""
    if path.name == _CANARIES:
        return "canaries"
    if any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(path.name, pattern) for pattern in _CHECKPOINT):
        return "checkpoint"
    with path.open("rb") as file:
        is_pickled = re.match(rb"\x80[\x02-\x05]", file.read(2)) is not None
    if is_pickled or any(fnmatch.fnmatch(path.name, pattern) for pattern in _PICKLE):
        return "pickle"
    return None if is_listed(name) else "unlisted"


def is_listed(name: str) -> bool:
    """True if a model folder has a file of this path."""
    return any(name.count("/") == p.count("/") and fnmatch.fnmatchcase(name, p) for p in LISTED)


def _found_in(path: Path, name: str, secrets: Sequence[str]) -> Iterator[Finding]:
    wanted = {secret: json.dumps(secret, ensure_ascii=False)[1:-1] for secret in secrets}
    home = str(Path.home())
    for count, line in enumerate(_text_of(path).split("\n"), 1):
        number = None if path.suffix == _PICTURE else count
        plain = _ESCAPED_SPACE.sub(" ", line)
        if without_secrets(line) != line or any(pattern.search(line) for pattern in _TOKENS):
            yield Finding("token", name, number)
        if any(pattern.search(plain) for pattern in _HOMES) or (home.count("/") > 1 and home in plain):
            yield Finding("home-path", name, number)
        if any(secret in line or escaped in line for secret, escaped in wanted.items()):
            yield Finding("canary", name, number)


def _text_of(path: Path) -> str:
    """A file as text; of weights, what stands beside them in the header; of a picture, beside its points."""
    if path.suffix == _PICTURE:
        return b"\n".join(_parts_of_picture(path.read_bytes())).decode("utf-8", errors="replace")
    if path.suffix != _WEIGHTS:
        return path.read_text(encoding="utf-8", errors="replace")
    with path.open("rb") as file:
        prefix = file.read(8)
        n_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        header = file.read(min(n_bytes, path.stat().st_size))
    return header.decode("utf-8", errors="replace")


def _parts_of_picture(content: bytes) -> Iterator[bytes]:
    """Every chunk of a PNG but its points, with the texts unpacked, and what lies behind its end; all of what
    is no PNG."""
    place, kind = len(_PNG), b""
    if not content.startswith(_PNG):
        place, kind = 0, b"IEND"
    while kind != b"IEND" and place + 8 <= len(content):
        n_bytes, kind = struct.unpack_from(">I4s", content, place)
        chunk = content[place + 8 : place + 8 + n_bytes]
        place += 12 + n_bytes  # 4 are a sum over the chunk
        if kind != b"IDAT":
            yield chunk
            yield _unpacked(kind, chunk)
    yield content[place:]


def _unpacked(kind: bytes, chunk: bytes) -> bytes:
    """The text that a chunk of a PNG holds packed; nothing where it holds none."""
    _, _, rest = chunk.partition(b"\0")  # behind its name
    if kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]  # behind two more names
    elif kind in (b"zTXt", b"iCCP"):
        packed = rest[1:]
    else:
        return b""
    try:
        return zlib.decompressobj().decompress(packed, _MOST_TEXT)
    except zlib.error:
        return b""
