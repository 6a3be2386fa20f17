"""A port that passes everything on to a server and counts it; after so many bytes it can end that server."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Forwarder(socketserver.ThreadingTCPServer):
    """Between clients and a server on this machine.

    Attributes:
        sent: bytes that clients sent to the server.
        received: bytes that the server answered.
        cut_after: once more than so many bytes were sent, call `cut`; None: never.
        cut: ends the server.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.target = ("127.0.0.1", port)
        self.lock = threading.Lock()
        self.sent = self.received = 0
        self.cut_after: int | None = None
        self.cut: Callable[[], None] = lambda: None

    @property
    def port(self) -> int:
        return self.server_address[1]

    def count(self, sent: int = 0, received: int = 0) -> None:
        with self.lock:
            self.sent += sent
            self.received += received
            if self.cut_after is not None and self.sent > self.cut_after:
                self.cut_after = None
                self.cut()


class Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Forwarder)
        # A server that is gone: the client sees its connection close.
        with suppress(OSError), socket.create_connection(self.server.target) as server:
            # SFTP sends many small packets, each of which would wait for the last one's acknowledgement.
            for side in (self.request, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = threading.Thread(target=self.answer, args=(server,), daemon=True)
            answers.start()
            while data := self.request.recv(1 << 16):
                self.server.count(sent=len(data))
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)
            answers.join()

    def answer(self, server: socket.socket) -> None:
        assert isinstance(self.server, Forwarder)
        with suppress(OSError):
            while data := server.recv(1 << 16):
                self.server.count(received=len(data))
                self.request.sendall(data)
        with suppress(OSError):
            self.request.shutdown(socket.SHUT_RDWR)


@contextmanager
def forward(port: int) -> Iterator[Forwarder]:
    """A forwarder to a port of this machine, until the block ends."""
    with Forwarder(port) as forwarder:
        thread = threading.Thread(target=forwarder.serve_forever)
        thread.start()
        try:
            yield forwarder
        finally:
            forwarder.shutdown()
            thread.join()
