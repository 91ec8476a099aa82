"""Stored instances for tests: made once, imported once, then copied for each test that changes something."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicom_depot.config import Settings
from dicom_depot.services.ingest import find_files, ingest
from dicom_depot.testing.samples import Sample
from dicom_depot.wiring import open_stores, prepare_import
from tests.support.service import run_command


@dataclass(frozen=True)
class Archive:
    """A data folder with imported instances. `contents` are the stored bytes by identifier, in order of import."""

    data_dir: Path
    contents: dict[str, bytes]

    @property
    def identifiers(self) -> list[str]:
        return list(self.contents)

    @functools.cached_property
    def settings(self) -> Settings:
        return Settings(data_dir=self.data_dir)

    def store_paths(self) -> dict[str, Path]:
        """Where the store keeps each live instance."""
        _, index = open_stores(self.settings)
        paths: dict[str, Path] = {}
        after = 0
        while entries := index.scan(after, 1000):
            after = entries[-1].instance_id
            paths |= {
                entry.identifier: self.settings.store_path / entry.store_key
                for entry in entries
                if not entry.is_deleted
            }
        return paths

    def damage(self, *, corrupt: Iterable[str] = (), missing: Iterable[str] = ()) -> None:
        """Change one byte of some stored objects, and remove others."""
        paths = self.store_paths()
        for identifier in corrupt:
            content = bytearray(paths[identifier].read_bytes())
            content[len(content) // 2] ^= 0xFF
            paths[identifier].unlink()  # not in place: copies of this archive share the file
            paths[identifier].write_bytes(content)
        for identifier in missing:
            paths[identifier].unlink()

    def copy_to(self, data_dir: Path) -> Archive:
        """A copy of its own databases; the immutable objects are hard links."""
        data_dir.mkdir(parents=True)
        shutil.copytree(self.data_dir / "store", data_dir / "store", copy_function=os.link)
        name = self.settings.database_path.name
        with (
            contextlib.closing(sqlite3.connect(self.data_dir / name)) as source,
            contextlib.closing(sqlite3.connect(data_dir / name)) as copy,
        ):
            source.backup(copy)
        return Archive(data_dir, self.contents)


def write_samples(folder: Path, samples: Iterable[Sample]) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    for sample in samples:
        path = folder / sample.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.content)
        contents[str(sample.ref)] = sample.content
    return contents


def import_by_command(root: Path, samples: Iterable[Sample]) -> Archive:
    """Import as a user does, in processes of its own."""
    contents = write_samples(root / "source", samples)
    run_command("import", str(root / "source"), data_dir=root / "data")
    return Archive(root / "data", contents)


def import_in_process(root: Path, samples: Iterable[Sample]) -> Archive:
    """The same import without a command's start."""
    contents = write_samples(root / "source", samples)
    summary = ingest(find_files([root / "source"]), prepare_import(Settings(data_dir=root / "data")), processes=0)
    assert summary.stored == len(contents), summary
    return Archive(root / "data", contents)


def read_folder(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden and temporary ones too, by its path relative to it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def instance_keys(operation_id: str, identifiers: Iterable[str]) -> dict[str, str]:
    """Identifier to the key that its copy has."""
    return {identifier: f"{operation_id}/results/{identifier}.dcm" for identifier in identifiers}


def log_lines(log: bytes) -> list[tuple[str, str]]:
    """(identifier, error) of each line: all but the time."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.splitlines()]
    assert log == b"" or log.endswith(b"\n")
    assert all(line.keys() == {"timestamp", "identifier", "error"} for line in lines)
    return [(line["identifier"], line["error"]) for line in lines]
