"""Fuzz the command line: recipes, command lines, run folders, model folders, checkpoints and cache files.

    python tests/support/fuzzing.py 6000 --seed 0              # all kinds; exit code 1 if a call fails
    python tests/support/fuzzing.py 6000 --seed 0 --kind runs  # those of one kind
    python tests/support/fuzzing.py --seed 0 --only 17         # call 17 alone, and its output

Each call is a fork of one process that has imported everything. It runs in its own copy of a folder that
holds texts, runs, models and a cache, of which the draw of (seed, number) has changed something. A call fails
if it ends by a traceback, a signal or an exit code that is not documented, refuses without a message of one
line or without the name of the changed file, runs longer than 25 s, writes outside of its folder, takes more
than 1.5 GB of memory, or leaves a process behind. A call that trains, generates or serves as long as it was
asked to is stopped by Ctrl-C, and must end then. In seven of eight calls, pictures are one pixel.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import functools
import gc
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import string
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

# before the libraries are imported: no network, and no threads in the process that is forked
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
               "GRADIO_ANALYTICS_ENABLED": "False", "HF_HOME": f"{tempfile.gettempdir()}/no-hub"}  # fmt: skip

import psutil
import tqdm
import typer
import yaml
from matplotlib.figure import Figure
from support.pictures import write_pixel
from support.resuming import at_step
from support.runs import write_documents

from hf_genlm.cli.main import app, main
from hf_genlm.config.recipe import describe_fields, load_recipe
from hf_genlm.errors import Stopped
from hf_genlm.evaluation.measurement import Measurement, write_measurements
from hf_genlm.files import write_json
from hf_genlm.run_folder import RunFolder
from hf_genlm.run_schemas import GuaranteeFile

TIMEOUT_S = 25.0
MAX_BYTES = 1_500_000_000  # of memory
LOOKS_S = (9.0, 14.0, 19.0)  # ages at which a call may be found to be at work that has no end of its own
STOP_S = 10.0  # from Ctrl-C to the end
DOCUMENTED = (0, 2, 130)  # exit codes
# functions that run as long as a person asks, as a stack shows them
ENDLESS = re.compile(
    r"_inner_training_loop|_run_epoch|measure_step|long_range/training|generation/utils|decoding/__init__|"
    r"uvicorn|run_until_complete|block_thread|background_server|elastic/agent|_launch_several|gradio/|run_space|_compile_to"
)

STRANGE = [
    None, True, False, 0, -1, 2**63, 10**400, -(10**30), 1e308, 1e-320, float("nan"), float("inf"), "", "é",
    "7", "\x00", [], {}, [[[[]]]], {"a": {"b": []}}, "x" * 10_000, [1, "2"], {"value": None}, 2**31, 10**9,
    "../../outside/note.txt", "\x1b[31m", "\ud800", ["a"] * 3,
]  # fmt: skip
WORDS = [
    "", " ", "-", "--", "-1", "0", "1", "2", "3", "7.5", "1e400", "-1e400", "nan", "inf", "1e-320",
    "10" * 30, "0x10", "1_000", "٣", "²", "é", "😀", "\x1b[2J", "a\nb", "\u202e", "\udcff", "x" * 5000, "[",
    "]", "[/red]", "{", "{{", "%s", "$(touch x)", "`touch x`", ";", "'", '"', "=", "a=b", "a=b=c", ",",
    ",,", "a,,b", "None", "null", "true", "*", "**", "?", "[a-", "~", "~nobody", ".", "..",
    "/dev/null", "/dev/zero", "/dev/full/x", "/proc/self/mem", "text", "run", "model", "part", "llama",
    "pipe", "loop", "nothing", "text/none.txt", "file:///etc/passwd", "http://127.0.0.1:9/", "owner/name",
    "owner/name/more", "../..", "a/../../b", "-h", "--help", "--version", "-O", "1:30", "30M", "1e1000M",
    "tiny", "gru", "lstm,gru", "gru," * 200,
]  # fmt: skip


# changes of files


def changed_value(draw: random.Random, content):
    """`content` with one part of it replaced by something strange, or a key of it gone or new."""
    if isinstance(content, dict) and content and draw.random() < 0.9:
        key = draw.choice(list(content))
        kind = draw.random()
        if kind < 0.15:
            return {k: v for k, v in content.items() if k != key}
        if kind < 0.2:
            return {**content, "new": draw.choice(STRANGE)}
        return {**content, key: changed_value(draw, content[key])}
    if isinstance(content, list) and content and draw.random() < 0.85:
        at = draw.randrange(len(content))
        return [*content[:at], changed_value(draw, content[at]), *content[at + 1 :]]
    return draw.choice(STRANGE)


def changed_bytes(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content) + 1)
    stop = min(len(content), at + draw.randrange(1, 40))
    return draw.choice(
        [
            lambda: content[:at],
            lambda: content[:at] + draw.randbytes(3) + content[stop:],
            lambda: content[:at] + content[stop:],
            lambda: content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :],
            lambda: content + draw.randbytes(9),
            lambda: b"",
            lambda: draw.randbytes(50),
            lambda: content + content,
            lambda: content.decode("utf-8", "replace").encode("utf-16"),
            lambda: b"\xef\xbb\xbf" + content,
            lambda: b"[" * 100_000,
            lambda: b'{"measurements": ' * 50_000,
            lambda: content.replace(b"0", b"9" * 400, 1),
            lambda: content[:at] + b"\xe9" + content[at:],
            lambda: content[:at] + b"\0" * 9 + content[at:],
        ]
    )()


def changed_header(draw: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header, whose length is right."""
    n = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(changed_value(draw, json.loads(content[8 : 8 + n]))).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + n :]


