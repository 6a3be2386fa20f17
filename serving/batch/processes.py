"""Which process of a launch this is, which GPU is its own, and what processes at one output folder leave each other.

They never talk to each other: whoever holds the lock on a piece answers it, and the operating system drops the locks of
a process that ends, however it ends. So nothing waits for a process that is gone, and nothing has a time limit.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from stages.common.errors import UserError

LOCK = ".lock"
# Bytes of the lock file that stand for a whole run, and for fetching the base model; pieces have those behind them.
_THE_RUN, _THE_BASE, _PIECES = 0, 1, 2
# What file systems say that know no locks: NFS without its lock service, Lustre without -o flock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Process(NamedTuple):
    """This process among those of its launch, as torchrun and `accelerate launch` number them.

    Attributes:
        rank: from 0, over all machines.
        local_rank: from 0, on this machine.
    """

    rank: int
    local_rank: int

    @property
    def leads(self) -> bool:
        """Whether it alone looks through the input, writes the manifest and the summary, and talks."""
        return self.rank == 0


def this_process() -> Process:
    """From the launcher's variables; without a launcher the only one."""
    rank, local_rank = (int(os.environ.get(name) or "0") for name in ("RANK", "LOCAL_RANK"))
    return Process(rank, local_rank)


def has_gpu() -> bool:
    """Whether models are loaded on a GPU here."""
    import torch

    return torch.cuda.is_available()


def take_gpu(process: Process) -> None:
    """Make the process's own GPU the one that models are loaded on; nothing on a machine without any.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    if not has_gpu():
        return
    import torch

    found = torch.cuda.device_count()
    if process.local_rank >= found:
        raise UserError(
            f"process {process.local_rank + 1} of this machine has no GPU of its own: {found} can be seen. Start "
            f"{found} with --num_processes, or show more in CUDA_VISIBLE_DEVICES."
        )
    torch.cuda.set_device(process.local_rank)


class Claims:
    """Locks on an output folder and on single pieces: each a byte of one file.

    Args:
        folder: the output folder.
    """

    def __init__(self, folder: Path) -> None:
        # Closing any handle of a file drops all locks that the process has on it: there is this one, and it stays open.
        self._file = (folder / LOCK).open("ab")

    def take_run(self) -> bool:
        """Whether this process may lead the run from now on: no other one does."""
        return self._take(_THE_RUN, 1)

    def take(self, piece: int) -> bool:
        """Whether the piece of that number, from 0, is now this process's."""
        return self._take(_PIECES + piece, 1)

    def drop(self, piece: int) -> None:
        """Leave a piece to others."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _PIECES + piece)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Wait until no other process of the run is in such a block."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _THE_BASE)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _THE_BASE)

    @contextmanager
    def all_pieces(self) -> Iterator[bool]:
        """Whether, until the block ends, no other process has a piece."""
        taken = self._take(_PIECES, 0)
        try:
            yield taken
        finally:
            if taken:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 0, _PIECES)

    def _take(self, start: int, length: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise UserError(
                f"{self._file.name}: its file system has no locks ({error.strerror}), so two processes could answer "
                "the same rows. Choose an --output-folder on a local disk, or mount this one with locks."
            ) from None
        return True
