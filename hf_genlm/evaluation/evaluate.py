"""Evaluate a causal language model by one or several suites.

`evaluate` is the service behind `hf-genlm evaluate`; `SUITES` is the table of what it can measure.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_genlm.config.recipe import EvaluationRecipe, Recipe, load_recipe, pointing_to_places, set_field
from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.evaluation.measurement import AT_MILESTONE, Measurement, update_measurements
from hf_genlm.files import note_write_errors, read
from hf_genlm.loading import load
from hf_genlm.run_folder import Listener, RunFolder
from hf_genlm.run_schemas import CorpusFile

if TYPE_CHECKING:
    from hf_genlm.evaluation.languages import Languages

Progress = Callable[[int, int | None], None]  # (done, total)
_NOT_READ = (
    "the training text of a private run is not measured: what is copied from it has no guarantee; --set "
    "card.private_figures=true measures it"
)
DEFAULT_CONTEXT = 1024  # tokens, for a model whose config states no maximum


@dataclass(frozen=True)
class Subject:
    """A causal language model under evaluation, and its tokenizer."""

    model: Any
    tokenizer: Any
    start_id: int  # id of the token before a document
    context: int  # maximum number of input tokens


@dataclass
class Material:
    """Data that a subject is evaluated on. The `needs` of each suite name the fields that it reads."""

    settings: EvaluationRecipe
    split: str = "given"  # split of the documents
    texts: Any = None  # documents as they were read, `text.store.Documents`
    documents: Sequence[tuple[np.ndarray, int]] = ()  # token ids (T,) and bytes of the original text
    n_words: np.ndarray | None = None  # per document
    languages: "Languages" = field(default_factory=dict)  # their documents stand in this order
    training: Any = None  # training text of a run, as `texts`; None if it is not available
    pairs: list[Any] = field(default_factory=list)  # of benchmarks.Pair
    pairs_split: str = "pairs"
    tasks: Sequence[str] = ()  # names of lm-eval tasks
    include_path: str | Path | None = None  # folder with more task files
    seed: int = 0  # of the sampled texts


class Suite(NamedTuple):
    """One row of `SUITES`.

    `needs` names fields of `Material`: "documents" stands for `texts` and `n_words` too and is required;
    "training" is the training text of a run and stays None for other models.
    """

    needs: tuple[str, ...]
    measure: Callable[[Subject, Material, Progress], list[Measurement]]
    has_own_bar: bool = False  # a library shows its own progress bar


def evaluate(
    model: str | Path | RunFolder,
    sources: str | Sequence[str] | None = None,
    *,
    texts: Iterable[str] | None = None,
    suites: Sequence[str] | None = None,
    pairs: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    include_path: str | Path | None = None,
    milestones: bool = False,
    seed: int = 0,
    recipe: str | Path | None = None,
    assignments: Sequence[str] = (),
    listener: Listener | None = None,
) -> list[Measurement]:
    """Evaluate a causal language model.

    The measurements of a run on its own validation split, with its own settings, are merged into its
    evaluation.json: those with the same name and split are replaced.

    Args:
        model: a run folder, a model folder or a Hub id.
        sources: files, folders or Hub data sets to measure on. Default: the validation split of the run.
        texts: documents in memory, instead of `sources`.
        suites: names in `SUITES`. Default: the suites that read `pairs` and `tasks` if these are given, and
            "likelihood" if there are `sources` or `texts`, or no other suite.
        pairs: a .jsonl file of minimal pairs in BLiMP's format, or a folder of such files.
        tasks: names of lm-eval tasks; `*` matches any text.
        include_path: a folder of lm-eval task files beside its own. Their functions are executed.
        milestones: evaluate the milestones of the run too; their measurements are called NAME@MILESTONE and
            are not kept.
        seed: of the texts that the suite "samples" generates.
        recipe: a YAML recipe for a model that is not a run; its sections `evaluation` and `corpus` are read.
        assignments: `section.key=value` that override the recipe.
        listener: receives the events "progress", "note" and "external_bar" (lm-eval shows its own bar).

    Raises:
        UserError: an unknown suite, missing or superfluous data, or text or a model that cannot be used.
    """
    sources = [sources] if isinstance(sources, str) else list(sources or ())
    if sources and texts is not None:
        raise UserError("sources and texts were both given: give one of them")
    has_text = bool(sources) or texts is not None
    names = _select_suites(suites, has_text, {"pairs": pairs, "tasks": tasks})
    needs = {need for name in names for need in SUITES[name].needs}
    path = str(model.path if isinstance(model, RunFolder) else model)
    run = RunFolder.open(path) if (Path(path) / "recipe.yaml").is_file() else None
    if "documents" in needs and run is None and not has_text:
        raise UserError(f"{path!r} is not a run folder: name the SOURCE to measure it on")
    folders = run.list_milestones() if run and milestones else []
    if milestones and not folders:
        raise UserError(
            f"{path!r} has no milestones: a run writes them at the numbers of words that "
            "training.milestone_words names"
        )
    settings = load_recipe(run.recipe if run else recipe, assignments)
    tell: Listener = listener or (lambda event, fields: None)
    _progress_of("loading torch and transformers", tell)(0, None)
    material = Material(settings.evaluation, tasks=list(tasks or ()), include_path=include_path, seed=seed)
    if pairs is not None:
        from hf_genlm.evaluation.benchmarks import read_pairs

        material.pairs, material.pairs_split = read_pairs(pairs), Path(pairs).resolve().stem
    if needs & {"documents", "training"}:
        with pointing_to_places(settings):
            _read_text(material, sources, texts, run, settings, tell)
    subject = load_subject(path, settings.evaluation.context_length)
    measurements = _run_suites(names, subject, material, settings, tell)
    if run and not has_text and not assignments:
        with note_write_errors(lambda message: tell("note", {"message": message})):
            update_measurements(run.evaluation, measurements)
    for folder in folders:
        subject = load_subject(str(folder), settings.evaluation.context_length)
        found = _run_suites(names, subject, material, settings, tell)
        measurements += [replace(m, name=f"{m.name}{AT_MILESTONE}{folder.name}") for m in found]
    return measurements


def _run_suites(
    names: Sequence[str], subject: Subject, material: Material, recipe: Recipe, tell: Listener
) -> list[Measurement]:
    """Tokenize the texts if a suite needs them, and run the suites in order."""
    if any("documents" in SUITES[name].needs for name in names):
        from hf_genlm.text.encoding import encode_documents

        on_progress = _progress_of("encoding", tell)
        material.documents = encode_documents(subject.tokenizer, material.texts, on_progress, ends_chats=True)
        if material.documents.targets is None:
            _progress_of("counting words", tell)(0, None)
            material.n_words = material.texts.count_words()
        elif others := [name for name in names if name in ("range", "extrapolation")]:
            raise UserError(f"--suite {others[0]} is for text, and some documents are chats: leave it out")
    found: list[Measurement] = []
    for name in names:
        on_progress = _progress_of(name, tell)
        on_progress(0, None)
        if SUITES[name].has_own_bar:
            tell("external_bar", {"is_active": True})
        found += SUITES[name].measure(subject, material, on_progress)
        if SUITES[name].has_own_bar:
            tell("external_bar", {"is_active": False})
    if "likelihood" in names:
        from hf_genlm.evaluation.languages import measure_languages

        found += measure_languages(
            subject.model, subject.tokenizer, found, material.languages, recipe, start_id=subject.start_id,
            context=subject.context,
        )  # fmt: skip
    return found


def score_texts(
    texts: Sequence[str], model: str, *, context: int | None = None, batch_size: int = 32
) -> list[Measurement]:
    """Measure the likelihood of `texts` (one document each) by the model that `loading.load` finds.

    Args:
        context: maximum number of input tokens. Default: the `max_position_embeddings` of the model.

    Raises:
        UserError: the model cannot be loaded or has no start token, or there is no text.
    """
    from hf_genlm.evaluation.likelihood import measure_likelihood
    from hf_genlm.text.encoding import encode_texts

    subject = load_subject(model, context)
    ids = encode_texts(subject.tokenizer, texts)
    documents = [
        (np.array(tokens, dtype=np.int64), len(text.encode("utf-8")))
        for tokens, text in zip(ids, texts, strict=True)
    ]
    return measure_likelihood(
        subject.model, documents, start_id=subject.start_id, context=subject.context, batch_size=batch_size,
        split="given",
    )  # fmt: skip


def load_subject(name: str, context: int | None = None) -> Subject:
    """Load a model and its tokenizer for evaluation.

    Args:
        name: as `loading.load` takes it.
        context: maximum number of input tokens. Default: the `max_position_embeddings` of the model.

    Raises:
        UserError: the model cannot be loaded or has learned fewer positions, or its tokenizer has no start
            token.
    """
    model, tokenizer = load(name)
    from hf_genlm.evaluation.context import has_learned_positions
    from hf_genlm.evaluation.likelihood import start_token_id

    limit = getattr(model.config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    if context is not None and context > limit and has_learned_positions(model):
        raise UserError(f"the model has learned {limit} positions: give at most {limit} tokens of context")
    return Subject(model, tokenizer, start_token_id(tokenizer), context or limit)


def _select_suites(suites: Sequence[str] | None, has_text: bool, given: dict[str, Any]) -> list[str]:
    """Names of the suites to run, each once; `given` has the values of `pairs` and `tasks`."""
    if suites is not None:
        names = list(dict.fromkeys(suites))
    else:
        names = [name for name, row in SUITES.items() if any(given.get(need) for need in row.needs)]
        if has_text or not names:
            names.insert(0, "likelihood")
    for name in names:
        if name not in SUITES:
            raise UserError(f"there is no suite {name!r}{did_you_mean(name, SUITES)}")
    needs = {need for name in names for need in SUITES[name].needs}
    chosen = ",".join(names)
    if has_text and not needs & {"documents", "training"}:
        raise UserError(f"a SOURCE of text was given, which --suite {chosen} does not read: leave it out")
    for option, value in given.items():
        name = next(name for name, row in SUITES.items() if option in row.needs)
        if option in needs and value is None:
            raise UserError(f"--suite {name} needs --{option}")
        if option not in needs and value is not None:
            raise UserError(f"--{option} is for --suite {name}, which is not in --suite {chosen}")
    return names


def _read_text(
    material: Material,
    sources: Sequence[str],
    texts: Iterable[str] | None,
    run: RunFolder | None,
    recipe: Recipe,
    tell: Listener,
) -> None:
    """Fill `material` with the texts or sources that were given, or with both splits of the run."""
    from hf_genlm.text.corpus import Corpus, notes_on, read_corpus, read_documents
    from hf_genlm.text.store import Document, as_documents
    from hf_genlm.text.streaming import read_stream

    if texts is not None:
        material.texts = as_documents([Document(text, "given") for text in texts])
        return
    if sources:
        set_field(recipe, "corpus.sources", list(sources))  # names what may not be in it
        material.texts, report = read_documents(list(sources), recipe.corpus)
    elif run:
        corpus: Any = (read_stream if recipe.corpus.stream else read_corpus)(recipe.corpus)
        material.split, material.texts, report = "validation", corpus.validation, corpus.report
        if recipe.privacy.epsilon is not None and not recipe.card.private_figures:
            tell("note", {"message": _NOT_READ})
        elif isinstance(corpus, Corpus):
            material.training = corpus.train
        material.languages = report.get("languages", {})
        if read(run.corpus, CorpusFile).validation.sha256 != report["validation"]["sha256"]:
            raise UserError(
                f"the sources of {str(run.path)!r} have changed since it was trained: "
                "name the text to measure on"
            )
    else:
        return
    for message in notes_on(report):
        tell("note", {"message": message})


def _progress_of(task: str, tell: Listener) -> Progress:
    return lambda done, total: tell("progress", {"task": task, "done": done, "total": total})


def _likelihood(subject: Subject, material: Material, on_progress: Progress) -> list[Measurement]:
    from hf_genlm.evaluation.languages import count_documents
    from hf_genlm.evaluation.likelihood import measure_likelihood

    return measure_likelihood(
        subject.model, material.documents, start_id=subject.start_id, context=subject.context,
        stride=material.settings.stride, batch_size=material.settings.batch_size,
        carry_state=bool(material.settings.carry_state), n_words=material.n_words,
        parts=count_documents(material.languages), split=material.split, on_progress=on_progress,
    )  # fmt: skip


def _minimal_pairs(subject: Subject, material: Material, on_progress: Progress) -> list[Measurement]:
    from hf_genlm.evaluation.benchmarks import measure_minimal_pairs

    return measure_minimal_pairs(
        subject.model, subject.tokenizer, material.pairs, start_id=subject.start_id, context=subject.context,
        split=material.pairs_split, on_progress=on_progress,
    )  # fmt: skip


def _lm_eval(subject: Subject, material: Material, on_progress: Progress) -> list[Measurement]:
    from hf_genlm.evaluation.benchmarks import measure_lm_eval_tasks

    return measure_lm_eval_tasks(
        subject.model, subject.tokenizer, material.tasks, start_id=subject.start_id, context=subject.context,
        include_path=material.include_path, batch_size=material.settings.batch_size,
    )  # fmt: skip


def _range(subject: Subject, material: Material, on_progress: Progress) -> list[Measurement]:
    from hf_genlm.evaluation.context import measure_loss_by_position

    return measure_loss_by_position(
        subject.model, material.documents, subject.start_id, subject.context,
        batch_size=material.settings.batch_size, split=material.split, on_progress=on_progress,
    )  # fmt: skip


def _extrapolation(subject: Subject, material: Material, on_progress: Progress) -> list[Measurement]:
    from hf_genlm.evaluation.context import measure_extrapolation

    return measure_extrapolation(
        subject.model, material.documents, subject.start_id, trained_length=subject.context,
        split=material.split, on_progress=on_progress,
    )  # fmt: skip


def _samples(subject: Subject, material: Material, on_progress: Progress) -> list[Measurement]:
    from hf_genlm.evaluation.samples import measure_samples

    held_out = None if material.texts is None else [document.text for document in material.texts]
    return measure_samples(
        subject.model, subject.tokenizer, training_texts=material.training, reference_texts=held_out,
        seed=material.seed, on_progress=on_progress,
    )  # fmt: skip


SUITES: dict[str, Suite] = {
    "likelihood": Suite(("documents",), _likelihood),
    "minimal_pairs": Suite(("pairs",), _minimal_pairs),
    "range": Suite(("documents",), _range),
    "extrapolation": Suite(("documents",), _extrapolation),
    "samples": Suite(("training",), _samples),
    "lm_eval": Suite(("tasks",), _lm_eval, has_own_bar=True),
}
