"""Privacy audit: attack a model and measure what it reveals of its training text.

    result = audit("my-run")                                    # a run folder: its own text, read again
    result = audit("gpt2", trained_on=["seen/"], held_out=["new/"])  # any causal language model

`ATTACKS` has one row per attack; a new attack is a new row.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hf_genlm.config.recipe import Recipe, load_recipe, pointing_to_places, set_field
from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.evaluation.measurement import STORED, Measurement
from hf_genlm.files import WriteError, read, refuse_links_out, write_json
from hf_genlm.loading import load
from hf_genlm.privacy.exposure import measure_canaries
from hf_genlm.privacy.extraction import measure_extraction
from hf_genlm.privacy.membership import measure_membership
from hf_genlm.privacy.target import Evidence, Findings, Progress, TargetModel
from hf_genlm.run_folder import Listener, RunFolder
from hf_genlm.run_schemas import CorpusFile, GuaranteeFile
from hf_genlm.text.canaries import Canaries, plant
from hf_genlm.text.corpus import Corpus, notes_on, read_corpus, read_documents
from hf_genlm.text.encoding import encode_documents
from hf_genlm.text.store import Documents

_MAX_CONTEXT = 1024  # tokens, of a model that is not one of our runs


class Attack(NamedTuple):
    """A row of `ATTACKS`.

    `needs` names evidence of which any one is enough: "canaries", or "texts" (training and held-out text).
    """

    needs: tuple[str, ...]
    measure: Callable[[TargetModel, Evidence, Progress | None], Findings]


ATTACKS = {
    "exposure": Attack(("canaries",), measure_canaries),
    "extraction": Attack(("texts", "canaries"), measure_extraction),
    "membership": Attack(("texts",), measure_membership),
}


@dataclass(frozen=True)
class AuditResult:
    """Everything an audit found. `path` is the audit.json that was written, None if none was."""

    measurements: list[Measurement]
    roc_curves: dict[str, tuple[list[float], list[float]]]  # attack -> (false positive, true positive rates)
    made_with: dict[str, object]  # attacks, seed and limits: the same ones give the same measurements
    guarantee: GuaranteeFile | None
    path: Path | None


def audit(
    model: str | Path,
    *,
    trained_on: Sequence[str] = (),
    held_out: Sequence[str] = (),
    attacks: str | None = None,
    reference: str | Path | None = None,
    limit: int = 1000,
    seed: int = 0,
    output_dir: str | Path | None = None,
    recipe: str | Path | None = None,
    assignments: Sequence[str] = (),
    listener: Listener | None = None,
) -> AuditResult:
    """Attack `model` and write the measurements to audit.json.

    Args:
        model: a run folder, a model folder or a Hub id.
        trained_on: sources of text that the model was trained on; none: the training text of the run, read
            again.
        held_out: sources of text of the same kind that the model has not seen; given together with
            `trained_on`.
        attacks: rows of `ATTACKS`, separated by commas; None: all for which there is evidence.
        reference: a causal language model that has not seen the training text.
        limit: passages drawn from each of the two texts.
        seed: of the drawn passages.
        output_dir: folder of audit.json; None: the run folder, and nowhere if `model` is not a run.
        recipe: YAML file that says how `trained_on` and `held_out` are read; a run has its own.
        assignments: `section.key=value`, which override the recipe.
        listener: called with (event, fields) for the events "progress" and "note".

    Raises:
        UserError: text is missing or has changed, an attack is unknown or lacks evidence, a model cannot be
            loaded.
    """
    is_run = (Path(model) / "recipe.yaml").is_file()
    if bool(trained_on) != bool(held_out):
        raise UserError(
            "--trained-on and --held-out belong together: text that the model saw, and the like of it"
        )
    if not is_run and not trained_on:
        raise UserError(
            f"{str(model)!r} is not a run folder: name the text that it was trained on by --trained-on, and "
            "text of the same kind that it has not seen by --held-out"
        )
    if limit < 1:
        raise UserError(f"--limit {limit}: expected a whole number above 0")
    notify = listener or (lambda event, fields: None)

    def report(task: str, done: int = 0, total: int | None = None) -> None:
        notify("progress", {"task": task, "done": done, "total": total})

    def encode(target: TargetModel, documents: Documents) -> Any:
        return encode_documents(target.tokenizer, documents, lambda *progress: report("encoding", *progress))

    run = RunFolder.open(model) if is_run else None
    if output_dir is not None and Path(output_dir).is_dir():
        refuse_links_out(output_dir)
    settings = load_recipe(run.recipe if run else recipe, assignments)
    report("reading the text")
    texts = _read_texts(run, settings, trained_on, held_out, notify)
    if any(documents.is_chat.any() for documents in texts):
        raise UserError("the attacks of an audit are for text, and some documents are chats: name other text")
    report("loading the model")
    target = _load(model, settings, settings.training.max_seq_length if is_run else None)
    canaries = read(run.canaries, Canaries) if run and run.canaries.is_file() else None
    guarantee = read(run.privacy, GuaranteeFile) if run and run.privacy.is_file() else None
    evidence = Evidence(
        train=encode(target, texts[0]), held_out=encode(target, texts[1]), canaries=canaries,
        reference=None if reference is None else _load(reference, Recipe(), None),
        delta=Evidence.delta if guarantee is None else guarantee.delta, limit=limit, seed=seed,
    )  # fmt: skip
    names = select_attacks(attacks, evidence)
    findings = [count_stored_text(target.model.config)] + [
        ATTACKS[name].measure(target, evidence, lambda *progress, name=name: report(name, *progress))
        for name in names
    ]
    folder = Path(output_dir) if output_dir is not None else run.path if run else None
    result = AuditResult(
        measurements=[measurement for found in findings for measurement in found.measurements],
        roc_curves={name: curve for found in findings for name, curve in found.roc_curves.items()},
        made_with={
            "attacks": names,
            "limit": limit,
            "seed": seed,
            "context": target.context,
            "delta": evidence.delta,
            "reference": None if reference is None else Path(reference).name,
            "text": "named" if trained_on else "the run's own",
        },
        guarantee=guarantee,
        path=None if folder is None else folder / "audit.json",
    )
    if result.path is not None:
        try:
            _write(result, result.path)
        except WriteError as error:
            notify("note", {"message": f"not kept: {error}"})
            result = dataclasses.replace(result, path=None)
    return result


def count_stored_text(config: Any) -> Findings:
    """Count the n-grams that a model's tables of counts hold; nothing for a model without such tables."""
    if not getattr(config, "holds_counts", False):
        return Findings([])
    n_stored = sum(config.ngram_sizes[1:])
    name = f"{STORED}/{config.ngram_order}"
    return Findings([Measurement(name, float(n_stored), "n-grams", 1, None, "train", False)])


