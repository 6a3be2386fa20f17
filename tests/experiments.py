"""What tests ask of DVC's experiments and their queue."""

from __future__ import annotations

import re
import time
from typing import Any

from ruamel.yaml import YAML

from tests.project import Project


def lock_of(project: Project, revision: str) -> dict[str, Any]:
    """The stages of dvc.lock at a revision."""
    return YAML(typ="safe").load(project.git("show", f"{revision}:dvc.lock"))["stages"]


def experiments_of(project: Project) -> dict[str, str]:
    """The commits of all experiments, by name."""
    lines = project.git("for-each-ref", "--format=%(refname) %(objectname)", "refs/exps").splitlines()
    found = dict(line.split() for line in lines)
    return {name.rpartition("/")[2]: commit for name, commit in found.items()}


def wait_for_queue(project: Project, seconds: float = 600) -> dict[str, str]:
    """The status of each queued experiment by name, once all have ended."""
    deadline = time.monotonic() + seconds
    while True:
        output = project.dvc("queue", "status")
        states = dict(re.findall(r"^[0-9a-f]{7} +(\S+) .* (Queued|Running|Success|Failed) *$", output, re.MULTILINE))
        if states and not {"Queued", "Running"} & set(states.values()):
            return states
        assert time.monotonic() < deadline, output
        time.sleep(2)  # the question itself costs a second of a core
