"""A stage in several processes, one for each GPU: what they agree on, gather, and leave to the first of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from stages.common.errors import UserError

# Set for a process whose numbers a launcher has given: `run_processes`, torchrun or `accelerate launch`.
RANK = "RANK"
LAUNCHER = "STAGE_LAUNCHER_PID"
# A process ends so, and says nothing, when another one is gone: that one has the message.
LOST_ANOTHER = 75
# What waits long waits for one that loads; a process that ends breaks its connections, and is noticed by that.
TIME_LIMIT = timedelta(days=1)
PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def joined_processes() -> Iterator[None]:
    """Make this process one of those that a launcher has started, until the block ends; without a launcher, nothing.

    Raises:
        UserError: there are fewer GPUs than processes, or some of a launcher's numbers are missing.
    """
    _end_with_launcher()
    if RANK not in os.environ:
        yield
        return
    _check_numbers()
    import torch
    from torch import distributed

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        _take_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    # What is decided on the host is agreed on through gloo, so that nothing waits for the GPU.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIME_LIMIT)
    try:
        with contextlib.nullcontext() if leads() else _silence():
            yield
            distributed.barrier()
    except RuntimeError as error:
        if not _has_lost_another(error):
            raise
        sys.stdout.flush()
        if not leads():
            print(error, file=sys.stderr, flush=True)  # for the launcher, where no other process says what is wrong
        # Ending in good order would wait for the one that is gone.
        os._exit(LOST_ANOTHER)
    distributed.destroy_process_group()


def _check_numbers() -> None:
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"{RANK}={os.environ[RANK]} in the environment says that this process is one of several, and has "
            f"{', '.join(missing)} not set. Unset {RANK}, or start the stage with torchrun or `accelerate launch`, "
            "which set all of them."
        )


def _end_with_launcher() -> None:
    """Have the system kill this process when its launcher is gone, so that nobody trains on unseen."""
    if LAUNCHER not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[LAUNCHER]):
        os._exit(LOST_ANOTHER)


def _take_gpu(local_rank: int) -> None:
    import torch

    found = torch.cuda.device_count()
    if local_rank >= found:
        raise UserError(
            f"process {local_rank + 1} of this machine has no GPU of its own: {found} can be seen. Start {found} "
            "processes on it, or show more GPUs in CUDA_VISIBLE_DEVICES."
        )
    torch.cuda.set_device(local_rank)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No lines on stdout: rank 0 prints the same ones."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _has_lost_another(error: RuntimeError) -> bool:
    from torch.distributed import DistError

    # gloo raises plain RuntimeErrors.
    return isinstance(error, DistError) or "gloo" in str(error) or "Connection" in str(error)


def process_count() -> int:
    """How many processes share the work; 1 without a launcher."""
    return _group().get_world_size() if _joined() else 1


def process_index() -> int:
    """This process's number among them, from 0."""
    return _group().get_rank() if _joined() else 0


def leads() -> bool:
    """Whether this process alone writes and prints."""
    return process_index() == 0


def largest(value: int) -> int:
    """The largest of the values that the processes give; all of them wait for each other."""
    if process_count() == 1:
        return value
    import torch

    values = torch.tensor([value])
    _group().all_reduce(values, _group().ReduceOp.MAX)
    return int(values)


def from_leader(value: Any) -> Any:
    """What rank 0 gives, on every process."""
    return gathered(value if leads() else None)[0]


def gathered(value: Any) -> list[Any]:
    """What each process gives, in the order of their numbers, on every process."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    _group().all_gather_object(values, value)
    return values


@contextlib.contextmanager
def leader_first() -> Iterator[None]:
    """A block that the other processes enter when rank 0 has left it: they find its files ready."""
    if not leads():
        largest(0)
    yield
    if leads():
        largest(0)


def _joined() -> bool:
    # Whoever has not joined need not import torch to know it.
    return RANK in os.environ and _group().is_initialized()


def _group() -> Any:
    from torch import distributed

    return distributed
