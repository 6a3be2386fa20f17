"""What CI says about known vulnerabilities of dependencies; the advisory service itself is not reachable from tests."""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("line", ["PYSEC-2026-1", "PYSEC-2026-1   ", "# why\n\nGHSA-aaaa-bbbb-cccc"])
def test_an_exception_without_a_reason_is_refused(line: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / ".ci/audit-exceptions.txt").write_text(f"PYSEC-2026-2 until 2027-01-31: not used here\n{line}\n")
    result = subprocess.run([tmp_path / ".ci/audit"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: .ci/audit-exceptions.txt: ") and "no reason" in result.stderr


def test_every_file_of_requirements_starts_an_audit_when_it_changes() -> None:
    files = subprocess.run(
        ["git", "ls-files", "*requirements*.txt"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = files.stdout.split()
    assert len(names) >= 5
    yaml = YAML(typ="safe")
    workflow = yaml.load(ROOT / ".github/workflows/audit.yml")
    job = yaml.load(ROOT / ".gitlab-ci.yml")["audit"]
    for patterns in (workflow["on"]["push"]["paths"], job["rules"][1]["changes"]):
        for name in names:
            # In both, ** is any number of folders, or none.
            assert any(fnmatch.fnmatch(name, pattern.replace("**/", "*").replace("**", "*")) for pattern in patterns)
    assert workflow["on"]["schedule"]
