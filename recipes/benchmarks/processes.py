"""Training tokens a second of two processes with one thread each, and of one process with two, in turns.

    python recipes/benchmarks/processes.py [--rounds 9] [--steps 8]

A step is forward, backward, clipping and AdamW of the same rows, in float32. Two processes also exchange what
a training does in each step: gradients by DistributedDataParallel, the number of targets, the time and
whether to stop. While the one process has its turn the other waits, without a core.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

SHAPES = {  # width, layers, tokens in a row, rows over all processes: those of a ladder's rungs and a size
    "64 x 1": (64, 1, 64, 16),
    "256 x 4": (256, 4, 128, 16),
}
DECODERS = ("gated_linear", "lstm", "transformer")
VOCABULARY = 2048


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    options = parser.parse_args()
    from hf_genlm.cli.launch import is_launched, launch

    if is_launched():
        measure(options.rounds, options.steps)
        return 0
    return launch([__file__, *sys.argv[1:]], 2)[0]


def measure(rounds: int, steps: int) -> None:
    """Print a line for each shape: medians, and the median of the ratios within a round."""
    import torch

    from hf_genlm.memory import keeping_memory
    from hf_genlm.training import processes

    processes.join()
    for shape in SHAPES:
        for decoder in DECODERS:
            alone, together = step_of(decoder, shape, 1), step_of(decoder, shape, 2)
            speeds: dict[int, list[float]] = {1: [], 2: []}
            with keeping_memory():
                for _ in range(rounds):
                    for n, step in ((1, alone), (2, together)):
                        torch.set_num_threads(2 // n)
                        seconds = 0.0
                        if processes.index() < n:
                            step()  # not timed: threads start, memory comes
                            start = time.perf_counter()
                            for _ in range(steps):
                                step()
                            seconds = time.perf_counter() - start
                        processes.from_first(lambda: None)
                        _, _, tokens, rows = SHAPES[shape]
                        speeds[n].append(rows * (tokens - 1) * steps / max(seconds, 1e-9))
            if processes.is_first():
                ratios = sorted(two / one for one, two in zip(speeds[1], speeds[2], strict=True))
                medians = [statistics.median(speeds[n]) for n in (1, 2)]
                print(
                    f"{shape:<8} {decoder:<13} 1 x 2 threads {medians[0]:>7,.0f} tokens/s   2 x 1 thread "
                    f"{medians[1]:>7,.0f} tokens/s   ratio {statistics.median(ratios):.2f} "
                    f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
                    flush=True,
                )


def step_of(decoder: str, shape: str, n: int) -> Callable[[], None]:
    """A training step by `n` processes of the rows of a shape."""
    import torch
    from accelerate.utils import reduce
    from torch.nn.parallel import DistributedDataParallel

    from hf_genlm.config.recipe import TrainingRecipe
    from hf_genlm.model import GenLMConfig, GenLMForCausalLM, mixers_of
    from hf_genlm.training import processes
    from hf_genlm.training.optimizer import OptimizerFactory

    width, layers, tokens, rows = SHAPES[shape]
    torch.manual_seed(0)
    model = GenLMForCausalLM(
        GenLMConfig(vocab_size=VOCABULARY, hidden_size=width, mixer_types=mixers_of(decoder, layers))
    )
    recipe = TrainingRecipe(learning_rate=1e-4, embedding_lr_ratio=1.0, weight_decay=0.1)
    optimizer = OptimizerFactory()(model, recipe)
    network = DistributedDataParallel(model, broadcast_buffers=False) if n > 1 else model
    ids = torch.randint(0, VOCABULARY, (rows, tokens)).chunk(n)[processes.index() % n]
    n_targets = ids.shape[0] * (tokens - 1)

    def step() -> None:
        targets = torch.tensor(float(n_targets))
        if n > 1:
            targets = reduce(targets, "sum")
        loss = network(ids, labels=ids, use_cache=False, skip_logits=True, num_items_in_batch=targets).loss
        (n * loss).backward()  # gradients are averaged over the processes
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if n > 1:
            processes.broadcast_time(time.monotonic())
            processes.is_true_in_all(True)

    return step


if __name__ == "__main__":
    sys.exit(main())
