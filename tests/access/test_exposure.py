"""Who reaches the service at all: addresses, hosts, web pages, TLS, proxies."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dicom_depot.cli.serve_checks import check_exposure, check_tls, is_loopback, resolve_host
from dicom_depot.config import Settings
from dicom_depot.domain.errors import ConfigurationError
from tests.support.certificates import make_certificate
from tests.support.secured import Secured, folder_body
from tests.support.service import RunningService, export_body, file_destination, free_port, run_command, running_service

HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "content-security-policy": "frame-src 'self';",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
PUBLIC_NAME = "depot.example.org"


@pytest.fixture(scope="module")
def anonymous(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """Without sign-in, on the loopback address, with a public name and one allowed web page."""
    folder = tmp_path_factory.mktemp("anonymous")
    (folder / "out").mkdir()
    with running_service(
        folder / "data",
        export_root=folder / "out",
        public_url=f"https://{PUBLIC_NAME}/imaging",
        cors_origins="https://viewer.example.org",
    ) as running:
        yield running


def test_without_sign_in_no_other_address_than_loopback_is_served(tmp_path: Path) -> None:
    done = run_command("serve", "--host", "0.0.0.0", data_dir=tmp_path / "data", check=False, port=free_port())
    assert done.returncode == 4
    said = done.stderr.replace("\n", " ")
    assert "0.0.0.0" in said
    assert "--allow-anonymous" in said
    assert "DICOM_DEPOT_AUTH_ISSUERS" in said
    assert not (tmp_path / "data").exists(), "nothing was begun"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("::ffff:192.0.2.1", False),
        ("10.0.0.1", False),
        ("0", False),
        ("", False),
        ("no-such-host.invalid", False),
    ],
)
def test_loopback_is_told_from_other_addresses(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
    if host:
        with contextlib.nullcontext() if expected else pytest.raises(ConfigurationError):
            check_exposure(Settings(host=host))


def test_a_name_is_resolved_once_or_refused() -> None:
    assert resolve_host("127.8.9.10") == "127.8.9.10"
    assert resolve_host("::1") == "::1"
    assert resolve_host("localhost") in ("127.0.0.1", "::1")
    with pytest.raises(ConfigurationError, match="DICOM_DEPOT_HOST: the name no-such-host"):
        resolve_host("no-such-host.invalid")
    with pytest.raises(ConfigurationError, match="--allow-anonymous"):
        check_exposure(Settings(host="localhost"), "192.0.2.1")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2"])
def test_other_ways_to_name_this_machine_are_served(host: str, tmp_path: Path) -> None:
    service = NamedService(tmp_path / "data", {"host": host})
    service.start()
    try:
        assert httpx.get(f"{service.url}/v2/operations").status_code == 200
        assert httpx.get(f"{service.url}/v2/operations", headers={"Host": "evil.example.com"}).status_code == 421
    finally:
        service.stop()


class NamedService(RunningService):
    """`serve`, asked under the host that it was told to listen on."""

    @property
    def url(self) -> str:
        return f"http://{self.settings['host']}:{self.port}"


def test_told_so_the_service_is_open_to_everybody(tmp_path: Path) -> None:
    service = RunningService(tmp_path / "data", {"host": "0.0.0.0", "allow_anonymous": "true"})
    service.start()
    try:
        answer = httpx.get(f"{service.url}/v2/operations", headers={"Host": "depot.internal:8080"})
        assert answer.status_code == 200
    finally:
        service.stop()


def test_with_sign_in_any_address_may_be_served_under_any_name(tuned: Secured) -> None:
    with tuned.client("radiologist") as client:
        assert client.get("/v2/operations", headers={"Host": "depot.internal"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("localhost", True),
        ("localhost:8080", True),
        ("LOCALHOST:1", True),
        ("127.0.0.1", True),
        ("127.0.0.1:65535", True),
        ("[::1]", True),
        ("[::1]:8080", True),
        (PUBLIC_NAME, True),
        (f"{PUBLIC_NAME}:443", True),
        ("evil.example.com", False),
        ("evil.example.com:8080", False),
        ("localhost.evil.example.com", False),
        ("localhost.", False),
        ("evil-localhost", False),
        ("127.0.0.1.evil.example.com", False),
        ("127.0.0.1.nip.io", False),
        ("127.0.0.2", False),
        ("0.0.0.0", False),
        ("2130706433", False),
        ("[::ffff:127.0.0.1]", False),
        ("[::]", False),
        ("localhost@evil.example.com", False),
        ("localhost/evil", False),
        ("localhost:80:80", False),
        ("localhost, evil.example.com", False),
        (f"x.{PUBLIC_NAME}", False),
        ("", False),
    ],
)
def test_without_sign_in_only_our_own_names_are_answered_to(
    host: str, is_ours: bool, anonymous: RunningService
) -> None:
    answer = _raw(anonymous, f"GET /v2/operations HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
    if is_ours:
        assert answer.startswith("HTTP/1.1 200 ")
    else:
        assert re.match(r"HTTP/1.1 (421|400) ", answer)
        assert "operations" not in answer.partition("\r\n\r\n")[2]


def test_a_request_without_a_host_or_with_two_is_refused(anonymous: RunningService) -> None:
    assert _raw(anonymous, "GET /v2/operations HTTP/1.0\r\n\r\n").split()[1] == "421"
    two = "GET /v2/operations HTTP/1.1\r\nHost: localhost\r\nHost: evil.example.com\r\nConnection: close\r\n\r\n"
    assert _raw(anonymous, two).split()[1] == "400"


@pytest.mark.parametrize(
    ("headers", "may"),
    [
        ({}, True),
        ({"Origin": "http://127.0.0.1:PORT"}, True),
        ({"Origin": f"https://{PUBLIC_NAME}"}, True),
        ({"Origin": "https://viewer.example.org"}, True),
        ({"Origin": "https://evil.example.com"}, False),
        ({"Origin": "http://127.0.0.1:1"}, False),
        ({"Origin": "https://127.0.0.1:PORT"}, False),
        ({"Origin": "http://localhost:PORT"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": ""}, False),
        ({"Origin": "https://viewer.example.org.evil.example.com"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
    ],
)
def test_without_sign_in_pages_of_other_origins_change_nothing(
    headers: dict[str, str], may: bool, anonymous: RunningService
) -> None:
    given = {name: value.replace("PORT", str(anonymous.port)) for name, value in headers.items()}
    answer = anonymous.export(export_body(file_destination("origins")), headers=given)
    assert answer.status_code == (202 if may else 403)
    if not may:
        assert answer.json()["code"] == "OriginNotAllowed"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_form_can_send_is_not_taken_for_json(content_type: str, anonymous: RunningService) -> None:
    answer = httpx.post(
        f"{anonymous.url}/v2/export", content=b'{"destination": {}}', headers={"Content-Type": content_type}
    )
    assert answer.status_code == 415


def test_cors_allows_the_listed_origins_and_no_others(anonymous: RunningService, secured: Secured) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}

    def preflight(url: str, origin: str) -> httpx.Response:
        return httpx.options(f"{url}/v2/export", headers={"Origin": origin, **asked})

    allowed = preflight(anonymous.url, "https://viewer.example.org")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://viewer.example.org"
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    for url, origin in (
        (anonymous.url, "https://evil.example.com"),
        (secured.service.url, "https://viewer.example.org"),
    ):
        refused = preflight(url, origin)
        assert refused.status_code >= 400
        assert "access-control-allow-origin" not in refused.headers
        read = httpx.get(f"{url}/v2/operations", headers={"Origin": origin})
        assert "access-control-allow-origin" not in read.headers
    read = httpx.get(f"{anonymous.url}/v2/operations", headers={"Origin": "https://viewer.example.org"})
    assert read.headers["access-control-allow-origin"] == "https://viewer.example.org"
    assert "access-control-allow-credentials" not in read.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health/check", 200),
        ("GET", "/v2/operations", 401),
        ("GET", "/nothing", 404),
        ("DELETE", "/health/check", 405),
        ("GET", "/v7/export", 400),
    ],
)
def test_every_answer_carries_the_security_headers(method: str, path: str, status: int, secured: Secured) -> None:
    with secured.anonymous() as client:
        answer = client.request(method, path)
    assert answer.status_code == status
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert "strict-transport-security" not in answer.headers
    assert answer.headers["x-request-id"]


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_tls_is_served_with_modern_versions_only(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    service = TlsService(tmp_path / "data", {"tls_cert": certificate, "tls_key": key}, certificate=certificate)
    service.start()
    try:
        with httpx.Client(verify=ssl.create_default_context(cafile=str(certificate))) as client:
            answer = client.get(f"{service.url}/v2/operations")
            assert answer.status_code == 200
            assert answer.headers["strict-transport-security"] == "max-age=31536000"
            refused = client.get(f"{service.url}/v2/operations", headers={"Host": "evil.example.com"})
            assert refused.status_code == 421
            assert refused.headers["strict-transport-security"]
            with pytest.raises(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{service.port}/health/check")
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            assert _tls_version(service.port, certificate, version) == version.name.replace("_", ".")
        assert _tls_version(service.port, certificate, ssl.TLSVersion.TLSv1_1) is None
    finally:
        service.stop()


class TlsService(RunningService):
    """`serve` with TLS; it is up when a client that trusts its certificate gets an answer."""

    def __init__(self, data_dir: Path, settings: dict[str, object], *, certificate: Path) -> None:
        super().__init__(data_dir, settings)
        self.verify = ssl.create_default_context(cafile=str(certificate))

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"


def _tls_version(port: int, certificate: Path, version: ssl.TLSVersion) -> str | None:
    context = ssl.create_default_context(cafile=str(certificate))
    context.minimum_version = ssl.TLSVersion.TLSv1_2 if version.name > "TLSv1_1" else version
    context.maximum_version = version
    with socket.create_connection(("127.0.0.1", port)) as connection:
        try:
            with context.wrap_socket(connection, server_hostname="localhost") as wrapped:
                return wrapped.version()
        except (ssl.SSLError, ConnectionError):
            return None


@pytest.mark.parametrize("case", ["missing", "swapped", "of another", "garbage", "password"])
def test_tls_files_that_do_not_work_are_refused_at_the_start(case: str, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    match case:
        case "missing":
            key = tmp_path / "missing.key"
        case "swapped":
            certificate, key = key, certificate
        case "of another":
            key = make_certificate(tmp_path, "other")[1]
        case "garbage":
            certificate.write_bytes(b"\x00garbage")
        case _:
            certificate, key = make_certificate(tmp_path, "locked", b"password")
    with pytest.raises(ConfigurationError, match="DICOM_DEPOT_TLS_"):
        check_tls(Settings(tls_cert=certificate, tls_key=key))


def test_the_service_does_not_start_with_tls_files_that_do_not_work(tmp_path: Path) -> None:
    certificate, _ = make_certificate(tmp_path)
    done = run_command("serve", data_dir=tmp_path / "data", check=False, tls_cert=certificate, tls_key=certificate)
    assert done.returncode == 4
    assert "DICOM_DEPOT_TLS_KEY" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        (["203.0.113.7"], "203.0.113.7"),
        (["203.0.113.7:4711"], "203.0.113.7"),
        (["[2001:db8::7]:4711"], "2001:db8::7"),
        (["2001:db8::7"], "2001:db8::7"),
        (["::ffff:203.0.113.7"], "203.0.113.7"),
        (["198.51.100.1, 203.0.113.7"], "203.0.113.7"),
        (["198.51.100.1, 203.0.113.7, 192.0.2.9"], "203.0.113.7"),
        (["198.51.100.1", "203.0.113.7"], "203.0.113.7"),
        (["192.0.2.8, 192.0.2.9"], "192.0.2.8"),
        (["203.0.113.7, garbage"], "127.0.0.1"),
        (["garbage, 192.0.2.9"], "192.0.2.9"),
        ([""], "127.0.0.1"),
        (["x" * 5000], "127.0.0.1"),
    ],
)
def test_the_address_is_the_last_one_that_no_trusted_proxy_stands_for(
    forwarded: list[str], address: str, tuned: Secured
) -> None:
    with tuned.client("radiologist") as client:
        headers = [*client.headers.items(), *(("X-Forwarded-For", value) for value in forwarded)]
        answer = httpx.get(f"{tuned.service.url}/v2/operations", headers=headers)
    assert answer.status_code == 200
    assert tuned.audit_of(answer.headers["x-request-id"])["address"] == address


@pytest.mark.parametrize(
    ("proto", "scheme"),
    [("https", "https"), ("HTTPS", "https"), ("http", "http"), ("http, https", "https"), ("ftp", "http")],
)
def test_the_scheme_is_the_one_that_the_proxy_was_asked_with(proto: str, scheme: str, tuned: Secured) -> None:
    with tuned.client("exporter", headers={"X-Forwarded-Proto": proto, "Host": PUBLIC_NAME}, sub=proto) as client:
        answer = client.post("/v2/export", json=folder_body("proxied"))
    assert answer.json()["href"].startswith(f"{scheme}://{PUBLIC_NAME}")
    assert ("strict-transport-security" in answer.headers) is (scheme == "https")


def test_what_others_say_of_addresses_is_not_believed(secured: Secured) -> None:
    forged = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example.com"}
    with secured.client("exporter", headers=forged) as client:
        answer = client.post("/v2/export", json=folder_body("forged"))
    assert answer.json()["href"].startswith(secured.service.url)
    assert "strict-transport-security" not in answer.headers
    assert secured.audit_of(answer.headers["x-request-id"])["address"] == "127.0.0.1"


def _raw(service: RunningService, request: str) -> str:
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(request.encode())
        answer = b""
        while block := connection.recv(65536):
            answer += block
    return answer.decode()
