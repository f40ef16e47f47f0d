"""Promise: the house stays as drawn. Imports go down the table without a circle, files stay readable."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hf_genlm"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_MODULES = 150
MAX_LINES = 35_620

# room -> the rooms of hf_genlm that it may import; a room may always import itself
BASE = {"errors", "memory", "files", "run_schemas", "run_folder", "config"}
TEXT_AND_MODEL = {*BASE, "text", "model", "loading"}
MEASURING = {*TEXT_AND_MODEL, "decoding", "evaluation"}
SHOWING = {*BASE, "loading", "model", "evaluation.measurement", "report", "card"}
MAY_IMPORT = {
    "errors": set(),
    "memory": {"errors"},
    "files": {"errors", "memory"},
    "run_schemas": set(),
    "run_folder": {"errors", "files", "memory", "run_schemas"},
    "model": set(),
    "config": {"errors", "files", "run_folder", "model"},
    "loading": {"errors", "files", "memory", "model", "run_schemas"},
    "text": {*BASE},
    "decoding": TEXT_AND_MODEL,
    "evaluation": TEXT_AND_MODEL | {"decoding"},
    "privacy": MEASURING,
    "extension": MEASURING | {"report"},
    "training": MEASURING | {"privacy", "extension"},
    "long_range": MEASURING | {"training", "report"},
    "report": {*BASE, "evaluation.measurement"},
    "card": {*BASE, "loading", "model", "evaluation.measurement", "report"},
    "hub": SHOWING,
    "space": SHOWING | {"hub"},
    "exporting": {*MEASURING, "report", "hub"},
    "doctor": MEASURING | {"training", "card", "report", "serving"},
    "serving": {"errors", "model", "loading", "text"},
    "comparison": MEASURING | {"training", "doctor", "card", "report"},
    "space.files": set(),  # it runs where this package is not installed
}
TOP = {"api", "run", "cli", "__init__", "__main__"}  # may import everything


def room_of(file: Path) -> str:
    if file.is_relative_to(PACKAGE / "space" / "files"):
        return "space.files"
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> set[str]:
    """Dotted names below hf_genlm that `file` imports anywhere, inside functions too."""
    package = ("hf_genlm", *file.relative_to(PACKAGE).parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("hf_genlm.") for name in names if name.startswith("hf_genlm.")}


def forbidden(room: str, names: set[str]) -> set[str]:
    allowed = MAY_IMPORT[room] | {room}

    def is_allowed(name: str) -> bool:
        return any(name == a or name.startswith(a + ".") or a.startswith(name + ".") for a in allowed)

    return {name for name in names if not is_allowed(name)}


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """One circle of a graph as a path that ends where it begins; empty if there is none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for after in sorted(arrows.get(node, ())):
            if found := walk(after, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(arrows) if (found := walk(node, []))), [])


def arrows_between_files() -> dict[str, set[str]]:
    """Module -> the modules that it imports anywhere; a package's own name stands for its __init__."""
    modules = {module_of(file): file for file in FILES}
    return {
        name: {target for target in imports_of(file) if target in modules and target not in ("", name)}
        for name, file in modules.items()
    }


def by_path(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("file", [f for f in FILES if room_of(f) not in TOP], ids=by_path)
def test_imports_go_down(file):
    assert not forbidden(room_of(file), imports_of(file))


def test_the_table_of_rooms_has_no_circle():
    assert not circle_in(
        {room: {r.split(".")[0] for r in names} - {room} for room, names in MAY_IMPORT.items()}
    )


def test_no_two_files_import_each_other_even_by_way_of_others():
    assert not circle_in(arrows_between_files())


def test_the_checks_can_fail():
    assert forbidden("text", {"model.modeling_genlm"})
    assert forbidden("card", {"evaluation.likelihood"})
    assert not forbidden("card", {"evaluation.measurement", "evaluation.measurement.Measurement"})
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert not circle_in({"a": {"b", "c"}, "b": {"c"}})


def test_the_house_does_not_grow():
    assert len(FILES) <= MAX_MODULES
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in FILES) <= MAX_LINES


@pytest.mark.parametrize("file", sorted((PACKAGE / "model").glob("*_genlm.py")), ids=lambda f: f.name)
def test_what_travels_to_the_hub_stands_alone(file):
    """transformers copies files that `from .name import` names, and checks absolute imports outside try."""
    known = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tried = [n for t in ast.walk(tree) if isinstance(t, ast.Try) for part in t.body for n in ast.walk(part)]
    for node in ast.walk(tree):
        if node in tried:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert "." not in (node.module or "."), "only `from .name import x` is copied"
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in known
        elif isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= known


