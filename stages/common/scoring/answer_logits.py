"""Next-token logits where an answer is, and nowhere else: with a large vocabulary the others would fill the memory."""

from __future__ import annotations

import torch


def answer_logits(
    model: torch.nn.Module, head: torch.nn.Module, inputs: dict[str, torch.Tensor], positions: torch.Tensor
) -> torch.Tensor:
    """Next-token logits of some positions, through the model's own forward pass.

    A hook hands the LM head only those positions. Everything around it (soft-capping, scaling, autocast, wrappers)
    stays the model's, which calling backbone and head by hand would lose.

    Args:
        model: a causal language model, or what wraps it.
        head: its LM head.
        inputs: its keyword arguments, `input_ids` (rows, length) among them.
        positions: int64 (n,): places in the rows laid end to end. Indices, not booleans: a GPU would have to tell the
            host how many of these are true, and the host would wait for it.

    Returns:
        (n, vocabulary) in float32.
    """
    hook = head.register_forward_pre_hook(lambda _module, arguments: (arguments[0].flatten(0, 1)[positions],))
    try:
        return model(**inputs, use_cache=False).logits.float()
    finally:
        hook.remove()
