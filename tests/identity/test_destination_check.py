"""The check of a destination tells, step by step, what an export would meet; with a SAS, and for a folder."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from dicom_depot.adapters.destination_guard import DestinationGuard
from dicom_depot.adapters.destinations import Destinations
from dicom_depot.export.destination_check import DestinationCheck, Step, StepOutcome, check_destination
from dicom_depot.testing.identity import FixedIdentity
from tests.support.azurite import Azurite
from tests.support.fault_endpoint import FaultEndpoint, Respond, Rule

_MARKS = {StepOutcome.PASSED: "+", StepOutcome.FAILED: "x", StepOutcome.NOT_TRIED: "."}


def outcomes(check: DestinationCheck) -> str:
    """A mark for each step: + passed, x failed, . not tried."""
    assert [result.step for result in check.steps] == list(Step)
    return "".join(_MARKS[result.outcome] for result in check.steps)


def check(endpoint: str, uri: str) -> DestinationCheck:
    destinations = _destinations(endpoint)
    return check_destination(destinations, destinations.parse("azureBlob", {"blobContainerUri": uri}))


def _destinations(endpoint: str, export_root: Path | None = None) -> Destinations:
    return Destinations(
        export_root=export_root,
        guard=DestinationGuard((endpoint,), ()),
        allow_anonymous=False,
        request_seconds=5,
        content_md5=False,
        identity=FixedIdentity(),
    )


@pytest.mark.parametrize(
    ("permissions", "expected", "is_ok"),
    [("cwd", "++++++", True), ("cw", "+++++x", True), ("c", "++++xx", False), ("r", "++.x..", False)],
)
def test_what_a_sas_allows(azurite: Azurite, permissions: str, expected: str, is_ok: bool) -> None:
    container = azurite.create_container()
    checked = check(
        azurite.account_url, azurite.container_url(container, azurite.container_sas(container, permissions))
    )
    assert (outcomes(checked), checked.is_ok) == (expected, is_ok)
    assert (checked.remedy is None) == is_ok
    left = list(azurite.read_tree(container))
    assert len(left) == (permissions in ("cw", "c"))
    assert all(key in checked.steps[-1].message for key in left)


def test_an_expired_sas_and_a_missing_container(azurite: Azurite) -> None:
    container = azurite.create_container()
    sas = azurite.container_sas(container, "cwd", expires_in=timedelta(hours=-1))
    checked = check(azurite.account_url, azurite.container_url(container, sas))
    assert not checked.is_ok
    assert "make a new one" in str(checked.remedy)
    missing = check(azurite.account_url, azurite.container_url("not-there", azurite.container_sas("not-there", "cwd")))
    assert (outcomes(missing), missing.remedy) == ("++x...", "Create it, or correct its name.")


def test_an_endpoint_that_does_not_answer_or_is_out_of_order() -> None:
    nobody = "http://127.0.0.1:1/account"
    checked = check(nobody, f"{nobody}/export?sv=1&sig=x")
    assert outcomes(checked) == "x....."
    assert "network" in str(checked.remedy)
    with FaultEndpoint() as endpoint:
        endpoint.add_rule(Rule(Respond(503, after_commit=True), method="PUT"))
        endpoint.add_rule(Rule(Respond(403, "AuthorizationPermissionMismatch"), method="DELETE"))
        checked = check(endpoint.account_url, endpoint.container_url("export"))
        assert outcomes(checked) == "x....."
        assert "was left behind" in checked.steps[-1].message
        assert len(endpoint.objects) == 1


def test_a_folder(tmp_path: Path) -> None:
    destinations = _destinations("http://127.0.0.1:1/account", tmp_path)
    checked = check_destination(destinations, destinations.parse("file", {"folder": "research"}))
    assert (outcomes(checked), checked.is_ok, checked.remedy) == ("++++++", True, None)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    (tmp_path / "file").write_text("x")
    checked = check_destination(destinations, destinations.parse("file", {"folder": "file"}))
    assert outcomes(checked) == "++x..."
