"""What is compared, and what is equal: read from the options, written to compare.yaml, and held to when a
comparison goes on."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_genlm.config.recipe import Recipe, load_recipe, set_field, stated_fields
from hf_genlm.errors import UserError

# what each run may be given alike -> the field that says it; FLOPs become tokens when the sizes are known
ENDS: dict[str, str | None] = {
    "minutes": "training.minutes",
    "steps": "training.steps",
    "tokens": "training.tokens",
    "flops": None,
}
DEFAULT_MINUTES = 3.0
# fields that a comparison sets -> the option that says it
_OWN = {
    "training.minutes": "--minutes",
    "training.steps": "--steps",
    "training.tokens": "--tokens",
    "training.seed": "--seeds",
}
# nothing is written while the clock runs, unless it is asked for
_FIRST = ("training.num_samples=0",)
_PARAMETERS = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([KMB])", flags=re.IGNORECASE | re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,80}")

Fields = dict[str, Any]  # "section.key" -> value, of what a recipe says


@dataclass(frozen=True)
class Run:
    """One training of a candidate."""

    candidate: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.candidate}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A comparison before anything has run.

    `candidates` hold what each recipe says beside the defaults; `parameters` is a count such as "3M" that all
    come near to; each run ends after `amount` of what `until` names, a key of `ENDS`.
    """

    candidates: dict[str, Fields]
    until: str
    amount: float
    parameters: str | None = None
    seeds: int = 3
    one_tokenizer: bool = True

    @property
    def is_by_clock(self) -> bool:
        """True if the time ends each run."""
        return self.until == "minutes"

    @property
    def n_parameters(self) -> float | None:
        """`parameters` as a number."""
        return None if self.parameters is None else _count_of(self.parameters)

    def runs(self) -> list[Run]:
        """All runs in their order: one seed of every candidate after another, each round begun by another
        candidate, so that a slow hour of the machine falls on all of them."""
        names = list(self.candidates)
        rounds = [names[seed % len(names) :] + names[: seed % len(names)] for seed in range(self.seeds)]
        return [Run(name, seed) for seed, order in enumerate(rounds) for name in order]

    def recipe(self, candidate: str, settled: Fields | None = None, seed: int = 0) -> Recipe:
        """Of a run; `settled` is what the preparation has found for the candidate."""
        recipe = Recipe()
        for name, value in {**self.candidates[candidate], **(settled or {})}.items():
            set_field(recipe, name, value)
        recipe.training.seed = seed
        return recipe

    def to_yaml(self) -> str:
        """What `read` reads."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """
        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise UserError(f"{str(path)!r} is damaged: {' '.join(str(error).split())}") from error

    def check_same(self, begun: "Plan", folder: Path) -> None:
        """
        Raises:
            UserError: this plan differs from the one that the comparison in `folder` began with; in what.
        """
        remedy = f"give the options that {str(folder)!r} began with, or name another --out"
        was, says = _flat(begun), _flat(self)
        for name in [*was, *(name for name in says if name not in was)]:
            if was.get(name) != says.get(name):
                raise UserError(f"{name} = {says.get(name)!r} is not {was.get(name)!r}: {remedy}")


def _flat(plan: Plan) -> Fields:
    """Every choice of a plan by a name that a person knows."""
    fields = {
        f"{name}: {field}": value
        for name, said in plan.candidates.items()
        for field, value in said.items()
        if field not in _OWN
    }
    rest = {
        field.name: getattr(plan, field.name)
        for field in dataclasses.fields(plan)
        if field.name not in ("candidates", "amount", "until")
    }
    return {"candidates": ", ".join(plan.candidates), plan.until: plan.amount, **rest, **fields}


