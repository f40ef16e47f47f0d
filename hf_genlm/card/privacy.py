"""Privacy in words, for the card and the command line: the guarantee of training, the results of an audit.

Every sentence is made from measurements, and says what chance alone would give.
"""

import math
import re
from collections.abc import Sequence

from hf_genlm.config.recipe import Recipe
from hf_genlm.evaluation.measurement import STORED, Measurement, read_measurements
from hf_genlm.files import read
from hf_genlm.report.audit_plot import AUDIT_FILE
from hf_genlm.report.document import Markdown, cell, cells, prose
from hf_genlm.run_folder import RunFolder
from hf_genlm.run_schemas import CorpusFile, GuaranteeFile, PlantedCounts, ScrubbedCounts, SplitCounts

SIGNIFICANT = 0.01
NULL_BITS = math.log2(math.e)  # mean exposure of a secret that was never seen
LIMITS = (
    "An audit is a lower bound: stronger attacks may find more, and what it does not find is not safe for "
    "that. It is about these canaries and passages on average, not about the worst document."
)
_ROUNDED = ("sampling rate", "noise multiplier")  # more digits would determine the number of documents
_HIDDEN = "private text"
_EXTRACTION = re.compile(r"extraction_(\d{1,9})_tokens/prefix_(\d{1,9})")
_REPETITIONS = re.compile(r"\d{1,9}")
# field of privacy.json -> its name on the card
_GUARANTEE = {
    "unit": "protected unit",
    "sampling_rate": "sampling rate",
    "noise_multiplier": "noise multiplier",
    "clip_norm": "clipping norm",
    "steps": "steps",
    "accountant": "accountant",
}


def hides_figures(run: RunFolder, recipe: Recipe) -> bool:
    """True if exact figures of a private run must not leave its folder: `card.private_figures` is false."""
    is_private = recipe.privacy.epsilon is not None or run.privacy.is_file()
    return is_private and not recipe.card.private_figures


def without_figures(recipe: Recipe, corpus: CorpusFile) -> tuple[Recipe, CorpusFile]:
    """A recipe without names of sources, and what corpus.json says of the method alone: no name, count or
    hash of the text."""
    recipe = recipe.model_copy(deep=True)
    reading = recipe.corpus
    reading.sources, reading.validation = [_HIDDEN], [_HIDDEN] * bool(reading.validation)
    reading.languages = {code: [_HIDDEN] for code in reading.languages}
    reading.parallel = dict.fromkeys(reading.parallel, _HIDDEN)
    nothing = SplitCounts(None, None)
    scrubbed = None
    if corpus.scrubbed is not None:
        scrubbed = ScrubbedCounts(dict.fromkeys(corpus.scrubbed.types), None)
    return recipe, CorpusFile(_HIDDEN, [], corpus.split, nothing, nothing, scrubbed=scrubbed)


def is_of_public_text(measurement: Measurement) -> bool:
    """True for a benchmark: it reads neither split of the run's own text."""
    return measurement.name.startswith("minimal_pairs_accuracy") or ":" in measurement.split


def privacy_section(run: RunFolder, shows_audit: bool = True) -> Markdown | None:
    """Render the card's section as Markdown; None if there is neither a guarantee, an audit nor a canary.

    Raises:
        UserError: a file of the run is damaged.
    """
    parts: list[str] = []
    guarantee = read(run.privacy, GuaranteeFile) if run.privacy.is_file() else None
    if guarantee is not None:
        parts += _describe_guarantee(guarantee)
    planted = read(run.corpus, CorpusFile).canaries if run.corpus.is_file() else None
    if planted is not None:
        parts.append(_describe_canaries(planted))
    if run.audit.is_file() and shows_audit:
        measured = read_measurements(run.audit)
        parts.append("\n".join(f"- {prose(sentence)}" for sentence in describe_audit(measured, guarantee)))
        if (run.model / AUDIT_FILE).is_file():
            parts.append(f"![Results of the audit, described above]({AUDIT_FILE})")
        rows = ["| measurement | value | 95 % interval | n | unit | on |", "|---|---|---|---|---|---|"]
        for m in measured:
            ends = "" if m.interval is None else f"{m.interval[0]:.4g} to {m.interval[1]:.4g}"
            row = (m.name, f"{m.value:.4g}", ends, f"{m.n:,}", m.unit, m.split)
            rows.append(f"| {cells(row)} |")
        parts += ["\n".join(rows), LIMITS]
    return Markdown("\n\n".join(parts)) if parts else None


