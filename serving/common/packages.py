"""Packages that only some of serving's commands need."""

from __future__ import annotations

import importlib.util
import sys

from stages.common.errors import UserError, listing


def require_packages(*names: str) -> None:
    """Refuse to start without what `make serving` installs.

    Raises:
        UserError: says which is absent.
    """
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f"{sys.prefix} lacks {listing(absent)}. `make serving` installs what this command needs.")
