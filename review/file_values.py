"""Where two versions of a file differ: numbers of JSON and CSV by more than a tolerance, text by lines."""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stages.common.errors import UserError
from stages.common.tables import read_json

# Another processor may add in another order, or have another logarithm: a last digit or two of sixteen. None of those
# tried (docs/ci.md) moved any value, so this is a margin that still shows no digit that anybody reads.
RELATIVE_TOLERANCE = 1e-9
# For values that ought to be 0.
ABSOLUTE_TOLERANCE = 1e-12
MISSING = object()


class Difference(NamedTuple):
    """A value that is not what was committed."""

    place: str
    committed: str
    recomputed: str


def differences(name: Path, committed: Path, recomputed: Path) -> list[Difference]:
    """Where two files of one kind differ; numbers by more than the tolerance.

    Raises:
        UserError: one cannot be read as what its name says.
    """
    missing = [path for path in (committed, recomputed) if not path.exists()]
    if missing:
        states = ["absent" if path in missing else "there" for path in (committed, recomputed)]
        return [Difference(str(name), *states)]
    try:
        return _differences(name, committed, recomputed)
    except (UnicodeDecodeError, csv.Error) as error:
        # The one that is committed: evaluate and report have just written the other.
        raise UserError(
            f"{committed}: is no text in UTF-8, or no table ({error}). `git checkout` restores what was committed; "
            "`dvc repro evaluate report` writes it again."
        ) from None


def _differences(name: Path, committed: Path, recomputed: Path) -> list[Difference]:
    read = {".json": _json_values, ".csv": _csv_values}.get(name.suffix)
    if read is None:
        return _changed_lines(name, committed, recomputed)
    before, after = dict(read(committed)), dict(read(recomputed))
    return [
        Difference(f"{name}: {key}", _shown(before, key), _shown(after, key))
        for key in dict.fromkeys([*before, *after])
        if not equal(before.get(key, MISSING), after.get(key, MISSING))
    ]


def equal(one: Any, other: Any) -> bool:
    """Whether two values are the same; counts and texts exactly, other numbers within the tolerance."""
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
    return type(one) is type(other) and bool(one == other)


def _json_values(path: Path) -> Iterator[tuple[str, Any]]:
    yield from _flat("", read_json(path))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
    else:
        yield prefix, value


def _csv_values(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        yield "columns", ",".join(reader.fieldnames or [])
        for row, cells in enumerate(reader, start=1):
            for column, cell in cells.items():
                yield f"row {row}, {column}", _number(cell)


def _number(cell: Any) -> Any:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return cell
    # A whole number is a count, or an id with leading zeros.
    return value if math.isfinite(value) and not cell.isdigit() else cell


def _changed_lines(name: Path, committed: Path, recomputed: Path) -> list[Difference]:
    before, after = (path.read_text(encoding="utf-8").splitlines() for path in (committed, recomputed))
    found = []
    for kind, start, end, other_start, other_end in difflib.SequenceMatcher(a=before, b=after).get_opcodes():
        if kind != "equal":
            texts = ["\n".join(before[start:end]), "\n".join(after[other_start:other_end])]
            found.append(Difference(f"{name}: line {start + 1}", *(_short(repr(text)) for text in texts)))
    return found


def _shown(values: dict[str, Any], key: str) -> str:
    return _short(repr(values[key])) if key in values else "absent"


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:119] + "…"
