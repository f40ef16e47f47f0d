"""Compare decoders, sizes or recipes on one text at equal time or cost.

`compare` is the service behind `hf-genlm compare`. The process that calls it does not load torch: every run
is trained in a process of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_genlm.comparison.plan import make_plan
from hf_genlm.comparison.report import write_comparison
from hf_genlm.comparison.results import Results, read_results, verdict
from hf_genlm.comparison.runs import ComparisonFolder, run_all
from hf_genlm.run_folder import Listener


@dataclass(frozen=True)
class Comparison:
    """Results of a comparison and the files that report them."""

    results: Results
    folder: Path
    html: Path
    markdown: Path

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        return verdict(self.results)


def compare(
    sources: str | Sequence[str] = (),
    *,
    out: str | Path,
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
    listener: Listener | None = None,
) -> Comparison:
    """Train every candidate with several seeds, and report which is best and how sure that is.

    The same call continues an interrupted comparison in `out`; finished runs are kept.

    Args:
        sources: as in training. Default: the standard library's source text.
        out: folder for the runs and the report.
        decoders, sizes: the candidates are the product of both.
        recipes: YAML recipes as candidates, instead of `decoders` and `sizes`.
        minutes, steps, tokens, flops: budget of each run; at most one. Default: 3 minutes.
        parameters: target parameter count of all candidates, such as "3M".
        seeds: runs of each candidate.
        validation: files to hold out instead of a part of the sources.
        own_tokenizers: train a tokenizer for each recipe instead of one for all.
        assignments: `section.key=value` for all candidates.
        listener: receives the events of the preparation and of every run.

    Raises:
        UserError: candidates, budget or text that cannot be compared, or `out` began with other settings.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    plan = make_plan(
        [sources] if isinstance(sources, str) else sources, decoders=decoders, sizes=sizes, recipes=recipes,
        minutes=minutes, steps=steps, tokens=tokens, flops=flops, parameters=parameters, seeds=seeds,
        validation=validation, own_tokenizers=own_tokenizers, assignments=assignments,
    )  # fmt: skip
    folder = ComparisonFolder.open_or_create(out, plan, listener)
    folder.tell("progress", task="loading torch and transformers", done=0, total=None)
    failed = run_all(folder, plan)
    folder.tell("progress", task="writing the report", done=0, total=None)
    results = read_results(folder, plan, failed)
    html, markdown = write_comparison(folder, plan, results)
    return Comparison(results, folder.path, html, markdown)
