"""One progress bar with a remaining-time estimate for everything that takes longer than a few seconds."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress(total: int | None, what: str, unit: str = "row") -> tqdm[Any]:
    """A progress bar on stderr that appears after two seconds, so that quick work stays silent.

    Args:
        total: how many steps there are; None when that is unknown.
        what: what is being done, in a few words.
        unit: what one step is.
    """
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, delay=2)