def make_plan(
    candidates: dict[str, Recipe],
    until: str,
    amount: str | float,
    *,
    parameters: str | None = None,
    seeds: int = 3,
    one_tokenizer: bool = True,
) -> Plan:
    """The plan of `candidates`, each of which is given `amount` of `until`.

    Raises:
        UserError: too few candidates, or some that cannot be compared; an amount that is no number above 0.
    """
    if len(candidates) < 2:
        raise UserError(
            f"a comparison needs two candidates, and there is {len(candidates)}: name more by --decoders, "
            "--sizes or --recipes"
        )
    for name, recipe in candidates.items():
        for field in _OWN:
            set_field(recipe, field, 0 if field == "training.seed" else None)
        end = ENDS[until]
        if end is not None:
            set_field(recipe, end, amount)
            amount = getattr(recipe.training, until)
        if parameters is not None and (recipe.model.size, recipe.model.hidden_size) != (None, None):
            raise UserError(f"{name}: --parameters chooses the width: leave --sizes, model.size and "
                            "model.hidden_size out")  # fmt: skip
    if parameters is not None:
        _count_of(parameters)
    stated = {name: stated_fields(recipe) for name, recipe in candidates.items()}
    _check_one(stated, "corpus", "a comparison is on one text: name it by SOURCE, --validation and --set")
    if any(recipe.privacy.epsilon is not None for recipe in candidates.values()):
        raise UserError(
            "--epsilon: a comparison learns tokenizers from its text and chooses by it, which no guarantee "
            "covers; train the candidates one by one"
        )
    if one_tokenizer:
        _check_one(stated, "tokenizer", "one tokenizer serves all, unless --own-tokenizers is given")
    return Plan(stated, until, _amount_of(until, amount), parameters, seeds, one_tokenizer)


def decoders_and_sizes(
    decoders: Sequence[str],
    sizes: Sequence[str],
    assignments: Sequence[str],
    sources: Sequence[str],
    validation: Sequence[str],
) -> dict[str, Recipe]:
    """The product of both axes, either of which may be empty, each with the `assignments` of --set."""
    axes = {"model.decoder": decoders, "model.size": sizes}
    axes = {field: words for field, words in axes.items() if words}
    _check_free(assignments, {**_OWN, **dict.fromkeys(axes, "the candidates")})
    found: dict[str, Recipe] = {}
    for words in itertools.product(*axes.values()):
        recipe = load_recipe(None, [*_FIRST, *assignments])
        _set_text(recipe, sources, validation)
        for field, word in zip(axes, words, strict=True):
            set_field(recipe, field, word)
        if decoders and recipe.model.mixers is not None:
            raise UserError("--set model.mixers overrules --decoders: compare mixers by --recipes")
        _add(found, "-".join(words), recipe)
    return found


def recipes_of(
    paths: Sequence[str], assignments: Sequence[str], sources: Sequence[str], validation: Sequence[str]
) -> dict[str, Recipe]:
    """A candidate for each recipe file, by the name of the file, overlaid with `assignments`."""
    _check_free(assignments, _OWN)
    found: dict[str, Recipe] = {}
    for path in paths:
        recipe = load_recipe(path, assignments)
        if recipe.training.num_samples == Recipe().training.num_samples:
            recipe.training.num_samples = 0
        _set_text(recipe, sources, validation)
        _add(found, Path(path).stem, recipe)
    return found


def _add(found: dict[str, Recipe], name: str, recipe: Recipe) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name a folder: use letters, digits and . _ + -")
    if name in found:
        raise UserError(f"{name!r} stands twice among the candidates: name each once")
    found[name] = recipe


def _set_text(recipe: Recipe, sources: Sequence[str], validation: Sequence[str]) -> None:
    if sources:
        set_field(recipe, "corpus.sources", list(sources))
    if validation:
        set_field(recipe, "corpus.validation", list(validation))


def _check_free(assignments: Sequence[str], own: dict[str, str]) -> None:
    for assignment in assignments:
        name = assignment.partition("=")[0].strip()
        if name in own:
            raise UserError(
                f"--set {assignment}: {name} is set by {own[name]} of the comparison: leave it out"
            )


def _check_one(stated: dict[str, Fields], section: str, rule: str) -> None:
    """All candidates must say the same of a section."""
    first, *others = stated
    for name in others:
        for field in {**stated[first], **stated[name]}:
            if field.startswith(section + ".") and stated[first].get(field) != stated[name].get(field):
                raise UserError(f"{first} and {name} differ in {field}: {rule}")


def _count_of(parameters: str) -> float:
    found = _PARAMETERS.fullmatch(parameters)
    if found is None:
        raise UserError(f"--parameters {parameters}: write a count such as 300K, 3M or 1B")
    return float(found[1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[found[2].upper()]


def _amount_of(until: str, amount: str | float) -> float:
    try:
        number = float(amount)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"--{until} {amount}: it must be a number above 0")
    return number
