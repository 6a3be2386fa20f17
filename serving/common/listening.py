"""The address that a server listens on."""

from __future__ import annotations

import errno
import ipaddress
import socket

from stages.common.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections; to be had before anything is loaded.

    Args:
        host: an address or name of this machine.
        port: 1 to 65535; 0: any that is free.

    Raises:
        UserError: the address is none of this machine's, or the port is none, taken or not allowed.
    """
    if port not in range(2**16):
        raise UserError(f"--port: {port} is no port. Give one from 1 to 65535, or 0 for any that is free.")
    try:
        [family, kind, protocol, _, address] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:  # the latter: a part of a name is empty or too long
        problem = error.strerror if isinstance(error, OSError) else "it cannot be a name"
        raise UserError(f"--host: {host!r} is no address ({problem}). Give one, such as 127.0.0.1.") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"--port: another program listens on port {port} of {host}. End it, or give another (0: any that is "
                "free)."
            ) from None
        raise UserError(
            f"--host, --port: nothing can listen on port {port} of {host!r} ({error.strerror}). Give an address of "
            "this machine, and a port from 1024 on."
        ) from None
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
