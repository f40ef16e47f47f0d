"""The command-line application, and the options that several verbs share.

A verb is a function in a module beside this one. Its parameters are the options; `@verb` states its place in
the help and its example. A verb parses and prints, and leaves the work to a service of another room.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from typer.core import TyperCommand

from hf_genlm.errors import UserError

if TYPE_CHECKING:
    from hf_genlm.config.recipe import Recipe

_Function = TypeVar("_Function", bound=Callable[..., Any])
WORDS = "hf_genlm.words"  # key of a context's meta: the words of the command line

app = typer.Typer(
    help="From a folder of text to your own small generative language model.",
    epilog="Example: hf-genlm train my-texts/ --decoder lstm --minutes 10 --out lstm-10",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


class Verb(TyperCommand):
    """A verb that runs, or is only recorded where the root context has a dict to record it in."""

    def invoke(self, ctx: Any) -> Any:
        record = ctx.find_root().obj
        if isinstance(record, dict):
            record.update(ctx.params, verb=self.name)
            return 0
        return super().invoke(ctx)


def verb(name: str, panel: str, example: str, takes_rest: bool = False) -> Callable[[_Function], _Function]:
    """Register a function as the verb `name`, in a panel of the help; its docstring is the verb's help.

    With `takes_rest`, options that the verb does not know stay in the context's `args`.
    """
    rest = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
    return app.command(
        name, cls=Verb, rich_help_panel=panel, epilog=f"Example: {example}",
        context_settings=rest if takes_rest else None,
    )  # fmt: skip


def parse_words(text: str) -> list[str]:
    """Split `A,B,..` at the commas; an empty text holds no word."""
    return [word.strip() for word in text.split(",")] if text else []


def parse_count(text: str | int) -> int:
    """Parse a whole number above 0; a default is passed as a number."""
    if not str(text).isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_amount(text: str | float) -> float:
    """Parse a number of 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise typer.BadParameter(f"{text!r} is not a number from 0 to 100")
    return value


def parse_each(text: str, parse: Callable[[str], Any]) -> list[Any]:
    """Parse `N,N,..` word by word."""
    return [parse(word) for word in parse_words(text)]


