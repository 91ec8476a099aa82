"""Starts the service as a user does, in its own processes on a free port, and talks to it. No assertions live here."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 90.0
END_SECONDS = 120.0
TERMINAL = frozenset({"completed", "succeeded", "failed", "canceled"})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(data_dir: Path, settings: Mapping[str, object]) -> dict[str, str]:
    """The environment of a command: this process's without settings of its own, and the ones given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DICOM_DEPOT_")}
    given = {f"DICOM_DEPOT_{name.upper()}": str(value) for name, value in settings.items()}
    return inherited | {"DICOM_DEPOT_DATA_DIR": str(data_dir)} | given


def run_command(
    *arguments: str, data_dir: Path, check: bool = True, **settings: object
) -> subprocess.CompletedProcess[str]:
    """Run `dicom-depot` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "dicom_depot", *arguments],
        env=environment(data_dir, settings),
        capture_output=True,
        text=True,
        timeout=END_SECONDS,
        check=check,
    )


@dataclass
class RunningService:
    """A `dicom-depot serve` process and its worker."""

    data_dir: Path
    settings: dict[str, object] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    verify: ssl.SSLContext | bool = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_path(self) -> Path:
        return self.data_dir.parent / f"{self.data_dir.name}.serve.log"

    def start(self) -> None:
        """Start, and return once the service answers. One that does not is ended again."""
        self.launch()
        try:
            self.wait_until_answering()
        except BaseException:
            self.stop()
            raise

    def launch(self) -> None:
        """Start, and return at once."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dicom_depot", "serve"],
                env=environment(self.data_dir, {**self.settings, "port": self.port}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait_until_answering(self) -> RunningService:
        """Return once the service answers, at its start or with a new worker."""
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/health/check", timeout=2, verify=self.verify).status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.05)
        raise RuntimeError(f"the service did not start; its log:\n{self.log_path.read_text()[-4000:]}")

    def workers(self) -> list[int]:
        """Process ids of the server's worker processes."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            pids = [int(pid) for pid in children.read_text().split()]
        except FileNotFoundError:
            return []
        return [pid for pid in pids if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def kill_parent(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End the service as an operator does, and wait until its processes are gone."""
        if self.process is None:
            return
        workers = self.workers()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.process = None

    def export(self, body: Mapping[str, Any], version: str = "v2", **arguments: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/{version}/export", json=body, timeout=60, **arguments)

    def begin(self, destination: Mapping[str, Any], *identifiers: str) -> str:
        """Start an export that must not be refused, and return its operation's id."""
        answer = self.export(export_body(destination, *identifiers))
        if answer.status_code != 202:
            raise RuntimeError(f"the export was refused: {answer.text}")
        return str(answer.json()["id"])

    def operation(self, operation_id: str, version: str = "v2") -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/{version}/operations/{operation_id}", timeout=30)
        return dict(answer.raise_for_status().json())

    def wait(self, operation_id: str, seconds: float = END_SECONDS, version: str = "v2") -> dict[str, Any]:
        """Poll an operation to its end, through restarts of the service."""
        deadline = time.monotonic() + seconds
        state: dict[str, Any] = {}
        while time.monotonic() < deadline:
            try:
                state = self.operation(operation_id, version)
            except httpx.TransportError:
                state = {}
            if state.get("status") in TERMINAL:
                return state
            time.sleep(0.1)
        raise RuntimeError(f"operation {operation_id} did not end: {state}; log:\n{self.log_path.read_text()[-4000:]}")


@contextmanager
def running_service(data_dir: Path, **settings: object) -> Iterator[RunningService]:
    service = RunningService(data_dir, dict(settings))
    service.start()
    try:
        yield service
    finally:
        service.stop()


def file_destination(folder: str) -> dict[str, Any]:
    return {"type": "file", "settings": {"folder": folder}}


def azure_destination(container_uri: str) -> dict[str, Any]:
    return {"type": "azureBlob", "settings": {"blobContainerUri": container_uri}}


def export_body(destination: Mapping[str, Any], *identifiers: str) -> dict[str, Any]:
    body: dict[str, Any] = {"destination": destination}
    if identifiers:
        body["source"] = {"type": "identifiers", "settings": {"values": list(identifiers)}}
    return body
