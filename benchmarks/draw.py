"""Draw what the benchmarks measured: `python -m benchmarks.draw results.json docs/performance.svg`."""

from __future__ import annotations

import argparse
import json
import math
from html import escape
from pathlib import Path
from typing import Any

from benchmarks import OURS, rate_text
from stages.common.errors import UserError, run_stage
from stages.common.tables import write_text

# Pixels.
WIDTH, LEFT, RIGHT, BAR, GAP, TITLE, AXIS = 860, 240, 80, 16, 4, 30, 36


def main() -> None:
    """Write an SVG from the lines that `--json` appended; of lines about the same, the last one counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="what --json wrote")
    parser.add_argument("svg", type=Path, help="where to draw")
    options = parser.parse_args()
    groups = grouped(read_results(options.results))
    write_text(options.svg, draw(groups))
    print(f"draw: {sum(map(len, groups.values()))} bars in {options.svg}")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `--json` wrote.

    Raises:
        UserError: it has none, or a line is no such row.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        usable = all(row["examples_per_second"] > 0 for row in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds something else than rows of the benchmarks ({error!r}).") from error
    if not rows or not usable:
        raise UserError(f"{path}: holds no measured rows. Run a benchmark with `--json {path}` first.")
    return rows


def grouped(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Examples/s of each system, by workload and device; both in the order of their first line."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        title = f"{row['benchmark']}: {row['shape']}, {row['prompt_tokens']} tokens; {row['device']}"
        several = row["benchmark"] == "inference" and row["labels"] is not None
        system = f"{row['system']}, {row['labels']} labels" if several else row["system"]
        groups.setdefault(title, {})[system] = row["examples_per_second"]
    return groups


def draw(groups: dict[str, dict[str, float]]) -> str:
    """Bars of examples/s on a logarithmic axis, a block for each workload, as an SVG."""
    rates = [rate for bars in groups.values() for rate in bars.values()]
    first, last = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)))
    first -= first == math.log10(min(rates))  # a bar has a length

    def place(rate: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(rate) - first) / (last - first)

    height = AXIS + sum(TITLE + len(bars) * (BAR + GAP) for bars in groups.values()) + GAP
    parts = [_text(LEFT, 14, "examples/s, logarithmic")]
    for power in range(first, last + 1):
        x = place(10.0**power)
        parts.append(f'<path d="M{x:.1f} {AXIS}V{height}" stroke="#ddd"/>')
        parts.append(_text(x, AXIS - 6, f"{10.0**power:,g}", "middle"))
    y = AXIS
    for title, bars in groups.items():
        y += TITLE
        parts.append(_text(8, y - 8, title, weight="bold"))
        for system, rate in bars.items():
            color = "#2166ac" if system.startswith(OURS) else "#999"
            length = place(rate) - LEFT
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{color}"/>')
            parts += [_text(LEFT - 6, y + 12, system, "end"), _text(place(rate) + 5, y + 12, rate_text(rate))]
            y += BAR + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


if __name__ == "__main__":
    run_stage(main)
