"""The child process of `services.transcoding`: runs one call after the other, as they come through its pipe.

It ends when the pipe does, and by the alarm clock when a decoder hangs, also after its parent is gone.
"""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

from dicom_depot.codec.rendering import render
from dicom_depot.codec.transcode import frames, transcode
from dicom_depot.domain.errors import DepotError

FUNCTIONS: dict[str, Callable[..., bytes | list[bytes]]] = {
    "transcode": transcode,
    "frames": frames,
    "render": render,
}
WORK_SECONDS = 120
"""How long one call may take."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold patients' data
    pipe = Connection(int(sys.argv[1]))
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        signal.alarm(WORK_SECONDS)
        result: object
        try:
            result = FUNCTIONS[name](*arguments)
        except DepotError as error:
            result = error
        signal.alarm(0)
        pipe.send(result)


if __name__ == "__main__":
    main()
