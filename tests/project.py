"""A clone-like copy of this repository with data and a base model of its own, in which real git and dvc run."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.tiny import save_base_model

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = {
    "code",
    "base_model",
    "ingest",
    "format_prompts",
    "split",
    "finetune",
    "infer",
    "infer_base",
    "baseline",
    "evaluate",
    "report",
}
COPIED = {
    "stages",
    "preflight",
    "review",
    "serving",
    "data",
    "recipes",
    "dvc.yaml",
    "requirements.txt",
    "requirements-review.txt",
    ".dvcignore",
    ".gitignore",
    ".github",
    ".gitlab-ci.yml",
}
# It runs when a number that it shows changed. Its files lie in Git, which turns DVC's run cache off for it, so it may
# also run again where other stages are restored.
REPORT = {"report"}
DVC = str(Path(sys.executable).with_name("dvc"))
GIT = ("git", "-c", "user.name=T", "-c", "user.email=t@example.org")


class Project:
    """A repository in which commands run as a user's would, and nothing of the machine's own settings counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # No PATH to the environment: `.venv/bin/dvc repro` has to work without activating it.
        self.environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder.parent),
            "DVC_NO_ANALYTICS": "1",
            "DVC_GLOBAL_CONFIG_DIR": str(folder.parent / "dvc-global"),
            "DVC_SYSTEM_CONFIG_DIR": str(folder.parent / "dvc-system"),
            "DVC_SITE_CACHE_DIR": str(folder.parent / "dvc-site"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TQDM_DISABLE": "1",
            # The same on every machine: the number of threads decides the last digits.
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str, fails: bool = False, environment: dict[str, str] | None = None) -> str:
        """What a command prints; it has to succeed, or to fail as a user's mistake does."""
        result = subprocess.run(
            command, cwd=self.folder, env=self.environment | (environment or {}), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert (result.returncode != 0) == fails, result.stdout
        assert not fails or "Traceback" not in result.stdout, result.stdout
        return result.stdout

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command that is not waited for."""
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def dvc(self, *arguments: str, fails: bool = False) -> str:
        return self.run(DVC, *arguments, fails=fails)

    def git(self, *arguments: str) -> str:
        return self.run(*GIT, *arguments)

    def python(self, *arguments: str, fails: bool = False) -> str:
        return self.run(sys.executable, *arguments, fails=fails)

    def repro(self, *arguments: str) -> set[str]:
        """The stages whose commands ran."""
        return set(re.findall(r"Running stage '(\w+)'", self.dvc("repro", *arguments)))

    def edit_params(self, key: str, value: Any) -> None:
        yaml = YAML()
        values = yaml.load(self.folder / "params.yaml")
        *path, last = key.split(".")
        block = values
        for part in path:
            block = block[part]
        block[last] = value
        yaml.dump(values, self.folder / "params.yaml")

    def edit_file(self, name: str, old: str, new: str) -> None:
        text = self.read(name)
        assert old in text
        self.write(name, text.replace(old, new, 1))

    def read(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def commit(self, message: str) -> None:
        self.git("add", "-A")
        self.git("commit", "-qm", message)

    def metrics(self) -> dict[str, Any]:
        return json.loads(self.read("metrics/metrics.json"))

    def copy(self, folder: Path) -> Project:
        """The same with its cache and outputs, to be changed."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder)

    def clone(self, folder: Path, branch: str = "main") -> Project:
        """What Git alone gives a colleague."""
        folder.mkdir(parents=True)
        clone = Project(folder)
        clone.git("clone", "-q", "--branch", branch, str(self.folder), ".")
        return clone


def write_reviews(path: Path) -> None:
    """A CSV of 120 short reviews whose words give the label away."""
    words = {
        "good": ["fine", "great", "lovely"],
        "bad": ["awful", "poor", "nasty"],
        "so-so": ["okay", "plain", "usual"],
    }
    randomness = random.Random(0)
    lines = ["number,review,opinion"]
    for number in range(120):
        opinion = list(words)[number % 3]
        review = f"the {randomness.choice(words[opinion])} film of day {number} was {randomness.choice(words[opinion])}"
        lines.append(f"{number},{review},{opinion}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def finished_project(folder: Path, environment: dict[str, str] | None = None) -> Project:
    """The pipeline on reviews and a tiny base, run once and committed; what that run said is in repro.log beside it."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in tracked:
        if name.split("/")[0] in COPIED:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    save_base_model(folder.parent / "base")
    write_reviews(folder / "data/raw/reviews.csv")
    project = Project(folder)
    shutil.copy(ROOT / "recipes/tweet-sentiment.yaml", folder / "params.yaml")
    project.edit_params("base_model", {"source": "folder", "path": str(folder.parent / "base")})
    # The four keys that a reader edits to bring their own data.
    project.edit_params("task.labels", ["bad", "so-so", "good"])
    project.edit_params("ingest.source", {"kind": "files", "paths": ["data/raw/reviews.csv"], "format": None})
    columns = {"id": "number", "text": "review", "label": "opinion", "group": None, "split": None, "slice": None}
    project.edit_params("ingest.columns", columns)
    project.edit_params("format_prompts.template", "Review: {{ text }}\nOpinion:")
    # Long enough to be interrupted between two checkpoints, and for answers that differ.
    project.edit_params("finetune.max_steps", 40)
    project.edit_params("finetune.evaluate_every_steps", 10)
    project.edit_params("evaluate.bootstrap_samples", 100)
    project.git("init", "-q", "-b", "main")
    project.dvc("init", "-q")
    shutil.copytree(ROOT / ".dvc/plots", folder / ".dvc/plots", dirs_exist_ok=True)
    shutil.copy(ROOT / ".dvc/.gitignore", folder / ".dvc/.gitignore")
    project.commit("Start")
    said = project.run(DVC, "repro", environment=environment)
    (folder.parent / "repro.log").write_text(said, encoding="utf-8")
    assert set(re.findall(r"Running stage '(\w+)'", said)) == EVERYTHING
    project.commit("First run")
    return project
