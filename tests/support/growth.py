"""How the time of a function grows with a text, on texts that are hard for regular expressions.

`attacks_on` derives such texts from a pattern: its prefixes, repeated; its repeated parts, pumped, with what
stands before them and without what would end them. A text that a pattern searches from many starts, or in
many ways from one start, makes the time grow with the square of the length or faster.
"""

import ast
import importlib
import inspect
import pkgutil
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import regex

import hf_genlm

if sys.version_info >= (3, 11):
    from re import _constants as sre
    from re import _parser as parser
else:
    import sre_constants as sre
    import sre_parse as parser

Attack = Callable[[int], str]  # length -> a text of about this length

SIZES = (2, 8, 16, 20, 24, *(2 * 4**k for k in range(2, 11)))  # small ones: exponential time ends there
MAX_CHARACTERS = 1 << 15
MIN_SECONDS = 0.03  # below it, the growth is not looked at
ENOUGH_SECONDS = 1.5  # larger sizes are left out
# 16 times the text takes about 16 times as long; quadratic: 256 times
MAX_GROWTH = 80
CHARACTERS = "a0Az9Z-_.=/:+@ '\"\\\t\n\u00e9\u4e00(*`{<&%;,#~"
SEPARATORS = ("", " ", "\n", "-", "/", ".")


def cpu_seconds(run: Callable[[str], Any], text: str, repeats: int = 1) -> float:
    """The least CPU time of this thread among `repeats` calls."""
    found = []
    for _ in range(repeats):
        start = time.thread_time()
        run(text)
        found.append(time.thread_time() - start)
    return min(found)


def too_fast_growth(
    run: Callable[[str], Any], attack: Attack, max_characters: int = MAX_CHARACTERS
) -> str | None:
    """None if the time of `run` grows about linearly with the attack's length; otherwise the figures.

    CPU time of the thread is compared, at 16 times the length, and measured again before it counts: another
    process on the core does not matter.
    """
    seconds: dict[int, float] = {}
    for size in SIZES:
        if size > max_characters:
            break
        text = attack(size)
        seconds[size] = cpu_seconds(run, text)
        before = max([2, *(other for other in seconds if 16 * other <= size)])
        if size > before and seconds[size] > max(MIN_SECONDS, MAX_GROWTH * seconds[before]):
            least = cpu_seconds(run, attack(before), 5)
            if seconds[size] < 5:
                seconds[size] = min(seconds[size], cpu_seconds(run, text, 2))
            if seconds[size] > max(MIN_SECONDS, MAX_GROWTH * least):
                return (
                    f"{attack(60)!r}...: {seconds[size] / max(least, 1e-7):,.0f} times as long for "
                    f"{size // before} times the text ({size:,} characters: {seconds[size]:.2f} s)"
                )
        if seconds[size] > ENOUGH_SECONDS:
            break
    return None


