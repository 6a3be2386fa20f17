"""How fast a base is trained and scored on a device: from what was measured, scaled by arithmetic to what was not."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from preflight.memory import GIB
from preflight.shapes import Shape
from stages.common.errors import UserError

# A line for each measured configuration: hardware, versions, and the command that measured it. Without tokens a second
# it tells of memory alone.
MEASUREMENTS = Path(__file__).with_name("measurements.jsonl")


class Machine(NamedTuple):
    """A kind of device.

    Attributes:
        device: "cuda" or "cpu".
        bytes: of its memory that a process can use; None: whatever this machine has.
        flops: multiplications and additions a second of dense bfloat16 matrices, by its maker's data sheet; None for a
            CPU, whose measurements are not carried over to others.
    """

    device: Literal["cuda", "cpu"]
    bytes: float | None
    flops: float | None


# Memory as the driver reports it. Speed was measured on an H200; the others' is the H200's, scaled by these numbers.
MACHINES = {
    "H200": Machine("cuda", 139.8 * GIB, 989e12),
    "H100": Machine("cuda", 79.1 * GIB, 989e12),
    "A100-80GB": Machine("cuda", 79.2 * GIB, 312e12),
    "A100-40GB": Machine("cuda", 39.4 * GIB, 312e12),
    "L40S": Machine("cuda", 44.4 * GIB, 362e12),
    "RTX-4090": Machine("cuda", 23.6 * GIB, 165e12),
    "L4": Machine("cuda", 22.0 * GIB, 121e12),
    "A10G": Machine("cuda", 22.0 * GIB, 70e12),
    "cpu": Machine("cpu", None, None),
}


class Rate(NamedTuple):
    """A predicted speed.

    Attributes:
        tokens_per_second: on one device.
        origin: what it follows from, for the reader.
    """

    tokens_per_second: float
    origin: str


@cache
def measurements() -> list[dict[str, Any]]:
    """All lines of the table."""
    return [json.loads(line) for line in MEASUREMENTS.read_text(encoding="utf-8").splitlines()]


def measured_shape(row: dict[str, Any]) -> Shape:
    """The base of a line."""
    return Shape(model_type="llama", **row["shape"])


def find_machine(name: str) -> tuple[str, Machine]:
    """The machine of this name, whatever its capitals, and its name as it is written here.

    Raises:
        UserError: it is not known.
    """
    for known, machine in MACHINES.items():
        if known.lower() == name.lower():
            return known, machine
    raise UserError(f"--gpu: {name!r} is not known. Allowed: {', '.join(MACHINES)}.")


def machine_of_device(device: str, total: float) -> str | None:
    """The name here of what PyTorch calls a GPU with so many bytes, or of a CPU; None where it is not known."""
    words = re.findall(r"\w+", device)
    if words[:1] == ["cpu"]:
        return "cpu"
    alike = {
        name: abs((machine.bytes or 0) - total)
        for name, machine in MACHINES.items()
        if name.removeprefix("RTX-").partition("-")[0] in words
    }
    return min(alike, key=lambda name: alike[name], default=None)


def predict_rate(
    kind: Literal["training", "scoring"],
    shape: Shape,
    machine: Machine,
    tokens: int,
    *,
    recomputed: bool,
    dense: bool,
    compiled: bool,
) -> Rate:
    """Tokens a second, by the measurement that is most like what is planned.

    A token costs arithmetic in proportion to the weights that it is multiplied with; a machine gives it in proportion
    to what its maker says.

    Args:
        kind: what is done.
        shape: of the base.
        machine: the device.
        tokens: worked on at a time.
        recomputed: whether activations are, as where memory is short.
        dense: whether the base is dequantised in memory; of no effect on a CPU.
        compiled: whether layers are.
    """
    alike = [
        row
        for row in measurements()
        if row["kind"] == kind and row["tokens_per_second"] and _device(row).device == machine.device
    ]
    best = min(
        alike,
        key=lambda row: (
            row["recomputed"] != recomputed,
            machine.device == "cuda" and row["dense"] != dense,
            row["compiled"] != compiled,
            not row["packed"],
            abs(math.log(measured_shape(row).linear_parameters / shape.linear_parameters)),
            abs(math.log(row["rows"] * row["mean_tokens"] / tokens)),
        ),
    )
    weights = measured_shape(best).linear_parameters / shape.linear_parameters
    speed = (machine.flops or 1) / (_device(best).flops or 1)
    origin = f"{best['tokens_per_second']:,} tokens/s measured with {best['base']} on {best['device']}"
    if abs(weights - 1) > 0.01 or speed != 1:
        origin += f", times {weights * speed:.2g} by arithmetic"
        origin += ": an order of magnitude" if abs(math.log10(weights * speed)) > 1 else ""
    return Rate(best["tokens_per_second"] * weights * speed, origin)


def _device(row: dict[str, Any]) -> Machine:
    return MACHINES[row["device"]]
