"""Ratios behind the choices in model/recurrence_genlm.py: python recipes/benchmarks/recurrent_forms.py

Each pair runs in turn, A B A B ..., and the median of the ratios A / B is printed.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.utils.rnn import pack_padded_sequence

from hf_genlm.model.scan_genlm import _chunked_scan, _sequential_scan

ROUNDS = 9
SHAPES = ((16, 128, 192), (32, 256, 384))  # rows, tokens, width


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(a: Callable[[], object], b: Callable[[], object]) -> float:
    """Median of time(a) / time(b), pair by pair, after one warm-up of each."""
    seconds(a), seconds(b)
    return statistics.median(seconds(a) / seconds(b) for _ in range(ROUNDS))


def main() -> None:
    """Print a line for each comparison and shape."""
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for rows, tokens, width in SHAPES:
        shape = f"{rows} x {tokens} x {width}"
        decay, new, initial = (
            torch.rand(rows, tokens, width),
            torch.rand(rows, tokens, width),
            torch.rand(rows, width),
        )
        scans = ratio(
            lambda: _chunked_scan(decay, new, initial),  # noqa: B023  called within the iteration
            lambda: _sequential_scan(decay, new, initial),  # noqa: B023
        )
        print(f"scan, chunked / sequential         {shape:>16}   {scans:.2f}")
        x = torch.randn(rows, tokens, width, requires_grad=True)
        packed = pack_padded_sequence(x, [tokens] * rows, batch_first=True)
        for name, kernel in (("elman", torch.nn.RNN), ("gru", torch.nn.GRU), ("lstm", torch.nn.LSTM)):
            cell = kernel(width, width, batch_first=True)
            kernels = ratio(
                lambda: cell(packed)[0].data.sum().backward(retain_graph=True),  # noqa: B023
                lambda: cell(x)[0].sum().backward(),  # noqa: B023
            )
            print(f"{name + ', PackedSequence / dense':<34} {shape:>16}   {kernels:.2f}")


if __name__ == "__main__":
    main()
