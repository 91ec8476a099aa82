"""The conformance statement's tables equal the application's routes and codecs. Renew them with UPDATE_SNAPSHOTS=1."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydicom.uid import UID

from dicom_depot.codec.media_types import frame_media_type
from dicom_depot.codec.transcode import OFFERED
from dicom_depot.config import Settings
from dicom_depot.web.access import rules
from dicom_depot.web.app import create_app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "conformance.md"

SECTIONS = {
    "store_instances": "10.5 Store",
    "store_instances_of_study": "10.5 Store",
    "replace_instances": "extension",
    "replace_instances_of_study": "extension",
    "search_studies": "10.6 Search",
    "search_series": "10.6 Search",
    "search_instances": "10.6 Search",
    "search_series_of_study": "10.6 Search",
    "search_instances_of_study": "10.6 Search",
    "search_instances_of_series": "10.6 Search",
    "add_query_tags": "extension",
    "list_query_tags": "extension",
    "get_query_tag": "extension",
    "update_query_tag": "extension",
    "delete_query_tag": "extension",
    "list_query_tag_errors": "extension",
    "retrieve_study": "10.4 Retrieve",
    "retrieve_series": "10.4 Retrieve",
    "retrieve_instance": "10.4 Retrieve",
    "retrieve_study_metadata": "10.4 Retrieve, metadata",
    "retrieve_series_metadata": "10.4 Retrieve, metadata",
    "retrieve_instance_metadata": "10.4 Retrieve, metadata",
    "retrieve_frames": "10.4 Retrieve, pixel data",
    "retrieve_bulk_data": "10.4 Retrieve, bulk data",
    "retrieve_rendered_instance": "10.4 Retrieve, rendered",
    "retrieve_rendered_frame": "10.4 Retrieve, rendered",
    "retrieve_study_thumbnail": "10.4 Retrieve, thumbnail",
    "retrieve_series_thumbnail": "10.4 Retrieve, thumbnail",
    "retrieve_instance_thumbnail": "10.4 Retrieve, thumbnail",
    "retrieve_frame_thumbnail": "10.4 Retrieve, thumbnail",
    "delete_study": "extension",
    "delete_series": "extension",
    "delete_instance": "extension",
    "list_changes": "extension",
    "latest_change": "extension",
}
"""The transaction of PS3.18 that a route is; `extension` where the standard has none."""


def routes_table() -> str:
    app = create_app(None, Settings())  # type: ignore[arg-type]  # it is never opened
    document = app.openapi()["paths"]
    rows = ["| route | PS3.18 | request | answer | statuses |\n|---|---|---|---|---|\n"]
    seen = set()
    for rule in rules(app):
        operation = document.get(rule.path.replace(":path}", "}"), {}).get(rule.method.lower())
        if operation is None or not re.match(r"/v2/(studies|series|instances|extendedquerytags|changefeed)", rule.path):
            continue
        name = operation["operationId"]
        seen.add(name)
        sent = ", ".join(f"`{media_type}`" for media_type in operation.get("requestBody", {}).get("content", {}))
        answers = operation["responses"]
        received = ", ".join(
            dict.fromkeys(
                f"`{media_type}`"
                for status, answer in answers.items()
                if status.startswith("2")
                for media_type in answer.get("content", {})
            )
        )
        statuses = ", ".join(sorted(status for status in answers if status.isdecimal()))
        rows.append(f"| `{rule.method} {rule.path}` | {SECTIONS[name]} | {sent} | {received} | {statuses} |\n")
    assert seen == set(SECTIONS)
    return "".join(rows)


def syntaxes_table() -> str:
    rows = ["| transfer syntax | UID | frames as |\n|---|---|---|\n"]
    rows += [f"| {UID(uid).name} | `{uid}` | `{frame_media_type(uid)}` |\n" for uid in sorted(OFFERED)]
    return "".join(rows)


def filled(page: str) -> str:
    for name, table in (("routes", routes_table()), ("syntaxes", syntaxes_table())):
        begin, end = f"<!-- {name}: generated -->\n", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        assert rest, name
        assert after, name
        page = f"{before}{begin}{table}{end}{after}"
    return page


def test_the_conformance_statement_says_what_the_service_does() -> None:
    page = PAGE.read_text()
    if os.environ.get("UPDATE_SNAPSHOTS"):
        PAGE.write_text(filled(page))
        page = PAGE.read_text()
    assert page == filled(page)
