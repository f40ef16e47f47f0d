"""What processes on CPUs tell each other in a step of training: all of it in one message.

A message costs its way and the wait for the slowest process, which in a small model's step of 20 ms is more
than its bytes cost. DistributedDataParallel sends gradients in buckets while the backward pass runs, which
pays where something other than the computing cores carries them. Processes of one machine sum the message in
memory that they share; those of several, by the network.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from hf_genlm.training import processes
from hf_genlm.training.shared_sum import SharedSum

_SECONDS = 4096.0  # a clock is sent as a multiple of it and the rest, which float32 holds to 0.25 ms


@dataclass(frozen=True)
class Agreed:
    """What all processes know after a step."""

    loss: float  # mean over the targets of all
    now: float  # s, by the clock of the first process
    is_stopped: bool  # whether one was asked to stop


class StepMessage:
    """Sums the gradients of `model` over the processes, with the few numbers that they decide by."""

    def __init__(self, model: torch.nn.Module):
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._flat = torch.empty(sum(weight.numel() for weight in self._weights) + 5)
        self._shared = SharedSum.of(len(self._flat))

    @torch.no_grad()
    def exchange(self, loss: float, over: float, n_targets: float, now: float, is_stopped: bool) -> Agreed:
        """Turn each gradient into that of the mean loss over all targets. All processes must call this.

        Args:
            loss: summed over this process's targets and divided by `over`, whose gradients the weights hold.
            over: the same number in all processes: the targets of all where no row is short, since rounding
                is then that of one process.
            n_targets: how many targets this process had.
            now: this process's clock.
            is_stopped: whether this process was asked to stop.
        """
        thousands, rest = divmod(now, _SECONDS) if processes.is_first() else (0.0, 0.0)
        told = torch.tensor([loss, n_targets, is_stopped, thousands, rest], dtype=torch.float32)
        gradients = [weight.grad.reshape(-1) for weight in self._weights]
        self._sum([*gradients, told])
        loss, n_targets, n_stopped, thousands, rest = self._flat[-5:].tolist()
        scale = over / n_targets
        if scale != 1:
            self._flat *= scale
        sizes = [weight.numel() for weight in self._weights]
        for weight, part in zip(self._weights, self._flat[:-5].split(sizes), strict=True):
            weight.grad = part.view_as(weight)
        return Agreed(loss * scale, thousands * _SECONDS + rest, n_stopped > 0)

    def _sum(self, parts: list[torch.Tensor]) -> None:
        """Leave in `_flat` the sum over the processes of what each gives."""
        if self._shared is not None:
            self._shared(parts, out=self._flat)
        else:
            torch.cat(parts, out=self._flat)
            dist.all_reduce(self._flat)


def fits_one_message(model: torch.nn.Module) -> bool:
    """True if the processes send from the memory of whole models on CPUs."""
    is_on_cpu = all(weight.device.type == "cpu" for weight in model.parameters())
    return processes.count() > 1 and is_on_cpu and not processes.is_sharded()
