"""How long a planned training and its predictions take, and what they cost."""

from __future__ import annotations

import math
from typing import NamedTuple

from preflight.lengths import Lengths
from preflight.planning import Plan, trained_tokens
from preflight.run_length import steps_of_run
from preflight.shapes import Shape
from preflight.throughput import Machine, predict_rate
from stages.common.params import Params
from stages.common.scoring.batches import TOKENS_PER_BATCH

# What this project demands of itself on four GPUs; the planned time is no shorter than that.
SCALING_EFFICIENCY = 0.85


class Duration(NamedTuple):
    """How long a stage takes, in seconds, and by what speed."""

    stage: str
    seconds: float
    origin: str


def plan_durations(
    params: Params, shape: Shape, lengths: Lengths, plan: Plan, machine: Machine, gpus: int
) -> list[Duration]:
    """How long the expensive stages take; a stage that generates answers is left out, as no measurement tells."""
    run = plan.run
    trained = predict_rate(
        "training", shape, machine, run.tokens, recomputed=run.recomputed, dense=run.dense, compiled=run.compiled
    )
    steps = steps_of_run(params.finetune, lengths.rows_a_pass)
    evaluations = math.ceil(steps / params.finetune.evaluate_every_steps)
    # Evaluation is a forward pass, half of a step's arithmetic.
    tokens = trained_tokens(params, lengths) + evaluations * lengths.validation * lengths.mean / 2
    speedup = 1 if gpus == 1 else gpus * SCALING_EFFICIENCY
    durations = [Duration("finetune", tokens / trained.tokens_per_second / speedup, trained.origin)]
    if params.infer.method == "label_scores":
        at_once = TOKENS_PER_BATCH[machine.device]
        scored = predict_rate(
            "scoring", shape, machine, at_once, recomputed=False, dense=run.dense, compiled=run.compiled
        )
        # A base that lies on several GPUs is worked on by one of them at a time.
        seconds = lengths.predicted * lengths.prompt / scored.tokens_per_second
        seconds /= speedup if run.shards == 1 else 1
        durations += [Duration(stage, seconds, scored.origin) for stage in ("infer", "infer_base")]
    return durations


def print_durations(durations: list[Duration], gpus: int, price: float | None) -> None:
    """Print a line for each stage, and the sum."""
    for duration in durations:
        print(f"{duration.stage}: {_time(duration.seconds)} ({duration.origin})")
    if len(durations) == 1:
        print("infer, infer_base: not predicted, as they generate answers, whose speed is in no measurement")
    if gpus > 1:
        print(f"  with {gpus} GPUs at {SCALING_EFFICIENCY:.0%} efficiency, where they work at the same time")
    total = sum(duration.seconds for duration in durations)
    cost = "" if price is None else f", {total / 3600 * gpus * price:,.2f} at {price:,.2f} an hour for each"
    print(f"together: {_time(total)}{cost}. Imports, loading and, in long runs, compiling add minutes to each stage")


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
