"""Clients that send too much head, or too slowly, or nothing at all; with raw sockets."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.fault_endpoint import Hang, Rule
from tests.support.secured import Secured, open_secured

HEAD_SECONDS = 1.0
IDLE_SECONDS = 1.0
HEADER_BYTES = 8192
GRACE_SECONDS = 15.0
"""The machine may be slow, too; what matters is that an end comes, and not before its time."""


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with open_secured(
        tmp_path_factory.mktemp("hasty"),
        header_seconds=HEAD_SECONDS,
        body_idle_seconds=IDLE_SECONDS,
        max_header_bytes=HEADER_BYTES,
        with_data=False,
    ) as running:
        yield running


def _connect(hasty: Secured) -> socket.socket:
    return socket.create_connection(("127.0.0.1", hasty.service.port), timeout=HEAD_SECONDS + GRACE_SECONDS)


def _rest(connection: socket.socket) -> tuple[bytes, float]:
    """What still comes until the service ends the connection, and how long that took."""
    began_at = time.monotonic()
    content = b""
    try:
        while block := connection.recv(65536):
            content += block
    except ConnectionError:
        pass
    return content, time.monotonic() - began_at


def _post(*lines: str) -> bytes:
    given = ("POST /v2/export HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines)
    return "\r\n".join((*given, "", "")).encode()


def _signed_in(hasty: Secured) -> str:
    return f"Authorization: Bearer {hasty.issuer.token('exporter')}"


def _get(path: str, headers: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n".encode()


def test_a_connection_that_says_nothing_is_closed(hasty: Secured) -> None:
    with _connect(hasty) as connection:
        content, seconds = _rest(connection)
    assert content == b""
    assert seconds >= HEAD_SECONDS * 0.8


def test_a_head_that_trickles_is_cut_off(hasty: Secured) -> None:
    began_at = time.monotonic()
    with _connect(hasty) as connection:
        connection.sendall(b"GET /v2/operations HTTP/1.1\r\nHost: localhost\r\n")
        is_cut = False
        while not is_cut and time.monotonic() - began_at < GRACE_SECONDS:
            time.sleep(0.2)
            try:
                connection.sendall(b"X-Slow: slow\r\n")
            except ConnectionError:
                is_cut = True
    assert is_cut
    assert time.monotonic() - began_at >= HEAD_SECONDS * 0.8


def test_an_idle_connection_is_closed_after_its_answer(hasty: Secured) -> None:
    with _connect(hasty) as connection:
        connection.sendall(b"GET /health/check HTTP/1.1\r\nHost: localhost\r\n\r\n")
        content, seconds = _rest(connection)
    assert content.startswith(b"HTTP/1.1 200 ")
    assert seconds >= HEAD_SECONDS * 0.8


def test_a_body_that_stops_is_a_408(hasty: Secured) -> None:
    with _connect(hasty) as connection:
        connection.sendall(_post(_signed_in(hasty), "Content-Length: 1000") + b'{"destination"')
        content, seconds = _rest(connection)
    assert content.startswith(b"HTTP/1.1 408 ")
    assert b'"RequestTimeout"' in content
    assert b"connection: close" in content.lower()
    assert b"x-content-type-options: nosniff" in content
    assert seconds >= IDLE_SECONDS * 0.8


def test_a_body_in_chunks_that_stops_is_a_408(hasty: Secured) -> None:
    with _connect(hasty) as connection:
        connection.sendall(_post(_signed_in(hasty), "Transfer-Encoding: chunked") + b'2\r\n{"\r\n')
        assert _rest(connection)[0].startswith(b"HTTP/1.1 408 ")


def test_a_body_that_trickles_is_a_408_although_it_never_stops(hasty: Secured) -> None:
    """Each piece comes in time; altogether they come too slowly."""
    connection = _connect(hasty)
    with connection:
        connection.sendall(_post(_signed_in(hasty), "Content-Length: 100000"))
        began_at = time.monotonic()
        connection.settimeout(0.05)
        content = b""
        while time.monotonic() - began_at < GRACE_SECONDS and not content:
            time.sleep(IDLE_SECONDS / 4)
            try:
                connection.sendall(b" ")
                content = connection.recv(65536)
            except TimeoutError:
                continue
    assert content.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_comes_slowly_but_steadily_is_read(hasty: Secured) -> None:
    """4 KiB each half second for a while: longer than any one pause may be, and quick enough on average."""
    body = b" " * 4096 * 5 + b"{}"
    with _connect(hasty) as connection:
        connection.sendall(_post(_signed_in(hasty), f"Content-Length: {len(body)}", "Connection: close"))
        for start in range(0, len(body), 4096):
            connection.sendall(body[start : start + 4096])
            time.sleep(IDLE_SECONDS / 2)
        content, _ = _rest(connection)
    assert content.startswith(b"HTTP/1.1 400 ")
    assert b"destination" in content


def test_a_stranger_cannot_make_the_service_wait_for_a_body(hasty: Secured) -> None:
    """Who may not ask is answered before the body, and the connection does not stay."""
    with _connect(hasty) as connection:
        connection.sendall(_post("Content-Length: 1000"))
        content, _ = _rest(connection)
    assert content.startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    ("size", "count", "status"),
    [(HEADER_BYTES // 2, 1, 200), (HEADER_BYTES, 1, 431), (HEADER_BYTES * 3, 1, 431), (200, 60, 431), (10, 300, 431)],
)
def test_a_large_head_is_a_431(size: int, count: int, status: int, hasty: Secured) -> None:
    headers = "".join(f"X-{number}: {'x' * size}\r\n" for number in range(count))
    with _connect(hasty) as connection:
        connection.sendall(
            f"GET /health/check HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n".encode()
        )
        content, _ = _rest(connection)
    assert content.startswith(f"HTTP/1.1 {status} ".encode())


def test_a_long_path_counts_as_head(hasty: Secured) -> None:
    with _connect(hasty) as connection:
        connection.sendall(
            f"GET /{'x' * HEADER_BYTES} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        content, _ = _rest(connection)
    assert content.startswith(b"HTTP/1.1 431 ")
    assert b"HeadersTooLarge" in content


def test_many_silent_connections_do_not_keep_others_out(hasty: Secured) -> None:
    silent = [_connect(hasty) for _ in range(200)]
    try:
        with hasty.client("reader") as client:
            assert client.get("/v2/operations").status_code == 200
    finally:
        for connection in silent:
            connection.close()


@pytest.mark.parametrize(
    "request_",
    [
        b"garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\nBad Header\r\n\r\n",
        b"POST /v2/export HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v2/export HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v2/export HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v2/export HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"CONNECT evil.example.com:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_what_is_no_request_ends_the_connection_without_an_error_of_ours(request_: bytes, hasty: Secured) -> None:
    with _connect(hasty) as connection:
        connection.sendall(request_)
        content, _ = _rest(connection)
    assert not content or content.split()[1][:1] == b"4"


def test_two_ways_to_say_the_length_do_not_smuggle_a_second_request(hasty: Secured) -> None:
    inner = b"GET /health/check HTTP/1.1\r\nHost: localhost\r\n\r\n"
    request = _post("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n"
    with _connect(hasty) as connection:
        connection.sendall(request + inner)
        content, _ = _rest(connection)
    assert content.count(b"HTTP/1.1 ") == 1


def test_slow_destinations_do_not_hold_up_status_and_sign_in(hasty: Secured) -> None:
    """More exports at once than there are threads, all to a destination that does not answer."""
    hasty.endpoint.add_rule(
        Rule(Hang(8.0), method="PUT", blob="*/errors.log", when=lambda attempt: attempt.container == "silent")
    )
    body = {
        "destination": {
            "type": "azureBlob",
            "settings": {"blobContainerUri": hasty.endpoint.container_url("silent")},
        }
    }
    with hasty.client("exporter") as client, ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(client.post, "/v2/export", json=body, timeout=1) for _ in range(60)]
        time.sleep(0.5)
        with hasty.client("reader") as reader:
            began_at = time.monotonic()
            assert reader.get("/v2/operations").status_code == 200
            assert reader.get("/health/check").status_code == 200
            assert time.monotonic() - began_at < 5
        for each in waiting:
            each.exception()
