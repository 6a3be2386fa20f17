"""A running `serving.api` and what its log says; without pytest, so that benchmarks can use it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Server:
    """A service that was started on a free port."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log
        self.url = f"http://127.0.0.1:{self.wait_for('listening')['port']}"

    def log(self) -> list[dict[str, Any]]:
        """The lines of its log, each of which has to be JSON."""
        text = self._log.read_bytes().decode("ascii")
        try:
            return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        except ValueError:
            raise AssertionError(f"not JSON alone:\n{text}") from None

    def wait_for(self, event: str) -> dict[str, Any]:
        """The first line of its log about an event."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            found = [line for line in self.log() if line["event"] == event]
            if found:
                return found[0]
            assert self.process.poll() is None, self._log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"no {event!r} in a minute:\n{self._log.read_text()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Tell it to end; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def start_service(
    arguments: Sequence[str], log: Path, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """The service on a free port as a user starts it, its model loaded; it is ended when the block ends.

    Args:
        arguments: of the command.
        log: the file for its stderr.
        folder: where it runs; None: here.
        environment: its own; None: this process's.
    """
    command = [sys.executable, "-m", "serving.api", "--port", "0", *arguments]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=stderr)
    try:
        server = Server(process, log)
        server.wait_for("ready")
        yield server
    finally:
        process.kill()
        process.wait()
