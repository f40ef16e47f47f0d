"""A recipe: what a person states about a run, read from YAML, `--set section.key=value` and Python.

Every field has a default; a recipe file states only what differs. Unknown names stop the run and suggest the
nearest one. A run writes its recipe to the run folder, with every open size, rate and length as it was
settled: that file repeats the run.

Of YAML's reading of plain words only null, true and false are used; the field decides what is a number. So
`no` is Norwegian, `1e-3` a number, and `1:30` not 90.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from hf_genlm.config.fields import Section, kind_of, rule_of, shown
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
from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.files import open_text

ENDS = ("training.minutes", "training.steps", "training.tokens")
_MAX_CHARACTERS = 1 << 17  # of a recipe file


# fields that name files; what these hold is compared when a run is resumed, or not read again
PLACES = (
    "corpus.sources", "corpus.languages", "corpus.validation", "corpus.parallel", "vectors.path",
    "model.init_from",
)  # fmt: skip


class Recipe(BaseModel):
    """All sections. `Recipe()` is the default run."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    corpus: CorpusRecipe = Field(default_factory=CorpusRecipe)
    tokenizer: TokenizerRecipe = Field(default_factory=TokenizerRecipe)
    model: ModelRecipe = Field(default_factory=ModelRecipe)
    vectors: VectorsRecipe = Field(default_factory=VectorsRecipe)
    training: TrainingRecipe = Field(default_factory=TrainingRecipe)
    evaluation: EvaluationRecipe = Field(default_factory=EvaluationRecipe)
    privacy: PrivacyRecipe = Field(default_factory=PrivacyRecipe)
    card: CardRecipe = Field(default_factory=CardRecipe)

    def to_yaml(self) -> str:
        """Every field, defaults included."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path | None = None, assignments: Iterable[str] = ()) -> Recipe:
    """Overlay the defaults with the YAML file at `path`, then with `section.key=value` assignments.

    Raises:
        UserError: an unreadable file, an unknown section or key, or a value that does not fit its field or
            holds an access token.
    """
    recipe = Recipe()
    if path is not None:
        is_run = Path(path).name == "recipe.yaml" and Path(path).with_name("log.jsonl").is_file()
        sections = _read_sections(Path(path))
        for section, values in sections.items():
            for key, value in values.items():
                if is_run and field_of(f"{section}.{key}") is None:
                    raise UserError(
                        f"the run in {str(Path(path).parent)!r} was written by an older version of hf_genlm: "
                        f"its recipe.yaml has {section}.{key}, which this version does not know; use that "
                        "version, or train again"
                    )
                try:
                    _assign(recipe, f"{section}.{key}", value)
                except UserError as error:
                    raise UserError(f"{str(path)!r}: {error}") from error
        if is_run and (lost := [name for name in Recipe.model_fields if name not in sections]):
            raise UserError(
                f"{str(path)!r} has lost its section {lost[0]!r}, and a run's recipe has all of them: bring "
                "back the file from a copy of the run, or train again"
            )
    stated = [_split(assignment) for assignment in assignments]
    if any(name in ENDS for name, _ in stated):  # an end that is stated here replaces that of the file
        for name in ENDS:
            set_field(recipe, name, None)
    for name, value in stated:
        set_field(recipe, name, value)
    return recipe


def set_field(recipe: Recipe, name: str, value: Any) -> None:
    """Set `section.key` as the command line states it: text for a list is split at commas.

    Raises:
        UserError: an unknown section or key (with the nearest name), another type, or a value out of range.
    """
    found = field_of(name)
    if found is not None and isinstance(value, str) and found.endswith(("words", "numbers", "mapping")):
        value = [word.strip() for word in value.split(",")]
    _assign(recipe, name, value)


@contextlib.contextmanager
def pointing_to_places(recipe: Recipe) -> Iterator[None]:
    """Tell, of a place that `recipe` names and that is not found within the block, how to name its new one.

    Raises:
        UserError: in place of the one that names a missing file or folder.
    """

    def words_of(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value, value.partition("=")[2]]
        return [
            w for part in (value.values() if isinstance(value, dict) else value or ()) for w in words_of(part)
        ]

    try:
        yield
    except UserError as error:
        for name in PLACES:
            for word in words_of(attrgetter(name)(recipe)):
                if word and repr(word) in str(error) and not os.path.lexists(os.path.expanduser(word)):
                    raise UserError(
                        f"{word!r}, which this run reads, is missing: bring it back, work in the folder that "
                        f"the run was started in (this is {os.getcwd()!r}), or name its new place by "
                        f"--set {name}=..."
                    ) from error
        raise


def field_of(name: str) -> str | None:
    """The kind of the field `section.key` in words; None if there is no such field."""
    section, _, key = name.partition(".")
    info = _sections()[section].model_fields.get(key) if section in _sections() else None
    return None if info is None else kind_of(info.annotation)


def stated_fields(recipe: Recipe) -> dict[str, Any]:
    """`section.key` -> value of every field that differs from its default."""
    default = Recipe()
    return {
        f"{name}.{key}": value
        for name in Recipe.model_fields
        for key, value in getattr(recipe, name)
        if value != getattr(getattr(default, name), key)
    }


def _sections() -> dict[str, type[Section]]:
    return {name: info.annotation for name, info in Recipe.model_fields.items()}  # type: ignore[misc]


def _assign(recipe: Recipe, name: str, value: Any) -> None:
    section, dot, key = name.partition(".")
    sections = _sections()
    if section in sections:
        setattr(getattr(recipe, section), key, value)
        return
    if dot:
        raise UserError(f"unknown recipe section {section!r}{did_you_mean(section, sections)}")
    near = (each.suggestion(name) for each in sections.values())  # a field without its section
    found = next((text for text in near if text.startswith("; did")), did_you_mean(name, sections))
    raise UserError(f"unknown setting {name!r}{found}")


def _split(assignment: str) -> tuple[str, Any]:
    name, equals, text = assignment.partition("=")
    name, text = name.strip(), text.strip()
    if not equals:
        raise UserError(f"--set {assignment!r}: write section.key=value, for example training.steps=300")
    if text.startswith(("[", "{", "'", '"')):  # YAML; other text as it is, so that `*` and `#` need no quotes
        try:
            return name, load_yaml(text)
        except ValueError as error:
            raise UserError(f"--set {assignment!r}: the value is not YAML ({error})") from error
    if _NULL.match(text):
        return name, None
    return name, text.lower() == "true" if _BOOL.match(text) else text


def _read_sections(path: Path) -> dict[str, dict[str, Any]]:
    """The content of a recipe file, section by section."""
    try:
        with open_text(path) as file:
            text = file.read(_MAX_CHARACTERS + 1)
        if len(text) > _MAX_CHARACTERS:
            raise ValueError(f"it has more than {_MAX_CHARACTERS:,} characters")
        content = load_yaml(text)
    except OSError as error:
        raise UserError(f"cannot read the recipe {str(path)!r}: {error.strerror}") from error
    except ValueError as error:  # also for a path that no file can have
        raise UserError(f"the recipe {str(path)!r} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(
            f"the recipe {str(path)!r} must hold sections such as 'training:', not {shown(content)}"
        )
    for section, values in content.items():
        if not isinstance(values, dict):
            raise UserError(
                f"section {section!r} of the recipe {str(path)!r} must hold keys, not {shown(values)}"
            )
    return content


_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe types, without its guesses at plain words, and without duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  of this class, not of its parent

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))


def _count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes of a YAML document, an alias counted as what it stands for."""
    if id(node) not in known:
        known[id(node)] = 1  # an alias of what it lies in
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = itertools.chain(*parts) if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] += sum(_count_nodes(part, known) for part in parts)
    return known[id(node)]


