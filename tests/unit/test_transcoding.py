"""Decoders run in processes of their own: whatever happens to one of those, the service goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dicom_depot.domain.errors import DepotError, NotFound, NotTranscodable, ServiceUnavailable
from dicom_depot.services.transcoding import Transcoding
from dicom_depot.testing.samples import ct_volume, multiframe, structured_report

JPEG_LS, JPEG_2000, EXPLICIT = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.1"
SMALL = ct_volume(1, 64, 64)[0].content
LARGE = ct_volume(1, 2048, 4096)[0].content
"""Takes more than a second in JPEG 2000."""


@pytest.fixture
def transcoding() -> Iterator[Transcoding]:
    opened = Transcoding()
    yield opened
    opened.close()


def children(of: int | None = None) -> set[int]:
    """Process ids of the decoders that a process has started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"transcode_process" in command and parent == (of or os.getpid()):
            found.add(int(path.name))
    return found


def wait_for(condition: object, seconds: float = 20) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_transcoded_there_and_back_is_the_same(transcoding: Transcoding) -> None:
    there = transcoding.transcode(SMALL, JPEG_LS)
    assert there != SMALL
    assert transcoding.transcode(there, EXPLICIT)[-8192:] == SMALL[-8192:]
    assert transcoding.frames(multiframe(3, 8, 8).content, [2], EXPLICIT) == [multiframe(3, 8, 8).content[-128:-64]]


def test_errors_come_out_as_they_went_in(transcoding: Transcoding) -> None:
    with pytest.raises(NotTranscodable, match="pixel"):
        transcoding.transcode(structured_report().content, JPEG_LS)
    with pytest.raises(NotFound):
        transcoding.frames(SMALL, [2], EXPLICIT)
    assert len(children()) == 1, "an error does not cost a process"


def test_a_process_that_dies_fails_its_own_call_only(transcoding: Transcoding) -> None:
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            running = pool.submit(transcoding.transcode, LARGE, JPEG_2000)
            wait_for(children)
            time.sleep(0.7)
            [victim] = children()
            os.kill(victim, signal.SIGKILL)
            with pytest.raises(NotTranscodable, match="cannot be decoded"):
                running.result(timeout=30)
            assert transcoding.transcode(SMALL, JPEG_LS)
            transcoding.close()
            transcoding = Transcoding()


def test_an_idle_process_that_died_is_noticed(transcoding: Transcoding) -> None:
    transcoding.transcode(SMALL, JPEG_LS)
    [victim] = children()
    os.kill(victim, signal.SIGKILL)
    os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)  # until its last thread is gone, without reaping it
    assert transcoding.transcode(SMALL, JPEG_LS), "nobody's fault: it is done by another one"


def test_there_are_never_more_processes_than_cores(transcoding: Transcoding) -> None:
    most = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, len(children()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(12) as pool:
        results = list(pool.map(lambda _: transcoding.transcode(SMALL, JPEG_LS), range(48)))
    done.set()
    watcher.join()
    assert len(set(results)) == 1
    assert most <= (os.cpu_count() or 1)


def test_after_the_end_nothing_is_left_and_nothing_begins() -> None:
    transcoding = Transcoding()
    transcoding.transcode(SMALL, JPEG_LS)
    transcoding.close()
    wait_for(lambda: not children())
    with pytest.raises(ServiceUnavailable):
        transcoding.transcode(SMALL, JPEG_LS)


def test_processes_end_with_a_parent_that_is_killed() -> None:
    program = (
        "from dicom_depot.services.transcoding import Transcoding\n"
        "from dicom_depot.testing.samples import ct_volume\n"
        "import time\n"
        "t = Transcoding(); t.transcode(ct_volume(1, 16, 16)[0].content, '1.2.840.10008.1.2.4.80')\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        [child] = children(parent.pid)
        parent.kill()
    wait_for(lambda: not Path(f"/proc/{child}").exists())


def test_a_process_does_not_inherit_the_services_secrets(
    transcoding: Transcoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICOM_DEPOT_SECRET_KEYS", "a secret")
    transcoding.transcode(SMALL, JPEG_LS)
    [child] = children()
    assert b"DICOM_DEPOT" not in Path(f"/proc/{child}/environ").read_bytes()


def test_every_error_of_ours_survives_the_way_between_processes() -> None:
    """An error is sent by its class and message; one that could not be made again would end the child."""
    import pickle

    for error in (NotTranscodable("reason"), NotFound("There is no frame 2.", target="frames")):
        again = pickle.loads(pickle.dumps(error))  # noqa: S301
        assert isinstance(again, DepotError)
        assert (type(again), again.message) == (type(error), error.message)