def changed_array_file(draw: random.Random, content: bytes) -> bytes:
    """A cache entry with another table or other numbers, and a checksum that fits."""
    from hf_genlm.text.cache import _MAGIC, _TAIL

    length, _, _ = _TAIL.unpack(content[-_TAIL.size :])
    at = len(content) - _TAIL.size - length
    numbers, table = content[:at], content[at : -_TAIL.size]
    if draw.random() < 0.6:
        strange = draw.random() < 0.5
        table_of = json.loads(table)
        name = draw.choice(list(table_of))
        key = draw.choice(list(table_of[name]))
        values = ["<f8", "|O", "<U9", "<u2", "V0", "i4,i4", -1, 0, 1, 10**6, 2**62, 2**70, len(numbers)]
        table_of[name][key] = draw.choice(values)
        table = json.dumps(changed_value(draw, json.loads(table)) if strange else table_of).encode()
    elif numbers:
        start = draw.randrange(len(numbers))
        numbers = numbers[:start] + draw.randbytes(min(16, len(numbers) - start)) + numbers[start + 16 :]
    return numbers + table + _TAIL.pack(len(table), hashlib.sha256(numbers + table).digest(), _MAGIC)


def change_content(draw: random.Random, path: Path) -> str:
    """Change what the file holds, mostly so that its format stays right."""
    content = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.65:
        content = json.dumps(changed_value(draw, json.loads(content))).encode()
    elif path.suffix == ".jsonl" and draw.random() < 0.65:
        lines = content.splitlines()
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(changed_value(draw, json.loads(lines[at]))).encode()
        content = b"\n".join(lines)
    elif path.suffix == ".yaml" and draw.random() < 0.65:
        content = yaml.dump(changed_value(draw, yaml.safe_load(content)), allow_unicode=True).encode(
            "utf-8", "replace"
        )
    elif path.suffix == ".safetensors" and draw.random() < 0.5:
        content = changed_header(draw, content)
    elif path.suffix == ".arrays" and draw.random() < 0.7:
        content = changed_array_file(draw, content)
    else:
        content = changed_bytes(draw, content)
    path.write_bytes(content)
    return f"content: {content[:300]!r}"


def change_entry(draw: random.Random, path: Path) -> str:
    """Put something else where the file or folder is."""
    root = next(parent for parent in path.parents if parent.name == "work")
    other = draw.choice(sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink()))
    outside = root.parent.parent / "outside"

    def folder() -> None:
        path.mkdir()
        (path / "a.json").write_text("{}")

    def sparse() -> None:
        with path.open("wb") as file:
            file.truncate(1 << 30)

    what = draw.choice([
        ("nothing", lambda: None), ("an empty folder", path.mkdir), ("a folder", folder),
        ("a pipe", lambda: os.mkfifo(path)), ("a link to itself", lambda: path.symlink_to(path.name)),
        ("a link to nothing", lambda: path.symlink_to("none")),
        ("a link out", lambda: path.symlink_to(outside / "note.txt")),
        ("a link to a folder", lambda: path.symlink_to(outside)),
        ("a link to /dev/zero", lambda: path.symlink_to("/dev/zero")), ("1 GB of zeros", sparse),
        (f"a copy of {other.relative_to(root)}", lambda: path.write_bytes(kept)),
        ("a link upwards", lambda: path.symlink_to("..")),
    ])  # fmt: skip
    kept = other.read_bytes()
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    what[1]()
    return what[0]


def change(draw: random.Random, path: Path) -> str:
    if path.is_dir() or draw.random() < 0.25:
        return change_entry(draw, path)
    return change_content(draw, path)


# kinds of calls: each changes something in the folder and returns a command line


@dataclass
class Case:
    """A command line; the path that was changed for it, and how."""

    words: list[str]
    changed: str | None = None
    how: str = ""


SMALL = {
    "tokenizer.vocab_size": 300, "model.hidden_size": 16, "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2, "training.max_seq_length": 16, "training.batch_size": 4,
    "training.logging_steps": 1, "training.num_samples": 0, "training.num_validations": 1,
    "corpus.validation_fraction": 0.1, "evaluation.batch_size": 32,
}  # fmt: skip
FIELDS = {row.name: row for row in describe_fields()}
SET = " ".join(f"--set {name}={value}" for name, value in SMALL.items())
# what a model that is trained further does not state itself
SET_FURTHER = " ".join(
    f"--set {name}={value}" for name, value in SMALL.items() if name[:6] not in ("model.", "tokeni")
)


