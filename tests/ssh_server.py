"""OpenSSH's real `sshd` on a port of this machine, for the user that runs the tests, with keys of its own."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import create_connection

import psutil

from tests.s3_server import free_ports

# Not on the PATH of ordinary users.
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
SECONDS_TO_START = 20.0


class SshServer:
    """A server that can be killed, with the connections it has, and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.user = getpass.getuser()
        [self.port] = free_ports(1)
        (folder / "storage").mkdir(parents=True)
        for name in ("host_key", "user_key", "strange_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        settings = {
            "ListenAddress": "127.0.0.1",
            "Port": self.port,
            "HostKey": folder / "host_key",
            "AuthorizedKeysFile": folder / "authorized_keys",
            "PidFile": "none",
            "UsePAM": "no",
            # Folders of tests belong to a folder that everybody may write to.
            "StrictModes": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "Subsystem": "sftp internal-sftp",
        }
        (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"ssh://127.0.0.1:{self.port}{self.folder / 'storage'}"

    def start(self) -> None:
        """Start it and wait until it listens."""
        assert SSHD is not None
        if os.geteuid() == 0:
            # Debian's service makes it at boot; as root sshd refuses to start without it.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        with (self.folder / "log.txt").open("ab") as log:
            command = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + SECONDS_TO_START
        while True:
            assert self.process.poll() is None, (self.folder / "log.txt").read_text()
            with suppress(OSError):
                create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            assert time.monotonic() < end
            time.sleep(0.05)

    def kill(self) -> None:
        """End it and what serves its connections, which leaves the server's process group."""
        if self.process is not None:
            served = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
            for process in served:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process = None


@contextmanager
def serve_ssh(folder: Path) -> Iterator[SshServer]:
    """A server until the block ends."""
    server = SshServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()
