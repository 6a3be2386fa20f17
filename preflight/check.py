"""Find what would waste a GPU run before it starts: `python -m preflight.check`, run first by the finetune stage."""

from __future__ import annotations

from stages.common.errors import run_stage
from stages.common.params import load_params


def main() -> None:
    """Check every block of params.yaml, those of later stages included."""
    load_params()
    print("preflight: params.yaml is complete and consistent")


if __name__ == "__main__":
    run_stage(main)
