"""Canaries: random secrets planted in the training text, so that an audit can ask what the model kept of it.

A canary is a document of its own, `The access code of account 48213 is 7203 1956 4471.`: a frame that names
an account, and a secret of `SECRET_DIGITS` random digits. For each count of repetitions there are as many
candidates; a fair coin of each decides whether it is planted, so often, or not at all. Those left out are
the control, and the coins are what a lower bound on epsilon rests on (Steinke, Nasr, Jagielski 2023).
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_genlm.config.recipe import CorpusRecipe, PrivacyRecipe
from hf_genlm.errors import UserError
from hf_genlm.text.corpus import Corpus, count_text
from hf_genlm.text.store import Documents

SECRET_DIGITS = 12
BITS = SECRET_DIGITS * math.log2(10)  # of a secret: the most that its exposure can be
_ACCOUNT_DIGITS = 5


@dataclass(frozen=True)
class Canary:
    """A candidate: `prefix` + `secret` + "." is its text; `repetitions` times in the training text if
    `is_planted`, otherwise nowhere."""

    prefix: str
    secret: str
    repetitions: int
    is_planted: bool

    @property
    def text(self) -> str:
        """The whole document."""
        return self.with_secret(self.secret)

    def with_secret(self, secret: str) -> str:
        """The same document about another secret."""
        return f"{self.prefix}{secret}."


@dataclass(frozen=True)
class Canaries:
    """All candidates of a run, and the seed that they, their coins and their places follow from."""

    seed: int
    candidates: tuple[Canary, ...]

    def to_json(self) -> dict[str, Any]:
        """The content of canaries.json."""
        return {"seed": self.seed, "candidates": [asdict(canary) for canary in self.candidates]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Canaries":
        """The inverse of `to_json`.

        Raises:
            UserError: it is not that.
        """
        try:
            return cls(int(content["seed"]), tuple(Canary(**each) for each in content["candidates"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"canaries.json is damaged ({error}): train again") from error

    def summary(self) -> dict[str, Any]:
        """What corpus.json says: no secret."""
        planted = [canary for canary in self.candidates if canary.is_planted]
        counts = dict.fromkeys((canary.repetitions for canary in self.candidates), 0)
        for canary in planted:
            counts[canary.repetitions] += 1
        return {
            "candidates": len(self.candidates),
            "planted": len(planted),
            "documents": sum(canary.repetitions for canary in planted),
            "planted_by_repetitions": {str(count): n for count, n in counts.items()},
        }


def draw_canaries(repetitions: Sequence[int], each: int, seed: int) -> Canaries:
    """`each` candidates for every count of `repetitions`, no two of one account."""
    candidates: list[Canary] = []
    accounts: set[str] = set()
    for number, count in enumerate(count for count in repetitions for _ in range(each)):
        account = _digits(_ACCOUNT_DIGITS, seed, "account", number)
        attempt = 0
        while account in accounts:
            attempt += 1
            account = _digits(_ACCOUNT_DIGITS, seed, "account", number, attempt)
        accounts.add(account)
        candidates.append(
            Canary(
                prefix=f"The access code of account {account} is ",
                secret=draw_secret(seed, "secret", number),
                repetitions=count,
                is_planted=_number(seed, "coin", number) % 2 == 0,
            )
        )
    return Canaries(seed, tuple(candidates))


def draw_secret(seed: int, *words: object) -> str:
    """A secret of the space that canaries are drawn from; another one for other `words`."""
    digits = _digits(SECRET_DIGITS, seed, *words)
    return " ".join(digits[i : i + 4] for i in range(0, SECRET_DIGITS, 4))


def check_canaries(privacy: PrivacyRecipe, corpus: CorpusRecipe) -> None:
    """
    Raises:
        UserError: canaries where they cannot be planted, or more of them than there are accounts.
    """
    if not privacy.canaries:
        return
    for name, is_so in (("stream = true", corpus.stream), ("languages", corpus.languages)):
        if is_so:
            raise UserError(
                f"privacy.canaries = {privacy.canaries} are planted among the documents of a text in memory "
                f"and of one language, which corpus.{name} is not: leave one of them out"
            )
    if len(set(privacy.canaries)) < len(privacy.canaries):
        raise UserError(f"privacy.canaries = {privacy.canaries}: name each count of repetitions once")
    n = len(privacy.canaries) * privacy.canaries_each
    if n > 10**_ACCOUNT_DIGITS // 2:
        raise UserError(f"privacy.canaries_each = {privacy.canaries_each}: {n:,} canaries are too many")


def plant(corpus: Corpus, privacy: PrivacyRecipe) -> Canaries | None:
    """Put the canaries of a recipe into the training text of `corpus`, and count that again in its report.

    Every copy is a document at a seeded place. The validation text stays. None, and nothing is done, where
    the recipe has no canaries.
    """
    if not privacy.canaries:
        return None
    canaries = draw_canaries(privacy.canaries, privacy.canaries_each, privacy.canaries_seed)
    corpus.train = _among(corpus.train, canaries)
    corpus.report["train"] = count_text(corpus.train)
    corpus.report["canaries"] = canaries.summary()
    return canaries


def _among(documents: Documents, canaries: Canaries) -> Documents:
    """`documents` and the planted copies between them; copies of one canary are the same bytes."""
    planted = [canary for canary in canaries.candidates if canary.is_planted]
    starts, stops, characters, places = [], [], [], []
    for number, canary in enumerate(planted):
        content = canary.text.encode("utf-8")
        start = documents.store.n_bytes
        documents.store.append(content)
        starts += [start] * canary.repetitions
        stops += [start + len(content)] * canary.repetitions
        characters += [len(canary.text)] * canary.repetitions
        places += [
            _number(canaries.seed, "place", number, copy) % (len(documents) + 1)
            for copy in range(canary.repetitions)
        ]
    # a copy with the place i stands before document i
    order = np.argsort(np.concatenate([places, np.arange(len(documents)) + 0.5]), kind="stable")
    old = (documents.starts, documents.stops, documents.characters, documents.source_ids)
    new = (starts, stops, characters, [len(documents.sources)] * len(starts))
    joined = [
        np.concatenate([np.array(ours, dtype=np.int64), theirs])[order]
        for ours, theirs in zip(new, old, strict=True)
    ]
    of_each = dict(zip(("starts", "stops", "characters", "source_ids"), joined, strict=True))
    return Documents(store=documents.store, sources=[*documents.sources, "canary"], **of_each)


def _digits(n: int, seed: int, *words: object) -> str:
    return f"{_number(seed, *words) % 10**n:0{n}d}"


def _number(seed: int, *words: object) -> int:
    """A number below 2^256 that no version of a random generator can change."""
    named = ":".join(map(str, (seed, *words)))
    return int.from_bytes(hashlib.sha256(f"canaries:{named}".encode()).digest(), "big")
