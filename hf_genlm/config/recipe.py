"""A recipe: everything that decides a run, as typed fields, read from YAML and from `--set
section.key=value`.

Every field has a default; a recipe file states only what differs. Unknown words stop the run and suggest the
near one. A run writes its recipe to the run folder, with every size, rate and length that was left open as it
was chosen: that file repeats the run.

Of YAML's own reading of plain words only null, true and false are taken: the field says what is a number. So
`no` is Norwegian, `1e-3` a number, and `1:30` no 90.
"""

import dataclasses
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_genlm.config.plain_yaml import BOOL, NULL, load_yaml
from hf_genlm.config.ranges import MOST_WHOLE, RANGES
from hf_genlm.config.sections import (
    CardRecipe,
    CorpusRecipe,
    EvaluationRecipe,
    ModelRecipe,
    PrivacyRecipe,
    TokenizerRecipe,
    TrainingRecipe,
    VectorsRecipe,
)
from hf_genlm.errors import UserError, did_you_mean, without_secrets

__all__ = [
    "ENDS",
    "CardRecipe",
    "CorpusRecipe",
    "EvaluationRecipe",
    "ModelRecipe",
    "PrivacyRecipe",
    "Recipe",
    "TokenizerRecipe",
    "TrainingRecipe",
    "VectorsRecipe",
    "check_recipe",
    "load_recipe",
    "set_field",
]


