"""Export bodies, good ones broken in every way that comes to mind: no 500, no hang, and nothing is started that was
not asked for.

What was asked for is judged by a reading of the body of its own, shorter than the service's and written apart from it.
The seed is printed; FUZZ_SEED repeats a run.
"""

from __future__ import annotations

import copy
import json
import os
import re
import time
import uuid
from random import Random
from typing import Any

import httpx
import pytest

from tests.support.secured import Secured

SECONDS_EACH = 10.0
_UID = r"[0-9.]{1,64}"
_IDENTIFIER = re.compile(rf"{_UID}(/{_UID}){{0,2}}", re.ASCII)

_STRANGE: list[Any] = [
    None, True, False, 0, -1, 1.5, 10**400, 1e308, "", " ", "\x00", "\ud800", "ß", "🩻", "..", "../..", "/", "\\",
    "a" * 10_000, "%2e%2e%2f", "${jndi:ldap://x}", "'; drop table operations; --", "file:///etc/passwd",
    "http://169.254.169.254/", [], {}, [[]], [{}], {"": ""}, ["1.2.3"] * 500, {"type": "identifiers"}, "1.2.3",
    "1.2.3/4.5/6.7/8.9", "1..2", "0" * 65, "identifiers", "file", "azureBlob", "FILE", "\u0130dentifiers",
]  # fmt: skip
_RAW = [
    b"NaN", b"Infinity", b"-0", b"1e999", b"01", b"'", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\u0000", b"\\ud800",
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"//", b"/* */", b"null", b"true", b"\n", b"\r", b"\t", b"\\", b"[" * 3000,
    b'{"a":' * 3000, b"9" * 5000,
]  # fmt: skip
_TYPES = [
    "application/json; charset=utf-8",
    "APPLICATION/JSON",
    "application/json; charset=utf-16",
    "application/json;",
    "application/json, text/plain",
    "application/dicom+json",
    "multipart/form-data; boundary=x",
    "text/json",
    "text/plain",
    "",
]


_FILTERS = {"Modality": "CT", "StudyDate": "20240101-20241231", "PatientName": "d*", "InstanceNumber": "2"}


def _templates(secured: Secured) -> list[dict[str, Any]]:
    folder = {"type": "file", "settings": {"folder": "fuzz"}}
    source = {"type": "identifiers", "settings": {"values": [*secured.identifiers[:3], "1.2.3", "1.2/3.4"]}}
    query = {"type": "query", "settings": {"level": "instance", "filters": _FILTERS, "fuzzymatching": True}}
    blob = {"blobContainerUri": secured.endpoint.container_url("fuzz")}
    connection = {"connectionString": f"BlobEndpoint={secured.endpoint.account_url};SharedAccessSignature=sv=1&sig=x"}
    return [
        {"source": source, "destination": folder},
        {"source": query, "destination": folder},
        {"destination": folder},
        {"source": source, "destination": {"type": "azureBlob", "settings": blob}},
        {"destination": {"type": "azureBlob", "settings": connection | {"blobContainerName": "fuzz"}}},
        {"source": source, "destination": {"type": "azureBlob", "settings": {"useManagedIdentity": True} | blob}},
    ]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        found += [(value, key), *_places(inner)]
    return found


def _bend(random: Random, value: Any) -> None:
    """Change one thing in the value's structure."""
    places = _places(value)
    if not places:
        return
    container, key = random.choice(places)
    match random.randrange(7):
        case 0:
            container[key] = copy.deepcopy(random.choice(_STRANGE))
        case 1:
            del container[key]
        case 2 if isinstance(container, dict):
            name = str(key)
            renamed = random.choice([name.upper(), name + "s", name[:-1], name[::-1], " " + name, name + "\u0000", "x"])
            container[renamed] = container.pop(key)
        case 3 if isinstance(container, dict):
            container[random.choice(["extra", "__proto__", "source", "type", "settings", "Values"])] = random.choice(
                _STRANGE
            )
        case 4 if isinstance(container, list):
            container.insert(key, copy.deepcopy(random.choice(_STRANGE)))
        case 5:
            container[key] = [container[key]]
        case _:
            container[key] = {str(key): container[key]}


def _break(random: Random, raw: bytes) -> bytes:
    """Change one thing in the text."""
    place = random.randrange(len(raw) + 1)
    match random.randrange(6):
        case 0:
            return raw[:place] + random.choice(_RAW) + raw[place:]
        case 1:
            return raw[:place]
        case 2:
            return raw[:place] + bytes([random.randrange(256)]) + raw[place + 1 :]
        case 3:
            end = min(len(raw), place + random.randrange(1, 40))
            return raw[:place] + raw[place:end] * random.randrange(2, 4) + raw[end:]
        case 4:
            return raw[:place] + raw[place + random.randrange(1, 20) :]
        case _:
            return raw.decode("utf-8", "replace").encode(random.choice(["utf-16", "utf-32", "utf-8-sig", "utf-8"]))