def commands(text: str) -> list[list[str]]:
    """One command a line, after `N *` for its weight; SET and SET_FURTHER make training small."""
    found = []
    for line in text.strip().splitlines():
        weight, _, command = line.rpartition(" * ")
        words = command.replace("SET_FURTHER", SET_FURTHER).replace("SET", SET).split()
        found += [words] * int(weight or 1)
    return found


def near(draw: random.Random, name: str) -> str:
    """A value of the field's type, in text."""
    row = FIELDS[name]
    words = re.findall(r"[\w.-]+", f"{row.allowed} {row.default} {row.help}") or ["a"]
    by_kind = {
        "true or false": ["true", "false"],
        "a whole number": ["1", "2", "3", "8", "100", "0", "-1", str(10**9), str(2**63), "1e3"],
        "a number": ["0.5", "1", "0", "1e-3", "-1", "1e9", "1e308", "0.999999", "1e-300"],
        "whole numbers": ["[1]", "[2, 4]", "[]", "[0]", f"[{10**12}]", "1,2"],
        "numbers": ["[0.5]", "[1, 2]", "[]", "[-1]"],
        "words": [
            "[]",
            "[text]",
            f"[{draw.choice(words)}]",
            "[gru, lstm]",
            "[none]",
            '["", ""]',
            "[pipe]",
            "[../..]",
        ],
        "key=value": [
            "{}",
            "{deu: text}",
            "{eng: text/x.txt, swh: texts.jsonl}",
            "{eng: 2}",
            "{x: -1}",
            "{eng: [text]}",
        ],
    }
    return draw.choice(
        [*by_kind.get(row.kind, []), *([draw.choice(words)] * (3 if row.kind == "a word" else 1))]
    )


TEXTS = [
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b, *b]\ncorpus: {sources: *c}\n", "<<: &x {model: 3}\n",
    "&a [*a]\n", "model: &m\n  size: tiny\ntraining: *m\n",
    "!!python/object/apply:os.system ['touch touched']\n", "--- {}\n--- {}\n", "model: !!binary aGk=\n",
    "? [a, b]\n: c\n", "model:\n\tsize: tiny\n", "\ufeffmodel: {size: tiny}\n", "model: {size: tiny",
    "model: {size: tiny, size: small}\n", "1: 2\n", "- model\n", "model: []\n", "model: 7\n", "model:\n",
    "null", "\0", "", "[" * 5000, "{a: " * 5000, "a: " + "b" * 10**6,
    "model: {hidden_size: 1" + "0" * 5000 + "}\n", "training: {seed: 2024-01-01}\n",
    "model: {size: 2024-01-01T00:00:00Z}\n", "model: {? {a: 1} : 2}\n", "training: {steps: 0b11}\n",
    "training: {steps: 190:20:30}\n", "training: {minutes: .inf}\n", "%YAML 9.9\n---\nmodel: {}\n",
    "%TAG ! tag:x,1:\n---\n!foo bar\n", "model: !x {a: b}\n",
]  # fmt: skip
LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


def recipe_text(draw: random.Random) -> str:
    if draw.random() < 0.2:
        return draw.choice([*TEXTS, LAUGHS + "corpus: {sources: *a11}\n", LAUGHS])
    fields: dict[str, str] = {name: str(value) for name, value in SMALL.items()}
    for name in draw.sample(list(FIELDS), draw.choice([1, 1, 1, 2, 3, 5])):
        fields[name] = near(draw, name)
        if draw.random() < 0.25:
            fields[name] = draw.choice([json.dumps(draw.choice(STRANGE)), draw.choice(WORDS), *TEXTS[:3]])
    sections: dict[str, list[str]] = {}
    for name, value in fields.items():
        section, key = name.split(".")
        if draw.random() < 0.01:
            key = draw.choice([key.upper(), key[1:], key + "é", "__class__", ""])
        sections.setdefault(section, []).append(f"  {key}: {value}\n")
    text = "".join(f"{section}:\n{''.join(lines)}" for section, lines in sections.items())
    if draw.random() < 0.1:
        at = draw.randrange(len(text))
        text = text[:at] + "".join(draw.choices(string.printable, k=3)) + text[at + 1 :]
    return text


RECIPE_COMMANDS = commands("""
5 * doctor --cost --recipe given.yaml
4 * train text --out new --steps 2 --recipe given.yaml
doctor --cost --json --recipe given.yaml
tokenizer text --out new --recipe given.yaml
evaluate run text/x.txt --recipe given.yaml
compare text --recipes given.yaml,recipe.yaml --steps 1 --seeds 1 --out new
""")


