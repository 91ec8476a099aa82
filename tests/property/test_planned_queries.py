"""Exports by query against a model in plain Python: random archives, random queries, and an archive that goes on
changing while the export is planned.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.adapters.operations_sql import SqlOperations
from dicom_depot.adapters.query_tags_sql import SqlQueryTags
from dicom_depot.adapters.search_sql import SqlSearch
from dicom_depot.domain.export import Matching
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.domain.search import Level
from dicom_depot.export.planner import Planner
from dicom_depot.testing.index_contract import make_record
from dicom_depot.testing.operations_contract import new_operation


class Event(NamedTuple):
    """Something that is stored, replacing what is there, or deleted."""

    is_deletion: bool
    identifier: str
    size: int
    date: str
    modality: str
    number: int


UIDS = st.sampled_from("123")
EVENTS = st.lists(
    st.builds(
        Event,
        st.sampled_from([False, False, False, True]),
        st.lists(UIDS, min_size=1, max_size=3).map("/".join),
        st.integers(0, 50),
        st.sampled_from(["20240101", "20240630", "20250101"]),
        st.sampled_from(["CT", "MR"]),
        st.integers(1, 3),
    ),
    min_size=8,
    max_size=40,
)
FILTERS: dict[Level, dict[str, list[str]]] = {
    Level.STUDY: {
        "StudyDate": ["20240101", "20240101-20241231", "20240630-"],
        "ModalitiesInStudy": ["CT", "M*"],
        "StudyInstanceUID": ["1,2", "3"],
    },
    Level.SERIES: {"Modality": ["ct", "M?"], "SeriesInstanceUID": ["1,3"]},
    Level.INSTANCE: {"InstanceNumber": ["1", "2"], "SOPInstanceUID": ["2", "1,3"]},
}


@st.composite
def queries(draw: st.DrawFn) -> Matching:
    level = draw(st.sampled_from(list(Level)))
    known = {name: values for of in list(Level)[: list(Level).index(level) + 1] for name, values in FILTERS[of].items()}
    names = draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=3, unique=True))
    return Matching(level, {name: draw(st.sampled_from(known[name])) for name in names})


@dataclass
class Model:
    """What lives, by identifier, as it was stored; and what studies and series say: what was stored last."""

    live: dict[str, Event] = field(default_factory=dict)
    dates: dict[str, str] = field(default_factory=dict)
    modalities: dict[str, str] = field(default_factory=dict)

    def apply(self, index: SqlIndex, events: list[Event]) -> None:
        for event in events:
            if event.is_deletion:
                index.delete(parse_identifier(event.identifier))
                for each in [each for each in self.live if f"{each}/".startswith(f"{event.identifier}/")]:
                    del self.live[each]
                continue
            instance = "/".join((event.identifier.split("/") * 3)[:3])
            record = make_record(
                instance,
                str(event),
                size=event.size,
                may_replace=True,
                study_date=event.date,
                modality=event.modality,
                instance_number=event.number,
            )
            index.add([record])
            if self.live.get(instance) != event:  # the same bytes replace nothing
                self.live[instance] = event
                self.dates[instance[:1]], self.modalities[instance[:3]] = event.date, event.modality

    def matching(self, asked: Matching) -> dict[str, int]:
        """Size by identifier of what an export copies."""
        series = {each[:3] for each in self.live}
        meets: dict[str, Callable[[str, str], bool]] = {
            "StudyDate": lambda each, value: _in_range(self.dates[each[:1]], value),
            "ModalitiesInStudy": lambda each, value: any(
                self.modalities[one][0] == value[0] for one in series if one[0] == each[0]
            ),
            "StudyInstanceUID": lambda each, value: each[0] in value.split(","),
            "Modality": lambda each, value: self.modalities[each[:3]][0] == value[0].upper(),
            "SeriesInstanceUID": lambda each, value: each[2] in value.split(","),
            "InstanceNumber": lambda each, value: self.live[each].number == int(value),
            "SOPInstanceUID": lambda each, value: each[4] in value.split(","),
        }
        return {
            each: event.size
            for each, event in self.live.items()
            if all(meets[name](each, value) for name, value in asked.filters.items())
        }


def _in_range(date: str, value: str) -> bool:
    low, _, high = value.partition("-")
    return date == value if "-" not in value else low <= date <= (high or "99999999")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "empty.sqlite"
    database = Database(path)
    database.migrate()
    with database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return path


_numbers = itertools.count()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    before=EVENTS,
    after=EVENTS,
    asked=queries(),
    count_max=st.integers(1, 3),
    bytes_max=st.integers(1, 100),
    is_forgetful=st.booleans(),
)
def test_what_is_planned_is_what_matched_at_the_cut_off(
    empty: Path,
    before: list[Event],
    after: list[Event],
    asked: Matching,
    count_max: int,
    bytes_max: int,
    *,
    is_forgetful: bool,
) -> None:
    path = empty.with_name(f"{next(_numbers)}.sqlite")
    shutil.copy(empty, path)
    database = Database(path)
    try:
        index, operations = SqlIndex(database), SqlOperations(database)

        def planner() -> Planner:
            return Planner(index, SqlSearch(database), SqlQueryTags(database), operations, count_max, bytes_max)

        model = Model()
        model.apply(index, before)
        expected = model.matching(asked)
        counted = planner().dry_run(asked)
        decision = planner().decide(asked)
        id_ = operations.create(new_operation(source=decision.source, cutoff=decision.cutoff)).id
        operations.begin(id_)
        changes = iter(after)
        at_hand = planner()
        while not operations.get(id_).is_planned:
            model.apply(index, list(itertools.islice(changes, 5)))  # also before the first page
            at_hand = planner() if is_forgetful else at_hand
            assert at_hand.plan_page(id_, 1) is not None

        chunks = [operations.claim_chunk(id_, 1, number) for number in operations.runnable(id_, 10_000)]
        planned = [(row.identifier, row.size) for chunk in chunks if chunk for row in index.fetch(chunk.instance_ids)]
        assert sorted(planned) == sorted(expected.items())
        operation = operations.get(id_)
        assert (operation.total, operation.skipped, operation.bytes_total) == (len(planned), 0, sum(expected.values()))
        assert (counted.count, counted.bytes_total) == (operation.total, operation.bytes_total)
        assert counted.unmatched == ()
    finally:
        database.close()
        path.unlink()
