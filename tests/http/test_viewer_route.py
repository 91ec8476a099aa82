"""The viewer's files under /viewer/: what is served and how, what is not, and what is refused at the start."""

from __future__ import annotations

import http.client
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from dicom_depot.cli.serve_checks import check_viewer
from dicom_depot.config import Settings
from dicom_depot.domain.errors import ConfigurationError
from dicom_depot.web.access import rules
from dicom_depot.web.app import create_app
from tests.support.service import RunningService, run_command, running_service

INDEX = b'<!doctype html><script>window.PUBLIC_URL="/viewer/"</script><title>A viewer</title>'
SECRET = b"not for browsers"
FILES = {
    "index.html": INDEX,
    "app-config.js": b"window.config = 'what came with the build'",
    "app.bundle.0123456789abcdef.js": b"script()",
    "module.mjs": b"export {}",
    "app.bundle.css": b"body {}",
    "0123456789abcdef.wasm": b"\0asm",
    "assets/logo.svg": b"<svg/>",
    "assets/manifest.json": b"{}",
    "empty.js": b"",
    ".installed": SECRET,
    ".git/config.json": SECRET,
    "_headers": SECRET,
    "scan.dcm": SECRET,
    "secret.key": SECRET,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A viewer's folder, with files in it and beside it that must not be served."""
    outside = tmp_path_factory.mktemp("viewer")
    (outside / "secret.json").write_bytes(SECRET)
    folder = outside / "dist"
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "link.json").symlink_to(outside / "secret.json")
    (folder / "linked").symlink_to(outside)
    os.mkfifo(folder / "pipe.js")
    return folder


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running_service(tmp_path_factory.mktemp("service") / "data", viewer_dir=folder) as running:
        yield running


def _get(service: RunningService, path: str, **headers: str) -> httpx.Response:
    return httpx.get(f"{service.url}{path}", headers=headers, timeout=30)


