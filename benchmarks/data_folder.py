"""Make a data folder with many instances that costs little disk: hard links to a few contents, real index rows.

`python benchmarks/data_folder.py DATA_DIR COUNT SIZE_BYTES` prints what it made as a line of JSON. Every row has UIDs
of its own; the contents are real instances, whose own UIDs an export never looks at.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from xxhash import xxh3_64_intdigest

from dicom_depot.codec.part10 import read_header
from dicom_depot.config import Settings
from dicom_depot.domain.identifiers import InstanceRef, parse_uid
from dicom_depot.domain.instance import InstanceRecord
from dicom_depot.ports import BlobStore
from dicom_depot.testing.samples import make_uid, many_small
from dicom_depot.wiring import prepare_import

INSTANCES_PER_SERIES = 50
SERIES_PER_STUDY = 4
CONTENTS = 16
LINKS_OF_ONE_FILE = 20_000  # ext4 allows 65,000
KEYS_AT_ONCE = 50
ROWS_AT_ONCE = 5000


def fill(data_dir: Path, count: int, size_bytes: int) -> list[str]:
    """Fill a new data folder and return the identifiers of its studies."""
    settings = Settings(data_dir=data_dir)
    store, index = prepare_import(settings)()
    records = _records(store, settings.store_path, count, size_bytes)
    studies: dict[str, None] = {}
    while batch := list(itertools.islice(records, ROWS_AT_ONCE)):
        index.add(batch)
        studies.update((record.ref.study_uid, None) for record in batch)
    return list(studies)


def _records(store: BlobStore, folder: Path, count: int, size_bytes: int) -> Iterator[InstanceRecord]:
    samples = [sample.content for sample in many_small(CONTENTS, size_bytes)]
    templates = [
        InstanceRecord(
            read_header(io.BytesIO(content), len(content)),
            "",
            len(content),
            hashlib.sha256(content).digest(),
            xxh3_64_intdigest(content),
        )
        for content in samples
    ]
    originals = [""] * CONTENTS
    study = series = ""
    keys: list[str] = []
    for number in range(count):
        if number % INSTANCES_PER_SERIES == 0:
            series_number = number // INSTANCES_PER_SERIES
            series = make_uid("bench series", series_number)
            study = make_uid("bench study", series_number // SERIES_PER_STUDY)
        keys = keys or store.new_keys(KEYS_AT_ONCE)
        key = keys.pop()
        which, link_number = number % CONTENTS, number // CONTENTS
        if link_number % LINKS_OF_ONE_FILE == 0:
            store.put(key, (samples[which],))
            originals[which] = key
        else:
            _link(folder, originals[which], key)
        template = templates[which]
        ref = InstanceRef(parse_uid(study), parse_uid(series), parse_uid(make_uid("bench instance", number)))
        yield replace(template, header=replace(template.header, ref=ref), store_key=key)


def _link(folder: Path, original: str, key: str) -> None:
    try:
        os.link(folder / original, folder / key)
    except FileNotFoundError:
        (folder / key).parent.mkdir(mode=0o700)
        os.link(folder / original, folder / key)


def main() -> None:
    data_dir, count, size_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    studies = fill(data_dir, count, size_bytes)
    print(json.dumps({"studies": len(studies)}))


if __name__ == "__main__":
    main()
