"""The processes that train one model together, by Accelerate and torch.distributed.

The first process alone reads the corpus, plans, writes to the run folder and measures; the others receive
what they need. Every function here also works in a run of one process. All collectives are Accelerate's.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, Sampler

from hf_genlm.errors import UserError
from hf_genlm.run_folder import SHARDING, STORE, is_watched, launched_as, n_cores
from hf_genlm.text.packing import IGNORED

T = TypeVar("T")
# of collectives: the others wait while the first process reads a large corpus; a dead one is noticed at once
_TIMEOUT = timedelta(hours=24)
_MEETING_TIMEOUT = timedelta(minutes=5)  # in which processes that no launcher of torch watches must start
END_S = 50  # between a signal and the end of a process: time for a last checkpoint
# in gloo's errors, where another process has ended; an error of NCCL may be the process's own, and is shown
_LOST_CONNECTION = ("closed by peer", "reset by peer", "Broken pipe")


class LostProcess(Exception):
    """Another process of the run has ended before this one."""


def join() -> None:
    """Join the process group, where a launcher has started several processes.

    They find each other through the file HF_GENLM_STORE if `hf_genlm.cli.launch` started them, else through
    MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: the processes cannot reach each other.
    """
    rank, world = launched_as()
    if world == 1 or dist.is_initialized():
        return
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":  # Apple's GPU has no collectives
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    os.environ.setdefault("OMP_NUM_THREADS", str(_cores_per_process()))
    options: dict[str, Any] = {"timeout": _TIMEOUT}
    if STORE in os.environ:
        options |= {"init_method": os.environ[STORE], "rank": rank, "world_size": world}
    elif not is_watched():
        store = meet(rank, world)  # noqa: F841  the process group meets in it again
    try:
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **options)
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):  # gloo listens at the address of the machine's host name
            raise
        raise UserError(
            "the processes of this run do not reach each other at the addresses of their machines' names: "
            "name the network interface on each machine, as in GLOO_SOCKET_IFNAME=eth0"
        ) from error


def meet(rank: int, world: int, timeout: timedelta = _MEETING_TIMEOUT) -> dist.Store:
    """Wait for the other processes at MASTER_ADDR and MASTER_PORT; returns the store that they share.

    Raises:
        UserError: they have not come; a launcher that has ended may have left its variables.
    """
    found: list[Any] = []

    def wait() -> None:
        try:
            found.append(next(dist.rendezvous("env://", rank, world, timeout=timeout))[0])
        except (dist.DistError, ValueError) as error:
            found.append(error)

    waiting = threading.Thread(target=wait, daemon=True)  # torch would not see Ctrl-C meanwhile
    waiting.start()
    waiting.join()
    if isinstance(found[0], Exception):
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"WORLD_SIZE={world}, but the other processes have not come to {place} within "
            f"{timeout.total_seconds():.0f} s: start them, or unset WORLD_SIZE, which an ended launcher may "
            "have left"
        ) from found[0]
    return found[0]


def end_after(parent_ends: Callable[[], Any]) -> None:
    """End this process by SIGTERM, as a person would, once `parent_ends` returns; by force `END_S` later."""

    def watch() -> None:
        parent_ends()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(END_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave() -> None:
    """Leave the process group; the processes then end without waiting for each other."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def index() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Return True in the process that writes and measures."""
    return index() == 0


def is_sharded() -> bool:
    """Return True under FSDP and DeepSpeed: a process holds a part of the model or of the optimizer state."""
    return any(os.environ.get(name, "false").lower() == "true" for name in SHARDING)


def from_first(make: Callable[[], T]) -> T:
    """Call `make` in the first process and return its value in every process.

    Raises:
        UserError: in every process, where `make` raised it.
        LostProcess: in the other processes, where `make` raised another error.
    """
    if count() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    if not is_first():
        value, message, has_failed = broadcast_object_list([None, None, True])
        if message is not None:
            raise UserError(message)
        if has_failed:
            raise LostProcess("the first process has failed")
        return value
    try:
        value = make()
    except Exception as error:
        broadcast_object_list([None, str(error) if isinstance(error, UserError) else None, True])
        raise
    broadcast_object_list([value, None, False])
    return value


