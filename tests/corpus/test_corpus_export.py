"""Real and hostile DICOM files through the whole service: imported by the command, exported to Azurite, compared."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

from tests.support.azurite import Azurite
from tests.support.service import azure_destination, export_body, run_command, running_service


def test_every_stored_file_is_exported_with_the_bytes_that_it_had(
    corpus: Path, azurite: Azurite, tmp_path: Path
) -> None:
    with (Path(__file__).parent / "outcomes.csv").open(newline="") as file:
        outcomes = {row["path"]: row["outcome"] for row in csv.DictReader(file)}
    errors = tmp_path / "errors.jsonl"
    imported = run_command(
        *("import", str(corpus), "--processes", "1", "--errors", str(errors), "--json"),
        data_dir=tmp_path / "data",
        check=False,
    )
    assert imported.returncode == 3, imported.stderr  # some files are broken, and the command says so
    reported = {
        Path(line["path"]).relative_to(corpus).as_posix(): line["kind"]
        for line in map(json.loads, errors.read_text().splitlines())
    }
    del reported["index.csv"]
    assert {path: reported.get(path, "stored") for path in outcomes} == outcomes

    container = azurite.create_container()
    uri = azurite.container_url(container, azurite.container_sas(container, "cw"))
    with running_service(tmp_path / "data", export_allowed_endpoints=azurite.account_url) as service:
        answer = service.export(export_body(azure_destination(uri)))
        assert answer.status_code == 202, answer.text
        state = service.wait(answer.json()["id"])
    stored = [path for path, outcome in outcomes.items() if outcome == "stored"]
    expected = Counter(hashlib.sha256((corpus / path).read_bytes()).hexdigest() for path in stored)
    tree = azurite.read_tree(container)
    assert tree.pop(f"{state['operationId']}/errors.log") == b""
    assert Counter(hashlib.sha256(content).hexdigest() for content in tree.values()) == expected
    assert state["status"] == "succeeded"
    results = state["results"]
    assert (results["exported"], results["skipped"], results["total"]) == (len(stored), 0, len(stored))
    assert results["bytes"] == sum((corpus / path).stat().st_size for path in stored)
