"""What a card says of each language and script: a table, and a line."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.report.document import prose

# measurement -> title and format of its column
_COLUMNS = {
    "bits_per_byte": ("bits/byte", "{:.3f}"),
    "bits_per_character": ("bits/character", "{:.3f}"),
    "bits_per_sentence": ("bits/sentence", "{:.1f}"),
    "information_parity": ("information parity", "{:.3f}"),
    "bytes_per_token": ("bytes/token", "{:.2f}"),
    "tokens_per_sentence": ("tokens/sentence", "{:.1f}"),
    "tokenization_premium": ("token premium", "{:.2f}"),
}


def is_of_language(measurement: Measurement, codes: Mapping[str, Any]) -> bool:
    """True if it is of one of the languages alone."""
    return measurement.name.partition("/")[2] in codes


def language_table(languages: Mapping[str, Any], measured: Sequence[Measurement]) -> list[list[str]]:
    """Rows of cells, the first one of titles: what was read of each language, by what corpus.json says, and
    those of its measurements that the table knows. No rows where no languages were named."""
    if not languages:
        return []
    values = {m.name: m.value for m in measured}
    known = [name for name in _COLUMNS if any(f"{name}/{code}" in values for code in languages)]
    rows = [
        [
            "language",
            "training bytes",
            "read in a pass",
            "held-out bytes",
            *(_COLUMNS[name][0] for name in known),
        ]
    ]
    for code, of_language in languages.items():
        rows.append(
            [
                prose(code),
                f"{of_language['train']['bytes']:,}",
                f"{of_language['repeats']:.2f} times",
                f"{of_language['validation']['bytes']:,}",
                *(
                    _COLUMNS[name][1].format(values[f"{name}/{code}"]) if f"{name}/{code}" in values else ""
                    for name in known
                ),
            ]
        )
    return rows


def script_line(measured: Sequence[Measurement]) -> str:
    """Which share of the characters of each script no border of tokens cuts; nothing where it is unknown."""
    shares = [(m.name.partition("/")[2], m.value) for m in measured if m.name.startswith("whole_characters/")]
    return ", ".join(f"{script} {100 * share:.1f} %" for script, share in shares)
