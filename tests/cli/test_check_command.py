"""`dicom-depot check`: what it finds, what it repairs, and what it leaves alone."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicom_depot.domain.errors import FaultKind, SourceFault
from dicom_depot.domain.instance import InstanceHeader, InstanceRecord
from dicom_depot.ports import StoreEntry
from dicom_depot.services.check import Check, CheckProblem, ProblemKind
from dicom_depot.testing.memory import MemoryBlobStore, MemoryIndex
from dicom_depot.testing.samples import Sample, many_small
from tests.cli.conftest import SAMPLES, Depot, Invoke

HOUR = 3600
ORPHAN_KEY = "abc/0123456789abcdef0123456789abcdef"
LEFTOVER_KEY = "abc/.fedcba9876543210fedcba9876543210.part"


def object_paths(data_dir: Path) -> list[Path]:
    """The store's objects, in the order of the instances."""
    with sqlite3.connect(data_dir / "depot.sqlite") as database:
        keys = [key for (key,) in database.execute("SELECT store_key FROM instances ORDER BY id")]
    return [data_dir / "store" / key for key in keys]


def place(data_dir: Path, key: str, age_seconds: float) -> Path:
    """An object that no row points at."""
    path = data_dir / "store" / key
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x" * 100)
    os.utime(path, times=(time.time() - age_seconds, time.time() - age_seconds))
    return path


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_sound_folder_exits_with_0(invoke: Invoke, data_dir: Path) -> None:
    result = invoke("check", data_dir=data_dir)
    assert result.exit_code == 0, result.output
    assert "Index and store agree." in result.stdout
    assert f"{len(SAMPLES)} instances" in result.stdout
    found = json.loads(invoke("check", "--json", "--no-checksums", data_dir=data_dir).stdout)
    assert (found["instances"], found["objects"], found["remaining"]) == (len(SAMPLES), len(SAMPLES), 0)
    assert found["bytes"] == sum(len(sample.content) for sample in SAMPLES)


def test_every_kind_of_problem_is_found_and_named(invoke: Invoke, data_dir: Path, tmp_path: Path) -> None:
    missing, short, damaged, *_ = object_paths(data_dir)
    missing.unlink()
    short.write_bytes(short.read_bytes()[:-1])
    corrupt(damaged)
    place(data_dir, ORPHAN_KEY, 2 * HOUR)
    place(data_dir, LEFTOVER_KEY, 2 * HOUR)
    errors = tmp_path / "problems.jsonl"
    result = invoke("check", "--json", "--errors", str(errors), data_dir=data_dir)
    assert result.exit_code == 3, result.output
    found = json.loads(result.stdout)
    assert found["found"] == {
        "missing": 1,
        "wrongSize": 1,
        "wrongChecksum": 1,
        "unreadable": 0,
        "orphan": 1,
        "leftover": 1,
    }
    by_kind = {problem["kind"]: problem for problem in found["problems"]}
    assert {by_kind[kind]["identifier"] for kind in ("missing", "wrongSize", "wrongChecksum")} == {
        str(sample.ref) for sample in SAMPLES[:3]
    }
    assert by_kind["missing"]["storeKey"] == str(missing.relative_to(data_dir / "store"))
    assert by_kind["orphan"]["storeKey"] == ORPHAN_KEY
    assert by_kind["leftover"]["storeKey"] == LEFTOVER_KEY
    assert [json.loads(line) for line in errors.read_text().splitlines()] == found["problems"]
    for_people = invoke("check", data_dir=data_dir).stdout
    assert str(SAMPLES[0].ref) in for_people
    assert "from a backup" in for_people
    assert "--repair removes them" in for_people


def test_without_checksums_sizes_are_still_compared(invoke: Invoke, data_dir: Path) -> None:
    missing, short, damaged, *_ = object_paths(data_dir)
    missing.unlink()
    short.write_bytes(b"")
    corrupt(damaged)
    found = json.loads(invoke("check", "--json", "--no-checksums", data_dir=data_dir).stdout)["found"]
    assert (found["missing"], found["wrongSize"], found["wrongChecksum"]) == (1, 1, 0)


def test_repair_removes_what_no_row_points_at_and_nothing_else(invoke: Invoke, data_dir: Path) -> None:
    objects = {path: path.read_bytes() for path in object_paths(data_dir)}
    removed = [place(data_dir, ORPHAN_KEY, 2 * HOUR), place(data_dir, LEFTOVER_KEY, 2 * HOUR)]
    result = invoke("check", "--repair", data_dir=data_dir)
    assert result.exit_code == 0, result.output
    assert "Removed objects that no instance points at: 2." in result.stdout
    assert not any(path.exists() for path in removed)
    assert {path: path.read_bytes() for path in object_paths(data_dir)} == objects
    assert invoke("check", data_dir=data_dir).exit_code == 0


def test_repair_leaves_damaged_instances_and_their_rows(invoke: Invoke, data_dir: Path) -> None:
    missing, damaged, *_ = before = object_paths(data_dir)
    missing.unlink()
    corrupt(damaged)
    assert invoke("check", "--repair", data_dir=data_dir).exit_code == 3
    assert object_paths(data_dir) == before
    assert damaged.exists()


def test_what_is_young_may_belong_to_an_import_and_stays(invoke: Invoke, data_dir: Path) -> None:
    young = [place(data_dir, ORPHAN_KEY, HOUR - 60), place(data_dir, LEFTOVER_KEY, 0)]
    result = invoke("check", "--repair", data_dir=data_dir)
    assert result.exit_code == 0, result.output
    assert "as an import may be at work: 2." in result.stdout
    assert all(path.exists() for path in young)
    result = invoke("check", "--repair", "--older-than", "1800", data_dir=data_dir)
    assert [path.exists() for path in young] == [False, True]


