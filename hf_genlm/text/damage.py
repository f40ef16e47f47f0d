"""Records and files that cannot be used: they stop the reading, or are left out and counted."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hf_genlm.errors import UserError

DAMAGED = ("stop", "skip")  # what to do about a damaged one: end, or leave it out and count it
PLACES = 20  # of what was left out that are kept by name


@dataclass(frozen=True)
class Place:
    """A whole file, or a record of it: its `number`, from 1, and the `unit` ("line" or "row") of that."""

    label: str  # the file, as messages name it
    unit: str | None = None
    number: int = 0

    def __str__(self) -> str:
        return self.label if self.unit is None else f"{self.label}, {self.unit} {self.number}"


class Damage(UserError):
    """A record or a whole file that cannot be used: `reason` says why, and the message adds the remedy."""

    def __init__(self, place: Place, reason: str, remedy: str):
        super().__init__(f"{str(place)!r} {reason}: {remedy}")
        self.place, self.reason = place, reason


LeaveOut = Callable[[Damage], None]  # takes a damaged record, or raises it


@dataclass
class LeftOut:
    """What was left out: how many records and whole files, and the first `PLACES` of both."""

    records: int = 0
    files: int = 0
    places: list[dict[str, Any]] = field(default_factory=list)  # file, line or row of a record, reason

    def take(self, name: str, damage: Damage) -> None:
        """Count one in the file `name`."""
        unit, number = damage.place.unit, damage.place.number
        if unit is None:
            self.files += 1
        else:
            self.records += 1
        self._note({"file": name, **({} if unit is None else {unit: number}), "reason": damage.reason})

    def join(self, other: "LeftOut") -> None:
        """Count what another has counted."""
        self.records += other.records
        self.files += other.files
        for place in other.places:
            self._note(place)

    def to_json(self) -> dict[str, Any]:
        """As it stands in corpus.json."""
        n_more = self.records + self.files - len(self.places)
        return {"records": self.records, "files": self.files, "places": self.places, "more_places": n_more}

    def _note(self, place: dict[str, Any]) -> None:
        if len(self.places) < PLACES:
            self.places.append(place)


def left_out_line(report: dict[str, Any]) -> str | None:
    """What `LeftOut.to_json` gave as one line for people; None where nothing was left out."""
    counts = ((report["records"], "record"), (report["files"], "file"))
    parts = [f"{n:,} damaged {what}{'s' if n > 1 else ''}" for n, what in counts if n]
    if not parts:
        return None
    first = report["places"][0]
    where = [f"{unit} {first[unit]}" for unit in ("line", "row") if unit in first]
    return (
        f"{' and '.join(parts)} left out, the first: {', '.join([first['file'], *where])!r} {first['reason']}"
    )