def in_every_process(act: Callable[[], T]) -> T:
    """Call `act` in every process and wait for all of them.

    Raises:
        UserError: in every process, where `act` raised it in one.
    """
    from accelerate.utils import gather_object

    values: list[T] = []
    messages: list[str] = []
    try:
        values.append(act())
    except UserError as error:
        messages.append(str(error))
    for message in gather_object(messages) if count() > 1 else messages:
        raise UserError(message)
    return values[0]


def is_true_in_all(holds: bool) -> bool:
    """Return True if `holds` is true in every process."""
    if count() == 1:
        return holds
    from accelerate import PartialState
    from accelerate.utils import reduce

    n_failing = reduce(torch.tensor(float(not holds), device=PartialState().device), "sum")
    return not n_failing.item()


def broadcast_weights(model: torch.nn.Module) -> None:
    """Copy parameters and buffers of the first process to the others."""
    if count() == 1:
        return
    from accelerate import PartialState
    from accelerate.utils import broadcast

    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.copy_(broadcast(tensor.detach().to(PartialState().device)))


def broadcast_time(now: float) -> float:
    """Return `now`, in seconds, of the first process."""
    if count() == 1:
        return now
    from accelerate import PartialState
    from accelerate.utils import broadcast

    return broadcast(torch.tensor(now, dtype=torch.float64, device=PartialState().device)).item()


def rows_per_process(batch_size: int, accumulation: int = 1, n_processes: int | None = None) -> int:
    """Return the rows of one forward pass in each process, for `batch_size` rows over all processes.

    `n_processes` are those of the process group if it is None.

    Raises:
        UserError: the number of processes does not divide `batch_size`.
    """
    n = n_processes or count()
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
        f"training.batch_size = {batch_size} counts the rows over all processes, and {n} processes cannot "
        f"share it evenly: {remedy}"
    )


def offset_seed() -> None:
    """Seed torch differently in every process, for dropout; the first process keeps its random state."""
    if index() > 0:
        torch.manual_seed(torch.initial_seed() + index())


def set_threads(stated: int | None) -> None:
    """Set torch's threads in this process: `stated`, or else an equal share of the cores that it may use."""
    if stated is not None:
        torch.set_num_threads(stated)
    elif count() > 1 or torch.get_num_threads() > n_cores():  # torch knows no quota of a container
        torch.set_num_threads(_cores_per_process())


def allow_fsdp_on_cpu() -> None:
    """Let Accelerate apply FSDP on CPUs too, which it does only for the distributed type of accelerators."""
    from accelerate import DistributedType, PartialState

    state = PartialState()
    if is_sharded() and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def load_whole_models() -> None:
    """Load whole models from here on: under ZeRO-3, transformers shards what `from_pretrained` loads."""
    if is_sharded():
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


@contextlib.contextmanager
def detect_lost_process() -> Iterator[None]:
    """Raise LostProcess where a collective fails because another process has ended."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if count() > 1 and any(word in str(error) for word in _LOST_CONNECTION):
            raise LostProcess(f"process {index()} of {count()} has lost another one") from error
        raise


class PaddedRows(Dataset):
    """`rows`, and one more row without labels, which adds nothing to a loss: it fills up the last step."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows) + 1

    def __getitems__(self, indices: Sequence[int]) -> Mapping[str, np.ndarray]:
        """Return a whole batch; each value is (B, T)."""
        n = len(self.rows)
        batch = self.rows.__getitems__([min(i, n - 1) for i in indices])
        batch["labels"][np.array(indices) == n] = IGNORED
        return batch


class PaddedSampler(Sampler[int]):
    """The order of `n_rows` in which one process would read them, filled up to whole steps by the blank row.

    Every process then has the same number of batches, and no row is read twice. `draw(seed, epoch)` gives the
    order where the rows have their own; else it is the permutation of accelerate's SeedableRandomSampler.
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
        generator = torch.Generator().manual_seed(seed + epoch)
        return torch.randperm(self.n_rows, generator=generator).numpy()


def _cores_per_process() -> int:
    return max(1, n_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", count())))