def test_a_store_that_is_away_is_no_proof_that_everything_is_missing(invoke: Invoke, data_dir: Path) -> None:
    (data_dir / "store").rename(data_dir / "unmounted")
    result = invoke("check", "--repair", data_dir=data_dir)
    assert result.exit_code == 4
    assert "Is its disk mounted?" in result.stderr
    assert "missing" not in result.output


def test_a_folder_without_a_database_is_told_and_not_created(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("check", data_dir=tmp_path / "wrong")
    assert result.exit_code == 4
    assert "DICOM_DEPOT_DATA_DIR" in result.stderr
    assert not (tmp_path / "wrong").exists()


def test_a_check_may_run_beside_the_service_and_a_repair_may_not(
    invoke: Invoke, depot: Depot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicom_depot.adapters.folder_lock._WAIT_SECONDS", 0.1)
    assert invoke("check", data_dir=depot.service.data_dir).exit_code == 0
    result = invoke("check", "--repair", data_dir=depot.service.data_dir)
    assert result.exit_code == 4
    assert "is in use by process" in result.stderr


# The rules, with doubles that change while a check looks at them


def record_of(sample: Sample, key: str) -> InstanceRecord:
    header = InstanceHeader(sample.ref, "1.2", "1.2.840.10008.1.2.1", {})
    return InstanceRecord(header, key, len(sample.content), hashlib.sha256(sample.content).digest(), 0)


def fill(index: MemoryIndex, store: MemoryBlobStore, count: int) -> list[str]:
    keys = store.new_keys(count)
    for sample, key in zip(many_small(count), keys, strict=True):
        store.put(key, [sample.content])
        index.add([record_of(sample, key)])
    return keys


def run(index: MemoryIndex, store: MemoryBlobStore, scratch: Path, *, repair: bool = False) -> list[CheckProblem]:
    problems: list[CheckProblem] = []
    # Older than -60 seconds: nothing counts as young.
    Check(index, store, scratch, repair=repair, older_than_seconds=-60, on_problem=problems.append).run()
    return problems


def test_an_import_that_commits_between_the_two_lists_is_no_problem(tmp_path: Path) -> None:
    index, store = MemoryIndex(), MemoryBlobStore()
    fill(index, store, 3)
    late, later = list(many_small(2, seed=1))
    [late_key, later_key] = store.new_keys(2)

    class Growing(MemoryBlobStore):
        def entries(self) -> Iterator[StoreEntry]:
            store.put(late_key, [late.content])  # listed without its row
            yield from store.entries()
            index.add([record_of(late, late_key)])
            store.put(later_key, [later.content])  # not listed, but its row will be
            index.add([record_of(later, later_key)])

        def stream(self, key: str, block_bytes: int) -> Iterator[bytes]:
            return store.stream(key, block_bytes)

    assert run(index, Growing(), tmp_path) == []


def test_a_row_that_comes_after_the_index_was_listed_saves_its_object_from_repair(tmp_path: Path) -> None:
    store = MemoryBlobStore()
    (late,) = many_small(1, seed=1)
    [late_key] = store.new_keys(1)
    store.put(late_key, [late.content])

    class Growing(MemoryIndex):
        calls = 0

        def scan(self, after: int, limit: int) -> list:  # type: ignore[type-arg]
            self.calls += 1
            rows = super().scan(after, limit)
            if not rows and self.calls <= 2:
                self.add([record_of(late, late_key)])
            return rows

    assert run(Growing(), store, tmp_path, repair=True) == []
    assert store.read(late_key) == late.content


def test_deleted_instances_are_no_problem_whether_their_bytes_are_swept_or_not(tmp_path: Path) -> None:
    index, store = MemoryIndex(), MemoryBlobStore()
    keys = fill(index, store, 3)
    for sample in list(many_small(3))[:2]:
        index.delete(sample.ref)
    store.delete(keys[0])
    assert run(index, store, tmp_path, repair=True) == []
    assert store.read(keys[1])


def test_a_store_that_goes_away_half_way_ends_the_check(tmp_path: Path) -> None:
    index = MemoryIndex()

    class Unplugged(MemoryBlobStore):
        def stream(self, key: str, block_bytes: int) -> Iterator[bytes]:
            raise SourceFault("SourceUnavailable", "away", FaultKind.TRANSIENT)

    store = Unplugged()
    fill(index, store, 3)
    with pytest.raises(SourceFault):
        run(index, store, tmp_path)


def test_many_instances_are_joined_through_scratch_files_that_vanish(tmp_path: Path) -> None:
    index, store = MemoryIndex(), MemoryBlobStore()
    keys = [key for _ in range(20) for key in fill_more(index, store)]
    del store.objects[keys[777]]
    problems = run(index, store, tmp_path)
    assert [(problem.kind, problem.store_key) for problem in problems] == [(ProblemKind.MISSING, keys[777])]
    assert list(tmp_path.iterdir()) == []


def fill_more(index: MemoryIndex, store: MemoryBlobStore) -> list[str]:
    keys = store.new_keys(300)
    records = [record_of(sample, key) for sample, key in zip(many_small(300, seed=index.sequence()), keys, strict=True)]
    for sample, key in zip(many_small(300, seed=index.sequence()), keys, strict=True):
        store.put(key, [sample.content])
    index.add(records)
    return keys
