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
        """What each token sees: its row up to itself. Shapes as of `attend_causally`."""
        return attend_causally(q, k, v, self.boundaries, self.boundaries, self.longest, scale)


class Layout(Protocol):
    """Where rows lie, and so what their tokens see."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of all queries; shapes as of `attend_causally`."""


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


def attend_causally(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_boundaries: torch.Tensor,
    k_boundaries: torch.Tensor,
    longest: int,
    scale: float,
) -> torch.Tensor:
    """Each row's queries over the same row's keys up to their own; a row's last query belongs to its last key.

    Args:
        q: (query tokens, heads, size).
        k: (key tokens, key heads, size).
        v: like `k`.
        q_boundaries: int32 (rows + 1,), in `q`.
        k_boundaries: int32 (rows + 1,), in `k`.
        longest: at least the tokens of the longest row.
        scale: of the products.

    Returns:
        (query tokens, heads, size); undefined behind the last row.
    """
    if _flash(q):
        return _varlen(q, k, v, q_boundaries, k_boundaries, longest, longest, scale, (-1, 0))[0]
    return _causal_row_by_row(q, k, v, q_boundaries, k_boundaries, scale)


def attend_fully(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_boundaries: torch.Tensor,
    k_boundaries: torch.Tensor,
    q_longest: int,
    k_longest: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's queries over all keys of the same row; arguments as of `attend_causally`.

    Returns:
        (query tokens, heads, size), and the logarithm of each softmax's divisor, float32 (query tokens, heads).
    """
    if not _flash(q):
        return _full_row_by_row(q, k, v, q_boundaries, k_boundaries, scale)
    seen, divisors = _varlen(q, k, v, q_boundaries, k_boundaries, q_longest, k_longest, scale, (-1, -1))
    assert divisors.shape == (q.shape[1], q.shape[0]), "heads come first, whatever the documentation says"
    return seen, divisors.T


def _flash(q: torch.Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def _varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_boundaries: torch.Tensor,
    k_boundaries: torch.Tensor,
    q_longest: int,
    k_longest: int,
    scale: float,
    window: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
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
        window_size=window,
        **_GROUPED,
    )
    return seen, divisors


# Loops over rows would be unrolled, and compiled anew for every number of rows.
@torch.compiler.disable
def _causal_row_by_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_boundaries: torch.Tensor,
    k_boundaries: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    seen = []
    q_ends, k_ends = q_boundaries.tolist(), k_boundaries.tolist()
    for row in range(len(q_ends) - 1):
        queries, keys, values = _heads_first(q, k, v, slice(*q_ends[row : row + 2]), slice(*k_ends[row : row + 2]))
        keys, values = (states.repeat_interleave(len(queries) // len(states), dim=0) for states in (keys, values))
        count, key_count = queries.shape[1], keys.shape[1]
        mask = None
        if count < key_count:
            mask = torch.ones(count, key_count, dtype=torch.bool, device=q.device).tril(key_count - count)
        # Never a matrix of all pairs of tokens: with 2,000 of them it would take gigabytes.
        found = torch.nn.functional.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, scale=scale
        )
        seen.append(found[0].transpose(0, 1))
    return torch.cat([*seen, q[q_ends[-1] :]])


@torch.compiler.disable
def _full_row_by_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_boundaries: torch.Tensor,
    k_boundaries: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    seen, divisors = [], []
    q_ends, k_ends = q_boundaries.tolist(), k_boundaries.tolist()
    for row in range(len(q_ends) - 1):
        queries, keys, values = _heads_first(q, k, v, slice(*q_ends[row : row + 2]), slice(*k_ends[row : row + 2]))
        queries = queries.unflatten(0, (len(keys), -1))  # (key heads, heads that share one, tokens, size)
        scores = (queries @ keys[:, None].transpose(-1, -2)).float() * scale
        divisor = scores.logsumexp(dim=-1)
        found = (scores - divisor[..., None]).exp().to(values.dtype) @ values[:, None]
        seen.append(found.flatten(0, 1).transpose(0, 1))
        divisors.append(divisor.flatten(0, 1).transpose(0, 1))
    return torch.cat(seen), torch.cat(divisors)


def _heads_first(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of_row: slice, in_keys: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q[of_row].transpose(0, 1), k[in_keys].transpose(0, 1), v[in_keys].transpose(0, 1)
