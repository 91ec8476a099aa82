"""No secret stays anywhere: databases and their journals, logs, answers, error logs and command lines are searched for
the secrets that were used, while exports run and after they ended, however they ended.
"""

from __future__ import annotations

import base64
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.support.azurite import Azurite
from tests.support.depot import Depot, Imported, azure, body, open_depot
from tests.support.fault_endpoint import Delay, FaultEndpoint, Respond, Rule


def distinctive() -> str:
    """A secret that occurs nowhere by chance, with characters that a URL must escape, as signatures have them."""
    return f"s3cr3t+{secrets.token_hex(12)}/{secrets.token_hex(4)}="


def forms_of(secret: str) -> set[bytes]:
    """How a secret may look where somebody wrote it down."""
    raw = secret.encode()
    forms = {raw, quote(secret).encode(), quote(secret, safe="").encode(), raw.hex().encode()}
    forms |= {quote(quote(secret, safe=""), safe="").encode(), secret.replace("/", "\\/").encode()}
    for shift in range(3):  # base64 of a longer text that holds it looks one of three ways; its ends depend on the rest
        encoded = base64.b64encode(b"\0" * shift + raw)
        forms.add(encoded[4 : len(encoded) - 4])
    return forms


@dataclass
class Search:
    """Remembers the secrets that were used and everything that was answered, and looks for the ones in the other."""

    depot: Depot
    keys: list[bytes]
    used: dict[str, str] = field(default_factory=dict)
    answers: list[bytes] = field(default_factory=list)

    def secret(self, name: str) -> str:
        self.used[name] = distinctive()
        return self.used[name]

    def remember(self, answer: httpx.Response) -> None:
        head = "\n".join(f"{name}: {value}" for name, value in answer.headers.items())
        self.answers.append(head.encode() + b"\n\n" + answer.read())

    def places(self) -> Iterator[tuple[str, bytes]]:
        service = self.depot.service
        assert service.process is not None
        for path in sorted(service.data_dir.rglob("*")):
            if path.is_file() and path.name != "secret.key":
                yield path.name, path.read_bytes()
        yield "the service's log", service.log_path.read_bytes()
        for number, answer in enumerate(self.answers):
            yield f"answer {number}", answer
        for name, stored in list(self.depot.endpoint.objects.items()):
            if name.endswith("errors.log"):
                yield name, stored.content
        for pid in (service.process.pid, *service.workers()):
            yield f"command line of {pid}", Path(f"/proc/{pid}/cmdline").read_bytes()

    def found(self) -> list[str]:
        """Which secret is in which place: nothing, it is hoped."""
        wanted = {name: forms_of(secret) for name, secret in self.used.items()}
        wanted["a sealing key"] = {
            form for key in self.keys for form in (key, base64.b64encode(key), key.hex().encode())
        }
        return [
            f"{name} is in {where}"
            for where, content in self.places()
            for name, forms in wanted.items()
            if any(form in content for form in forms)
        ]

    def sealed(self, operation_id: str) -> str | None:
        """The operation's sealed secret as the database has it."""
        with closing(sqlite3.connect(self.depot.service.data_dir / "depot.sqlite", timeout=30)) as database:
            row = database.execute("SELECT sealed_secret FROM operations WHERE id = ?", (operation_id,)).fetchone()
        value: str | None = row[0]
        return value

    def post(self, destination: dict[str, Any], *identifiers: str, key: str | None = None) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        return self.depot.client.post("/v2/export", json=body(destination, *identifiers), headers=headers)

    def started(self, destination: dict[str, Any], *identifiers: str, key: str | None = None) -> str:
        answer = self.post(destination, *identifiers, key=key)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def ended(self, operation_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            answer = self.depot.client.get(f"/v2/operations/{operation_id}")
            if answer.status_code == 200:
                return dict(answer.json())
            time.sleep(0.05)
        raise AssertionError(f"{operation_id} did not end")


@pytest.fixture(scope="module", params=["keys from the settings", "key file, Content-MD5"])
def search(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    imported: Imported,
    azurite: Azurite,
    endpoint: FaultEndpoint,
) -> Iterator[Search]:
    folder = tmp_path_factory.mktemp("secrets")
    given = [os.urandom(32), os.urandom(32)]
    settings: dict[str, object] = {"secret_keys": ",".join(base64.b64encode(key).decode() for key in given)}
    if request.param != "keys from the settings":
        settings = {"secret_keys": None, "export_content_md5": "true"}
    with open_depot(folder, imported, azurite, endpoint, log_level="DEBUG", **settings) as depot:
        file = depot.service.data_dir / "secret.key"
        keys = given
        if settings["secret_keys"] is None:
            assert file.stat().st_mode & 0o777 == 0o600
            keys = [base64.b64decode(file.read_bytes())]
        else:
            assert not file.exists()
        search = Search(depot, keys)
        depot.client.event_hooks = {"response": [search.remember]}
        yield search


def signed(depot: Depot, container: str, secret: str) -> dict[str, Any]:
    return azure(depot.endpoint.container_url(container, f"sv=2024-11-04&sp=cw&sig={quote(secret, safe='')}"))


def test_the_search_itself_finds_every_form() -> None:
    secret = distinctive()
    encoded = base64.b64encode(b"?sv=1&sig=" + secret.encode() + b"&sp=cw")
    for content in (secret.encode(), quote(secret, safe="").encode(), encoded, secret.encode().hex().encode()):
        assert any(form in b"before " + content + b" after" for form in forms_of(secret))


def test_an_export_that_succeeds(search: Search) -> None:
    depot = search.depot
    operation_id = search.started(signed(depot, "secrets-success", search.secret("success")), "1.2.3", "9.9")
    assert search.ended(operation_id)["status"] == "succeeded"
    assert search.sealed(operation_id) is None
    assert search.found() == []


def test_an_export_to_azurite_whose_signature_is_real(search: Search) -> None:
    name, destination = search.depot.container("cw")
    signature = destination["settings"]["blobContainerUri"].partition("sig=")[2].partition("&")[0]
    search.used["real signature"] = httpx.QueryParams(f"sig={signature}")["sig"]
    operation_id = search.started(destination, "1.2.3")
    assert search.ended(operation_id)["status"] == "succeeded"
    assert f"{operation_id}/errors.log" in search.depot.azurite.read_tree(name)
    assert search.found() == []


def test_an_export_with_an_emulators_account_key(search: Search) -> None:
    key = base64.b64encode(search.secret("account key").encode()).decode()
    search.used["encoded account key"] = key
    connection = f"AccountName=devstoreaccount1;AccountKey={key};BlobEndpoint={search.depot.endpoint.account_url}"
    settings = {"connectionString": connection, "blobContainerName": "secrets-key"}
    operation_id = search.started({"type": "azureBlob", "settings": settings}, "1.2.3")
    assert search.ended(operation_id)["status"] == "succeeded"
    assert search.sealed(operation_id) is None
    assert search.found() == []


def test_an_export_that_fails_midway(search: Search) -> None:
    secret = search.secret("failure")
    refusal = Respond(403, f"sig={secret}", {"x-ms-detail": f"sig={secret}"})
    container = f"secrets-failure-{secrets.token_hex(4)}"
    destination = signed(search.depot, container, secret)
    search.depot.faulty(container, Rule(refusal, "PUT", "*.dcm", when=lambda attempt: attempt.number > 3))
    operation_id = search.started(destination, *search.depot.instances)
    state = search.ended(operation_id)
    assert state["status"] == "failed"
    assert "403" in state["error"]["message"]
    assert search.sealed(operation_id) is None
    assert search.found() == []


def test_an_export_while_it_runs_and_when_it_is_canceled(search: Search) -> None:
    secret = search.secret("cancel")
    container = f"secrets-cancel-{secrets.token_hex(4)}"
    destination = signed(search.depot, container, secret)
    rule = Rule(Delay(12), "PUT", "*.dcm")
    search.depot.faulty(container, rule)
    operation_id = search.started(destination, "1.2.3", "9.9")
    deadline = time.monotonic() + 30
    while rule.acted_count == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert rule.acted_count
    sealed = search.sealed(operation_id)
    assert sealed is not None
    assert search.found() == []  # while it runs
    search.depot.client.post(f"/v2/operations/{operation_id}/cancel")
    assert search.ended(operation_id)["status"] == "canceled"
    assert search.sealed(operation_id) is None
    assert search.found() == []


def test_exports_that_are_refused(search: Search) -> None:
    depot, client = search.depot, search.depot.client
    container = f"secrets-refused-{secrets.token_hex(4)}"
    secret = search.secret("refused at the proof")
    depot.faulty(container, Rule(Respond(403, f"sig={secret}", {"x-ms-detail": secret}), "PUT"))
    assert search.post(signed(depot, container, secret), "1.2.3").status_code == 400
    url = f"https://example.com/c?sig={quote(search.secret('endpoint not allowed'), safe='')}"
    assert search.post(azure(url), "1.2.3").status_code == 400
    nowhere = f"https://nowhere-xyz.blob.core.windows.net/export?sig={quote(search.secret('no such host'), safe='')}"
    assert search.post(azure(nowhere), "1.2.3").status_code == 400
    refusing = f"{depot.bad.refusing}/export?sig={quote(search.secret('no connection'), safe='')}"
    assert search.post(azure(refusing), "1.2.3").status_code == 400
    user = f"https://user:{quote(search.secret('password'), safe='')}@x.blob.core.windows.net/export?sig=x"
    assert search.post(azure(user), "1.2.3").status_code == 400
    key = f"AccountName=prod;AccountKey={search.secret('refused key')}"
    for connection in (key, key + ";nonsense", f"{search.secret('not a connection string')}"):
        settings = {"connectionString": connection, "blobContainerName": "export"}
        assert search.post({"type": "azureBlob", "settings": settings}, "1.2.3").status_code == 400
    query = quote(search.secret("cut off body"), safe="")
    text = '{"destination": {"settings": {"blobContainerUri": "' + url + "&sig=" + query
    assert client.post("/v2/export", content=text, headers={"Content-Type": "application/json"}).status_code == 400
    assert client.post("/v2/export", content=text, headers={"Content-Type": "text/plain"}).status_code == 415
    assert search.post(azure(url, blobContainerUrl=url), "1.2.3").status_code == 400
    assert search.found() == []


def test_exports_that_are_repeated_under_a_key(search: Search) -> None:
    depot = search.depot
    key = secrets.token_hex(8)
    first = signed(depot, f"secrets-once-{key}", search.secret("first of two"))
    other = signed(depot, f"secrets-once-{key}", search.secret("other secret, same key"))
    operation_id = search.started(first, "1.2.3", key=key)
    assert search.started(first, "1.2.3", key=key) == operation_id
    assert search.post(other, "1.2.3", key=key).status_code == 422
    assert search.ended(operation_id)["status"] == "succeeded"
    assert search.started(first, "1.2.3", key=key) == operation_id
    assert search.sealed(operation_id) is None
    assert search.found() == []


def test_nothing_stays_after_all_of_it(search: Search) -> None:
    for path in ("/v1/operations?limit=200", "/v2/operations?limit=200", "/v2/api.json", "/health/check"):
        assert search.depot.client.get(path).status_code == 200
    with closing(sqlite3.connect(search.depot.service.data_dir / "depot.sqlite", timeout=30)) as database:
        [[kept]] = database.execute("SELECT count(*) FROM operations WHERE sealed_secret IS NOT NULL")
    assert kept == 0
    assert len(search.used) >= 14
    assert search.found() == []
    search.depot.service.stop()  # the journals are folded into the databases
    search.depot.service.start()
    assert search.found() == []
    assert "Traceback" not in search.depot.service.log_path.read_text()
