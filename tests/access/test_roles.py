"""Which role may use which route: every role against every route, the routes taken from the application itself."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Annotated

import httpx
import pytest
from fastapi import FastAPI

from dicom_depot.adapters.roles_file import read_roles
from dicom_depot.config import Settings
from dicom_depot.domain.access import BUILT_IN_ROLES, Action, Caller
from dicom_depot.domain.errors import ConfigurationError
from dicom_depot.web.access import OPEN, Rule, requires, rules
from dicom_depot.web.app import create_app
from tests.support.secured import Secured
from tests.support.service import run_command

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "roles.md"


def application() -> FastAPI:
    return create_app(None, Settings())  # type: ignore[arg-type]  # it is never opened


RULES = list(rules(application()))
ROLES: dict[str, frozenset[Action]] = {**BUILT_IN_ROLES, "": frozenset(), "no-such-role": frozenset()}


def _ask(client: httpx.Client, rule: Rule) -> httpx.Response:
    """A request that is wrong in every way that is looked at after the rights: content type, body, id."""
    path = rule.path.replace("{operation_id}", uuid.uuid4().hex).replace("{version:int}", "9")
    path = path.replace("{path:path}", "nothing").replace("{rest:path}", "/x").replace("{frames}", "1")
    path = path.replace("{tag_path}", "PatientAge")
    for name in ("study", "series", "instance"):
        path = path.replace(f"{{{name}}}", "1.2.3")
    assert "{" not in path, "say what stands for this parameter"
    return client.request(rule.method, path, content=b"{", headers={"Content-Type": "text/plain"})


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.method} {rule.path}")
def test_a_role_opens_the_routes_of_its_actions_and_no_others(rule: Rule, role: str, secured: Secured) -> None:
    with secured.client(*([role] if role else [])) as client:
        answer = _ask(client, rule)
    if rule.action is None or rule.action in ROLES[role]:
        assert answer.status_code not in (401, 403)
        assert answer.status_code < 500
    else:
        assert answer.status_code == 403
        assert answer.json()["code"] == "Forbidden"
        assert f"'{rule.action}'" in answer.json()["message"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.method} {rule.path}")
def test_without_a_token_only_open_routes_answer(rule: Rule, secured: Secured) -> None:
    with secured.anonymous() as client:
        answer = _ask(client, rule)
    if rule.action is None:
        assert answer.status_code not in (401, 403)
    else:
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="dicom-depot"'


def test_every_action_but_those_of_later_parts_is_asked_for_somewhere() -> None:
    assert {rule.action for rule in RULES} >= {None, Action.READ, Action.EXPORT}


def test_only_these_routes_are_open() -> None:
    assert {rule.path for rule in RULES if rule.action is None} == {
        "/health/check",
        "/v1/api.json",
        "/v2/api.json",
        "/partitions{rest:path}",
        "/v1/partitions{rest:path}",
        "/v2/partitions{rest:path}",
    }


def test_a_new_route_without_a_rule_fails() -> None:
    app = application()
    app.add_api_route("/v2/new", lambda: None)
    with pytest.raises(LookupError, match="/v2/new"):
        list(rules(app))


def test_a_new_route_with_two_rules_fails() -> None:
    app = application()

    def both(reader: Annotated[Caller, requires(Action.READ)]) -> None: ...

    app.add_api_route("/v2/new", both, dependencies=[OPEN])
    with pytest.raises(LookupError, match="/v2/new"):
        list(rules(app))


def test_a_mounted_application_fails() -> None:
    app = application()
    app.mount("/static", FastAPI())
    with pytest.raises(LookupError, match="/static"):
        list(rules(app))


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Basic dXNlcjpwYXNz",
        "Bearer a b",
        'Bearer "quoted"',
        "token",
        "Bearer ../../x",
        "Bearer " + "x" * 40_000,
        "Bearer eyJhbGciOiJub25lIn0.e30.",
    ],
)
def test_a_bad_authorization_header_is_a_401_that_says_so(authorization: str, secured: Secured) -> None:
    with secured.anonymous(headers={"Authorization": authorization}) as client:
        answer = client.get("/v2/operations")
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="dicom-depot", error="invalid_token"'
    assert answer.json()["code"] == "Unauthenticated"


def test_two_authorization_headers_are_refused(secured: Secured) -> None:
    token = f"Bearer {secured.issuer.token('administrator')}"
    headers = [("Authorization", token), ("Authorization", token)]
    assert httpx.get(f"{secured.service.url}/v2/operations", headers=headers).status_code == 401


def test_the_scheme_may_be_written_in_any_letter_case(secured: Secured) -> None:
    with secured.anonymous(headers={"Authorization": f"bEARER {secured.issuer.token('reader')}"}) as client:
        assert client.get("/v2/operations").status_code == 200


def test_roles_of_a_file_replace_the_built_in_ones(tuned: Secured) -> None:
    def status(role: str) -> int:
        with tuned.client(role) as client:
            return client.get("/v2/operations").status_code

    assert status("Radiologist") == 200
    assert status("research-desk") == 403
    assert status("administrator") == 403


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"\[roles\]"),
        ("[roles]\n", r"\[roles\]"),
        ("roles = 7\n", r"\[roles\]"),
        ('[roles]\na = ["read"]\n[role]\n', "role"),
        ('[roles]\na = "read"\n', "'a' must be a list"),
        ("[roles]\na = []\n", "'a' must be a list"),
        ('[roles]\na = ["reed"]\n', "Did you mean 'read'"),
        ('[roles]\na = ["READ"]\n', "Did you mean 'read'"),
        ('[roles]\na = ["read"]\nA = ["export"]\n', "twice"),
        ("[roles\n", "not valid TOML"),
    ],
)
def test_a_roles_file_with_a_mistake_is_refused_and_explained(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "roles.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=complaint):
        read_roles(file)


def test_the_service_does_not_start_with_a_broken_roles_file(tmp_path: Path) -> None:
    sign_in = {"auth_issuers": "https://issuer.example", "auth_audiences": "depot"}
    done = run_command(
        "serve", data_dir=tmp_path / "data", check=False, roles_file=tmp_path / "missing.toml", **sign_in
    )
    assert done.returncode == 4
    assert "missing.toml" in done.stderr.replace("\n", "")


_HEAD = """# Roles and routes

