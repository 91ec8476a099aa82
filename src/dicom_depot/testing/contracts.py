"""The promises of `ports`, as tests that every adapter inherits. No pytest here, no adapter, no fixture.

Stores and destinations are here; `index_contract`, `operations_contract` and `chunks_contract` have the rest.

A subclass whose name begins with `Test` provides the hooks (those that raise NotImplementedError); each
`test_...` method then states one promise. A hook is never optional: a promise that a backend cannot break is
shown not to break.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from random import Random
from typing import Generic, TypeVar

from dicom_depot.domain.errors import DestinationFault, FaultKind, SourceFault
from dicom_depot.ports import BlobStore, Destination, LogOutdated

StoreT = TypeVar("StoreT", bound=BlobStore)
DestinationT = TypeVar("DestinationT", bound=Destination)

_THREADS = 8
_PUTS_EACH = 200


class BlobStoreContract(Generic[StoreT]):
    """What every BlobStore keeps."""

    def make_store(self) -> StoreT:
        """An empty store of its own for the test that asks."""
        raise NotImplementedError

    def take_away(self, store: StoreT) -> None:
        """Make the store unreachable, as an unmounted disk or a cut network does."""
        raise NotImplementedError

    def leave_leftover(self, store: StoreT) -> str | None:
        """Leave what a killed `put` leaves, and return its key; None where nobody could see it."""
        raise NotImplementedError

    def test_new_keys_are_distinct_and_never_given_twice(self) -> None:
        store = self.make_store()
        keys = [*store.new_keys(500), *store.new_keys(500), *self.make_store().new_keys(500)]
        assert len(set(keys)) == 1500
        assert store.new_keys(0) == []

    def test_what_was_put_is_read_back(self) -> None:
        store = self.make_store()
        contents = [b"", b"x", _content(1, 70_000), _content(2, 3_000_000)]
        keys = store.new_keys(len(contents))
        for key, content in zip(keys, contents, strict=True):
            store.put(key, [content])
        store.make_durable(keys)
        assert [store.read(key) for key in keys] == contents

    def test_blocks_are_joined_in_order_and_empty_ones_do_no_harm(self) -> None:
        store = self.make_store()
        [key] = store.new_keys(1)
        store.put(key, iter([b"", b"first ", b"", b"second", b""]))
        assert store.read(key) == b"first second"

    def test_no_block_at_all_is_an_empty_object(self) -> None:
        store = self.make_store()
        [key] = store.new_keys(1)
        store.put(key, [])
        assert store.read(key) == b""

    def test_a_stream_has_all_bytes_in_blocks_of_the_size_asked_for(self) -> None:
        store = self.make_store()
        content = _content(3, 1_000_003)
        [key] = store.new_keys(1)
        store.put(key, [content])
        blocks = [bytes(block) for block in store.stream(key, 65_536)]
        assert b"".join(blocks) == content
        assert all(0 < len(block) <= 65_536 for block in blocks)

    def test_a_stream_may_be_left_half_way(self) -> None:
        store = self.make_store()
        [key] = store.new_keys(1)
        store.put(key, [_content(4, 300_000)])
        for _ in range(20):
            assert next(iter(store.stream(key, 1000)))
        store.delete(key)

    def test_a_put_whose_blocks_raise_leaves_nothing_and_raises_the_same(self) -> None:
        store = self.make_store()
        for error in (ValueError("broken"), OSError("broken"), KeyboardInterrupt()):
            [key] = store.new_keys(1)
            with _raises(type(error)) as caught:
                store.put(key, _failing(error, after=[_content(5, 200_000)]))
            assert caught[0] is error
            _assert_missing(store, key)
        assert list(store.entries()) == []

    def test_nothing_is_visible_before_the_last_block(self) -> None:
        store = self.make_store()
        [key, other] = store.new_keys(2)
        store.put(other, [b"other"])

        def blocks() -> Iterator[bytes]:
            yield _content(6, 100_000)
            _assert_missing(store, key)
            yield b"end"

        store.put(key, blocks())
        assert store.read(key).endswith(b"end")

    def test_a_missing_object_is_a_fault_of_that_instance_only(self) -> None:
        store = self.make_store()
        [key, missing] = store.new_keys(2)
        store.put(key, [b"here"])
        _assert_missing(store, missing)
        assert store.read(key) == b"here"

    def test_a_store_that_is_away_is_a_transient_fault_and_never_a_missing_object(self) -> None:
        store = self.make_store()
        [key] = store.new_keys(1)
        store.put(key, [b"here"])
        self.take_away(store)
        attempts: list[Callable[[], object]] = [
            lambda: store.read(key),
            lambda: list(store.stream(key, 1000)),
            lambda: store.read_range(key, 0, 4),
            lambda: store.put(store.new_keys(1)[0], [b"new"]),
            lambda: store.writer(store.new_keys(1)[0]),
            lambda: store.make_durable([key]),
            lambda: store.delete(key),
            lambda: list(store.entries()),
        ]
        for attempt in attempts:
            with _raises(SourceFault) as caught:
                attempt()
            assert caught[0].kind is FaultKind.TRANSIENT, caught[0]
            assert caught[0].side == "source"

    def test_a_range_is_the_bytes_from_its_offset_on_cut_where_the_object_ends(self) -> None:
        store = self.make_store()
        for content in (b"", b"x", _content(12, 1000), _content(13, 3_000_001)):
            [key] = store.new_keys(1)
            store.put(key, [content])
            end = len(content)
            edges = sorted({0, 1, end // 2, max(0, end - 1), end, end + 1, end + 70_000})
            for offset in edges:
                for length in edges:
                    found = store.read_range(key, offset, length)
                    assert found == content[offset : offset + length], (end, offset, length)

    def test_a_writers_object_is_absent_until_it_is_closed_and_whole_from_then_on(self) -> None:
        store = self.make_store()
        [key, empty, other] = store.new_keys(3)
        store.put(other, [b"other"])
        blocks = [b"", b"a", _content(14, 70_000), b"", _content(15, 2_000_000), b"b"]
        writer = store.writer(key)
        for block in blocks:
            _assert_missing(store, key)
            writer.write(block)
        _assert_missing(store, key)
        writer.close()
        store.writer(empty).close()
        store.make_durable([key, empty])
        assert store.read(key) == b"".join(blocks)
        assert store.read(empty) == b""
        sizes = {entry.key: entry.size for entry in store.entries()}
        assert sizes == {key: sum(map(len, blocks)), empty: 0, other: 5}

    def test_an_abandoned_writer_leaves_nothing_and_may_be_abandoned_again(self) -> None:
        store = self.make_store()
        [kept] = store.new_keys(1)
        store.put(kept, [b"kept"])
        for blocks in ([], [b""], [b"small"], [_content(16, 2_000_000), b"end"]):
            [key] = store.new_keys(1)
            writer = store.writer(key)
            for block in blocks:
                writer.write(block)
            for _ in range(3):
                writer.abandon()
                _assert_missing(store, key)
            assert [entry.key for entry in store.entries()] == [kept]
            store.put(key, [b"put instead"])
            writer.abandon()
            assert store.read(key) == b"put instead"
            store.delete(key)

    def test_to_abandon_a_writer_does_not_undo_its_close(self) -> None:
        store = self.make_store()
        [key] = store.new_keys(1)
        writer = store.writer(key)
        writer.write(b"content")
        writer.close()
        for _ in range(2):
            writer.abandon()
        assert store.read(key) == b"content"
        assert [entry.key for entry in store.entries()] == [key]

    def test_a_writer_whose_store_went_away_says_so_and_can_still_be_abandoned(self) -> None:
        store = self.make_store()
        abandoned, closed = (store.writer(key) for key in store.new_keys(2))
        self.take_away(store)
        with _raises(SourceFault) as caught:
            closed.write(b"begun")
            closed.close()
        assert caught[0].kind is FaultKind.TRANSIENT, caught[0]
        for writer in (closed, abandoned):
            for _ in range(2):
                writer.abandon()

    def test_many_writers_are_open_at_once(self) -> None:
        store = self.make_store()

        def work(seed: int) -> dict[str, bytes]:
            keys = store.new_keys(30)
            writers = [store.writer(key) for key in keys]
            for part in range(3):
                for key, writer in zip(keys, writers, strict=True):
                    writer.write(f"{key} {part};".encode())
            for number, writer in enumerate(writers):
                if number % 3 == seed % 3:
                    writer.abandon()
                else:
                    writer.close()
            return {
                key: "".join(f"{key} {part};" for part in range(3)).encode()
                for number, key in enumerate(keys)
                if number % 3 != seed % 3
            }

        expected: dict[str, bytes] = {}
        with ThreadPoolExecutor(_THREADS) as pool:
            for written in pool.map(work, range(_THREADS)):
                expected |= written
        assert {entry.key for entry in store.entries()} == expected.keys()
        assert all(store.read(key) == content for key, content in expected.items())

    def test_delete_removes_one_object_and_may_be_repeated(self) -> None:
        store = self.make_store()
        keys = store.new_keys(2)
        for key in keys:
            store.put(key, [b"content"])
        store.delete(keys[0])
        store.delete(keys[0])
        _assert_missing(store, keys[0])
        assert store.read(keys[1]) == b"content"

    def test_make_durable_may_be_repeated_and_takes_keys_from_everywhere(self) -> None:
        store = self.make_store()
        keys = [key for _ in range(10) for key in store.new_keys(10)]
        for key in keys:
            store.put(key, [key.encode()])
        store.make_durable([])
        store.make_durable(keys)
        store.make_durable([*keys, *keys])
        assert [store.read(key) for key in keys] == [key.encode() for key in keys]

    def test_entries_lists_each_object_with_size_and_time(self) -> None:
        started_at = time.time()
        store = self.make_store()
        assert list(store.entries()) == []
        keys = [key for _ in range(5) for key in store.new_keys(3)]
        for number, key in enumerate(keys):
            store.put(key, [b"x" * number])
        entries = list(store.entries())
        assert {entry.key: entry.size for entry in entries} == {key: number for number, key in enumerate(keys)}
        assert len(entries) == len(keys)
        assert all(started_at - 60 < entry.modified_at < time.time() + 60 for entry in entries)

    def test_entries_lists_leftovers_which_can_be_deleted(self) -> None:
        store = self.make_store()
        [key] = store.new_keys(1)
        store.put(key, [b"whole"])
        leftover = self.leave_leftover(store)
        expected = {key} if leftover is None else {key, leftover}
        assert {entry.key for entry in store.entries()} == expected
        if leftover is not None:
            store.delete(leftover)
        assert [entry.key for entry in store.entries()] == [key]

    def test_free_bytes_is_a_number_or_unknown(self) -> None:
        free = self.make_store().free_bytes()
        assert free is None or free > 0

    def test_many_threads_put_read_and_delete_at_once(self) -> None:
        store = self.make_store()

        def work(seed: int) -> set[str]:
            kept = set()
            for key in store.new_keys(_PUTS_EACH):
                content = key.encode() * 50
                store.put(key, [content])
                assert store.read(key) == content
                if int(key[-1], 16) % 4 == seed % 4:
                    store.delete(key)
                else:
                    kept.add(key)
            store.make_durable(sorted(kept)[:20])
            return kept

        with ThreadPoolExecutor(_THREADS) as pool:
            kept = set().union(*pool.map(work, range(_THREADS)))
        assert {entry.key for entry in store.entries()} == kept


class DestinationContract(Generic[DestinationT]):
    """What every Destination keeps."""

    puts_each = _PUTS_EACH
    """Puts of each thread in the test with many threads; fewer where each takes long."""

    def make_destination(self) -> DestinationT:
        """A destination of its own, with nothing below it, for the test that asks."""
        raise NotImplementedError

    def reopen(self, destination: DestinationT) -> DestinationT:
        """A second Destination for the same place, as another process would open it."""
        raise NotImplementedError

    def read_back(self, destination: DestinationT, key: str) -> bytes | None:
        """The bytes at `key`, by other means than the destination's; None when there is nothing."""
        raise NotImplementedError

    def keys(self, destination: DestinationT) -> set[str]:
        """Every object that anybody sees below the destination, hidden and temporary ones too."""
        raise NotImplementedError

    def test_what_was_put_is_there(self) -> None:
        destination = self.make_destination()
        contents = {
            "op/results/1.2/3.4/5.6.dcm": _content(1, 50_000),
            "op/results/1.2/3.4/5.7.dcm": b"x",
            "op/results/1.2/3.5/5.8.dcm": b"",
            "other/results/1.3/3.6/5.9.dcm": _content(2, 3_000_000),
        }
        for key, content in contents.items():
            destination.put(key, content)
        destination.flush(list(contents))
        assert {key: self.read_back(destination, key) for key in contents} == contents
        assert self.keys(destination) == set(contents)

    def test_put_again_replaces_and_leaves_nothing_else(self) -> None:
        destination = self.make_destination()
        for content in (b"first", b"first", b"", _content(3, 2_500_000), b"last"):
            destination.put(_KEY, content)
            assert self.read_back(destination, _KEY) == content
        self.reopen(destination).put(_KEY, b"from another process")
        assert self.read_back(destination, _KEY) == b"from another process"
        assert self.keys(destination) == {_KEY}

    def test_a_stream_is_put_whole_and_replaces(self) -> None:
        destination = self.make_destination()
        content = _content(4, 5_000_000)
        for whole in (content, content, content[:1_000_000], b""):
            destination.put_stream(_KEY, _cut(whole, 300_000), len(whole))
            assert self.read_back(destination, _KEY) == whole
        assert self.keys(destination) == {_KEY}

    def test_blocks_of_any_size_are_taken(self) -> None:
        destination = self.make_destination()
        blocks = [b"", b"a", b"", _content(5, 2_000_000), b"b" * 7, b""]
        destination.put_stream(_KEY, iter(blocks), sum(map(len, blocks)))
        assert self.read_back(destination, _KEY) == b"".join(blocks)

    def test_a_stream_that_raises_leaves_nothing_visible_and_raises_the_same(self) -> None:
        destination = self.make_destination()
        for error in (ValueError("checksum"), OSError("checksum"), _source_fault(), KeyboardInterrupt()):
            for sent in (b"", b"small", _content(6, 4_000_000)):
                with _raises(type(error)) as caught:
                    destination.put_stream(_KEY, _failing(error, after=_cut(sent, 500_000)), 5_000_000)
                assert caught[0] is error
                assert self.read_back(destination, _KEY) is None
        assert self.keys(destination) == set()

    def test_a_stream_that_raises_leaves_the_earlier_object_untouched(self) -> None:
        destination = self.make_destination()
        destination.put(_KEY, b"earlier")
        with _raises(ValueError):
            destination.put_stream(_KEY, _failing(ValueError(), after=[_content(7, 4_000_000)]), 5_000_000)
        assert self.read_back(destination, _KEY) == b"earlier"
        assert self.keys(destination) == {_KEY}

    def test_a_stream_is_invisible_before_its_last_block(self) -> None:
        destination = self.make_destination()

        def blocks() -> Iterator[bytes]:
            yield _content(8, 2_000_000)
            assert self.read_back(destination, _KEY) is None
            yield b"end"

        destination.put_stream(_KEY, blocks(), 2_000_003)
        assert (self.read_back(destination, _KEY) or b"").endswith(b"end")

    def test_flush_may_be_repeated(self) -> None:
        destination = self.make_destination()
        keys = [f"op/results/1.{study}/2.{study}/3.{number}.dcm" for study in range(3) for number in range(30)]
        for key in keys:
            destination.put(key, key.encode())
        destination.flush([])
        destination.flush(keys)
        destination.flush(iter([*keys, *keys[:5]]))
        assert self.keys(destination) == set(keys)

    def test_a_log_is_created_empty_and_only_once(self) -> None:
        destination = self.make_destination()
        destination.create_log(_LOG)
        assert self.read_back(destination, _LOG) == b""
        for opened in (destination, self.reopen(destination)):
            with _raises(DestinationFault):
                opened.create_log(_LOG)
        assert self.read_back(destination, _LOG) == b""

    def test_a_log_is_written_again_with_the_etag_of_the_last_write(self) -> None:
        destination = self.make_destination()
        etag = destination.create_log(_LOG)
        for blocks in ([], [b"one\n"], [b"one\n", b"two\n"], [], [_content(9, 2_000_000)]):
            etag = destination.write_log(_LOG, iter(blocks), if_match=etag)
            assert self.read_back(destination, _LOG) == b"".join(blocks)
        self.reopen(destination).write_log(_LOG, [b"end"], if_match=etag)
        assert self.read_back(destination, _LOG) == b"end"
        assert self.keys(destination) == {_LOG}

    def test_a_late_writer_cannot_overwrite_the_log(self) -> None:
        destination = self.make_destination()
        created = destination.create_log(_LOG)
        late = self.reopen(destination)
        written = destination.write_log(_LOG, [b"final\n"], if_match=created)
        rewritten = destination.write_log(_LOG, [b"final\n"], if_match=written)
        assert len({created, written, rewritten}) == 3, "an equal content is no reason for an equal ETag"
        for outdated in (created, written):
            with _raises(LogOutdated):
                late.write_log(_LOG, [b"late\n"], if_match=outdated)
        assert self.read_back(destination, _LOG) == b"final\n"
        late.write_log(_LOG, [b"current\n"], if_match=rewritten)
        assert self.read_back(destination, _LOG) == b"current\n"

    def test_of_writers_with_the_same_etag_exactly_one_wins(self) -> None:
        destination = self.make_destination()
        etag = destination.create_log(_LOG)

        def write(number: int) -> int | None:
            try:
                self.reopen(destination).write_log(_LOG, [b"%d" % number], if_match=etag)
            except LogOutdated:
                return None
            return number

        with ThreadPoolExecutor(_THREADS) as pool:
            winners = [number for number in pool.map(write, range(_THREADS)) if number is not None]
        assert len(winners) == 1
        assert self.read_back(destination, _LOG) == b"%d" % winners[0]

    def test_without_an_etag_the_log_is_written_whatever_it_is(self) -> None:
        destination = self.make_destination()
        destination.write_log(_LOG, [b"first"], if_match=None)
        destination.write_log(_LOG, [b"second"], if_match=None)
        assert self.read_back(destination, _LOG) == b"second"

    def test_a_log_that_is_gone_is_not_the_one_that_was_written_last(self) -> None:
        destination = self.make_destination()
        etag = destination.create_log(_LOG)
        destination.remove_log(_LOG)
        with _raises(LogOutdated):
            destination.write_log(_LOG, [b"late"], if_match=etag)
        assert self.keys(destination) == set()

    def test_a_log_whose_blocks_raise_stays_as_it_was(self) -> None:
        destination = self.make_destination()
        etag = destination.create_log(_LOG)
        etag = destination.write_log(_LOG, [b"before"], if_match=etag)
        error = OSError("the database went away")
        with _raises(OSError) as caught:
            destination.write_log(_LOG, _failing(error, after=[_content(10, 1_000_000)]), if_match=etag)
        assert caught[0] is error
        assert self.read_back(destination, _LOG) == b"before"
        destination.write_log(_LOG, [b"after"], if_match=etag)
        assert self.keys(destination) == {_LOG}

    def test_remove_log_never_raises_and_removes_nothing_else(self) -> None:
        destination = self.make_destination()
        destination.remove_log(_LOG)
        destination.create_log(_LOG)
        destination.put(_KEY, b"instance")
        destination.remove_log(_LOG)
        destination.remove_log(_LOG)
        assert self.keys(destination) == {_KEY}
        destination.create_log(_LOG)
        assert self.read_back(destination, _LOG) == b""

    def test_close_may_be_repeated(self) -> None:
        destination = self.make_destination()
        destination.put(_KEY, b"content")
        destination.close()
        destination.close()

    def test_many_threads_put_at_once(self) -> None:
        destination = self.make_destination()

        def work(thread: int) -> dict[str, bytes]:
            done = {}
            for number in range(self.puts_each):
                # All threads share studies and series, and more of them than any cache of handles is likely
                # to hold.
                key = f"op/results/1.{number % 5}/2.{number % 100}/3.{thread}.{number}.dcm"
                content = key.encode() * (number % 100)
                if number % 10:
                    destination.put(key, content)
                else:
                    destination.put_stream(key, iter([content]), len(content))
                done[key] = content
            destination.flush(list(done)[:20])
            return done

        expected: dict[str, bytes] = {}
        with ThreadPoolExecutor(_THREADS) as pool:
            for done in pool.map(work, range(_THREADS)):
                expected |= done
        assert self.keys(destination) == set(expected)
        assert all(self.read_back(destination, key) == content for key, content in expected.items())

    def test_many_threads_put_the_same_key_and_it_stays_whole(self) -> None:
        destination = self.make_destination()
        content = _content(11, 60_000)

        def work(_: int) -> None:
            opened = self.reopen(destination)
            for number in range(20):
                opened.put(_KEY, content)
                if number % 5 == 0:
                    assert self.read_back(destination, _KEY) == content

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(work, range(_THREADS)))
        assert self.read_back(destination, _KEY) == content
        assert self.keys(destination) == {_KEY}


