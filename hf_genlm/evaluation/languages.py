"""Measurements by language: likelihood of each language, parallel sentences, tokenization.

Bits per byte compare models on one language. They do not compare languages: UTF-8 takes one byte for a Latin
letter and three for a Devanagari one. Bits per character are independent of the encoding, and only bits for
the same content (sentences that are translations of each other) compare languages as such (Cotterell et al.,
2018, Are all languages equally hard to language-model?).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_genlm.config.recipe import CorpusRecipe, Recipe
from hf_genlm.evaluation.likelihood import document_nats
from hf_genlm.evaluation.measurement import Measurement, ratio_stderr
from hf_genlm.evaluation.tokenization import measure_tokenization
from hf_genlm.text.encoding import encode_documents
from hf_genlm.text.languages import read_parallel, reference_of, spans
from hf_genlm.text.store import Document, Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Languages = Mapping[str, Mapping[str, Any]]  # by code: what corpus.json says


def documents_of(languages: Languages, split: str = "validation") -> dict[str, int]:
    """Documents of each language in a split: the `parts` of `measure_likelihood`."""
    return {code: of_language[split]["documents"] for code, of_language in languages.items()}


def over_languages(
    measured: Sequence[Measurement], languages: Languages, split: str = "validation"
) -> list[Measurement]:
    """What follows from the numbers of each language.

    Args:
        measured: of `measure_likelihood` with the languages as its `parts`; others are passed over.
        languages: what corpus.json says of them.
        split: the one that was measured.

    Returns:
        - bits_per_character/CODE (bits/character): its bits_per_byte times its bytes per character.
        - mean_language_bits_per_byte (bits/byte): every language weighs the same; its n is their number.
        - worst_language_bits_per_byte (bits/byte): the highest one, with the n and the standard error of that
          language, as if it had been chosen beforehand.
    """
    bits = {code: _named(measured, f"bits_per_byte/{code}") for code in languages}
    found = []
    for code, of_language in languages.items():
        factor = of_language[split]["bytes"] / of_language[split]["characters"]
        m = bits[code]
        found.append(
            replace(
                m,
                name=f"bits_per_character/{code}",
                value=m.value * factor,
                unit="bits/character",
                n=of_language[split]["characters"],
                stderr=None if m.stderr is None else m.stderr * factor,
                interval=None if m.interval is None else (m.interval[0] * factor, m.interval[1] * factor),
            )
        )
    errors = [m.stderr for m in bits.values() if m.stderr is not None]
    mean_stderr = math.hypot(*errors) / len(errors) if len(errors) == len(bits) else None
    mean = sum(m.value for m in bits.values()) / len(bits)
    worst = max(bits.values(), key=lambda m: m.value)
    name = "mean_language_bits_per_byte"
    first = replace(worst, name=name, value=mean, n=len(bits), stderr=mean_stderr, interval=None)
    return [*found, first, replace(worst, name="worst_language_bits_per_byte")]


def measure_parallel(
    model: Any,
    sentences: Mapping[str, Sequence[Sequence[int] | np.ndarray]],
    reference: str,
    *,
    start_id: int,
    context: int,
    batch_size: int = 32,
    split: str = "parallel",
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    """What the same content costs in each language: every sentence is scored as a document of its own.

    Args:
        model, start_id, context, batch_size, on_progress: as `measure_likelihood` has them.
        sentences: token ids of n sentences in each language; those at one place translate each other.
        reference: the language that the others are compared with.

    Returns:
        - bits_per_sentence/CODE (bits/sentence): total -log2 P over n; its error is that of a mean of n.
        - information_parity/CODE (1), but for the reference: bits of the reference over bits of the language;
          1: the same content is as likely in both, less: it takes more bits in this one (Tsvetkov and Kipnis,
          2024, Information parity: measuring and predicting the multilingual capabilities of language
          models). Its error is that of a ratio over n pairs of sentences.
    """
    every = [ids for of_language in sentences.values() for ids in of_language]
    nats = document_nats(
        model, every, start_id=start_id, context=context, batch_size=batch_size, on_progress=on_progress
    )
    n = len(sentences[reference])
    bits = dict(zip(sentences, nats.reshape(len(sentences), n) / math.log(2), strict=True))

    def measured(name: str, value: float, unit: str, stderr: float | None) -> Measurement:
        return Measurement(name, value, unit, n, stderr, split, unit == "1")

    found = [
        measured(f"bits_per_sentence/{code}", float(of.mean()), "bits/sentence", ratio_stderr(of, np.ones(n)))
        for code, of in bits.items()
    ]
    found += [
        measured(
            f"information_parity/{code}",
            float(bits[reference].sum() / of.sum()),
            "1",
            ratio_stderr(bits[reference], of),
        )
        for code, of in bits.items()
        if code != reference
    ]
    return found


def tokenization_of(
    tokenizer: "PreTrainedTokenizerFast",
    documents: Documents,
    languages: Languages,
    recipe: CorpusRecipe,
    split: str = "validation",
) -> list[Measurement]:
    """`measure_tokenization` on documents that stand language by language, and on `corpus.parallel`.

    Raises:
        UserError: a parallel text that cannot be used.
    """
    texts = {
        code: (document.text for document in documents[span])
        for code, span in spans(documents_of(languages, split)).items()
    }
    parallel = read_parallel(recipe)
    reference = reference_of(parallel) if parallel else None
    return measure_tokenization(tokenizer, texts, parallel, reference, split=split)


def measure_languages(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    measured: Sequence[Measurement],
    languages: Languages,
    recipe: Recipe,
    *,
    start_id: int,
    context: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    """`over_languages` of what was `measured`, and `measure_parallel` on `corpus.parallel`, if there is any.

    Raises:
        UserError: a parallel text that cannot be used.
    """
    found = over_languages(measured, languages) if languages else []
    if recipe.corpus.parallel:
        sentences = {
            code: [ids for ids, _ in encode_documents(tokenizer, [Document(line, code) for line in lines])]
            for code, lines in read_parallel(recipe.corpus).items()
        }
        found += measure_parallel(
            model,
            sentences,
            reference_of(sentences),
            start_id=start_id,
            context=context,
            batch_size=recipe.evaluation.batch_size,
            on_progress=on_progress,
        )
    return found


def _named(measured: Sequence[Measurement], name: str) -> Measurement:
    (found,) = (m for m in measured if m.name == name)
    return found
