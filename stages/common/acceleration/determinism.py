"""The same bits from every run on the same GPU, where DETERMINISTIC=1 asks for them."""

from __future__ import annotations

import os

import torch

from stages.common.switches import deterministic


def settle_determinism() -> None:
    """Choose algorithms whose results do not depend on the order in which a GPU's threads end.

    What otherwise differs from run to run: FlashAttention's backward pass adds with atomics, cuBLAS shares its work
    space between streams, and Inductor measures which of several kernels is faster. To be called before the GPU
    multiplies its first matrices. transformers' `enable_full_determinism` also makes every launch wait for its end.

    Raises:
        UserError: DETERMINISTIC in the environment is neither 0 nor 1.
    """
    if not deterministic():
        return
    from torch._inductor import config as inductor  # 1.5 s, for nothing in most runs

    # As large as torch's own choice for Hopper; read when cuBLAS is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # A debugging aid, which costs a kernel for each new tensor: nothing here reads memory that nobody wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    inductor.deterministic = True
