"""Layout of the time axis of a batch: padding, packed documents, and where a state starts and ends.

Shapes: B batch, T tokens, S segments of at most L tokens, n tokens in all segments.
"""

from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .cache_genlm import RecurrentStateLayer


class Segments(NamedTuple):
    """Runs of tokens that share one state, as separate rows."""

    tokens: torch.Tensor  # (n,) indices into the flattened (B * T) tokens, padding left out
    lengths: torch.Tensor  # (S,)
    row: torch.Tensor  # (S,) batch row of each segment
    continues: torch.Tensor  # (S,) True if it continues from the given state
    grid: torch.Tensor  # (S, L) indices into `tokens`
    filled: torch.Tensor  # (S, L) False where `grid` is beyond the segment


def number_documents(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Number the documents (B, T) of rows that may begin inside a document: 0 before the first position 0,
    one more from each position 0 on. None if no document starts, except under torch.compile."""
    is_start = position_ids == 0
    if not torch.compiler.is_compiling() and not is_start.any():
        return None
    return is_start.cumsum(dim=-1)


def check_padding(mask: torch.Tensor | None) -> None:
    """Raise ValueError for a mask that a recurrent layer cannot follow, as it can only skip tokens."""
    remedy = (
        "give (rows, earlier and new tokens) with 1 at tokens and 0 at padding, or position_ids that are 0 "
        "where a packed document starts"
    )
    n_dimensions = getattr(mask, "ndim", "no")
    if mask is not None and n_dimensions != 2:
        raise ValueError(
            f"attention_mask has {n_dimensions} dimensions, which a recurrent layer cannot follow: {remedy}"
        )
    if mask is None or mask.dtype == torch.bool or mask.shape[1] == 1 or torch.compiler.is_compiling():
        return
    if ((mask != 0) & (mask != 1)).any():
        raise ValueError(
            f"attention_mask holds {mask.min().item():.4g} to {mask.max().item():.4g}, which a recurrent "
            f"layer cannot follow: {remedy}"
        )


def check_shapes(layer_types, has_states: bool, shape, attention_mask, position_ids) -> None:
    """Raise ValueError for a mask or positions of other rows or another length than tokens of `shape`, or for
    a mask that states cannot follow. A mask for each of `layer_types` may be given."""
    n_rows, n_tokens = shape
    if position_ids is not None and position_ids.shape not in ((n_rows, n_tokens), (1, n_tokens)):
        raise ValueError(
            f"position_ids are {list(position_ids.shape)}, and the tokens {[n_rows, n_tokens]}: give "
            "(rows, tokens) or (1, tokens)"
        )
    is_dict = isinstance(attention_mask, dict)
    missing = set(layer_types) - set(attention_mask) if is_dict else None
    if missing:
        raise ValueError(f"attention_mask is a dict without {', '.join(sorted(missing))}")
    if has_states:
        check_padding(attention_mask.get(RecurrentStateLayer._layer_type) if is_dict else attention_mask)
    masks = attention_mask.values() if is_dict else (attention_mask,)
    for mask in masks:
        if getattr(mask, "ndim", 0) == 2 and (mask.shape[0] != n_rows or mask.shape[1] < n_tokens):
            raise ValueError(
                f"attention_mask is {list(mask.shape)}, and the tokens {[n_rows, n_tokens]}: give (rows, "
                "earlier and new tokens)"
            )


class TimeLayout:
    """Layout of the time axis of one forward pass, for all its recurrent layers.

    Args:
        valid: (B, T) bool, False at padding; None: no padding.
        document: (B, T) int, increasing where a packed document starts, 0 for one that continues from the
            given state; None: each row is one document.
    """

    def __init__(self, valid: torch.Tensor | None = None, document: torch.Tensor | None = None):
        self.valid = valid
        self.document = document
        self.starts = None  # (B, T) bool, True where the state is reset
        if document is not None:
            self.starts = torch.diff(document, dim=1, prepend=torch.zeros_like(document[:, :1])) != 0

    @property
    def is_plain(self) -> bool:
        """True if every row is one document without padding."""
        return self.valid is None and self.document is None

    @cached_property
    def last_valid(self) -> torch.Tensor:
        """(B, 1 + T) int: 0 before the first token; after token t the number, from 1, of the last token that
        is not padding, or 0. For a layout with padding."""
        number = torch.arange(1, self.valid.shape[1] + 1, device=self.valid.device)
        return F.pad(torch.where(self.valid, number, 0), (1, 0)).cummax(dim=1).values

    @cached_property
    def segments(self) -> Segments:
        """The segments of this layout, which must hold at least one token."""
        some = self.valid if self.valid is not None else self.document
        n_rows, n_tokens = some.shape
        document = torch.zeros_like(some, dtype=torch.long) if self.document is None else self.document.long()
        rows = torch.arange(n_rows, device=some.device)[:, None].expand_as(some)
        key = (rows * (n_tokens + 1) + document).flatten()
        valid = torch.ones_like(key, dtype=torch.bool) if self.valid is None else self.valid.flatten()
        tokens = valid.nonzero().squeeze(1)
        _, lengths = torch.unique_consecutive(key[tokens], return_counts=True)
        first = lengths.cumsum(0) - lengths
        offset = torch.arange(int(lengths.max()), device=some.device)
        return Segments(
            tokens=tokens,
            lengths=lengths,
            row=rows.flatten()[tokens[first]],
            continues=document.flatten()[tokens[first]] == 0,
            grid=(first[:, None] + offset).clamp(max=len(tokens) - 1),
            filled=offset < lengths[:, None],
        )