def option(
    declaration: str,
    help: str,
    default: Any = None,
    *,
    panel: str | None = None,
    shown: str | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """Declare an option such as "--steps N", or a flag such as "--resume".

    Args:
        default: the value without the option; `...`: the option is required.
        panel: the group of the help in which the option stands.
        shown: the default in words, where None stands for a choice that is made later.
        parse: turns the word into the value; a number needs none.
    """
    name, _, metavar = declaration.partition(" ")
    if not metavar:
        return typer.Option(False, name, metavar=" ", help=help, rich_help_panel=panel, show_default=False)
    show_default = shown or default not in (None, ...)
    return typer.Option(
        default, name, metavar=metavar, help=help, rich_help_panel=panel, show_default=show_default,
        parser=parse,
    )  # fmt: skip


def argument(metavar: str, help: str, default: Any = None) -> Any:
    """Declare a positional argument; one in brackets may be left out."""
    return typer.Argument(default, metavar=metavar, help=help, show_default=False)


text_option = functools.partial(option, panel="Text")
model_option = functools.partial(option, panel="Model")
training_option = functools.partial(option, panel="Training")
candidates_option = functools.partial(option, panel="Candidates")
privacy_option = functools.partial(option, panel="Privacy")
run_option = functools.partial(option, panel="Run")

JSON = option("--json", "Print the result as JSON.")
MODEL = argument("MODEL", "A run folder, a model folder or a Hub id.", ...)
RUN = argument("RUN", "A run folder.", ...)
SOURCES = argument("SOURCE", "Files, folders, globs or a Hub dataset id.")
RECIPE = option("--recipe FILE", "A YAML recipe.", panel="Recipe")
ASSIGNMENTS = option(
    "--set SECTION.KEY=VALUE",
    "Set a field of the recipe; may be repeated. `hf-genlm settings` lists the fields.",
    panel="Recipe",
)
LANGUAGES = option(
    "--source CODE=SOURCE",
    "A source in a language, such as fra=texts/; corpus.temperature balances the languages.",
    panel="Text",
)
PARALLEL = option(
    "--parallel CODE=FILE",
    "A file of sentences, one a line, that translate those of the other languages' files.",
    panel="Text",
)
DECODER = option(
    "--decoder NAME", "gated_linear, gru, lstm, elman, transformer, sliding or hybrid.", panel="Model",
    shown="gated_linear",
)  # fmt: skip
MIXERS = option("--mixers A,B,..", "One mixer per layer, instead of --decoder.", panel="Model")
SIZE = option(
    "--size SIZE", "tiny, small, base, or a number of parameters such as 30M.", panel="Model",
    shown="by the time",
)  # fmt: skip
VECTORS = option("--vectors FILE", "Start the embedding from word vectors.", panel="Model")
VOCAB_SIZE = option(
    "--vocab-size N", "Number of tokens in the vocabulary.", panel="Model", shown="by the size of the text"
)


def stated_recipe(parameters: Mapping[str, Any]) -> "Recipe":
    """Combine the defaults, --recipe, --set and the other `parameters` of a verb that name a recipe field.

    Raises:
        UserError: an unknown field, or a value that does not fit its field.
    """
    from hf_genlm.api import SHORTCUTS, recipe_of

    given = {name: value for name, value in parameters.items() if value not in (None, False, [], ())}
    fields = {**SHORTCUTS, "sources": "corpus.sources", "validation": "corpus.validation"}
    stated = {fields[name]: value for name, value in given.items() if name in fields}
    if "scrub" in given:
        stated["corpus.scrub"] = "all"
    return recipe_of(given.get("recipe"), given.get("assignments", ()), stated)


def explain_usage_error(error: typer.TyperException) -> UserError:
    """Turn an error of the parser into one line that names what is wrong and the nearest correct word."""
    context = getattr(error, "ctx", None)
    command = "hf-genlm" if context is None or context.parent is None else f"hf-genlm {context.command.name}"
    unknown = getattr(error, "option_name", None)
    if unknown is None or context is None:
        return UserError(f"{error.format_message().rstrip('.')} ({command} --help shows the usage)")
    known = [name for parameter in context.command.params for name in parameter.opts if name.startswith("-")]
    return UserError(f"no option {unknown} of {command}{_nearest_option(unknown, known)}")


# options of other programs, by what they are called here
_SYNONYMS = {
    **dict.fromkeys(("output", "output-dir", "out-dir", "output-path", "save-dir", "model-dir"), "--out"),
    **dict.fromkeys(("max-steps", "iterations", "iters", "max-iters"), "--steps"),
    **dict.fromkeys(("model", "model-name-or-path", "init", "checkpoint"), "--from"),
    **dict.fromkeys(("num-processes", "gpus", "nproc-per-node"), "--processes"),
    **dict.fromkeys(("length", "max-tokens", "max-length"), "--max-new-tokens"),
    **dict.fromkeys(("config", "config-file"), "--recipe"),
    "parameters": "--cost",
}


def _nearest_option(unknown: str, known: list[str]) -> str:
    """Suggest an option for `unknown`: a synonym, a field of the recipe, or the nearest spelling."""
    import difflib

    word = unknown.lstrip("-").replace("_", "-").lower()
    if f"--{word}" in known:
        return f"; did you mean --{word}?"
    if _SYNONYMS.get(word) in known:
        return f"; did you mean {_SYNONYMS[word]}?"
    if "--set" in known:
        from hf_genlm.api import find_field

        field = find_field(word)
        if field is not None:
            return f"; it is a field of the recipe: --set {field}=VALUE"
    near = difflib.get_close_matches(f"--{word}", known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
