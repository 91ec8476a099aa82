"""The DICOMweb benchmark: what it is told, how it reads answers, how figures become the table, and that it runs.

Nothing here needs Orthanc. What the figures are is not tested: a busy machine would fail it.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from benchmarks.dicomweb import (
    MIB,
    Row,
    arguments_parser,
    full_plan,
    json_path_of,
    plan_of,
    print_table,
    quick_plan,
    tabulate,
)
from benchmarks.dicomweb_load import BOUNDARY, Template, read_answer

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_a_quick_run_of_our_side_alone_prints_the_table_and_writes_every_figure(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.dicomweb", "--quick", "--only", "depot", "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "its figures mean nothing" in done.stdout

    result = json.loads(figures.read_text())
    assert {"date", "commit", "machine", "method", "store", "retrieval", "memory"} <= result.keys()
    assert [(each["name"], each["clients"]) for each in result["store"]] == [
        (workload.name, clients) for workload in quick_plan().workloads for clients in quick_plan().clients
    ]
    for each in result["store"]:
        assert all(one["depot"]["rows_found"] == each["files"] for one in each["rounds"])
    assert [each["what"] for each in result["retrieval"]] == [
        "metadata of the study",
        "the study as stored",
        "an instance as stored",
        "a frame",
    ]
    assert result["memory"]["depot"]["peak_bytes"] > 0
    assert all(row.depot is not None and row.depot >= 0 and row.orthanc is None for row in tabulate(result))


def test_quick_is_a_small_plan_that_writes_no_figures_unless_told() -> None:
    quick = arguments_parser().parse_args(["--quick"])
    assert plan_of(quick) == quick_plan()
    assert json_path_of(quick, _result()) is None
    told = arguments_parser().parse_args(["--quick", "--json", "figures.json"])
    assert json_path_of(told, _result()) == Path("figures.json")


def test_a_full_run_writes_its_figures_under_date_and_commit() -> None:
    full = arguments_parser().parse_args(["--rounds", "7"])
    plan = plan_of(full)
    assert plan.rounds == 7
    assert plan.workloads == full_plan().workloads
    path = json_path_of(full, _result())
    assert path is not None
    assert path.parts[-3:] == ("benchmarks", "results", "dicomweb-2026-11-26-0123456789.json")


def test_one_side_alone_never_becomes_a_result() -> None:
    alone = arguments_parser().parse_args(["--only", "orthanc"])
    assert json_path_of(alone, _result()) is None


def test_ratios_are_medians_of_rounds_and_above_one_in_our_favour() -> None:
    rows = {row.what: row for row in tabulate(_result())}
    stored = rows["store 34 KB, 4 clients"]
    assert stored == Row("store 34 KB, 4 clients", "files/s", 300.0, 200.0, 1.5, 1.0)
    assert stored.verdict == "met (1.0)"
    assert rows["  CPU for 1,000 files"].ratio == 0.5  # ours uses twice the CPU
    assert rows["a frame"] == Row("a frame", "ms", 1.0, 2.0, 2.0)
    assert rows["a frame"].verdict == ""
    assert rows["peak memory"] == Row("peak memory", "MiB", 200.0, 50.0, 0.25)


def test_a_goal_that_is_missed_is_said_to_be() -> None:
    (metadata,) = (row for row in tabulate(_result()) if row.what == "metadata of the study")
    assert metadata.ratio == 4.9
    assert metadata.verdict == "NOT met (5.0)"


def test_the_table_has_every_row_and_tells_what_disturbed_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(_result())
    printed = capsys.readouterr().out
    for row in tabulate(_result()):
        assert row.what in printed
    assert "The clients' share of the CPU: median 4%" in printed
    assert "not quiet: up to 0.30 cores" in printed


def test_a_side_that_was_not_measured_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    result = _result()
    for each in (*result["store"], *result["retrieval"]):
        for one in each["rounds"]:
            del one["depot"]
    del result["memory"]["depot"]
    assert all(row.depot is None and row.ratio is None and row.verdict == "" for row in tabulate(result))
    print_table(result)
    assert "-" in capsys.readouterr().out


def test_the_prebuilt_file_becomes_another_instance_in_place() -> None:
    template = Template("seed", 34_000)
    assert abs(template.file_bytes - 34_000) < 300
    found = []
    for _ in range(51):
        body = bytes(template.next_body())
        head, _, rest = body.partition(b"\r\n\r\n")
        assert head.startswith(b"--" + BOUNDARY)
        data_set = dcmread(io.BytesIO(rest.removesuffix(b"\r\n--" + BOUNDARY + b"--\r\n")))
        assert data_set.file_meta.MediaStorageSOPInstanceUID == data_set.SOPInstanceUID
        assert data_set.StudyInstanceUID == template.study_uid
        assert len(data_set.PixelData) == data_set.Rows * data_set.Columns * 2
        found.append((data_set.SeriesInstanceUID, data_set.SOPInstanceUID))
    assert found == template.places
    assert len({instance for _, instance in found}) == 51
    assert len({series for series, _ in found}) == 2


@pytest.mark.parametrize(
    ("answer", "body", "is_last"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbodyHTTP/1.1 200 OK\r\n", b"body", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nbod\r\n1\r\ny\r\n0\r\n\r\n", b"body", False),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nbody", b"body", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", b"", True),
    ],
)
def test_an_answer_is_read_to_its_end_and_no_further(answer: bytes, body: bytes, is_last: bool) -> None:
    read = read_answer(io.BytesIO(answer))
    assert (read.status, read.body, read.is_last) == (200, body, is_last)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"])
def test_an_answer_that_breaks_off_is_an_error(answer: bytes) -> None:
    with pytest.raises(ConnectionError):
        read_answer(io.BytesIO(answer))


def _result() -> dict[str, Any]:
    """Three rounds of made-up figures."""
    of_all = {"client_cpu_share": 0.04, "cores_busy_with_other_things": 0.3}

    def both(figure: str, pairs: list[tuple[float, float]]) -> list[dict[str, Any]]:
        return [
            {
                "depot": {figure: depot, "server_cpu_seconds_per_1000_files": 4.0, **of_all},
                "orthanc": {figure: orthanc, "server_cpu_seconds_per_1000_files": 2.0, **of_all},
            }
            for depot, orthanc in pairs
        ]

    return {
        "date": "2026-11-26T01:02:03+00:00",
        "commit": "0123456789abcdef",
        "store": [
            {
                "name": "34 KB",
                "clients": 4,
                "rounds": both("files_per_second", [(300.0, 200.0), (100.0, 200.0), (900.0, 300.0)]),
            }
        ],
        "retrieval": [
            {"what": "metadata of the study", "rounds": both("milliseconds", [(10.0, 49.0)])},
            {"what": "a frame", "rounds": both("milliseconds", [(1.0, 2.0)])},
        ],
        "memory": {
            "depot": {"idle_bytes": MIB, "peak_bytes": 200 * MIB, "processes": 3},
            "orthanc": {"idle_bytes": MIB, "peak_bytes": 50 * MIB, "processes": 1},
        },
    }
