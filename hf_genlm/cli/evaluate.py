"""`hf-genlm evaluate`: any causal language model, on any text, on minimal pairs, on lm-eval's tasks."""

import argparse
import json

from hf_genlm.cli.display import Display, table


def run(options: argparse.Namespace) -> None:
    from hf_genlm.evaluation.evaluate import evaluate

    with Display() as display:
        measurements = evaluate(
            options.model,
            options.sources,
            suites=_words(options.suite),
            pairs=options.pairs,
            tasks=_words(options.tasks),
            include_path=options.include_path,
            recipe=options.recipe,
            assignments=options.assignments,
            listener=display.hear,
        )
    if options.json:
        print(json.dumps({"measurements": [m.to_json() for m in measurements]}, indent=2))
    else:
        print(table(measurements))


def _words(listed: str | None) -> list[str] | None:
    return None if listed is None else [word.strip() for word in listed.split(",")]