A caller's token names its roles (claim `roles`, see [sign-in and roles](../how-to/sign-in-and-roles.md)); a role grants
actions; each route asks for one action. Without configured sign-in everybody may do everything, and the service listens
on loopback addresses only.

## Built-in roles

| role | actions |
|---|---|
"""
_MIDDLE = """
An own file (`DICOM_DEPOT_ROLES_FILE`) replaces them. Names of roles are compared without regard to letter case; roles
that are not defined grant nothing.

## What each route asks for

The same holds for these routes under `/v1` and without a version. Two are otherwise: `/health/check` exists without a
version only, `api.json` under `/v1` and `/v2` only.

| route | action |
|---|---|
"""
_END = """
Operations are visible to the caller who created them and to callers with `manage`; to others they do not exist: 404,
and absent from lists. `export` alone does not show operations; give it together with `read`.

Open routes say nothing of the data. A caller without a valid token gets 401, one whose roles do not grant the action
403; both come before anything else in the request is looked at.
"""


def roles_page() -> str:
    roles = [
        f"| `{name}` | {', '.join(f'`{action}`' for action in Action if action in granted)} |\n"
        for name, granted in BUILT_IN_ROLES.items()
    ]
    routes = [
        f"| `{rule.method} {rule.path}` | {f'`{rule.action}`' if rule.action else 'open'} |\n"
        for rule in RULES
        if rule.path.startswith(("/v2/", "/health")) and "partition" not in rule.path
    ]
    return _HEAD + "".join(roles) + _MIDDLE + "".join(sorted(routes)) + _END


def test_the_roles_page_says_what_the_code_says() -> None:
    if os.environ.get("UPDATE_SNAPSHOTS"):
        PAGE.write_text(roles_page())
    assert PAGE.read_text() == roles_page()
