"""`hf-genlm compare`: which decoder, size or recipe is best for a text, in equal time or at equal cost."""

import argparse
import sys
from typing import Any

from hf_genlm.cli.display import Display
from hf_genlm.cli.launch import use_one_gpu
from hf_genlm.comparison.plan import (
    DEFAULT_MINUTES,
    ENDS,
    Plan,
    decoders_and_sizes,
    make_plan,
    recipes_of,
)
from hf_genlm.comparison.running import ComparisonFolder, run_all
from hf_genlm.errors import UserError

# of what a run tells, what is shown here; its log holds the rest
_SHOWN = {"progress", "note", "corpus", "tokenized", "step", "threads", "diverged"}
_SHOWN |= {"run", "kept", "finished", "failed"}
_OF_A_RUN = {"note", "corpus", "tokenized"}  # each run reads the same text again


def run(options: argparse.Namespace) -> int:
    plan = _plan_of(options)
    use_one_gpu()
    with Display() as display:
        folder = ComparisonFolder.of(options.out, plan, _listener(display))
        display.show("loading torch and transformers")
        try:
            failed = run_all(folder, plan)
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on in {folder.path}", file=sys.stderr)
            return 0
        display.show("writing the report")
        from hf_genlm.comparison.report import write_comparison
        from hf_genlm.comparison.results import read_results, verdict

        results = read_results(folder, plan, failed)
        html, markdown = write_comparison(folder, plan, results)
    print(verdict(results))
    print(f"\nreport: {html}\n        {markdown}")
    return 0


def _plan_of(options: argparse.Namespace) -> Plan:
    stated = {name: getattr(options, name) for name in ENDS if getattr(options, name) is not None}
    if len(stated) > 1:
        raise UserError(f"{' and '.join('--' + name for name in stated)} all end a run: give one of them")
    text = (options.assignments, options.sources, options.validation)
    if options.recipes and (options.decoders or options.sizes):
        raise UserError("--recipes are candidates by themselves: leave --decoders and --sizes out")
    if not (options.recipes or options.decoders or options.sizes):
        raise UserError("nothing to compare: name the candidates by --decoders, --sizes or --recipes")
    if options.recipes:
        candidates = recipes_of(options.recipes, *text)
    else:
        candidates = decoders_and_sizes(options.decoders, options.sizes, *text)
    ((until, amount),) = (stated or {"minutes": DEFAULT_MINUTES}).items()
    return make_plan(
        candidates,
        until,
        amount,
        parameters=options.parameters,
        seeds=options.seeds,
        one_tokenizer=not options.own_tokenizers,
    )


def _listener(display: Display) -> Any:
    has_begun = False

    def hear(event: str, fields: dict[str, Any]) -> None:
        nonlocal has_begun
        has_begun |= event in ("run", "kept")
        if event in _SHOWN and not (has_begun and event in _OF_A_RUN):
            display.hear(event, fields)

    return hear
