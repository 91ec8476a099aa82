"""A TCP proxy that passes on late what a client sends, so that an export to a fast local server lasts."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Self


class SlowProxy:
    """`with SlowProxy(port) as proxy:` listens on a free port of 127.0.0.1 and connects to `port` there.

    `seconds` may be changed at any time: how long each block from a client (with small objects: each request) waits.
    """

    def __init__(self, port: int, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._threads = threading.Thread(target=self._accept, daemon=True)
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        self._threads.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            for source, sink, is_slow in ((client, server, True), (server, client, False)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pump, args=(source, sink, is_slow), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_slow: bool) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(65536):
                if is_slow:
                    time.sleep(self.seconds)
                sink.sendall(block)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
