"""The processes that train one model together: which of them this is, and what they tell each other.

The first process alone reads the corpus, plans, writes to the run folder and measures; the others take from
it what they need. In a run of one process each function here does what it does for the first of several.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, Sampler

from hf_genlm.errors import UserError
from hf_genlm.text.encoding import n_cores
from hf_genlm.text.packing import IGNORED

T = TypeVar("T")
# for what only the first one does, as reading a large corpus; a process that dies is noticed at once
_PATIENCE = timedelta(hours=24)
# of gloo, the CPU's; an error of NCCL may be the process's own, and is shown
_DEATHS = ("closed by peer", "reset by peer", "Broken pipe")


class LostProcess(Exception):
    """Another process of the run has ended before this one."""


def join() -> None:
    """Make this process one of its group, where a launcher has started several.

    Raises:
        UserError: they cannot reach each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":  # Apple's GPU is one, and has no collectives
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    os.environ.setdefault("OMP_NUM_THREADS", str(_share_of_cores()))
    try:
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_PATIENCE)
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):  # gloo takes the address that the machine's name stands for
            raise
        raise UserError(
            "the processes of this run do not reach each other at the addresses of their machines' names: "
            "name the network interface on each machine, as in GLOO_SOCKET_IFNAME=eth0"
        ) from error


def leave() -> None:
    """Undo `join`; the processes then end without waiting for each other."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def index() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """True if this is the one that writes and measures."""
    return index() == 0


def is_sharded() -> bool:
    """True if each process holds only a part of the model or of what its optimizer remembers."""
    launched_with = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return any(os.environ.get(name, "false").lower() == "true" for name in launched_with)


def from_first(make: Callable[[], T]) -> T:
    """What `make()` gives in the first process, in all of them; the others wait for it.

    Raises:
        UserError: in all of them, where `make` raised it.
        LostProcess: in the others, where `make` failed otherwise.
    """
    if count() == 1:
        return make()
    if not is_first():
        outcome: list[Any] = [None]
        _broadcast(outcome)
        return _value_of(*outcome[0])
    try:
        value = make()
    except Exception as error:
        _broadcast([(None, str(error) if isinstance(error, UserError) else None, True)])
        raise
    _broadcast([(value, None, False)])
    return value


def together(act: Callable[[], T]) -> T:
    """`act()` in each process; none goes on before all are done.

    Raises:
        UserError: in all of them, where one raised it.
    """
    value, message = None, None
    try:
        value = act()
    except UserError as error:
        message = str(error)
    messages = [message]
    if count() > 1:
        messages = [None] * count()
        dist.all_gather_object(messages, message)
    for found in messages:
        if found is not None:
            raise UserError(found)
    return value


def all_of(holds: bool) -> bool:
    """True if `holds` is true in each process."""
    if count() == 1:
        return holds
    message = torch.tensor(float(holds), device=_device_of_messages())
    dist.all_reduce(message, op=dist.ReduceOp.MIN)
    return bool(message.item())


def share_weights(model: torch.nn.Module) -> None:
    """Give every process the parameters and buffers that the first one has."""
    if count() == 1:
        return
    device = _device_of_messages()
    for tensor in (*model.parameters(), *model.buffers()):
        message = tensor.detach().to(device)
        dist.broadcast(message, src=0)
        tensor.data.copy_(message)


def clock_of_first(now: float) -> float:
    """`now` of the first process."""
    if count() == 1:
        return now
    message = torch.tensor(now, dtype=torch.float64, device=_device_of_messages())
    dist.broadcast(message, src=0)
    return message.item()


def rows_of_each(batch_size: int, accumulation: int = 1) -> int:
    """Rows of one forward pass in each process, of `batch_size` in all of them.

    Raises:
        UserError: the processes do not share them evenly.
    """
    n = count()
    if batch_size % n == 0:
        return batch_size // n
    fewer = max(d for d in range(1, n) if batch_size % d == 0)
    remedy = f"--processes {fewer}, or --set training.batch_size={n * max(1, round(batch_size / n))}"
    rows = batch_size * accumulation
    if rows % n == 0:
        passes = next(a for a in range(1, accumulation + 1) if rows % (a * n) == 0)
        remedy += (
            f", or for the same steps --set training.batch_size={rows // passes} and --set "
            f"training.gradient_accumulation_steps={passes}"
        )
    raise UserError(
        f"training.batch_size = {batch_size} is over all processes, and {n} of them cannot share it evenly: "
        f"{remedy}"
    )


def draw_apart() -> None:
    """Let each process draw its own random numbers from here on, those of dropout; the first one's stay."""
    if index() > 0:
        torch.manual_seed(torch.initial_seed() + index())


def share_threads(stated: int | None) -> None:
    """Torch's threads in this process: `stated`, or else its share of the machine's cores."""
    if stated is not None:
        torch.set_num_threads(stated)
    elif count() > 1:
        torch.set_num_threads(_share_of_cores())


def shard_on_cpu() -> None:
    """Let Accelerate shard a model on CPUs too, which it takes for the business of accelerators."""
    from accelerate import DistributedType, PartialState

    state = PartialState()
    if is_sharded() and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU  # what it turns into FSDP


def load_whole() -> None:
    """Let the models that are loaded from here on be whole, which transformers shards under ZeRO-3."""
    if is_sharded():
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


@contextlib.contextmanager
def noticing_losses() -> Iterator[None]:
    """Turns the errors of a message that another process can no longer send or receive into one.

    Raises:
        LostProcess: another process has ended.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if count() > 1 and any(word in str(error) for word in _DEATHS):
            raise LostProcess(f"process {index()} of {count()} has lost another one") from error
        raise


class RowsAndBlank(Dataset):
    """Rows that are read a batch at a time, and behind them one without labels, which adds nothing to a
    loss."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows) + 1

    def __getitems__(self, indices: Sequence[int]) -> Mapping[str, np.ndarray]:
        """A whole batch: each value (B, T)."""
        n = len(self.rows)
        batch = self.rows.__getitems__([min(i, n - 1) for i in indices])
        batch["labels"][np.array(indices) == n] = IGNORED
        return batch


class SharedOrder(Sampler[int]):
    """The order in which one process would read `n_rows`, filled up to whole steps by the blank one behind
    them: each process then has as many batches as every other, and no row is read twice.

    `draw(seed, epoch)` gives it, where the rows have an order of their own; else it is a permutation.
    """

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        draw: Callable[[int, int], np.ndarray] | None = None,
    ):
        super().__init__()
        self.n_rows, self.batch_size, self.seed, self.epoch = n_rows, batch_size, seed, epoch
        self._draw = draw or self._permutation

    def __len__(self) -> int:
        return -(-self.n_rows // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        yield from self._draw(self.seed, self.epoch()).tolist()
        yield from [self.n_rows] * (len(self) - self.n_rows)

    def _permutation(self, seed: int, epoch: int) -> np.ndarray:
        # as accelerate's SeedableRandomSampler
        generator = torch.Generator().manual_seed(seed + epoch)
        return torch.randperm(self.n_rows, generator=generator).numpy()


def _value_of(value: Any, message: str | None, has_failed: bool) -> Any:
    if message is not None:
        raise UserError(message)
    if has_failed:
        raise LostProcess("the first process has failed")
    return value


def _broadcast(objects: list[Any]) -> None:
    dist.broadcast_object_list(objects, src=0, device=_device_of_messages())


def _device_of_messages() -> torch.device:
    """Where the backend sends from: the CPU, or the accelerator of this process."""
    if "gloo" in dist.get_backend():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _share_of_cores() -> int:
    return max(1, n_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", count())))
