"""The verbs that measure: `hf-genlm evaluate`, `audit`, `compare` and `range`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_genlm.cli import options as o
from hf_genlm.cli.display import LOADING, Display, print_json, print_measurements, say

if TYPE_CHECKING:
    from hf_genlm.evaluation.measurement import Measurement

# events of a run that `compare` shows; the run's log holds the rest
_SHOWN = {"progress", "note", "corpus", "tokenized", "step", "threads", "diverged"}
_SHOWN |= {"run", "kept", "finished", "failed"}
_OF_FIRST_RUN = {"note", "corpus", "tokenized"}  # each run reads the same text again


@o.verb("evaluate", "Measure", "hf-genlm evaluate lstm-10 other-text.txt")
def evaluate(
    model: str = o.MODEL,
    sources: list[str] | None = o.argument("SOURCE", "Default: the run's own validation split."),
    suite: str | None = o.option(
        "--suite A,B,..",
        "likelihood, range, extrapolation, samples, minimal_pairs, lm_eval.",
        shown="what SOURCE, --pairs and --tasks ask for",
    ),
    pairs: str | None = o.option(
        "--pairs PATH", "Minimal pairs: a .jsonl file of BLiMP's format, or a folder."
    ),
    tasks: str | None = o.option("--tasks A,B,..", "Tasks of lm-eval; `hf-genlm doctor` says what it needs."),
    include_path: str | None = o.option(
        "--include-path DIR", "A folder of task files beside lm-eval's own; their functions are executed."
    ),
    milestones: bool = o.option(
        "--milestones", "The milestones of the run too, one row each; with --json also by part of a suite."
    ),
    seed: int = o.option("--seed N", "Of the texts that --suite samples generates.", 0),
    as_json: bool = o.JSON,
    recipe: str | None = o.RECIPE,
    assignments: list[str] | None = o.ASSIGNMENTS,
) -> None:
    """Measure any causal language model, exactly."""
    from hf_genlm.evaluation.evaluate import evaluate as evaluate_model

    with Display(LOADING) as display:
        measured = evaluate_model(
            model, sources, suites=None if suite is None else o.parse_words(suite) or [""], pairs=pairs,
            tasks=None if tasks is None else o.parse_words(tasks), include_path=include_path,
            milestones=milestones, seed=seed, recipe=recipe, assignments=assignments or (),
            listener=display.hear,
        )  # fmt: skip
    _print_measured(measured, as_json)


@o.verb("audit", "Measure", "hf-genlm audit lstm-10")
def audit(
    model: str = o.MODEL,
    trained_on: list[str] | None = o.option(
        "--trained-on SOURCE", "Text that the model saw.", shown="that of the run, read again"
    ),
    held_out: list[str] | None = o.option(
        "--held-out SOURCE", "Text of the same kind that the model has not seen."
    ),
    reference: str | None = o.option(
        "--reference MODEL", "A causal language model that has not seen the text."
    ),
    attacks: str | None = o.option(
        "--attacks A,B,..", "exposure (of canaries), extraction, membership.", shown="all that are possible"
    ),
    limit: int = o.option("--limit N", "Passages of each of the two texts.", 1000, parse=o.parse_count),
    seed: int = o.option("--seed N", "Of the passages.", 0),
    output_dir: str | None = o.option("--out DIR", "The folder of audit.json.", shown="the run folder"),
    as_json: bool = o.JSON,
    recipe: str | None = o.RECIPE,
    assignments: list[str] | None = o.ASSIGNMENTS,
) -> None:
    """Attack a model: what does it reveal of its training text?"""
    with Display(LOADING) as display:
        from hf_genlm.api import audit_and_draw
        from hf_genlm.card.privacy import LIMITS, describe_audit

        found = audit_and_draw(
            model, trained_on=trained_on or (), held_out=held_out or (), attacks=attacks, reference=reference,
            limit=limit, seed=seed, output_dir=output_dir, recipe=recipe, assignments=assignments or (),
            listener=display.hear,
        )  # fmt: skip
    _print_measured(found.measurements, as_json)
    if as_json:
        return
    say("", *describe_audit(found.measurements, found.guarantee), LIMITS)
    if found.path is not None:
        picture = found.path.with_name("plots") / "audit.png"
        say("", f"audit:    {found.path}", *([f"picture:  {picture}"] if picture.is_file() else []))


@o.verb(
    "compare", "Measure", "hf-genlm compare my-texts/ --decoders lstm,transformer --minutes 10 --out which"
)
def compare(
    output_dir: str = o.option("--out DIR", "The folder to make, or to continue by the same command.", ...),
    sources: list[str] | None = o.SOURCES,
    decoders: str | None = o.candidates_option("--decoders A,B,..", "Decoders."),
    sizes: str | None = o.candidates_option("--sizes A,B,..", "Sizes, of each decoder."),
    recipes: str | None = o.candidates_option("--recipes FILE,..", "YAML recipes, instead."),
    parameters: str | None = o.candidates_option(
        "--parameters N", "Parameters of every candidate, such as 3M."
    ),
    own_tokenizers: bool = o.candidates_option(
        "--own-tokenizers", "A tokenizer for each recipe, instead of one for all."
    ),
    minutes: str | None = o.training_option("--minutes F", "Time of each training.", shown="3"),
    steps: str | None = o.training_option("--steps N", "Optimizer steps, instead of a time."),
    tokens: str | None = o.training_option("--tokens N", "Training tokens, instead of a time."),
    flops: str | None = o.training_option("--flops F", "FLOPs, such as 1e15, instead of a time."),
    seeds: int = o.training_option("--seeds N", "Runs of each candidate.", 3, parse=o.parse_count),
    validation: list[str] | None = o.text_option(
        "--validation FILE", "Hold out this text, instead of a part."
    ),
    as_json: bool = o.JSON,
    assignments: list[str] | None = o.ASSIGNMENTS,
) -> int:
    """Train several decoders, sizes or recipes on one text: which is best, and how sure is that?"""
    from hf_genlm.comparison import compare as compare_candidates

    with Display() as display:
        has_begun = False

        def hear(event: str, fields: dict[str, Any]) -> None:
            nonlocal has_begun
            has_begun |= event in ("run", "kept")
            if event in _SHOWN and not (has_begun and event in _OF_FIRST_RUN):
                display.hear(event, fields)

        try:
            found = compare_candidates(
                sources or (), out=output_dir, decoders=o.parse_words(decoders or ""),
                sizes=o.parse_words(sizes or ""), recipes=o.parse_words(recipes or ""), minutes=minutes,
                steps=steps, tokens=tokens, flops=flops, parameters=parameters, seeds=seeds,
                validation=validation or (), own_tokenizers=own_tokenizers, assignments=assignments or (),
                listener=hear,
            )  # fmt: skip
        except KeyboardInterrupt:
            say(f"stopped; the same command continues in {output_dir}", is_error=True)
            return 0
    if as_json:
        print_json({**found.results.to_json(), "report": str(found.html)})
    else:
        say(found.verdict, "", f"report: {found.html}", f"        {found.markdown}")
    return 0


@o.verb("range", "Measure", "hf-genlm range --decoders lstm,transformer --tasks recall --out range")
def measure_range(
    decoders: str = o.option(
        "--decoders A,B,..", "Decoders to train.", "elman,gru,lstm,gated_linear,transformer,sliding,hybrid"
    ),
    tasks: str = o.option("--tasks A,B,..", "Tasks to train on.", "recall,copy,passkey"),
    recall_pairs: str | None = o.option(
        "--recall-pairs N,N,..", "Sizes of recall, in pairs.", shown="4,8,16,32,64"
    ),
    lengths: str | None = o.option(
        "--lengths N,N,..", "Sizes of copy and passkey, in tokens.", shown="64,128,256"
    ),
    steps: int = o.option("--steps N", "Optimizer steps of each model.", 400, parse=o.parse_count),
    minutes: float | None = o.option(
        "--minutes F", "Time of each training, instead of steps.", parse=o.parse_amount
    ),
    seeds: int = o.option("--seeds N", "Models of each decoder.", 3, parse=o.parse_count),
    rates: str = o.option(
        "--rates F,F,..", "Learning rates; the next is tried where one does not suffice.", "0.003,0.001"
    ),
    width: int = o.option("--width N", "Width of the models.", 64, parse=o.parse_count),
    layers: int = o.option("--layers N", "Layers of each model.", 2, parse=o.parse_count),
    output_dir: str = o.option(
        "--out DIR", "The folder to make, or to continue by the same command.", "range"
    ),
    as_json: bool = o.JSON,
) -> None:
    """Train small decoders on tasks that show how far they remember."""
    from hf_genlm.long_range import measure_range as measure

    with Display(LOADING) as display:
        found = measure(
            output_dir, decoders=o.parse_words(decoders), tasks=o.parse_words(tasks),
            recall_pairs=o.parse_each(recall_pairs, o.parse_count) if recall_pairs else None,
            lengths=o.parse_each(lengths, o.parse_count) if lengths else None, steps=steps, minutes=minutes,
            seeds=seeds, learning_rates=o.parse_each(rates, o.parse_amount), hidden_size=width,
            num_hidden_layers=layers, listener=display.hear,
        )  # fmt: skip
    if as_json:
        print_json({"outcomes": [outcome.to_json() for outcome in found.outcomes], "report": str(found.html)})
    else:
        say(*found.sentences, "", f"report:  {found.html}", f"         {found.markdown}")


def _print_measured(measured: "Sequence[Measurement]", as_json: bool) -> None:
    if as_json:
        print_json({"measurements": [m.to_json() for m in measured]})
    else:
        print_measurements(measured)
