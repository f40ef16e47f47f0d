"""The attacks there are: `ATTACKS`, a row for each word of `hf-genlm audit --attacks`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.privacy.attacks.exposure import measure_canaries
from hf_genlm.privacy.attacks.extraction import measure_extraction
from hf_genlm.privacy.attacks.membership import measure_membership
from hf_genlm.privacy.subject import Audited, Evidence, Findings, Progress
from hf_genlm.run_folder import write_json

Reporter = Callable[[str, int, int], None]  # attack, done, total


class Attack(NamedTuple):
    """A row: what of the evidence it needs, any one of `needs`, and what measures. "texts" are both sides."""

    needs: tuple[str, ...]
    measure: Callable[[Audited, Evidence, Progress | None], Findings]


ATTACKS = {
    "exposure": Attack(("canaries",), measure_canaries),
    "extraction": Attack(("texts", "canaries"), measure_extraction),
    "membership": Attack(("texts",), measure_membership),
}


def attacks_of(words: str | None, evidence: Evidence) -> list[str]:
    """The attacks that `words` lists, separated by commas; None: all that there is evidence for.

    Raises:
        UserError: a word that is none, or one without what it needs; or nothing to attack with.
    """
    at_hand = {
        "texts": evidence.train is not None and evidence.held_out is not None,
        "canaries": evidence.canaries is not None,
    }
    possible = [name for name, row in ATTACKS.items() if any(at_hand[need] for need in row.needs)]
    if words is None:
        if not possible:
            raise UserError("an audit needs the training text and held-out text: name --train and --held-out")
        return possible
    names = list(dict.fromkeys(word.strip() for word in words.split(",")))
    for name in names:
        if name not in ATTACKS:
            raise UserError(f"--attacks {words}: there is no attack {name!r}{did_you_mean(name, ATTACKS)}")
        if name not in possible:
            raise UserError(
                f"--attacks {words}: {name} needs {' or '.join(ATTACKS[name].needs)}, which are not at hand; "
                "canaries are planted by train --canaries, texts named by --train and --held-out"
            )
    return names


def audit(
    audited: Audited, evidence: Evidence, attacks: Sequence[str], on_progress: Reporter | None = None
) -> Findings:
    """What the attacks find, in their order. The same seed gives the same figures."""
    measurements: list[Measurement] = []
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name in attacks:

        def report(done: int, total: int, name: str = name) -> None:
            if on_progress is not None:
                on_progress(name, done, total)

        found = ATTACKS[name].measure(audited, evidence, report)
        measurements += found.measurements
        curves.update(found.curves)
    return Findings(measurements, curves)


def write_audit(path: Path, findings: Findings, facts: dict[str, object]) -> None:
    """Write audit.json: the measurements, what they were made with, and the ROC curves."""
    content = {
        "measurements": [m.to_json() for m in findings.measurements],
        "made_with": facts,
        "roc": {name: {"fpr": x, "tpr": y} for name, (x, y) in findings.curves.items()},
    }
    write_json(path, content)
