"""The outcome of every file of the corpus, when the whole folder is imported in path order in one process.

outcomes.csv is judged by the rule (what has its four identifying attributes, with UIDs that pass, is stored; the first
of those with the same identifiers stays), not written down from what the code does. The folder comes from the
environment: its files are not ours to copy.
"""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import pytest

from dicom_depot.services.ingest import IngestProblem, find_files, ingest
from dicom_depot.testing.memory import MemoryBlobStore, MemoryIndex

CORPUS = os.environ.get("DICOM_DEPOT_TEST_CORPUS", "")
INDEX = "index.csv"

UID = re.compile(r"[0-9.]{0,63}[0-9]")

BEYOND_THE_INDEX = {
    # pydicom, which made the index, could not read these; by the rule they are not what it says.
    "_mutants/no_preamble.dcm": "conflicting",  # a meta header and all four attributes, only the preamble is missing
    "pydicom-data/8742a49b_emri_small_jpeg_2k_lossless_too_short.dcm": "conflicting",  # only its pixels are cut off
    # Without preamble, but with a meta header: DICOM, and three identifying attributes are missing.
    "pydicom-data/281610d5_JLSL_RGB_ILV1.dcm": "broken",
    "pydicom-data/a377750d_JLSN_RGB_ILV0.dcm": "broken",
    "pydicom-data/f8836a65_JLSL_RGB_ILV0.dcm": "broken",
}

pytestmark = pytest.mark.skipif(not CORPUS, reason="DICOM_DEPOT_TEST_CORPUS is not set")


def expected_outcomes() -> dict[str, tuple[str, str]]:
    with (Path(__file__).parent / "outcomes.csv").open(newline="") as file:
        return {row["path"]: (row["outcome"], row["reason_prefix"]) for row in csv.DictReader(file)}


def test_the_table_follows_from_the_rule_and_the_corpus_index() -> None:
    with (Path(CORPUS) / INDEX).open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["path"])
    expected = expected_outcomes()
    first: dict[tuple[str, ...], str] = {}
    for row in rows:
        uids = tuple(row[name].rstrip(" \0") for name in ("study_uid", "series_uid", "sop_uid"))
        if all(map(UID.fullmatch, (*uids, row["sop_class"]))):
            same = first.setdefault(uids, row["sha256"]) == row["sha256"]
            outcome = "conflicting" if not same else "stored"
        else:
            outcome = "broken" if row["has_DICM"] == "True" else "not_dicom"
        assert expected[row["path"]][0] == BEYOND_THE_INDEX.get(row["path"], outcome), row["path"]


def test_every_file_of_the_corpus_has_the_outcome_that_the_rule_gives_it() -> None:
    root = Path(CORPUS)
    with (root / INDEX).open(newline="") as file:
        listed = {row["path"] for row in csv.DictReader(file)}
    expected = expected_outcomes()
    assert set(expected) == listed

    problems: dict[str, IngestProblem] = {}
    store, index = MemoryBlobStore(), MemoryIndex()

    def note(problem: IngestProblem) -> None:
        problems[Path(problem.path).relative_to(root).as_posix()] = problem

    summary = ingest(find_files([root]), lambda: (store, index), processes=0, on_problem=note)
    assert summary.failure is None
    assert problems.pop(INDEX).kind == "not_dicom"
    wrong = []
    for path, (outcome, reason_prefix) in expected.items():
        problem = problems.get(path)
        got = problem.kind.value if problem else "stored"
        if got != outcome or not (problem.reason if problem else "").startswith(reason_prefix):
            wrong.append((path, outcome, reason_prefix, got, problem and problem.reason))
    assert not wrong
    counts = [outcome for outcome, _ in expected.values()]
    assert summary.stored == counts.count("stored") == len(store.objects) == index.totals(index.sequence())[0]
    assert summary.already_there == counts.count("already_there")

    again = ingest(find_files([root]), lambda: (store, index), processes=0)
    assert (again.stored, again.already_there) == (0, summary.stored)
    assert (again.conflicting, again.broken) == (summary.conflicting, summary.broken)
