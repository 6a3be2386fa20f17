"""Whether a training fits a machine, how long it takes and what it costs, before a GPU is rented.

`python -m preflight.plan [params.yaml] [--base SHAPE or config.json] [--gpu NAME] [--gpus N] [--price-per-hour X]`
"""

from __future__ import annotations

import argparse
import bisect
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from preflight.base import BASE_CONFIG
from preflight.lengths import Lengths, read_lengths
from preflight.memory import (
    GIB,
    NF4_BYTES,
    OUTSIDE_BYTES,
    Run,
    Shape,
    process_bytes,
    read_shape,
    shape_of_file,
    training_terms,
    weights_terms,
)
from preflight.run_length import steps_of_run
from preflight.throughput import MACHINES, Machine, find_machine, predict_rate
from stages.common.acceleration.choice import LEAST_COMPILED_FLOP, MOST_DENSE_SHARE, available_memory
from stages.common.acceleration.layers import PRE_NORM
from stages.common.errors import UserError, run_stage
from stages.common.model import machine_device
from stages.common.params import PARAMS_PATH, Params, load_params
from stages.common.scoring.batches import TOKENS_PER_BATCH
from stages.common.switches import low_memory
from stages.common.training.collating import MULTIPLE_OF_ANSWERS, MULTIPLE_OF_TOKENS, round_up
from stages.common.training.trainer import MicroBatch, check_shares, micro_batches

# What this project demands of itself on four GPUs; the planned time is no shorter than that.
SCALING_EFFICIENCY = 0.85


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


class Duration(NamedTuple):
    """How long a stage takes, in seconds, and by what speed."""

    stage: str
    seconds: float
    origin: str


def main() -> None:
    """Print what is predicted.

    Raises:
        UserError: the training does not fit; the message says what to change.
    """
    options = read_options()
    params = load_params(path=options.params)
    check_shares(params.finetune.global_batch_size, options.gpus)
    shape = read_base_shape(options.base)
    name, machine, free = chosen_machine(options.gpu)
    if name == "cpu" and options.gpus > 1:
        raise UserError(f"--gpus {options.gpus}: processes on one CPU share its cores, so more of them gain nothing.")
    lengths = read_lengths(params, options.rows, options.tokens)
    plan = make_plan(params, shape, lengths, machine, free, options.gpus)
    print(
        f"plan: {shape.linear_parameters:,} weights in {shape.layers} layers; {lengths.rows_a_pass:,} rows of "
        f"{lengths.mean:,.0f} tokens, {lengths.longest:,} at most; {options.gpus} x {name}"
    )
    print_memory(shape, plan)
    if plan.micro is None:
        raise UserError(misfit(params, shape, lengths, plan, name, options.gpus))
    durations = plan_durations(params, shape, lengths, plan, machine, options.gpus)
    print_durations(durations, options.gpus, options.price_per_hour)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("params", nargs="?", type=Path, default=PARAMS_PATH, help="default: params.yaml")
    parser.add_argument(
        "--base", help="a shape of benchmarks/shapes.py, a config.json or its folder; default: models/base"
    )
    parser.add_argument("--gpu", metavar="NAME", help=f"of {', '.join(MACHINES)}; default: this machine")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many of them (default: 1)")
    parser.add_argument("--price-per-hour", type=float, metavar="X", help="of one of them")
    parser.add_argument("--rows", type=int, metavar="N", help="of train; default: those of data/splits")
    parser.add_argument("--tokens", type=int, metavar="N", help="mean of a row; default: of data/splits")
    options = parser.parse_args()
    for given in ("gpus", "rows", "tokens", "price_per_hour"):
        value = getattr(options, given)
        if value is not None and value <= 0:
            parser.error(f"--{given.replace('_', '-')} must be above 0")
    return options


def read_base_shape(base: str | None) -> Shape:
    """The shape of a base: a name of `benchmarks.shapes`, a config.json, or the pinned base.

    Raises:
        UserError: it is none of these.
    """
    if base is None:
        if not BASE_CONFIG.is_file():
            raise UserError(
                f"{BASE_CONFIG}: not found. Fetch the base with `python -m stages.base_model fetch`, or name another "
                "with --base."
            )
        return shape_of_file(BASE_CONFIG)
    from benchmarks.shapes import SHAPES, shape_config

    if base in SHAPES:
        return read_shape(shape_config(base).to_dict(), base)
    if not Path(base).exists():
        raise UserError(f"--base: {base!r} is no file. Allowed: {', '.join(SHAPES)}, a config.json, or its folder.")
    return shape_of_file(Path(base))


