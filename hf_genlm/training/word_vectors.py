"""Initialization of the embedding from a file of word vectors: the vector of each token, and a report.

Each token has one kind. exact: its text, with or without its leading space, is a word of the file. case: its
text is a word of the file after changing its case. composed: it is a piece of words of the training text, and
gets the mean of their vectors, weighted by word frequency. drawn: all other tokens, special tokens included,
are drawn from the normal distribution of the others.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex

from hf_genlm.config.settings import Settings
from hf_genlm.errors import UserError
from hf_genlm.files import write_json
from hf_genlm.run_folder import RunFolder
from hf_genlm.run_schemas import VectorsFile
from hf_genlm.text.encoding import encode_texts, pieces
from hf_genlm.text.store import Document, as_documents
from hf_genlm.text.vector_files import WordVectors, read_vectors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from hf_genlm.model import GenLMForCausalLM

KINDS = ("exact", "case", "composed", "drawn")
EXACT, CASE, COMPOSED, DRAWN = range(4)
MAX_WORDS = 200_000  # of the training text, the most frequent ones
_MAX_WORD_CHARACTERS = 64  # longer runs of letters are no words of a vector file
_COUNTED_AT_ONCE = 1_000_000  # token ids
_ENCODE_BATCH = 10_000  # words encoded by one call
# letters and the marks on them, of any script: `\w` knows no marks, without which Indic words fall apart
_WORD = regex.compile(r" ?[\p{L}\p{Nl}\p{No}]+(?:\p{M}+[\p{L}\p{Nl}\p{No}]*)*")


def count_words(documents: Iterable[Document], max_words: int = MAX_WORDS) -> dict[str, int]:
    """Count the words of a text; returns the `max_words` most frequent, most frequent first.

    A word is a letter and the letters and marks that follow it, of any script, with one leading space.
    Without it, as at the start of a line, the word has other tokens and is counted separately. In a text of
    very many words, those that are rare at its start may be missed.
    """
    counts: Counter[str] = Counter()
    for _, piece in pieces(as_documents(documents)):
        counts.update(_WORD.findall(piece))
        if len(counts) > 4 * max_words:
            counts = _most_common(counts, 2 * max_words)
    return dict(_most_common(counts, max_words))


def token_texts(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Return the text of every token id; empty for special tokens and parts of a character."""
    ids = [[token] for token in range(len(tokenizer))]
    texts = tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    special = set(tokenizer.all_special_ids)
    return ["" if i in special or "\ufffd" in text else text for i, text in enumerate(texts)]


def wanted_words(tokenizer: "PreTrainedTokenizerFast", counts: Mapping[str, int]) -> set[str]:
    """Return every word whose vector `token_vectors` can use."""
    spellings = {word for text in token_texts(tokenizer) for _, word in _spellings(text)}
    words = {spaced.removeprefix(" ") for spaced in counts}
    return spellings | words | {word.lower() for word in words}


