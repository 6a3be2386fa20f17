"""Attention over rows laid end to end without padding, as an attention implementation of transformers."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.attention import varlen
from transformers import AttentionInterface

PACKED = "packed_rows"  # the name under which transformers knows it

# torch 2.13 wants to be told that several heads share a key head; 2.11 has no such argument and sees it.
_GROUPED: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
# Arguments that change what attention computes; `packing_reason` keeps models that give them away.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sliding_window")


class Rows(NamedTuple):
    """Where rows lie that follow one another in one sequence, none seeing another.

    Attributes:
        boundaries: int32 (rows + 1,): 0, and where each row ends.
        longest: at least the tokens of the longest row; one number for all batches, so that nothing is compiled twice.
    """

    boundaries: torch.Tensor
    longest: int

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """What each token sees: its row up to itself. Shapes as of `attend`."""
        return attend(q, k, v, self.boundaries, self.boundaries, self.longest, self.longest, scale, causal=True)[0]


class Layout(Protocol):
    """Where rows lie, and so what their tokens see."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of all queries; shapes as of the function `attend`."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer; the model is given `layout`, and hands it on.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, size of a head).
        key: (1, key heads, tokens, size of a head).
        value: like `key`.
        attention_mask: None; the layout says what is seen.
        scaling: of the products of queries and keys.
        layout: where the rows lie.
        others: what other implementations need.

    Returns:
        (1, tokens, heads, size of a head), and no attention weights.
    """
    assert attention_mask is None and all(others.get(name) is None for name in _UNSUPPORTED)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    assert layout is not None
    return layout.attend(q, k, v, scale)[None], None


AttentionInterface.register(PACKED, packed_attention)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_boundaries: torch.Tensor,
    k_boundaries: torch.Tensor,
    q_longest: int,
    k_longest: int,
    scale: float,
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's queries over the same row's keys.

    Args:
        q: (query tokens, heads, size).
        k: (key tokens, key heads, size).
        v: like `k`.
        q_boundaries: int32 (rows + 1,), in `q`.
        k_boundaries: int32 (rows + 1,), in `k`.
        q_longest: at least the tokens of the longest row in `q`.
        k_longest: the same of `k`.
        scale: of the products.
        causal: whether a token sees no later one; a row's last query belongs to its last key.

    Returns:
        (query tokens, heads, size), and the logarithm of each softmax's divisor, float32 (query tokens, heads). Behind
        the last row they are undefined.
    """
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return _attend_row_by_row(q, k, v, q_boundaries, k_boundaries, scale, causal)
    seen, divisors = varlen.varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        q_boundaries,
        k_boundaries,
        q_longest,
        k_longest,
        return_aux=varlen.AuxRequest(lse=True),
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        **_GROUPED,
    )
    return seen, divisors if divisors.shape == q.shape[:2] else divisors.T


# Its loop would be unrolled, and compiled anew for every number of rows.
@torch.compiler.disable
def _attend_row_by_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_boundaries: torch.Tensor,
    k_boundaries: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    seen, divisors = [], []
    q_ends, k_ends = q_boundaries.tolist(), k_boundaries.tolist()
    for row in range(len(q_ends) - 1):
        queries = q[q_ends[row] : q_ends[row + 1]].transpose(0, 1)
        keys, values = (states[k_ends[row] : k_ends[row + 1]].transpose(0, 1) for states in (k, v))
        queries = queries.unflatten(0, (len(keys), -1))  # (key heads, heads that share one, tokens, size)
        scores = (queries @ keys[:, None].transpose(-1, -2)).float() * scale
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(later.triu(1 + scores.shape[-1] - scores.shape[-2]), -torch.inf)
        divisor = scores.logsumexp(dim=-1)
        found = (scores - divisor[..., None]).exp().to(values.dtype) @ values[:, None]
        seen.append(found.flatten(0, 1).transpose(0, 1))
        divisors.append(divisor.flatten(0, 1).transpose(0, 1))
    return torch.cat([*seen, q[q_ends[-1] :]]), torch.cat([*divisors, q[q_ends[-1] :, :, 0]])
