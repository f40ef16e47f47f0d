"""A window of a document at a time: what a private run trains on, where no row may hold two documents."""

import numpy as np

from hf_genlm.text.encoding import TokenizedDocuments
from hf_genlm.text.packing import IGNORED


class DocumentWindows:
    """n documents, of each of which `take` gives at most `max_seq_length` tokens.

    A window lies anywhere in `eos document eos` with the same chance, whole where it is short. As in packed
    rows, its first token is at position 0 and is only read. Shorter ones are filled up at their end, labelled
    -100: what comes after a token changes nothing about it.
    """

    def __init__(self, documents: TokenizedDocuments, max_seq_length: int, eos_id: int, pad_id: int):
        self.documents, self.max_seq_length = documents, max_seq_length
        self.eos_id, self.pad_id = eos_id, pad_id
        self._lengths = np.diff(documents.offsets) + 2

    @property
    def n_rows(self) -> int:
        """Documents, one row each."""
        return len(self.documents)

    @property
    def n_targets(self) -> int:
        """Labels of a window, on average."""
        return round(float(np.minimum(self._lengths, self.max_seq_length).mean())) - 1

    def take(self, chosen: np.ndarray, places: np.ndarray) -> dict[str, np.ndarray]:
        """`input_ids`, `position_ids` and `labels`, each (k, T) int64, of the documents `chosen` (k,), the
        shortest first; `places` (k,) are uniform integers that say where each window begins."""
        order = np.argsort(self._lengths[chosen], kind="stable")
        chosen, places = chosen[order], places[order].astype(np.uint64)
        lengths = self._lengths[chosen]
        n_places = np.maximum(1, lengths - self.max_seq_length + 1)
        starts = (places % n_places.astype(np.uint64)).astype(np.int64)
        at_kT = starts[:, None] + np.arange(self.max_seq_length)
        ids_kT = self.documents.take(self.documents.offsets[chosen][:, None] + at_kT - 1).astype(np.int64)
        is_end_kT = (at_kT == 0) | (at_kT == lengths[:, None] - 1)
        is_padding_kT = at_kT >= lengths[:, None]
        ids_kT[is_end_kT], ids_kT[is_padding_kT] = self.eos_id, self.pad_id
        self.documents.release()
        return {
            "input_ids": ids_kT,
            "position_ids": np.broadcast_to(np.arange(self.max_seq_length), ids_kT.shape).copy(),
            "labels": np.where(is_padding_kT, IGNORED, ids_kT),
        }
