"""A stage ends with the `dvc` that started it, since a second `dvc repro` would make the same outputs beside it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from stages.common.errors import Stopped

# How often a stage looks whether `dvc` is still there. A `dvc` takes longer than that to start.
SECONDS_BETWEEN_LOOKS = 0.5


def end_with_dvc() -> None:
    """End this process by `Stopped` at SIGTERM, and send it SIGTERM when the `dvc` that started it is gone.

    DVC names its stage in the environment of what it starts: a shell, which may stay in between, and whatever that
    starts. So `dvc` is the parent of the outermost of this process and its ancestors that know the stage. Without a
    /proc nothing is watched.
    """
    signal.signal(signal.SIGTERM, _stop)
    if not Path("/proc/self/stat").exists():
        return
    outermost = os.getpid()
    while (dvc := _parent(outermost)) is not None and _knows_a_stage(dvc):
        outermost = dvc

    def look() -> None:
        while _parent(outermost) == dvc:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os.kill(os.getpid(), signal.SIGTERM)

    if dvc is not None and _may_be_dvc(dvc):
        threading.Thread(target=look, daemon=True).start()
    else:
        # It went while this process started; what took this one over, init say, is what now looks like a parent.
        raise Stopped(signal.SIGTERM, "dvc has ended")


def _parent(process: int) -> int | None:
    """The process that started another one, or took it over; None where that has ended."""
    try:
        # The name, in brackets, may hold anything: proc_pid_stat(5).
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return int(status.rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None


def _knows_a_stage(process: int) -> bool:
    return any(entry.startswith(b"DVC_STAGE=") for entry in _entries(process, "environ"))


def _may_be_dvc(process: int) -> bool:
    command = b" ".join(_entries(process, "cmdline")).lower()
    return b"python" in command or b"dvc" in command


def _entries(process: int, what: str) -> list[bytes]:
    try:
        return Path(f"/proc/{process}/{what}").read_bytes().split(b"\0")
    except OSError:
        return []


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)
