"""The benchmark of searches: what it makes and expects, how answers are judged and become tables, and that it runs.

Nothing here needs Orthanc. What the figures are is not tested: a busy machine would fail it.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dicomweb import MIB, Row
from benchmarks.search import (
    BIG,
    SMALL,
    Answered,
    Expected,
    Line,
    Search,
    _records,
    arguments_parser,
    big_searches,
    check,
    difference,
    expected,
    full_plan,
    json_path_of,
    lines,
    plan_of,
    population,
    print_tables,
    quick_plan,
    small_searches,
    tabulate,
)
from dicom_depot.codec.search_values import columns_of, loads
from tests.support.search_oracle import INSTANCE, SERIES, STUDY

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_a_quick_run_of_our_side_alone_checks_every_answer_and_writes_every_figure(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.search", "--quick", "--only", "depot", "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "its figures mean nothing" in done.stdout

    result = json.loads(figures.read_text())
    assert {"date", "commit", "machine", "method", "big", "side_by_side"} <= result.keys()
    studies = population(quick_plan().rows, BIG)
    assert [each["what"] for each in result["big"]["searches"]] == [search.what for search in big_searches(studies)]
    assert all(line.milliseconds > 0 for line in lines(result["big"]))
    assert result["big"]["memory"]["idle_bytes"] > 0
    assert all(row.depot is not None and row.orthanc is None for row in tabulate(result["side_by_side"]))


def test_a_population_has_the_rows_it_is_asked_for_and_is_always_the_same() -> None:
    studies = population(2000, BIG)
    assert studies == population(2000, BIG)
    series = [series for study in studies for series in study.series]
    assert sum(each.count for each in series) == 2000
    assert [each.first for each in series] == list(itertools.accumulate((each.count for each in series), initial=0))[
        :-1
    ]
    assert {study.modality for study in studies} == {kind.modality for kind in BIG}


def test_what_is_written_says_the_same_in_its_columns_as_in_its_metadata() -> None:
    records = list(_records(population(800, BIG)))
    assert len({record.ref for record in records}) == len({record.store_key for record in records}) == 800
    for record in records[::97]:
        assert record.metadata is not None
        content = loads(record.metadata.dicom_json)
        assert columns_of(content) == record.header.attributes
        assert content["00080018"]["Value"] == [record.ref.sop_instance_uid]
    assert sum(len(record.metadata.dicom_json) for record in records if record.metadata) / 800 > 1000


def test_what_is_expected_is_a_page_of_all_that_match_newest_first() -> None:
    studies = population(2000, BIG)
    everything = expected(studies, Search("", STUDY, limit=200))
    assert list(everything.page) == [study.uid for study in reversed(studies)]
    page = expected(studies, Search("", STUDY, limit=2, offset=1))
    assert list(page.page) == [studies[-2].uid, studies[-3].uid]
    assert page.total == everything.total == len(studies)
    scans = [study for study in studies if study.modality == "CT"]
    in_series = expected(studies, Search("", INSTANCE, {"InstanceNumber": "2"}, scope=(scans[0].uid,)))
    assert in_series.total == len(scans[0].series)
    of_modality = expected(studies, Search("", SERIES, {"Modality": "CT"}))
    assert of_modality.total == sum(len(study.series) for study in scans)


def test_every_kind_of_search_has_a_path_of_its_own() -> None:
    for searches in (big_searches(population(2000, BIG)), small_searches(population(3000, SMALL))):
        assert len({search.path for search in searches}) == len({search.what for search in searches}) == len(searches)
    search = Search("", INSTANCE, {"PatientName": "Mü*"}, scope=("1.2",), is_fuzzy=True, includes_all=True, offset=7)
    assert search.path == (
        "/studies/1.2/instances?PatientName=M%C3%BC*&limit=100&offset=7&fuzzymatching=true&includefield=all"
    )


@pytest.mark.parametrize(
    ("uids", "more", "is_right"),
    [
        (["1.1", "1.2"], 3, True),
        (["1.1", "1.2"], -1, True),
        (["1.1", "1.2"], 0, False),
        (["1.1", "1.2"], 4, False),
        (["1.2", "1.1"], 3, False),
        (["1.1"], 4, False),
        ([], 0, False),
    ],
)
def test_an_answer_is_right_with_these_uids_in_this_order_and_as_many_more(
    uids: list[str], more: int, is_right: bool
) -> None:
    answered = Answered(json.dumps([{"0020000D": {"Value": [uid]}} for uid in uids]).encode() if uids else b"", more)
    search, wanted = Search("", STUDY, limit=2), Expected(["1.1", "1.2"], 5)
    if is_right:
        check(search, answered, wanted)
    else:
        with pytest.raises(RuntimeError):
            check(search, answered, wanted)


def test_orthanc_may_order_differently_but_every_other_difference_is_told() -> None:
    search, all_, page = Search("", STUDY, limit=2), Expected(["1.1", "1.2"], 2), Expected(["1.1", "1.2"], 5)
    assert difference(search, all_, {"depot": ["1.1", "1.2"]}) == ""
    assert difference(search, all_, {"orthanc": ["1.2", "1.1"]}) == ""
    assert difference(search, all_, {"orthanc": ["1.2", "1.3"]}) == "Orthanc lacks 1 and has 1 others"
    assert difference(search, all_, {"orthanc": ["1.2", "1.2"]}) == "Orthanc answers some twice"
    assert difference(search, page, {"orthanc": ["1.3", "1.4"]}) == ""
    assert difference(search, page, {"orthanc": ["1.3"]}) == "Orthanc answers 1, not 2"


def test_quick_is_a_small_plan_that_writes_no_figures_unless_told() -> None:
    quick = arguments_parser().parse_args(["--quick"])
    assert plan_of(quick) == quick_plan()
    assert json_path_of(quick, _result()) is None
    told = arguments_parser().parse_args(["--quick", "--json", "figures.json"])
    assert json_path_of(told, _result()) == Path("figures.json")


def test_a_full_run_writes_its_figures_under_date_and_commit() -> None:
    full = arguments_parser().parse_args(["--rounds", "7", "--rows", "5000"])
    assert plan_of(full) == replace(full_plan(), rounds=7, rows=5000)
    path = json_path_of(full, _result())
    assert path is not None
    assert path.parts[-3:] == ("benchmarks", "results", "search-2026-11-26-0123456789.json")
    assert json_path_of(arguments_parser().parse_args(["--only", "depot"]), _result()) is None


def test_figures_become_lines_and_ratios_of_medians(capsys: pytest.CaptureFixture[str]) -> None:
    result = _result()
    assert lines(result["big"]) == [Line("fast", 5, 5, 3.0, 9.0, 2.0, 700), Line("slow", 9, 9, 400.0, 400.0, 2.0, 700)]
    assert tabulate(result["side_by_side"]) == [
        Row("PatientID", "ms", 2.0, 6.0, 3.0),
        Row("peak memory", "MiB", 300.0, 60.0, 0.2),
    ]
    print_tables(result)
    printed = capsys.readouterr().out
    assert "Slower than 300 ms: slow." in printed
    assert "Orthanc lacks 1 and has 0 others" in printed
    assert "1 MiB before, 2 MiB after the rounds, 3 MiB after as many requests again" in printed
    assert "not quiet: 0.30 cores" in printed


def _result() -> dict[str, Any]:
    """Made-up figures."""

    def one(milliseconds: float, slowest: float = 0.0) -> dict[str, Any]:
        return {
            "requests": 4,
            "milliseconds": milliseconds,
            "slowest_milliseconds": slowest or milliseconds,
            "body_bytes": 700,
            "server_cpu_milliseconds": 2.0,
            "cores_busy_with_other_things": 0.3,
        }

    return {
        "date": "2026-11-26T01:02:03+00:00",
        "commit": "0123456789abcdef",
        "big": {
            "rows": 2000,
            "studies": 20,
            "series": 30,
            "database_bytes": MIB,
            "searches": [
                {"what": "fast", "matching": 5, "answered": 5, "rounds": [one(3.0, 4.0), one(2.0), one(8.0, 9.0)]},
                {"what": "slow", "matching": 9, "answered": 9, "rounds": [one(400.0)]},
            ],
            "memory": {
                "idle_bytes": MIB,
                "peak_bytes": 2 * MIB,
                "peak_bytes_after_twice_as_many": 3 * MIB,
                "peak_bytes_after_many_clients": 4 * MIB,
            },
        },
        "side_by_side": {
            "instances": 100,
            "studies": 4,
            "stored_seconds": {"depot": 1.0, "orthanc": 0.5},
            "searches": [
                {
                    "what": "PatientID",
                    "matching": 1,
                    "difference": "Orthanc lacks 1 and has 0 others",
                    "rounds": [{"depot": one(2.0), "orthanc": one(6.0)}],
                }
            ],
            "memory": {"depot": {"mib": 300.0}, "orthanc": {"mib": 60.0}},
        },
    }