def token_vectors(
    tokenizer: "PreTrainedTokenizerFast",
    words: Mapping[str, int],
    vectors: np.ndarray,
    counts: Mapping[str, int],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (table (V, D) float32, kind (V,) an index into KINDS), in the scale of the file.

    Drawn rows have the mean and covariance of the other rows, or of all `vectors` where the other rows are
    fewer than D.

    Args:
        words: the row of each word in `vectors` (n, D).
        counts: the result of `count_words`.
        seed: of the drawn rows.

    Raises:
        UserError: no token finds a vector.
    """
    texts = token_texts(tokenizer)
    table = np.zeros((len(texts), vectors.shape[1]), dtype=np.float32)
    kind = np.full(len(texts), DRAWN, dtype=np.int64)
    for token, text in enumerate(texts):
        found = next(((k, words[word]) for k, word in _spellings(text) if word in words), None)
        if found is not None:
            kind[token], table[token] = found[0], vectors[found[1]]
    means, weights = _means_of_words(tokenizer, words, vectors, counts)
    composed = (kind == DRAWN) & (weights > 0)
    composed[tokenizer.all_special_ids] = False
    kind[composed], table[composed] = COMPOSED, means[composed]
    is_found = kind != DRAWN
    if not is_found.any():
        raise UserError(
            f"none of the {len(texts):,} tokens has a word vector, nor do words of the training text: "
            "name vectors of the text's language"
        )
    sample = table[is_found] if is_found.sum() > vectors.shape[1] else vectors
    table[~is_found] = draw_like(sample, int((~is_found).sum()), seed)
    return table, kind


def scaled(table: np.ndarray, root_mean_square: float) -> np.ndarray:
    """Scale `table` to this root mean square of all entries, by one factor: directions are kept.

    Raises:
        UserError: all entries are zero.
    """
    now = float(np.sqrt(np.mean(np.square(table, dtype=np.float64))))
    if now == 0.0:
        raise UserError("the word vectors of all tokens are zero: name another file")
    return table * np.float32(root_mean_square / now)


def start_from_vectors(
    run: RunFolder,
    model: "GenLMForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    counts: Mapping[str, int],
    ids: np.ndarray,
    settings: Settings,
) -> np.ndarray:
    """Write the word vectors of a recipe into the model's embedding; reports to the log and to vectors.json.

    `counts` and `ids` (n,) are the words and the token ids of the training text.

    Returns:
        (V,) whether the token was given a vector, not a draw.

    Raises:
        UserError: the file is damaged or of no use for this text.
    """
    import torch

    def on_progress(done: int, total: int) -> None:
        run.tell("progress", task="word vectors", done=done, total=total)

    path = settings.vectors.path
    assert path is not None
    wanted = wanted_words(tokenizer, counts)
    read = read_vectors(path, wanted, settings.vectors.damaged, on_progress)
    weight = model.model.embed_tokens.weight
    if read.vectors.shape[1] != weight.shape[1]:
        raise UserError(f"{path!r} has changed since the run began: start it again")
    table, kind = token_vectors(tokenizer, read.words, read.vectors, counts, settings.training.seed)
    table = scaled(table, model.config.initializer_range)
    with torch.no_grad():
        weight.copy_(torch.from_numpy(table))
    report = coverage(read, kind, ids, Path(path).name)
    report |= {"frozen": settings.vectors.frozen, "unfreeze_step": settings.vectors.unfreeze_step}
    write_json(run.vectors, report, VectorsFile)
    run.log("vectors", **report)
    return kind != DRAWN


def coverage(read: WordVectors, kind: np.ndarray, ids: np.ndarray, file: str) -> dict[str, Any]:
    """Return the content of vectors.json: the number of tokens of each kind, and their share of `ids`."""
    counts = np.zeros(len(kind), dtype=np.int64)
    for start in range(0, len(ids), _COUNTED_AT_ONCE):
        counts += np.bincount(ids[start : start + _COUNTED_AT_ONCE], minlength=len(kind))
    occurrences = np.bincount(kind, weights=counts, minlength=len(KINDS))
    n_tokens = np.bincount(kind, minlength=len(KINDS))
    return {
        "file": file,
        "sha256": read.sha256,
        "dimension": read.vectors.shape[1],
        "words": {"read": read.n_in_file, "kept": len(read.words), "skipped": read.n_skipped},
        "tokens": {name: int(n) for name, n in zip(KINDS, n_tokens, strict=True)},
        "share_of_text": {
            name: round(float(n) / max(1, len(ids)), 5) for name, n in zip(KINDS, occurrences, strict=True)
        },
    }


def _spellings(text: str) -> Iterator[tuple[int, str]]:
    """Yield (kind, word) for the words that a token of this text may be, best first."""
    bare = text.removeprefix(" ")
    if bare:
        yield EXACT, text
        yield EXACT, bare
        for word in (bare.lower(), bare.capitalize(), bare.upper()):
            yield CASE, word


def _means_of_words(
    tokenizer: "PreTrainedTokenizerFast",
    words: Mapping[str, int],
    vectors: np.ndarray,
    counts: Mapping[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Return (means (V, D), weights (V,)) over the counted words with a vector that contain the token."""
    known = []
    for spaced in counts:
        bare = spaced.removeprefix(" ")
        row = words.get(bare, words.get(bare.lower()))
        if row is not None:
            known.append((spaced, row))
    tokens: list[int] = []
    rows: list[int] = []
    weights: list[int] = []
    for start in range(0, len(known), _ENCODE_BATCH):
        batch = known[start : start + _ENCODE_BATCH]
        encoded = encode_texts(tokenizer, [spaced for spaced, _ in batch])
        for (spaced, row), ids in zip(batch, encoded, strict=True):
            pieces = set(ids)
            tokens += pieces
            rows += [row] * len(pieces)
            weights += [counts[spaced]] * len(pieces)
    size = len(tokenizer)
    total = np.bincount(np.array(tokens, dtype=np.int64), weights=weights, minlength=size)
    sums = np.zeros((size, vectors.shape[1]))
    for column in range(vectors.shape[1]):
        weighted = np.array(weights) * vectors[np.array(rows, dtype=np.int64), column]
        sums[:, column] = np.bincount(np.array(tokens, dtype=np.int64), weights=weighted, minlength=size)
    return sums / np.maximum(total, 1)[:, None], total


def draw_like(sample: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw (count, D) from the normal distribution with the mean and covariance of `sample` (n, D)."""
    mean = sample.mean(axis=0, dtype=np.float64)
    centred = sample - mean
    variances, directions = np.linalg.eigh(centred.T @ centred / len(sample))
    # rounding can make a zero variance slightly negative
    spread = directions * np.sqrt(np.maximum(variances, 0.0))
    return mean + np.random.default_rng(seed).standard_normal((count, len(mean))) @ spread.T


def _most_common(counts: Counter[str], n: int) -> Counter[str]:
    words = Counter({word: count for word, count in counts.items() if len(word) <= _MAX_WORD_CHARACTERS})
    return Counter(dict(words.most_common(n)))
