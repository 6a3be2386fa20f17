"""How much memory training takes: a sum of terms, each of which follows from the base's shape and from what is run.

The terms count bytes that PyTorch holds for the autograd graph of a Llama-like decoder as PEFT and TRL run it. Where
one was settled by a measurement rather than by reading what is saved, its comment says so. `tests/test_plan.py`
compares the sums with `preflight/measurements.jsonl`.
"""

from __future__ import annotations

from typing import NamedTuple

from preflight.shapes import Shape
from stages.common.sharding import NF4_BYTES

GIB = 2**30
# Of a weight in NF4 itself; the rest of NF4_BYTES are its blocks' scales, of which FSDP keeps all on each GPU.
BITS_BYTES = 0.5
# Whole layers that a GPU holds of a sharded base: the one that is computed, and the next one.
LAYERS_GATHERED = 2
# Of a trained number: AdamW's two moments, in float32 or in blocks of bytes.
STATE_BYTES = {"adamw_torch": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
# Of a logit: its bfloat16, its float32, the logarithm of its softmax and the gradients of both last.
LOGIT_BYTES = {2: 14, 4: 12}
# What the process holds beyond PyTorch's tensors. On the GPU the CUDA context, kernels and the libraries' workspaces:
# 0.81 to 0.86 GiB on an H200. On a CPU Python and its libraries, measured with the tests' model of 0.2 M weights.
OUTSIDE_BYTES = {"cuda": 0.85 * GIB, "cpu": 0.58 * GIB}
# Blocks are cut to sizes that do not all fit again: 4 to 12 % on an H200. On a CPU glibc keeps what is freed between
# what is still needed: 46 to 74 % with SmolLM2-135M, where tensors mapped one by one take what the terms say.
ALLOCATOR_SLACK = {"cuda": 0.09, "cpu": 0.65}
# Beyond what all layers' activations would take: recomputing them spares a CPU's process little more than the rest.
RECOMPUTED_SLACK = 0.15


class Run(NamedTuple):
    """What is run at a time.

    Attributes:
        device: "cuda" or "cpu".
        rank: of the adapter, on all linear layers.
        optimizer: as in params.yaml.
        tokens: in a micro-batch, what fills it up included.
        answers: tokens in it that have a loss.
        accumulates: whether a step has several micro-batches.
        recomputed: whether activations are.
        packed, dense, compiled, recorded: which fast paths are taken, see `stages.common.acceleration.choice`.
        many_shapes: whether micro-batches differ in size, so that a step is recorded more than once.
        shards: GPUs that the base's layers are sharded over.
    """

    device: str
    rank: int
    optimizer: str
    tokens: int
    answers: int
    accumulates: bool
    recomputed: bool
    packed: bool
    dense: bool
    compiled: bool
    recorded: bool
    many_shapes: bool
    shards: int = 1

    @property
    def bytes(self) -> int:
        """Of a number that is computed with: bfloat16 on a GPU, float32 on a CPU."""
        return 2 if self.device == "cuda" else 4


def training_terms(shape: Shape, run: Run) -> dict[str, float]:
    """Bytes that PyTorch's tensors take at most while training, by what they are."""
    trained = shape.lora_parameters(run.rank)
    # What is added up over micro-batches is a copy of what a recording writes its gradients to.
    gradients = 4 + 4 * (run.recorded and run.accumulates)
    return {
        **weights_terms(shape, run.bytes, dense=run.dense, shards=run.shards),
        "adapter": trained * (4 + run.bytes * (run.bytes < 4)),
        "gradients": trained * gradients,
        "optimizer": trained * STATE_BYTES[run.optimizer],
        "activations": activation_bytes(shape, run),
        # Logits are gone by the time that a whole layer's gradients are at hand.
        "logits and workspace": max(
            run.answers * shape.vocabulary * LOGIT_BYTES[run.bytes], _workspace_bytes(shape, run)
        ),
    }


def weights_terms(shape: Shape, size: int, *, dense: bool, shards: int = 1) -> dict[str, float]:
    """Bytes of the base model alone.

    Args:
        shape: of the base.
        size: bytes of a number that is computed with.
        dense: whether its layers are dequantised.
        shards: GPUs that its layers are sharded over.
    """
    others: dict[str, float] = {"embeddings": size * shape.other_parameters}
    if dense:
        return {"dequantised weights": size * shape.linear_parameters, **others}
    if shards == 1:
        return {"NF4 weights": NF4_BYTES * shape.linear_parameters, **others}
    bits = BITS_BYTES * shape.linear_parameters
    return {
        f"NF4 weights, 1/{shards} of them": bits / shards + (NF4_BYTES - BITS_BYTES) * shape.linear_parameters,
        "layers gathered": LAYERS_GATHERED * bits / shape.layers,
        **others,
    }


def activation_bytes(shape: Shape, run: Run) -> float:
    """What the forward pass leaves for the backward pass."""
    layer = run.tokens * _layer_bytes_per_token(shape, run)
    if run.recomputed:
        return shape.layers * run.tokens * run.bytes * shape.hidden + layer
    if not run.packed:
        return shape.layers * layer
    # The last layer's output is wanted where a token is predicted: it keeps what attention needs and little more.
    last = run.tokens * _attention_bytes_per_token(shape, run)
    return (shape.layers - 1) * layer + last


def _layer_bytes_per_token(shape: Shape, run: Run) -> float:
    """Bytes that a decoder layer keeps of each token, in the order of its forward pass."""
    size, hidden, inner = run.bytes, shape.hidden, shape.intermediate
    queries = shape.heads * shape.head_size
    # RMSNorm's float32 input; compiled, it is computed again from what is there.
    second_norm = 0 if run.compiled else 4 * hidden
    # LoRA's matrices are float32 and cast their input anew beside a dequantised base: a copy for each on a GPU, where
    # bitsandbytes' layers share the input as it is.
    inputs = size * (2 * hidden if run.dense and size < 4 else hidden)
    output_input = size * queries if run.dense and size < 4 else 0
    # gate, its SiLU, up, and their product; the SiLU is computed again by compiled layers (settled by one measurement).
    mlp = size * inner * (3 if run.compiled else 4)
    outputs = size * run.rank * 7
    return _attention_bytes_per_token(shape, run) + output_input + second_norm + inputs + mlp + outputs


def _attention_bytes_per_token(shape: Shape, run: Run) -> float:
    size, hidden = run.bytes, shape.hidden
    queries, keys = shape.heads * shape.head_size, shape.key_heads * shape.head_size
    first_norm = 4 * hidden
    inputs = size * (3 * hidden if run.dense and size < 4 else hidden)
    # Queries, keys, values and what attention gives, with the logarithm of each softmax's divisor.
    kept = size * (2 * queries + 2 * keys) + 4 * shape.heads
    if not run.packed or run.device == "cpu":
        # Keys and values repeated for each head that shares them, and the output once more, heads last.
        kept += size * (2 * queries - 2 * keys + queries)
    return first_norm + inputs + kept


def _workspace_bytes(shape: Shape, run: Run) -> float:
    """Of the backward pass through a layer's MLP; settled by measurements, 4 to 5 bytes for each inner activation."""
    dequantised = 0 if run.dense else run.bytes * shape.hidden * shape.intermediate
    return 2 * run.bytes * run.tokens * shape.intermediate + dequantised


def process_bytes(shape: Shape, run: Run) -> float:
    """What the process takes of the device, with the allocator's slack and what lies outside of PyTorch.

    The second and every further recorded shape is run once beside the memory that recordings keep: that is the
    activations a second time.
    """
    if run.device == "cpu" and run.recomputed:
        kept = training_terms(shape, run._replace(recomputed=False))
        return sum(kept.values()) * (1 + RECOMPUTED_SLACK) + OUTSIDE_BYTES["cpu"]
    terms = training_terms(shape, run)
    held = sum(terms.values())
    if run.recorded and run.many_shapes:
        held += terms["activations"] + terms["logits and workspace"]
    return held * (1 + ALLOCATOR_SLACK[run.device]) + OUTSIDE_BYTES[run.device]
