"""What a card and the command line say of privacy: the guarantee of privacy.json, the findings of audit.json.

Every sentence is written from the measurements, and says what chance alone would give.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_genlm.evaluation.measurement import Measurement, read_measurements
from hf_genlm.report.audit_plot import AUDIT_FILE
from hf_genlm.report.document import cell, prose
from hf_genlm.run_folder import RunFolder, read_json

SIGNIFICANT = 0.01
NULL_BITS = math.log2(math.e)  # mean exposure of a secret that was never seen
LIMITS = (
    "An audit is a lower bound: stronger attacks may find more, and what is not found is not thereby safe. "
    "It tells about these canaries and passages, on average, not about the worst document."
)
# key of privacy.json -> what a card calls it
_GUARANTEE = {
    "unit": "protected unit",
    "sampling_rate": "sampling rate",
    "noise_multiplier": "noise multiplier",
    "clip_norm": "clipping norm",
    "steps": "steps",
    "accountant": "accountant",
}


def privacy_section(run: RunFolder) -> str | None:
    """The card's section, in Markdown; None where there is neither a guarantee nor an audit nor a canary."""
    parts: list[str] = []
    guarantee = read_json(run.privacy) if run.privacy.is_file() else None
    if guarantee is not None:
        parts += guarantee_lines(guarantee)
    planted = read_json(run.corpus).get("canaries") if run.corpus.is_file() else None
    if planted is not None:
        parts.append(canary_sentence(planted))
    if run.audit.is_file():
        measured = read_measurements(run.audit)
        parts.append("\n".join(f"- {prose(sentence)}" for sentence in sentences(measured, guarantee)))
        if (run.model / AUDIT_FILE).is_file():
            parts.append(f"![What the audit measured; in words above]({AUDIT_FILE})")
        parts.append("\n".join(_table(measured)))
        parts.append(LIMITS)
    return "\n\n".join(parts) if parts else None


def guarantee_lines(guarantee: Mapping[str, Any]) -> list[str]:
    """Paragraphs about the content of privacy.json."""
    head = (
        f"Trained with differential privacy: epsilon = {guarantee['epsilon']:.4g} at delta = "
        f"{guarantee['delta']:.3g} for each {guarantee.get('unit', 'unit')}."
    )
    rows = ["| | |", "|---|---|"]
    rows += [f"| {title} | {cell(guarantee[key])} |" for key, title in _GUARANTEE.items() if key in guarantee]
    lists = [
        f"{title}: {prose('; '.join(map(str, guarantee[key])))}."
        for key, title in (("covered", "The guarantee covers"), ("not_covered", "It does not cover"))
        if guarantee.get(key)
    ]
    return [prose(head), "\n".join(rows), *lists]


def canary_sentence(planted: Mapping[str, Any]) -> str:
    """What corpus.json says of the canaries, in a sentence."""
    counts = ", ".join(
        f"{n} planted {_times(int(k))}" for k, n in planted["planted_by_repetitions"].items() if n
    )
    return (
        f"The training text holds {planted['documents']:,} documents that are no part of the sources: "
        f"copies of {planted['planted']:,} canaries, random secrets that an audit looks for "
        f"({counts or 'none'}); "
        f"{planted['candidates'] - planted['planted']:,} others were drawn and left out."
    )


def sentences(measured: Sequence[Measurement], guarantee: Mapping[str, Any] | None = None) -> list[str]:
    """One for each thing that was attacked, in the order of the attacks."""
    of = {(m.name, m.split): m for m in measured}
    written = (
        _exposure(measured),
        _epsilon(measured, guarantee),
        _extraction(of),
        _canary_extraction(measured),
        _membership(measured),
    )
    return [sentence for sentence in written if sentence is not None]


def _exposure(measured: Sequence[Measurement]) -> str | None:
    by_count = _parts(measured, "exposure")
    planted = [count for count in by_count if count]
    if not planted:
        return None
    most = max(planted)
    chance = _parts(measured, "exposure_p_value")[most].value
    verdict = (
        f"the model has kept them (by chance: p = {chance:.2g})"
        if chance < SIGNIFICANT
        else f"this is no sign that it kept them (by chance: p = {chance:.2g})"
    )
    control = f", and {by_count[0].value:.2f} bits of those left out" if 0 in by_count else ""
    return (
        f"Exposure: {_with_interval(by_count[most], '{:.2f}')} bits of the canaries planted {_times(most)}"
        f"{control}, where {NULL_BITS:.2f} bits are expected of secrets that were never seen; {verdict}."
    )


