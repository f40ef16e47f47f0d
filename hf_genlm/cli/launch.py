"""Several processes of one command on this machine: started, watched, and ended together.

A launcher of one's own (`accelerate launch -m hf_genlm train`, `torchrun -m hf_genlm train`) does as well,
and over several machines: recipes/accelerate/.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from hf_genlm.errors import UserError

_INPUT_IS_WRONG = 2
_LAST_WISH_S = 50  # for a checkpoint, between a signal and SIGKILL
_FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"


def is_launched() -> bool:
    """True if a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """True if this process is the one of the run that prints."""
    return int(os.environ.get("RANK", "0")) == 0


def complain(message: str) -> None:
    """One line on stderr, once, whatever the number of processes."""
    if is_first():
        sys.stderr.write(f"hf-genlm: {message}\n")


def check_processes(processes: int | None) -> None:
    """
    Raises:
        UserError: a launcher has started another number of processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if is_launched() and processes not in (None, world):
        raise UserError(
            f"--processes {processes}: a launcher has already started {world} processes; leave it out"
        )


def use_one_gpu() -> None:
    """Hide all GPUs but the first from this process, which must not have loaded torch's GPU part yet."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


def launch(command: Sequence[str], processes: int) -> tuple[int, str | None]:
    """Run Python with the `command` of its arguments in so many processes, one on each GPU where there are
    any.

    One that fails ends all others. Signals are passed on.

    Returns:
        the exit code, and what to tell the person where no process has told it yet.

    Raises:
        UserError: more processes than GPUs.
        KeyboardInterrupt: Ctrl-C, after all have ended.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    uses_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    n_gpus = 0 if uses_cpu else torch.cuda.device_count()
    if 0 < n_gpus < processes:
        raise UserError(
            f"--processes {processes}: this machine has {n_gpus} GPUs, and each process needs one of its "
            f"own; --processes {n_gpus}, or ACCELERATE_USE_CPU=true for processes on the CPU"
        )
    logging.disable(logging.ERROR)  # torch logs in a dozen lines what is said in one below
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=_LAST_WISH_S,
        signals_to_handle=_FORWARDED if os.name == "posix" else "SIGTERM,SIGINT",
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        return _outcome({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        return 128 + error.sigval, f"stopped by {signal.Signals(error.sigval).name}"
    finally:
        logging.disable(logging.NOTSET)
    return 0, None


def _outcome(codes: dict[int, int]) -> tuple[int, str | None]:
    """Exit code and message of the `codes` that the failed processes ended with, by their number."""
    if _INPUT_IS_WRONG in codes.values():
        return _INPUT_IS_WRONG, None
    # the launcher has ended the others by SIGTERM, and one that was killed took some with it before
    rank = min(codes, key=lambda rank: (codes[rank] == -signal.SIGTERM, codes[rank] >= 0, rank))
    code = codes[rank]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    return 1, f"process {rank} {how}, and the others were stopped"