def repeated(unit: str, before: str = "", after: str = "") -> Attack:
    return lambda n: before + unit * max(1, (n - len(before) - len(after)) // len(unit)) + after


def attacks_on(pattern: str, flags: int = 0) -> dict[tuple[str, str, str], Attack]:
    """(before, unit, after) -> text; the pattern may be in the syntax of `re`, `regex` or Rust."""
    tree = list(parser.parse(_plain(pattern), flags & ~re.LOCALE & 0x1FF))
    heads = list(dict.fromkeys(head for head in _prefixes(tree) if head))
    found: dict[tuple[str, str, str], Attack] = {}

    def add(unit: str, before: str = "", after: str = "") -> None:
        if unit and len(unit) + len(before) < 4096:
            found.setdefault((before, unit, after), repeated(unit, before, after))

    for head in heads:
        for separator in SEPARATORS:
            add(head + separator)
    for before, unit in dict.fromkeys(_pumps(tree, "")):
        add(unit)
        add(unit, before)
        add(unit, before, "\0")
        add(before + unit * 4)
    letters = sorted({c for head in heads for c in head} | set("a -"))
    drawn = random.Random(0)
    for _ in range(4):
        add("".join(drawn.choices([*heads, *letters], k=20)) or "a")
    return found


# some members of Unicode's classes, which `re` does not know
UNICODE = {"L": "a-z\u00e9", "M": "\u0301", "N": "0-9", "Nl": "0-9", "No": "0-9"}


def _plain(pattern: str) -> str:
    """The pattern with classes that `re` knows instead of Unicode's."""
    parts, is_in_class = [], False
    for found in re.finditer(r"\\p\{([^}]*)\}|\\.|.", pattern, re.DOTALL):
        part = found[0]
        if found[1] is not None:
            letters = UNICODE.get(found[1], "a-z")
            part = letters if is_in_class else f"[{letters}]"
        elif part in "[]":
            is_in_class = part == "["
        parts.append(part)
    return "".join(parts)


def _example(items: Iterable[Any]) -> str:
    """The shortest text that the parsed items match, but for lookarounds."""
    parts = []
    for op, value in items:
        if op is sre.LITERAL:
            parts.append(chr(value))
        elif op in (sre.IN, sre.ANY, sre.NOT_LITERAL):
            parts.append(next(iter(_members((op, value))), "a"))
        elif op is sre.BRANCH:
            parts.append(_example(value[1][0]))
        elif op is sre.SUBPATTERN:
            parts.append(_example(value[-1]))
        elif _is_repeat(op):
            parts.append(_example(value[2]) * max(1, value[0]))
        elif str(op) == "ATOMIC_GROUP":
            parts.append(_example(value))
    return "".join(parts)


def _is_repeat(op: Any) -> bool:
    return op in (sre.MAX_REPEAT, sre.MIN_REPEAT) or str(op) == "POSSESSIVE_REPEAT"


def _members(item: Any) -> list[str]:
    """Those of CHARACTERS, and of the literals of a class, that one parsed item matches."""
    op, value = item
    if op is sre.LITERAL:
        return [chr(value)]
    if op is sre.ANY:
        return [c for c in CHARACTERS if c != "\n"]
    if op is sre.NOT_LITERAL:
        return [c for c in CHARACTERS if c != chr(value)]
    if op is not sre.IN:
        return []
    literals = [chr(v) for o, v in value if o is sre.LITERAL]
    literals += [chr(v[0]) for o, v in value if o is sre.RANGE]
    is_negated = value[0][0] is sre.NEGATE
    return [c for c in dict.fromkeys([*CHARACTERS, *literals]) if _is_in(value, c) != is_negated]


def _is_in(members: Any, c: str) -> bool:
    categories = {
        sre.CATEGORY_DIGIT: r"\d", sre.CATEGORY_NOT_DIGIT: r"\D", sre.CATEGORY_SPACE: r"\s",
        sre.CATEGORY_NOT_SPACE: r"\S", sre.CATEGORY_WORD: r"\w", sre.CATEGORY_NOT_WORD: r"\W",
    }  # fmt: skip
    return any(
        (op is sre.LITERAL and value == ord(c))
        or (op is sre.RANGE and value[0] <= ord(c) <= value[1])
        or (op is sre.CATEGORY and re.match(categories[value], c) is not None)
        for op, value in members
    )


def _leaves(items: Iterable[Any]) -> Iterator[str]:
    """Single characters that some part of the parsed items matches."""
    for item in items:
        yield from _members(item)
        for inner in _inner(item):
            yield from _leaves(inner)


def _inner(item: Any) -> list[Any]:
    """The sequences of parsed items within one."""
    op, value = item
    if op is sre.BRANCH:
        return list(value[1])
    if op is sre.SUBPATTERN:
        return [value[-1]]
    if _is_repeat(op):
        return [value[2]]
    if op in (sre.ASSERT, sre.ASSERT_NOT):
        return [value[1]]
    return [value] if str(op) == "ATOMIC_GROUP" else []


def _prefixes(items: Iterable[Any]) -> Iterator[str]:
    """Examples of every beginning of the pattern."""
    before = ""
    for item in items:
        for inner in _inner(item):
            yield from (before + head for head in _prefixes(inner))
        before += _example([item])
        yield before


def _pumps(items: Iterable[Any], before: str) -> Iterator[tuple[str, str]]:
    """(text before, unit) for each part that the pattern repeats, with several characters of its classes."""
    for item in items:
        op, value = item
        if _is_repeat(op) and value[1] > value[0] + 8:
            body = list(value[2])
            for unit in [_example(body), *_leaves(body)]:
                yield before, unit
        for inner in _inner(item):
            yield from _pumps(inner, before)
        before += _example([item])


# every pattern of the package


def modules() -> Iterator[ModuleType]:
    """Every module of the package but the demo's, which runs elsewhere."""
    yield hf_genlm
    for found in pkgutil.walk_packages(hf_genlm.__path__, "hf_genlm."):
        if not found.name.startswith("hf_genlm.space.files") and not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


def _patterns_in(value: Any) -> Iterator[Any]:
    if isinstance(value, (re.Pattern, regex.Pattern)):
        yield value
    elif isinstance(value, dict):
        yield from _patterns_in([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _patterns_in(item)


def patterns_of(module: ModuleType) -> dict[str, Any]:
    """Name or line -> compiled pattern: those that the module holds, and those that stand in its functions.

    Raises:
        AssertionError: a function composes a pattern, so it has to be tested by name.
    """
    found = {
        f"{name}[{i}]": pattern
        for name, value in vars(module).items()
        for i, pattern in enumerate(_patterns_in(value))
        if not (inspect.ismodule(value) or name.startswith("__"))
    }
    return found


def patterns_in_functions(module: ModuleType) -> Iterator[tuple[int, str, str | None]]:
    """(line, function of `re`, pattern; None if it is composed) for each use inside a function."""
    tree = ast.parse(inspect.getsource(module))
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        for node in ast.walk(function):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in ("re", "regex")
                and node.func.attr not in ("escape", "purge")
            ):
                first = node.args[0]
                text = first.value if isinstance(first, ast.Constant) else None
                yield node.lineno, node.func.attr, text


def methods_used(name: str, sources: Iterable[str]) -> set[str]:
    """Methods that the sources call on a pattern of this name."""
    return {found for source in sources for found in re.findall(rf"\b{re.escape(name)}\.(\w+)\(", source)}
