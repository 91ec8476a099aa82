"""Which instance a thumbnail shows, and that choosing it costs little, however much is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from dicom_depot.codec.layout import ByteRange, EncapsulatedFrames, Layout, NativeFrames, pack
from dicom_depot.codec.media_types import JPEG
from dicom_depot.codec.render_parameters import DEFAULT_THUMBNAIL, Rendition
from dicom_depot.domain.errors import FaultKind, NotFound, NotTranscodable, SourceFault
from dicom_depot.domain.identifiers import InstanceRef, Ref, SeriesRef, StudyRef, Uid
from dicom_depot.domain.instance import Metadata
from dicom_depot.ports import Cursor, ResourceVersion, StoredInstance
from dicom_depot.services.metadata import MetadataReader
from dicom_depot.services.rendering import LOOKED_AT_MAX, TRIES_MAX, RenderService, from_the_middle
from dicom_depot.services.retrieve import RetrieveService

WANTED = Rendition(JPEG, viewport=DEFAULT_THUMBNAIL)
STUDY = StudyRef(Uid("1"))
IMAGE = pack(Layout(frames=NativeFrames(ByteRange(0, 1), 8, 1)))
REPORT = pack(Layout())


@dataclass
class Archive:
    """A study in memory, in the places of the catalog, the store and the processes that render; it counts."""

    layouts: Mapping[tuple[int, int], bytes]
    """By the numbers of series and instance."""
    broken: Mapping[tuple[int, int], Exception] = field(default_factory=dict)
    syntax: str = "1.2.840.10008.1.2.1"
    looked_at: int = 0
    rendered: list[tuple[int, int, int]] = field(default_factory=list)
    """Series, instance and frame."""

    def __post_init__(self) -> None:
        self.stored = [
            StoredInstance(
                number,
                InstanceRef(Uid("1"), Uid(str(place[0])), Uid(str(place[1]))),
                f"{place[0]}/{place[1]}",
                10,
                self.syntax,
                number,
            )
            for number, place in enumerate(sorted(self.layouts))
        ]

    def _below(self, ref: Ref) -> list[StoredInstance]:
        if isinstance(ref, SeriesRef):
            return [each for each in self.stored if each.ref.series_uid == ref.series_uid]
        return [each for each in self.stored if ref in (STUDY, each.ref)]

    def version_of(self, ref: Ref) -> ResourceVersion:
        found = self._below(ref)
        if not found:
            raise NotFound("nothing")
        return ResourceVersion(1, len(found))

    def instances(self, ref: Ref, after: Cursor | None, limit: int) -> tuple[list[StoredInstance], Cursor | None]:
        found, begin = self._below(ref), after[0] if after else 0
        end = begin + limit
        return found[begin:end], (end, "") if end < len(found) else None

    def metadata(self, instance_ids: Sequence[int]) -> dict[int, Metadata]:
        self.looked_at += len(instance_ids)
        places = sorted(self.layouts)
        return {id_: Metadata(b"", self.layouts[places[id_]]) for id_ in instance_ids}

    def read(self, key: str, size: int | None = None) -> bytes:
        return key.encode()

    def render(self, content: bytes, number: int, rendition: Rendition) -> bytes:
        series, instance = map(int, content.split(b"/"))
        self.rendered.append((series, instance, number))
        if (series, instance) in self.broken:
            raise self.broken[series, instance]
        return content

    @property
    def service(self) -> RenderService:
        me: Any = self
        return RenderService(RetrieveService(me, me, MetadataReader(me, me), me, 1 << 20))


def test_the_middle_one_comes_first_then_its_neighbours() -> None:
    numbers: list[Any] = list(range(5))
    found: list[Any] = list(from_the_middle(numbers))
    assert found == [2, 1, 3, 0, 4]
    found = list(from_the_middle(numbers[:4]))
    assert found == [1, 0, 2, 3]
    assert not list(from_the_middle([]))


def test_a_series_shows_its_middle_instance() -> None:
    archive = Archive({(1, n): IMAGE for n in range(1, 6)})
    assert archive.service.thumbnail(SeriesRef(Uid("1"), Uid("1")), WANTED) == b"1/3"
    assert archive.looked_at == 1


@pytest.mark.parametrize(("count", "frame"), [(1, 1), (2, 1), (3, 2), (100, 50)])
def test_an_instance_shows_its_middle_frame(count: int, frame: int) -> None:
    native = pack(Layout(frames=NativeFrames(ByteRange(0, count), 8, count)))
    encapsulated = pack(Layout(frames=EncapsulatedFrames(((ByteRange(0, 1),),) * count)))
    for layout in (native, encapsulated):
        archive = Archive({(1, 1): layout})
        archive.service.thumbnail(STUDY, WANTED)
        assert archive.rendered == [(1, 1, frame)]


def test_frames_that_the_file_ends_before_are_not_counted() -> None:
    archive = Archive({(1, 1): pack(Layout(frames=NativeFrames(ByteRange(0, 3), 8, 100)))})
    archive.service.thumbnail(STUDY, WANTED)
    assert archive.rendered == [(1, 1, 2)]


def test_series_without_images_are_passed_over() -> None:
    archive = Archive({(1, n): REPORT for n in range(50)} | {(2, n): IMAGE for n in range(1, 4)})
    assert archive.service.thumbnail(STUDY, WANTED) == b"2/2"
    assert archive.looked_at == 4
    with pytest.raises(NotFound, match="pixel data"):
        archive.service.thumbnail(SeriesRef(Uid("1"), Uid("1")), WANTED)


def test_broken_ones_are_passed_over_and_the_first_says_why_when_all_are() -> None:
    reasons: dict[tuple[int, int], Exception] = {
        (1, 2): NotTranscodable("the first"),
        (1, 1): SourceFault("ObjectMissing", "the second", FaultKind.INSTANCE),
    }
    archive = Archive({(1, n): IMAGE for n in range(1, 4)}, reasons)
    assert archive.service.thumbnail(STUDY, WANTED) == b"1/3"
    archive.broken = reasons | {(1, 3): NotTranscodable("the third")}
    with pytest.raises(NotTranscodable, match="the first"):
        archive.service.thumbnail(STUDY, WANTED)


def test_a_store_that_is_away_is_not_taken_for_a_broken_instance() -> None:
    away = SourceFault("StoreAway", "later", FaultKind.TRANSIENT)
    archive = Archive({(1, n): IMAGE for n in range(1, 4)}, {(1, 2): away})
    with pytest.raises(SourceFault):
        archive.service.thumbnail(STUDY, WANTED)
    assert len(archive.rendered) == 1


def test_thousands_of_broken_instances_cost_a_few_tries() -> None:
    places = [(series, n) for series in range(1, 101) for n in range(100)]
    archive = Archive(dict.fromkeys(places, IMAGE), dict.fromkeys(places, NotTranscodable("broken")))
    for ref in (STUDY, SeriesRef(Uid("1"), Uid("7"))):
        archive.rendered.clear()
        with pytest.raises(NotTranscodable):
            archive.service.thumbnail(ref, WANTED)
        assert len(archive.rendered) == TRIES_MAX


def test_thousands_of_reports_are_not_all_looked_at() -> None:
    archive = Archive({(series, n): REPORT for series in range(1, 501) for n in range(10)})
    with pytest.raises(NotFound):
        archive.service.thumbnail(STUDY, WANTED)
    assert archive.looked_at == LOOKED_AT_MAX


def test_video_is_refused_unread() -> None:
    archive = Archive({(1, 1): IMAGE}, syntax="1.2.840.10008.1.2.4.102")
    with pytest.raises(NotTranscodable, match=r"1\.2\.840\.10008\.1\.2\.4\.102"):
        archive.service.thumbnail(STUDY, WANTED)
    assert not archive.rendered
