"""Run the command in several processes on this machine, by torch's elastic launcher.

`accelerate launch -m hf_genlm train` and `torchrun -m hf_genlm train` do the same, also over several
machines: recipes/accelerate/.
"""

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hf_genlm.cli.display import say
from hf_genlm.errors import UserError, handled_signals
from hf_genlm.run_folder import STORE, launched_as

_USER_ERROR = 2  # exit code
_FORWARDED_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
_LAUNCHER = "HF_GENLM_LAUNCHER"  # process id
_LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # network interface, by sys.platform


def is_launched() -> bool:
    """Return True if a launcher started this process as one of several."""
    return launched_as()[1] > 1


def is_first() -> bool:
    """Return True in the main process, the only one that prints."""
    return launched_as()[0] == 0


def complain(message: str) -> None:
    """Print one line on stderr, in the main process only."""
    if is_first():
        say(f"hf-genlm: {message}", is_error=True)


def check_processes(processes: int | None) -> None:
    """
    Raises:
        UserError: a launcher has started another number of processes.
    """
    world = launched_as()[1]
    if world > 1 and processes not in (None, world):
        raise UserError(
            f"--processes {processes}: a launcher has already started {world} processes; leave it out, or "
            f"unset WORLD_SIZE if that launcher has ended"
        )


def use_one_gpu() -> None:
    """Hide all GPUs but the first from this process, which must not have initialized CUDA yet."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


def end_with_launcher() -> None:
    """End this process once its launcher has ended, as by kill -9: with a checkpoint, as after SIGTERM."""
    from hf_genlm.training.processes import end_after

    launcher = int(os.environ.get(_LAUNCHER, os.getppid()))

    def wait() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)

    if os.name == "posix":  # elsewhere the id of a parent stays after its end
        end_after(wait)


def package_command() -> list[str]:
    """Arguments of `python` that run this package by the import path of this process.

    `python -m` and `-c` would import modules of the current folder first, which may be a stranger's.
    """
    path = f"import sys; sys.path[:] = {sys.path!r}"
    return ["-c", f"{path}; from hf_genlm.cli.main import main; sys.exit(main())"]


def launch(command: Sequence[str], processes: int) -> tuple[int, str | None]:
    """Run `python *command` in `processes` processes, one per GPU on a machine with GPUs.

    A process that fails ends the others; signals are forwarded to all. Launcher and processes find each other
    through files in a private temporary folder and communicate over the loopback interface: nothing listens
    for connections from other machines.

    Returns:
        exit code, and a message for the user if no process has printed one.

    Raises:
        UserError: more processes than GPUs.
        KeyboardInterrupt: Ctrl-C, after all processes have ended.
    """
    import torch
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from hf_genlm.training.processes import END_S

    def forward(number: int) -> NoReturn:
        raise SignalException(f"received signal {number}", sigval=signal.Signals(number))

    uses_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    n_gpus = 0 if uses_cpu else torch.cuda.device_count()
    if 0 < n_gpus < processes:
        raise UserError(
            f"--processes {processes}: this machine has {n_gpus} GPUs, and each process needs its own; give "
            f"--processes {n_gpus}, or ACCELERATE_USE_CPU=true for processes on the CPU"
        )
    logging.disable(logging.ERROR)  # torch logs a dozen lines for what the message below says
    try:
        with (
            handled_signals(_FORWARDED_SIGNALS, forward),  # a second one would leave processes behind
            tempfile.TemporaryDirectory(prefix="hf-genlm-") as folder,
        ):
            environment = {
                STORE: Path(folder, "processes").as_uri(),
                _LAUNCHER: str(os.getpid()),
                "PYTHONSAFEPATH": "1",  # a random.py of the current folder is no module of Python
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or the launcher serves one on all addresses
            }
            if sys.platform in _LOOPBACK:  # whatever the user states for several machines
                for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                    environment[name] = _LOOPBACK[sys.platform]
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=processes,
                run_id="hf-genlm",
                rdzv_backend="c10d",
                rdzv_endpoint=str(Path(folder, "launcher")),
                rdzv_configs={"store_type": "file"},
                logs_specs=DefaultLogsSpecs(log_dir=str(Path(folder, "logs"))),
                local_addr="localhost",
                max_restarts=0,
                shutdown_timeout=END_S,
                signals_to_handle="none",  # `forward` does
            )
            with patch_environment(**environment):
                elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        return describe_failure({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        return 128 + error.sigval, f"stopped by {signal.Signals(error.sigval).name}"
    finally:
        logging.disable(logging.NOTSET)
    return 0, None


def describe_failure(exit_codes: dict[int, int]) -> tuple[int, str | None]:
    """Return exit code and message for the exit codes of the failed processes, by rank; negative: a signal.

    The launcher ends the remaining processes by SIGTERM, and a killed process makes others fail: neither is
    the cause that the message names.
    """
    if _USER_ERROR in exit_codes.values():
        return _USER_ERROR, None
    rank = min(exit_codes, key=lambda r: (exit_codes[r] == -signal.SIGTERM, exit_codes[r] >= 0, r))
    code = exit_codes[rank]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    return 1, f"process {rank} {how}, and the others were stopped"
