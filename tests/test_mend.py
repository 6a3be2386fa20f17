"""What a killed `dvc` leaves half-written, and what a working one is just writing."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from preflight import mend
from stages.common.errors import run_stage


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command in an empty folder; all that it says, its exit code last unless that is 0."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mend, "SECONDS_OF_A_WRITE", 0.3)

    def run(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["preflight.mend", *options])
        code = 0
        try:
            run_stage(mend.main)
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return said.out + said.err + (str(code) if code else "")

    return run


def test_it_says_what_it_does_and_where_it_does_nothing(say: Callable[..., str]) -> None:
    assert "half-written" in say("--help")
    assert say("now").endswith("2")
    outside = say()
    assert ".dvc/: not found" in outside and "root of the repository" in outside and outside.endswith("1")
    mend.DVC.mkdir()
    assert say() == ""


@pytest.mark.parametrize(("path", "whole"), [(mend.RUNNING, "{}"), (mend.LOCK, "schema: '2.0'\nstages: {}\n")])
def test_what_a_working_dvc_is_just_writing_is_left_alone(say: Callable[..., str], path: Path, whole: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mend.DVC.mkdir(exist_ok=True)
    path.write_text("{" if path == mend.RUNNING else "")

    def write() -> None:
        time.sleep(mend.SECONDS_OF_A_WRITE / 3)
        path.write_text(whole)

    writer = threading.Thread(target=write)
    writer.start()
    said = say()
    writer.join()
    assert said == "" and path.read_text() == whole


@pytest.mark.parametrize("cut", ["", "schema: '2.0'\nstages:\n  a: {cmd", "stages: {a: 2026-13-45}\n"])
def test_a_lock_that_dvc_cannot_read_is_kept_beside(say: Callable[..., str], cut: str) -> None:
    mend.DVC.mkdir()
    mend.LOCK.write_text(cut)
    kept = mend.RUNNING.with_name("unreadable-dvc.lock")
    assert f"and is removed; what stood there is in {kept}" in say()
    assert not mend.LOCK.exists() and kept.read_text() == cut


def test_a_list_that_stays_cut_is_removed(say: Callable[..., str]) -> None:
    mend.RUNNING.parent.mkdir(parents=True)
    mend.RUNNING.write_text('{"write": {"/a')
    assert "rwlock was cut" in say()
    assert not mend.RUNNING.exists()
