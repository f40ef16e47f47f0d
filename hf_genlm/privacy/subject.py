"""What is audited, the texts that it is audited with, and the passages drawn from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.privacy.attacks.scoring import Passage, Scores, score
from hf_genlm.text.canaries import Canaries
from hf_genlm.text.encoding import TokenizedDocuments, encode_documents
from hf_genlm.text.store import Document

Progress = Callable[[int, int], None]
FEW_DOCUMENTS = 20  # with fewer on a side, several passages come from one


@dataclass(frozen=True)
class Audited:
    """A causal language model with its tokenizer, and how much it reads at once."""

    model: Any
    tokenizer: Any
    context: int
    batch_size: int = 32

    @property
    def start_id(self) -> int:
        """Id of the token before a text.

        Raises:
            UserError: the tokenizer has none.
        """
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((token for token in ids if token is not None), None)
        if found is None:
            raise UserError(
                "this tokenizer has neither a bos nor an eos token: a first token cannot be scored"
            )
        return found

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, without special tokens."""
        return [ids for ids, _ in encode_documents(self.tokenizer, [Document(text, "") for text in texts])]

    def score_texts(self, texts: Sequence[str], on_progress: Progress | None = None) -> list[Scores]:
        """Every token of each text, given the start token; of a long one, those that fit the context."""
        passages = [
            Passage(np.concatenate([[self.start_id], ids[: self.context - 1]]).astype(np.int64), 1)
            for ids in self.encode(texts)
        ]
        return self.score(passages, on_progress)

    def score(self, passages: Sequence[Passage], on_progress: Progress | None = None) -> list[Scores]:
        """As `scoring.score`."""
        return score(self.model, passages, self.batch_size, on_progress)


@dataclass(frozen=True)
class Evidence:
    """What the attacks look at; None where it is not at hand. `train` and `held_out` are of the same kind of
    text, of which the model has seen the first alone, as ids of its own tokenizer."""

    train: TokenizedDocuments | None = None
    held_out: TokenizedDocuments | None = None
    canaries: Canaries | None = None
    reference: Audited | None = None  # a model that has not seen the training text
    delta: float = 1e-5  # of the guarantee that the canaries put to the test
    limit: int = 1000  # passages of each side
    seed: int = 0


@dataclass(frozen=True)
class Findings:
    """Of one attack: its measurements, and the curves of a picture by name, each (x, y)."""

    measurements: list[Measurement]
    curves: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """The tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


def longest_drawn(
    lengths: Sequence[int], sides: Sequence[TokenizedDocuments], least: int, enough: int
) -> int:
    """The longest of `lengths` of which both sides have `enough` places, otherwise the shortest.

    Raises:
        UserError: a side has fewer than `least` of the shortest.
    """
    for length in sorted(lengths, reverse=True):
        if min(_n_places(side, length) for side in sides) >= enough:
            return length
    shortest = min(lengths)
    if min(_n_places(side, shortest) for side in sides) < least:
        raise UserError(
            f"an audit needs at least {least} passages of {shortest} tokens of the training text, and as "
            "many held out: name more text, or hold out a larger part"
        )
    return shortest


def _n_places(documents: TokenizedDocuments, length: int) -> int:
    pieces = np.diff(documents.offsets) // length
    n_long = int((pieces > 0).sum())
    return n_long if n_long >= FEW_DOCUMENTS else int(pieces.sum())


def draw_places(documents: TokenizedDocuments, length: int, n: int, seed: int) -> list[Place]:
    """At most `n` places of `length` tokens, at seeded starts that are multiples of it, in reading order.

    One a document, where at least `FEW_DOCUMENTS` are long enough; otherwise places of documents that do not
    overlap.
    """
    pieces = np.diff(documents.offsets) // length
    generator = np.random.default_rng([seed, length])
    long_enough = np.flatnonzero(pieces)
    if len(long_enough) >= FEW_DOCUMENTS:
        chosen = np.sort(generator.permutation(long_enough)[:n])
        numbers = generator.integers(0, pieces[chosen])
    else:
        document_P = np.repeat(np.arange(len(pieces)), pieces)
        number_P = np.arange(len(document_P)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        drawn = np.sort(generator.permutation(len(document_P))[:n])
        chosen, numbers = document_P[drawn], number_P[drawn]
    return [
        Place(int(document), int(number) * length, int(number + 1) * length)
        for document, number in zip(chosen, numbers, strict=True)
    ]


def passage_at(
    documents: TokenizedDocuments, place: Place, start_id: int, before: int = 0, context: int | None = None
) -> Passage:
    """The place, behind `before` tokens of its document; behind the start token where that reaches its
    beginning, and otherwise the first token has none before it and is not scored."""
    ids, _ = documents[place.document]
    begin = max(0, place.start - before)
    tokens = np.asarray(ids[begin : place.stop], dtype=np.int64)
    if begin == 0:
        tokens = np.concatenate([[start_id], tokens])
        return Passage(tokens, place.start + 1)
    return Passage(tokens, max(1, place.start - begin))
