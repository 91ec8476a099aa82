"""A port where nobody may knock: it takes every connection and keeps what was sent to it."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self


class Listener:
    """`with Listener() as listener:` listens on a free port of 127.0.0.1 and of ::1, where there is one."""

    def __init__(self) -> None:
        self.connections: list[bytes] = []
        """The first bytes of each connection."""
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        with contextlib.suppress(OSError):
            self._sockets.append(socket.create_server(("::1", self.port), family=socket.AF_INET6))

    def __enter__(self) -> Self:
        for each in self._sockets:
            threading.Thread(target=self._accept, args=(each,), name="listener", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    @property
    def port(self) -> int:
        return int(self._sockets[0].getsockname()[1])

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(1)
                    self.connections.append(b"")
                    self.connections[-1] = connection.recv(65536)
