"""The folders of SageMaker's containers: where it puts what a job reads, and takes what a job wrote.

Training: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo.html
Serving: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from stages.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# What a training job may bring, by channel.
CHANNELS = {
    "data": "tables; they become data/raw",
    "params": "one YAML file, a whole params.yaml",
    "base": "the base model's files, as save_pretrained writes them; they replace base_model",
    "wheels": "Python packages that hold base model or data; pip looks nowhere else",
}
# What the SDK itself adds where it uploads code.
FOREIGN_CHANNELS = ("code", "sm_drivers")


@dataclass(frozen=True)
class Folders:
    """Where things are in a container.

    Attributes:
        work: a copy of the project, in which the pipeline runs.
        inputs: holds a folder for each channel.
        hyperparameters: a JSON object of texts.
        model: goes to S3 when training ends, and comes back when the model is deployed.
        results: goes to S3 when training ends.
        failure: why a job failed; the console shows its first 1,024 characters.
        checkpoints: kept in S3 all the time, and brought back when an interrupted job goes on.
    """

    work: Path
    inputs: Path
    hyperparameters: Path
    model: Path
    results: Path
    failure: Path
    checkpoints: Path


def folders() -> Folders:
    """Below /opt/ml, or where the environment says: SAGEMAKER_BASE_DIR, SM_MODEL_DIR, SM_OUTPUT_DATA_DIR.

    SageMaker sets none of them for an image of one's own; its training toolkit and the SDK's drivers do.
    """
    base = Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"))
    return Folders(
        work=base / "work",
        inputs=base / "input/data",
        hyperparameters=base / "input/config/hyperparameters.json",
        model=Path(os.environ.get("SM_MODEL_DIR", base / "model")),
        results=Path(os.environ.get("SM_OUTPUT_DATA_DIR", base / "output/data")),
        failure=base / "output/failure",
        checkpoints=base / "checkpoints",
    )


def channels(inputs: Path) -> dict[str, Path]:
    """The folders of the channels that the job has: SM_CHANNEL_NAME in the environment, else a folder in `inputs`.

    Raises:
        UserError: a channel is unknown, empty or no folder.
    """
    found = {path.name: path for path in sorted(inputs.glob("*")) if path.is_dir()}
    prefix = "SM_CHANNEL_"
    told = [name for name in os.environ if name.startswith(prefix)]
    found |= {name.removeprefix(prefix).lower(): Path(os.environ[name]) for name in told}
    problems = []
    for name, folder in found.items():
        if name in FOREIGN_CHANNELS:
            continue
        if name not in CHANNELS:
            known = "; ".join(f"{channel}: {meaning}" for channel, meaning in CHANNELS.items())
            problems.append(f"channel {name!r}: is unknown. Known are {known}.")
        elif not folder.is_dir() or not any(folder.iterdir()):
            problems.append(f"channel {name!r}: {folder} holds no files. Check the channel's S3 URI.")
    if problems:
        raise UserError("\n  ".join(["the job's input cannot be used:", *problems]))
    return {name: folder for name, folder in found.items() if name in CHANNELS}
