"""A running service with sign-in, its stand-in issuer, and clients of any role. No assertions live here."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from dicom_depot.testing import samples
from tests.support.fault_endpoint import FaultEndpoint, Respond, Rule
from tests.support.issuer import AUDIENCE, Issuer
from tests.support.service import RunningService, run_command, running_service

WAIT_SECONDS = 30.0


@dataclass(slots=True)
class Secured:
    """A service with a few stored instances that may export to folders and to the fault endpoint."""

    service: RunningService
    issuer: Issuer
    endpoint: FaultEndpoint
    export_root: Path
    identifiers: list[str]

    def client(self, *roles: str, sub: str = "alice", **arguments: Any) -> httpx.Client:
        """A client that is signed in; without roles it has a token that grants nothing."""
        token = self.issuer.token(sub=sub, roles=list(roles))
        return self.anonymous(headers={"Authorization": f"Bearer {token}"} | arguments.pop("headers", {}), **arguments)

    def anonymous(self, **arguments: Any) -> httpx.Client:
        # Without TLS there is nothing to verify, and a client that need not load certificates is made quickly.
        return httpx.Client(base_url=self.service.url, timeout=30, verify=False, trust_env=False, **arguments)  # noqa: S501

    def stuck(self, container: str) -> dict[str, Any]:
        """An export body whose operation stays active: the log can be written there, instances cannot."""
        self.endpoint.add_rule(
            Rule(Respond(503), method="PUT", blob="*/results/*", when=lambda attempt: attempt.container == container)
        )
        uri = self.endpoint.container_url(container)
        return {"destination": {"type": "azureBlob", "settings": {"blobContainerUri": uri}}}

    def audit(self) -> list[dict[str, Any]]:
        """The audit lines so far."""
        text = (self.service.data_dir / "audit.log").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def audit_of(self, request_id: str, event: str = "request") -> dict[str, Any]:
        """The line of one request, which may be written a moment after its answer."""
        return self.awaited(lambda line: line.get("requestId") == request_id and line["event"] == event)

    def awaited(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The only audit line that is wanted, once it is there."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            found = [line for line in self.audit() if wanted(line)]
            if found:
                [line] = found
                return line
            time.sleep(0.05)
        raise RuntimeError(f"the audit line did not come: {self.audit()[-5:]}")

    def wait(self, client: httpx.Client, operation_id: str) -> dict[str, Any]:
        """Poll an operation to its end."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            answer = client.get(f"/v2/operations/{operation_id}").raise_for_status()
            if answer.status_code == 200:
                return dict(answer.json())
            time.sleep(0.05)
        raise RuntimeError(f"operation {operation_id} did not end")


@contextlib.contextmanager
def open_secured(folder: Path, *, with_data: bool = True, **settings: object) -> Iterator[Secured]:
    """Import a few instances (unless told not to) and start the service with sign-in.

    `settings` come on top; one that is None is left out.
    """
    data_dir, export_root = folder / "data", folder / "export-root"
    export_root.mkdir(parents=True)
    made = list(samples.many_small(6, 1200, instances_per_series=2, series_per_study=1)) if with_data else []
    if made:
        files = folder / "files"
        files.mkdir()
        for number, sample in enumerate(made):
            (files / f"{number}.dcm").write_bytes(sample.content)
        run_command("import", str(files), data_dir=data_dir)
    with Issuer() as issuer, FaultEndpoint() as endpoint:
        given: dict[str, object] = {
            "auth_issuers": issuer.url,
            "auth_audiences": AUDIENCE,
            "export_root": export_root,
            "export_allowed_endpoints": endpoint.account_url,
        }
        given |= settings
        present = {name: value for name, value in given.items() if value is not None}
        with running_service(data_dir, **present) as service:
            yield Secured(service, issuer, endpoint, export_root, [str(sample.ref) for sample in made])


def folder_body(folder: str, *identifiers: str) -> dict[str, Any]:
    body: dict[str, Any] = {"destination": {"type": "file", "settings": {"folder": folder}}}
    if identifiers:
        body["source"] = {"type": "identifiers", "settings": {"values": list(identifiers)}}
    return body