def chosen_machine(name: str | None) -> tuple[str, Machine, float]:
    """A machine's name, what it is, and the memory that a process can have there.

    Raises:
        UserError: it is not known, or its speed is not.
    """
    if name is None and machine_device().type == "cuda":
        found = torch.cuda.get_device_name()
        words = found.replace("-", " ").split()
        known = next((each for each in MACHINES if each.removeprefix("RTX-").partition("-")[0] in words), None)
        if known is None:
            raise UserError(f"nothing is known of {found}. Name the most similar machine: --gpu {', '.join(MACHINES)}.")
        return known, MACHINES[known], float(torch.cuda.mem_get_info()[0])
    name, machine = find_machine(name or "cpu")
    return name, machine, float(available_memory()) if machine.bytes is None else machine.bytes


def make_plan(params: Params, shape: Shape, lengths: Lengths, machine: Machine, free: float, gpus: int) -> Plan:
    """The first way to cut a step that fits, as the stage would find it by running out of memory.

    Args:
        params: all blocks.
        shape: of the base.
        lengths: of the data.
        machine: the device.
        free: bytes of its memory.
        gpus: how many share a step.
    """
    ways = micro_batches(params.finetune.global_batch_size, lengths.longest, machine.device, gpus)
    runs = [planned_run(params, shape, lengths, micro, machine.device, free) for micro in ways]
    needed = [process_bytes(shape, run) for run in runs]
    first = next((number for number, size in enumerate(needed) if size <= free), None)
    chosen = len(ways) - 1 if first is None else first
    return Plan(None if first is None else ways[first], runs[chosen], needed[chosen], needed[0], ways[0], free)


def planned_run(params: Params, shape: Shape, lengths: Lengths, micro: MicroBatch, device: str, free: float) -> Run:
    """What the stage would run of a micro-batch, by the rules of `stages.common.acceleration.choice`."""
    on_gpu, short = device == "cuda", micro.recompute_activations or low_memory()
    packed = shape.model_type in PRE_NORM and _allowed("PACK_ROWS")
    tokens = lengths.most_tokens(micro.rows)
    answers = math.ceil(micro.rows * lengths.answer)
    left = free - OUTSIDE_BYTES[device] - NF4_BYTES * shape.linear_parameters
    dense = on_gpu and not short and 2 * shape.linear_parameters <= MOST_DENSE_SHARE * left
    flop = 4.0 * shape.linear_parameters * trained_tokens(params, lengths)
    return Run(
        device=device,
        rank=params.finetune.lora.r,
        optimizer=params.finetune.optimizer,
        tokens=round_up(tokens, MULTIPLE_OF_TOKENS) if packed else micro.rows * lengths.longest,
        answers=round_up(answers, MULTIPLE_OF_ANSWERS) if packed else answers,
        accumulates=micro.accumulation > 1,
        recomputed=micro.recompute_activations,
        packed=packed,
        dense=dense and _allowed("DENSE_BASE"),
        compiled=on_gpu and packed and flop >= LEAST_COMPILED_FLOP and _allowed("COMPILE_LAYERS"),
        recorded=on_gpu and packed and not short and not params.finetune.lora.dropout and _allowed("RECORD_STEPS"),
        many_shapes=True,
    )


def _allowed(switch: str) -> bool:
    return os.environ.get(switch) != "0"


def trained_tokens(params: Params, lengths: Lengths) -> float:
    """How many tokens the run sees."""
    rows = steps_of_run(params.finetune, lengths.rows_a_pass) * params.finetune.global_batch_size
    return rows * lengths.mean


def misfit(params: Params, shape: Shape, lengths: Lengths, plan: Plan, name: str, gpus: int) -> str:
    """What does not fit, and what would."""
    base = sum(weights_terms(shape, plan.run).values())
    larger = [
        other
        for other, machine in MACHINES.items()
        if machine.bytes and machine.bytes > plan.free
        and make_plan(params, shape, lengths, machine, machine.bytes, gpus).micro
    ]  # fmt: skip
    ways = (
        [f"a larger GPU ({', '.join(sorted(larger, key=lambda other: MACHINES[other].bytes or 0))})"] if larger else []
    )
    room = longest_that_fits(params, shape, lengths, plan)
    if room:
        ways.append(f"format_prompts.max_length_tokens of at most {room:,}")
    ways.append("a smaller base model")
    return (
        f"one row of up to {lengths.longest:,} tokens takes {_gib(plan.process)} of {_gib(plan.free)} on {name}, even "
        f"in NF4 with activations recomputed; the base alone {_gib(base)}. What would fit: {'; '.join(ways)}."
    )


