"""How much memory predicting takes, scored labels and generated answers, in the terms of `preflight.memory`."""

from __future__ import annotations

import math
from typing import NamedTuple

from preflight.memory import ALLOCATOR_SLACK, OUTSIDE_BYTES, weights_terms
from preflight.shapes import Shape
from stages.common.scoring.label_scores import LOGITS_PER_TOKEN
from stages.common.scoring.packed_scores import MOST_LOGITS

# What loading leaves behind in a CPU's process, for each weight of the base: settled by six measurements. glibc keeps
# it, see `preflight.memory`. Predicting itself adds little, as nothing is kept for a backward pass.
LEFT_BYTES = 1.2


class Prediction(NamedTuple):
    """A batch of the stage `infer`, and how it is computed.

    Attributes:
        device: "cuda" or "cpu".
        rank: of the adapter, on all linear layers.
        rows: in the batch.
        tokens: of its forward pass over prompts, with what fills them up and the nodes of the labels' tree.
        logits: that each row gives in it.
        new_tokens: that are generated for each row; 0 where labels are scored.
        packed, dense: which fast paths are taken, see `stages.common.acceleration.choice`.
        gpus: that the base's layers lie on, one after the other.
    """

    device: str
    rank: int
    rows: int
    tokens: int
    logits: int
    new_tokens: int
    packed: bool
    dense: bool
    gpus: int = 1

    @property
    def bytes(self) -> int:
        """Of a number that is computed with: bfloat16 on a GPU, float32 on a CPU."""
        return 2 if self.device == "cuda" else 4


def scored_batch(
    shape: Shape,
    device: str,
    tokens_per_batch: int,
    prompts: int,
    mean: float,
    longest: int,
    nodes: int,
    *,
    packed: bool,
) -> tuple[int, int]:
    """Rows and tokens of the largest batch that labels are scored in, by the rules of `stages.common.scoring`.

    Args:
        shape: of the base.
        device: "cuda" or "cpu".
        tokens_per_batch: the stage's.
        prompts: how many there are.
        mean: tokens of a prompt.
        longest: tokens of the longest one.
        nodes: of the labels' tree.
        packed: whether rows have no padding.
    """
    numbers = (1 + nodes) * shape.vocabulary
    if not packed:
        row = longest + nodes
        rows = min(prompts, max(1, tokens_per_batch // (row + numbers // LOGITS_PER_TOKEN)))
        return rows, rows * row
    cost = max(mean + nodes, math.ceil(tokens_per_batch * numbers / MOST_LOGITS[device]))
    rows = math.ceil(prompts / min(prompts, math.ceil(prompts * cost / tokens_per_batch)))
    return rows, round(rows * (mean + nodes))


def generated_batch(tokens_per_batch: int, prompts: int, longest: int, new_tokens: int) -> tuple[int, int]:
    """Rows of the largest batch that answers are generated for, and tokens of its prompts; arguments as above."""
    rows = min(prompts, max(1, tokens_per_batch // (longest + new_tokens)))
    return rows, rows * longest


def prediction_terms(shape: Shape, batch: Prediction) -> dict[str, float]:
    """Bytes that PyTorch's tensors take at most while predicting, by what they are."""
    size = batch.bytes
    # Merged into a dequantised base, the adapter takes nothing; beside one in NF4 it is float32.
    adapter = {} if batch.dense else {"adapter": 4.0 * shape.lora_parameters(batch.rank) / batch.gpus}
    keys = 2 * size * shape.key_heads * shape.head_size * (batch.tokens + batch.rows * batch.new_tokens)
    # Keys and values are kept for what comes behind them, except where rows have no padding.
    cache = {} if batch.packed else {"keys and values": shape.layers * keys / batch.gpus}
    logits = batch.rows * batch.logits * shape.vocabulary
    # Uncompiled rows without padding get their softmax one after the other, others all at once: in float32, twice.
    in_float32 = logits / batch.rows if batch.packed else logits
    return {
        **_weights(shape, batch),
        **adapter,
        **cache,
        # The layers are done when logits are computed.
        "activations or logits": max(
            batch.tokens * _forward_bytes_per_token(shape, batch) + _dequantised_bytes(shape, batch),
            size * logits + 8 * in_float32,
        ),
    }


def _weights(shape: Shape, batch: Prediction) -> dict[str, float]:
    terms = weights_terms(shape, batch.bytes, dense=batch.dense)
    if batch.gpus == 1:
        return terms
    # `stages.common.sharding.laid_out`: about as much on each GPU, in whole layers, embeddings on the first.
    outside, whole = terms["embeddings"], sum(terms.values())
    return {"weights, embeddings among them": max(outside, whole / batch.gpus + (whole - outside) / shape.layers)}


def _forward_bytes_per_token(shape: Shape, batch: Prediction) -> float:
    """What one decoder layer holds of each token at most; nothing is kept for a backward pass."""
    size, inner = batch.bytes, shape.intermediate
    queries, keys = shape.heads * shape.head_size, shape.key_heads * shape.head_size
    # gate's SiLU, up, and their product. Beside NF4 LoRA's output is float32, and twice: before and after its scale.
    mlp = 3 * size * inner if batch.dense else (2 * size + 8) * inner
    # Queries and keys before and after their rotation, values, and what attention gives.
    attention = size * (3 * queries + 3 * keys)
    if not batch.packed or batch.device == "cpu":
        # Keys and values repeated for each head that shares them.
        attention += size * 2 * queries
    # The tokens' embeddings, the layer's input, the sum of it and of attention's output, and that sum's norm.
    return 4 * size * shape.hidden + max(mlp, attention)


def _dequantised_bytes(shape: Shape, batch: Prediction) -> float:
    return 0 if batch.dense else batch.bytes * shape.hidden * shape.intermediate


def prediction_bytes(shape: Shape, batch: Prediction) -> float:
    """What the process takes of the device, with the allocator's slack and what lies outside of PyTorch."""
    held = sum(prediction_terms(shape, batch).values())
    if batch.device == "cpu":
        return held + LEFT_BYTES * (shape.linear_parameters + shape.other_parameters) + OUTSIDE_BYTES["cpu"]
    return held * (1 + ALLOCATOR_SLACK["cuda"]) + OUTSIDE_BYTES["cuda"]
