"""Benchmarks run as their documentation says, on a table too small to measure anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.stages import STAGES, exponent

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


def test_the_benchmark_of_stages_prints_a_line_for_each_cheap_stage() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.stages", "--rows", "300"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [line.strip("|").split("|") for line in result.stdout.splitlines() if line.startswith("|")]
    assert [line[0].strip() for line in lines[2:]] == list(STAGES)
    assert all(float(line[2]) > 0 and float(line[4]) < 1024 for line in lines[2:])


def test_growth_is_the_power_of_the_number_of_rows() -> None:
    assert exponent(100, 2.0, 1_000, 20.0) == pytest.approx(1)
    assert exponent(100, 2.0, 400, 32.0) == pytest.approx(2)
