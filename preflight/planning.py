"""Which micro-batch of a training fits a machine, which batches it predicts in, and what would fit where none does."""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple

from preflight.lengths import Lengths
from preflight.memory import GIB, OUTSIDE_BYTES, Run, process_bytes, weights_terms
from preflight.predicting import Prediction, generated_batch, scored_batch
from preflight.run_length import steps_of_run
from preflight.shapes import Shape
from preflight.throughput import MACHINES, Machine
from stages.common.acceleration.choice import LEAST_COMPILED_FLOP, MOST_DENSE_SHARE
from stages.common.acceleration.layers import PRE_NORM
from stages.common.errors import UserError
from stages.common.params import Params
from stages.common.schema.task import ClassificationTask
from stages.common.scoring.batches import TOKENS_PER_BATCH, TOKENS_PER_GENERATED_BATCH
from stages.common.sharding import MOST_OF_A_GPU, NF4_BYTES
from stages.common.switches import SHARD_BASE, SWITCHES, low_memory, switch
from stages.common.training.collating import MULTIPLE_OF_ANSWERS, MULTIPLE_OF_TOKENS, round_up
from stages.common.training.trainer import MicroBatch, micro_batches, refuse_dora

# What one host commonly has.
NUMBERS_OF_GPUS = (2, 4, 8)


class Plan(NamedTuple):
    """A training on a machine.

    Attributes:
        micro: the first of the stage's micro-batches that fits; None when none does.
        run: what that micro-batch comes to; of the smallest one when none fits.
        process: bytes that the process takes.
        wanted: bytes of the micro-batch that the stage would like most.
        wanted_micro: that micro-batch.
        free: bytes that there are.
    """

    micro: MicroBatch | None
    run: Run
    process: float
    wanted: float
    wanted_micro: MicroBatch
    free: float


def make_plan(
    params: Params,
    shape: Shape,
    lengths: Lengths,
    machine: Machine,
    free: float,
    gpus: int,
    shards: int | None = None,
) -> Plan:
    """The first way to cut a step that fits, as the stage would find it by running out of memory.

    Args:
        params: all blocks.
        shape: of the base.
        lengths: of the data.
        machine: the device.
        free: bytes of its memory.
        gpus: how many share a step.
        shards: that the base is cut into; None: as many as the stage would cut it into.
    """
    if shards is None:
        shards = gpus if spreads_base(shape, machine, gpus) else 1
    ways = micro_batches(
        params.finetune.global_batch_size, lengths.longest, machine.device, gpus, memory_is_short=shards > 1
    )
    runs = [planned_run(params, shape, lengths, micro, machine.device, free, shards) for micro in ways]
    needed = [process_bytes(shape, run) for run in runs]
    first = next((number for number, size in enumerate(needed) if size <= free), None)
    chosen = len(ways) - 1 if first is None else first
    return Plan(None if first is None else ways[first], runs[chosen], needed[chosen], needed[0], ways[0], free)


def spreads_base(shape: Shape, machine: Machine, gpus: int) -> bool:
    """Whether the base would lie on several GPUs, by the rules of `stages.common.sharding.is_spread`."""
    wanted = switch(SHARD_BASE)
    if gpus == 1 or wanted is not None:
        return gpus > 1 and bool(wanted)
    return machine.bytes is not None and shape.quantized_bytes > MOST_OF_A_GPU * machine.bytes


def check_sharded(params: Params) -> None:
    """Refuse what `finetune` refuses beside a sharded base.

    Raises:
        UserError: DoRA, or a fast path that needs whole weights, is asked for.
    """
    refuse_dora(params.finetune.lora)
    for name in ("DENSE_BASE", "COMPILE_LAYERS", "RECORD_STEPS"):
        if switch(name):
            raise UserError(
                f"{name}=1 in the environment asks for {SWITCHES[name]}, which cannot be had: the base is sharded"
            )


def planned_run(
    params: Params, shape: Shape, lengths: Lengths, micro: MicroBatch, device: str, free: float, shards: int
) -> Run:
    """What the stage would run of a micro-batch, by the rules of `stages.common.acceleration.choice`."""
    on_gpu, short, whole = device == "cuda", micro.recompute_activations or low_memory(), shards == 1
    packed = _chosen("PACK_ROWS", shape.model_type in PRE_NORM)
    answers = math.ceil(micro.rows * lengths.answer)
    flop = 4.0 * shape.linear_parameters * trained_tokens(params, lengths)
    can_record = on_gpu and packed and whole and not short and not params.finetune.lora.dropout
    return Run(
        device=device,
        rank=params.finetune.lora.r,
        optimizer=params.finetune.optimizer,
        tokens=round_up(lengths.most_tokens(micro.rows), MULTIPLE_OF_TOKENS)
        if packed
        else micro.rows * lengths.longest,
        answers=round_up(answers, MULTIPLE_OF_ANSWERS) if packed else answers,
        accumulates=micro.accumulation > 1,
        recomputed=micro.recompute_activations,
        packed=packed,
        dense=_chosen("DENSE_BASE", whole, on_gpu and not short and _fits_dense(shape, device, free)),
        compiled=_chosen("COMPILE_LAYERS", packed and whole, on_gpu and flop >= LEAST_COMPILED_FLOP),
        recorded=_chosen("RECORD_STEPS", can_record),
        many_shapes=True,
        shards=shards,
    )