def _describe_guarantee(guarantee: GuaranteeFile) -> list[str]:
    head = (
        f"Trained with differential privacy: epsilon = {guarantee.epsilon:.4g} at delta = "
        f"{guarantee.delta:.3g} for each {guarantee.unit}."
    )
    shown = {title: getattr(guarantee, name) for name, title in _GUARANTEE.items()}
    shown |= {title: f"{shown[title]:.2g}" for title in _ROUNDED if shown[title]}
    rows = [f"| {title} | {cell(value)} |" for title, value in shown.items() if value is not None]
    lists = (("The guarantee covers", guarantee.covered), ("It does not cover", guarantee.not_covered))
    sentences = [f"{title}: {prose('; '.join(items))}." for title, items in lists if items]
    return [prose(head), "\n".join(["| | |", "|---|---|", *rows]), *sentences]


def _describe_canaries(planted: PlantedCounts) -> str:
    counts = ", ".join(f"{n} planted {_times(k)}" for k, n in planted.planted_by_repetitions.items() if n)
    return (
        f"The training text holds {planted.documents:,} documents that are not from the sources: copies of "
        f"{planted.planted:,} canaries, random secrets that an audit looks for ({counts or 'none'}); "
        f"{planted.candidates - planted.planted:,} others were drawn and left out."
    )


def describe_audit(measured: Sequence[Measurement], guarantee: GuaranteeFile | None = None) -> list[str]:
    """A sentence on stored text, and one for each attack that was made, in the order of the attacks."""
    sentences = (
        _describe_stored_text(measured),
        _describe_exposure(measured),
        _describe_epsilon(measured, guarantee),
        _describe_extraction(measured),
        _describe_canary_extraction(measured),
        _describe_membership(measured),
    )
    return [sentence for sentence in sentences if sentence is not None]


def _describe_stored_text(measured: Sequence[Measurement]) -> str | None:
    by_length = _by_repetitions(measured, STORED)
    if not by_length:
        return None
    length, stored = max(by_length.items())
    return (
        f"Stored text: the model's tables of counts hold {stored.value:,.0f} n-grams of its training text, "
        f"of up to {length} tokens, word for word. Whoever has its files reads them without an attack; "
        "--epsilon trains a network without counts."
    )


def _describe_exposure(measured: Sequence[Measurement]) -> str | None:
    by_count, chances = _by_repetitions(measured, "exposure"), _by_repetitions(measured, "exposure_p_value")
    planted = [count for count in by_count if count and count in chances]
    if not planted:
        return None
    count = max(planted)
    chance = chances[count].value
    verdict = (
        "the model memorised them" if chance < SIGNIFICANT else "there is no sign that it memorised them"
    )
    control = f", and {by_count[0].value:.2f} bits of those left out" if 0 in by_count else ""
    return (
        f"Exposure: {_with_interval(by_count[count], '{:.2f}')} bits of the canaries planted {_times(count)}"
        f"{control}, where {NULL_BITS:.2f} bits are expected of secrets that were never seen; {verdict} "
        f"(by chance: p = {chance:.2g})."
    )


