"""The fault endpoint, and the clients it is made for, obstore and azure-storage-blob; no product code."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import obstore
import pytest
from azure.core.exceptions import ResourceExistsError
from azure.storage.blob import ContainerClient
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    PermissionDeniedError,
    PreconditionError,
)
from obstore.store import AzureStore

from tests.support.fault_endpoint import (
    Action,
    Delay,
    FaultEndpoint,
    Hang,
    Reset,
    Respond,
    Rule,
)

SIGNATURE = "TopSecretSignature"


@pytest.fixture
def endpoint() -> Iterator[FaultEndpoint]:
    with FaultEndpoint() as running:
        yield running


def open_store(endpoint: FaultEndpoint, *, timeout: str = "5s", retries: int = 0) -> AzureStore:
    return AzureStore(
        "scans",
        account_name="account",
        endpoint=endpoint.account_url,
        sas_key=f"sv=2021-08-06&sp=cw&sig={SIGNATURE}",
        client_options={"allow_http": True, "timeout": timeout},
        retry_config={"max_retries": retries},
    )


def put(endpoint: FaultEndpoint, name: str = "a.dcm", content: bytes = b"content") -> None:
    obstore.put(open_store(endpoint), name, content, use_multipart=False)


def port_of(endpoint: FaultEndpoint) -> int:
    port = urlsplit(endpoint.account_url).port
    assert port is not None
    return port


def raw_connection(endpoint: FaultEndpoint) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(endpoint)), timeout=5)


def test_a_small_put_is_kept_with_its_type_and_metadata(endpoint: FaultEndpoint) -> None:
    store = open_store(endpoint)
    result = obstore.put(
        store,
        "study 1/ä.dcm",
        b"content",
        use_multipart=False,
        attributes={"Content-Type": "application/dicom", "digest": "abc"},
    )
    kept = endpoint.objects["scans/study 1/ä.dcm"]
    assert (kept.content, kept.content_type, kept.metadata) == (
        b"content",
        "application/dicom",
        {"digest": "abc"},
    )
    assert result["e_tag"] == kept.etag
    assert obstore.get(store, "study 1/ä.dcm").bytes() == b"content"
    assert endpoint.read_tree("scans", "study") == {"study 1/ä.dcm": b"content"}
    assert endpoint.read_tree("scan") == {}


def test_an_overwrite_replaces_the_content_and_counts(endpoint: FaultEndpoint) -> None:
    put(endpoint, content=b"first")
    first = endpoint.objects["scans/a.dcm"]
    put(endpoint, content=b"second")
    second = endpoint.objects["scans/a.dcm"]
    assert (second.content, second.put_count) == (b"second", 2)
    assert second.etag != first.etag


def test_a_generator_is_put_in_blocks_and_committed_once(endpoint: FaultEndpoint) -> None:
    pieces = [bytes([number]) * 1_000_000 for number in range(12)]
    obstore.put(open_store(endpoint), "big.dcm", iter(pieces), use_multipart=True)
    kept = endpoint.objects["scans/big.dcm"]
    assert kept.content == b"".join(pieces)
    assert kept.put_count == 1
    assert sum("blockid" in record.query_keys for record in endpoint.requests) == 3


def test_a_generator_that_raises_commits_nothing(endpoint: FaultEndpoint) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(12):
            yield b"x" * 1_000_000
        raise LookupError("the source went away")

    with pytest.raises(LookupError, match="the source went away"):
        obstore.put(open_store(endpoint), "big.dcm", pieces(), use_multipart=True)
    assert endpoint.objects == {}


def test_an_update_needs_the_current_etag(endpoint: FaultEndpoint) -> None:
    store = open_store(endpoint)
    put(endpoint, content=b"first")
    stale = endpoint.objects["scans/a.dcm"].etag
    obstore.put(store, "a.dcm", b"second", mode={"e_tag": stale}, use_multipart=False)
    with pytest.raises(PreconditionError):
        obstore.put(store, "a.dcm", b"third", mode={"e_tag": stale}, use_multipart=False)
    assert endpoint.objects["scans/a.dcm"].content == b"second"


def test_a_create_does_not_overwrite(endpoint: FaultEndpoint) -> None:
    store = open_store(endpoint)
    obstore.put(store, "a.dcm", b"first", mode="create", use_multipart=False)
    with pytest.raises(AlreadyExistsError, match="BlobAlreadyExists"):
        obstore.put(store, "a.dcm", b"second", mode="create", use_multipart=False)
    assert endpoint.objects["scans/a.dcm"].content == b"first"


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "InvalidHeaderValue", GenericError),
        (403, "AuthenticationFailed", PermissionDeniedError),
        (404, "ContainerNotFound", FileNotFoundError),
        (408, "RequestTimeout", GenericError),
        (409, "BlobImmutableDueToPolicy", AlreadyExistsError),
        (413, "RequestBodyTooLarge", GenericError),
        (429, "TooManyRequests", GenericError),
        (503, "ServerBusy", GenericError),
    ],
)
def test_an_error_answer_shows_its_code_and_hides_the_signature(
    endpoint: FaultEndpoint, status: int, code: str, error: type[Exception]
) -> None:
    endpoint.add_rule(Rule(Respond(status, code)))
    with pytest.raises(error, match=f"<Code>{code}</Code>") as raised:
        put(endpoint)
    assert type(raised.value) is error
    assert SIGNATURE not in str(raised.value) + repr(raised.value)
    assert endpoint.objects == {}
    assert [record.status for record in endpoint.requests] == [status]
    assert SIGNATURE not in repr(endpoint.requests)


@pytest.mark.parametrize("action", [Reset(), Reset(1_000_000), Reset(8_000_000)])
def test_a_reset_commits_nothing(endpoint: FaultEndpoint, action: Action) -> None:
    endpoint.add_rule(Rule(action))
    with pytest.raises(GenericError, match="kind: Interrupted"):
        put(endpoint, content=b"x" * 8_000_000)
    assert endpoint.objects == {}
    assert [record.status for record in endpoint.requests] == [None]


@pytest.mark.parametrize("action", [Respond(500, after_commit=True), Reset(after_commit=True)])
def test_a_late_failure_leaves_the_object_behind(endpoint: FaultEndpoint, action: Action) -> None:
    endpoint.add_rule(Rule(action))
    with pytest.raises(GenericError):
        put(endpoint)
    assert endpoint.objects["scans/a.dcm"].content == b"content"


def test_a_hang_ends_with_the_clients_patience(endpoint: FaultEndpoint) -> None:
    endpoint.add_rule(Rule(Hang()))
    started_at = time.monotonic()
    with pytest.raises(GenericError, match="kind: Timeout"):
        obstore.put(open_store(endpoint, timeout="300ms"), "a.dcm", b"content", use_multipart=False)
    assert time.monotonic() - started_at < 3
    assert [record.status for record in endpoint.requests] == [None]


def test_a_hang_does_not_hold_up_the_end_of_the_test() -> None:
    def put_in_vain(endpoint: FaultEndpoint) -> None:
        with contextlib.suppress(BaseError):
            put(endpoint)

    with FaultEndpoint() as endpoint:
        endpoint.add_rule(Rule(Hang()))
        waiting = threading.Thread(target=put_in_vain, args=[endpoint], daemon=True)
        waiting.start()
        while not endpoint.requests:
            time.sleep(0.01)
        started_at = time.monotonic()
    waiting.join(timeout=5)
    assert not waiting.is_alive()
    assert time.monotonic() - started_at < 3


def test_a_delay_ends_with_the_true_answer(endpoint: FaultEndpoint) -> None:
    endpoint.add_rule(Rule(Delay(0.2)))
    started_at = time.monotonic()
    put(endpoint)
    assert time.monotonic() - started_at >= 0.2
    assert endpoint.objects["scans/a.dcm"].content == b"content"


def test_a_rule_picks_by_method_name_number_and_time(endpoint: FaultEndpoint) -> None:
    endpoint.add_rule(Rule(Respond(503), method="HEAD"))
    endpoint.add_rule(Rule(Respond(503), blob="bad/*"))
    endpoint.add_rule(Rule(Respond(503), blob="third", when=lambda attempt: attempt.number == 3))
    endpoint.add_rule(Rule(Respond(503), blob="late", when=lambda attempt: attempt.seconds > 3_600))
    put(endpoint, "good")
    with pytest.raises(GenericError):
        put(endpoint, "bad/1")
    put(endpoint, "third")
    put(endpoint, "third")
    with pytest.raises(GenericError):
        put(endpoint, "third")
    put(endpoint, "third")
    put(endpoint, "late")
    assert endpoint.objects["scans/third"].put_count == 3


def test_a_rule_acts_a_number_of_times_and_can_be_switched(endpoint: FaultEndpoint) -> None:
    rule = endpoint.add_rule(Rule(Respond(503), times=2))
    obstore.put(open_store(endpoint, retries=2), "a.dcm", b"content", use_multipart=False)
    assert [record.status for record in endpoint.requests] == [503, 503, 201]
    rule.times = None
    with pytest.raises(GenericError):
        put(endpoint)
    rule.enabled = False
    put(endpoint)
    assert rule.acted_count == 3


def test_an_outage_goes_before_all_rules_and_ends(endpoint: FaultEndpoint) -> None:
    endpoint.add_rule(Rule(Respond(403), blob="refused"))
    with endpoint.outage(), pytest.raises(GenericError, match="ServerBusy"):
        put(endpoint, "refused")
    put(endpoint)
    endpoint.set_outage(True, Reset())
    with pytest.raises(GenericError, match="kind: Interrupted"):
        put(endpoint)
    endpoint.set_outage(False)
    put(endpoint)
    assert endpoint.objects["scans/a.dcm"].put_count == 2


def test_headers_of_a_fault_reach_the_client(endpoint: FaultEndpoint) -> None:
    endpoint.add_rule(Rule(Respond(503, headers={"Retry-After": "7"})))
    connection = http.client.HTTPConnection("127.0.0.1", port_of(endpoint))
    connection.request("GET", "/account/scans/a.dcm")
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("Retry-After")) == (503, "7")
    assert answer.getheader("x-ms-error-code") == "ServerBusy"
    connection.close()


def test_chunked_bodies_and_expect_continue_are_understood(endpoint: FaultEndpoint) -> None:
    head = b"PUT /account/scans/c HTTP/1.1\r\nHost: x\r\nx-ms-blob-type: BlockBlob\r\n"
    with raw_connection(endpoint) as connection:
        connection.sendall(head + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert connection.recv(1_000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n")
        assert connection.recv(1_000).startswith(b"HTTP/1.1 201 ")
        # The same connection goes on.
        connection.sendall(head + b"Content-Length: 2\r\n\r\nxy")
        assert connection.recv(1_000).startswith(b"HTTP/1.1 201 ")
    assert endpoint.objects["scans/c"].content == b"xy"
    assert endpoint.objects["scans/c"].put_count == 2


@pytest.mark.parametrize("start", [b"Content-Length: 9\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n9\r\nabc"])
def test_a_client_that_leaves_in_the_body_commits_nothing(endpoint: FaultEndpoint, start: bytes) -> None:
    head = b"PUT /account/scans/c HTTP/1.1\r\nHost: x\r\nx-ms-blob-type: BlockBlob\r\n"
    with raw_connection(endpoint) as connection:
        connection.sendall(head + start)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1_000) == b""
    assert endpoint.objects == {}


def test_obstore_deletes(endpoint: FaultEndpoint) -> None:
    put(endpoint, "gone")
    put(endpoint, "stays")
    obstore.delete(open_store(endpoint), "gone")
    assert endpoint.read_tree("scans") == {"stays": b"content"}
    with pytest.raises(FileNotFoundError, match="Object at location gone not found"):
        obstore.head(open_store(endpoint), "gone")


def test_the_azure_client_finds_uploads_reads_and_deletes(endpoint: FaultEndpoint) -> None:
    with ContainerClient.from_container_url(endpoint.container_url("scans"), retry_total=0) as client:
        assert client.exists()
        client.upload_blob("a.dcm", b"content")
        with pytest.raises(ResourceExistsError):
            client.upload_blob("a.dcm", b"other")
        assert client.download_blob("a.dcm").readall() == b"content"
        client.delete_blob("a.dcm")
        assert endpoint.objects == {}
        endpoint.add_rule(Rule(Respond(404, "ContainerNotFound")))
        assert not client.exists()