_KEY = "op/results/1.2.840/3.4/5.6.dcm"
_LOG = "op/errors.log"


def _content(seed: int, size: int) -> bytes:
    return Random(seed).randbytes(size)


def _cut(content: bytes, block_bytes: int) -> Iterator[bytes]:
    for start in range(0, len(content), block_bytes):
        yield content[start : start + block_bytes]


def _failing(error: BaseException, *, after: Iterable[bytes]) -> Iterator[bytes]:
    yield from after
    raise error


def _source_fault() -> SourceFault:
    return SourceFault("SourceUnreadable", "made up", FaultKind.INSTANCE)


def _assert_missing(store: BlobStore, key: str) -> None:
    with _raises(SourceFault) as caught:
        store.read(key)
    assert caught[0].kind is FaultKind.INSTANCE, caught[0]
    assert caught[0].code == "SourceMissing"
    attempts: list[Callable[[], object]] = [
        lambda: list(store.stream(key, 1000)),
        lambda: store.read_range(key, 0, 1000),
        lambda: store.read_range(key, 0, 0),
    ]
    for attempt in attempts:
        with _raises(SourceFault) as caught:
            attempt()
        assert caught[0].kind is FaultKind.INSTANCE, caught[0]
        assert caught[0].code == "SourceMissing"


ErrorT = TypeVar("ErrorT", bound=BaseException)


@contextmanager
def _raises(expected: type[ErrorT]) -> Iterator[list[ErrorT]]:
    """The body must raise `expected`; the error is then in the list."""
    caught: list[ErrorT] = []
    try:
        yield caught
    except expected as error:
        caught.append(error)
        return
    raise AssertionError(f"{expected.__name__} was not raised")