@dataclass
class Recipe:
    """All sections. `Recipe()` is the default run."""

    corpus: CorpusRecipe = field(default_factory=CorpusRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    vectors: VectorsRecipe = field(default_factory=VectorsRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    privacy: PrivacyRecipe = field(default_factory=PrivacyRecipe)
    card: CardRecipe = field(default_factory=CardRecipe)

    def to_yaml(self) -> str:
        """Every field, defaults included."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


ENDS = ("training.minutes", "training.steps", "training.tokens")


def load_recipe(path: str | Path | None = None, assignments: Iterable[str] = ()) -> Recipe:
    """The defaults, overlaid with the YAML file at `path`, overlaid with `section.key=value` assignments.

    Raises:
        UserError: unreadable file, unknown section or key, or a value that does not fit its field or holds
            an access token.
    """
    recipe = Recipe()
    if path is not None:
        for section, values in _read_yaml(Path(path)).items():
            for key, value in _section_items(section, values, path).items():
                set_field(recipe, f"{section}.{key}", value)
    stated = [_split(assignment) for assignment in assignments]
    if any(name in ENDS for name, _ in stated):  # what is stated here replaces what the file says
        for name in ENDS:
            set_field(recipe, name, None)
    for name, value in stated:
        set_field(recipe, name, value)
    return recipe


def set_field(recipe: Recipe, name: str, value: Any) -> None:
    """Set `section.key`, coercing `value` to the field's type.

    Raises:
        UserError: unknown section or key (with the near word), or a value of another type or out of range.
    """
    section_name, _, key = name.partition(".")
    sections = [f.name for f in dataclasses.fields(recipe)]
    if section_name not in sections:
        raise UserError(f"unknown recipe section {section_name!r}{did_you_mean(section_name, sections)}")
    section = getattr(recipe, section_name)
    hints = typing.get_type_hints(type(section))
    if key not in hints:
        raise UserError(f"unknown recipe key {name!r}{did_you_mean(key, hints)}")
    coerced = _coerce(name, value, hints[key])
    _check(name, coerced)
    setattr(section, key, coerced)


def check_recipe(recipe: Recipe) -> None:
    """
    Raises:
        UserError: a number is out of its range, or a word holds an access token. What `load_recipe` gives
            has been checked.
    """
    for section in dataclasses.fields(recipe):
        for key, value in vars(getattr(recipe, section.name)).items():
            _check(f"{section.name}.{key}", value)


def _check(name: str, value: Any) -> None:
    for number in _flat(value):
        if isinstance(number, (int, float)) and name in RANGES and not RANGES[name].holds(number):
            raise UserError(f"{name} = {value}: it must be {RANGES[name]}")
    for word in _flat(value):
        if isinstance(word, str) and without_secrets(word) != word:
            raise UserError(
                f"{name} holds an access token or a login, which would stand in the run folder and on the "
                "model card: leave it out, and log in with `hf auth login` or set HF_TOKEN"
            )


def _flat(value: Any) -> list[Any]:
    """The words or numbers of a field that holds one, a list, or either by name."""
    if isinstance(value, dict):
        return [*value, *(item for each in value.values() for item in _flat(each))]
    return value if isinstance(value, list) else [value]


_MOST_CHARACTERS = 1 << 17  # of a recipe file
_SHORT = reprlib.Repr()  # what a message shows of a value, which aliases can make endless
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 100, 100


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
        if len(text) > _MOST_CHARACTERS:
            raise ValueError(f"it has more than {_MOST_CHARACTERS:,} characters")
        content = load_yaml(text)
    except OSError as error:
        raise UserError(f"cannot read the recipe {str(path)!r}: {error.strerror}") from error
    except ValueError as error:  # a name that no file can have, too
        raise UserError(f"the recipe {str(path)!r} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(
            f"the recipe {str(path)!r} must hold sections such as 'training:', not {_shown(content)}"
        )
    return content


def _section_items(section: str, values: Any, path: str | Path) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise UserError(
            f"section {section!r} of the recipe {str(path)!r} must hold keys, not {_shown(values)}"
        )
    return values


def _split(assignment: str) -> tuple[str, Any]:
    name, equals, text = assignment.partition("=")
    if not equals:
        raise UserError(f"--set {assignment!r}: write section.key=value, for example training.steps=300")
    return name.strip(), _parse_value(assignment, text.strip())


def _parse_value(assignment: str, text: str) -> Any:
    """A list or quoted word of YAML; anything else as it stands, so that `*` and `#` need no quotes."""
    if text.startswith(("[", "{", "'", '"')):
        try:
            return load_yaml(text)
        except ValueError as error:
            raise UserError(f"--set {assignment!r}: the value is not YAML ({error})") from error
    if NULL.match(text):
        return None
    return text.lower() == "true" if BOOL.match(text) else text


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`.

    Raises:
        UserError: it is none.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    (kind,) = [option for option in options if option is not type(None)]
    if typing.get_origin(kind) is dict:
        of_each = typing.get_args(kind)[1]
        return {key: _coerce(f"{name}.{key}", each, of_each) for key, each in _by_name(name, value).items()}
    is_list = typing.get_origin(kind) is list
    kind = typing.get_args(kind)[0] if is_list else kind
    read, expected = _KINDS[kind]
    try:
        return [read(word) for word in _words(value)] if is_list else read(value)
    except (TypeError, ValueError, OverflowError) as error:
        expected = f"{expected.split()[-1]}s" if is_list else expected
        raise UserError(f"{name} = {_shown(value)}: expected {expected}") from error


def _by_name(name: str, value: Any) -> dict[str, Any]:
    """A mapping as it stands, or one of words such as `fra=text.txt`; a key may stand again."""
    if isinstance(value, dict):
        return {_word(key): each for key, each in value.items()}
    found: dict[str, list[str]] = {}
    try:
        for word in _words(value):
            key, equals, each = word.partition("=")
            if not (key and equals and each):
                raise ValueError
            found.setdefault(key, []).append(each)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} = {_shown(value)}: write key=value, or a mapping") from error
    return {key: each if len(each) > 1 else each[0] for key, each in found.items()}


def _words(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [_word(item) for item in value]
    return [item.strip() for item in _word(value).split(",")]


def _word(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    return str(value)


def _whole(value: Any) -> int:
    if isinstance(value, str):
        value = int(value) if re.fullmatch(r"[-+]?[0-9]{1,20}", value) else _number(value)
    if isinstance(value, bool) or value != int(value) or abs(value) > MOST_WHOLE:
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or (isinstance(value, str) and not value.isascii()):
        raise TypeError
    number = float(value)
    if number - number != 0:  # neither infinite nor undefined
        raise ValueError
    return number


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _shown(value: Any) -> str:
    """What stands for `value` in a message: a number that was written as one without quotes."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\.?[0-9][0-9a-zA-Z_.+-]{0,40}", value):
        return value
    return _SHORT.repr(value)


_KINDS: dict[type, tuple[Callable[[Any], Any], str]] = {
    bool: (_truth, "true or false"),
    int: (_whole, "a whole number"),
    float: (_number, "a number"),
    str: (_word, "a word"),
}
