"""Benchmarks run as their documentation says, on a table too small to measure anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_benchmark_of_comparisons_prints_a_line_for_each_task() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", "--rows", "200", "--tasks", "2 labels"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines[2:]] == ["2 labels"]
    assert all(float(line[4]) < 1024 for line in lines[2:])


def test_the_data_benchmark_prints_a_line_for_each_data_stage() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.data", "--rows", "600"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["ingest", "format_prompts", "split"]
    assert all(float(line.split(" | ")[4].strip("| ").replace(",", "")) < 2048 for line in lines[2:])
