"""Text by language: what a person may say of it, where each language's documents stand, and how often they
are read.

The documents of a split stand language by language, in the order in which the languages were named. So how
many each has tells where they are, and the report on a corpus says it:
`report["languages"][code]["train"]["documents"]`.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.text.store import Documents

# RFC 5646, section 2.1: language, script, region and variants, each in its usual case so that a language has
# one name; extensions and private use left out
_CODE = re.compile(
    r"[a-z]{2,3}(?:-[A-Z][a-z]{3})?(?:-(?:[A-Z]{2}|[0-9]{3}))?(?:-(?:[a-z0-9]{5,8}|[0-9][a-z0-9]{3}))*"
)


def check_languages(recipe: CorpusRecipe) -> None:
    """
    Raises:
        UserError: fields of the corpus section about languages that do not fit each other.
    """
    known = recipe.languages
    for field, stated in (("languages", known), ("parallel", recipe.parallel)):
        for code in stated:
            _check_code(f"corpus.{field}", code)
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
    """Sources by language, of words `CODE=SOURCE` that name each of `languages`.

    Raises:
        UserError: a word names none of them, or one of them is missing.
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
    """Where the documents of each language stand, from how many each has."""
    stops = np.cumsum(list(counts.values())).tolist()
    return {code: slice(stop - n, stop) for (code, n), stop in zip(counts.items(), stops, strict=True)}


def counts_after(counts: Mapping[str, int], kept: np.ndarray) -> dict[str, int]:
    """How many documents of each language are left by a mask (n,).

    Raises:
        UserError: none of one.
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
    """By language, of each split {documents, bytes, characters}, and how it is read in training: `share`,
    `repeats` and `byte_premium` of `balance`."""
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
    """(shares, repeats): how much of what is read is of each language, and how often its text is read when
    all text is read once on the average.

    The size of a language is its content n_l, bytes over byte premium; its share of the content that is read
    is p_l ~ n_l^(1/T) (Conneau and Lample, 2019, Cross-lingual language model pretraining, with alpha = 1/T =
    0.5; multilingual BERT has 0.7, XLM-R 0.3). T = 1 repeats nothing, whatever the premiums; at a large T
    every language has as much content, not as many bytes. The byte premium of a language is what its text
    needs in UTF-8 bytes relative to another language for the same content (Arnett, Chang and Bergen, 2024, A
    bit of a problem: measurement disparities in dataset sizes across languages); which other one does not
    matter here.
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
    """The byte premium of each language: as stated, or measured on the parallel text, else 1."""
    if recipe.byte_premiums:
        return {code: recipe.byte_premiums.get(code, 1.0) for code in recipe.languages}
    if not recipe.parallel:
        return dict.fromkeys(recipe.languages, 1.0)
    n_bytes = {code: sum(map(_n_bytes, lines)) for code, lines in read_parallel(recipe).items()}
    reference = n_bytes[reference_of(n_bytes)]
    return {code: n_bytes.get(code, reference) / reference for code in recipe.languages}


def read_parallel(recipe: CorpusRecipe) -> dict[str, list[str]]:
    """The sentences of each language of `corpus.parallel`, equally many; those empty in one are left out of
    all.

    Raises:
        UserError: a file that cannot be read, or not as many lines as the others.
    """
    lines: dict[str, list[str]] = {}
    for code, name in recipe.parallel.items():
        try:
            text = Path(name).expanduser().read_text(encoding=recipe.encoding)
        except (OSError, ValueError) as error:
            raise UserError(
                f"corpus.parallel: {name!r} cannot be read ({error}): name a file of text, a sentence a line"
            ) from error
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
    """The languages whose parallel text is also one of the `files` that are trained on, by its hash."""
    hashes = {file["sha256"] for file in files}

    def is_trained_on(name: str) -> bool:
        path = Path(name).expanduser()
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() in hashes

    return [code for code, name in recipe.parallel.items() if is_trained_on(name)]


def reference_of(codes: Mapping[str, Any]) -> str:
    """The language that the others are compared with: English where it is among them, else the first."""
    return next((code for code in codes if code.partition("-")[0] in ("eng", "en")), next(iter(codes)))


def _check_code(field: str, code: str) -> None:
    if not _CODE.fullmatch(code):
        raise UserError(
            f"{field}: {code!r} is no language code: write one of ISO 639 or BCP 47, as fra, pt-BR or zh-Hans"
        )


def _n_bytes(line: str) -> int:
    return len(line.encode("utf-8"))
