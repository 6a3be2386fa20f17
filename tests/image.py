"""What of this repository gets into the container's image, laid out in a folder; and SageMaker's folders beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

from ruamel.yaml import YAML

from tests.project import write_reviews
from tests.workplace import ENVIRONMENT, ROOT, UNWANTED


def ignored(name: str, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps a file out: of all patterns that are about it or a folder above, the last decides."""
    parts = name.split("/")
    paths = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
    out = False
    for pattern in patterns:
        plain = pattern.removeprefix("!")
        # **/ is any number of folders, none too; elsewhere a star stays within a name.
        names = [path.rpartition("/")[2] for path in paths] if plain.startswith("**/") else paths
        plain = plain.removeprefix("**/")
        if any(fnmatch(path, plain) and path.count("/") == plain.count("/") for path in names):
            out = not pattern.startswith("!")
    return out


def image_files() -> list[str]:
    """The files of this repository that `COPY . ./` takes."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return [name for name in files if (ROOT / name).is_file() and not ignored(name, patterns)]


def make_image(folder: Path) -> Path:
    """The image's /app, without its user."""
    for name in image_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


class Container:
    """A container of SageMaker's: an image and the folders below /opt/ml, in a root of its own."""

    def __init__(self, image: Path, root: Path) -> None:
        self.image = image
        self.root = root
        self.processes: list[subprocess.Popen[bytes]] = []
        for name in ("input/config", "input/data", "model", "output/data", "checkpoints"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def channel(self, name: str) -> Path:
        folder = self.root / "input/data" / name
        folder.mkdir(exist_ok=True)
        # SageMaker puts such a file beside each channel.
        (self.root / f"input/data/{name}-manifest").write_text("")
        return folder

    def hyperparameters(self, **values: str) -> None:
        names = {name.replace("__", "."): value for name, value in values.items()}
        (self.root / "input/config/hyperparameters.json").write_text(json.dumps(names))

    def environment(self, **more: str) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if name not in UNWANTED and name[:3] != "SM_"}
        # No git: there is none in the image.
        path = {"PATH": "/nowhere", "GIT_PYTHON_REFRESH": "quiet"}
        return own | ENVIRONMENT | path | {"SAGEMAKER_BASE_DIR": str(self.root)} | more

    def start(self, command: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """`docker run IMAGE COMMAND`, not waited for."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "serving.sagemaker", command], cwd=self.image,
                env=self.environment(**environment), stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def run(self, command: str, **environment: str) -> tuple[int, str]:
        """The same to its end: exit code and log."""
        log = self.root / "log"
        process = self.start(command, log, **environment)
        code = process.wait(timeout=300)
        return code, log.read_text(encoding="utf-8")

    def end(self) -> None:
        """End what still runs, as SageMaker does: on SIGTERM a job ends all that it started."""
        for process in self.processes:
            process.terminate()
            try:
                process.wait(timeout=90)
            finally:
                process.kill()


def reviews_job(container: Container, base: Path, steps: int) -> None:
    """Channels and hyperparameters of a job on 120 short reviews and a tiny base."""
    write_reviews(container.channel("data") / "reviews.csv")
    shutil.copytree(base, container.channel("base"), dirs_exist_ok=True)
    values = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    values["ingest"]["source"] = {"kind": "files", "paths": ["data/raw/reviews.csv"], "format": None}
    columns = {"id": "number", "text": "review", "label": "opinion", "group": None, "split": None, "slice": None}
    values["ingest"]["columns"] = columns
    YAML(typ="safe", pure=True).dump(values, container.channel("params") / "reviews.yaml")
    container.hyperparameters(
        task__labels='["bad", "so-so", "good"]',
        # A text with a line break, quoted once more as some SDKs do.
        format_prompts__template=json.dumps("Review: {{ text }}\nOpinion:"),
        finetune__max_steps=str(steps),
        finetune__evaluate_every_steps='"10"',
        evaluate__bootstrap_samples="100",
        sagemaker_region="us-east-1",
        _tuning_objective_metric="validation:best_loss",
    )
