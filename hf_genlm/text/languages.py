"""Text by language: checks of the recipe, positions and counts, byte premiums, and balanced training rows.

The documents of a split are ordered by language, as the languages were named. So the number of documents of
each language, `report["languages"][code]["train"]["documents"]` in the report on a corpus, gives their
positions.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.files import open_text, sha256_of
from hf_genlm.text.encoding import TokenizedDocuments
from hf_genlm.text.packing import PackedRows
from hf_genlm.text.store import Documents, cut_blocks

_MAX_PARALLEL = 1 << 24  # bytes of a parallel text, whose lines are held in memory
_BLOCK_CHARACTERS = 500  # a fraction of a text is taken in blocks of this length
_MIN_BLOCKS, _MAX_BLOCKS = (
    32,
    1 << 14,
)  # of a language: in a small text blocks are shorter, in a large one longer

# bytes of an English word, as BabyLM's multilingual track counts its 100 million words (Jumelet et al., 2025,
# BabyBabelLM): a word of another language has as many times its byte premium
BYTES_PER_WORD = 5.43
# language -> (its script, which has no spaces between words; byte premium to English: the table of Arnett,
# Chang and Bergen, 2024). Kana tell Japanese from Chinese.
_UNSPACED = {
    "zho": ("\u2e80-\u2fff\u3001-\u303f\u3105-\u312f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
            "\U00020000-\U0003ffff", 0.936),
    "jpn": ("\u3041-\u30ff\u31f0-\u31ff", 1.322),
    "tha": ("\u0e01-\u0e4e", 2.742), "lao": ("\u0e81-\u0ecd", 2.707), "khm": ("\u1780-\u17d3", 3.903),
    "mya": ("\u1000-\u104f\ua9e0-\ua9fe\uaa60-\uaa7f", 5.104), "bod": ("\u0f00-\u0fbc", 2.617),
}  # fmt: skip
_SCRIPTS = {code: re.compile(f"[{characters}]+") for code, (characters, _) in _UNSPACED.items()}
_ANY_UNSPACED = re.compile(f"[{''.join(characters for characters, _ in _UNSPACED.values())}]+")
_MIN_KANA = 0.1  # of the bytes of Japanese

# RFC 5646, section 2.1: language, script, region and variants, each in its usual case so that a language has
# one name; without extensions and private use
_CODE = re.compile(
    r"[a-z]{2,3}(?:-[A-Z][a-z]{3})?(?:-(?:[A-Z]{2}|[0-9]{3}))?(?:-(?:[a-z0-9]{5,8}|[0-9][a-z0-9]{3}))*"
)


def check_languages(recipe: CorpusRecipe) -> None:
    """
    Raises:
        UserError: fields of the corpus section about languages contradict each other.
    """
    known = recipe.languages
    for field, stated in (("languages", known), ("parallel", recipe.parallel)):
        for code in stated:
            if not _CODE.fullmatch(code):
                raise UserError(
                    f"corpus.{field}: {code!r} is no language code: write one of ISO 639 or BCP 47, as fra, "
                    "pt-BR or zh-Hans"
                )
    if known and recipe.sources:
        raise UserError(
            f"{recipe.sources[0]!r} names no language and {next(iter(known))!r} is one: name every source's "
            "language by --source CODE=SOURCE, or none"
        )
    if not known and (recipe.temperature != 1 or recipe.byte_premiums):
        raise UserError(
            f"corpus.temperature = {recipe.temperature:g} and corpus.byte_premiums are for languages: name "
            "their sources by --source CODE=SOURCE"
        )
    for code in recipe.byte_premiums:
        if code not in known:
            raise UserError(f"corpus.byte_premiums has {code!r}, no language here{did_you_mean(code, known)}")
    sized = recipe.byte_premiums or recipe.parallel
    missing = [code for code in known if code not in sized] if sized and recipe.temperature != 1 else []
    if missing:
        where = "corpus.byte_premiums" if recipe.byte_premiums else "corpus.parallel"
        raise UserError(
            f"{where} has nothing of {missing[0]!r}: balancing takes the premiums of all or of none; add it"
        )
    if known and recipe.stream:
        raise UserError(
            "--stream cannot balance or measure languages: leave it out, or name sources without languages "
            "and mix them by corpus.weights"
        )


def by_language(words: Sequence[str], languages: Mapping[str, Any]) -> dict[str, list[str]]:
    """Parse words `CODE=SOURCE` into sources by language.

    Raises:
        UserError: a word names none of `languages`, or one of them has no word.
    """
    found: dict[str, list[str]] = {code: [] for code in languages}
    for word in words:
        code, equals, source = word.partition("=")
        if not equals or code not in found:
            raise UserError(
                f"--validation {word!r} names no language of the sources ({', '.join(languages)}): write "
                f"CODE=FILE, as {next(iter(languages))}=FILE"
            )
        found[code].append(source)
    for code, sources in found.items():
        if not sources:
            raise UserError(f"--validation has nothing of {code!r}: add --validation {code}=FILE")
    return found


def spans(counts: Mapping[str, int]) -> dict[str, slice]:
    """Positions of the documents of each language, from their numbers."""
    stops = np.cumsum(list(counts.values())).tolist()
    return {code: slice(stop - n, stop) for (code, n), stop in zip(counts.items(), stops, strict=True)}


def counts_after(counts: Mapping[str, int], kept: np.ndarray) -> dict[str, int]:
    """Documents of each language that a mask (n,) keeps.

    Raises:
        UserError: a language has none left.
    """
    left = {code: int(kept[part].sum()) for code, part in spans(counts).items()}
    for code, n in left.items():
        if n == 0:
            raise UserError(
                f"no training text of {code!r} is left: all of it stands in the validation split too; add "
                "other text of it"
            )
    return left


def report_on(
    recipe: CorpusRecipe, splits: Mapping[str, tuple[Documents, Mapping[str, int]]]
) -> dict[str, dict[str, Any]]:
    """By language: {documents, bytes, characters} of each split, and `share`, `repeats` and `byte_premium` of
    `balance`, which say how it is read in training."""
    report: dict[str, dict[str, Any]] = {code: {} for code in recipe.languages}
    for name, (documents, counts) in splits.items():
        for code, span in spans(counts).items():
            part = documents[span]
            report[code][name] = {
                "documents": len(part),
                "bytes": int(part.n_bytes.sum()),
                "characters": part.n_characters,
            }
    premiums = premiums_of(recipe)
    balanced = balance(
        [of["train"]["bytes"] for of in report.values()],
        [premiums[code] for code in report],
        recipe.temperature,
    )
    for code, share, repeats in zip(report, *balanced, strict=True):
        report[code] |= {"share": share, "repeats": repeats, "byte_premium": premiums[code]}
    return report


def balance(
    n_bytes: Sequence[int], premiums: Sequence[float], temperature: float
) -> tuple[list[float], list[float]]:
    """(shares, repeats): the share of each language in an epoch, and how often its text is read while all
    text is read once on average.

    The size of a language is its content n_l, bytes over byte premium; its share of the content of an epoch
    is p_l ~ n_l^(1/T) (Conneau and Lample, 2019, Cross-lingual language model pretraining, with alpha = 1/T =
    0.5; multilingual BERT has 0.7, XLM-R 0.3). T = 1 repeats nothing, whatever the premiums; at a large T
    all languages have equal content, not equal bytes. The byte premium of a language is the UTF-8 bytes that
    its text needs relative to another language for the same content (Arnett, Chang and Bergen, 2024, A bit of
    a problem: measurement disparities in dataset sizes across languages); any common reference gives the
    same balance.
    """
    size = np.asarray(n_bytes, dtype=np.float64)
    premium = np.asarray(premiums, dtype=np.float64)
    shares = np.exp(np.log(size / premium) / temperature)
    shares /= shares.sum()
    wanted = shares * premium  # bytes, up to a factor
    repeats = wanted / size * (size.sum() / wanted.sum())
    if temperature == 1:
        repeats = np.ones_like(size)  # exactly
    return shares.tolist(), repeats.tolist()


def premiums_of(recipe: CorpusRecipe) -> dict[str, float]:
    """Byte premium of each language: stated, or measured on the parallel text, else 1."""
    if recipe.byte_premiums:
        return {code: recipe.byte_premiums.get(code, 1.0) for code in recipe.languages}
    if not recipe.parallel:
        return dict.fromkeys(recipe.languages, 1.0)
    n_bytes = {
        code: sum(len(line.encode("utf-8")) for line in lines)
        for code, lines in read_parallel(recipe).items()
    }
    reference = n_bytes[reference_of(n_bytes)]
    return {code: n_bytes.get(code, reference) / reference for code in recipe.languages}


def read_parallel(recipe: CorpusRecipe) -> dict[str, list[str]]:
    """Sentences of each language of `corpus.parallel`, equally many; a line that is empty in one language is
    left out of all.

    Raises:
        UserError: a file cannot be read, or has more or fewer lines than the others.
    """
    lines: dict[str, list[str]] = {}
    for code, name in recipe.parallel.items():
        try:
            with open_text(Path(name).expanduser(), recipe.encoding) as file:
                text = file.read(_MAX_PARALLEL + 1)
            if len(text) > _MAX_PARALLEL:
                raise ValueError(f"it has more than {_MAX_PARALLEL:,} characters")
        except (OSError, ValueError) as error:
            raise UserError(
                f"corpus.parallel: {name!r} cannot be read ({error}): name a file of text, a sentence a line"
            ) from error
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        lines[code] = [line.strip() for line in text.removesuffix("\n").split("\n")]
    lengths = {code: len(found) for code, found in lines.items()}
    if len(set(lengths.values())) > 1:
        least, most = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
        raise UserError(
            f"corpus.parallel: {least!r} has {lengths[least]:,} lines and {most!r} {lengths[most]:,}; line i "
            "of each must be the same sentence"
        )
    whole = [i for i, each in enumerate(zip(*lines.values(), strict=True)) if all(each)]
    if lines and not whole:
        raise UserError("corpus.parallel: no line has text in every language: put a sentence in each")
    return {code: [found[i] for i in whole] for code, found in lines.items()}


def trained_parallel(recipe: CorpusRecipe, files: Sequence[Mapping[str, Any]]) -> list[str]:
    """Languages whose parallel text is also one of the training `files`, by its hash."""
    hashes = {file["sha256"] for file in files}

    def is_trained_on(name: str) -> bool:
        path = Path(name).expanduser()
        return path.is_file() and sha256_of(path) in hashes

    return [code for code, name in recipe.parallel.items() if is_trained_on(name)]


def milestone_words(
    documents: Documents, recipe: CorpusRecipe, counts: Mapping[str, int]
) -> tuple[int, dict[str, float]]:
    """(words, byte premiums by language): the words between white space, and of scripts without it as many as
    their bytes are of English: bytes / (BYTES_PER_WORD byte premium).

    Args:
        counts: documents of each language; a premium that the recipe states or measures for one is used for
            it, else that of the script. Empty: no languages are named.
    """
    stated = premiums_of(recipe) if recipe.byte_premiums or recipe.parallel else {}
    total, used = 0.0, dict[str, float]()
    for code, span in spans(counts or {"": len(documents)}).items():
        part, n_bytes = documents[span], dict.fromkeys(_UNSPACED, 0)
        total += part.total_words(_ANY_UNSPACED)
        for _, text in part.texts():
            if not text.isascii():
                for script, pattern in _SCRIPTS.items():
                    n_bytes[script] += len("".join(pattern.findall(text)).encode("utf-8"))
        if n_bytes["jpn"] > _MIN_KANA * (n_bytes["jpn"] + n_bytes["zho"]):
            n_bytes["jpn"] += n_bytes.pop("zho")
        for script, n in n_bytes.items():
            if n:
                used[code or script] = premium = stated.get(code, _UNSPACED[script][1])
                total += n / (BYTES_PER_WORD * premium)
    return round(total), used


def reference_of(codes: Mapping[str, Any]) -> str:
    """Reference language of comparisons: English if it is among `codes`, else the first."""
    return next((code for code in codes if code.partition("-")[0] in ("eng", "en")), next(iter(codes)))


def repeat_documents(
    documents: Documents, counts: Mapping[str, int], repeats: Mapping[str, float]
) -> Documents:
    """Repeat the documents of each language `repeats` times: whole for the integer part, and for the fraction
    blocks that are spread evenly over the text. No text is copied."""
    parts = []
    for code, span in spans(counts).items():
        of_language = documents[span]
        n_whole, rest = divmod(repeats[code], 1)
        parts += [of_language] * int(n_whole)
        if rest > 0:
            parts.append(_evenly(of_language, rest))
    return Documents.join(parts)


def repeats_of(languages: Mapping[str, Mapping[str, Any]]) -> dict[str, float] | None:
    """`repeats` of each language in corpus.json; None if every language is read once."""
    repeats = {code: of_language["repeats"] for code, of_language in languages.items()}
    return None if all(n == 1 for n in repeats.values()) else repeats


def balanced_text(documents: Documents, languages: Mapping[str, Mapping[str, Any]]) -> Documents:
    """Training documents, each language repeated as corpus.json says."""
    repeats = repeats_of(languages)
    if repeats is None:
        return documents
    counts = {code: of_language["train"]["documents"] for code, of_language in languages.items()}
    return repeat_documents(documents, counts, repeats)


def _evenly(documents: Documents, fraction: float) -> Documents:
    """About `fraction` of the bytes, in blocks that end at line ends."""
    n_characters = documents.n_characters
    length = max(1, n_characters // _MAX_BLOCKS, min(_BLOCK_CHARACTERS, n_characters // _MIN_BLOCKS))
    reach = max(length, _BLOCK_CHARACTERS)
    blocks = [block for i in range(len(documents)) for block in cut_blocks(documents, i, length, reach)]
    taken = []
    n_passed = n_taken = 0
    for block in blocks:
        size = block.stop - block.start
        n_passed += size
        if abs(n_taken + size - fraction * n_passed) < abs(n_taken - fraction * n_passed):
            taken.append(block)
            n_taken += size
    return documents.take_blocks(taken)


class BalancedRows:
    """Rows of one language each, and the order in which an epoch reads them: some repeatedly, some not.

    An epoch has as many rows as the text: R_l repeats_l of language l, which has R_l rows (rounded). Epoch
    after epoch they are taken from one endless walk over all rows of the language, shuffled anew each time:
    no row is read twice more than another.

    Items are those of `PackedRows`; the last row of each language is padded.
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
            UserError: a language has less than one row of text.
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
        self.rows_per_epoch = _rounded(wanted, int(self._stops[-1]))  # (L,)

    @property
    def n_targets(self) -> int:
        """Labels of all rows once."""
        return sum(part.n_targets for part in self.parts.values())

    @property
    def n_rows(self) -> int:
        """Rows of one epoch, and of the text."""
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
        """Row numbers (n_rows,) of `epoch` (from 0), shuffled."""
        found = []
        begins = self._stops - self._n_rows
        for number, (n, n_wanted) in enumerate(zip(self._n_rows, self.rows_per_epoch, strict=True)):
            first, stop = epoch * n_wanted, (epoch + 1) * n_wanted
            walks = range(int(first // n), int(-(-stop // n)))
            walk = [np.random.default_rng((seed, number, k)).permutation(n) for k in walks]
            rows = np.concatenate([np.zeros(0, dtype=np.int64), *walk])
            found.append(begins[number] + rows[first - walks.start * n : stop - walks.start * n])
        return np.random.default_rng((seed, len(found), epoch)).permutation(np.concatenate(found))

    def first_tokens(self, count: int) -> np.ndarray:
        """About `count` tokens from the beginnings of all languages, in their shares of an epoch; a short
        one is repeated."""
        count = min(count, self.n_targets)
        parts = []
        for part, n in zip(self.parts.values(), self.rows_per_epoch, strict=True):
            n_wanted = int(count * n // self.n_rows)
            parts.append(np.resize(part.first_tokens(n_wanted), n_wanted))
        return np.concatenate(parts)


def _rounded(wanted: np.ndarray, total: int) -> np.ndarray:
    """Round `wanted` (L,), scaled to the sum `total`, to integers of at least 1 with that sum, by the largest
    remainders."""
    exact = wanted / wanted.sum() * total
    found = np.maximum(1, np.floor(exact)).astype(np.int64)
    while found.sum() != total:
        step = 1 if found.sum() < total else -1
        behind = np.where((step > 0) | (found > 1), step * (exact - found), -np.inf)
        found[behind.argmax()] += step
    return found
