"""A service with the OHIF viewer and images to look at, until Ctrl-C. `make viewer` runs it.

Its data folder is a new one and goes when it ends; files that are imported stay where they are.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.service import RunningService, environment, free_port
from tools.ohif import FOLDER
from tools.phantoms import write_phantoms

PORT = 8080
_SOME_SKIPPED = 3  # cli.common.ExitCode: told by the import itself, and no reason not to look at the others


def main() -> None:
    parser = argparse.ArgumentParser(prog="make viewer", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="folders, DICOM files and zip archives to look at")
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), tempfile.TemporaryDirectory(prefix="dicom-depot-viewer-") as name:
        _serve(Path(name), given.files)


def _serve(folder: Path, files: list[Path]) -> None:
    data_dir, phantoms = folder / "data", folder / "phantoms"
    phantoms.mkdir()
    write_phantoms(phantoms)
    arguments = [sys.executable, "-m", "dicom_depot", "import", str(phantoms), *map(str, files)]
    status = subprocess.run(arguments, env=environment(data_dir, {}), check=False).returncode
    if status not in (0, _SOME_SKIPPED):
        sys.exit(status)
    service = RunningService(data_dir, {"viewer_dir": FOLDER}, _port())
    service.start()
    try:
        print(f"\nViewer:   {service.url}/viewer/\nDICOMweb: {service.url}/v2\nCtrl-C ends both.", flush=True)
        while service.process is not None and service.process.poll() is None:
            time.sleep(0.2)
        sys.exit(f"The service ended. Its log:\n{service.log_path.read_text()[-2000:]}")
    finally:
        service.stop()


def _port() -> int:
    """The usual one where it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            return free_port()
    return PORT


if __name__ == "__main__":
    main()
