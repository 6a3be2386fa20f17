"""Attention over prompts of a shared prefix, each followed by the tree of the labels' tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from stages.common.acceleration.attention import attend_causally, attend_fully


class Trees(NamedTuple):
    """A prefix that all rows share, the rest of each row, filling, and then for each row the same tree of tokens.

    Attributes:
        boundaries: int32 (3 + rows,): 0, and where prefix, each rest, and filling end; prefix and filling may be empty.
        keys: int64: the places of what each of these sees: prefix, for each row prefix and rest, filling.
        key_boundaries: int32 (3 + rows,): of these parts in `keys`.
        longest: at least the tokens of the longest of these parts.
        node_boundaries: int32 (rows + 1,): multiples of the number of nodes.
        ancestors: bool (nodes, nodes), true where the column's node is the row's or lies above it.
    """

    boundaries: torch.Tensor
    keys: torch.Tensor
    key_boundaries: torch.Tensor
    longest: int
    node_boundaries: torch.Tensor
    ancestors: torch.Tensor

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """What each token sees: prefix, row and ancestors. Shapes as of `attend_causally`."""
        return _attend_trees(q, k, v, self, scale)


def merge(*parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Attention over several disjoint sets of keys, put together from what `attend_fully` gives for each."""
    divisors = torch.stack([divisor for _, divisor in parts])
    weights = (divisors - divisors.logsumexp(dim=0)).exp()
    merged = torch.stack([seen.float() for seen, _ in parts]).mul(weights[..., None]).sum(dim=0)
    return merged.to(parts[0][0].dtype)


# Compiled, the nodes' rows would be put into a copy of the whole output instead of into it.
@torch.compiler.disable(recursive=False)
def _attend_trees(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Trees, scale: float) -> torch.Tensor:
    nodes, rows = len(layout.ancestors), len(layout.node_boundaries) - 1
    start = len(q) - nodes * rows
    # Keys and values are few beside queries where heads share them, so that a prefix is cheaply repeated for each row.
    keys, values = k[layout.keys], v[layout.keys]
    # All queries, although the last row ends before the nodes: so their places are in the output, and written below.
    seen = attend_causally(q, keys, values, layout.boundaries, layout.key_boundaries, layout.longest, scale)
    if nodes > 0:
        of_rows = layout.key_boundaries[1:-1]  # prefix and filling have no nodes
        over_rows = attend_fully(q[start:], keys, values, layout.node_boundaries, of_rows, nodes, layout.longest, scale)
        over_nodes = _attend_ancestors(q[start:], k[start:], v[start:], layout.ancestors, scale)
        seen[start:] = merge(over_rows, over_nodes)
    return seen


def _attend_ancestors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ancestors: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row's nodes over their ancestors and themselves, all rows being the same tree."""
    nodes, key_heads = len(ancestors), k.shape[1]
    # Matrix products are several times slower where a side is no multiple of 8.
    filling = -nodes % 8
    hidden = torch.nn.functional.pad(~ancestors, (0, filling), value=True)
    keys, values = (
        torch.nn.functional.pad(states.unflatten(0, (-1, nodes)), (0, 0, 0, 0, 0, filling)).transpose(1, 2)
        for states in (k, v)
    )
    # (rows, key heads, heads that share one x nodes, size): one product, without keys repeated for each head.
    queries = q.unflatten(0, (-1, nodes)).transpose(1, 2).unflatten(1, (key_heads, -1)).flatten(2, 3)
    scores = (queries @ keys.transpose(-1, -2)).float().unflatten(2, (-1, nodes)) * scale
    scores = scores.masked_fill(hidden, -torch.inf)
    divisors = scores.logsumexp(dim=-1)
    weights = (scores - divisors[..., None]).exp().to(v.dtype)
    seen = (weights.flatten(2, 3) @ values).unflatten(2, (-1, nodes))
    return (
        seen.flatten(1, 2).transpose(1, 2).flatten(0, 1),
        divisors.flatten(1, 2).transpose(1, 2).flatten(0, 1),
    )
