"""Typed recipe fields: coercion, ranges, choices, synonyms, and one-line errors, on top of pydantic.

A section of a recipe is a `Section`; each of its fields is declared once:

    steps: Whole | None = setting(None, "Optimizer steps.", at_least=1, synonyms="max_steps num_steps")

The same rules apply to YAML, `--set`, constructors and plain assignment (`recipe.training.steps = 0` raises).
"""

import math
import re
import reprlib
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, NamedTuple, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from hf_genlm.errors import UserError, did_you_mean, without_secrets

MAX_WHOLE = 2**53  # a float represents every whole number up to here


class Rule(NamedTuple):
    """Allowed values of a field, and the names that people look for it by. NaN is in no range."""

    at_least: float = -math.inf
    more_than: float = -math.inf
    at_most: float = math.inf
    less_than: float = math.inf
    choices: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()

    def is_in_range(self, value: float) -> bool:
        """True if `value` lies within all four bounds."""
        return (
            self.at_least <= value <= self.at_most
            and (value > self.more_than or self.more_than == -math.inf)
            and (value < self.less_than or self.less_than == math.inf)
        )

    @property
    def range_text(self) -> str:
        """The range in words, such as `from 0 to less than 1`; empty where every number is allowed."""
        is_open_below, is_open_above = self.more_than > -math.inf, self.less_than < math.inf
        low = self.more_than if is_open_below else self.at_least
        high = self.less_than if is_open_above else self.at_most
        if high == math.inf:
            if low == -math.inf:
                return ""
            return f"more than {low:,}" if is_open_below else f"at least {low:,}"
        if is_open_below and is_open_above:
            return f"between {low:,} and {high:,}"
        return f"from {'more than ' * is_open_below}{low:,} to {'less than ' * is_open_above}{high:,}"


def read_count(word: str) -> float | None:
    """The number that a word such as 300K, 2.5M or 1B stands for; None for any other word."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([KMB])", word, flags=re.IGNORECASE | re.ASCII)
    return float(found[1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[found[2].upper()] if found else None


def setting(
    default: Any, help: str, *, synonyms: str = "", choices: tuple[str, ...] = (), **bounds: float
) -> Any:
    """A field of a section.

    Args:
        default: None where it is open, and settled later.
        help: shown by `hf-genlm settings` and on the generated page.
        synonyms: other names for it, separated by spaces.
        choices: the only words that it takes.
        bounds: `at_least`, `more_than`, `at_most`, `less_than` of its numbers.
    """
    rule = Rule(choices=choices, synonyms=tuple(synonyms.split()), **bounds)
    return Field(default, description=help, json_schema_extra={"rule": rule})  # type: ignore[dict-item]


def rule_of(info: FieldInfo) -> Rule:
    """The rule of a field; of a settled field, which is derived, one that allows everything."""
    return (info.json_schema_extra or {}).get("rule", Rule())  # type: ignore[union-attr, return-value]


# what text, YAML and Python values become before pydantic checks their type


def _read_whole(value: Any) -> Any:
    if isinstance(value, str):
        value = int(value) if re.fullmatch(r"[-+]?[0-9]{1,20}", value) else _read_number(value)  # 1e6 too
    if isinstance(value, bool) or (isinstance(value, (int, float)) and abs(value) > MAX_WHOLE):
        raise ValueError
    return value


def _read_number(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, str) and not value.isascii()):
        raise ValueError
    return float(value) if isinstance(value, str) else value


def _read_word(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value


def _read_list(value: Any) -> Any:
    """None as an empty list, a single value as a list of one."""
    if value is None:
        return []
    return [value] if isinstance(value, (str, int, float)) else value


def _read_mapping(value: Any) -> Any:
    """A mapping as it is; words such as `fra=text.txt` by key, where a key may occur several times."""
    if value is None or isinstance(value, dict):
        return {} if value is None else value
    found: dict[str, list[str]] = {}
    for word in _read_list(value):
        key, equals, text = str(word).partition("=")
        if not (key and equals and text):
            raise ValueError
        found.setdefault(key, []).append(text)
    return {key: texts if len(texts) > 1 else texts[0] for key, texts in found.items()}


Whole = Annotated[int, BeforeValidator(_read_whole)]
Number = Annotated[float, BeforeValidator(_read_number)]
Word = Annotated[str, BeforeValidator(_read_word)]
Flag = Annotated[bool, Field(strict=True)]
Words = Annotated[list[Word], BeforeValidator(_read_list)]
Wholes = Annotated[list[Whole], BeforeValidator(_read_list)]
Numbers = Annotated[list[Number], BeforeValidator(_read_list)]
WordsByKey = Annotated[dict[Word, Words], BeforeValidator(_read_mapping)]
WordByKey = Annotated[dict[Word, Word], BeforeValidator(_read_mapping)]
NumberByKey = Annotated[dict[Word, Number], BeforeValidator(_read_mapping)]
_KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def kind_of(hint: Any) -> str:
    """A type in words: `a whole number`, `words`, `key=value, or a mapping`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is dict:
        return "key=value, or a mapping"
    if origin is list:
        return f"{kind_of(inner[0]).removeprefix('a ')}s"
    if origin is not None:  # Annotated, or a union with None
        return kind_of(inner[0])
    return _KINDS[hint]


