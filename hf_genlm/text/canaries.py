"""Canaries: random secrets planted in the training text, so that an audit can measure what was memorised.

A canary is a document of its own, `The access code of account 48213 is 7203 1956 4471.`: a frame that names
an account, and a secret of `SECRET_DIGITS` random digits. Each number of repetitions has equally many
candidates; a fair coin decides for each whether it is planted, that many times, or not at all. Those left out
are the control group, and a lower bound on epsilon rests on the coins (Steinke, Nasr, Jagielski 2023).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_genlm.config.recipe import CorpusRecipe, PrivacyRecipe
from hf_genlm.errors import UserError
from hf_genlm.text.corpus import Corpus, count_text
from hf_genlm.text.store import Documents

SECRET_DIGITS = 12
BITS = SECRET_DIGITS * math.log2(10)  # entropy of a secret, the upper bound of its exposure
_ACCOUNT_DIGITS = 5


@dataclass(frozen=True)
class Canary:
    """A candidate with the text `prefix` + `secret` + "."; it is in the training text `repetitions` times if
    `is_planted`, otherwise not at all."""

    prefix: str
    secret: str
    repetitions: int
    is_planted: bool

    @property
    def text(self) -> str:
        """Text of the document."""
        return self.with_secret(self.secret)

    def with_secret(self, secret: str) -> str:
        """Text of the document with another secret."""
        return f"{self.prefix}{secret}."


@dataclass(frozen=True)
class Canaries:
    """All candidates of a run, and the seed that decides them, their coins and their places."""

    seed: int
    candidates: tuple[Canary, ...]

    def summary(self) -> dict[str, Any]:
        """Counts for corpus.json, without the secrets."""
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
    """Draw `each` candidates for every number of `repetitions`, no two of one account."""
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
    """Draw a secret from the space of canaries, decided by `seed` and `words`."""
    digits = _digits(SECRET_DIGITS, seed, *words)
    return " ".join(digits[i : i + 4] for i in range(0, SECRET_DIGITS, 4))


def check_canaries(privacy: PrivacyRecipe, corpus: CorpusRecipe) -> None:
    """
    Raises:
        UserError: canaries cannot be planted in this corpus, or are more than there are accounts.
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
    """Plant the canaries of a recipe in the training text of `corpus`, in place, and update its report.

    Every copy is a document at a seeded place. The validation text does not change. Returns None if the
    recipe has no canaries.
    """
    if not privacy.canaries:
        return None
    canaries = draw_canaries(privacy.canaries, privacy.canaries_each, privacy.canaries_seed)
    corpus.train = _among(corpus.train, canaries)
    corpus.report["train"] = count_text(corpus.train)
    corpus.report["canaries"] = canaries.summary()
    return canaries


def _among(documents: Documents, canaries: Canaries) -> Documents:
    """Insert the planted copies between `documents`; copies of one canary share their bytes."""
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
    # a copy with the place i precedes document i
    order = np.argsort(np.concatenate([places, np.arange(len(documents)) + 0.5]), kind="stable")
    new = {"starts": starts, "stops": stops, "characters": characters}
    new |= {"source_ids": [len(documents.sources)] * len(starts), "is_chat": [False] * len(starts)}
    joined: dict[str, Any] = {
        name: np.concatenate([np.array(values, getattr(documents, name).dtype), getattr(documents, name)])[
            order
        ]
        for name, values in new.items()
    }
    return replace(documents, sources=[*documents.sources, "canary"], **joined)


def _digits(n: int, seed: int, *words: object) -> str:
    return f"{_number(seed, *words) % 10**n:0{n}d}"


def _number(seed: int, *words: object) -> int:
    """A number below 2^256 that does not depend on the version of a random generator."""
    named = ":".join(map(str, (seed, *words)))
    return int.from_bytes(hashlib.sha256(f"canaries:{named}".encode()).digest(), "big")
