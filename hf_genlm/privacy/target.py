"""The attacked model, the evidence against it, the passages drawn from text, and the scores of their tokens.

Shapes: B passages of a batch, T tokens, N scored tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_genlm.errors import UserError
from hf_genlm.evaluation.likelihood import MAX_LOGITS, evaluation_mode, start_token_id
from hf_genlm.evaluation.measurement import Measurement
from hf_genlm.text.canaries import Canaries
from hf_genlm.text.encoding import TokenizedDocuments, encode_documents
from hf_genlm.text.store import Document

Progress = Callable[[int, int], None]  # passages done, passages in all
MIN_DOCUMENTS = 20  # with fewer documents on a side, several passages come from one document
MIN_PASSAGES = 2  # of each side: fewer give no measurement
ENOUGH_PASSAGES = 100  # of each side: a shorter passage is chosen if the longer ones are fewer


class Passage(NamedTuple):
    """Token ids (T,) read in one forward pass; those from index `first` > 0 on are scored."""

    ids: np.ndarray
    first: int


class Scores(NamedTuple):
    """Statistics of each scored token (N,): log P in nats, True if no other token is likelier, and the mean
    and standard deviation of log P over the model's distribution at its place."""

    log_p: np.ndarray
    is_argmax: np.ndarray
    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True)
class TargetModel:
    """A causal language model with its tokenizer; it reads at most `context` tokens at once.

    `model` is called as `model(input_ids=(B, T) int64, use_cache=False)`; its `.logits` are (B, T, V).
    """

    model: Any
    tokenizer: Any
    context: int
    batch_size: int = 32

    @property
    def start_id(self) -> int:
        """Id of the token before a text, by `start_token_id`."""
        return start_token_id(self.tokenizer)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, without special tokens."""
        return [ids for ids, _ in encode_documents(self.tokenizer, [Document(text, "") for text in texts])]

    def score_texts(self, texts: Sequence[str], on_progress: Progress | None = None) -> list[Scores]:
        """Score all tokens of each text after the start token; a long text is cut at the context."""
        passages = [
            Passage(np.concatenate([[self.start_id], ids[: self.context - 1]]).astype(np.int64), 1)
            for ids in self.encode(texts)
        ]
        return self.score(passages, on_progress)

    def score(self, passages: Sequence[Passage], on_progress: Progress | None = None) -> list[Scores]:
        """Score passages; those of similar length share a forward pass, the result is in their order.

        A batch is smaller than `batch_size` if its logits would exceed `MAX_LOGITS`.

        Raises:
            UserError: logits are NaN or infinite.
        """
        found: dict[int, Scores] = {}
        order = sorted(range(len(passages)), key=lambda i: -len(passages[i].ids))
        with evaluation_mode(self.model), torch.inference_mode():
            while len(found) < len(order):
                longest = len(passages[order[len(found)]].ids)
                rows = min(self.batch_size, max(1, MAX_LOGITS // (longest * self.model.config.vocab_size)))
                batch = order[len(found) : len(found) + rows]
                scores = _score_batch(self.model, [passages[i] for i in batch])
                found.update(zip(batch, scores, strict=True))
                if on_progress is not None:
                    on_progress(len(found), len(order))
        return [found[i] for i in range(len(passages))]


def _score_batch(model: Any, passages: Sequence[Passage]) -> list[Scores]:
    lengths = np.array([len(passage.ids) for passage in passages])
    # padding stands on the right, where a causal model cannot see it
    ids_BT = np.zeros((len(passages), lengths.max()), dtype=np.int64)
    is_scored_BT = np.zeros(ids_BT.shape, dtype=bool)
    for row, (ids, first) in enumerate(passages):
        assert 0 < first < len(ids), "a passage has a token before the first scored one"
        ids_BT[row, : len(ids)] = ids
        is_scored_BT[row, first : len(ids)] = True
    device = next(model.parameters()).device
    input_BT = torch.from_numpy(ids_BT).to(device)
    logits_BTV = model(input_ids=input_BT[:, :-1], use_cache=False).logits
    mask_BT = torch.from_numpy(is_scored_BT[:, 1:]).to(device)
    log_p_NV = logits_BTV[mask_BT].float().log_softmax(dim=1)
    log_p_N = log_p_NV.gather(1, input_BT[:, 1:][mask_BT][:, None])[:, 0]
    if not torch.isfinite(log_p_N).all():
        raise UserError("the model's logits are NaN or infinite: its training diverged, audit another model")
    is_argmax_N = log_p_N >= log_p_NV.amax(dim=1)
    p_NV = log_p_NV.exp()
    log_p_NV = log_p_NV.clamp(min=-1e4)  # an impossible token adds 0 to both moments, not NaN
    mean_N = (p_NV * log_p_NV).sum(dim=1)
    std_N = (p_NV * (log_p_NV - mean_N[:, None]).square()).sum(dim=1).sqrt()
    columns = [column.double().cpu().numpy() for column in (log_p_N, is_argmax_N, mean_N, std_N)]
    ends = np.cumsum(is_scored_BT.sum(axis=1))[:-1]
    return [Scores(*parts) for parts in zip(*(np.split(column, ends) for column in columns), strict=True)]


@dataclass(frozen=True)
class Evidence:
    """Inputs of the attacks; None if missing.

    `train` and `held_out` are texts of the same kind as ids of the target's tokenizer; the target was trained
    on the first alone.
    """

    train: TokenizedDocuments | None = None
    held_out: TokenizedDocuments | None = None
    canaries: Canaries | None = None
    reference: TargetModel | None = None  # a model that was not trained on `train`
    delta: float = 1e-5  # of the differential-privacy guarantee that the canaries test
    limit: int = 1000  # passages of each side
    seed: int = 0


@dataclass(frozen=True)
class Findings:
    """Result of one attack: measurements, and ROC curves by name as (false, true positive rates)."""

    measurements: list[Measurement]
    roc_curves: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """The tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


