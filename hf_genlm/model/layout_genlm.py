"""What the time axis of a batch holds: padding, packed documents, and where a state starts and ends."""

from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Segments(NamedTuple):
    """The runs of tokens that share one state, as rows of their own. n tokens in S segments of at most L."""

    tokens: torch.Tensor  # (n,) indices into the flattened (B * T) tokens, padding left out
    lengths: torch.Tensor  # (S,)
    row: torch.Tensor  # (S,) the batch row that each comes from
    continues: torch.Tensor  # (S,) whether it goes on from the given state
    grid: torch.Tensor  # (S, L) indices into `tokens`
    filled: torch.Tensor  # (S, L) False where `grid` is beyond the segment


def documents_going_on(position_ids: torch.Tensor) -> torch.Tensor | None:
    """(B, T) numbers of the documents of rows that may begin in mid-document: 0 before the first position 0,
    one more from each on. None where no document starts, unless this is compiled."""
    is_start = position_ids == 0
    if not torch.compiler.is_compiling() and not is_start.any():
        return None
    return is_start.cumsum(dim=-1)


class TimeLayout:
    """What the time axis of one forward pass holds, for all recurrent layers of it.

    Args:
        valid: (B, T) bool, False at padding; None: no padding.
        document: (B, T) int, rising where a packed document starts, 0 going on from the given state; None:
            one each.
    """

    def __init__(self, valid: torch.Tensor | None = None, document: torch.Tensor | None = None):
        self.valid = valid
        self.document = document
        self.starts = None  # (B, T) bool: where the state is forgotten
        if document is not None:
            self.starts = torch.diff(document, dim=1, prepend=torch.zeros_like(document[:, :1])) != 0

    @property
    def is_plain(self) -> bool:
        """True if every row is one document without padding."""
        return self.valid is None and self.document is None

    @cached_property
    def last_valid(self) -> torch.Tensor:
        """(B, 1 + T) int: before the first token 0, after token t the number, from 1, of the last that is no
        padding, or 0. For a layout with padding."""
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
