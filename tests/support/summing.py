"""What each of three processes does in the test of sums through shared memory; a failed assertion ends it."""

import os
import random
import time

import torch
import torch.distributed as dist

from hf_genlm.training import processes, shared_sum
from hf_genlm.training.message import Agreed, StepMessage
from hf_genlm.training.shared_sum import SharedSum


def check_sums(length: int) -> None:
    """Many in a row, now this process the last to come, now another."""

    def numbers(seed: int) -> torch.Tensor:
        return torch.randn(length, generator=torch.Generator().manual_seed(seed))

    sums, out = SharedSum.of(length), torch.empty(length)
    for turn in range(50):
        if random.random() < 0.1:
            time.sleep(0.002)
        seeds = [turn * processes.count() + n for n in range(processes.count())]
        given = numbers(seeds[processes.index()])
        sums([given[:1], given[1:]], out=out)
        assert torch.equal(out, torch.stack([numbers(seed) for seed in seeds]).sum(0)), (length, turn)


def check_message(is_shared: bool) -> None:
    """A mean over 12 targets, 4 in each process, of gradients that are sums over 12."""
    model = torch.nn.Linear(4, 1, bias=False)
    message = StepMessage(model)
    assert (message._shared is not None) == is_shared
    rank = processes.index()
    model.weight.grad = torch.full((1, 4), rank + 1.0)
    agreed = message.exchange(rank, 12.0, 4.0, 5000.25 + rank, is_stopped=rank == 1)
    assert agreed == Agreed(loss=3.0, now=5000.25, is_stopped=True)
    assert model.weight.grad.tolist() == [[6.0] * 4]


def no_room(*arguments) -> None:
    raise OSError


class Apart(shared_sum.socket.socket):
    """One of a machine where there is no such address."""

    def connect_ex(self, address):
        return 111


def check_what_cannot_be_shared() -> None:
    allocate, shared_sum.os.posix_fallocate = os.posix_fallocate, no_room
    check_message(is_shared=False)
    shared_sum.os.posix_fallocate = allocate
    socket = shared_sum.socket.socket
    if processes.index() == processes.count() - 1:
        shared_sum.socket.socket = Apart
    assert SharedSum.of(4) is None  # in all of them
    shared_sum.socket.socket = socket


def end_one() -> None:
    """The others learn of it."""
    sums = SharedSum.of(4)
    dist.barrier()
    if processes.index() == processes.count() - 1:
        os._exit(0)
    try:
        sums([torch.ones(4)], out=torch.empty(4))
    except processes.LostProcess:
        print("lost", flush=True)
    os._exit(0)  # of a group that is not whole one cannot take leave


if __name__ == "__main__":
    processes.join()
    for length in (1, 2, 5, 30_001):  # fewer than there are processes, too
        check_sums(length)
    check_message(is_shared=True)
    check_what_cannot_be_shared()
    end_one()
