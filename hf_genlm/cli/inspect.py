"""The verbs that show what there is: `hf-genlm runs`, `plot`, `card`, `settings` and `doctor`."""

from dataclasses import asdict
from typing import Literal

import typer

from hf_genlm.cli import options as o
from hf_genlm.cli.display import (
    LOADING,
    Display,
    print_installation,
    print_json,
    print_model_cost,
    print_rows,
    say,
)
from hf_genlm.errors import UserError, did_you_mean


@o.verb("runs", "Look", "hf-genlm runs runs/")
def runs(folder: str = o.argument("DIR", "The folder to search.", "."), as_json: bool = o.JSON) -> None:
    """List the runs, models and comparisons below a folder."""
    from hf_genlm.run import list_runs

    found = list_runs(folder)
    if as_json:
        content = [{**asdict(run), "bits_per_byte": run.bits and run.bits.to_json()} for run in found]
        for each in content:
            del each["bits"]
        print_json(content)
    elif not found:
        say(f"no run, model or comparison below {folder!r}")
    else:
        head = ("", "kind", "decoder", "parameters", "bits per byte", "state")
        rows = []
        for run in found:
            size = "" if run.parameters is None else f"{run.parameters:,}"
            error = "" if run.bits is None or run.bits.stderr is None else f" ± {run.bits.stderr:.3f}"
            bits = "" if run.bits is None else f"{run.bits.value:.3f}{error}"
            rows.append((run.path, run.kind, run.decoder, size, bits, run.state))
        print_rows(rows, head, right={3})


@o.verb("plot", "Look", "hf-genlm plot lstm-10 gru-10 --out both.png")
def plot(
    run_paths: list[str] = o.argument("RUN", "Run folders.", ...),
    output: str | None = o.option(
        "--out FILE", "The PNG to write.", shown="plots/curves.png of the run; of several runs, ./curves.png"
    ),
) -> None:
    """Draw the curves of a run, or of several in one picture."""
    from hf_genlm.report.curves import plot as plot_runs

    say(plot_runs(run_paths, output))


@o.verb("card", "Look", "hf-genlm card lstm-10 --set card.license=mit")
def card(
    run_path: str = o.RUN,
    assignments: list[str] | None = o.option(
        "--set card.KEY=VALUE", "license, authors, ..: written to the recipe of the run; may be repeated."
    ),
    force: bool = o.option("--force", "Replace a card that was changed by hand, too."),
) -> None:
    """Write the model card of a run again."""
    from hf_genlm.card import write_card

    assignments = assignments or []
    if_edited: Literal["overwrite", "refuse"] = "overwrite" if force else "refuse"
    say(write_card(run_path, assignments=assignments, if_edited=if_edited, redraw=True))


@o.verb("settings", "Look", "hf-genlm settings lr")
def settings(
    word: str | None = o.argument("WORD", "A part of a field's name, or another name of it, such as lr."),
    as_json: bool = o.JSON,
) -> None:
    """List the fields of a recipe, with type, default, range and meaning."""
    from hf_genlm.config.recipe import describe_fields

    found = describe_fields(word)
    if word is not None and not found:
        known = {
            name
            for row in describe_fields()
            for name in (row.name, row.name.partition(".")[2], *row.synonyms)
        }
        raise UserError(f"no field of a recipe is called {word!r}{did_you_mean(word, sorted(known))}")
    if as_json:
        print_json([asdict(row) for row in found])
        return
    rows = []
    for row in found:
        also = f" (also called: {', '.join(row.synonyms)})" if row.synonyms else ""
        rows.append((row.name, row.kind, row.default, row.allowed, row.help + also))
    print_rows(rows, ("field", "type", "default", "allowed", "meaning"), is_folded=True)
    say("", f"set one by --set {found[0].name}=VALUE, or in a recipe file (--recipe FILE)")


@o.verb("doctor", "Look", "hf-genlm doctor --decoder hybrid --size small")
def doctor(
    ctx: typer.Context,
    run_path: str | None = o.argument("RUN", "A run folder: describe its model."),
    cost: bool = o.option(
        "--cost", "Parameters, FLOPs and memory of a model; RUN and the options below describe it."
    ),
    as_json: bool = o.JSON,
    decoder: str | None = o.DECODER,
    mixers: str | None = o.MIXERS,
    size: str | None = o.SIZE,
    vectors: str | None = o.VECTORS,
    vocab_size: str | None = o.VOCAB_SIZE,
    recipe: str | None = o.RECIPE,
    assignments: list[str] | None = o.ASSIGNMENTS,
) -> None:
    """Tell what this machine can do, or what a model will cost."""
    names = ("decoder", "mixers", "size", "vectors", "vocab_size", "recipe")
    given = [name for name in names if ctx.params[name] is not None]
    if run_path is not None and given:
        raise UserError(
            f"--{given[0].replace('_', '-')}: the recipe of {run_path!r} states it already; change a field "
            "of it by --set"
        )
    examined = None
    if run_path is not None:
        from hf_genlm.run_folder import RunFolder

        ctx.params["recipe"] = str(RunFolder.open(run_path).recipe)
    if cost or run_path is not None or given or assignments:
        examined = o.stated_recipe(ctx.params)
    with Display(LOADING):
        from hf_genlm.doctor import describe_installation, describe_model

        installation = describe_installation()
        found = None if examined is None else describe_model(examined)
    if as_json:
        print_json((found or installation).to_json())
    elif found is None:
        print_installation(installation)
    else:
        print_model_cost(found)
