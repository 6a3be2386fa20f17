"""Clocks, peak memory, the arithmetic floor, and rows as a Markdown table and as JSON."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks import rate_text
from stages.common.model import compute_dtype, machine_device
from stages.common.training.adapter_folder import hardware, library_versions

# bfloat16 FLOP/s that large matrix products reach on the cards' SXM versions (nominal, dense: 989e12), by what the
# name of the device holds. The floor is undefined on others.
REACHED_FLOPS = {"H100 80GB HBM3": 790e12, "H200": 790e12}
# Forward; and for training backward to the activations alone, as the base's weights are frozen.
FLOPS_PER_WEIGHT = {"training": 4, "inference": 2}
REPEATS = 3


@dataclass(frozen=True)
class Row:
    """A line of the tables.

    Attributes:
        benchmark: which of both.
        shape: of the base model.
        weights: "random" or "real".
        prompt_tokens: mean tokens of a prompt.
        labels: number of labels; None where the system's speed does not depend on it.
        rows: of an optimizer step, or scored in a call.
        system: what was measured.
        examples_per_second: rows a second.
        tokens_per_second: prompt tokens a second, in training answers too; padding does not count.
        peak_gib: most memory allocated on the GPU; None on a CPU.
        floor_share: of the examples/s that arithmetic alone would allow; None on unknown devices.
    """

    benchmark: Literal["training", "inference"]
    shape: str
    weights: str
    prompt_tokens: int
    labels: int | None
    rows: int
    system: str
    examples_per_second: float
    tokens_per_second: float
    peak_gib: float | None
    floor_share: float | None

    @property
    def workload(self) -> str:
        """What the systems of a group have in common."""
        labels = f", {self.labels} labels" if self.labels is not None and self.benchmark == "inference" else ""
        return f"{self.shape}, {self.prompt_tokens} tokens{labels}"


class StepClock(TrainerCallback):
    """Times optimizer steps, each from the end of the one before, so that loading and logging count too.

    On CUDA it records events, which do not hold up the work, and reads them after training.
    """

    def __init__(self) -> None:
        self._ends: list[Any] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget the memory that loading took."""
        reset_peak()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ends.append(event)
        else:
            self._ends.append(time.perf_counter())

    def median_seconds(self, warmup_steps: int) -> float:
        """Median time of a step after the first `warmup_steps`, of which there is at least one."""
        assert 1 <= warmup_steps < len(self._ends), "the first step has no step before it"
        synchronise()
        ends = self._ends[warmup_steps - 1 :]
        return statistics.median(_seconds(start, end) for start, end in itertools.pairwise(ends))


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def median_call_seconds(warm_up: Callable[[], object], call: Callable[[], object]) -> float:
    """Median wall-clock time of three calls after a warm-up, the GPU's work included."""
    warm_up()
    reset_peak()
    times = []
    for _ in range(REPEATS):
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Begin measuring peak memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """Most memory allocated on the GPU since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def free_memory() -> None:
    """Give back what the last system held; trainers refer to themselves, so only the collector frees them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reached_flops() -> float | None:
    """FLOP/s of this machine's device for the floor; None where they are not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for part, flops in REACHED_FLOPS.items() if part in name), None)


def floor_share(benchmark: str, weights: int, tokens_per_second: float, flops: float | None) -> float | None:
    """Share of the arithmetic floor: FLOP that the tokens need, over FLOP/s that the device reaches.

    Args:
        benchmark: "training" or "inference".
        weights: in the decoder's linear layers.
        tokens_per_second: without padding.
        flops: of `reached_flops`.
    """
    return None if flops is None else FLOPS_PER_WEIGHT[benchmark] * weights * tokens_per_second / flops


def context() -> dict[str, Any]:
    """Hardware, precision and library versions that the rows were measured with."""
    device = machine_device()
    return {**hardware(device, compute_dtype(device)), "versions": library_versions()}


def print_header(own_rows: str) -> None:
    """Print what the rows were measured with, and the table's first lines.

    Args:
        own_rows: what the column of row counts holds.
    """
    measured = context()
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    print(f"{measured['device']}, {measured['compute_dtype']}; {versions}\n")
    names = ["workload", "weights", "system", own_rows, "examples/s", "tokens/s", "peak GiB"]
    names += ["of the floor"] if reached_flops() else []
    names += ["times the first"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)


def report(row: Row, first: Row, json_path: Path | None) -> None:
    """Print a row of the table and, where a file is given, append it there as a line of JSON.

    Args:
        row: what to print.
        first: the first one of this shape, to compare it with.
        json_path: a file to append to.
    """
    times = row.examples_per_second / first.examples_per_second
    cells = [row.workload, row.weights, row.system, f"{row.rows:,}"]
    cells += [rate_text(row.examples_per_second), f"{row.tokens_per_second:,.0f}"]
    cells += ["–" if row.peak_gib is None else f"{row.peak_gib:.1f}"]
    cells += [] if row.floor_share is None else [f"{row.floor_share:.1%}"]
    cells.append(f"{times:.2f}")
    print(f"| {' | '.join(cells)} |", flush=True)
    if json_path is not None:
        with json_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row) | {"times_first": times} | context()) + "\n")
