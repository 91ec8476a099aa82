"""Debian's Orthanc with its DICOMweb plugin, in a process of its own: start, talk to it, stop. No assertions live here.

It is a DICOMweb server (`dicom_web_url`) and, for the `servers` it is given, a DICOMweb client (`send`, `fetch`).
Debian's 1.10.1 listens on all addresses whatever it is told and refuses those that are not this machine's by HTTP.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

PLUGIN_FOLDERS = (Path("/usr/share/orthanc/plugins"), Path("/usr/lib/orthanc"))
PLUGIN_NAME = "libOrthancDicomWeb.so"
START_SECONDS = 30.0
STOP_SECONDS = 20.0
TRANSFER_SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program() -> Path:
    """Where Orthanc is; FileNotFoundError says which Debian packages it comes from."""
    found = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")
    if found is None:
        raise FileNotFoundError("Orthanc is not installed: it is in the Debian packages orthanc and orthanc-dicomweb")
    return Path(found)


def plugin() -> Path:
    for folder in PLUGIN_FOLDERS:
        if (folder / PLUGIN_NAME).exists():
            return folder / PLUGIN_NAME
    raise FileNotFoundError(f"{PLUGIN_NAME} is not installed: it is in the Debian package orthanc-dicomweb")


def configuration(folder: Path, port: int, servers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Orthanc's settings: all that is not named here is its default (those of a production server included)."""
    return {
        "Name": "tests of DICOM Depot",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "StorageCompression": False,
        "Plugins": [str(plugin())],
        "HttpPort": port,
        "KeepAlive": True,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomServerEnabled": False,
        "DicomWeb": {
            "Enable": True,
            "Root": "/dicom-web/",
            "EnableWado": False,
            "Servers": {name: dict(server) for name, server in servers.items()},
        },
    }


def server(url: str, *, is_chunked: bool = True, **more: object) -> dict[str, Any]:
    """A DICOMweb server that Orthanc may send to and fetch from, for `servers`; `url` is the root of its routes."""
    return {"Url": f"{url.rstrip('/')}/", "ChunkedTransfers": is_chunked, "HasDelete": False, **more}


class Orthanc:
    """A running Orthanc.

    Methods raise httpx.HTTPStatusError with its own words when it refuses. Of a transfer that failed it does not say
    why, but writes it to its log: `send` and `fetch` raise RuntimeError with the end of that.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, log_path: Path) -> None:
        self.process = process
        self.port = port
        self.log_path = log_path
        self._client = httpx.Client(base_url=self.url, timeout=TRANSFER_SECONDS, trust_env=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def dicom_web_url(self) -> str:
        return f"{self.url}/dicom-web"

    def upload(self, content: bytes) -> str:
        """Store one file by Orthanc's own REST interface; returns Orthanc's id of the instance."""
        return str(self._post("/instances", content=content).json()["ID"])

    def send(self, server_name: str, *study_uids: str) -> dict[str, Any]:
        """Send whole studies to a server by STOW-RS, and return what Orthanc says about it once all are sent."""
        resources = [self._orthanc_id("Study", {"StudyInstanceUID": uid}) for uid in study_uids]
        return self._run(server_name, "stow", resources)

    def fetch(self, server_name: str, *study_uids: str) -> dict[str, Any]:
        """Retrieve whole studies from a server by WADO-RS, and return what Orthanc says once it holds them."""
        return self._run(server_name, "retrieve", [{"Study": uid} for uid in study_uids])

    def instances(self) -> dict[str, str]:
        """SOP Instance UID to Orthanc's id, of all that it holds."""
        found = self._get("/instances?expand").json()
        return {each["MainDicomTags"]["SOPInstanceUID"]: each["ID"] for each in found}

    def count_instances(self) -> int:
        return int(self._get("/statistics").json()["CountInstances"])

    def file(self, sop_instance_uid: str) -> bytes:
        """The file of an instance, as Orthanc stored it."""
        return self._get(f"/instances/{self.instances()[sop_instance_uid]}/file").content

    def delete_study(self, study_uid: str) -> None:
        orthanc_id = self._orthanc_id("Study", {"StudyInstanceUID": study_uid})
        _checked(self._client.delete(f"/studies/{orthanc_id}"))

    def delete_all(self) -> None:
        for orthanc_id in self._get("/patients").json():
            _checked(self._client.delete(f"/patients/{orthanc_id}"))

    def version(self) -> str:
        return str(self._get("/system").json()["Version"])

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def answers(self) -> bool:
        try:
            return self._client.get("/system", timeout=2).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """End the process that was started, as an operator does; then by force."""
        self._client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _run(self, server_name: str, job: str, resources: Sequence[object]) -> dict[str, Any]:
        body = {"Resources": resources, "Synchronous": True}
        try:
            return dict(self._post(f"/dicom-web/servers/{server_name}/{job}", json=body).json())
        except httpx.HTTPStatusError as error:
            raise RuntimeError(f"{error}\nThe end of its log:\n{self.log()[-2000:]}") from error

    def _orthanc_id(self, level: str, query: Mapping[str, str]) -> str:
        found = self._post("/tools/find", json={"Level": level, "Query": query, "CaseSensitive": True}).json()
        if len(found) != 1:
            raise LookupError(f"Orthanc holds {len(found)} of the {level.lower()} {query}")
        return str(found[0])

    def _get(self, path: str) -> httpx.Response:
        return _checked(self._client.get(path))

    def _post(self, path: str, **arguments: Any) -> httpx.Response:
        return _checked(self._client.post(path, **arguments))


def _checked(answer: httpx.Response) -> httpx.Response:
    if not answer.is_success:
        message = f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text}"
        raise httpx.HTTPStatusError(message, request=answer.request, response=answer)
    return answer


@contextmanager
def running_orthanc(
    servers: Mapping[str, Mapping[str, Any]] | None = None,
    parent_folder: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Iterator[Orthanc]:
    """An Orthanc with nothing in it, which is gone with its data at the end of the block.

    `servers` are those of its client role (see `server`), `parent_folder` is where its temporary folder is made
    (benchmarks care for the disk), `overrides` are settings of its configuration.
    """
    with tempfile.TemporaryDirectory(prefix="orthanc-", dir=parent_folder) as name:
        folder, port = Path(name), free_port()
        settings = {**configuration(folder, port, servers or {}), **(overrides or {})}
        (folder / "orthanc.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        log_path = folder / "orthanc.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [str(program()), str(folder / "orthanc.json")],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        running = Orthanc(process, port, log_path)
        try:
            _wait_until_answering(running)
            yield running
        finally:
            running.stop()


def _wait_until_answering(running: Orthanc) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and running.process.poll() is None:
        if running.answers():
            return
        time.sleep(0.05)
    raise RuntimeError(f"Orthanc did not start; its log:\n{running.log()[-4000:]}")
