"""One progress bar with a remaining-time estimate for everything that takes longer than a few seconds."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int | None, what: str, unit: str = "row") -> tqdm[Any]:
    """A progress bar on stderr; a log file gets a line's worth every 15 seconds instead of a flood.

    Args:
        total: how many steps there are; None when that is unknown.
        what: what is being done, in a few words.
        unit: what one step is.
    """
    # The delay keeps quick work silent.
    return tqdm(
        total=total, desc=what, unit=unit, unit_scale=True, delay=2, mininterval=0.5 if sys.stderr.isatty() else 15.0
    )