def load_yaml(text: str) -> Any:
    """Parse YAML; plain words other than null, true and false stay text.

    Raises:
        ValueError: `text` is not YAML, a key occurs twice, or aliases stand for too many values.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_nodes(node, {}) > _MAX_CHARACTERS:
            raise yaml.YAMLError(f"its aliases stand for more than {_MAX_CHARACTERS:,} values")
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


@dataclass(frozen=True)
class FieldRow:
    """One field in words."""

    name: str  # section.key
    kind: str
    default: str  # as YAML writes it
    allowed: str  # the range or the choices; empty: anything of its kind
    help: str
    synonyms: tuple[str, ...]


def describe_fields(word: str | None = None) -> list[FieldRow]:
    """All fields, or those that `word` names: by a part of the name, a synonym, or a word of the help.

    Fields that have it in their name or synonyms come before those that have it in their help.
    """
    rows = []
    for section in Recipe.model_fields:
        for key, info in type(getattr(Recipe(), section)).model_fields.items():
            rule, name, default = rule_of(info), f"{section}.{key}", _yaml(info.default)
            allowed = ", ".join(rule.choices) or rule.range_text
            kind = kind_of(info.annotation).removesuffix(", or a mapping")
            rows.append(FieldRow(name, kind, default, allowed, info.description or "", rule.synonyms))
    if word is None:
        return rows
    word = word.lower().replace("-", "_")
    named = [row for row in rows if word in row.name or any(word in name for name in row.synonyms)]
    return named + [row for row in rows if row not in named and word in row.help.lower()]


def _yaml(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else f"{value}"
