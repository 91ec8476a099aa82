"""A real Azurite blob server for tests: start, containers, shared access signatures, reading back, stop.

No faults (see fault_endpoint.py) and no knowledge of what the product stores. It raises instead of skipping
when Azurite is not installed: a mandatory test that may skip proves nothing.
"""

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from types import TracebackType
from typing import Self

from azure.storage.blob import ContainerClient, ContainerSasPermissions, generate_container_sas

from tests.support.node import NODE_PACKAGES_ROOT, node_executable

ACCOUNT_NAME = "devstoreaccount1"
# The key that Microsoft publishes for every emulator. It is not a secret and opens nothing else.
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 10.0
START_TRIES_MAX = 3


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Azurite:
    """`with Azurite() as azurite:` is a running server that ends, with its data, at the end of the block.

    `https` is a certificate and its key, both PEM files, and `certificate_authority` whom our own client
    trusts (by default the certificate file itself, which suffices when it holds the whole chain). `oauth`
    needs `https`: Azurite takes bearer tokens over HTTPS only. `port` is a free one unless given.
    """

    def __init__(
        self,
        *,
        https: tuple[Path, Path] | None = None,
        certificate_authority: Path | None = None,
        oauth: bool = False,
        port: int | None = None,
    ) -> None:
        if oauth and https is None:
            raise ValueError("Azurite accepts tokens over HTTPS only: give https=(certificate, key) too")
        self._https = https
        self._certificate_authority = certificate_authority
        self._oauth = oauth
        self._server: subprocess.Popen[bytes] | None = None
        self._location: Path | None = None
        self._port = 0
        self._wanted_port = port

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Returns once the server answers. Raises RuntimeError when it is missing or does not come up."""
        program = NODE_PACKAGES_ROOT / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
        if not program.is_file():
            raise RuntimeError("Azurite is not installed in .build/node: run `make test`, which installs it")
        # Another process can take the free port before Azurite does, so a few tries are fair.
        for try_number in range(1, START_TRIES_MAX + 1):
            self._port = self._wanted_port or _free_port()
            self._location = Path(tempfile.mkdtemp(prefix="azurite-"))
            if self._came_up(program):
                return
            log = (self._location / "server.log").read_text(errors="replace")[-2_000:]
            self.stop()
            if try_number == START_TRIES_MAX:
                raise RuntimeError(f"Azurite ended or stayed silent for {START_SECONDS_MAX} seconds:\n{log}")

    def _came_up(self, program: Path) -> bool:
        assert self._location is not None
        command = [str(node_executable()), str(program), "--location", str(self._location)]
        command += ["--blobHost", "127.0.0.1", "--blobPort", str(self._port)]
        # The version check would refuse an azure-storage-blob that is newer than this Azurite.
        command += ["--silent", "--disableTelemetry", "--skipApiVersionCheck"]
        if self._https is not None:
            command += ["--cert", str(self._https[0]), "--key", str(self._https[1])]
        if self._oauth:
            command += ["--oauth", "basic"]
        with (self._location / "server.log").open("wb") as log:
            # Its own session, so that stop() ends the whole process group and nothing else.
            self._server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline and self._server.poll() is None:
            if self._answers():
                return True
            time.sleep(0.05)
        return False

    def _answers(self) -> bool:
        connection: HTTPConnection
        if self._https is None:
            connection = HTTPConnection("127.0.0.1", self._port, timeout=2)
        else:
            # Only whether it answers is asked here; the tests themselves verify certificates.
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            connection = HTTPSConnection("127.0.0.1", self._port, timeout=2, context=context)
        try:
            connection.request("GET", "/")
            server_header = connection.getresponse().getheader("Server", "")
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()
        # A stranger that took the port first would answer too.
        return "Azurite" in server_header

    def stop(self) -> None:
        """Ends the server and removes its data. May be called again."""
        server, self._server = self._server, None
        if server is not None:
            # Its data is removed below, so there is nothing to save and no reason to ask politely first.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait(timeout=STOP_SECONDS_MAX)
        location, self._location = self._location, None
        if location is not None:
            shutil.rmtree(location, ignore_errors=True)

    @property
    def account_url(self) -> str:
        scheme = "http" if self._https is None else "https"
        return f"{scheme}://127.0.0.1:{self._port}/{ACCOUNT_NAME}"

    @property
    def connection_string(self) -> str:
        scheme = "http" if self._https is None else "https"
        return (
            f"DefaultEndpointsProtocol={scheme};AccountName={ACCOUNT_NAME};AccountKey={ACCOUNT_KEY};"
            f"BlobEndpoint={self.account_url};"
        )

    def container_sas(
        self, container: str, permissions: str = "cw", *, expires_in: timedelta = timedelta(hours=1)
    ) -> str:
        """The query string without a question mark. A negative `expires_in` gives an expired signature."""
        now = datetime.now(UTC)
        return generate_container_sas(
            account_name=ACCOUNT_NAME,
            container_name=container,
            account_key=ACCOUNT_KEY,
            permission=ContainerSasPermissions.from_string(permissions),
            start=now - timedelta(hours=24),
            expiry=now + expires_in,
        )

    def container_url(self, container: str, sas: str | None = None) -> str:
        url = f"{self.account_url}/{container}"
        return url if sas is None else f"{url}?{sas}"

    def create_container(self, prefix: str = "test") -> str:
        """Returns the name of a new, empty container that no other test knows."""
        container = f"{prefix}-{uuid.uuid4().hex}"
        with self.container_client(container) as client:
            client.create_container()
        return container

    def container_client(self, container: str) -> ContainerClient:
        """With the account's key, so a test can look at what a narrower signature wrote."""
        verify: bool | str = True
        if self._https is not None:
            verify = str(self._certificate_authority or self._https[0])
        return ContainerClient(
            self.account_url, container, credential=ACCOUNT_KEY, connection_verify=verify, retry_total=0
        )

    def read_tree(self, container: str, prefix: str = "") -> dict[str, bytes]:
        """Every blob whose name starts with `prefix`, by its full name."""
        return dict(self._read_blobs(container, prefix))

    def _read_blobs(self, container: str, prefix: str) -> Iterator[tuple[str, bytes]]:
        with self.container_client(container) as client:
            for name in client.list_blob_names(name_starts_with=prefix):
                yield name, client.download_blob(name).readall()


if __name__ == "__main__":
    with Azurite(port=10000) as running, contextlib.suppress(KeyboardInterrupt):
        print(f"Azurite listens at {running.account_url} until you press Ctrl-C.", flush=True)
        signal.pause()
