"""Retrieving what is stored (PS3.18 section 10.4): instances, frames and bulk data, as stored or transcoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from dicom_depot.codec import layout as layouts
from dicom_depot.codec.inflate import Inflater
from dicom_depot.codec.layout import PIXEL_PATHS, ByteRange, EncapsulatedFrames, Layout, NativeFrames, shifted
from dicom_depot.codec.transcode import can_decode
from dicom_depot.domain.errors import NotFound, NotTranscodable
from dicom_depot.domain.identifiers import InstanceRef, Ref
from dicom_depot.ports import BlobStore, InstanceCatalog, ResourceVersion, StoredInstance
from dicom_depot.services.metadata import MetadataReader
from dicom_depot.services.store_stream import open_stored
from dicom_depot.services.transcoding import Transcoding

IN_MEMORY_BYTES_MAX = 4 << 20
"""A larger object is read in blocks."""
BLOCK_BYTES = 1 << 20
_PAGE = 200
_INFLATE_BLOCK_BYTES = 256 << 10
_NATIVE_LITTLE = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"})


class Part(NamedTuple):
    """One body of an answer: how it is encoded, its size in bytes where that is known, and its bytes."""

    transfer_syntax_uid: str
    size: int | None
    blocks: Iterator[bytes]


@dataclass(slots=True)
class RetrieveService:
    """Safe for many threads. `transcode_bytes_max`: larger instances are sent as they are stored, or not at all."""

    catalog: InstanceCatalog
    store: BlobStore
    metadata: MetadataReader
    transcoding: Transcoding
    transcode_bytes_max: int

    def version_of(self, ref: Ref) -> ResourceVersion:
        """Raises NotFound when nothing is stored below `ref`."""
        return self.catalog.version_of(ref)

    def instance(self, ref: InstanceRef) -> StoredInstance:
        """Raises NotFound."""
        found, _ = self.catalog.instances(ref, None, 1)
        if not found:
            raise NotFound(f"There is no instance {ref}.", target="instance")
        return found[0]

    def instances(self, ref: Ref) -> Iterator[StoredInstance]:
        """All live instances below `ref`, a page at a time."""
        after = None
        while True:
            page, after = self.catalog.instances(ref, after, _PAGE)
            yield from page
            if after is None:
                return

    def require_transcodable(self, ref: Ref, target: str) -> None:
        """Refuse before anything is sent what cannot work for all. Raises NotTranscodable."""
        for syntax in self.catalog.transfer_syntaxes(ref):
            if syntax != target and not can_decode(syntax):
                raise NotTranscodable(
                    f"An instance is stored in {syntax}, which cannot be brought into {target}. Ask for "
                    "transfer-syntax=*.",
                    target="Accept",
                )

    def part(self, instance: StoredInstance, target: str | None) -> Part:
        """One instance as a Part 10 file; `target` None: as stored. Raises NotTranscodable, SourceFault."""
        if target is None or target == instance.transfer_syntax_uid:
            return Part(instance.transfer_syntax_uid, instance.size, self._blocks(instance.store_key, instance.size))
        content = self._transcoded(instance, target)
        return Part(target, len(content), iter((content,)))

    def range(self, instance: StoredInstance, wanted: ByteRange) -> Iterator[bytes]:
        """Bytes of the file as it is stored."""
        return self._ranges(instance.store_key, [wanted])

    def frames(self, instance: StoredInstance, numbers: Sequence[int], target: str | None) -> list[Part]:
        """Frames (numbers from 1); `target` None: as stored. Raises NotFound, NotTranscodable, SourceFault."""
        layout = layouts.unpack(self.metadata.of(instance).layout)
        if layout.frames is None:
            raise NotFound("This instance has no pixel data.", target="frames")
        is_native = isinstance(layout.frames, NativeFrames)
        is_as_wanted = target in (None, instance.transfer_syntax_uid) or (
            is_native and target in _NATIVE_LITTLE and instance.transfer_syntax_uid in _NATIVE_LITTLE
        )
        if not is_as_wanted or (is_native and not layout.is_little_endian):
            return self._transcoded_frames(instance, numbers, target or _NATIVE_DEFAULT)
        match layout.frames:
            case EncapsulatedFrames() as encapsulated:
                return [
                    Part(
                        instance.transfer_syntax_uid,
                        sum(each.length for each in encapsulated.ranges_of(number)),
                        self._read_ranges(instance, layout, encapsulated.ranges_of(number)),
                    )
                    for number in numbers
                ]
            case NativeFrames() as native:
                return [self._native_frame(instance, layout, native, number) for number in numbers]

    def bulk_data(self, instance: StoredInstance, path: str, target: str | None) -> list[Part]:
        """The value that metadata points at by `path`; pixel data comes frame by frame.

        Raises NotFound, NotTranscodable, SourceFault.
        """
        layout = layouts.unpack(self.metadata.of(instance).layout)
        found = layout.values.get(path)
        if path == PIXEL_PATHS[0] and isinstance(layout.frames, EncapsulatedFrames):
            numbers = range(1, len(layout.frames.fragments) + 1)
            return self.frames(instance, numbers, target)
        if found is None:
            raise NotFound("This instance has no bulk data at that path; metadata gives the paths.", target="bulkdata")
        vr, place = found
        blocks = self._read_ranges(instance, layout, [place])
        if not layout.is_little_endian and vr in _WORD_BYTES:  # PS3.18 section 8.7.3: bulk data is little endian
            blocks = _swapped(blocks, _WORD_BYTES[vr])
        return [Part(_NATIVE_DEFAULT, place.length, blocks)]

    def _native_frame(self, instance: StoredInstance, layout: Layout, native: NativeFrames, number: int) -> Part:
        place, shift = native.range_of(number)
        blocks = self._read_ranges(instance, layout, [place])
        if shift or native.bits % 8:
            content = shifted(b"".join(blocks), shift, native.bits)
            return Part(_NATIVE_DEFAULT, len(content), iter((content,)))
        return Part(_NATIVE_DEFAULT, place.length, blocks)

    def _transcoded(self, instance: StoredInstance, target: str) -> bytes:
        with _explained(target):
            return self.transcoding.transcode(self._content(instance), target)

    def _transcoded_frames(self, instance: StoredInstance, numbers: Sequence[int], target: str) -> list[Part]:
        with _explained(target):
            found = self.transcoding.frames(self._content(instance), numbers, target)
        return [Part(target, len(content), iter((content,))) for content in found]

    def _content(self, instance: StoredInstance) -> bytes:
        if instance.size > self.transcode_bytes_max:
            raise NotTranscodable(
                f"it has {instance.size} bytes, and at most {self.transcode_bytes_max} are transcoded "
                "(DICOM_DEPOT_TRANSCODE_BYTES_MAX)"
            )
        return self.store.read(instance.store_key, instance.size)

    def _blocks(self, key: str, size: int) -> Iterator[bytes]:
        if size <= IN_MEMORY_BYTES_MAX:
            return iter((self.store.read(key, size),))
        return self.store.stream(key, BLOCK_BYTES)

    def _read_ranges(self, instance: StoredInstance, layout: Layout, ranges: Sequence[ByteRange]) -> Iterator[bytes]:
        if layout.deflated_at is None:
            return self._ranges(instance.store_key, ranges)
        with open_stored(self.store, instance.store_key, instance.size) as stream:
            stream.seek(layout.deflated_at)
            return iter([_inflated_range(stream.read, place) for place in ranges])

    def _ranges(self, key: str, ranges: Sequence[ByteRange]) -> Iterator[bytes]:
        for place in ranges:
            position, end = place.offset, place.offset + place.length
            while position < end and (block := self.store.read_range(key, position, min(end - position, BLOCK_BYTES))):
                yield block
                position += len(block)


_NATIVE_DEFAULT = "1.2.840.10008.1.2.1"
_WORD_BYTES = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}


@contextmanager
def _explained(target: str) -> Iterator[None]:
    """Turn the reason why something cannot be transcoded into a message that says what to do."""
    try:
        yield
    except NotTranscodable as error:
        raise NotTranscodable(
            f"The instance cannot be sent in {target}: {error.message}. Ask for transfer-syntax=*.", target="Accept"
        ) from None


def _inflated_range(read: Callable[[int], bytes], wanted: ByteRange) -> bytes:
    """Bytes of a deflated data set; what lies before them is inflated and dropped."""
    inflater = Inflater(read)
    held, held_at = bytearray(), 0
    end = wanted.offset + wanted.length
    while held_at + len(held) < end and (block := inflater.next(_INFLATE_BLOCK_BYTES)):
        held += block
        if held_at < wanted.offset:
            surplus = min(len(held), wanted.offset - held_at)
            del held[:surplus]
            held_at += surplus
    return bytes(held[: wanted.length])


def _swapped(blocks: Iterator[bytes], word_bytes: int) -> Iterator[bytes]:
    """Big endian words as little endian ones."""
    rest = b""
    for block in blocks:
        content = rest + block
        whole = len(content) - len(content) % word_bytes
        rest = content[whole:]
        out = bytearray(whole)
        for byte in range(word_bytes):
            out[byte::word_bytes] = content[word_bytes - 1 - byte : whole : word_bytes]
        yield bytes(out)
    if rest:
        yield rest
