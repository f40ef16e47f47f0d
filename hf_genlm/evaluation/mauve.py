"""MAUVE between generated and human texts, by the hidden states of a model that is at hand.

Published MAUVE (Pillutla et al., NeurIPS 2021) takes its features from GPT-2 large. Here they are those of
the model that is measured, so that no other has to be fetched: the figure is **not comparable with published
MAUVE**, nor between models whose features differ, and its name says so. It serves to compare settings of one
model, as its temperature. The computation from the features on is that of the package mauve-text, with its
defaults.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from hf_genlm.errors import UserError

_ROWS = 32  # texts that go through the model at once
LEAST_TEXTS = 20  # of either kind: mauve-text makes a cluster of every ten


def check_mauve(n_samples: int, n_references: int) -> None:
    """That MAUVE of so many texts can be computed.

    Raises:
        UserError: mauve-text is not installed, or there are too few texts.
    """
    if find_spec("mauve") is None:
        raise UserError("MAUVE needs the package mauve-text: pip install 'hf_genlm[mauve]'")
    if min(n_samples, n_references) < LEAST_TEXTS:
        raise UserError(
            f"MAUVE of {n_samples} samples and {n_references} reference texts: it needs at least "
            f"{LEAST_TEXTS} of each, and says something from some hundreds on"
        )


def last_hidden_states(model: Any, ids: Sequence[Sequence[int]], start_id: int) -> np.ndarray:
    """The last layer's hidden state at the last token of each text, given `start_id` and all before it.

    Args:
        model: a causal model of transformers, in eval mode; padding stands on the right, where it cannot see
            it.
        ids: token ids of M texts.

    Returns:
        (M, hidden size) float32.
    """
    device = next(model.parameters()).device
    states = []
    with torch.inference_mode():
        for first in range(0, len(ids), _ROWS):
            rows = [[start_id, *text] for text in ids[first : first + _ROWS]]
            longest = max(map(len, rows))
            padded = torch.tensor([row + [start_id] * (longest - len(row)) for row in rows], device=device)
            hidden = model.base_model(input_ids=padded, use_cache=False).last_hidden_state
            ends = torch.tensor([len(row) - 1 for row in rows], device=device)
            states.append(hidden[torch.arange(len(rows), device=device), ends].float().cpu().numpy())
    return np.concatenate(states)


def mauve_of_features(reference: np.ndarray, samples: np.ndarray) -> float:
    """MAUVE from 0 to 1 of features (M, d) and (M', d), clustered from a fixed seed."""
    from mauve import compute_mauve

    return float(compute_mauve(p_features=reference, q_features=samples).mauve)
