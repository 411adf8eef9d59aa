"""Messages over a socket: JSON with its length before it. Nothing is ever unpickled."""

import json
import socket
from typing import Any

LONGEST = 1 << 26  # bytes; what claims to be longer is not read


class Closed(Exception):
    """The other side has gone, or does not keep to the form."""


def send(connection: socket.socket, message: Any, files: list[int] | None = None) -> None:
    """Send a message, and with it open files."""
    data = json.dumps(message).encode()
    data = len(data).to_bytes(8, "big") + data
    try:
        if files:
            sent = socket.send_fds(connection, [data], files)
            data = data[sent:]
        connection.sendall(data)
    except OSError as error:
        raise Closed(str(error)) from error


def receive(connection: socket.socket, files: list[int] | None = None) -> Any:
    """The next message; open files that came with it are appended to `files`."""
    if files is None:
        head = _exactly(connection, 8)
    else:
        head, found, _, _ = socket.recv_fds(connection, 8, 8)
        files += found
        head += _exactly(connection, 8 - len(head)) if head else b""
    length = int.from_bytes(head, "big")
    if len(head) < 8 or length > LONGEST:
        raise Closed("no message")
    try:
        return json.loads(_exactly(connection, length))
    except (ValueError, RecursionError) as error:
        raise Closed("no message") from error


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        try:
            part = connection.recv(min(count - len(data), 1 << 20))
        except OSError as error:
            raise Closed(str(error)) from error
        if not part:
            raise Closed("closed")
        data += part
    return bytes(data)
