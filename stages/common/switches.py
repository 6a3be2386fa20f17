"""Switches in the environment: what a machine can do, and never what is computed."""

from __future__ import annotations

import math
import os

from stages.common.errors import UserError

# Each path has a switch: 0 turns it off, 1 takes it even where it may not pay.
SWITCHES = {
    "PACK_ROWS": "rows without padding",
    "DENSE_BASE": "the base dequantised in memory",
    "COMPILE_LAYERS": "layers compiled",
    "RECORD_STEPS": "steps recorded",
}
SHARD_BASE = "SHARD_BASE"
AUTOMATIC = (*SWITCHES, SHARD_BASE)


def switch(name: str) -> bool | None:
    """What the environment asks for under `name`; None where it is not set.

    Raises:
        UserError: it is neither 0 nor 1.
    """
    value = os.environ.get(name)
    if value not in (None, "", "0", "1"):
        unset = "it is chosen automatically" if name in AUTOMATIC else "it is off"
        raise UserError(f"{name}={value} in the environment: 0 turns it off, 1 on; unset, {unset}")
    return None if not value else value == "1"


def check_switches() -> None:
    """Refuse wrong values before anything is loaded, of what training alone reads too.

    Raises:
        UserError: one of the variables has a value that it cannot have.
    """
    for name in (*AUTOMATIC, "LOW_MEMORY", "DETERMINISTIC"):
        switch(name)
    minutes_between_checkpoints()


def minutes_between_checkpoints() -> float:
    """What CHECKPOINT_EVERY_MINUTES asks for; 10 where it is not set.

    Raises:
        UserError: it is no number from 0 up.
    """
    value = os.environ.get("CHECKPOINT_EVERY_MINUTES") or "10"
    try:
        minutes = float(value)
    except ValueError:
        minutes = math.nan
    if not minutes >= 0:
        raise UserError(
            f"CHECKPOINT_EVERY_MINUTES={value} in the environment must be a number, 0 or more; unset, it is 10 minutes"
        )
    return minutes


def low_memory() -> bool:
    """Whether LOW_MEMORY=1 asks for the smallest memory rather than for speed.

    Raises:
        UserError: it is neither 0 nor 1.
    """
    return bool(switch("LOW_MEMORY"))


def deterministic() -> bool:
    """Whether DETERMINISTIC=1 asks for the same bits from every run on the same GPU, rather than for speed.

    Raises:
        UserError: it is neither 0 nor 1.
    """
    return bool(switch("DETERMINISTIC"))
