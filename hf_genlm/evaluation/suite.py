"""What there is to measure: `EVALUATIONS`, a row for each word of `hf-genlm evaluate --suite`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_genlm.config.recipe import EvaluationRecipe
from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.evaluation.measurement import Measurement

if TYPE_CHECKING:
    from hf_genlm.evaluation.by_language import Languages

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Subject:
    """A causal language model under evaluation."""

    model: Any
    tokenizer: Any
    start_id: int  # of the token before a text
    context: int  # tokens that it reads at most


@dataclass
class Material:
    """What a subject is measured on: what the `needs` of the rows name is there, other fields may be."""

    how: EvaluationRecipe
    split: str = "given"  # of the documents
    texts: Any = None  # the documents as they were read, `text.store.Documents`
    documents: Sequence[tuple[np.ndarray, int]] = ()  # token ids (T,) and bytes of the original text
    n_words: np.ndarray | None = None  # of each document
    languages: "Languages" = field(default_factory=dict)  # whose documents stand one after the other
    training: Any = None  # the training text of a run, as `texts`; None: it is not at hand
    pairs: list[Any] = field(default_factory=list)  # minimal_pairs.Pair
    pairs_split: str = "pairs"
    tasks: list[str] = field(default_factory=list)  # names of lm-eval's
    include_path: str | None = None  # where more of them are


class Evaluation(NamedTuple):
    """A row: fields of `Material` that it needs, and what measures.

    "documents" brings `texts` and `n_words` too, and must be there; "training" is the text of a run, where
    the model is one. What `brings_bars` shows its progress by itself.
    """

    needs: tuple[str, ...]
    measure: Callable[[Subject, Material, Progress], list[Measurement]]
    brings_bars: bool = False


def suite_of(words: str) -> list[str]:
    """The evaluations that `words` lists, separated by commas.

    Raises:
        UserError: a word that is none.
    """
    names = [word.strip() for word in words.split(",")]
    for name in names:
        if name not in EVALUATIONS:
            raise UserError(
                f"--suite {words}: there is no evaluation {name!r}{did_you_mean(name, EVALUATIONS)}"
            )
    return list(dict.fromkeys(names))


def _likelihood(subject: Subject, material: Material, on_progress: Progress) -> list[Measurement]:
    from hf_genlm.evaluation.by_language import documents_of
    from hf_genlm.evaluation.likelihood import measure_likelihood

    return measure_likelihood(
        subject.model,
        material.documents,
        start_id=subject.start_id,
        context=subject.context,
        stride=material.how.stride,
        batch_size=material.how.batch_size,
        carry_state=bool(material.how.carry_state),
        n_words=material.n_words,
        parts=documents_of(material.languages),
        split=material.split,
        on_progress=on_progress,
    )


def _minimal_pairs(subject: Subject, material: Material, on_progress: Progress) -> list[Measurement]:
    from hf_genlm.evaluation.minimal_pairs import measure_minimal_pairs

    return measure_minimal_pairs(
        subject.model,
        subject.tokenizer,
        material.pairs,
        start_id=subject.start_id,
        context=subject.context,
        split=material.pairs_split,
        on_progress=on_progress,
    )


def _lm_eval(subject: Subject, material: Material, on_progress: Progress) -> list[Measurement]:
    from hf_genlm.evaluation.harness import measure_tasks

    return measure_tasks(
        subject.model,
        subject.tokenizer,
        material.tasks,
        start_id=subject.start_id,
        context=subject.context,
        include_path=material.include_path,
        batch_size=material.how.batch_size,
    )


def _range(subject: Subject, material: Material, on_progress: Progress) -> list[Measurement]:
    from hf_genlm.evaluation.long_range import measure_range

    return measure_range(
        subject.model,
        material.documents,
        subject.start_id,
        subject.context,
        batch_size=material.how.batch_size,
        split=material.split,
        on_progress=on_progress,
    )


def _extrapolation(subject: Subject, material: Material, on_progress: Progress) -> list[Measurement]:
    from hf_genlm.evaluation.long_range import measure_extrapolation

    return measure_extrapolation(
        subject.model,
        material.documents,
        subject.start_id,
        trained_length=subject.context,
        split=material.split,
        on_progress=on_progress,
    )


def _samples(subject: Subject, material: Material, on_progress: Progress) -> list[Measurement]:
    from hf_genlm.evaluation.samples import measure_samples

    held_out = None if material.texts is None else [document.text for document in material.texts]
    return measure_samples(
        subject.model,
        subject.tokenizer,
        training_texts=material.training,
        reference_texts=held_out,
        on_progress=on_progress,
    )


EVALUATIONS: dict[str, Evaluation] = {
    "likelihood": Evaluation(("documents",), _likelihood),
    "minimal_pairs": Evaluation(("pairs",), _minimal_pairs),
    "range": Evaluation(("documents",), _range),
    "extrapolation": Evaluation(("documents",), _extrapolation),
    "samples": Evaluation(("training",), _samples),
    "lm_eval": Evaluation(("tasks",), _lm_eval, brings_bars=True),
}
