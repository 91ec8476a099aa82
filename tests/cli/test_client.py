"""The client behind `export` and `operations`: lost answers, outages, polling. No network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from dicom_depot.cli import client as module
from dicom_depot.cli.client import (
    OUTAGE_SECONDS_MAX,
    OperationReport,
    RequestRefused,
    ServiceClient,
    ServiceUnreachable,
    service_url,
)
from dicom_depot.config import Settings
from dicom_depot.domain.errors import InvalidRequest

Answer = httpx.Response | Exception
RESET = httpx.ReadError("reset by peer")
REFUSED = httpx.ConnectError("[Errno 111] Connection refused")


def state(status: str, **headers: str) -> httpx.Response:
    body = {
        "operationId": "abc",
        "status": status,
        "createdTime": "2026-01-01T00:00:00.000000Z",
        "lastUpdatedTime": "2026-01-01T00:00:01.000000Z",
        "percentComplete": 0,
        "results": {"errorHref": "x/abc/errors.log", "exported": 0, "skipped": 0, "total": 0, "bytes": 0, "new": 1},
        "memberOfALaterRelease": True,
    }
    return httpx.Response(202, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Service:
    """Gives the answers in their order, and keeps the requests."""

    def __init__(self, *answers: Answer, then: Answer | None = None) -> None:
        self.requests: list[httpx.Request] = []
        self._answers: Iterator[Answer | None] = itertools.chain(answers, itertools.repeat(then))

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = next(self._answers)
        assert answer is not None, "one request more than expected"
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self, url: str = "http://127.0.0.1:8080") -> ServiceClient:
        return ServiceClient(url, httpx.MockTransport(self))


def watch(service: Service) -> tuple[list[str], list[str]]:
    """The statuses seen and the sentences said."""
    seen: list[OperationReport] = []
    said: list[str] = []
    service.client().watch("abc", seen.append, said.append)
    return [report.status for report in seen], said


def test_polling_keeps_to_retry_after(clock: Clock) -> None:
    service = Service(
        state("running", retry_after="5"),
        state("running", retry_after="86400"),
        state("running", retry_after="Fri, 31 Dec 1999 23:59:59 GMT"),
        state("succeeded"),
    )
    assert watch(service) == (["running", "running", "running", "succeeded"], [])
    assert clock.pauses == [5.0, 30.0, 1.0]


def test_a_short_outage_is_survived_and_told(clock: Clock) -> None:
    away = httpx.Response(503, json={"code": "StorageFull", "message": "full", "target": None})
    service = Service(state("running"), REFUSED, RESET, away, state("running"), REFUSED, state("succeeded"))
    statuses, said = watch(service)
    assert statuses == ["running", "running", "succeeded"]
    assert (
        said
        == [
            "http://127.0.0.1:8080 does not answer; trying again for 60 s.",
            "http://127.0.0.1:8080 answers again.",
        ]
        * 2
    )


def test_a_long_outage_ends_the_watch_but_says_that_the_operation_goes_on(clock: Clock) -> None:
    with pytest.raises(ServiceUnreachable) as caught:
        watch(Service(state("running"), then=REFUSED))
    assert OUTAGE_SECONDS_MAX <= clock.now <= OUTAGE_SECONDS_MAX + 5
    assert "dicom-depot operations watch abc" in caught.value.message


def test_a_start_whose_answer_was_lost_is_sent_again_with_the_same_key(clock: Clock) -> None:
    service = Service(RESET, RESET, httpx.Response(202, json={"id": "abc", "href": "http://host/v2/operations/abc"}))
    assert service.client().start({}) == ("abc", "http://host/v2/operations/abc")
    keys = {request.headers["Idempotency-Key"] for request in service.requests}
    assert len(service.requests) == 3
    assert len(keys) == 1


@pytest.mark.parametrize("failure", [REFUSED, RESET])
def test_a_start_gives_up_soon(clock: Clock, failure: Exception) -> None:
    service = Service(then=failure)
    with pytest.raises(ServiceUnreachable) as caught:
        service.client("http://user:password@127.0.0.1:8080/depot").start({})
    assert len(service.requests) <= 3
    assert "http://127.0.0.1:8080/depot" in caught.value.message
    assert "password" not in caught.value.message


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>a login page</html>"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={"status": "running"}),
        httpx.Response(302, headers={"Location": "https://login.example"}),
    ],
)
def test_an_answer_of_something_else_is_told_as_such(answer: httpx.Response) -> None:
    with pytest.raises(RequestRefused) as caught:
        Service(answer).client().get("abc")
    assert caught.value.code == "AnswerNotUnderstood"


def test_an_error_without_a_body_of_ours_is_told_by_its_status() -> None:
    with pytest.raises(RequestRefused) as caught:
        Service(httpx.Response(401, text="no")).client().get("abc")
    assert (caught.value.status, caught.value.code) == (401, "HttpError")


@pytest.mark.parametrize("operation_id", ["../../health/check", "a?b", "a/b", "a#b"])
def test_an_id_cannot_lead_to_another_path(operation_id: str) -> None:
    service = Service(then=httpx.Response(404, json={"code": "NotFound", "message": "", "target": None}))
    calls: list[Callable[[str], Any]] = [service.client().get, service.client().cancel]
    for call in calls:
        with pytest.raises(RequestRefused):
            call(operation_id)
    for request in service.requests:
        assert request.url.raw_path.startswith(b"/v2/operations/")
        assert request.url.raw_path.count(b"/") == (4 if request.method == "POST" else 3)
        assert not request.url.query


@pytest.mark.parametrize(
    "url", ["", "host:8080", "ftp://host", "http://", "http://host?x=1", "http://host/#x", "http://["]
)
def test_what_is_no_address_of_a_service_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        ServiceClient(url)


def test_a_token_goes_over_https_or_to_this_machine_only() -> None:
    service = Service(state("running"), state("running"))
    for url in ("https://depot.example", "http://127.0.0.1:8080"):
        ServiceClient(url, httpx.MockTransport(service), token="secret-token").get("abc")
    assert [request.headers["Authorization"] for request in service.requests] == ["Bearer secret-token"] * 2
    with pytest.raises(InvalidRequest, match="https"):
        ServiceClient("http://depot.example", token="secret-token")


@pytest.mark.parametrize("token", ["", " ", "se cret", "sec\r\nX: ret", "secret\u00e9", "Bearer secret", "=secret"])
def test_what_is_no_token_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(InvalidRequest, match="DICOM_DEPOT_TOKEN") as caught:
        ServiceClient("https://depot.example", token=token)
    assert "sec" not in caught.value.message
    assert "ret" not in caught.value.message


def test_the_line_end_of_a_token_from_a_file_does_not_count() -> None:
    service = Service(state("running"))
    ServiceClient("https://depot.example", httpx.MockTransport(service), token=" secret==\r\n").get("abc")
    assert service.requests[0].headers["Authorization"] == "Bearer secret=="


def test_what_the_http_library_refuses_to_send_is_not_shown(clock: Clock) -> None:
    with pytest.raises(ServiceUnreachable, match="LocalProtocolError") as caught:
        Service(then=httpx.LocalProtocolError("Illegal header value b'Bearer secret'")).client().get("abc")
    assert "secret" not in caught.value.message


def test_a_refused_token_is_explained() -> None:
    refusal = httpx.Response(401, json={"code": "Unauthenticated", "message": "The token has expired.", "target": None})
    with pytest.raises(RequestRefused, match=r"has expired. Put an access token .* into DICOM_DEPOT_TOKEN"):
        Service(refusal).client().get("abc")


def test_the_address_comes_from_the_settings_unless_given() -> None:
    assert service_url("http://given", Settings(port=1)) == "http://given"
    assert service_url(None, Settings(public_url="https://depot.example/dicom")) == "https://depot.example/dicom"
    assert service_url(None, Settings(port=81)) == "http://127.0.0.1:81"
    assert service_url(None, Settings(host="::", port=81)) == "http://[::1]:81"
    assert service_url(None, Settings(host="0.0.0.0", port=81)) == "http://127.0.0.1:81"
