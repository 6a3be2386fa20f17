"""A stage starts itself once for each GPU, waits for all these processes, and ends with one message and exit code."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stages.common.errors import Stopped, UserError
from stages.common.processes import LAUNCHER, LOST_ANOTHER, RANK

SECONDS_OF_GRACE = 3  # for the others, after a process that crashed
SECONDS_OF_GRACE_AFTER = {
    0: math.inf,
    # The one that it lost breaks its connections before it has ended and said why.
    LOST_ANOTHER: 30,
    # Stopped in good order: rank 0 may be writing a checkpoint, or waiting on its GPU forever.
    128 + signal.SIGINT: 120,
    128 + signal.SIGTERM: 120,
}


class _Started(NamedTuple):
    process: subprocess.Popen[bytes]
    errors: Path | None  # where stderr goes; None for rank 0, which talks to the terminal


def processes_to_start() -> int | None:
    """How many processes the stage has to start; None where this process itself does the work.

    One for each GPU that is visible, or as many as NUM_PROCESSES in the environment says.

    Raises:
        UserError: NUM_PROCESSES is no positive number, or larger than the number of GPUs.
    """
    if RANK in os.environ:
        return None
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked = os.environ.get("NUM_PROCESSES") or str(max(1, gpus))
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError(f"NUM_PROCESSES={asked} in the environment must be a whole number from 1, as 2")
    if gpus and int(asked) > gpus:
        raise UserError(
            f"NUM_PROCESSES={asked} in the environment: each process needs a GPU of its own, and {gpus} can be seen. "
            f"Give at most {gpus}, or show more in CUDA_VISIBLE_DEVICES."
        )
    return None if int(asked) == 1 and gpus <= 1 else int(asked)


def run_processes(processes: int, *command: str) -> None:
    """Run `python -m COMMAND` in so many processes and wait for all of them; ends this process where they fail.

    Signals to stop are handed on. When a process crashes, the others are ended; rank 0 alone talks, and of another one
    that crashed its last words are shown.

    Args:
        processes: at least 1.
        command: a module and its arguments.

    Raises:
        UserError: a process was killed.
        SystemExit: a process failed, and has said why.
    """
    from torch.distributed import TCPStore

    # The processes meet here, at a port that the system chose, so that no two runs choose the same one.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        started: list[_Started] = []
        with _handing_on_signals(started) as handed_on:
            for rank in range(processes):
                errors = Path(folder) / str(rank) if rank else None
                environment = os.environ | _environment(rank, processes, store.port)
                # A session of its own: what the terminal sends to a group comes once, from this process.
                with errors.open("wb") if errors else contextlib.nullcontext() as stderr:
                    process = subprocess.Popen(
                        [sys.executable, "-m", *command], env=environment, stderr=stderr, start_new_session=True
                    )
                started.append(_Started(process, errors))
            try:
                ended = _wait(started)
            finally:
                for one in started:
                    one.process.kill()
                    one.process.wait()
        _report(started, ended, handed_on)


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    launcher = {LAUNCHER: str(os.getpid())}
    if processes == 1:
        # One of several GPUs: trained on as if it were the only one.
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return launcher | {"NUM_PROCESSES": "1", "CUDA_VISIBLE_DEVICES": gpu}
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    return launcher | {
        RANK: str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # As torchrun's agent does it: the starting process serves the store.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
    }


@contextlib.contextmanager
def _handing_on_signals(started: list[_Started]) -> Iterator[list[int]]:
    """In the block signals go to the processes; yields those that did."""
    handed_on: list[int] = []

    def hand_on(number: int, _frame: Any) -> None:
        handed_on.append(number)
        for one in started:
            if one.process.poll() is None:
                one.process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield handed_on
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(started: list[_Started]) -> list[int]:
    """Until all have ended, or a little longer than the first that crashed or stopped.

    Returns:
        The ranks of those that ended by themselves, in this order.
    """
    deadlines: dict[int, float] = {}
    while len(deadlines) < len(started) and time.monotonic() < min(deadlines.values(), default=math.inf):
        time.sleep(0.05)
        for rank, one in enumerate(started):
            if one.process.poll() is not None:
                seconds = SECONDS_OF_GRACE_AFTER.get(one.process.returncode, SECONDS_OF_GRACE)
                deadlines.setdefault(rank, time.monotonic() + seconds)
    return [*deadlines]


def _report(started: list[_Started], ended: list[int], handed_on: list[int]) -> None:
    codes = [one.process.returncode for one in started]
    failed = [rank for rank in ended if codes[rank]]
    if not failed:
        return
    # The first one; those that lost another one come last.
    rank = min(failed, key=lambda rank: codes[rank] == LOST_ANOTHER)
    code, errors = codes[rank], started[rank].errors
    if code > 0 and code != LOST_ANOTHER:
        # Where rank 0 ended so as well, it has said the same.
        if errors is not None and code != (codes[0] if 0 in ended else None):
            print(_last_words(errors), file=sys.stderr)
        raise SystemExit(code)
    if -code in handed_on:
        raise Stopped(-code)  # before Python had come to what answers signals
    if code == LOST_ANOTHER:
        # Each says so, and nobody else anything: what broke the connection stands in the words of one of them.
        print(_last_words(started[-1].errors or Path(os.devnull)), file=sys.stderr)
    how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else "lost another one"
    raise UserError(
        f"process {rank + 1} of {len(codes)} {how}, and the others were ended. Where nobody killed it, the machine may "
        "have run out of memory. Run `dvc repro` again: training continues from its last checkpoint."
    )


def _last_words(errors: Path) -> str:
    lines = errors.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    return said[-1] if said else "\n".join(lines[-30:])
