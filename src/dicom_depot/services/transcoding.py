"""Runs pixel codecs in processes of their own.

Decoders are C and C++ libraries that meet whatever was stored. One that crashes, hangs or eats memory takes a child
process with it, not the service; and transcoding uses all cores.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from dicom_depot.codec.render_parameters import Rendition
from dicom_depot.domain.errors import DepotError, NotTranscodable, ServiceUnavailable
from dicom_depot.services.transcode_process import WORK_SECONDS

TURN_SECONDS = 60.0
"""How long a request waits for a process."""


class Transcoding:
    """As many processes as there are cores, each started when it is first needed. Safe for many threads."""

    def __init__(self) -> None:
        self._turns = threading.BoundedSemaphore(os.cpu_count() or 1)
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._is_closed = False

    def transcode(self, content: bytes, target: str) -> bytes:
        """`codec.transcode.transcode`. Raises NotTranscodable also when the decoder crashes or takes too long,
        ServiceUnavailable when all processes are busy for long.
        """
        result: bytes = self._run("transcode", content, target)
        return result

    def frames(self, content: bytes, numbers: Sequence[int], target: str) -> list[bytes]:
        """`codec.transcode.frames`; errors as `transcode`, and NotFound."""
        result: list[bytes] = self._run("frames", content, list(numbers), target)
        return result

    def render(self, content: bytes, number: int, rendition: Rendition) -> bytes:
        """`codec.rendering.render`; errors as `transcode`, NotFound and InvalidRequest."""
        result: bytes = self._run("render", content, number, rendition)
        return result

    def close(self) -> None:
        """End idle processes; one that is at work ends when it is done."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()

    def _run(self, name: str, *arguments: object) -> Any:
        if not self._turns.acquire(timeout=TURN_SECONDS):
            raise ServiceUnavailable("Too much is being transcoded; try again later.")
        try:
            with self._lock:
                if self._is_closed:
                    raise ServiceUnavailable("The service is stopping.")
                while self._idle and not self._idle[-1].is_alive():  # killed by others: out of memory, say
                    self._idle.pop().end()
                process = self._idle.pop() if self._idle else None
            process = process or _Process()
            try:
                result = process.call(name, arguments)
            except BaseException:
                process.end()
                raise
            with self._lock:
                is_kept = not self._is_closed
                if is_kept:
                    self._idle.append(process)
            if not is_kept:
                process.end()
        finally:
            self._turns.release()
        if isinstance(result, DepotError):
            raise result
        return result


class _Process:
    """One child. For one thread at a time."""

    def __init__(self) -> None:
        self._pipe, far = multiprocessing.Pipe()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DICOM_DEPOT_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dicom_depot.services.transcode_process", str(far.fileno())],
            pass_fds=[far.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # decoders print what they think of their input
            env=environment,
        )
        far.close()

    def is_alive(self) -> bool:
        """Of an idle one. It says nothing unasked: what there is to be read is the end of its pipe."""
        return self._process.poll() is None and not self._pipe.poll()

    def call(self, name: str, arguments: tuple[object, ...]) -> Any:
        """What the function returned, or the error of ours that it raised."""
        try:
            self._pipe.send((name, arguments))
            if self._pipe.poll(WORK_SECONDS):
                return self._pipe.recv()
        except (EOFError, OSError):
            raise NotTranscodable("its pixel data cannot be decoded") from None
        raise NotTranscodable("its pixel data takes too long to be decoded")

    def end(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()