def recipes(draw: random.Random, work: Path) -> Case:
    text = recipe_text(draw)
    (work / "given.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    words = draw.choice(RECIPE_COMMANDS)
    return Case(words, how=text[:2000])


# words that make a verb quick
QUICK = {
    words[0]: words[1:]
    for words in commands("""
train --steps 1 SET
tokenizer SET
compare --steps 1 --seeds 1 --decoders gru SET
range --steps 1 --seeds 1 --recall-pairs 2 --lengths 4 --decoders gru --tasks recall --width 8 --layers 1
generate --max-new-tokens 4
audit --limit 4
push --dry-run
""")
}
# values by the words that stand for them in the help
GOOD = {
    metavar: words.split()
    for metavar, words in {
        "MODEL": "run run run/model part llama adapted both owner/name",
        "RUN": "run run run part both llama run/model",
        "SOURCE": "text text/x.txt texts.jsonl text/*.txt pairs.jsonl vectors.txt pipe loop long.txt",
        "FILE": "recipe.yaml text/x.txt vectors.txt pairs.jsonl made.png run/recipe.yaml pipe",
        "FILE,..": "recipe.yaml run/recipe.yaml recipe.yaml,run/recipe.yaml",
        "PATH": "pairs.jsonl text",
        "DIR": "new new/er run text both part .",
        "CODE=SOURCE": "eng=text swh=texts.jsonl xx=text eng= =text",
        "CODE=FILE": "eng=text/x.txt swh=text/x.txt",
        "OWNER/NAME": "owner/name a/b a -/-",
        "URL": "http://127.0.0.1:9 http://localhost:9/v1 x ftp://a",
        "+N": "+3 +1 +0 3 +100000000",
        "F": "0.01 0.5 1 0",
        "N": "1 2 3 16 300",
        "N,N,..": "1 1,2 4",
        "FILE:KIND": "README.md:token log.jsonl:x x",
        "FORMAT": "llama qwen3 gguf onnx",
    }.items()
}


def word_for(draw: random.Random, parameter) -> str:
    """A value for a parameter: one that fits, a word of its help, or a hostile one."""
    if draw.random() < 0.25:
        return draw.choice(WORDS)
    metavar = (parameter.metavar or "").strip("[]. ")
    if "SECTION.KEY" in metavar or "card.KEY" in metavar:
        name = draw.choice([n for n in FIELDS if n.startswith("card.") or "SECTION" in metavar])
        return f"{name}={near(draw, name)}"
    if parameter.metavar in GOOD or metavar in GOOD:
        return draw.choice(GOOD.get(parameter.metavar) or GOOD[metavar])
    words = re.findall(r"[\w.-]+", f"{getattr(parameter, 'help', '')} {parameter.default}")
    return draw.choice([*(word.rstrip(".") for word in words), "x"])


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SERVES = {"serve", "chat"}  # take seconds to start


def command_lines(draw: random.Random, work: Path) -> Case:
    verb = draw.choice([name for name in COMMANDS if name not in SERVES or draw.random() < 0.15])
    words = [verb, *(QUICK.get(verb, []) if draw.random() < 0.9 else [])]
    for parameter in COMMANDS[verb].params:
        is_needed = parameter.required and draw.random() < 0.97
        is_out = "--out" in parameter.opts and draw.random() < 0.9
        if not (is_needed or is_out or draw.random() < 0.12) or parameter.name == "help":
            continue
        if "--processes" in parameter.opts and draw.random() < 0.9:  # takes seconds to start
            continue
        value = (
            draw.choice(["new"] * 6 + ["run", "both", "text"])
            if is_out and draw.random() < 0.9
            else word_for(draw, parameter)
        )
        if parameter.param_type_name == "argument":
            words += [
                value,
                *(
                    word_for(draw, parameter)
                    for _ in range(draw.choice([0, 0, 1]) if parameter.nargs < 0 else 0)
                ),
            ]
        elif getattr(parameter, "is_flag", False):
            words.append(parameter.opts[0])
        else:
            words += [parameter.opts[0], value]
            if parameter.multiple and draw.random() < 0.3:
                words += [parameter.opts[0], word_for(draw, parameter)]
    if "--vectors" in words and draw.random() < 0.5:
        words[words.index("--vectors") + 1] = "vectors.txt"
    if draw.random() < 0.05:
        words.insert(draw.randrange(len(words) + 1), draw.choice(WORDS))
    if draw.random() < 0.03:
        words.pop(draw.randrange(len(words)))
    if verb in SERVES or "--run" in words:
        words += ["--port", str(20_000 + draw.randrange(20_000))] if verb != "chat" else []
    return Case([word.replace("\0", "") for word in words])


def of_files(choices: Sequence[list[str]], *folders: str, rehash: bool = False):
    """A kind of calls: an entry of one of `folders` is changed, then a command reads that folder."""

    def prepare(draw: random.Random, work: Path) -> Case:
        folder = draw.choice(folders)
        is_compiled = bool(list((work / "cache").rglob("*.pt2")))
        words = draw.choice(
            [words for words in choices if reads(words, folder) and (is_compiled or "--compile" not in words)]
        )
        entries = sorted(path for path in (work / folder).rglob("*") if path.name != "a.json")
        weights = [0.2 if path.suffix == ".py" or path.is_dir() else 1.0 for path in entries]
        path = draw.choices(entries, weights)[0]
        how = change(draw, path)
        if rehash and draw.random() < 0.7:
            rehash_manifests(work / folder)
        return Case(words, path.relative_to(work).as_posix(), how)

    return prepare


def reads(words: list[str], folder: str) -> bool:
    return folder == "cache" or folder.split("/")[0] in {word.split("/")[0] for word in words}


MAX_HASHED = 1 << 28  # bytes of a file of a checkpoint; a changed one may be of any size


def rehash_manifests(folder: Path) -> None:
    """Let the manifests of checkpoints name their files as they are now."""
    for manifest in folder.rglob("manifest.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            if not manifest.is_file() or manifest.stat().st_size >= MAX_HASHED:
                continue
            stated = json.loads(manifest.read_bytes())
            files = sorted(
                p
                for p in manifest.parent.rglob("*")
                if p.is_file() and p != manifest and p.stat().st_size < MAX_HASHED
            )
            stated["files"] = {
                p.relative_to(manifest.parent).as_posix(): [
                    p.stat().st_size,
                    hashlib.sha256(p.read_bytes()).hexdigest(),
                ]
                for p in files
            }
            manifest.write_text(json.dumps(stated))


RUN_COMMANDS = commands("""
6 * push run owner/name --dry-run
runs .
runs . --json
plot run
plot run part --out made.png
2 * card run --force
card run --set card.license=mit
evaluate run
evaluate run text/x.txt
evaluate run --suite samples
doctor run
doctor run --cost
generate run a --max-new-tokens 3
audit run --limit 3
space run --out new
export run --to onnx --out new
extend run text/x.txt --vocab-size +3 --out new
train --resume --out run
train --from run text/x.txt --out new --steps 1 SET_FURTHER
3 * compare text --decoders gru,elman --steps 1 --seeds 1 --out both SET
runs both
card both/runs/gru-seed0 --force
""")
OF_ANY_MODEL = """
4 * generate MODEL a --max-new-tokens 3
evaluate MODEL text/x.txt
evaluate MODEL --pairs pairs.jsonl
runs MODEL
space MODEL --out new
audit MODEL --trained-on text/x.txt --held-out texts.jsonl --limit 3
"""
MODEL_COMMANDS = [
    words for model in ("lstm", "llama") for words in commands(OF_ANY_MODEL.replace("MODEL", model))
] + commands("""
2 * train --from lstm text/x.txt --out new --steps 1 SET_FURTHER
push lstm owner/name --dry-run --keep-card
push llama owner/name --dry-run --keep-card
extend lstm text/x.txt --vocab-size +3 --out new
extend llama text/x.txt --vocab-size +3 --out new
evaluate llama text/x.txt --suite likelihood,extrapolation
export dense --to llama --out new
export dense --to gguf --out new
generate dense a --max-new-tokens 3
""")
CACHE_COMMANDS = commands("""
4 * train long.txt --out new --steps 1 SET
evaluate run long.txt
generate run a --max-new-tokens 3
2 * generate run a --max-new-tokens 3 --compile
""")
KINDS: dict[str, Callable[[random.Random, Path], Case]] = {
    "recipes": recipes,
    "words": command_lines,
    "runs": of_files(RUN_COMMANDS, "run", "run", "run", "both"),
    "models": of_files(MODEL_COMMANDS, "lstm", "llama", "dense"),
    "checkpoints": of_files(
        [["train", "--resume", "--out", "part"]], "part/checkpoints", "part/checkpoints", "part", rehash=True
    ),
    "caches": of_files(CACHE_COMMANDS, "cache"),
}


# the folder that is copied for each call

AUDITED = [
    Measurement("exposure/4", 5.0, "bits", 10, 0.5, "canaries", False, (4.0, 6.0)),
    Measurement("exposure_p_value/4", 0.001, "probability", 10, None, "canaries", False),
    Measurement("extraction_50_tokens/prefix_10", 0.1, "fraction", 40, 0.01, "train", False, (0.0, 0.2)),
    Measurement("extraction_50_tokens/prefix_10", 0.0, "fraction", 40, 0.01, "validation", False),
    Measurement("canaries_extracted/4", 0.5, "fraction", 10, None, "canaries", False),
    Measurement("membership_auc/loss", 0.9, "auc", 40, 0.01, "train", False, (0.8, 1.0)),
    Measurement("epsilon_lower_bound/4", 1.5, "epsilon", 10, None, "canaries", False),
]
VECTORS = {
    "file": "v.txt", "sha256": "0" * 64, "dimension": 4, "words": {"read": 5, "skipped": {"unknown": 1}},
    "tokens": {"exact": 3, "drawn": 2}, "share_of_text": {"exact": 0.5, "drawn": 0.5}, "frozen": True,
    "unfreeze_step": 3,
}  # fmt: skip
GUARANTEE = {
    "epsilon": 4.0, "delta": 1e-5, "unit": "document", "sampling_rate": 0.1, "noise_multiplier": 1.1,
    "clip_norm": 1.0, "steps": 9, "accountant": "prv", "covered": ["weights"], "not_covered": ["card"],
}  # fmt: skip


def write_folder(work: Path) -> None:
    """Write texts, runs, models and a cache into `work`, which is the current folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from hf_genlm.api import train

    torch.manual_seed(0)
    (work / "text").mkdir()
    write_documents(8, work / "text")
    text = "".join(path.read_text() for path in sorted((work / "text").iterdir()))
    (work / "text" / "x.txt").write_text(text[:3000])
    (work / "long.txt").write_text(text[:20_000])
    (work / "texts.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in text[:5000].splitlines() if line)
    )
    pair = {"sentence_good": "The text is read.", "sentence_bad": "The text are read.", "UID": "agreement"}
    (work / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 3)
    (work / "vectors.txt").write_text("the 0.1 0.2 0.3 0.4\nof 0.5 0.1 0.2 0.9\nis -1 0 1 2\n")
    (work / "recipe.yaml").write_text("model: {decoder: elman}\ntokenizer: {vocab_size: 300}\n")
    os.mkfifo(work / "pipe")
    (work / "loop").mkdir()
    (work / "loop" / "again").symlink_to("../loop")
    ready(
        "train text --out run SET --set training.num_samples=1 --steps 3 --canaries 4 "
        "--set training.save_steps=1 --mixers gated_linear,full_attention --set model.num_hidden_layers=null "
        "--set model.bigram_size=64"
    )
    ready("plot run", is_drawn=True)
    run = RunFolder(work / "run")
    write_measurements(run.audit, AUDITED)
    write_measurements(
        run.languages, [Measurement("whole_characters/Latin", 0.9, "fraction", 9, None, "x", True)]
    )
    write_json(run.privacy, GUARANTEE, GuaranteeFile)
    write_json(run.vectors, VECTORS)
    recipe = load_recipe(
        None, [f"{name}={value}" for name, value in SMALL.items()] + ["training.save_steps=1"]
    )
    recipe.corpus.sources, recipe.model.decoder = ["text"], "lstm"
    with contextlib.suppress(Stopped):
        train(
            recipe=recipe, steps=4, output_dir="part", progress=False,
            listener=at_step(2, lambda: signal.raise_signal(signal.SIGTERM)),
        )  # fmt: skip
    ready("train text --out short SET --steps 1 --decoder lstm")
    shutil.move(work / "short" / "model", work / "lstm")
    ready(
        "train text --out gated SET --steps 1 --decoder transformer --set model.gated_mlp=true "
        "--set model.hidden_act=silu --set model.qk_norm=false --set model.output_bias=false "
        "--set tokenizer.pattern=gpt2"
    )
    shutil.move(work / "gated" / "model", work / "dense")
    for name in ("short", "gated"):
        shutil.rmtree(work / name)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(work / "run" / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    for name in ("llama", "adapted"):
        model.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(work / "adapted")
    ready("compare text --decoders gru,elman --steps 1 --seeds 1 --out both SET")
    ready("train long.txt --out short --steps 1 SET")
    shutil.rmtree(work / "short")


def ready(command: str, is_drawn: bool = False) -> None:
    (words,) = commands(command)
    code = call_main(words, is_drawn)
    if code != 0:
        raise SystemExit(f"{command} ended with exit code {code}")


# one call


def call_main(words: list[str], is_drawn: bool = True) -> int:
    """The entry of the command line; without `is_drawn`, every picture is one pixel, which saves a second."""
    with contextlib.nullcontext() if is_drawn else mock.patch.object(Figure, "savefig", write_pixel):
        return main(words)


@dataclass
class Outcome:
    """The end of a call; `code` is negative for a signal, and `faults` says what is wrong with it."""

    code: int | None
    seconds: float
    cpu_s: float
    n_bytes: int  # of memory, at most
    output: str
    errors: str
    was_stopped: bool = False
    faults: list[str] = field(default_factory=list)


def run_call(run: Callable[[], int], folder: Path, timeout_s: float = TIMEOUT_S) -> Outcome:
    """Fork a process that calls `run` in `folder`/work, and watch it."""
    own = psutil.Process()
    others = {process.pid for process in own.children(recursive=True)}  # of the caller
    began, was_stopped = time.monotonic(), False
    looks = list(LOOKS_S) if timeout_s <= TIMEOUT_S else []
    child = os.fork()
    if child == 0:
        _in_child(run, folder)
    faults: list[str] = []
    deadline, pause = began + timeout_s, 0.002
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        now = time.monotonic()
        if now > deadline:
            os.kill(child, signal.SIGUSR1)
            time.sleep(0.3)
            stack = (folder / "stack").read_text(errors="replace").rsplit("\n\n", 1)[-1]
            faults.append(f"{'does not stop' if was_stopped else 'hangs'}: {now - began:.0f} s\n{stack}")
            for process in [psutil.Process(child), *_descendants(own, others)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            pid, status, usage = os.wait4(child, 0)
            break
        if looks and not was_stopped and now - began > looks[0]:
            looks.pop(0)
            os.kill(child, signal.SIGUSR1)
            time.sleep(0.1)
            stack = (folder / "stack").read_text(errors="replace")
            if ENDLESS.search(stack):
                was_stopped, deadline = True, time.monotonic() + STOP_S
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGINT)  # as a terminal does
        time.sleep(pause)
        pause = min(0.05, pause * 1.2)
    left = _descendants(own, others)
    time.sleep(0.5 if left else 0)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE and not faults:
                faults.append(f"leaves a process behind: {' '.join(process.cmdline())[:200]}")
            process.kill()
    for process in own.children():
        if process.pid not in others:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
    outcome = Outcome(
        os.waitstatus_to_exitcode(status), time.monotonic() - began,
        usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024,
        (folder / "stdout").read_text(errors="replace"), (folder / "stderr").read_text(errors="replace"),
        was_stopped, faults,
    )  # fmt: skip
    return outcome


def adopt_orphans() -> None:
    """Become the parent of what the processes below this one leave behind."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _descendants(process: psutil.Process, others: set[int]) -> list[psutil.Process]:
    """Living processes below `process`, without those that `others` names."""
    found = [child for child in process.children(recursive=True) if child.pid not in others]
    return [child for child in found if child.status() != psutil.STATUS_ZOMBIE]


def _in_child(run: Callable[[], int], folder: Path) -> None:
    """Call `run` as the program would, and end this process."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder / "work")
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
        faulthandler.enable(sys.stderr)
        faulthandler.register(signal.SIGUSR1, (folder / "stack").open("w"), all_threads=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 3 * MAX_BYTES, held + 3 * MAX_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 30, 4 << 30))
        set_places(folder)
        try:
            code = run()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        threading._shutdown()  # type: ignore[attr-defined]  as at the end of a program
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        os._exit(code)


def set_places(folder: Path) -> None:
    """Let the program keep what it keeps between runs inside of `folder`."""
    for name, place in {"HOME": "home", "HF_GENLM_CACHE": "work/cache", "TMPDIR": "tmp"}.items():
        (folder / place).mkdir(exist_ok=True, parents=True)
        os.environ[name] = str(folder / place)
    tempfile.tempdir = None


def state_of(folder: Path) -> dict[str, tuple]:
    """Name, mode, size and time of change of everything below a folder."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        state = path.lstat()
        found[str(path)] = (state.st_mode, state.st_size, state.st_mtime_ns if not path.is_dir() else 0)
    return found


def judge(outcome: Outcome, case: Case) -> None:
    """Add the faults of an ended call."""
    faults, code, errors = outcome.faults, outcome.code, outcome.errors
    if code is not None and code < 0 and not faults:
        faults.append(f"ended by {signal.Signals(-code).name}")
    elif "Traceback (most recent call last)" in outcome.output + errors:
        faults.append("traceback")
    elif code not in DOCUMENTED and not faults:
        faults.append(f"exit code {code}")
    if code == 130 and not outcome.was_stopped:
        faults.append("exit code 130 without Ctrl-C")
    if outcome.n_bytes > MAX_BYTES:
        faults.append(f"{outcome.n_bytes / 1e9:.1f} GB of memory")
    if code == 2:
        lines = errors.strip().splitlines() or [""]
        if not re.match("hf-genlm: .{10,}", lines[-1]):
            faults.append("a refusal without a message")
        elif case.changed and not is_named(case, lines[-1]):
            faults.append("a refusal that does not name the changed file")


def is_named(case: Case, message: str) -> bool:
    """True if the message names the changed file, a field of a recipe, or the folder of a file that is gone
    or read by a library."""
    path = Path(case.changed or "")
    names = [path.name]
    is_of_whole = {"model", "tokenizer", "lstm", "llama", "adapted", "dense", "checkpoints"}
    if not case.how.startswith("content") or not is_of_whole.isdisjoint(path.parts):
        names += [*path.parts[:-1], re.split("[._]", path.name)[0]]
    is_field = path.suffix == ".yaml" and re.match(
        r"hf-genlm: (unknown )?\w+\.?\w* ('|=|and|needs?|is)", message
    )
    return bool(is_field) or any(name in message for name in names)


# all calls


class Fuzzer:
    """The folder of all calls: `base` is copied for each, `outside` must stay as it is."""

    def __init__(self, root: Path, seed: int, with_program: bool = False):
        self.root, self.seed = root, seed
        self.outside = root / "outside"
        adopt_orphans()
        (root / "base" / "work").mkdir(parents=True)
        (self.outside / "folder").mkdir(parents=True)
        (self.outside / "note.txt").write_text("a note\n" * 20)
        (self.outside / "folder" / "settings.json").write_text("{}\n")
        set_places(root / "base")
        os.chdir(root / "base" / "work")
        forking = multiprocessing.get_context("fork")  # a server of processes would import everything again
        multiprocessing.get_context = lambda method=None: forking  # type: ignore[assignment]
        tqdm.tqdm.monitor_interval = 0  # it would be a thread
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            write_folder(root / "base" / "work")
            for command in ("doctor run --cost", "push run owner/name --dry-run", "runs ."):
                ready(command)  # imports and caches what calls need
        os.chdir(root)
        if with_program:
            compiled = run_call(lambda: main(CACHE_COMMANDS[-1]), root / "base", 600)
            assert compiled.code == 0, compiled
        if threading.active_count() > 1:
            raise SystemExit(f"a process of several threads cannot be forked: {threading.enumerate()}")
        gc.collect()
        gc.freeze()
        self.before = state_of(self.outside), sorted(os.listdir(root))

    def copy(self) -> Path:
        folder = self.root / "call"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        copied = Path(folder / "work")
        shutil.copytree(self.root / "base" / "work", copied, symlinks=True, ignore=lambda *_: ["pipe"])
        os.mkfifo(copied / "pipe")
        return folder

    def call(self, number: int, kind: str) -> tuple[Case, Outcome]:
        """Prepare and run call `number`; one that hangs has a second trial: a machine can be busy."""
        for _ in range(2):
            draw = random.Random(f"{self.seed}:{number}:{kind}")
            folder = self.copy()
            case = KINDS[kind](draw, folder / "work")
            is_drawn = case.words[:1] == ["plot"] or number % 8 == 0
            outcome = run_call(functools.partial(call_main, case.words, is_drawn), folder)
            judge(outcome, case)
            if (state_of(self.outside), sorted({*os.listdir(self.root)} - {"call"})) != self.before:
                outcome.faults.append("something outside of the folder has changed")
                self.before = state_of(self.outside), sorted({*os.listdir(self.root)} - {"call"})
            if not any(fault.startswith(("hangs", "does not stop")) for fault in outcome.faults):
                break
        return case, outcome

    def check_commands(self) -> list[str]:
        """The commands of kinds that change files which fail where nothing was changed."""
        commands = {tuple(words): words for words in (*RUN_COMMANDS, *MODEL_COMMANDS, *CACHE_COMMANDS)}
        failed = []
        for words in commands.values():
            outcome = run_call(functools.partial(call_main, words), self.copy())
            if outcome.code != 0:
                failed.append(f"{' '.join(words)}: {outcome.code} {outcome.errors[-300:]}")
        return failed


def fuzz(
    n: int, seed: int, root: Path, kinds: Sequence[str] = (), only: int | None = None
) -> Iterator[tuple]:
    """Yield (number, kind, case, outcome) of each call."""
    fuzzer = Fuzzer(root, seed, with_program=n > 500)
    names = list(KINDS)
    for number in range(n) if only is None else [only]:
        kind = names[number % len(names)]
        if not kinds or kind in kinds:
            yield number, kind, *fuzzer.call(number, kind)


def program() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("n", type=int, nargs="?", default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(KINDS), default=[])
    parser.add_argument("--only", type=int)
    parser.add_argument("--folder", type=Path, help="keep the folders of failed calls there")
    parser.add_argument(
        "--check", action="store_true", help="only run the commands where nothing was changed"
    )
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    if given.check:
        failed = Fuzzer(root, 0, with_program=True).check_commands()
        print("\n".join(failed) or "every command works")
        return bool(failed)
    began, seen, slowest, most = time.monotonic(), Counter(), (0.0, -1), (0, -1)
    failures: Counter[str] = Counter()
    cpu_s: Counter[str] = Counter()
    for number, kind, case, outcome in fuzz(given.n, given.seed, root, given.kind, given.only):
        seen[f"{kind} {'stopped' if outcome.was_stopped else outcome.code}"] += 1
        cpu_s[kind] += outcome.cpu_s
        slowest, most = max(slowest, (outcome.seconds, number)), max(most, (outcome.n_bytes, number))
        if outcome.faults or given.only is not None:
            failures[kind] += bool(outcome.faults)
            faults = "; ".join(outcome.faults) or "no fault"
            print(f"--- call {number} ({kind}), exit code {outcome.code}: {faults}")
            print(f"hf-genlm {' '.join(map(repr, case.words))}\n{case.changed}: {case.how[:600]!r}")
            print(outcome.errors[-3000:], flush=True)
            if given.folder:
                kept = given.folder / f"failed-{number}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(root / "call", kept, symlinks=True, ignore=shutil.ignore_patterns("pipe"))
        elif sum(seen.values()) % 500 == 0:
            print(f"{sum(seen.values()):,} calls in {time.monotonic() - began:.0f} s", flush=True)
    print(f"{sum(seen.values()):,} calls in {time.monotonic() - began:.0f} s: {dict(sorted(seen.items()))}")
    print(f"slowest {slowest[0]:.1f} s (call {slowest[1]}), most memory {most[0] / 1e6:,.0f} MB ({most[1]})")
    print(f"CPU seconds: { ({kind: round(seconds) for kind, seconds in cpu_s.items()}) }")
    print(f"failures: {dict(failures) or 'none'}")
    shutil.rmtree(root)
    return bool(failures.total())


if __name__ == "__main__":
    status = program()
    sys.stdout.flush()
    os._exit(status)  # libraries that are imported and not used complain at an ordinary end
