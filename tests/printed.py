"""What a benchmark prints when a user runs it."""

from __future__ import annotations

import subprocess
import sys

from tests.workplace import ROOT


def printed_rows(*command: str) -> list[list[str]]:
    """The cells of each row of the Markdown table that `python -m COMMAND` prints, without its header."""
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [line.strip().strip("|").split("|") for line in result.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]
