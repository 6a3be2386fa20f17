"""The labels' prefix tree, and the prefix that prompts share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch


@dataclass(frozen=True)
class LabelTree:
    """The labels' prefixes that a next token is read from; node 0, the root, is the prompt's last token.

    Attributes:
        tokens: token of each node but the root, parents before children.
        depths: number of tokens from the root, for the same nodes.
        ancestors: bool (nodes, nodes), true where the column's node is the row's or lies above it.
        steps: (node, token, label) for each token of each label: the label has this token after this node.
    """

    tokens: list[int]
    depths: list[int]
    ancestors: torch.Tensor
    steps: list[tuple[int, int, int]]


def build_tree(label_ids: Sequence[list[int]]) -> LabelTree:
    """The prefix tree of the labels, without the leaves: no token follows a label's last one.

    Args:
        label_ids: token ids of each label, at least one token each.
    """
    nodes: dict[tuple[int, ...], int] = {(): 0}
    for ids in label_ids:
        for depth in range(1, len(ids)):
            nodes.setdefault(tuple(ids[:depth]), len(nodes))
    ancestors = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
    for prefix, node in nodes.items():
        ancestors[node, [nodes[prefix[:depth]] for depth in range(len(prefix) + 1)]] = True
    prefixes = list(nodes)[1:]
    return LabelTree(
        tokens=[prefix[-1] for prefix in prefixes],
        depths=[len(prefix) for prefix in prefixes],
        ancestors=ancestors[1:, 1:],
        steps=[
            (nodes[tuple(ids[:depth])], token, label)
            for label, ids in enumerate(label_ids)
            for depth, token in enumerate(ids)
        ],
    )


def shared_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """The tokens that all prompts begin with, at least one token short of each prompt.

    Args:
        prompts: token ids, at least one prompt of at least one token.
    """
    # In lexicographic order the first and the last differ as early as any two.
    pairs = zip(min(prompts), max(prompts), strict=False)
    common = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return common[: min(map(len, prompts)) - 1]
