"""How a tokenizer treats languages and scripts: what it needs for the same content, and which characters it
has whole.

A byte-level tokenizer knows every text, so none is lost; but a character that it has no token for falls into
its UTF-8 bytes, and a language that it knows little of takes more tokens for the same content: more time and
more of the context (Petrov et al., 2023, Language model tokenizers introduce unfairness between languages).
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import regex
from tokenizers import Tokenizer

from hf_genlm.evaluation.measurement import Measurement, ratio_stderr

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# in wide or limited use today (Unicode Standard Annex 31, tables 5 and 7)
_IN_USE = (
    "Common Inherited Arabic Armenian Bengali Bopomofo Cyrillic Devanagari Ethiopic Georgian Greek Gujarati "
    "Gurmukhi Han Hangul Hebrew Hiragana Kannada Katakana Khmer Lao Latin Malayalam Mongolian Myanmar Oriya "
    "Sinhala Tamil Telugu Thaana Thai Tibetan Adlam Balinese Bamum Batak Canadian_Aboriginal Chakma Cham "
    "Cherokee Hanifi_Rohingya Javanese Kayah_Li Lepcha Limbu Lisu Mandaic Meetei_Mayek Miao New_Tai_Lue Newa "
    "Nko Nyiakeng_Puachue_Hmong Ol_Chiki Osage Saurashtra Sundanese Syloti_Nagri Syriac Tai_Le Tai_Tham "
    "Tai_Viet Tifinagh Vai Wancho Yi"
)
SCRIPTS = tuple(_IN_USE.split())  # a character of any other is of "Other"


def measure_tokenization(
    tokenizer: "PreTrainedTokenizerFast",
    texts: Mapping[str, Iterable[str]],
    parallel: Mapping[str, Sequence[str]] | None = None,
    reference: str | None = None,
    *,
    split: str = "validation",
    on_progress: Callable[[int, int | None], None] | None = None,
) -> list[Measurement]:
    """Measure `tokenizer` on texts by language, and on n sentences that translate each other.

    Args:
        texts: the documents of each language.
        parallel: sentences by language, line i of each the same one.
        reference: the language of `parallel` that the others are compared with.
        on_progress: called with (documents encoded so far, None).

    Returns:
        - bytes_per_token/CODE (bytes/token): of the texts of a language.
        - whole_characters/SCRIPT (fraction): characters of a Unicode script, over the texts of all languages,
          that no border of two tokens cuts; of a byte-level tokenizer only. Common are digits, spaces and
          signs that several scripts share.
        - tokens_per_sentence/CODE (tokens/sentence): on `parallel`.
        - tokenization_premium/CODE (1): its tokens over those of the reference on `parallel`; 1.5: half as
          many again for the same content. Its error is that of a ratio over n pairs of sentences.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.encode_special_tokens = True
    lengths = _byte_lengths(backend)
    found: list[Measurement] = []
    whole: Counter[str] = Counter()
    every: Counter[str] = Counter()
    n_documents = 0
    for code, documents in texts.items():
        sizes = []
        for text in documents:
            ids = np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)
            sizes.append((len(text.encode("utf-8")), len(ids)))
            if lengths is not None:
                _count_whole(text, lengths[ids], whole, every)
            n_documents += 1
            if on_progress is not None:
                on_progress(n_documents, None)
        n_bytes, n_tokens = np.array(sizes).T
        value, n = float(n_bytes.sum() / n_tokens.sum()), int(n_tokens.sum())
        stderr = ratio_stderr(n_bytes, n_tokens)
        found.append(Measurement(f"bytes_per_token/{code}", value, "bytes/token", n, stderr, split, True))
    by_script = scripts_of(every)
    for script in (*SCRIPTS, "Other"):
        n = sum(count for character, count in every.items() if by_script[character] == script)
        if n:
            n_whole = sum(count for character, count in whole.items() if by_script[character] == script)
            found.append(
                Measurement(f"whole_characters/{script}", n_whole / n, "fraction", n, None, split, True)
            )
    return found + (_on_sentences(backend, parallel, reference) if parallel and reference else [])


def scripts_of(characters: Iterable[str]) -> dict[str, str]:
    """The Unicode script of each character, by the property of that name: one of `SCRIPTS`, or Other."""
    joined = "".join(characters)
    found = dict.fromkeys(joined, "Other")
    for script in SCRIPTS:
        found |= dict.fromkeys(regex.findall(rf"\p{{Script={script}}}", joined), script)
    return found


def _byte_lengths(backend: Tokenizer) -> np.ndarray | None:
    """Bytes that each id stands for (n_ids,), which are the letters of its token; None of a tokenizer that is
    not byte-level, or changes a text before it cuts it."""
    state = json.loads(backend.to_str())
    is_changed = state["normalizer"] is not None or '"add_prefix_space": true' in json.dumps(
        state["pre_tokenizer"]
    )
    if is_changed or (state["decoder"] or {}).get("type") != "ByteLevel":
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, i in vocabulary.items():
        lengths[i] = len(token)
    return lengths


def _count_whole(text: str, lengths: np.ndarray, whole: Counter[str], every: Counter[str]) -> None:
    """Add the characters of a text whose tokens have `lengths` (n_tokens,) in bytes."""
    content = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    begins = np.flatnonzero((content & 0xC0) != 0x80)
    assert lengths.sum() == len(content), "the tokens of a byte-level tokenizer are the bytes of the text"
    borders = np.cumsum(lengths)[:-1]
    is_cut = np.zeros(len(text), dtype=bool)
    is_cut[np.searchsorted(begins, borders[~np.isin(borders, begins)], side="right") - 1] = True
    every.update(text)
    whole.update(character for character, cut in zip(text, is_cut.tolist(), strict=True) if not cut)


def _on_sentences(
    backend: Tokenizer, parallel: Mapping[str, Sequence[str]], reference: str
) -> list[Measurement]:
    n_tokens = {
        code: np.array(
            [len(each.ids) for each in backend.encode_batch(list(lines), add_special_tokens=False)]
        )
        for code, lines in parallel.items()
    }
    n = len(n_tokens[reference])

    def ratio(name: str, unit: str, numerators: np.ndarray, denominators: np.ndarray) -> Measurement:
        value = float(numerators.sum() / denominators.sum())
        return Measurement(name, value, unit, n, ratio_stderr(numerators, denominators), "parallel", False)

    found = [
        ratio(f"tokens_per_sentence/{code}", "tokens/sentence", of, np.ones(n))
        for code, of in n_tokens.items()
    ]
    found += [
        ratio(f"tokenization_premium/{code}", "1", of, n_tokens[reference])
        for code, of in n_tokens.items()
        if code != reference
    ]
    return found
