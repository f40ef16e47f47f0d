"""Promise: the house stays as drawn. Imports go down the table, files and functions stay readable."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hf_genlm"
FILES = sorted(PACKAGE.rglob("*.py"))

# room -> what it may import from hf_genlm; a room may always import itself
MAY_IMPORT = {
    "token_forms": set(),
    "errors": {"token_forms"},
    "recipe": {"errors", "sections", "ranges", "plain_yaml"},
    "sections": set(),
    "plain_yaml": set(),
    "ranges": set(),
    "run_folder": {"errors"},
    "memory": set(),
    "arguments": {"errors", "arguments_of_models", "option_types"},
    "arguments_of_models": {"option_types"},
    "option_types": set(),
    "launch": {"errors"},
    "display": {"evaluation.measurement", "doctor"},
    "text": {"recipe", "errors", "memory", "token_forms"},
    "model": set(),
    "evaluation": {"recipe", "errors", "decoding", "loading"},
    "privacy": {"recipe", "errors", "run_folder", "memory", "text", "model", "evaluation", "loading"},
    "training": {
        "recipe",
        "ranges",
        "errors",
        "run_folder",
        "memory",
        "text",
        "model",
        "evaluation",
        "loading",
        "privacy",
    },
    "decoding": {"errors", "model", "text.cache"},
    "export": {"errors", "run_folder", "text.tokenizer", "model", "decoding"},
    "serving": {"errors", "model"},
    "loading": {"errors", "model"},
    "doctor": {
        "training.word_vectors",
        "recipe",
        "run_folder",
        "text.tokenizer",
        "model",
        "training.budget",
        "training.configure",
        "training.trainer",
        "publish.parameters",
        "serving",
    },
    "comparison": {
        "recipe",
        "errors",
        "run_folder",
        "text.identity",
        "model",
        "training",
        "evaluation.blocks",
        "evaluation.measurement",
        "doctor",
        "publish",
    },
    "publish": {
        "recipe",
        "sections",
        "errors",
        "token_forms",
        "run_folder",
        "model",
        "loading",
        "evaluation.measurement",
    },
    "publish.space_files": set(),  # it runs where this package is not
}
TOP = {"cli", "verbs", "__init__", "__main__"}  # may import everything


def room_of(file: Path) -> str:
    if file.is_relative_to(PACKAGE / "publish" / "space_files"):
        return "publish.space_files"
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def by_path(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("file", [f for f in FILES if room_of(f) not in TOP], ids=by_path)
def test_imports_go_down(file):
    assert not forbidden(room_of(file), imports_of(file))


def test_the_check_of_imports_can_fail():
    assert forbidden("text", {"model.modeling_genlm"})
    assert forbidden("publish", {"evaluation.likelihood"})
    assert forbidden("publish.space_files", {"publish.markdown"})
    assert not forbidden("publish", {"evaluation.measurement", "evaluation.measurement.Measurement"})


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
    assert len(source.splitlines()) <= 420
    tree = ast.parse(source)
    assert file.stat().st_size == 0 or ast.get_docstring(tree), "a module's first line says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 70, f"{node.name} is too long"


def test_importing_the_rooms_is_free_of_torch():
    """--help and a wrong argument answer at once because these modules do not load torch."""
    import subprocess
    import sys

    code = (
        "import sys; sys.argv[0] = 'hf-genlm'; import hf_genlm.cli.main, hf_genlm.config.recipe;"
        "import hf_genlm.run_folder;"
        "import hf_genlm.evaluation.measurement; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
