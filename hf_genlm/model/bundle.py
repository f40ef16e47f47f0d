"""The code that is saved with a model: two files, made of the files of this folder.

`configuration_genlm.py` is the file itself. `modeling_genlm.py` holds all others, each after those that it
imports. Their text is unchanged, except that imports stand once, at the top, and docstrings are comments.
"""

import ast
import functools
from pathlib import Path

_HERE = Path(__file__).parent
_MAX_LINE = 110
CONFIGURATION, MODELING = "configuration_genlm", "modeling_genlm"


@functools.cache
def bundle() -> dict[str, str]:
    """File name -> text of the code that loads a model."""
    bodies: dict[str, list[str]] = {}  # in the order of imports
    names: dict[tuple[int, str], set[str]] = {}  # (0, module of others) or (1, own module) -> imported names
    plain: set[str] = set()

    def add(module: str) -> None:
        text = (_HERE / f"{module}.py").read_text(encoding="utf-8")
        tree = ast.parse(text)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in imports:
            if isinstance(node, ast.Import):
                plain.update(ast.unparse(node).removeprefix("import ").split(", "))
            elif node.level and node.module != CONFIGURATION:
                if node.module not in bodies:
                    add(str(node.module))
            else:
                group = names.setdefault((node.level, str(node.module)), set())
                group.update(ast.unparse(alias) for alias in node.names)
        docstring = ast.get_docstring(tree, clean=False) or ""
        if module == MODELING:
            head[:] = [f'"""{docstring}"""', ""]
            comment = []
        else:
            comment = ["", "", *(f"# {line}".rstrip() for line in docstring.strip().split("\n"))]
        body = text.split("\n")[max(node.end_lineno or 0 for node in imports) :]
        bodies[module] = [*comment, *"\n".join(body).rstrip("\n").split("\n")]

    head: list[str] = []
    add(MODELING)
    lines = [*head, *(f"import {name}" for name in sorted(plain)), ""]
    for (level, module), imported in sorted(names.items()):
        line = f"from {'.' * level}{module} import "
        is_short = len(line + ", ".join(imported)) <= _MAX_LINE
        more = [f"    {name}," for name in sorted(imported)]
        lines += [line + ", ".join(sorted(imported))] if is_short else [line + "(", *more, ")"]
    for body in bodies.values():
        lines += body
    configuration = (_HERE / f"{CONFIGURATION}.py").read_text(encoding="utf-8")
    return {f"{CONFIGURATION}.py": configuration, f"{MODELING}.py": "\n".join(lines) + "\n"}


def write_bundle(folder: str | Path) -> None:
    """Replace the files of this folder, which transformers has copied there with a model, by the bundle."""
    folder = Path(folder)
    if not (folder / f"{MODELING}.py").is_file():  # a config by itself needs no more than its own file
        return
    for path in _HERE.glob("*_genlm.py"):
        (folder / path.name).unlink(missing_ok=True)
    for name, text in bundle().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