class Section(BaseModel):
    """A group of fields, checked when it is made and on every assignment.

    Raises:
        UserError: an unknown field, another type, a value out of range, or one that holds an access token.
    """

    model_config = ConfigDict(validate_assignment=True, extra="forbid", allow_inf_nan=False)
    section: ClassVar[str] = ""

    def __init__(self, **fields: Any):
        for key in fields:
            self._check_known(key)
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise self._complaint(error, fields) from error

    def __setattr__(self, key: str, value: Any) -> None:
        self._check_known(key)
        try:
            super().__setattr__(key, value)
        except ValidationError as error:
            if error.errors()[0]["type"] == "frozen_instance":
                raise
            raise self._complaint(error, {key: value}) from error

    @classmethod
    def _check_known(cls, key: str) -> None:
        if key not in cls.model_fields:
            raise UserError(f"unknown setting '{cls.section}.{key}'{cls.suggestion(key)}")

    @classmethod
    def suggestion(cls, key: str) -> str:
        """`; did you mean 'training.learning_rate'?` for a near name or a synonym, else all names."""
        for name, info in cls.model_fields.items():
            if key.lower() in rule_of(info).synonyms:
                return f"; did you mean '{cls.section}.{name}'?"
        near = did_you_mean(key, cls.model_fields)
        return near.replace("mean '", f"mean '{cls.section}.")

    @classmethod
    def _complaint(cls, error: ValidationError, given: dict[str, Any]) -> UserError:
        first = error.errors()[0]
        key, *place = first["loc"]
        info, name, value = cls.model_fields[str(key)], f"{cls.section}.{key}", given[str(key)]
        if first["type"] == "secret":
            return UserError(
                f"{name} holds an access token or a login, which would end up in the run folder and on the "
                "model card: leave it out, and log in with `hf auth login` or set HF_TOKEN"
            )
        if first["type"] == "choice":
            word, choices = first["ctx"]["word"], rule_of(info).choices
            return UserError(f"unknown {name} {word!r}{did_you_mean(word, choices)}")
        if first["type"] == "range":
            return UserError(f"{name} = {value}: it must be {rule_of(info).range_text}")
        hint = info.annotation
        if isinstance(value, dict) and place:  # one entry of a mapping
            name, value, hint = f"{name}.{place[0]}", value.get(place[0]), get_args(hint)[1]
        return UserError(f"{name} = {shown(value)}: expected {kind_of(hint)}")

    @field_validator("*", mode="after")
    @classmethod
    def _follow_rule(cls, value: Any, info: ValidationInfo) -> Any:
        rule = rule_of(cls.model_fields[info.field_name or ""])
        for each in _flat(value):
            if isinstance(each, str):
                if without_secrets(each) != each:
                    raise PydanticCustomError("secret", "an access token")
                if rule.choices and each not in rule.choices:
                    raise PydanticCustomError("choice", "unknown", {"word": each})
            elif isinstance(each, (int, float)) and not isinstance(each, bool) and not rule.is_in_range(each):
                raise PydanticCustomError("range", "out of range")
        return value


def _flat(value: Any) -> Iterator[Any]:
    """Every word and number of a field that holds one, a list, or either by key."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


_SHORT = reprlib.Repr()  # YAML aliases can make a value endless
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 100, 100


def shown(value: Any) -> str:
    """Short form of `value` for a message; text that looks like a number without quotes."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\.?[0-9][0-9a-zA-Z_.+-]{0,40}", value):
        return value
    return _SHORT.repr(value)
