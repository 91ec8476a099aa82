"""A blob endpoint that is nearly free: it answers uploads, at once or after a latency, and keeps nothing.

For benchmarks of the sending side, as a process of its own:
`python benchmarks/sink.py --port 0 [--latency-ms N]` prints its port on the first line and, when its stdin
closes or on SIGTERM, what it saw as a line of JSON. It checks nothing: the tests show what real servers do.
Linux only, because the kernel throws the bodies away.
"""

import argparse
import contextlib
import heapq
import itertools
import json
import mmap
import os
import select
import signal
import socket
import sys
import time

HEAD_BYTES_MAX = 64 * 1024
HEAD_READ_BYTES = 4096  # small, so that as little as possible of a body is copied along with its head
DISCARD_BYTES = 16 * 1024 * 1024
COMMON_HEADERS = (
    b'Content-Length: 0\r\nETag: "0x8DD000000000000"\r\nLast-Modified: Wed, 01 Jan 2025 00:00:00 GMT\r\n'
    b"x-ms-request-id: 00000000-0000-0000-0000-000000000000\r\nx-ms-version: 2021-08-06\r\n\r\n"
)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LENGTH_REQUIRED = b"HTTP/1.1 411 Length Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
ANSWERS = {
    b"PUT": b"HTTP/1.1 201 Created\r\n" + COMMON_HEADERS,
    b"DELETE": b"HTTP/1.1 202 Accepted\r\n" + COMMON_HEADERS,
}
ANSWER_OTHERWISE = b"HTTP/1.1 200 OK\r\n" + COMMON_HEADERS


class Connection:
    """Where one client is: within a head (`head` holds its start) or within a body of `body_left` bytes."""

    __slots__ = ("answer", "body_left", "head", "peer")

    def __init__(self, peer: socket.socket) -> None:
        self.peer = peer
        self.head = b""
        self.body_left = 0
        self.answer = b""


class Sink:
    """One thread, one epoll, no copies of bodies."""

    def __init__(self, port: int, latency_seconds: float) -> None:
        self.latency_seconds = latency_seconds
        self.request_count = 0
        self.body_bytes = 0
        self._listener = socket.create_server(("127.0.0.1", port), backlog=512)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._due: list[tuple[float, int, Connection, bytes]] = []
        self._due_numbers = itertools.count()
        # MSG_TRUNC makes TCP drop the bytes in the kernel: this memory is never touched, so it costs nothing.
        self._unused = mmap.mmap(-1, DISCARD_BYTES)

    def serve(self) -> None:
        """Until stdin closes."""
        listener, stdin = self._listener.fileno(), sys.stdin.fileno()
        self._epoll.register(listener, select.EPOLLIN)
        # A file or /dev/null cannot be watched, and its end would mean nothing: then SIGTERM ends us.
        with contextlib.suppress(PermissionError):
            self._epoll.register(stdin, select.EPOLLIN)
        while True:
            for number, _ in self._epoll.poll(self._seconds_to_next_answer()):
                connection = self._connections.get(number)
                if connection is not None:
                    self._read(connection)
                elif number == listener:
                    self._accept()
                elif number == stdin and not os.read(stdin, 4096):
                    return
            if self._due:
                self._send_due()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                peer, _ = self._listener.accept()
                peer.setblocking(False)
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections[peer.fileno()] = Connection(peer)
                self._epoll.register(peer.fileno(), select.EPOLLIN)

    def _close(self, connection: Connection) -> None:
        number = connection.peer.fileno()
        if number >= 0:
            del self._connections[number]
            connection.peer.close()  # epoll forgets a closed socket by itself

    def _read(self, connection: Connection) -> None:
        try:
            if connection.body_left == 0:
                piece = connection.peer.recv(HEAD_READ_BYTES)
                if not piece:
                    self._close(connection)
                    return
                self._take(connection, piece)
            # Most often the rest of the body is already there: no need to ask epoll again.
            while connection.body_left > 0:
                wanted = min(connection.body_left, DISCARD_BYTES)
                count = connection.peer.recv_into(self._unused, wanted, socket.MSG_TRUNC)
                if count == 0:
                    self._close(connection)
                    return
                connection.body_left -= count
                if connection.body_left == 0:
                    self._answer(connection, connection.answer)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)

    def _take(self, connection: Connection, piece: bytes) -> None:
        """Heads, and the bodies that came along with them: several requests when the client pipelines."""
        data = connection.head + piece
        while data:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > HEAD_BYTES_MAX:
                    raise OSError("a head without an end")
                break
            head = data[:end].lower()
            data = data[end + 4 :]
            start = head.find(b"\r\ncontent-length:")
            length = int(head[start + 17 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            if b"\r\ntransfer-encoding:" in head:
                connection.peer.send(LENGTH_REQUIRED)
                raise OSError("a body of unknown length")
            answer = ANSWERS.get(head[: head.index(b" ")].upper(), ANSWER_OTHERWISE)
            self.request_count += 1
            self.body_bytes += length
            if len(data) < length:
                if b"\r\nexpect: 100-continue" in head:
                    connection.peer.send(CONTINUE)
                connection.body_left = length - len(data)
                connection.answer = answer
                data = b""
            else:
                data = data[length:]
                self._answer(connection, answer)
        connection.head = data

    def _answer(self, connection: Connection, answer: bytes) -> None:
        if self.latency_seconds == 0:
            connection.peer.send(answer)
            return
        due_at = time.monotonic() + self.latency_seconds
        # The number keeps pipelined answers in order and keeps the heap from comparing connections.
        heapq.heappush(self._due, (due_at, next(self._due_numbers), connection, answer))

    def _seconds_to_next_answer(self) -> float | None:
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None

    def _send_due(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            _, _, connection, answer = heapq.heappop(self._due)
            try:
                connection.peer.send(answer)
            except OSError:
                self._close(connection)


def _end(_signal_number: int, _frame: object) -> None:
    raise SystemExit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    sink = Sink(arguments.port, arguments.latency_ms / 1000)
    print(sink.port, flush=True)
    try:
        sink.serve()
    finally:
        used = time.process_time()
        seen = {"requests": sink.request_count, "body_bytes": sink.body_bytes, "cpu_seconds": round(used, 3)}
        print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
