"""`hf-genlm audit`: what a model gives away of its training text, by attacks on it."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_genlm.cli.display import Display, table
from hf_genlm.cli.recipes import recipe_of
from hf_genlm.config.recipe import Recipe, load_recipe, set_field
from hf_genlm.errors import UserError
from hf_genlm.loading import load

if TYPE_CHECKING:
    from hf_genlm.privacy.subject import Audited, Evidence
    from hf_genlm.run_folder import RunFolder
    from hf_genlm.text.store import Documents

_MOST_CONTEXT = 1024  # of a model that is no run of ours


def run(options: argparse.Namespace) -> None:
    from hf_genlm.run_folder import RunFolder, read_json

    is_run = (Path(options.model) / "recipe.yaml").is_file()
    if bool(options.train) != bool(options.held_out):
        raise UserError("--train and --held-out belong together: text that the model saw, and the like of it")
    if not is_run and not options.train:
        raise UserError(
            f"{options.model!r} is not a run folder: name the text that it was trained on by --train, and "
            "text of the same kind that it has not seen by --held-out"
        )
    run = RunFolder.open(options.model) if is_run else None
    recipe = load_recipe(run.recipe, options.assignments) if run else recipe_of(options, {})
    with Display() as display:
        display.show("loading torch and transformers")
        from hf_genlm.card.privacy import LIMITS, sentences
        from hf_genlm.privacy.audit import attacks_of, audit, write_audit
        from hf_genlm.report.audit_plot import write_audit_picture

        texts = _read_texts(options, run, recipe, display)
        audited = _load(options.model, recipe, is_run)
        evidence = _evidence(options, run, texts, audited, display)
        attacks = attacks_of(options.attacks, evidence)

        def on_progress(attack: str, done: int, total: int) -> None:
            display.hear("progress", {"task": attack, "done": done, "total": total})

        findings = audit(audited, evidence, attacks, on_progress)
        folder = Path(options.out) if options.out else run.path if run else None
        if folder is not None:
            display.show("drawing")
            folder.mkdir(parents=True, exist_ok=True)
            write_audit(folder / "audit.json", findings, _facts(options, attacks, audited, evidence))
            of_model = run.model if run and not options.out else None
            picture = write_audit_picture(folder, findings.measurements, findings.curves, of_model)
            if of_model is not None and of_model.is_dir():
                from hf_genlm.card.card import write_card

                write_card(run)
    measured = findings.measurements
    if options.json:
        print(json.dumps({"measurements": [m.to_json() for m in measured]}, indent=2))
        return
    print(table(measured))
    guarantee = read_json(run.privacy) if run and run.privacy.is_file() else None
    print("\n" + "\n".join([*sentences(measured, guarantee), LIMITS]))
    if folder is not None:
        print(f"\naudit:    {folder / 'audit.json'}" + (f"\npicture:  {picture}" if picture else ""))


def _read_texts(
    options: argparse.Namespace, run: "RunFolder | None", recipe: Recipe, display: Display
) -> "tuple[Documents, Documents]":
    """(training text without canaries, held-out text): those named, or both splits of the run.

    Raises:
        UserError: the text of the run is not what it was, or was a stream.
    """
    from hf_genlm.text.corpus import notes_on, read_corpus, read_documents

    if options.train:
        sides = []
        for sources, split in ((options.train, "train"), (options.held_out, "validation")):
            set_field(recipe, "corpus.sources", list(sources))
            documents, report = read_documents(sources, recipe.corpus, split)
            display.note(notes_on(report))
            sides.append(documents)
        return sides[0], sides[1]
    if recipe.corpus.stream:
        raise UserError(
            f"{str(run.path)!r} read its text as a stream and kept none: name some of it by --train, and "
            "text that it has not seen by --held-out"
        )
    display.show("reading the text again")
    corpus = read_corpus(recipe.corpus)
    display.note(notes_on(corpus.report))
    members = corpus.train
    _check_same_text(run, recipe, corpus)
    return members, corpus.validation


def _check_same_text(run: "RunFolder", recipe: Recipe, corpus: Any) -> None:
    """By the hashes of corpus.json, which are of the text with its canaries."""
    from hf_genlm.run_folder import read_json
    from hf_genlm.text.canaries import plant

    plant(corpus, recipe.privacy)
    before = read_json(run.corpus)
    for split in ("train", "validation"):
        if before[split]["sha256"] != corpus.report[split]["sha256"]:
            raise UserError(
                f"the {split} text of {str(run.path)!r} has changed since it was trained: bring it back, or "
                "name what it was trained on by --train, and text that it has not seen by --held-out"
            )


def _load(name: str, recipe: Recipe, is_run: bool) -> "Audited":
    from hf_genlm.privacy.subject import Audited

    model, tokenizer = load(name)
    limit = getattr(model.config, "max_position_embeddings", None) or _MOST_CONTEXT
    trained = recipe.training.max_seq_length if is_run else None
    context = recipe.evaluation.context_length or trained or min(limit, _MOST_CONTEXT)
    return Audited(model, tokenizer, context, recipe.evaluation.batch_size)


def _evidence(
    options: argparse.Namespace,
    run: "RunFolder | None",
    texts: "tuple[Documents, Documents]",
    audited: "Audited",
    display: Display,
) -> "Evidence":
    from hf_genlm.privacy.subject import Evidence
    from hf_genlm.run_folder import read_json
    from hf_genlm.text.canaries import Canaries
    from hf_genlm.text.encoding import encode_documents

    def on_progress(done: int, total: int) -> None:
        display.hear("progress", {"task": "encoding", "done": done, "total": total})

    train, held_out = (encode_documents(audited.tokenizer, side, on_progress) for side in texts)
    canaries = None
    if run and run.canaries.is_file():
        canaries = Canaries.from_json(read_json(run.canaries))
    has_guarantee = run is not None and run.privacy.is_file()
    return Evidence(
        train=train,
        held_out=held_out,
        canaries=canaries,
        reference=_load(options.reference, Recipe(), is_run=False) if options.reference else None,
        delta=read_json(run.privacy)["delta"] if has_guarantee else Evidence.delta,
        limit=options.limit,
        seed=options.seed,
    )


def _facts(
    options: argparse.Namespace, attacks: list[str], audited: "Audited", evidence: "Evidence"
) -> dict[str, object]:
    return {
        "attacks": attacks,
        "limit": evidence.limit,
        "seed": evidence.seed,
        "context": audited.context,
        "delta": evidence.delta,
        "reference": Path(options.reference).name if options.reference else None,
        "text": "named" if options.train else "the run's own",
    }