def _epsilon(measured: Sequence[Measurement], guarantee: Mapping[str, Any] | None) -> str | None:
    by_count = _parts(measured, "epsilon_lower_bound")
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
    epsilon = guarantee["epsilon"]
    agrees = "in agreement with" if bound.value <= epsilon else "which contradicts"
    return f"{text}, {agrees} the epsilon of {epsilon:.4g} that the accountant states."


def _extraction(of: Mapping[tuple[str, str], Measurement]) -> str | None:
    names = [name for name, split in of if name.startswith("extraction_") and split == "validation"]
    by_prefix = {(_tokens_of(name), _prefix_of(name)): name for name in names}
    if not by_prefix:
        return None
    (n_tokens, prefix), name = max(by_prefix.items())
    own, other = of[name, "train"], of[name, "validation"]
    return (
        f"Extraction: given {prefix} tokens of its training text it writes the next {n_tokens} word for "
        f"word in {_with_interval(own, '{:.2%}')} of {own.n:,} passages, and in "
        f"{_with_interval(other, '{:.2%}')} of {other.n:,} that were held out."
    )


def _canary_extraction(measured: Sequence[Measurement]) -> str | None:
    by_count = _parts(measured, "canaries_extracted")
    if not by_count:
        return None
    shown = [
        f"{round(m.value * m.n)} of {m.n} {f'planted {_times(count)}' if count else 'left out'}"
        for count, m in sorted(by_count.items(), reverse=True)
    ]
    return f"Canaries: given what stands before it, it writes the secret of {', '.join(shown)}."


def _membership(measured: Sequence[Measurement]) -> str | None:
    areas = {m.name.partition("/")[2]: m for m in measured if m.name.startswith("membership_auc/")}
    attacks = {name: m for name, m in areas.items() if not name.startswith("blind")}
    if not attacks:
        return None
    name, best = max(attacks.items(), key=lambda item: item[1].value)
    text = (
        f"Membership: the strongest of {len(attacks)} attacks, {name}, tells training passages from held-out "
        f"ones with an area under the curve of {_with_interval(best, '{:.3f}')}, where chance gives 0.5"
    )
    rates = [m for m in measured if m.name == f"membership_tpr_at_1_percent_fpr/{name}"]
    if rates:
        text += f"; at 1 % of false alarms it finds {_with_interval(rates[0], '{:.1%}')} of the members"
    blind = [m for attack, m in areas.items() if attack.startswith("blind")]
    if not blind:
        return f"{text}."
    seen = max(blind, key=lambda m: m.value)
    leaks = seen.interval is not None and seen.interval[0] > 0.5
    verdict = (
        "so the splits differ by themselves, and not all of it is the model's doing"
        if leaks
        else "so nothing shows that the splits differ by themselves"
    )
    return f"{text}. Without the model, the text alone tells {_with_interval(seen, '{:.3f}')}, {verdict}."


def _table(measured: Sequence[Measurement]) -> list[str]:
    rows = ["| measurement | value | 95 % interval | n | unit | on |", "|---|---|---|---|---|---|"]
    for m in measured:
        interval = "" if m.interval is None else f"{m.interval[0]:.4g} to {m.interval[1]:.4g}"
        cells = (m.name, f"{m.value:.4g}", interval, f"{m.n:,}", m.unit, m.split)
        rows.append(f"| {' | '.join(map(cell, cells))} |")
    return rows


def _parts(measured: Sequence[Measurement], name: str) -> dict[int, Measurement]:
    """Those of `name` by their counts of repetitions."""
    split = ((*m.name.partition("/"), m) for m in measured)
    return {int(part): m for head, _, part, m in split if head == name and part.isdecimal()}


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _tokens_of(name: str) -> int:
    return int(name.split("_")[1])


def _prefix_of(name: str) -> int:
    return int(name.rpartition("prefix_")[2])


def _with_interval(m: Measurement, pattern: str) -> str:
    if m.interval is None:
        return pattern.format(m.value)
    low, high = (pattern.format(end) for end in m.interval)
    return f"{pattern.format(m.value)} [{low}, {high}]"