def longest_that_fits(params: Params, shape: Shape, lengths: Lengths, plan: Plan) -> int | None:
    """Tokens of the longest row that could be trained alone; None where no row of 16 tokens could."""
    smallest = MicroBatch(1, params.finetune.global_batch_size, recompute_activations=True)

    def needed(tokens: int) -> float:
        cut = lengths._replace(longest=tokens, mean=min(lengths.mean, tokens))
        return process_bytes(shape, planned_run(params, shape, cut, smallest, plan.run.device, plan.free))

    candidates = range(16, lengths.longest, 16)
    fitting = bisect.bisect_right(candidates, plan.free, key=needed)
    return candidates[fitting - 1] if fitting else None


def print_memory(shape: Shape, plan: Plan) -> None:
    """Print the terms of the prediction and whether it fits."""
    run, wanted = plan.run, plan.wanted_micro
    micro = plan.micro or MicroBatch(1, 1, recompute_activations=True)
    cut = f"{micro.rows} rows ({run.tokens:,} tokens) at a time{', activations recomputed' if run.recomputed else ''}"
    print(f"memory of finetune, {cut}: {_gib(plan.process)} of {_gib(plan.free)}")
    for what, size in training_terms(shape, run).items():
        print(f"  {what}: {_gib(size)}")
    rest = plan.process - sum(training_terms(shape, run).values())
    print(f"  recordings, allocator and what lies outside of PyTorch: {_gib(rest)}")
    if plan.micro is not None and micro != wanted:
        print(
            f"  {wanted.rows} rows at a time would take {_gib(plan.wanted)}: the stage goes on with {micro.rows} by "
            f"itself when memory runs out; MICRO_BATCH_SIZE={micro.rows} spares it the attempts"
        )
    if plan.micro is not None:
        print("  it fits")


def plan_durations(
    params: Params, shape: Shape, lengths: Lengths, plan: Plan, machine: Machine, gpus: int
) -> list[Duration]:
    """How long the expensive stages take; a stage that generates answers is left out, as no measurement tells."""
    run = plan.run
    trained = predict_rate("training", shape, machine, run.tokens, recomputed=run.recomputed, compiled=run.compiled)
    steps = steps_of_run(params.finetune, lengths.rows_a_pass)
    evaluations = math.ceil(steps / params.finetune.evaluate_every_steps)
    # Evaluation is a forward pass, half of a step's arithmetic.
    tokens = trained_tokens(params, lengths) + evaluations * lengths.validation * lengths.mean / 2
    speedup = 1 if gpus == 1 else gpus * SCALING_EFFICIENCY
    durations = [Duration("finetune", tokens / trained.tokens_per_second / speedup, trained.origin)]
    if params.infer.method == "label_scores":
        at_once = TOKENS_PER_BATCH[machine.device]
        scored = predict_rate("scoring", shape, machine, at_once, recomputed=False, compiled=run.compiled)
        seconds = lengths.predicted * (lengths.mean - lengths.answer) / scored.tokens_per_second / speedup
        durations += [Duration(stage, seconds, scored.origin) for stage in ("infer", "infer_base")]
    return durations


def print_durations(durations: list[Duration], gpus: int, price: float | None) -> None:
    """Print a line for each stage, and the sum."""
    for duration in durations:
        print(f"{duration.stage}: {_time(duration.seconds)} ({duration.origin})")
    if len(durations) == 1:
        print("infer, infer_base: not predicted, as they generate answers, whose speed is in no measurement")
    if gpus > 1:
        print(f"  with {gpus} GPUs at {SCALING_EFFICIENCY:.0%} efficiency")
    total = sum(duration.seconds for duration in durations)
    cost = "" if price is None else f", {total / 3600 * gpus * price:,.2f} at {price:,.2f} an hour for each"
    print(f"together: {_time(total)}{cost}. Imports, loading and, in long runs, compiling add minutes to each stage")


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


if __name__ == "__main__":
    run_stage(main)
