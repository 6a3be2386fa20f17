"""Work on many token sequences in batches that are sized by tokens and shrink when a GPU's memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from stages.common.errors import UserError

# By device. A CPU is fastest while a batch fits its cache: 2,048 beat 4,096 by 1.2 and 8,192 by 1.4 on two AVX2 cores.
TOKENS_PER_BATCH = {"cuda": 32_768, "cpu": 2_048}
# Generating takes a forward pass for each new token, and in it each row counts as one token: a GPU spends it on
# launching kernels and reading weights however many rows there are, so rows are free until keys and values fill memory.
TOKENS_PER_GENERATED_BATCH = {"cuda": 131_072, "cpu": 4_096}


def map_in_batches(
    compute: Callable[[list[int]], Iterable[Any]],
    costs: Sequence[int],
    tokens_per_batch: int,
    advance: Callable[[int], object],
) -> list[Any]:
    """One result for each sequence, computed over batches of sequences of similar cost.

    Args:
        compute: takes the sequences' indices, at least one, and returns a result for each, in their order.
        costs: what each sequence takes in a batch, in tokens.
        tokens_per_batch: most tokens in a batch, padding included; a sequence above that gets a batch of its own.
        advance: is told how many sequences are done, after each batch.

    Returns:
        The results in the order of `costs`; empty when there are none.

    Raises:
        UserError: the GPU's memory is too small for the longest sequence alone.
    """
    # The longest come first: memory runs out in the first batch or never, and remaining time is not underestimated.
    order = sorted(range(len(costs)), key=lambda index: -costs[index])
    results: list[Any] = [None] * len(order)
    start = 0
    while start < len(order):
        longest = max(1, costs[order[start]])
        batch = order[start : start + max(1, tokens_per_batch // longest)]
        try:
            computed = compute(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise UserError(
                    f"the GPU's memory is too small for one sequence of about {longest:,} tokens: free memory that "
                    "other programs hold (see nvidia-smi), or lower format_prompts.max_length_tokens."
                ) from None
            tokens_per_batch = longest * (len(batch) // 2)
            torch.cuda.empty_cache()
            continue
        for index, result in zip(batch, computed, strict=True):
            results[index] = result
        start += len(batch)
        advance(len(batch))
    return results


def pad(sequences: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences as one matrix, filled up with token 0, and where their own tokens are.

    Args:
        sequences: token ids, at least one sequence.
        side: "left" or "right", where the filling goes.
        device: where both matrices are put.

    Returns:
        Token ids, int64 of shape (sequences, longest), and a bool of the same shape, true on real tokens.
    """
    tokens = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    real = [torch.ones(len(sequence), dtype=torch.bool) for sequence in sequences]
    ids, mask = (
        torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side) for tensors in (tokens, real)
    )
    return ids.to(device), mask.to(device)


def check_finite(scores: np.ndarray) -> None:
    """Refuse scores that only a broken model can give, before they become predictions.

    Args:
        scores: log-likelihoods.

    Raises:
        UserError: one of them is not finite.
    """
    if not np.isfinite(scores).all():
        raise UserError(
            "the model's scores are not finite numbers: its weights are broken, most likely because training diverged. "
            "Lower finetune.learning_rate or finetune.max_gradient_norm, then run `dvc repro`."
        )
