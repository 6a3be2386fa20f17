"""The properties of hostile input with many more examples, and other ones each time: `make test-slow`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TIMES = 20


@pytest.mark.slow
@pytest.mark.parametrize("part", ["archives", "params", "prompts", "tables"])
def test_the_properties_hold_for_many_more_examples(part: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_hostile_{part}.py"],
        cwd=TESTS.parent, env=os.environ | {"HOSTILE_TIMES": str(TIMES)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-8000:]
