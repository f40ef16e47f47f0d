"""Measurements by language: likelihood, parallel sentences, and tokenization.

Bits per byte compare models on one language. They do not compare languages: UTF-8 takes one byte for a Latin
letter and three for a Devanagari one. Bits per character are independent of the encoding, and only bits for
the same content (sentences that are translations of each other) compare languages as such (Cotterell et al.,
2018, Are all languages equally hard to language-model?).

A byte-level tokenizer encodes every text, but a character without a token becomes its UTF-8 bytes, and a
language that was rare in its training takes more tokens for the same content: more time, and more of the
context (Petrov et al., 2023, Language model tokenizers introduce unfairness between languages).
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
from tokenizers import Tokenizer

from hf_genlm.config.recipe import CorpusRecipe, Recipe
from hf_genlm.evaluation.likelihood import document_nats
from hf_genlm.evaluation.measurement import Measurement, ratio_stderr
from hf_genlm.text.encoding import encode_documents, encode_texts
from hf_genlm.text.languages import read_parallel, reference_of, spans
from hf_genlm.text.store import Document, Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Languages = Mapping[str, Mapping[str, Any]]  # code -> its sizes by split, as in corpus.json
# scripts in recommended or limited use (Unicode Standard Annex 31, tables 5 and 7)
_IN_USE = (
    "Common Inherited Arabic Armenian Bengali Bopomofo Cyrillic Devanagari Ethiopic Georgian Greek Gujarati "
    "Gurmukhi Han Hangul Hebrew Hiragana Kannada Katakana Khmer Lao Latin Malayalam Mongolian Myanmar Oriya "
    "Sinhala Tamil Telugu Thaana Thai Tibetan Adlam Balinese Bamum Batak Canadian_Aboriginal Chakma Cham "
    "Cherokee Hanifi_Rohingya Javanese Kayah_Li Lepcha Limbu Lisu Mandaic Meetei_Mayek Miao New_Tai_Lue Newa "
    "Nko Nyiakeng_Puachue_Hmong Ol_Chiki Osage Saurashtra Sundanese Syloti_Nagri Syriac Tai_Le Tai_Tham "
    "Tai_Viet Tifinagh Vai Wancho Yi"
)
SCRIPTS = tuple(_IN_USE.split())  # characters of all others count as "Other"


def count_documents(languages: Languages, split: str = "validation") -> dict[str, int]:
    """Number of documents of each language in a split: the `parts` of `measure_likelihood`."""
    return {code: sizes[split]["documents"] for code, sizes in languages.items()}


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
    """Summarize what was `measured` by language, and measure `corpus.parallel` if the recipe names any.

    Raises:
        UserError: a parallel text that cannot be used.
    """
    found = summarize_languages(measured, languages) if languages else []
    if recipe.corpus.parallel:
        sentences = {
            code: [ids for ids, _ in encode_documents(tokenizer, [Document(line, code) for line in lines])]
            for code, lines in read_parallel(recipe.corpus).items()
        }
        found += measure_parallel(
            model, sentences, reference_of(sentences), start_id=start_id, context=context,
            batch_size=recipe.evaluation.batch_size, on_progress=on_progress,
        )  # fmt: skip
    return found


def summarize_languages(measured: Sequence[Measurement], languages: Languages) -> list[Measurement]:
    """Derive bits per character, and the mean and the worst language, from bits per byte by language.

    Args:
        measured: measurements of `measure_likelihood` with the languages as its `parts`, among others.
        languages: their sizes by split, as in corpus.json; the validation split was measured.

    Returns:
        - bits_per_character/CODE (bits/character): its bits_per_byte times its bytes per character.
        - mean_language_bits_per_byte (bits/byte): unweighted mean; n is the number of languages.
        - worst_language_bits_per_byte (bits/byte): the maximum, with the n and the standard error of that
          language, as if it had been chosen beforehand.
    """
    by_name = {m.name: m for m in measured}
    bits = {code: by_name[f"bits_per_byte/{code}"] for code in languages}
    found = []
    for code, m in bits.items():
        sizes = languages[code]["validation"]
        factor = sizes["bytes"] / sizes["characters"]
        found.append(
            replace(
                m,
                name=f"bits_per_character/{code}",
                value=m.value * factor,
                unit="bits/character",
                n=sizes["characters"],
                stderr=None if m.stderr is None else m.stderr * factor,
                interval=None if m.interval is None else (m.interval[0] * factor, m.interval[1] * factor),
            )
        )
    errors = [m.stderr for m in bits.values() if m.stderr is not None]
    stderr = math.hypot(*errors) / len(errors) if len(errors) == len(bits) else None
    mean = sum(m.value for m in bits.values()) / len(bits)
    worst = max(bits.values(), key=lambda m: m.value)
    name = "mean_language_bits_per_byte"
    found.append(replace(worst, name=name, value=mean, n=len(bits), stderr=stderr, interval=None))
    return [*found, replace(worst, name="worst_language_bits_per_byte")]


def measure_parallel(
    model: Any,
    sentences: Mapping[str, Sequence[Sequence[int] | np.ndarray]],
    reference: str,
    *,
    start_id: int,
    context: int,
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    """Measure the bits for the same content in each language. Every sentence is scored as a document.

    Args:
        model, start_id, context, batch_size, on_progress: as in `measure_likelihood`.
        sentences: token ids of n sentences by language; those with the same index are translations.
        reference: language that the others are compared with.

    Returns:
        - bits_per_sentence/CODE (bits/sentence): total -log2 P over n, with the error of a mean of n.
        - information_parity/CODE (1), except of the reference: bits of the reference over bits of the
          language. Less than 1: the same content takes more bits in this language (Tsvetkov and Kipnis, 2024,
          Information parity: measuring and predicting the multilingual capabilities of language models). The
          error is that of a ratio over n pairs of sentences.
    """
    every = [ids for of_language in sentences.values() for ids in of_language]
    nats = document_nats(
        model, every, start_id=start_id, context=context, batch_size=batch_size, on_progress=on_progress
    )
    n = len(sentences[reference])
    bits = dict(zip(sentences, nats.reshape(len(sentences), n) / math.log(2), strict=True))
    found = []
    for code, of in bits.items():
        mean, stderr = float(of.mean()), ratio_stderr(of, np.ones(n))
        name = f"bits_per_sentence/{code}"
        found.append(Measurement(name, mean, "bits/sentence", n, stderr, "parallel", False))
    for code, of in bits.items():
        if code != reference:
            value, stderr = float(bits[reference].sum() / of.sum()), ratio_stderr(bits[reference], of)
            found.append(Measurement(f"information_parity/{code}", value, "1", n, stderr, "parallel", True))
    return found


def measure_corpus_tokenization(
    tokenizer: "PreTrainedTokenizerFast",
    documents: Documents,
    languages: Languages,
    recipe: CorpusRecipe,
    split: str = "validation",
) -> list[Measurement]:
    """Apply `measure_tokenization` to documents in the order of `languages`, and to `corpus.parallel`.

    Raises:
        UserError: a parallel text that cannot be used.
    """
    texts = {
        code: (document.text for document in documents[span])
        for code, span in spans(count_documents(languages, split)).items()
    }
    parallel = read_parallel(recipe)
    reference = reference_of(parallel) if parallel else None
    return measure_tokenization(tokenizer, texts, parallel, reference, split=split)


def measure_tokenization(
    tokenizer: "PreTrainedTokenizerFast",
    texts: Mapping[str, Iterable[str]],
    parallel: Mapping[str, Sequence[str]] | None = None,
    reference: str | None = None,
    *,
    split: str = "validation",
) -> list[Measurement]:
    """Measure `tokenizer` on texts by language, and on n sentences that are translations of each other.

    Args:
        texts: documents by language.
        parallel: sentences by language; those with the same index are translations.
        reference: language of `parallel` that the others are compared with.

    Returns:
        - bytes_per_token/CODE (bytes/token): of the texts of a language.
        - whole_characters/SCRIPT (fraction): characters of a Unicode script in the texts of all languages
          that are not cut by a border of two tokens; only for byte-level tokenizers. The script Common has
          digits, spaces and signs that several scripts share.
        - tokens_per_sentence/CODE (tokens/sentence): on `parallel`.
        - tokenization_premium/CODE (1): its tokens over those of the reference on `parallel`; 1.5: half as
          many again for the same content. The error is that of a ratio over n pairs of sentences.
    """
    lengths = _byte_lengths(tokenizer.backend_tokenizer)
    found: list[Measurement] = []
    whole: Counter[str] = Counter()
    every: Counter[str] = Counter()
    for code, documents in texts.items():
        sizes = []
        for text in documents:
            ids = np.array(encode_texts(tokenizer, [text])[0], dtype=np.int64)
            sizes.append((len(text.encode("utf-8")), len(ids)))
            if lengths is not None:
                every.update(text)
                whole.update(_whole_characters(text, lengths[ids]))
        n_bytes, n_tokens = np.array(sizes).T
        found.append(_ratio(f"bytes_per_token/{code}", "bytes/token", n_bytes, n_tokens, split, True))
    by_script = scripts_of(every)
    for script in (*SCRIPTS, "Other"):
        n = sum(count for character, count in every.items() if by_script[character] == script)
        if n:
            n_whole = sum(count for character, count in whole.items() if by_script[character] == script)
            name = f"whole_characters/{script}"
            found.append(Measurement(name, n_whole / n, "fraction", n, None, split, True))
    if parallel and reference:
        tokens_of = {
            code: np.array([len(ids) for ids in encode_texts(tokenizer, lines)])
            for code, lines in parallel.items()
        }
        baseline, ones = tokens_of[reference], np.ones(len(tokens_of[reference]), dtype=np.int64)
        for code, of in tokens_of.items():
            name = f"tokens_per_sentence/{code}"
            found.append(_ratio(name, "tokens/sentence", of, ones, "parallel", False))
        for code, of in tokens_of.items():
            if code != reference:
                premium = _ratio(f"tokenization_premium/{code}", "1", of, baseline, "parallel", False)
                found.append(replace(premium, n=len(ones)))
    return found


def _ratio(
    name: str, unit: str, numerators: np.ndarray, denominators: np.ndarray, split: str, is_higher_better: bool
) -> Measurement:
    """Ratio of two totals over documents or sentences; n is the total of the denominators."""
    n = int(denominators.sum())
    value, stderr = float(numerators.sum() / n), ratio_stderr(numerators, denominators)
    return Measurement(name, value, unit, n, stderr, split, is_higher_better)


def scripts_of(characters: Iterable[str]) -> dict[str, str]:
    """The Unicode property Script of each character: one of `SCRIPTS`, or "Other"."""
    joined = "".join(characters)
    found = dict.fromkeys(joined, "Other")
    for script in SCRIPTS:
        found |= dict.fromkeys(regex.findall(rf"\p{{Script={script}}}", joined), script)
    return found


def _byte_lengths(backend: Tokenizer) -> np.ndarray | None:
    """Bytes (n_ids,) that each id stands for: the letters of its token.

    None for a tokenizer that is not byte-level, or that changes a text before it splits it.
    """
    state = json.loads(backend.to_str())
    has_prefix_space = '"add_prefix_space": true' in json.dumps(state["pre_tokenizer"])
    is_byte_level = (state["decoder"] or {}).get("type") == "ByteLevel"
    if state["normalizer"] is not None or has_prefix_space or not is_byte_level:
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, i in vocabulary.items():
        lengths[i] = len(token)
    return lengths


def _whole_characters(text: str, lengths: np.ndarray) -> list[str]:
    """Characters of a text that no border of two tokens cuts; `lengths` (n_tokens,) are in bytes."""
    content = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    begins = np.flatnonzero((content & 0xC0) != 0x80)
    assert lengths.sum() == len(content), "the tokens of a byte-level tokenizer are the bytes of the text"
    borders = np.cumsum(lengths)[:-1]
    is_cut = np.zeros(len(text), dtype=bool)
    is_cut[np.searchsorted(begins, borders[~np.isin(borders, begins)], side="right") - 1] = True
    return [character for character, cut in zip(text, is_cut.tolist(), strict=True) if not cut]