def planned_prediction(
    params: Params, shape: Shape, lengths: Lengths, machine: Machine, free: float, gpus: int
) -> Prediction:
    """The largest batch of the stage `infer`; arguments as of `make_plan`."""
    device, spread = machine.device, spreads_base(shape, machine, gpus)
    labels = params.task.labels if isinstance(params.task, ClassificationTask) else []
    most = (TOKENS_PER_BATCH if labels else TOKENS_PER_GENERATED_BATCH)[device]
    new_tokens, longest = params.infer.max_new_tokens or 0, max(1, math.ceil(lengths.longest - lengths.answer))
    # A node for each token of a label but its last: labels that begin alike share some.
    nodes = 0 if new_tokens else math.ceil(len(labels) * max(0.0, lengths.answer - 1))
    packed = not new_tokens and _chosen("PACK_ROWS", shape.model_type in PRE_NORM and not spread)
    if new_tokens:
        rows, tokens = generated_batch(most, lengths.predicted, longest, new_tokens)
    else:
        rows, tokens = scored_batch(
            shape, device, most, lengths.predicted, lengths.prompt, longest, nodes, packed=packed
        )
    return Prediction(
        device=device,
        rank=params.finetune.lora.r,
        rows=rows,
        tokens=tokens,
        logits=1 + nodes,
        new_tokens=new_tokens,
        packed=packed,
        dense=_chosen("DENSE_BASE", not spread, not low_memory() and _fits_dense(shape, device, free)),
        gpus=gpus if spread else 1,
    )


def _fits_dense(shape: Shape, device: str, free: float) -> bool:
    """Whether the dequantised base is small beside what is free once the base is loaded."""
    left = free - OUTSIDE_BYTES[device] - NF4_BYTES * shape.linear_parameters
    return (2 if device == "cuda" else 4) * shape.linear_parameters <= MOST_DENSE_SHARE * left


def _chosen(name: str, possible: bool, pays: bool = True) -> bool:
    """Whether a path is taken: where it can be, by its switch in the environment, or else where it pays."""
    wanted = switch(name)
    return possible and (pays if wanted is None else wanted)


def trained_tokens(params: Params, lengths: Lengths) -> float:
    """How many tokens the run sees."""
    rows = steps_of_run(params.finetune, lengths.rows_a_pass) * params.finetune.global_batch_size
    return rows * lengths.mean


def misfit(params: Params, shape: Shape, lengths: Lengths, plan: Plan, name: str, gpus: int) -> str:
    """What does not fit, and what would."""
    run = plan.run
    base = sum(weights_terms(shape, run.bytes, dense=run.dense, shards=run.shards).values())
    larger = [
        other
        for other, machine in MACHINES.items()
        if machine.bytes and machine.bytes > plan.free
        and make_plan(params, shape, lengths, machine, machine.bytes, gpus).micro
    ]  # fmt: skip
    ways = []
    if larger:
        ways.append(f"a larger GPU ({', '.join(sorted(larger, key=lambda other: MACHINES[other].bytes or 0))})")
    if gpus > 1 and run.shards == 1 and switch(SHARD_BASE) is None and not params.finetune.lora.use_dora:
        sharded = make_plan(params, shape, lengths, MACHINES[name], plan.free, gpus, shards=gpus)
        if sharded.micro:
            ways.append("the base sharded over these GPUs (SHARD_BASE=1 in the environment)")
    if more := fewest_gpus(params, shape, lengths, plan.free, name, gpus):
        ways.append(f"more GPUs (--gpus {more}: the base is then sharded over them)")
    room = longest_that_fits(params, shape, lengths, plan)
    if room:
        ways.append(f"format_prompts.max_length_tokens of at most {room:,}")
    ways.append("a smaller base model")
    return (
        f"one row of up to {lengths.longest:,} tokens takes {gib(plan.process)} of {gib(plan.free)} on {name}, even "
        f"in NF4 with activations recomputed; the base alone {gib(base)}. What would fit: {'; '.join(ways)}."
    )


def fewest_gpus(params: Params, shape: Shape, lengths: Lengths, free: float, name: str, gpus: int) -> int | None:
    """How many of this machine's kind the training would fit; None where no usual number is enough."""
    if params.finetune.lora.use_dora:
        return None  # see `refuse_dora`
    shared = params.finetune.global_batch_size
    counts = [count for count in NUMBERS_OF_GPUS if count > gpus and shared % count == 0 and name != "cpu"]
    return next(
        (count for count in counts if make_plan(params, shape, lengths, MACHINES[name], free, count).micro), None
    )


def longest_that_fits(params: Params, shape: Shape, lengths: Lengths, plan: Plan) -> int | None:
    """Tokens of the longest row that could be trained alone; None where no row of 16 tokens could."""
    smallest = MicroBatch(1, params.finetune.global_batch_size, recompute_activations=True)

    def needed(tokens: int) -> float:
        cut = lengths._replace(longest=tokens, mean=min(lengths.mean, tokens))
        run = planned_run(params, shape, cut, smallest, plan.run.device, plan.free, plan.run.shards)
        return process_bytes(shape, run)

    candidates = range(16, lengths.longest, 16)
    fitting = bisect.bisect_right(candidates, plan.free, key=needed)
    return candidates[fitting - 1] if fitting else None


def gib(size: float) -> str:
    """A number of bytes, as it is printed."""
    return f"{size / GIB:,.1f} GiB"