@pytest.mark.parametrize("file", FILES, ids=by_path)
def test_files_and_functions_stay_readable(file):
    assert file.stem not in {"utils", "helpers", "common", "misc"}
    source = file.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 520
    tree = ast.parse(source)
    assert file.stat().st_size == 0 or ast.get_docstring(tree), "a module's first line says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            docstring = len((ast.get_docstring(node) or "").splitlines())
            assert node.end_lineno - node.lineno - docstring < 80, f"{node.name} is too long"


def test_importing_the_rooms_is_free_of_torch():
    """--help and a wrong argument answer at once because these modules do not load torch."""
    code = (
        "import sys, hf_genlm.cli.main, hf_genlm.api, hf_genlm.config.recipe, hf_genlm.run_folder;"
        "import hf_genlm.evaluation.measurement; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


PRINTERS = {"print", "secho", "echo", "pprint"}


@pytest.mark.parametrize("file", FILES, ids=by_path)
def test_only_the_printing_layer_prints(file):
    """cli/display.py escapes control characters: whatever prints past it can steer a terminal."""
    if file == PACKAGE / "cli" / "display.py":
        return
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [name for name in names if name.split(".")[0] == "rich"]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            is_stream = called.startswith(("sys.stdout.", "sys.stderr.", "sys.__std", "console."))
            writes = is_stream and called.endswith((".write", ".writelines", ".print"))
            found += [called] if writes or called.split(".")[-1] in PRINTERS else []
            found += [
                called for word in node.keywords if word.arg == "file" and "sys.std" in ast.unparse(word)
            ]
    assert [each for each in found if each != "bar.write"] == []  # of a notebook, escaped in api.py


# Calls that encode text, each in the one place where it may stand: `text/encoding.py`, which every other file
# calls, the demo, which runs without this package, and what learns merges from words.
ENCODING_CALLS = {
    ("text/encoding.py", "tokenizer"),
    ("text/encoding.py", "tokenizer.apply_chat_template"),
    ("text/encoding.py", "self.exact.encode_batch_fast"),
    ("text/encoding.py", "fast.encode"),
    ("text/encoding.py", "encoder.encode"),
    ("text/fast_bpe.py", "self._encoding.encode_to_numpy"),
    ("text/fast_bpe.py", "ours.encode_ordinary"),
    ("text/packed_stream.py", "self._encoder.encode"),
    ("privacy/extraction.py", "target.encode"),
    ("privacy/target.py", "self.encode"),
    ("space/files/demo/models.py", "self.tokenizer"),
    ("space/files/demo/scoring.py", "model.encode"),
    ("extension.py", "backend.model.tokenize"),
}
ENCODERS = re.compile(
    r"(.*\.)?(?!_?(add|pre|load|save|train|wrap)_)(\w+_)?tokenizer"
    r"|.*\.(encode|encode_batch\w*|encode_ordinary\w*|encode_to_numpy|_?(batch_)?encode_plus|tokenize"
    r"|apply_chat_template)"
)


def calls_that_encode(source: str) -> set[str]:
    """Calls of a tokenizer in a file; those that name a codec are of strings."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ENCODERS.fullmatch(called := ast.unparse(node.func)):
            of = getattr(node.func, "value", None)
            is_string = isinstance(of, ast.Constant) or all(isinstance(a, ast.Constant) for a in node.args)
            if not (called.endswith(".encode") and is_string):
                found.add(called)
    return found


def test_text_of_people_is_encoded_in_one_place():
    """Elsewhere `<|endoftext|>` that somebody typed would be the token: another text than training saw."""
    found = {(by_path(f), call) for f in FILES for call in calls_that_encode(f.read_text(encoding="utf-8"))}
    assert found == ENCODING_CALLS


@pytest.mark.parametrize(
    "call",
    ["tokenizer(text)", "self.tokenizer(t)", "my_tokenizer(t)", "a.backend_tokenizer.encode_batch(texts)",
     "tokenizer.apply_chat_template(messages)", "tokenizer.encode(text)", "t.batch_encode_plus(texts)"],
)  # fmt: skip
def test_a_call_that_encodes_elsewhere_is_found(call):
    assert calls_that_encode(f"x = {call}['input_ids']")
    assert not calls_that_encode("a.encode(); a.encode('utf-8', errors='replace'); 'a'.encode(b)")
