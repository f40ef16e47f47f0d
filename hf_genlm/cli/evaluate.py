"""`hf-genlm evaluate`: any causal language model, on any text, on minimal pairs, on lm-eval's tasks."""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_genlm.cli.display import Display, table
from hf_genlm.cli.recipes import recipe_of
from hf_genlm.config.recipe import Recipe, load_recipe, set_field
from hf_genlm.errors import UserError
from hf_genlm.loading import load

if TYPE_CHECKING:
    from hf_genlm.evaluation.measurement import Measurement
    from hf_genlm.evaluation.suite import Material, Subject
    from hf_genlm.run_folder import RunFolder


def run(options: argparse.Namespace) -> None:
    from hf_genlm.evaluation.measurement import update_measurements
    from hf_genlm.run_folder import RunFolder

    is_run = (Path(options.model) / "recipe.yaml").is_file()
    suite, needs = _suite_of(options)
    if "documents" in needs and not is_run and not options.sources:
        raise UserError(f"{options.model!r} is not a run folder: name the SOURCE to measure it on")
    run = RunFolder.open(options.model) if is_run else None
    recipe = load_recipe(run.recipe, options.assignments) if run else recipe_of(options, {})
    with Display() as display:
        display.show("loading torch and transformers")
        material = _material(options, run, recipe, needs, display)
        subject = _subject(options.model, recipe)
        if "documents" in needs:
            _tokenize(material, subject, display)
        measurements = [found for name in suite for found in _measure(name, subject, material, display)]
        if "likelihood" in suite:
            measurements += _measure_languages(measurements, subject, material, recipe)
    if run and not options.sources and not options.assignments:
        update_measurements(run.evaluation, measurements)
    if options.json:
        print(json.dumps({"measurements": [m.to_json() for m in measurements]}, indent=2))
    else:
        print(table(measurements))


def _suite_of(options: argparse.Namespace) -> tuple[list[str], set[str]]:
    """The evaluations to run, and what they need. Without --suite: those that the options are for."""
    from hf_genlm.evaluation.suite import EVALUATIONS, suite_of

    given = {"pairs": options.pairs, "tasks": options.tasks}
    if options.suite is not None:
        suite = suite_of(options.suite)
    else:
        suite = [name for name, row in EVALUATIONS.items() if any(given.get(need) for need in row.needs)]
        if options.sources or not suite:
            suite.insert(0, "likelihood")
    needs = {need for name in suite for need in EVALUATIONS[name].needs}
    if options.sources and not needs & {"documents", "training"}:
        raise UserError(f"SOURCE is for text, which --suite {','.join(suite)} does not read: leave it out")
    for option, value in given.items():
        name = next(name for name, row in EVALUATIONS.items() if option in row.needs)
        if option in needs and value is None:
            raise UserError(f"--suite {name} needs --{option}")
        if option not in needs and value is not None:
            raise UserError(f"--{option} is for --suite {name}, which --suite {options.suite} leaves out")
    return suite, needs


def _material(
    options: argparse.Namespace, run: "RunFolder | None", recipe: Recipe, needs: set[str], display: Display
) -> "Material":
    from hf_genlm.evaluation.suite import Material

    material = Material(recipe.evaluation)
    if "pairs" in needs:
        from hf_genlm.evaluation.minimal_pairs import read_pairs

        material.pairs = read_pairs(options.pairs)
        material.pairs_split = Path(options.pairs).resolve().stem
    if "tasks" in needs:
        material.tasks = [task.strip() for task in options.tasks.split(",")]
        material.include_path = options.include_path
    if needs & {"documents", "training"}:
        _read_text(material, options, run, recipe, display)
    return material


def _read_text(
    material: "Material",
    options: argparse.Namespace,
    run: "RunFolder | None",
    recipe: Recipe,
    display: Display,
) -> None:
    """The SOURCEs, or both splits of a run."""
    from hf_genlm.text.corpus import Corpus, notes_on, read_corpus, read_documents
    from hf_genlm.text.held_out import read_stream

    if options.sources:
        set_field(recipe, "corpus.sources", list(options.sources))  # names what may not be in it
        material.texts, report = read_documents(options.sources, recipe.corpus)
    elif run:
        corpus = (read_stream if recipe.corpus.stream else read_corpus)(recipe.corpus)
        material.split, material.texts, report = "validation", corpus.validation, corpus.report
        material.training = corpus.train if isinstance(corpus, Corpus) else None
        material.languages = report.get("languages", {})
        _check_same_text(run, report)
    else:
        return
    display.note(notes_on(report))


def _subject(name: str, recipe: Recipe) -> "Subject":
    from hf_genlm.evaluation.suite import Subject

    model, tokenizer = load(name)
    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start_id is None:
        raise UserError("this tokenizer has neither a bos nor an eos token: a first token cannot be scored")
    limit = getattr(model.config, "max_position_embeddings", None) or 1024
    return Subject(model, tokenizer, start_id, recipe.evaluation.context_length or limit)


def _tokenize(material: "Material", subject: "Subject", display: Display) -> None:
    from hf_genlm.text.encoding import encode_documents

    def on_progress(done: int, total: int) -> None:
        display.hear("progress", {"task": "encoding", "done": done, "total": total})

    material.documents = encode_documents(subject.tokenizer, material.texts, on_progress)
    display.show("counting words")
    material.n_words = material.texts.count_words()


def _measure(name: str, subject: "Subject", material: "Material", display: Display) -> list["Measurement"]:
    from hf_genlm.evaluation.suite import EVALUATIONS

    def on_progress(done: int, total: int) -> None:
        display.hear("progress", {"task": name, "done": done, "total": total})

    display.show(name)
    row = EVALUATIONS[name]
    with display.set_aside() if row.brings_bars else nullcontext():
        return row.measure(subject, material, on_progress)


def _measure_languages(
    measured: "list[Measurement]", subject: "Subject", material: "Material", recipe: Recipe
) -> "list[Measurement]":
    from hf_genlm.training.languages import measure_languages

    return measure_languages(
        subject.model,
        subject.tokenizer,
        measured,
        material.languages,
        recipe,
        start_id=subject.start_id,
        context=subject.context,
    )


def _check_same_text(run: Any, report: dict[str, Any]) -> None:
    from hf_genlm.run_folder import read_json

    if read_json(run.corpus)["validation"]["sha256"] != report["validation"]["sha256"]:
        raise UserError(
            f"the sources of {str(run.path)!r} have changed since it was trained: name the text to measure on"
        )
