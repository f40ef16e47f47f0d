"""Why a format cannot hold a model exactly, in words that a person can act on."""

from collections.abc import Sequence
from typing import NamedTuple

from hf_genlm.errors import UserError


class Misfit(NamedTuple):
    """One reason, and what to train with instead."""

    reason: str
    remedy: str


def refuse(target: str, misfits: Sequence[Misfit]) -> None:
    """
    Raises:
        UserError: there are any; with all of them.
    """
    if misfits:
        reasons = "; ".join(f"{misfit.reason} ({misfit.remedy})" for misfit in misfits)
        raise UserError(f"--to {target} cannot give the logits of this model: {reasons}")