def _case(random: Random, templates: list[dict[str, Any]]) -> tuple[bytes, str]:
    value = copy.deepcopy(random.choice(templates))
    for _ in range(random.choice([0, 1, 1, 1, 2, 4])):
        _bend(random, value)
    raw = json.dumps(value, ensure_ascii=random.random() < 0.5, indent=random.choice([None, 1])).encode(
        "utf-8", "surrogatepass"
    )
    for _ in range(random.choice([0, 0, 1, 2])):
        raw = _break(random, raw)
    return raw, "application/json" if random.random() < 0.9 else random.choice(_TYPES)


def _asks_for_an_export(raw: bytes, content_type: str) -> bool:
    """Whether the body can be read as a complete export request; not whether the service may refuse it."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        return False
    try:
        top = _lower(json.loads(raw.decode("utf-8")))
        if set(top) - {"source", "destination"}:
            return False
        destination = _lower(top["destination"])
        settings = _lower(destination["settings"])
        allowed = {
            "file": {"folder"},
            "azureblob": {"blobcontaineruri", "connectionstring", "blobcontainername", "usemanagedidentity"},
        }[destination["type"].lower()]
        if set(destination) != {"type", "settings"} or set(settings) - allowed:
            return False
        if "source" not in top:
            return True
        source = _lower(top["source"])
        if source["type"].lower() == "query":
            return set(source) == {"type", "settings"} and _is_a_query(_lower(source["settings"]))
        values = _lower(source["settings"])["values"]
        return bool(
            set(source) == {"type", "settings"}
            and source["type"].lower() == "identifiers"
            and set(_lower(source["settings"])) == {"values"}
            and values
            and all(_IDENTIFIER.fullmatch(value) for value in values)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _is_a_query(settings: dict[str, Any]) -> bool:
    return bool(
        {"level", "filters"} <= set(settings) <= {"level", "filters", "fuzzymatching"}
        and settings["level"].lower() in {"study", "series", "instance"}
        and isinstance(settings.get("fuzzymatching", False), bool)
        and settings["filters"]
        and set(settings["filters"]) <= set(_FILTERS)
        and all(isinstance(text, str) and text.strip() for text in settings["filters"].values())
    )


def _lower(value: Any) -> dict[str, Any]:
    names = [name.lower() for name in value]
    if not isinstance(value, dict) or len(set(names)) != len(names):
        raise ValueError("not an object, or a member twice")
    return dict(zip(names, value.values(), strict=True))


def _started(client: httpx.Client) -> int:
    count, token = 0, None
    while True:
        arguments = {"limit": "200"} | ({"continuationToken": token} if token else {})
        page = client.get("/v2/operations", params=arguments).raise_for_status().json()
        count += len(page["operations"])
        token = page.get("continuationToken")
        if token is None:
            return count


@pytest.mark.parametrize("cases", [500, pytest.param(10_000, marks=pytest.mark.long)])
def test_no_body_breaks_the_service_or_starts_what_was_not_asked_for(cases: int, secured: Secured) -> None:
    seed = int(os.environ.get("FUZZ_SEED") or time.time_ns() % 2**32)
    print(f"FUZZ_SEED={seed}")
    random = Random(seed)
    templates = _templates(secured)
    statuses: dict[int, int] = {}
    outside = set(secured.export_root.parent.iterdir())
    with secured.client("exporter", sub=f"fuzzer-{uuid.uuid4().hex}") as client:
        for number in range(cases):
            raw, content_type = _case(random, templates)
            where = f"case {number} of FUZZ_SEED={seed}: {content_type!r} {raw[:2000]!r}"
            began_at = time.monotonic()
            try:
                answer = client.post(
                    "/v2/export", content=raw, headers={"Content-Type": content_type}, timeout=SECONDS_EACH
                )
            except httpx.HTTPError as error:
                pytest.fail(f"{where}: {error!r} after {time.monotonic() - began_at:.1f} s")
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code in (202, 400, 413, 415), f"{where}: {answer.status_code} {answer.text}"
            if answer.status_code == 202:
                assert _asks_for_an_export(raw, content_type), where
            else:
                assert set(answer.json()) == {"code", "message", "target"}, where
        print(f"{cases} cases: {dict(sorted(statuses.items()))}")
        assert _started(client) == statuses.get(202, 0)
        assert set(secured.export_root.parent.iterdir()) == outside
        assert set(statuses) >= {202, 400, 415}, "the fuzzer reaches all of it"