def _describe_epsilon(measured: Sequence[Measurement], guarantee: GuaranteeFile | None) -> str | None:
    by_count = _by_repetitions(measured, "epsilon_lower_bound")
    if not by_count:
        return None
    count = max(by_count, key=lambda each: by_count[each].value)
    bound = by_count[count]
    if bound.value == 0:
        text = "Epsilon: what can be guessed about the canaries refutes no guarantee, however strong"
    else:
        text = (
            f"Epsilon: what was guessed about the {bound.n} canaries drawn to be planted {_times(count)} or "
            "not at all refutes, at a confidence of 95 %, any guarantee with an epsilon below "
            f"{bound.value:.2f}"
        )
    if guarantee is None:
        return f"{text}; no guarantee was given."
    agrees = "in agreement with" if bound.value <= guarantee.epsilon else "which contradicts"
    return f"{text}, {agrees} the epsilon of {guarantee.epsilon:.4g} that the accountant states."


def _describe_extraction(measured: Sequence[Measurement]) -> str | None:
    found: dict[tuple[int, int], dict[str, Measurement]] = {}
    for m in measured:
        if name := _EXTRACTION.fullmatch(m.name):
            found.setdefault((int(name[1]), int(name[2])), {})[m.split] = m
    pairs = {key: splits for key, splits in found.items() if {"train", "validation"} <= splits.keys()}
    if not pairs:
        return None
    (n_tokens, prefix), splits = max(pairs.items(), key=lambda item: item[0])
    own, other = splits["train"], splits["validation"]
    return (
        f"Extraction: given {prefix} tokens of its training text, the model writes the next {n_tokens} word "
        f"for word in {_with_interval(own, '{:.2%}')} of {own.n:,} passages, and in "
        f"{_with_interval(other, '{:.2%}')} of {other.n:,} passages of held-out text."
    )


def _describe_canary_extraction(measured: Sequence[Measurement]) -> str | None:
    by_count = _by_repetitions(measured, "canaries_extracted")
    if not by_count:
        return None
    parts = [
        f"{m.value * m.n:.0f} of {m.n} {f'planted {_times(count)}' if count else 'left out'}"
        for count, m in sorted(by_count.items(), reverse=True)
    ]
    return f"Canaries: given the text before it, the model writes the secret of {', '.join(parts)}."


def _describe_membership(measured: Sequence[Measurement]) -> str | None:
    areas = {m.name.partition("/")[2]: m for m in measured if m.name.startswith("membership_auc/")}
    attacks = {name: m for name, m in areas.items() if not name.startswith("blind")}
    if not attacks:
        return None
    name, best = max(attacks.items(), key=lambda item: item[1].value)
    text = (
        f"Membership: the strongest of {len(attacks)} attacks, {name}, separates training passages "
        f"from held-out ones with an area under the curve of {_with_interval(best, '{:.3f}')}, where chance "
        "gives 0.5"
    )
    rates = [m for m in measured if m.name == f"membership_tpr_at_1_percent_fpr/{name}"]
    if rates:
        text += f"; at 1 % of false alarms it finds {_with_interval(rates[0], '{:.1%}')} of the members"
    blind = [m for attack, m in areas.items() if attack.startswith("blind")]
    if not blind:
        return f"{text}."
    control = max(blind, key=lambda m: m.value)
    differs = control.interval is not None and control.interval[0] > 0.5
    verdict = (
        "so the splits themselves differ, and the model is not the only cause"
        if differs
        else "so nothing shows that the splits themselves differ"
    )
    return f"{text}. Without the model, the text alone gives {_with_interval(control, '{:.3f}')}, {verdict}."


def _by_repetitions(measured: Sequence[Measurement], name: str) -> dict[int, Measurement]:
    """Measurements `name/N` by the number N of repetitions."""
    split = ((*m.name.partition("/"), m) for m in measured)
    return {int(part): m for head, _, part, m in split if head == name and _REPETITIONS.fullmatch(part)}


def _times(count: int | str) -> str:
    return "once" if str(count) == "1" else f"{count} times"


def _with_interval(m: Measurement, pattern: str) -> str:
    if m.interval is None:
        return pattern.format(m.value)
    low, high = (pattern.format(end) for end in m.interval)
    return f"{pattern.format(m.value)} [{low}, {high}]"
