"""A repository to review: the pipeline on reviews and a tiny base, its results pushed to a folder, and a branch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.tiny import save_base_model
from tests.workplace import reviews

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
COPIED = {
    "stages", "preflight", "review", "data", "recipes", "dvc.yaml", "requirements.txt", "requirements-review.txt",
    ".dvcignore", ".gitignore", ".github", ".gitlab-ci.yml",
}  # fmt: skip


class Clone:
    """A clone, and what runs in it, with no DVC configuration but its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder.parent),
            "DVC_NO_ANALYTICS": "1",
            "DVC_GLOBAL_CONFIG_DIR": str(folder.parent / "dvc-global"),
            "DVC_SYSTEM_CONFIG_DIR": str(folder.parent / "dvc-system"),
            "DVC_SITE_CACHE_DIR": str(folder.parent / "dvc-site"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TQDM_DISABLE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        }

    def run(self, *command: str, fails: bool = False, environment: dict[str, str] | None = None) -> str:
        """What the command printed; its exit code has to be 1 where it fails (255 of DVC)."""
        result = subprocess.run(
            command, cwd=self.folder, env=self.environment | (environment or {}), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert result.returncode in ((1, 255) if fails else (0,)), result.stdout
        assert "Traceback" not in result.stdout, result.stdout
        return result.stdout

    def python(self, module: str, *arguments: str, fails: bool = False) -> str:
        return self.run(sys.executable, "-m", module, *arguments, fails=fails)

    def dvc(self, *arguments: str) -> str:
        return self.run(str(BIN / "dvc"), *arguments)

    def git(self, *arguments: str) -> str:
        return self.run("git", "-c", "user.name=T", "-c", "user.email=t@example.org", *arguments)

    def commit(self, message: str) -> None:
        self.git("add", "-A")
        self.git("commit", "-qm", message)

    def read(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def edit(self, name: str, old: str, new: str) -> None:
        text = self.read(name)
        assert old in text
        self.write(name, text.replace(old, new, 1))

    def set(self, key: str, value: Any) -> None:
        """Change one key of params.yaml."""
        yaml = YAML()
        values = yaml.load(self.folder / "params.yaml")
        *path, last = key.split(".")
        block = values
        for part in path:
            block = block[part]
        block[last] = value
        yaml.dump(values, self.folder / "params.yaml")

    def clone(self, folder: Path, branch: str) -> Clone:
        """A clone of a branch that has pulled nothing."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.git("clone", "-q", "--branch", branch, str(self.folder), str(folder))
        return Clone(folder)


def make_repository(folder: Path) -> Clone:
    """`main` with all results, `change` with other intervals, both pushed to the remote FOLDER/../remote."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in tracked:
        if name.split("/")[0] in COPIED:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    repository = Clone(folder)
    save_base_model(folder.parent / "base")
    repository.write("data/raw/reviews.csv", reviews())
    shutil.copy(ROOT / "recipes/tweet-sentiment.yaml", folder / "params.yaml")
    columns = {"id": "number", "text": "review", "label": "opinion", "group": None, "split": None, "slice": None}
    for key, value in {
        "base_model": {"source": "folder", "path": str(folder.parent / "base")},
        "task.labels": ["bad", "so-so", "good"],
        "ingest.source": {"kind": "files", "paths": ["data/raw/reviews.csv"], "format": None},
        "ingest.columns": columns,
        "format_prompts.template": "Review: {{ text }}\nOpinion:",
        "finetune.max_steps": 6,
        "finetune.evaluate_every_steps": 3,
        "evaluate.bootstrap_samples": 100,
    }.items():
        repository.set(key, value)
    repository.git("init", "-q", "-b", "main")
    repository.dvc("init", "-q")
    shutil.copytree(ROOT / ".dvc/plots", folder / ".dvc/plots", dirs_exist_ok=True)
    repository.dvc("remote", "add", "--default", "storage", str(folder.parent / "remote"))
    repository.commit("Start")
    _run_and_push(repository, "First run")
    repository.git("checkout", "-qb", "change")
    repository.set("evaluate.bootstrap_samples", 200)
    _run_and_push(repository, "Draw more samples")
    repository.git("checkout", "-q", "main")
    repository.dvc("checkout", "-q")
    return repository


def _run_and_push(repository: Clone, message: str) -> None:
    repository.dvc("repro")
    repository.commit(message)
    repository.dvc("push", "-q")
