"""`serve`: the HTTP service, with the export engine inside. One parent process keeps one worker process running."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import typer
from fastapi import FastAPI
from granian import Granian
from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings
from starlette.concurrency import run_in_threadpool

from dicom_depot import config, wiring
from dicom_depot.adapters.audit_file import AuditFile
from dicom_depot.adapters.folder_lock import FolderLock
from dicom_depot.cli.common import ExitCode, err, explained_errors, fail, load_settings
from dicom_depot.cli.serve_checks import check_exposure, check_tls, check_viewer, resolve_host
from dicom_depot.config import CONFIG_VARIABLE, PREFIX, Settings
from dicom_depot.domain.errors import DepotError
from dicom_depot.telemetry import set_up_logging
from dicom_depot.web.app import create_app
from dicom_depot.web.context import WebContext

_log = logging.getLogger(__name__)

_STOP_SECONDS = 8
"""How long a worker may take to end by itself."""
_LINGER_SECONDS = 1.0


def serve(context: typer.Context) -> None:
    """Run the service until it is interrupted."""
    settings = load_settings(context)
    set_up_logging(settings.log_level)
    with explained_errors(ExitCode.FAILED):
        host = resolve_host(settings.host)  # once: what is checked is what is listened on
        check_exposure(settings, host)
        check_tls(settings)
        check_viewer(settings)
        _check_start(settings, host)
    port = settings.port or _free_port(host)
    _export_flags(context, port)
    address = f"[{settings.host}]" if ":" in settings.host else settings.host
    scheme = "http" if settings.tls_cert is None else "https"
    err.print(f"DICOM Depot listens on {scheme}://{address}:{port}, data in {settings.data_dir}", highlight=False)
    Granian(
        "dicom_depot.cli.serve_command:asgi_app",
        factory=True,
        address=host,
        port=port,
        interface=Interfaces.ASGI,
        workers=1,
        http=HTTPModes.http1,  # the limits below hold for it; a proxy may speak HTTP/2 to clients
        http1_settings=HTTP1Settings(
            header_read_timeout=max(1, round(settings.header_seconds * 1000)),
            max_buffer_size=2 * settings.max_header_bytes,  # beyond the limit itself, so that we can explain it
        ),
        websockets=False,
        ssl_cert=settings.tls_cert,
        ssl_key=settings.tls_key,
        ssl_protocol_min=SSLProtocols.tls12,
        respawn_failed_workers=True,
        workers_kill_timeout=_STOP_SECONDS,
        log_enabled=settings.log_level == "DEBUG",
    ).serve()


def asgi_app() -> FastAPI:
    """What the worker process runs; its settings come through the environment."""
    settings, _ = config.load()
    set_up_logging(settings.log_level)
    _end_with_parent()

    @contextlib.asynccontextmanager
    async def open_context() -> AsyncIterator[WebContext]:
        try:
            service = await run_in_threadpool(wiring.open_service, settings)
        except DepotError as error:
            _log.error("the service cannot start: %s", error.message)  # granian says nothing of what ends a worker
            raise
        except Exception:
            _log.exception("the service cannot start")
            raise
        web = WebContext(
            settings,
            service.exports,
            service.resumes,
            service.index,
            service.store,
            service.verifier,
            service.audit,
            service.identity,
            service.stores,
            service.retrieval,
            service.searches,
            service.tags,
            service.changes,
        )
        _spare_garbage_collection()
        try:
            yield web
        finally:
            await run_in_threadpool(web.lines.close)
            await run_in_threadpool(service.close)
            _end_soon()

    return create_app(open_context, settings)


def _check_start(settings: Settings, host: str) -> None:
    """What can be refused is refused here, before a worker process would try again and again."""
    wiring.prepare_data_folder(settings)
    wiring.token_verifier(settings)
    AuditFile(settings.audit_path).close()
    lock = FolderLock(settings.data_dir)
    lock.acquire()
    try:
        wiring.check_database(settings)
    finally:
        lock.release()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, settings.port))
        except OSError as error:
            fail(
                f"Cannot listen on {settings.host} port {settings.port}: {error.strerror}. "
                f"Choose another with --port or {PREFIX}PORT.",
                ExitCode.FAILED,
            )


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _export_flags(context: typer.Context, port: int) -> None:
    """Hand the flags on to the worker process."""
    flags: dict[str, Any] = dict(context.find_root().obj or {})
    file = flags.pop("config", None)
    if file is not None:
        os.environ[CONFIG_VARIABLE] = str(file)
    for name, value in (flags | {"port": port}).items():
        os.environ[PREFIX + name.upper()] = str(value)


def _end_with_parent() -> None:
    """End this worker as soon as its parent died: nobody would supervise it, and it holds port and data folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()  # returns at once for a parent that is dead already
        os._exit(1)  # what runs is durable; the next process goes on with it

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _spare_garbage_collection() -> None:
    """What was loaded stays: the collector need not look at it again and again. A request makes thousands of objects
    and hardly any cycles: looking at them less often saves some 7 % of the time of a store.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _end_soon() -> None:
    """End this worker although a request to a destination hangs: Python would wait for its thread."""
    timer = threading.Timer(_LINGER_SECONDS, os._exit, (0,))
    timer.daemon = True
    timer.start()
