"""Signals during a training: noted, and answered between two steps, where a checkpoint can be written.

transformers has `enable_jit_checkpoint` for SIGTERM. It may save between a step's gradients and its update, so that the
resumed run is another one, and then ends as if training were complete.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from stages.common.errors import Stopped

if TYPE_CHECKING:
    import torch

NONE_CAME, NOT_TRAINING = 0, 255
# The signal that came, in one byte. A process has one set of signal handlers, and so one note; the processes that
# prepare batches are forked from it and see the same memory.
_note = mmap.mmap(-1, 1)
_note[0] = NOT_TRAINING
_training_process: int | None = None


def steps_begin() -> None:
    """From now on there is something to save; until now a signal ended the process at once."""
    if _note[0] == NOT_TRAINING:
        _note[0] = NONE_CAME


def signal_that_came() -> int:
    """The number of the signal that asks the training to stop, or NONE_CAME."""
    return NONE_CAME if _note[0] == NOT_TRAINING else _note[0]


@contextlib.contextmanager
def signals_noted() -> Iterator[None]:
    """In the block, from `steps_begin` on, SIGTERM and SIGINT are noted and do not end the process; SIGINT twice does.

    SIGINT also where a shell started the process with `&`, which makes it ignore that: whoever sends it means it.

    Raises:
        Stopped: a signal came when no step was left after which to stop.
    """
    global _training_process
    _training_process = os.getpid()
    before = {number: signal.signal(number, _on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
        if signal_that_came() != NONE_CAME:
            raise Stopped(signal_that_came(), "training had ended; the same command goes on with its adapter")
    except BaseException:
        print(file=sys.stderr)  # the progress bar's line has no end yet
        raise
    finally:
        _note[0] = NOT_TRAINING
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _training_process:
        _on_signal_in_worker(number, frame)
    elif _note[0] == NOT_TRAINING:
        raise Stopped(number)
    elif number == signal.SIGINT == _note[0]:
        raise Stopped(number, "at once; the same command goes on from the last checkpoint")
    elif _note[0] == NONE_CAME:
        _note[0] = number
        # `print` may be at work in this very moment, and must not be called again before it ends.
        with contextlib.suppress(OSError):
            name = signal.Signals(number).name
            os.write(2, f"finetune: {name}: stops when this step is done and has a checkpoint\n".encode())


def make_batch(
    to_batch: Callable[..., dict[str, torch.Tensor]], rows: list[dict[str, Any]], pad_id: int
) -> dict[str, torch.Tensor]:
    """What `to_batch` makes of the rows, in a process that a signal to all of a group leaves alive."""
    if os.getpid() != _training_process is not None:
        # torch's own handler ends it, and with it the step that training has to take to its end.
        signal.signal(signal.SIGTERM, _on_signal_in_worker)
    return to_batch(rows, pad_id)


def _on_signal_in_worker(number: int, frame: FrameType | None) -> None:
    """Do nothing while there may be a step to finish: Ctrl-C, say, reaches training and all that it started."""
    if _note[0] == NOT_TRAINING:
        os._exit(0)  # torch takes any other end for a failure
