"""Languages in other shares than the text has them: for the tokenizer, and in the rows that training sees."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.text.corpus import cut
from hf_genlm.text.encoding import TokenizedDocuments
from hf_genlm.text.languages import spans
from hf_genlm.text.packing import PackedRows
from hf_genlm.text.store import Documents

_BLOCK_CHARACTERS = 500  # a part of a text is taken in blocks of so many
_LEAST_BLOCKS, _MOST_BLOCKS = (
    32,
    1 << 14,
)  # of a language: in a small text they are shorter, in a large one longer


def repeat_documents(
    documents: Documents, counts: Mapping[str, int], repeats: Mapping[str, float]
) -> Documents:
    """The documents of each language `repeats` times: whole, and for what is left of a whole number blocks
    that are spread evenly over the text. Nothing is copied."""
    parts = []
    for code, span in spans(counts).items():
        of_language = documents[span]
        n_whole, rest = divmod(repeats[code], 1)
        parts += [of_language] * int(n_whole)
        if rest > 0:
            parts.append(_evenly(of_language, rest))
    return Documents.join(parts)


def repeats_of(languages: Mapping[str, Mapping[str, Any]]) -> dict[str, float] | None:
    """How often each language is read when all text is read once, as corpus.json has it; None: all alike."""
    repeats = {code: of_language["repeats"] for code, of_language in languages.items()}
    return None if all(n == 1 for n in repeats.values()) else repeats


def balanced_text(documents: Documents, languages: Mapping[str, Mapping[str, Any]]) -> Documents:
    """The training documents, each language as often as corpus.json says."""
    repeats = repeats_of(languages)
    if repeats is None:
        return documents
    counts = {code: of_language["train"]["documents"] for code, of_language in languages.items()}
    return repeat_documents(documents, counts, repeats)


def _evenly(documents: Documents, fraction: float) -> Documents:
    """About `fraction` of the bytes, in blocks that end at line ends."""
    n_characters = documents.n_characters
    length = max(1, n_characters // _MOST_BLOCKS, min(_BLOCK_CHARACTERS, n_characters // _LEAST_BLOCKS))
    blocks = [
        block
        for i in range(len(documents))
        for block in cut(documents, i, length, max(length, _BLOCK_CHARACTERS))
    ]
    index, starts, stops, characters = np.array(blocks, dtype=np.int64).T
    taken = np.zeros(len(blocks), dtype=bool)
    n_passed = n_taken = 0
    for i, size in enumerate((stops - starts).tolist()):
        n_passed += size
        taken[i] = abs(n_taken + size - fraction * n_passed) < abs(n_taken - fraction * n_passed)
        n_taken += size * bool(taken[i])
    return Documents(
        documents.store,
        starts[taken],
        stops[taken],
        characters[taken],
        documents.sources,
        documents.source_ids[index[taken]],
    )


class BalancedRows:
    """Rows of one language each, and the order in which a pass reads them: some again, others not at all.

    A pass has as many rows as the text, R_l repeats_l of them of language l, which has R_l, but for rounding.
    Pass after pass they are taken from one endless walk over all rows of the language, in another seeded
    order each time: none is read twice more than another.

    Items are those of `PackedRows`; a row is filled up at the end of a language, not of the text alone.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        counts: Mapping[str, int],
        repeats: Mapping[str, float],
        max_seq_length: int,
        eos_id: int,
        pad_id: int,
    ):
        """
        Raises:
            UserError: a language has less text than a row.
        """
        self.max_seq_length = max_seq_length
        self.parts: dict[str, PackedRows] = {}
        for code, span in spans(counts).items():
            of_language = documents[span]
            if of_language.n_tokens + len(of_language) + 1 < max_seq_length:
                raise UserError(
                    f"training.max_seq_length = {max_seq_length}: the text of {code!r} has less than one "
                    f"row, {of_language.n_tokens} tokens; give more of it, or a smaller max_seq_length"
                )
            self.parts[code] = PackedRows(of_language, max_seq_length, eos_id, pad_id)
        self._n_rows = np.array([len(part) for part in self.parts.values()])
        self._stops = np.cumsum(self._n_rows)
        wanted = self._n_rows * np.array([repeats[code] for code in self.parts])
        self.rows_of_a_pass = _rounded(wanted, int(self._stops[-1]))  # (L,)

    @property
    def n_targets(self) -> int:
        """Labels of all rows once."""
        return sum(part.n_targets for part in self.parts.values())

    @property
    def n_rows(self) -> int:
        """Rows of one pass, and of the text."""
        return int(self._stops[-1])

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """A whole batch: each value (B, T) int64."""
        chosen = range(len(self))
        index_B = np.array([chosen[index] for index in indices], dtype=np.int64)
        language_B = np.searchsorted(self._stops, index_B, side="right")
        row_B = index_B - (self._stops - self._n_rows)[language_B]
        names, shape = ("input_ids", "position_ids", "labels"), (len(index_B), self.max_seq_length)
        batch = {name: np.empty(shape, dtype=np.int64) for name in names}
        for number, part in enumerate(self.parts.values()):
            here = np.flatnonzero(language_B == number)
            if len(here):
                for name, values in part.__getitems__(row_B[here]).items():
                    batch[name][here] = values
        return batch

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """(n_rows,) row numbers: those of pass `epoch` (from 0), mixed."""
        found = []
        begins = self._stops - self._n_rows
        for number, (n, n_wanted) in enumerate(zip(self._n_rows, self.rows_of_a_pass, strict=True)):
            first, stop = epoch * n_wanted, (epoch + 1) * n_wanted
            walks = range(int(first // n), int(-(-stop // n)))
            walk = [np.random.default_rng((seed, number, k)).permutation(n) for k in walks]
            rows = np.concatenate([np.zeros(0, dtype=np.int64), *walk])
            found.append(begins[number] + rows[first - walks.start * n : stop - walks.start * n])
        return np.random.default_rng((seed, len(found), epoch)).permutation(np.concatenate(found))

    def first_tokens(self, count: int) -> np.ndarray:
        """About `count` tokens of the streams of all languages, each in its share of a pass; a short one
        begins again."""
        count = min(count, self.n_targets)
        parts = []
        for part, n in zip(self.parts.values(), self.rows_of_a_pass, strict=True):
            n_wanted = int(count * n // self.n_rows)
            parts.append(np.resize(part.first_tokens(n_wanted), n_wanted))
        return np.concatenate(parts)


def _rounded(wanted: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers, none below 1, in the proportions of `wanted` (L,) and of the sum `total`: those with the
    largest remainders are rounded up."""
    exact = wanted / wanted.sum() * total
    found = np.maximum(1, np.floor(exact)).astype(np.int64)
    while found.sum() != total:
        step = 1 if found.sum() < total else -1
        behind = np.where((step > 0) | (found > 1), step * (exact - found), -np.inf)
        found[behind.argmax()] += step
    return found
