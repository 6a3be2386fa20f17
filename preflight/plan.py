"""Whether a training fits a machine, how long it takes and what it costs, before a GPU is rented.

`python -m preflight.plan [params.yaml] [--base SHAPE or config.json] [--gpu NAME] [--gpus N] [--price-per-hour X]`
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from preflight.base import BASE_CONFIG
from preflight.durations import plan_durations, print_durations
from preflight.lengths import read_lengths
from preflight.memory import training_terms
from preflight.planning import Plan, check_sharded, gib, make_plan, misfit, planned_prediction, spreads_base
from preflight.predicting import Prediction, prediction_bytes, prediction_terms
from preflight.shapes import Shape, read_shape, shape_of_file
from preflight.throughput import MACHINES, Machine, find_machine, machine_of_device
from stages.common.acceleration.choice import available_memory
from stages.common.errors import UserError, run_stage
from stages.common.model import machine_device
from stages.common.params import PARAMS_PATH, load_params
from stages.common.training.trainer import MicroBatch, check_shares


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
    if spreads_base(shape, machine, options.gpus):
        check_sharded(params)
    lengths = read_lengths(params, options.rows, options.tokens)
    plan = make_plan(params, shape, lengths, machine, free, options.gpus)
    print(
        f"plan: {shape.linear_parameters:,} weights in {shape.layers} layers; {lengths.rows_a_pass:,} rows of "
        f"{lengths.mean:,.0f} tokens, {lengths.longest:,} at most; {options.gpus} x {name}"
    )
    print_memory(shape, plan, options.gpus)
    print_prediction(shape, planned_prediction(params, shape, lengths, machine, free, options.gpus), free)
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
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{given.replace('_', '-')} must be a number above 0")
    return options


def read_base_shape(base: str | None) -> Shape:
    """The shape of a base: a name of `benchmarks.shapes`, a config.json, or the pinned base.

    Raises:
        UserError: it is none of these.
    """
    if base is None:
        if not BASE_CONFIG.is_file():
            raise UserError(
                f"{BASE_CONFIG}: not found. `dvc repro base_model` fetches the base of params.yaml, or name another "
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
        found, (free, total) = torch.cuda.get_device_name(), torch.cuda.mem_get_info()
        known = machine_of_device(found, total)
        if known is None:
            raise UserError(f"nothing is known of {found}. Name the most similar machine: --gpu {', '.join(MACHINES)}.")
        return known, MACHINES[known], float(free)
    name, machine = find_machine(name or "cpu")
    return name, machine, float(available_memory()) if machine.bytes is None else machine.bytes


def print_memory(shape: Shape, plan: Plan, gpus: int) -> None:
    """Print the terms of the prediction and whether it fits."""
    run, wanted = plan.run, plan.wanted_micro
    micro = plan.micro or MicroBatch(1, 1, recompute_activations=True)
    cut = f"{micro.rows} rows ({run.tokens:,} tokens) at a time{', activations recomputed' if run.recomputed else ''}"
    where = f" on each of {gpus} GPUs" if gpus > 1 else ""
    where += ", which the base is sharded over" if run.shards > 1 else ""
    print(f"memory of finetune{where}, {cut}: {gib(plan.process)} of {gib(plan.free)}")
    for what, size in training_terms(shape, run).items():
        print(f"  {what}: {gib(size)}")
    rest = plan.process - sum(training_terms(shape, run).values())
    print(f"  recordings, allocator and what lies outside of PyTorch: {gib(rest)}")
    if plan.micro is not None and micro != wanted:
        print(
            f"  {wanted.rows} rows at a time would take {gib(plan.wanted)}: the stage goes on with {micro.rows} by "
            f"itself when memory runs out; MICRO_BATCH_SIZE={micro.rows} spares it the attempts"
        )
    if plan.micro is not None:
        print("  it fits")


def print_prediction(shape: Shape, batch: Prediction, free: float) -> None:
    """Print the same of the stage infer, whose batches shrink on a GPU until they fit."""
    process = prediction_bytes(shape, batch)
    where = f" on each of {batch.gpus} GPUs, which the base's layers lie on" if batch.gpus > 1 else ""
    cut = f"{batch.rows:,} rows ({batch.tokens:,} tokens) at a time"
    print(f"memory of infer{where}, {cut}: {gib(process)} of {gib(free)}")
    for what, size in prediction_terms(shape, batch).items():
        print(f"  {what}: {gib(size)}")
    rest = process - sum(prediction_terms(shape, batch).values())
    print(f"  allocator and what lies outside of PyTorch: {gib(rest)}")
    if process > free:
        print("  too much: its batches shrink until they fit" if batch.device == "cuda" else "  it does not fit")


if __name__ == "__main__":
    run_stage(main)
