"""Work on a GPU recorded once and replayed, so that the host launches one graph instead of thousands of kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


class Recording:
    """A function of tensors whose kernels a CUDA graph holds.

    Args:
        function: gets tensors of the same names and shapes each time, and must not read any of them on the host.
        inputs: a first set of them; the function is run once with it, which compiles and warms up.
        pool: of `torch.cuda.graph_pool_handle()`: recordings that never need each other's outputs can share memory.
    """

    def __init__(self, function: Callable[[Tensors], Any], inputs: Tensors, pool: Any = None) -> None:
        # The graph reads the memory of what the function holds beside its inputs, and keeps none of it alive.
        self._function = function
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        # As PyTorch asks for: a side stream, on which what is recorded has run before.
        _side_stream().wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(_side_stream()):
            function(self._inputs)
        torch.cuda.current_stream().wait_stream(_side_stream())
        self._graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": otherwise the thread that pins the next batch's memory would break the recording.
            with torch.cuda.graph(self._graph, pool, _side_stream(), capture_error_mode="thread_local"):
                self._output = function(self._inputs)
        except RuntimeError as error:
            # Where memory runs out, ending the recording fails too, and hides why.
            raise error.__context__ if isinstance(error.__context__, torch.OutOfMemoryError) else error from None

    def __call__(self, inputs: Tensors) -> Any:
        """The function's output, which the next call overwrites."""
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._output


# One for all recordings: cuBLAS keeps some 32 MiB for each stream that it has worked on.
@cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()
