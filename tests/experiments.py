"""A trained project with a tiny base model, and copies of it, for tests of what DVC's experiments do with it."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.test_pipeline import COPIED, EVERYTHING, ROOT, Project, write_reviews
from tests.tiny import save_base_model

PARAMS = {
    "task.labels": ["bad", "so-so", "good"],
    "ingest.source": {"kind": "files", "paths": ["data/raw/reviews.csv"], "format": None},
    "ingest.columns": {
        "id": "number", "text": "review", "label": "opinion", "group": None, "split": None, "slice": None
    },
    "format_prompts.template": "Review: {{ text }}\nOpinion:",
    # Long enough to be interrupted between two checkpoints, and for answers that differ.
    "finetune.max_steps": 40,
    "finetune.evaluate_every_steps": 10,
    "evaluate.bootstrap_samples": 100,
}  # fmt: skip


def make_trained_project(folder: Path) -> Project:
    """A clone-like copy of this repository with 120 reviews as data, run once and committed.

    Args:
        folder: an empty one; the project lies below it, and its base model beside it.
    """
    project = Project(folder / "repository")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        if name.split("/")[0] in {*COPIED, "review"}:
            (project.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project.folder / name)
    save_base_model(folder / "base")
    write_reviews(project.folder / "data/raw/reviews.csv")
    shutil.copy(ROOT / "recipes/tweet-sentiment.yaml", project.folder / "params.yaml")
    project.edit_params("base_model", {"source": "folder", "path": str(folder / "base")})
    for key, value in PARAMS.items():
        project.edit_params(key, value)
    project.git("init", "-q", "-b", "main")
    project.dvc("init", "-q")
    shutil.copytree(ROOT / ".dvc/plots", project.folder / ".dvc/plots", dirs_exist_ok=True)
    shutil.copy(ROOT / ".dvc/.gitignore", project.folder / ".dvc/.gitignore")
    project.git("add", "-A")
    project.git("commit", "-qm", "Start")
    assert project.repro() == EVERYTHING
    project.git("add", "-A")
    project.git("commit", "-qm", "First run")
    return project


def copied(project: Project, folder: Path) -> Project:
    """The same project in another folder, with a DVC cache of its own."""
    copy = Project(folder / "repository")
    shutil.copytree(project.folder, copy.folder, symlinks=True)
    return copy


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