def _get_as_written(service: RunningService, target: str) -> tuple[int, bytes]:
    """With a path that no client library would send without tidying it."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    try:
        connection.putrequest("GET", target, skip_host=False)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


# What is served


@pytest.mark.parametrize(
    ("name", "content_type"),
    [
        ("index.html", "text/html; charset=utf-8"),
        ("app.bundle.0123456789abcdef.js", "text/javascript; charset=utf-8"),
        ("module.mjs", "text/javascript; charset=utf-8"),
        ("empty.js", "text/javascript; charset=utf-8"),
        ("app.bundle.css", "text/css; charset=utf-8"),
        ("0123456789abcdef.wasm", "application/wasm"),
        ("assets/logo.svg", "image/svg+xml"),
        ("assets/manifest.json", "application/json"),
    ],
)
def test_a_file_is_served_with_its_type(service: RunningService, name: str, content_type: str) -> None:
    answer = _get(service, f"/viewer/{name}")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, content_type)
    assert answer.content == FILES[name]
    head = httpx.head(f"{service.url}/viewer/{name}", timeout=30)
    assert (head.status_code, head.headers["Content-Length"], head.content) == (200, str(len(FILES[name])), b"")


@pytest.mark.parametrize(
    "path", ["/viewer/", "/viewer/viewer?StudyInstanceUIDs=1.2.3", "/viewer/segmentation/", "/viewer/a/b"]
)
def test_a_page_of_the_viewer_is_its_first_file(service: RunningService, path: str) -> None:
    answer = _get(service, path)
    assert (answer.status_code, answer.content) == (200, INDEX)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"


def test_the_path_without_a_slash_leads_to_the_one_with_it(service: RunningService) -> None:
    for query in ("", "?StudyInstanceUIDs=1.2.3"):
        answer = _get(service, f"/viewer{query}")
        assert (answer.status_code, answer.headers["Location"]) == (308, f"viewer/{query}")
        assert str(answer.next_request and answer.next_request.url) == f"{service.url}/viewer/{query}"


def test_the_configuration_is_the_services_own(service: RunningService) -> None:
    answer = _get(service, "/viewer/app-config.js")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert 'new URL("../v2", document.currentScript.src)' in answer.text
    found = re.search(r"window\.config = (\{.*?^\});", answer.text, re.DOTALL | re.MULTILINE)
    assert found is not None
    (source,) = json.loads(found[1])["dataSources"]
    assert source["configuration"]["thumbnailRendering"] == "wadors"
    assert not re.search(r"https?://", answer.text), "it names no other server"


def test_answers_carry_headers_that_keep_the_browser_here(service: RunningService) -> None:
    for path in ("/viewer/", "/viewer/app-config.js", "/viewer/module.mjs", "/viewer/0123456789abcdef.wasm"):
        headers = _get(service, path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'self'"
        for directive, sources in policy.items():
            assert not re.search(r"https?:|\*", sources), f"{directive} lets the page reach other servers"
        assert policy["connect-src"] == "'self' data: blob:"
        assert policy["frame-ancestors"] == "'self'"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "SAMEORIGIN"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Cache-Control"] == "no-cache"


def test_other_answers_keep_their_headers(service: RunningService) -> None:
    answer = _get(service, "/health/check")
    assert answer.headers["Content-Security-Policy"] == "frame-src 'self';"
    assert answer.headers["Cache-Control"] == "no-store"


def test_an_unchanged_file_is_not_sent_again(service: RunningService, folder: Path) -> None:
    first = _get(service, "/viewer/app.bundle.css")
    again = _get(service, "/viewer/app.bundle.css", **{"If-None-Match": f'"other", W/{first.headers["ETag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["ETag"] == first.headers["ETag"]
    assert again.headers["Cache-Control"] == "no-cache"
    # Unpacked packages have one old date, and a new version may have the same size.
    path = folder / "app.bundle.css"
    before = path.stat()
    path.write_bytes(FILES["app.bundle.css"].swapcase())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    try:
        changed = _get(service, "/viewer/app.bundle.css", **{"If-None-Match": first.headers["ETag"]})
        assert (changed.status_code, changed.content) == (200, FILES["app.bundle.css"].swapcase())
        assert "Last-Modified" not in changed.headers
    finally:
        path.write_bytes(FILES["app.bundle.css"])


def test_a_part_of_a_file_can_be_asked_for(service: RunningService) -> None:
    answer = _get(service, "/viewer/0123456789abcdef.wasm", Range="bytes=1-2")
    assert (answer.status_code, answer.content) == (206, b"as")


# What is not


@pytest.mark.parametrize(
    "path",
    [
        "/viewer/nothing.js",
        "/viewer/assets/nothing.png",
        "/viewer/.installed",
        "/viewer/.git/config.json",
        "/viewer/scan.dcm",
        "/viewer/secret.key",
        "/viewer/link.json",
        "/viewer/linked/secret.json",
        "/viewer/pipe.js",
        "/viewer/../secret.json",
        "/viewer/assets/../../secret.json",
        "/viewer/%2e%2e/secret.json",
        "/viewer/..%2fsecret.json",
        "/viewer/..%5csecret.json",
        "/viewer//etc/mime.types",
        "/viewer/index.html%00.js",
        "/viewer/./index.html",
        "/viewer/INDEX.HTML",
    ],
)
def test_nothing_else_is_served(service: RunningService, path: str) -> None:
    status, content = _get_as_written(service, path)
    assert status == 404
    assert SECRET not in content
    assert json.loads(content)["code"] == "NotFound"


def test_a_path_without_a_type_never_leads_to_a_file(service: RunningService, folder: Path) -> None:
    for target in ("/viewer/_headers", "/viewer/..", f"/viewer/{folder}", "/viewer/%2e%2e/%2e%2e/etc/passwd"):
        status, content = _get_as_written(service, target)
        assert (status, content) == (200, INDEX) or status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_files_are_only_read(service: RunningService, method: str) -> None:
    assert httpx.request(method, f"{service.url}/viewer/index.html", timeout=30).status_code == 405


def test_a_file_that_goes_away_is_no_error_of_the_service(service: RunningService, folder: Path) -> None:
    path = folder / "empty.js"
    path.unlink()
    try:
        assert _get(service, "/viewer/empty.js").status_code == 404
        path.symlink_to(folder.parent / "secret.json")
        assert _get(service, "/viewer/empty.js").status_code == 404
    finally:
        path.unlink()
        path.write_bytes(b"")


def test_a_page_of_another_origin_does_not_reach_it_by_a_name_of_its_own(service: RunningService) -> None:
    assert _get(service, "/viewer/", Host="evil.example.org").status_code == 421


# Who may, and when at all


def test_it_is_open_to_everybody_and_off_by_default(folder: Path) -> None:
    without = list(rules(create_app(None, Settings())))  # type: ignore[arg-type]  # it is never opened
    assert not [rule for rule in without if "viewer" in rule.path]
    of_viewer = set(rules(create_app(None, Settings(viewer_dir=folder)))) - set(without)  # type: ignore[arg-type]
    assert {(rule.method, rule.path, rule.action) for rule in of_viewer} == {
        ("GET", "/viewer", None),
        ("GET", "/viewer/{path:path}", None),
    }


def test_it_is_not_in_the_api_document(folder: Path) -> None:
    document = create_app(None, Settings(viewer_dir=folder)).openapi()  # type: ignore[arg-type]  # it is never opened
    assert not [path for path in document["paths"] if "viewer" in path]


# What is refused at the start


def test_a_build_for_this_path_is_taken(folder: Path) -> None:
    check_viewer(Settings())
    check_viewer(Settings(viewer_dir=folder))


@pytest.mark.parametrize(
    ("index", "public_url", "said"),
    [
        (None, None, "index.html cannot be read: No such file"),
        (b"<title>Something else</title>", None, "is no page of OHIF"),
        (b'<script>window.PUBLIC_URL="/"</script>', None, "expects to be served under /."),
        (INDEX, "https://depot.example.org/imaging", "PUBLIC_URL=/imaging/viewer/"),
    ],
)
def test_a_folder_without_a_build_for_this_path_is_refused(
    index: bytes | None, public_url: str | None, said: str, tmp_path: Path
) -> None:
    if index is not None:
        (tmp_path / "index.html").write_bytes(index)
    with pytest.raises(ConfigurationError, match=re.escape(said)) as refused:
        check_viewer(Settings(viewer_dir=tmp_path, public_url=public_url))
    assert "DICOM_DEPOT_VIEWER_DIR" in refused.value.message
    if index is None:
        done = run_command("serve", data_dir=tmp_path / "other" / "data", check=False, viewer_dir=tmp_path)
        assert done.returncode != 0
        assert "DICOM_DEPOT_VIEWER_DIR" in done.stderr


def test_a_build_for_the_path_of_the_public_url_is_taken(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_bytes(INDEX.replace(b"/viewer/", b"/imaging/viewer/"))
    check_viewer(Settings(viewer_dir=tmp_path, public_url="https://depot.example.org/imaging"))


@pytest.mark.parametrize("name", ["data_dir", "export_root"])
@pytest.mark.parametrize("inside", ["viewer", "other"])
def test_a_folder_that_overlaps_with_the_services_own_is_refused(tmp_path: Path, name: str, inside: str) -> None:
    settings: dict[str, Any] = {"data_dir": tmp_path / "data", "viewer_dir": tmp_path / "viewer"}
    settings[name] = tmp_path / "other"
    if inside == "viewer":
        settings["viewer_dir"] = settings[name] / "dist"
    else:
        settings[name] = settings["viewer_dir"] / "below"
    with pytest.raises(ValidationError, match="must lie apart"):
        Settings(**settings)
