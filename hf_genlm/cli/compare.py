"""`hf-genlm compare`: which decoder, size or recipe is best for a text, in equal time or at equal cost."""

import argparse
import sys
from typing import Any

from hf_genlm.cli.display import Display
from hf_genlm.comparison import compare

# events of a run that are shown here; its log holds the rest
_SHOWN = {"progress", "note", "corpus", "tokenized", "step", "threads", "diverged"}
_SHOWN |= {"run", "kept", "finished", "failed"}
_OF_A_RUN = {"note", "corpus", "tokenized"}  # each run reads the same text again


def run(options: argparse.Namespace) -> int:
    with Display() as display:
        try:
            found = compare(
                options.sources,
                out=options.out,
                decoders=options.decoders,
                sizes=options.sizes,
                recipes=options.recipes,
                minutes=options.minutes,
                steps=options.steps,
                tokens=options.tokens,
                flops=options.flops,
                parameters=options.parameters,
                seeds=options.seeds,
                validation=options.validation,
                own_tokenizers=options.own_tokenizers,
                assignments=options.assignments,
                listener=_listener(display),
            )
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on in {options.out}", file=sys.stderr)
            return 0
    print(found.verdict)
    print(f"\nreport: {found.html}\n        {found.markdown}")
    return 0


def _listener(display: Display) -> Any:
    has_begun = False

    def hear(event: str, fields: dict[str, Any]) -> None:
        nonlocal has_begun
        has_begun |= event in ("run", "kept")
        if event in _SHOWN and not (has_begun and event in _OF_A_RUN):
            display.hear(event, fields)

    return hear
