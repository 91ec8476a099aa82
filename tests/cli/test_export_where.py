"""`dicom-depot export --where`: what is asked for, what is refused, and that values are not repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import CT, SAMPLES, SR, US, Depot, Invoke
from tests.cli.test_export_command import exported_files
from tests.support.service import run_command

SECRET = "Mustermann"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["1.2.3", "--where", f"PatientID={SECRET}"], "either --where or identifiers"),
        (["--all", "--where", f"PatientID={SECRET}"], "either --where or identifiers"),
        (["--from", "list", "--where", f"PatientID={SECRET}"], "either --where or identifiers"),
        (["--where", SECRET], "--where Modality=CT"),
        (["--where", f"={SECRET}"], "--where Modality=CT"),
        (["--where", "PatientID= "], "--where Modality=CT"),
        (["--where", f"PatientID={SECRET}", "--where", "patientid=1"], "'patientid' is no attribute"),
        (["--where", f"PatientID={SECRET}", "--where", "PatientID=1"], "names PatientID twice"),
        (["--where", f"patientID={SECRET}"], "Did you mean PatientID?"),
        (["--where", f"PatientID={SECRET}", "--level", "patient"], "'study', 'series', 'instance'"),
        (["1.2.3", "--level", "study"], "add --where NAME=VALUE"),
        (["--all", "--fuzzy"], "add --where NAME=VALUE"),
        ([], "--where NAME=VALUE"),
    ],
)
def test_wrong_usage_exits_with_2_and_repeats_no_value(invoke: Invoke, arguments: list[str], said: str) -> None:
    result = invoke("export", *arguments, "--to", "file:x")
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.replace("│", " ").split())
    if arguments != ["--where", SECRET]:
        assert SECRET not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["Modality=CT"], len(CT)),
        (["Modality=ct", "StudyDate=-20991231"], len(CT)),
        (["00080060=US"], 1),
        (["StudyDate=19000101-"], len(SAMPLES)),
        ([f"StudyInstanceUID={CT[0].ref.study_uid},{SR.ref.study_uid}"], len(CT) + 1),
        ([f"SOPInstanceUID={CT[1].ref.sop_instance_uid},{US.ref.sop_instance_uid}"], 2),
        (["InstanceNumber=3"], 1),
        (["InstanceNumber=3", "--level", "INSTANCE"], 1),
        (["ModalitiesInStudy=CT", "--level", "study"], len(CT)),
        (["PatientName=synth", "--fuzzy"], len(SAMPLES)),
        (["PatientName=synth"], 0),
    ],
)
def test_a_dry_run_counts_what_a_search_finds(ask: Invoke, depot: Depot, arguments: list[str], count: int) -> None:
    given = [part for each in arguments for part in (("--where", each) if "=" in each else (each,))]
    result = ask("export", *given, "--to", "file:where-dry", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    counted = json.loads(result.stdout)
    assert (counted["count"], counted["unmatched"]) == (count, [])
    assert not (depot.exported / "where-dry").exists()


def test_what_matches_is_copied(ask: Invoke, depot: Depot) -> None:
    result = ask("export", "--where", "Modality=CT", "--where", "PatientID=*", "--to", "file:where", "--wait")
    assert result.exit_code == 0, result.output
    assert "status     succeeded" in result.stdout
    assert exported_files(depot.exported / "where") == {
        f"{sample.ref.sop_instance_uid}.dcm": sample.content for sample in CT
    }


def test_a_query_that_matches_nothing_is_no_failure_and_is_told(ask: Invoke, depot: Depot) -> None:
    result = ask("export", "--where", "Modality=XA", "--to", "file:nothing", "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "This would copy 0 instances, 0 bytes.\nNothing that is stored matches.\n"
    result = ask("export", "--where", "Modality=XA", "--to", "file:nothing", "--wait")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("Nothing that was stored when the export began matches.\n")
    assert exported_files(depot.exported / "nothing") == {}


def test_what_the_service_refuses_is_told_with_its_place(ask: Invoke) -> None:
    result = ask("export", "--where", "InstanceNumber=1", "--level", "series", "--to", "file:x", "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["target"] == "source.settings.filters.InstanceNumber"
    assert "belongs to the instance" in error["message"]
    assert "belongs to the instance" in result.stderr
    result = ask("export", "--where", "PatientName=*", "--to", "file:x")
    assert result.exit_code == 2
    assert "leave `source` out for everything" in result.stderr


def test_local_finds_the_same(data_dir: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    exported.mkdir()
    arguments = ("export", "--where", "Modality=CT", "--where", "InstanceNumber=2", "--to", "file:local", "--local")
    counted = run_command(*arguments, "--dry-run", "--json", data_dir=data_dir, export_root=exported, min_free_bytes=0)
    assert json.loads(counted.stdout)["count"] == 1
    done = run_command(*arguments, data_dir=data_dir, export_root=exported, min_free_bytes=0)
    assert "exported   1 instances" in done.stdout
    assert exported_files(exported / "local") == {f"{CT[1].ref.sop_instance_uid}.dcm": CT[1].content}
    assert "Modality" not in done.stderr
