"""What the index holds of every real file: the same from its header and from its metadata, before and after deletes."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.codec.dicom_json import ReadInstance, read_instance
from dicom_depot.codec.layout import unpack
from dicom_depot.codec.search_values import columns_of, loads
from dicom_depot.domain.errors import BrokenInstance, NotDicom
from dicom_depot.domain.identifiers import InstanceRef
from dicom_depot.domain.instance import InstanceRecord
from dicom_depot.domain.matching import column_form, folded_name, values_apart
from dicom_depot.domain.search import ATTRIBUTES, Level
from tests.support.search_place import index_rows, place

_keys = itertools.count()


def readable(corpus: Path) -> Iterator[tuple[Path, bytes, ReadInstance]]:
    for path in sorted(path for path in corpus.rglob("*") if path.is_file() and path.name != "index.csv"):
        content = path.read_bytes()
        try:
            yield path, content, read_instance(io.BytesIO(content), len(content))
        except (NotDicom, BrokenInstance):
            continue


@pytest.fixture(scope="module")
def files(corpus: Path) -> list[tuple[Path, bytes, ReadInstance]]:
    found = list(readable(corpus))
    assert len(found) > 250
    return found


def test_metadata_gives_the_columns_that_the_header_gives(files: list[tuple[Path, bytes, ReadInstance]]) -> None:
    compared = 0
    for path, _, read in files:
        told = columns_of(loads(read.metadata.dicom_json))
        for attribute in ATTRIBUTES:
            header, metadata = read.header.attributes[attribute.column], told[attribute.column]
            if attribute.vr == "PN":  # padding of component groups is no part of a name
                header, metadata = (each and folded_name(str(each)) for each in (header, metadata))
            if header is not None and metadata is None and not unpack(read.metadata.layout).is_complete:
                continue  # the walk stopped at what does not make sense; the header was looked for behind it
            assert column_form(attribute, header) == column_form(attribute, metadata), (path, attribute.keyword)
            compared += header is not None
        for level in Level:
            assert set(values_apart(level, read.header.attributes)) == set(values_apart(level, told)), path
    assert compared > 2000


def test_after_deletes_the_index_says_what_a_new_one_would(files: list[tuple[Path, bytes, ReadInstance]]) -> None:
    records = [
        InstanceRecord(
            read.header, f"key/{next(_keys)}", len(content), hashlib.sha256(content).digest(), 7, metadata=read.metadata
        )
        for _, content, read in files
    ]
    Random(7).shuffle(records)
    with place() as here, place() as fresh:
        index, other = SqlIndex(here.database), SqlIndex(fresh.database)
        index.add(records)
        live: dict[InstanceRef, InstanceRecord] = {}
        for record in records:
            live.setdefault(record.ref, record)  # of several files of an instance the first one is stored
        for ref in Random(8).sample(sorted(live, key=str), len(live) // 2):
            assert index.delete(ref) == 1
            del live[ref]
        other.add(list(live.values()))
        rows = index_rows(here.database)
        assert rows == index_rows(fresh.database)
        assert len(rows) > 60
