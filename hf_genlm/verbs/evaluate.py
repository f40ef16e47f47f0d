"""`hf-genlm evaluate`: any causal language model, on any text."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_genlm.display import Display, table
from hf_genlm.errors import UserError
from hf_genlm.loading import load
from hf_genlm.recipe import Recipe, load_recipe, set_field
from hf_genlm.verbs.recipes import recipe_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_genlm.evaluation.measurement import Measurement
    from hf_genlm.text.corpus import Document


def run(options: argparse.Namespace) -> None:
    from hf_genlm.evaluation.measurement import write_measurements
    from hf_genlm.run_folder import RunFolder

    is_run = (Path(options.model) / "recipe.yaml").is_file()
    if not is_run and not options.sources:
        raise UserError(f"{options.model!r} is not a run folder: name the SOURCE to measure it on")
    run = RunFolder.open(options.model) if is_run else None
    recipe = load_recipe(run.recipe, options.assignments) if run else recipe_of(options, {})
    with Display() as display:
        display.show("loading torch and transformers")
        from hf_genlm.text.corpus import notes_on, read_corpus, read_documents
        from hf_genlm.text.held_out import read_stream

        if options.sources:
            split = "given"
            set_field(recipe, "corpus.sources", list(options.sources))  # names what may not be in it
            documents, report = read_documents(options.sources, recipe.corpus)
        else:
            split = "validation"
            corpus = (read_stream if recipe.corpus.stream else read_corpus)(recipe.corpus)
            documents, report = corpus.validation, corpus.report
            _check_same_text(run, report)
        display.note(notes_on(report))
        model, tokenizer = load(options.model)
        languages = report.get("languages", {})
        measurements = _measure(model, tokenizer, documents, languages, recipe, split, display)
    if run and not options.sources and not options.assignments:
        write_measurements(run.evaluation, measurements)
    if options.json:
        print(json.dumps({"measurements": [m.to_json() for m in measurements]}, indent=2))
    else:
        print(table(measurements))


def _measure(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: "Sequence[Document]",
    languages: dict[str, Any],
    recipe: Recipe,
    split: str,
    display: Display,
) -> list["Measurement"]:
    from hf_genlm.evaluation.by_language import documents_of
    from hf_genlm.evaluation.likelihood import measure_likelihood
    from hf_genlm.text.encoding import encode_documents
    from hf_genlm.training.languages import measure_languages

    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start_id is None:
        raise UserError("this tokenizer has neither a bos nor an eos token: a first token cannot be scored")
    context = recipe.evaluation.context or getattr(model.config, "max_position_embeddings", None) or 1024
    found = measure_likelihood(
        model,
        encode_documents(tokenizer, documents),
        start_id=start_id,
        context=context,
        stride=recipe.evaluation.stride,
        batch_size=recipe.evaluation.batch_size,
        carry_state=bool(recipe.evaluation.carry_state),
        split=split,
        parts=documents_of(languages),
        on_progress=lambda done, total: display.hear(
            "progress", {"task": "evaluation", "done": done, "total": total}
        ),
    )
    return found + measure_languages(
        model, tokenizer, found, languages, recipe, start_id=start_id, context=context
    )


def _check_same_text(run: Any, report: dict[str, Any]) -> None:
    from hf_genlm.run_folder import read_json

    if read_json(run.corpus)["validation"]["sha256"] != report["validation"]["sha256"]:
        raise UserError(
            f"the sources of {str(run.path)!r} have changed since it was trained: name the text to measure on"
        )
