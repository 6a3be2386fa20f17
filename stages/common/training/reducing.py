"""Tensors and failures that the processes of a training share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from stages.common.processes import largest


class SharedOutOfMemoryError(torch.OutOfMemoryError):
    """Memory ran out on one process at least, and all of them raise this."""


def agreeing(work: Callable[[], Any]) -> Any:
    """Do it; when memory runs out on one process, it does so on all, so that all go on with a smaller micro-batch."""
    done, error = None, None
    try:
        done = work()
    except torch.OutOfMemoryError as own:
        error = own
    if largest(error is not None):
        raise SharedOutOfMemoryError(str(error or "on another process")) from error
    return done


def average(tensors: list[torch.Tensor]) -> None:
    """Replace them by their means over all processes, in one message."""
    together = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(together)
    together /= distributed.get_world_size()
    _copy(together, tensors)


def broadcast(tensors: list[torch.Tensor]) -> None:
    """Replace them by rank 0's: it need not be the same machine that drew the first weights."""
    with torch.no_grad():
        together = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.broadcast(together, src=0)
        _copy(together, tensors)


def _copy(together: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    parts = together.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
