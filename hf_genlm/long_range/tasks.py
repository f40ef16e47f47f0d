"""Synthetic tasks that ask a decoder for what it read earlier.

| task | row | question |
|---|---|---|
| recall | K pairs of a key and a value, then all keys in another order | the value of each key |
| copy | N symbols scattered among blanks, then N marks | the symbols in their order |
| passkey | a mark and five digits hidden in filler, and at the end the mark again | the digits |

Sources: multi-query associative recall, Arora et al., 2023, arXiv:2312.04927; selective copying, Gu and Dao,
2023, arXiv:2312.00752; passkey retrieval, Mohtashami and Jaggi, 2023, arXiv:2305.16300. Each task has its own
small vocabulary, and rows are drawn from a seeded generator: there is no data set to read or to memorize.

Legend of shapes: B rows, T tokens, K pairs, N symbols.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hf_genlm.errors import UserError
from hf_genlm.evaluation.measurement import Measurement, ratio_stderr

IGNORED = -100  # target of positions without a question, ignored by torch's cross-entropy

N_KEYS = N_VALUES = 128
N_SYMBOLS, N_COPIED = 16, 16
N_DIGITS, N_FILLERS, PASSKEY_DIGITS = 10, 32, 5
_BATCH_SIZE = 32  # rows that are measured at once


class Batch(NamedTuple):
    """Rows of a task, (B, T) int64 each.

    `targets` are at the positions whose output should be that token (no further shift), `IGNORED` elsewhere.
    `distances` count the tokens between the answer in the input and its question, 0 elsewhere.
    """

    inputs: np.ndarray
    targets: np.ndarray
    distances: np.ndarray


@dataclass(frozen=True)
class Task:
    """A synthetic task: rows of a given size, and the unit of the size."""

    name: str
    vocab_size: int
    size_name: str  # unit of the size: pairs, or tokens of a row
    sizes: tuple[int, ...]  # defaults, ascending
    limits: tuple[int, int]  # minimum and maximum size
    n_tokens: Callable[[int], int]  # of a row of this size
    make: Callable[[np.random.Generator, int, int], Batch]  # (generator, rows, size)
    chance: Callable[[int], float]  # accuracy of the best guess that ignores the position of the answer

    def batch(self, generator: np.random.Generator, n_rows: int, size: int) -> Batch:
        """Make `n_rows` rows of `size`; the same generator state gives the same rows.

        Raises:
            UserError: a size outside `limits`.
        """
        self.check_size(size)
        return self.make(generator, n_rows, size)

    def check_size(self, size: int) -> None:
        """Check a size.

        Raises:
            UserError: it is outside `limits`.
        """
        low, high = self.limits
        if not low <= size <= high:
            raise UserError(f"{self.name} of {size} {self.size_name}: must be in {low}..{high}")


def _empty(n_rows: int, n_tokens: int) -> Batch:
    shape = n_rows, n_tokens
    return Batch(
        np.zeros(shape, np.int64), np.full(shape, IGNORED, dtype=np.int64), np.zeros(shape, np.int64)
    )


def _distinct(generator: np.random.Generator, n_rows: int, n_of: int, n_drawn: int) -> np.ndarray:
    """Draw (n_rows, n_drawn) numbers below `n_of` in random order, without repeats within a row."""
    return generator.random((n_rows, n_of)).argsort(axis=1)[:, :n_drawn]


def make_recall(generator: np.random.Generator, n_rows: int, n_pairs: int) -> Batch:
    """Make rows of K pairs of a key (0 .. N_KEYS - 1) and a value (the ids after them), and K questions.

    No key and no value repeats within a row, so that a guess among its values is right once in K. The
    distance is that between the key and its question.
    """
    keys_BK = _distinct(generator, n_rows, N_KEYS, n_pairs)
    values_BK = N_KEYS + _distinct(generator, n_rows, N_VALUES, n_pairs)
    asked_BK = _distinct(generator, n_rows, n_pairs, n_pairs)
    batch = _empty(n_rows, 3 * n_pairs)
    batch.inputs[:, 0 : 2 * n_pairs : 2] = keys_BK
    batch.inputs[:, 1 : 2 * n_pairs : 2] = values_BK
    batch.inputs[:, 2 * n_pairs :] = np.take_along_axis(keys_BK, asked_BK, axis=1)
    batch.targets[:, 2 * n_pairs :] = np.take_along_axis(values_BK, asked_BK, axis=1)
    batch.distances[:, 2 * n_pairs :] = 2 * n_pairs + np.arange(n_pairs) - 2 * asked_BK
    return batch


def make_copy(generator: np.random.Generator, n_rows: int, n_tokens: int) -> Batch:
    """Make rows of N_COPIED symbols (0 .. N_SYMBOLS - 1) among blanks, and as many marks as questions."""
    blank, mark = N_SYMBOLS, N_SYMBOLS + 1
    first_asked = n_tokens - N_COPIED
    places_BN = np.sort(_distinct(generator, n_rows, first_asked, N_COPIED), axis=1)
    symbols_BN = generator.integers(N_SYMBOLS, size=(n_rows, N_COPIED))
    batch = _empty(n_rows, n_tokens)
    batch.inputs[:, :first_asked] = blank
    np.put_along_axis(batch.inputs, places_BN, symbols_BN, axis=1)
    batch.inputs[:, first_asked:] = mark
    batch.targets[:, first_asked:] = symbols_BN
    batch.distances[:, first_asked:] = first_asked + np.arange(N_COPIED) - places_BN
    return batch


def make_passkey(generator: np.random.Generator, n_rows: int, n_tokens: int) -> Batch:
    """Make rows of fillers with a mark and digits hidden in them, and a question for the digits at the end.

    The question is the mark and all digits but the last, so that each digit is asked given those before it.
    """
    mark = N_DIGITS + N_FILLERS
    asked_at = n_tokens - PASSKEY_DIGITS
    hidden_B1 = generator.integers(asked_at - PASSKEY_DIGITS, size=(n_rows, 1))
    digits_BN = generator.integers(N_DIGITS, size=(n_rows, PASSKEY_DIGITS))
    batch = _empty(n_rows, n_tokens)
    batch.inputs[:] = N_DIGITS + generator.integers(N_FILLERS, size=batch.inputs.shape)
    np.put_along_axis(batch.inputs, hidden_B1, mark, axis=1)
    np.put_along_axis(batch.inputs, hidden_B1 + 1 + np.arange(PASSKEY_DIGITS), digits_BN, axis=1)
    batch.inputs[:, asked_at] = mark
    batch.inputs[:, asked_at + 1 :] = digits_BN[:, :-1]
    batch.targets[:, asked_at:] = digits_BN
    batch.distances[:, asked_at:] = asked_at - hidden_B1 - 1
    return batch


TASKS = {
    task.name: task
    for task in (
        Task(
            "recall",
            vocab_size=N_KEYS + N_VALUES,
            size_name="pairs",
            sizes=(4, 8, 16, 32, 64),
            limits=(1, min(N_KEYS, N_VALUES)),
            n_tokens=lambda size: 3 * size,
            make=make_recall,
            chance=lambda size: 1 / size,
        ),
        Task(
            "copy",
            vocab_size=N_SYMBOLS + 2,
            size_name="tokens",
            sizes=(64, 128, 256),
            limits=(2 * N_COPIED, 2**20),
            n_tokens=lambda size: size,
            make=make_copy,
            chance=lambda size: 1 / N_SYMBOLS,
        ),
        Task(
            "passkey",
            vocab_size=N_DIGITS + N_FILLERS + 1,
            size_name="tokens",
            sizes=(64, 128, 256),
            limits=(2 * PASSKEY_DIGITS + 2, 2**20),
            n_tokens=lambda size: size,
            make=make_passkey,
            chance=lambda size: 1 / N_DIGITS,
        ),
    )
}


def measure_task(model: Any, task: Task, sizes: Sequence[int], *, n_rows: int = 64) -> list[Measurement]:
    """Measure the accuracy of a causal model on a task, by size and by distance.

    Args:
        model: in evaluation mode, called as `model(input_ids=(B, T) int64, use_cache=False)`; its `.logits`
            are (B, T, V), V at least `task.vocab_size`.
        n_rows: rows of each size, the same for every model.

    Returns:
        NAME_accuracy/64_pairs, and NAME_accuracy/64_pairs/distance_33-64 for distances of doubling width
        (fraction). n counts questions; standard errors are clustered by row.
    """
    measurements = []
    for size in sizes:
        batch = task.batch(np.random.default_rng([0, size]), n_rows, size)
        parts = [slice(i, i + _BATCH_SIZE) for i in range(0, n_rows, _BATCH_SIZE)]
        hits_BT = np.concatenate([_hits(model, batch.inputs[part], batch.targets[part]) for part in parts])
        is_asked_BT = batch.targets != IGNORED
        name = f"{task.name}_accuracy/{size}_{task.size_name}"
        measurements.append(_accuracy(name, hits_BT, is_asked_BT))
        for first, last in distance_buckets(int(batch.distances.max())):
            within_BT = is_asked_BT & (batch.distances >= first) & (batch.distances <= last)
            if within_BT.any():
                measurements.append(_accuracy(f"{name}/distance_{first}-{last}", hits_BT, within_BT))
    return measurements


def distance_buckets(farthest: int) -> list[tuple[int, int]]:
    """(first, last) distances: 1-16, 17-32, 33-64, ... up to the one that contains `farthest`."""
    found = [(1, 16)]
    while found[-1][1] < farthest:
        found.append((found[-1][1] + 1, 2 * found[-1][1]))
    return found


def _hits(model: Any, inputs_BT: np.ndarray, targets_BT: np.ndarray) -> np.ndarray:
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        logits_BTV = model(input_ids=torch.from_numpy(inputs_BT).to(device), use_cache=False).logits
    return logits_BTV.argmax(dim=-1).cpu().numpy() == targets_BT


def _accuracy(name: str, hits_BT: np.ndarray, asked_BT: np.ndarray) -> Measurement:
    hits_B, asked_B = (hits_BT & asked_BT).sum(axis=1), asked_BT.sum(axis=1)
    n, stderr = int(asked_B.sum()), ratio_stderr(hits_B, asked_B)
    return Measurement(name, float(hits_B.sum() / n), "fraction", n, stderr, "made", True)