def select_attacks(words: str | None, evidence: Evidence) -> list[str]:
    """Parse a comma-separated list of attacks; None selects all attacks for which there is evidence.

    Raises:
        UserError: an attack is unknown or lacks evidence, or there is no evidence at all.
    """
    has_evidence = {
        "texts": evidence.train is not None and evidence.held_out is not None,
        "canaries": evidence.canaries is not None,
    }
    possible = [name for name, row in ATTACKS.items() if any(has_evidence[need] for need in row.needs)]
    if words is None:
        if not possible:
            raise UserError(
                "an audit needs the training text and held-out text: name --trained-on and --held-out"
            )
        return possible
    names = list(dict.fromkeys(word.strip() for word in words.split(",")))
    for name in names:
        if name not in ATTACKS:
            raise UserError(f"--attacks {words}: there is no attack {name!r}{did_you_mean(name, ATTACKS)}")
        if name not in possible:
            raise UserError(
                f"--attacks {words}: {name} needs {' or '.join(ATTACKS[name].needs)}, which are missing; "
                "canaries are planted by train --canaries, texts are named by --trained-on and --held-out"
            )
    return names


def _read_texts(
    run: RunFolder | None, recipe: Recipe, train: Sequence[str], held_out: Sequence[str], notify: Listener
) -> tuple[Documents, Documents]:
    """Read (training text without canaries, held-out text): the named sources, or both splits of the run.

    Raises:
        UserError: the text of the run has changed since training, or was a stream.
    """

    def note(report: dict[str, Any]) -> None:
        for message in notes_on(report):
            notify("note", {"message": message})

    if train:
        sides = []
        for sources, split in ((train, "train"), (held_out, "validation")):
            set_field(recipe, "corpus.sources", list(sources))
            documents, read = read_documents(list(sources), recipe.corpus, split)
            note(read)
            sides.append(documents)
        return sides[0], sides[1]
    assert run is not None
    if recipe.corpus.stream:
        raise UserError(
            f"{str(run.path)!r} read its text as a stream and kept none: name some of it by --trained-on, "
            "and text that it has not seen by --held-out"
        )
    with pointing_to_places(recipe):
        corpus = read_corpus(recipe.corpus)
    note(corpus.report)
    without_canaries = corpus.train
    _check_unchanged(run, recipe, corpus)
    return without_canaries, corpus.validation


def _check_unchanged(run: RunFolder, recipe: Recipe, corpus: Corpus) -> None:
    """Compare with the hashes of corpus.json, which are those of the text with its canaries."""
    plant(corpus, recipe.privacy)
    recorded = read(run.corpus, CorpusFile)
    for split in ("train", "validation"):
        if getattr(recorded, split).sha256 != corpus.report[split]["sha256"]:
            raise UserError(
                f"the {split} text of {str(run.path)!r} has changed since it was trained: bring it back, or "
                "name what it was trained on by --trained-on, and text that it has not seen by --held-out"
            )


def _load(name: str | Path, recipe: Recipe, max_seq_length: int | None) -> TargetModel:
    model, tokenizer = load(str(name))
    limit = getattr(model.config, "max_position_embeddings", None) or _MAX_CONTEXT
    context = recipe.evaluation.context_length or max_seq_length or min(limit, _MAX_CONTEXT)
    return TargetModel(model, tokenizer, context, recipe.evaluation.batch_size)


def _write(result: AuditResult, path: Path) -> None:
    write_json(
        path,
        {
            "measurements": [measurement.to_json() for measurement in result.measurements],
            "made_with": result.made_with,
            "roc": {name: {"fpr": fpr, "tpr": tpr} for name, (fpr, tpr) in result.roc_curves.items()},
        },
    )
