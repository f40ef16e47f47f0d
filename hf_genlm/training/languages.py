"""What is measured of the languages of a text, beside the likelihood of each."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hf_genlm.config.recipe import CorpusRecipe, Recipe
from hf_genlm.evaluation.by_language import Languages, documents_of, measure_parallel, over_languages
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.evaluation.tokenization import measure_tokenization
from hf_genlm.text.encoding import encode_documents
from hf_genlm.text.languages import read_parallel, reference_of, spans
from hf_genlm.text.store import Document, Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
