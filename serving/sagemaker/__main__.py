"""What SageMaker runs in a container: `docker run IMAGE train` trains, `docker run IMAGE serve` answers requests."""

from __future__ import annotations

import argparse

from serving.common.packages import require_packages
from stages.common.errors import run_stage


def main() -> None:
    """Train or serve."""
    parser = argparse.ArgumentParser(prog="python -m serving.sagemaker", description=__doc__)
    parser.add_argument("command", choices=("train", "serve"), help="docs/sagemaker.md says what each reads and writes")
    if parser.parse_args().command == "train":
        from serving.sagemaker import train as command
    else:
        require_packages("fastapi", "uvicorn")
        from serving.sagemaker import serve as command  # type: ignore[no-redef]
    command.main()


if __name__ == "__main__":
    run_stage(main)
