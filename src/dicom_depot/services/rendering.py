"""Rendered frames (PS3.18 section 10.4.1.1.2) and thumbnails, and which frame a thumbnail shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dicom_depot.codec import layout as layouts
from dicom_depot.codec.layout import NativeFrames
from dicom_depot.codec.render_parameters import Rendition
from dicom_depot.codec.transcode import can_decode
from dicom_depot.domain.errors import DepotError, FaultKind, NotFound, NotTranscodable, SourceFault
from dicom_depot.domain.identifiers import InstanceRef, Ref, StudyRef
from dicom_depot.ports import StoredInstance
from dicom_depot.services.retrieve import RetrieveService

TRIES_MAX = 4
"""How many instances a thumbnail tries to render, when one after the other cannot be."""

LOOKED_AT_MAX = 100
"""How many instances it asks the index about, for one that has frames."""

LISTED_MAX = 20_000
"""How many rows of the index it reads to find the middle of a series, and the series of a study."""

_OF_SERIES_MAX = 3
"""How many instances of one series are looked at, when the thumbnail is a study's: most series are of one kind."""


@dataclass(frozen=True, slots=True)
class RenderService:
    """Safe for many threads. Instances over the limit of transcoding are not rendered."""

    retrieval: RetrieveService

    def frame(self, ref: InstanceRef, number: int, rendition: Rendition) -> bytes:
        """Frame `number`, from 1. Raises NotFound, NotTranscodable, InvalidRequest, SourceFault."""
        return self._render(self.retrieval.instance(ref), number, rendition)

    def thumbnail(self, ref: Ref, rendition: Rendition) -> bytes:
        """A picture of what lies below `ref`: the middle frame of the middle instance that can be rendered, of the
        first series that has any.

        Raises NotFound when nothing is stored there, or nothing with pixel data; NotTranscodable and SourceFault as
        the first instance that was tried.
        """
        self.retrieval.version_of(ref)
        refusal: DepotError | None = None
        tries = 0
        for instance in itertools.islice(self._candidates(ref), LOOKED_AT_MAX):
            count = self._frame_count(instance)
            if not count:
                continue
            try:
                return self._render(instance, (count + 1) // 2, rendition)
            except (NotTranscodable, NotFound, SourceFault) as error:
                if isinstance(error, SourceFault) and error.kind is FaultKind.TRANSIENT:
                    raise
                refusal = refusal or error
                tries += 1
                if tries == TRIES_MAX:
                    break
        raise refusal or NotFound("Nothing here has pixel data that a thumbnail could show.", target="thumbnail")

    def _candidates(self, ref: Ref) -> Iterator[StoredInstance]:
        """The instances in the order in which a thumbnail tries them."""
        if isinstance(ref, InstanceRef):
            yield self.retrieval.instance(ref)
            return
        listed = itertools.islice(self.retrieval.instances(ref), LISTED_MAX)
        most = _OF_SERIES_MAX if isinstance(ref, StudyRef) else None
        for _, instances in itertools.groupby(listed, key=lambda instance: instance.ref.series_uid):
            yield from itertools.islice(from_the_middle(list(instances)), most)

    def _frame_count(self, instance: StoredInstance) -> int:
        frames = layouts.unpack(self.retrieval.metadata.of(instance).layout).frames
        if frames is None:
            return 0
        return frames.available if isinstance(frames, NativeFrames) else len(frames.fragments)

    def _render(self, instance: StoredInstance, number: int, rendition: Rendition) -> bytes:
        try:
            if not can_decode(instance.transfer_syntax_uid):  # video, for one, need not be read to know that
                raise NotTranscodable(f"there is no decoder for {instance.transfer_syntax_uid}")
            if instance.size > self.retrieval.transcode_bytes_max:
                raise NotTranscodable(
                    f"it has {instance.size} bytes, and at most {self.retrieval.transcode_bytes_max} are rendered "
                    "(DICOM_DEPOT_TRANSCODE_BYTES_MAX)"
                )
            content = self.retrieval.store.read(instance.store_key, instance.size)
            return self.retrieval.transcoding.render(content, number, rendition)
        except NotTranscodable as error:
            raise NotTranscodable(
                f"The instance cannot be rendered: {error.message}. Retrieve it as it is stored, with "
                "transfer-syntax=*, to show it by other means."
            ) from None


def from_the_middle(instances: Sequence[StoredInstance]) -> Iterator[StoredInstance]:
    """The middle one, then those before and behind it in turns."""
    middle = (len(instances) - 1) // 2
    for distance in range(len(instances)):
        for place in dict.fromkeys((middle - distance, middle + distance)):
            if 0 <= place < len(instances):
                yield instances[place]
