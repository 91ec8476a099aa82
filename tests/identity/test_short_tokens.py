"""Tokens that live for seconds and an export that takes much longer: no failure, and few token requests."""

from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from dicom_depot.testing.samples import many_small
from tests.support.azurite import ACCOUNT_NAME, Azurite
from tests.support.identity_endpoint import IdentityEndpoint
from tests.support.service import export_body, run_command, running_service
from tests.support.slow_relay import SlowRelay

TOKEN_SECONDS = 5
_DELAY_SECONDS = 0.05
_CONCURRENCY = 2


@pytest.mark.parametrize(
    "seconds", [12, pytest.param(30, marks=pytest.mark.long)], ids=lambda seconds: f"{seconds} seconds"
)
def test_tokens_are_renewed_in_time_and_seldom(
    seconds: int,
    oauth_azurite: Azurite,
    surroundings: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    count = round(seconds * _CONCURRENCY / (2 * _DELAY_SECONDS))  # each is late on its way and on its way back
    contents = {}
    for sample in many_small(count):
        path = tmp_path / "archive" / sample.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.content)
        contents[str(sample.ref)] = sample.content
    run_command("import", str(tmp_path / "archive"), data_dir=tmp_path / "data")
    container = oauth_azurite.create_container()
    target_port = urlsplit(oauth_azurite.account_url).port
    assert target_port is not None
    with IdentityEndpoint() as endpoint, SlowRelay(target_port, _DELAY_SECONDS) as relay:
        endpoint.lifetime_seconds = TOKEN_SECONDS
        for name, value in endpoint.imds_variables().items():
            surroundings.setenv(name, value)
        account_url = f"https://127.0.0.1:{relay.port}/{ACCOUNT_NAME}"
        with running_service(
            tmp_path / "data", export_allowed_endpoints=account_url, export_concurrency=_CONCURRENCY
        ) as service:
            httpx.put(f"{service.url}/v2/identity", json={"status": "On"}, timeout=30).raise_for_status()
            asked_before = endpoint.request_count
            settings = {"blobContainerUri": f"{account_url}/{container}", "useManagedIdentity": True}
            began_at = time.monotonic()
            started = service.export(export_body({"type": "azureBlob", "settings": settings}))
            assert started.status_code == 202, started.text
            state = service.wait(started.json()["id"], seconds=10 * seconds)
            took = time.monotonic() - began_at
            asked = endpoint.request_count - asked_before
            log = service.log_path.read_text()
    with capsys.disabled():
        print(f"\n{count} instances in {took:.1f} s with tokens that live {TOKEN_SECONDS} s: {asked} token requests")
    assert (state["status"], state["results"]["exported"], state["results"]["skipped"]) == ("succeeded", count, 0)
    assert took >= seconds
    # Renewed when 40 % of the life are left: after 3 s. Lives are cut to whole seconds, so that 2 s can be all.
    assert asked <= took / 2 + 2
    assert "ERROR" not in log
    results = f"{started.json()['id']}/results"
    found = oauth_azurite.read_tree(container, f"{results}/")
    assert found == {f"{results}/{name}.dcm": content for name, content in contents.items()}