def choose_length(lengths: Sequence[int], sides: Sequence[TokenizedDocuments]) -> int:
    """Choose the longest of `lengths` of which both sides have `ENOUGH_PASSAGES`, else the shortest.

    Raises:
        UserError: a side has fewer than `MIN_PASSAGES` of the shortest length.
    """

    def num_passages(documents: TokenizedDocuments, length: int) -> int:
        pieces = np.diff(documents.offsets) // length
        num_long = int((pieces > 0).sum())
        return num_long if num_long >= MIN_DOCUMENTS else int(pieces.sum())

    for length in sorted(lengths, reverse=True):
        if min(num_passages(side, length) for side in sides) >= ENOUGH_PASSAGES:
            return length
    shortest = min(lengths)
    if min(num_passages(side, shortest) for side in sides) < MIN_PASSAGES:
        raise UserError(
            f"an audit needs at least {MIN_PASSAGES} passages of {shortest} tokens of the training text, and "
            "as many held out: name more text, or hold out a larger part"
        )
    return shortest


def draw_spans(documents: TokenizedDocuments, length: int, limit: int, seed: int) -> list[Span]:
    """Draw at most `limit` spans of `length` tokens, whose starts are multiples of it, in reading order.

    One per document if at least `MIN_DOCUMENTS` are long enough, otherwise any that do not overlap.
    """
    pieces = np.diff(documents.offsets) // length
    generator = np.random.default_rng([seed, length])
    long_enough = np.flatnonzero(pieces)
    if len(long_enough) >= MIN_DOCUMENTS:
        chosen = np.sort(generator.permutation(long_enough)[:limit])
        numbers = generator.integers(0, pieces[chosen])
    else:
        document_P = np.repeat(np.arange(len(pieces)), pieces)
        number_P = np.arange(len(document_P)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        drawn = np.sort(generator.permutation(len(document_P))[:limit])
        chosen, numbers = document_P[drawn], number_P[drawn]
    return [
        Span(int(document), int(number) * length, int(number + 1) * length)
        for document, number in zip(chosen, numbers, strict=True)
    ]


def passage_of(documents: TokenizedDocuments, span: Span, start_id: int, num_before: int = 0) -> Passage:
    """A passage that scores `span` after the `num_before` tokens that precede it in its document.

    It begins with the start token if that context reaches the beginning of the document. A span without any
    context elsewhere loses its first token, which nothing precedes.
    """
    ids, _ = documents[span.document]
    begin = max(0, span.start - num_before)
    tokens = np.asarray(ids[begin : span.stop], dtype=np.int64)
    if begin == 0:
        return Passage(np.concatenate([[start_id], tokens]), span.start + 1)
    return Passage(tokens, max(1, span.start - begin))
