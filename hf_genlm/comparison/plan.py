"""Plan of a comparison: its candidates and what is equal for all of them, as stored in compare.yaml."""

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_genlm.config.fields import read_count
from hf_genlm.config.recipe import Recipe, load_recipe, set_field, stated_fields
from hf_genlm.errors import UserError
from hf_genlm.files import parse, read_text

# budget of a run -> its recipe field; FLOPs become tokens when the sizes are known
BUDGETS: dict[str, str | None] = {
    "minutes": "training.minutes",
    "steps": "training.steps",
    "tokens": "training.tokens",
    "flops": None,
}
DEFAULT_MINUTES = 3.0
_MAX_DEPTH = 20  # of a plan
_MAX_BYTES = 1 << 20  # of compare.yaml
# fields that a comparison sets -> the option for them
_OWN_FIELDS = {
    "training.minutes": "--minutes",
    "training.steps": "--steps",
    "training.tokens": "--tokens",
    "training.seed": "--seeds",
}
_DEFAULTS = ("training.num_samples=0",)  # no time is spent on samples unless a recipe asks for them
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,80}")

Fields = dict[str, Any]  # "section.key" -> value that differs from the default recipe


@dataclass(frozen=True)
class Run:
    """One training of a candidate."""

    candidate: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"{self.candidate}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """Everything that decides a comparison.

    Attributes:
        candidates: fields of each candidate's recipe that differ from the defaults.
        until: the budget that ends each run, a key of `BUDGETS`.
        amount: size of the budget, in minutes, steps, tokens or FLOPs.
        parameters: target parameter count of all candidates, such as "3M".
        seeds: runs of each candidate.
        one_tokenizer: one tokenizer for all candidates.
    """

    candidates: dict[str, Fields]
    until: str
    amount: float
    parameters: str | None = None
    seeds: int = 3
    one_tokenizer: bool = True

    @property
    def has_time_budget(self) -> bool:
        """True if each run has a time budget."""
        return self.until == "minutes"

    @property
    def n_parameters(self) -> float | None:
        """`parameters` as a number."""
        return None if self.parameters is None else _parse_count(self.parameters)

    def runs(self) -> list[Run]:
        """All runs in order: round-robin over the candidates, one seed per round.

        Each round begins with another candidate, so that a slow hour of the machine affects all of them.
        """
        names = list(self.candidates)
        rounds = [names[seed % len(names) :] + names[: seed % len(names)] for seed in range(self.seeds)]
        return [Run(name, seed) for seed, order in enumerate(rounds) for name in order]

    def recipe(self, candidate: str, settled: Fields | None = None, seed: int = 0) -> Recipe:
        """The recipe of a run; `settled` are the fields that the preparation chose for the candidate."""
        recipe = Recipe()
        for name, value in {**self.candidates[candidate], **(settled or {})}.items():
            set_field(recipe, name, value)
        recipe.training.seed = seed
        return recipe

    def to_yaml(self) -> str:
        """Serialize for `read`."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a file of `to_yaml`.

        Raises:
            UserError: the file is missing or damaged.
        """
        text = read_text(path, _MAX_BYTES)
        try:
            _check_events(text)
            content = json.dumps(yaml.safe_load(text), default=str)
        except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{str(path)!r} is damaged: {' '.join(str(error).split())}") from error
        return parse(content, cls, path)

    def check_same(self, begun: "Plan", folder: Path) -> None:
        """Check that this plan equals the one that the comparison in `folder` began with.

        Raises:
            UserError: they differ; the message names the first difference.
        """
        remedy = f"give the options that {str(folder)!r} began with, or name another --out"
        before, now = _flatten(begun), _flatten(self)
        for name in [*before, *(name for name in now if name not in before)]:
            if before.get(name) != now.get(name):
                raise UserError(f"{name} = {now.get(name)!r} is not {before.get(name)!r}: {remedy}")


def _flatten(plan: Plan) -> Fields:
    """All settings of a plan by names that users know."""
    fields = {
        f"{name}: {field}": value
        for name, stated in plan.candidates.items()
        for field, value in stated.items()
        if field not in _OWN_FIELDS
    }
    rest = {
        field.name: getattr(plan, field.name)
        for field in dataclasses.fields(plan)
        if field.name not in ("candidates", "amount", "until")
    }
    return {"candidates": ", ".join(plan.candidates), plan.until: plan.amount, **rest, **fields}


def make_plan(
    sources: Sequence[str] = (),
    *,
    decoders: Sequence[str] = (),
    sizes: Sequence[str] = (),
    recipes: Sequence[str | Path] = (),
    minutes: float | str | None = None,
    steps: int | str | None = None,
    tokens: float | str | None = None,
    flops: float | str | None = None,
    parameters: str | None = None,
    seeds: int = 3,
    validation: Sequence[str] = (),
    own_tokenizers: bool = False,
    assignments: Sequence[str] = (),
) -> Plan:
    """Make the plan of a comparison; the arguments are those of `compare`.

    Raises:
        UserError: too few candidates, candidates that cannot be compared, or an unusable budget.
    """
    budgets = {"minutes": minutes, "steps": steps, "tokens": tokens, "flops": flops}
    stated_budgets = {name: amount for name, amount in budgets.items() if amount is not None}
    if len(stated_budgets) > 1:
        options = " and ".join(f"--{name}" for name in stated_budgets)
        raise UserError(f"{options} are budgets of a run: give one of them")
    ((until, amount),) = (stated_budgets or {"minutes": DEFAULT_MINUTES}).items()
    candidates = _make_candidates(decoders, sizes, recipes, assignments)
    for name, recipe in candidates.items():
        if sources:
            set_field(recipe, "corpus.sources", list(sources))
        if validation:
            set_field(recipe, "corpus.validation", list(validation))
        for field in _OWN_FIELDS:
            set_field(recipe, field, 0 if field == "training.seed" else None)
        budget_field = BUDGETS[until]
        if budget_field is not None:
            set_field(recipe, budget_field, amount)
            amount = getattr(recipe.training, until)
        if parameters is not None and (recipe.model.size, recipe.model.hidden_size) != (None, None):
            raise UserError(
                f"{name}: --parameters chooses the width: leave --sizes, model.size and model.hidden_size out"
            )
        if recipe.privacy.epsilon is not None:
            raise UserError(
                "--epsilon: a comparison trains tokenizers on its text and is chosen by it, which no "
                "guarantee covers; train the candidates one by one"
            )
    if parameters is not None:
        _parse_count(parameters)
    try:
        number = float(amount)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"--{until} {amount}: must be a number above 0")
    stated = {name: stated_fields(recipe) for name, recipe in candidates.items()}
    _check_equal(stated, "corpus", "a comparison is on one text: name it by SOURCE, --validation and --set")
    if not own_tokenizers:
        _check_equal(stated, "tokenizer", "one tokenizer is for all, unless --own-tokenizers is given")
    return Plan(stated, until, number, parameters, seeds, not own_tokenizers)


def _make_candidates(
    decoders: Sequence[str],
    sizes: Sequence[str],
    paths: Sequence[str | Path],
    assignments: Sequence[str],
) -> dict[str, Recipe]:
    """Candidates by name: recipe files by their stem, or the product of decoders and sizes."""
    if paths and (decoders or sizes):
        raise UserError("--recipes are complete candidates: leave --decoders and --sizes out")
    if not (paths or decoders or sizes):
        raise UserError("nothing to compare: name the candidates by --decoders, --sizes or --recipes")
    axes = {"model.decoder": decoders, "model.size": sizes}
    axes = {field: words for field, words in axes.items() if words}
    own = {**_OWN_FIELDS, **dict.fromkeys(axes, "the candidates")}
    for assignment in assignments:
        field = assignment.partition("=")[0].strip()
        if field in own:
            raise UserError(
                f"--set {assignment}: {field} is set by {own[field]} of the comparison: leave it out"
            )
    found: list[tuple[str, Recipe]] = []
    for path in paths:
        recipe = load_recipe(path, assignments)
        if recipe.training.num_samples == Recipe().training.num_samples:
            recipe.training.num_samples = 0
        found.append((Path(path).stem, recipe))
    for words in itertools.product(*axes.values()) if axes else []:
        recipe = load_recipe(None, [*_DEFAULTS, *assignments])
        for field, word in zip(axes, words, strict=True):
            set_field(recipe, field, word)
        if decoders and recipe.model.mixers is not None:
            raise UserError("--set model.mixers overrides --decoders: compare mixers by --recipes")
        found.append(("-".join(words), recipe))
    candidates: dict[str, Recipe] = {}
    for name, recipe in found:
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} cannot name a folder: use letters, digits and . _ + -")
        if name in candidates:
            raise UserError(f"{name!r} is named twice among the candidates: name each once")
        candidates[name] = recipe
    if len(candidates) < 2:
        raise UserError(
            f"a comparison needs two candidates, and there is {len(candidates)}: name more by --decoders, "
            "--sizes or --recipes"
        )
    return candidates


def _check_equal(stated: dict[str, Fields], section: str, rule: str) -> None:
    """Check that all candidates have the same fields in a section.

    Raises:
        UserError: two candidates differ.
    """
    first, *others = stated
    for name in others:
        for field in {**stated[first], **stated[name]}:
            if field.startswith(section + ".") and stated[first].get(field) != stated[name].get(field):
                raise UserError(f"{first} and {name} differ in {field}: {rule}")


def _check_events(text: str) -> None:
    """Raise ValueError for YAML with aliases, which may stand for any amount of text, or nested too deep for
    PyYAML, which takes time with the square of the depth."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _MAX_DEPTH:
            raise ValueError(f"it holds an alias, or is nested more than {_MAX_DEPTH} deep")


def _parse_count(parameters: str) -> float:
    count = read_count(parameters)
    if count is None:
        raise UserError(f"--parameters {parameters}: write a count such as 300K, 3M or 1B")
    return count
