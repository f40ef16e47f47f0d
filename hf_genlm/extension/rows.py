"""Rows for the new tokens of a trained model, from those of the pieces that they stand for."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def extend_model(model: "PreTrainedModel", pieces: Mapping[int, Sequence[int]]) -> None:
    """Give `model` a row of the embedding, of the head, and of its bias for each new id: the mean of those of
    its pieces, the old ids.

    All else stays, so where an old text keeps its ids, their logits are as before. Its loss rises by what the
    new tokens take of the probability, - log(1 - their share).

    Args:
        model: any causal model with a token embedding (V, R) and a linear head (V, D); new ids follow V.
    """
    embedding: Any = model.get_input_embeddings()
    n_old = len(embedding.weight)
    model.resize_token_embeddings(max(n_old, 1 + max(pieces)), mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embedding.weight, head.weight] + ([] if head.bias is None else [head.bias])
    for table in tables:  # tied ones twice, to the same
        for number, ids in pieces.items():
            table[number] = table[torch.tensor(ids)].mean(0)
