"""Put right what `kill -9` of `dvc` may leave half-written: `python -m preflight.mend`, run first by `make repro`.

DVC writes its own dvc.lock and .dvc/tmp/rwlock in place; a part of either stops every later command of DVC's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from voluptuous import Invalid

from stages.common.errors import UserError, run_stage

DVC = Path(".dvc")
LOCK = Path("dvc.lock")
# Which process reads and writes which path: of no use once these processes have ended.
RUNNING = DVC / "tmp/rwlock"
# DVC empties either file before it writes it: another `dvc` may be at it in this very moment.
SECONDS_OF_A_WRITE = 1.0


def is_cut_lock(text: str) -> bool:
    """Whether DVC could not read this dvc.lock, for another reason than a conflict that a person has to resolve."""
    if any(line.startswith("<<<<<<<") for line in text.splitlines()):
        return False
    try:
        COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(text))
    except (YAMLError, Invalid, ValueError):  # ValueError: a date that there is not
        return True
    return False


def is_cut_list(text: str) -> bool:
    """Whether DVC could not read this list of what running processes read and write."""
    try:
        json.loads(text)
    except ValueError:
        return True
    return False


def stays_cut(path: Path, is_cut: Callable[[str], bool]) -> bool:
    """Whether a file is there and cut, and is not just being written."""
    for _ in range(2):
        if not path.is_file() or not is_cut(path.read_text(encoding="utf-8", errors="replace")):
            return False
        time.sleep(SECONDS_OF_A_WRITE)
    return True


def mend_lock(path: Path) -> str | None:
    """Replace a cut dvc.lock by the committed one, or remove it where none is; what was done, if anything was.

    What stood there is kept in .dvc/tmp, in case that a person has edited it. The stages that ran since then are
    restored from the run cache, which has them before dvc.lock does.
    """
    if not stays_cut(path, is_cut_lock):
        return None
    try:
        committed = subprocess.run(["git", "show", f"HEAD:./{path}"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        committed = b""
    kept = RUNNING.with_name(f"unreadable-{path.name}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    path.replace(kept)
    if committed:
        path.write_bytes(committed)
    what = "the committed one again" if committed else "removed"
    return f"{path} was cut by a killed `dvc`, or damaged otherwise, and is {what}; what stood there is in {kept}"


def mend_running(path: Path) -> str | None:
    """Remove a cut list of what running processes read and write; what was done, if anything was.

    A list that a working `dvc` is about to write has to stay: without it a second one would run the same stage.
    """
    if not stays_cut(path, is_cut_list):
        return None
    path.unlink(missing_ok=True)
    return f"{path} was cut by a killed `dvc`, and is removed"


def main() -> None:
    """Mend both, and say so.

    Raises:
        UserError: there is no repository here.
    """
    argparse.ArgumentParser(prog="python -m preflight.mend", description=__doc__).parse_args()
    if not DVC.is_dir():
        raise UserError(f"{DVC}/: not found. Run it in the root of the repository, where dvc.yaml lies.")
    for done in (mend_lock(LOCK), mend_running(RUNNING)):
        if done is not None:
            print(f"preflight: {done}")


if __name__ == "__main__":
    run_stage(main)
