"""The only place that names concrete classes. Production, tests and the demo all open the service here."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from dicom_depot.adapters.audit_file import AuditFile
from dicom_depot.adapters.catalog_sql import SqlCatalog
from dicom_depot.adapters.changes_sql import SqlChangeFeed
from dicom_depot.adapters.database import Database
from dicom_depot.adapters.destination_guard import DestinationGuard
from dicom_depot.adapters.destinations import Destinations
from dicom_depot.adapters.folder_lock import FolderLock
from dicom_depot.adapters.folder_store import FolderBlobStore
from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.adapters.jwt_verifier import JwtVerifier
from dicom_depot.adapters.managed_identity import AzureManagedIdentity
from dicom_depot.adapters.operations_sql import SqlOperations
from dicom_depot.adapters.query_tags_sql import SqlQueryTags
from dicom_depot.adapters.roles_file import read_roles
from dicom_depot.adapters.sealing import AesSecretBox, key_file, parse_keys
from dicom_depot.adapters.search_sql import SqlSearch
from dicom_depot.adapters.switches_sql import SqlSwitches
from dicom_depot.config import Settings
from dicom_depot.domain.errors import ConfigurationError, DepotError
from dicom_depot.export.copier import CopyPool
from dicom_depot.export.planner import Planner
from dicom_depot.export.resume import ResumeService
from dicom_depot.export.runner import ExportRunner
from dicom_depot.export.service import ExportService
from dicom_depot.ports import (
    BlobStore,
    ChangeFeed,
    DestinationFactory,
    InstanceIndex,
    ManagedIdentity,
    OperationLimits,
    TokenVerifier,
)
from dicom_depot.services.metadata import MetadataReader
from dicom_depot.services.query_tags import QueryTagService
from dicom_depot.services.reindex import ReindexService
from dicom_depot.services.retrieve import RetrieveService
from dicom_depot.services.search import SearchService
from dicom_depot.services.store import StoreService
from dicom_depot.services.transcoding import Transcoding
from dicom_depot.services.upkeep import Upkeep
from dicom_depot.workflows.engine import CHUNKS_OF_ONE_OPERATION, WINDOW, DbosEngine

_log = logging.getLogger(__name__)

_UPKEEP_SECONDS = 600.0
_BACK_FILL_PAUSE_SECONDS = 60.0


@dataclass(slots=True)
class Service:
    """An open service: what routes and commands work with. Close it to let go of the data folder."""

    settings: Settings
    database: Database
    index: InstanceIndex
    store: BlobStore
    exports: ExportService
    resumes: ResumeService
    upkeep: Upkeep
    verifier: TokenVerifier | None
    audit: AuditFile
    identity: ManagedIdentity
    stores: StoreService
    retrieval: RetrieveService
    searches: SearchService
    tags: QueryTagService
    changes: ChangeFeed
    _engine: DbosEngine
    _lock: FolderLock
    _closed: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        self._closed.set()
        self.stores.commits.close()
        self.retrieval.transcoding.close()
        self._engine.close()
        self.database.close()
        self.audit.close()
        self._lock.release()

    def fill_metadata(self) -> None:
        """Read the files of instances that were stored without metadata; later again while the store is away."""
        while True:
            try:
                count = self.retrieval.metadata.fill(self._closed)
                if count:
                    _log.info("metadata of %d instances was added", count)
                return
            except DepotError as error:
                _log.warning("the back-fill of metadata waits: %s", error.message)
            except Exception:
                if self._closed.is_set():
                    return
                _log.exception("the back-fill of metadata did not complete; trying again later")
            if self._closed.wait(_BACK_FILL_PAUSE_SECONDS):
                return

    def keep_up(self) -> None:
        """Run the upkeep now and then, until closed."""
        while True:
            try:
                self.upkeep.run()
            except Exception:
                _log.exception("the upkeep did not complete; trying again later")
            if self._closed.wait(_UPKEEP_SECONDS):
                return


def open_service(settings: Settings) -> Service:
    """Open the service and go on with the operations that a former process left.

    Raises ConfigurationError when another process has the data folder, or the folder or database cannot be used.
    """
    prepare_data_folder(settings)
    lock = FolderLock(settings.data_dir)
    lock.acquire()
    try:
        return _open_locked(settings, lock)
    except BaseException:
        lock.release()
        raise


def _open_locked(settings: Settings, lock: FolderLock) -> Service:
    database = _open_database(settings)
    index = SqlIndex(database)
    limits = OperationLimits(settings.operations_max, settings.operations_max_per_caller)
    operations = SqlOperations(database, limits)
    audit = AuditFile(settings.audit_path)
    store = _open_store(settings, index)
    identity = _managed_identity(settings, database)
    destinations = _destinations(settings, identity)
    secrets = AesSecretBox(_secret_keys(settings))
    catalog = SqlCatalog(database)
    metadata = MetadataReader(catalog, store)
    tags = SqlQueryTags(database, limits)
    search = SqlSearch(database)
    planner = Planner(index, search, tags, operations, settings.chunk_instances, settings.chunk_bytes)
    runner = ExportRunner(
        index=index,
        operations=operations,
        store=store,
        destinations=destinations,
        secrets=secrets,
        planner=planner,
        pool=CopyPool(
            settings.export_concurrency,
            settings.export_bytes_in_flight,
            settings.export_stream_bytes,
            CHUNKS_OF_ONE_OPERATION * settings.operations_max,
        ),
        reindexer=ReindexService(tags, metadata),
        retry_seconds=settings.export_retry_seconds,
        window=WINDOW,
        audit=audit,
    )
    engine = DbosEngine(settings.data_dir / "workflows.sqlite", runner, operations)
    exports = ExportService(
        operations=operations,
        destinations=destinations,
        secrets=secrets,
        planner=planner,
        runner=runner,
        engine=engine,
        identifiers_max=settings.max_identifiers,
        audit=audit,
    )
    upkeep = Upkeep(
        index=index,
        store=store,
        operations=operations,
        retention=timedelta(days=settings.operation_retention_days),
        delete_delay=timedelta(seconds=settings.delete_delay_seconds),
        tags=tags,
    )
    resumes = ResumeService(
        index=index,
        store=store,
        operations=operations,
        destinations=destinations,
        secrets=secrets,
        planner=planner,
        engine=engine,
        hold_sweeps=upkeep.held,
        audit=audit,
    )
    service = Service(
        settings=settings,
        database=database,
        index=index,
        store=store,
        exports=exports,
        resumes=resumes,
        upkeep=upkeep,
        verifier=token_verifier(settings),
        audit=audit,
        identity=identity,
        stores=StoreService(
            store,
            index,
            tags.all,
            instance_bytes_max=settings.store_instance_bytes_max,
            instances_max=settings.store_instances_max,
            min_free_bytes=settings.min_free_bytes,
        ),
        retrieval=RetrieveService(catalog, store, metadata, Transcoding(), settings.transcode_bytes_max),
        searches=SearchService(search, metadata, tags),
        tags=QueryTagService(tags, engine),
        changes=SqlChangeFeed(database),
        _engine=engine,
        _lock=lock,
    )
    engine.launch()
    threading.Thread(target=service.keep_up, name="upkeep", daemon=True).start()
    threading.Thread(target=service.fill_metadata, name="metadata", daemon=True).start()
    return service


def token_verifier(settings: Settings) -> TokenVerifier | None:
    """What checks callers' tokens; None without sign-in. Asks no issuer yet.

    Raises ConfigurationError when the roles file cannot be used.
    """
    roles = read_roles(settings.roles_file)
    if not settings.auth_issuers:
        return None
    return JwtVerifier(
        issuers=settings.auth_issuers,
        audiences=settings.auth_audiences,
        algorithms=settings.auth_algorithms,
        roles_claim=settings.auth_roles_claim,
        leeway_seconds=settings.auth_leeway_seconds,
        roles=roles,
    )


def _managed_identity(settings: Settings, database: Database) -> ManagedIdentity:
    return AzureManagedIdentity(
        SqlSwitches(database), source=settings.identity_source, client_id=settings.identity_client_id
    )


def _destinations(settings: Settings, identity: ManagedIdentity) -> DestinationFactory:
    return Destinations(
        export_root=settings.export_root,
        guard=DestinationGuard(settings.export_allowed_endpoints, settings.export_allowed_hosts),
        allow_anonymous=settings.export_allow_anonymous,
        request_seconds=settings.export_request_seconds,
        content_md5=settings.export_content_md5,
        identity=identity,
        is_cli_identity=settings.identity_source == "cli",
    )


@contextlib.contextmanager
def opened_identity(settings: Settings) -> Iterator[tuple[ManagedIdentity, DestinationFactory]]:
    """Only the identity and the destinations that it signs in to; also beside a running service."""
    prepare_data_folder(settings)
    database = _open_database(settings)
    try:
        identity = _managed_identity(settings, database)
        yield identity, _destinations(settings, identity)
    finally:
        database.close()


def open_stores(settings: Settings) -> tuple[BlobStore, InstanceIndex]:
    """Only the store and the index: what an import needs, beside a running service."""
    index = SqlIndex(Database(settings.database_path))
    return _open_store(settings, index), index


def prepare_import(settings: Settings) -> Callable[[], tuple[BlobStore, InstanceIndex]]:
    """Make the data folder ready, and return what opens store and index in each worker process."""
    prepare_data_folder(settings)
    _open_database(settings).close()
    return functools.partial(open_stores, settings)


@contextmanager
def open_for_check(settings: Settings, *, exclusive: bool) -> Iterator[tuple[BlobStore, InstanceIndex]]:
    """The store and the index of a data folder that exists already; nothing is created.

    exclusive: no service may have the data folder meanwhile. Raises ConfigurationError when one has it, or when there
    is no database.
    """
    if not settings.database_path.is_file():
        raise ConfigurationError(
            f"There is no database at {settings.database_path}. Does DICOM_DEPOT_DATA_DIR name the right folder?"
        )
    lock = FolderLock(settings.data_dir)
    if exclusive:
        lock.acquire()
    try:
        database = _open_database(settings)
        try:
            index = SqlIndex(database)
            yield _open_store(settings, index), index
        finally:
            database.close()
    finally:
        lock.release()


def prepare_data_folder(settings: Settings) -> None:
    """Create the data folder if need be, and refuse to start where there is no room."""
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(settings.data_dir).free
    except OSError as error:
        raise ConfigurationError(
            f"The data folder {settings.data_dir} cannot be used: {error.strerror}. "
            "Set DICOM_DEPOT_DATA_DIR to a folder that this user may write to."
        ) from None
    if free < settings.min_free_bytes:
        raise ConfigurationError(
            f"Only {free // 2**20} MiB are free in {settings.data_dir}; DICOM_DEPOT_MIN_FREE_BYTES asks for "
            f"{settings.min_free_bytes // 2**20} MiB. Free space, or lower that setting."
        )


def check_database(settings: Settings) -> None:
    """Raises ConfigurationError when the database's schema is not this release's."""
    _open_database(settings).close()


def migrate(settings: Settings) -> None:
    """Bring the database to this release's schema."""
    prepare_data_folder(settings)
    database = Database(settings.database_path)
    try:
        database.migrate()
    finally:
        database.close()


def _open_database(settings: Settings) -> Database:
    """A new embedded database gets its schema here; an existing one must have it (`dicom-depot migrate`)."""
    is_new = not settings.database_path.exists() or settings.database_path.stat().st_size == 0
    database = Database(settings.database_path)
    try:
        if is_new:
            database.migrate()
        database.check_version()
    except BaseException:
        database.close()
        raise
    return database


def _open_store(settings: Settings, index: InstanceIndex) -> BlobStore:
    """An index that knows instances has a store somewhere: an unmounted disk must not get an empty one instead."""
    return FolderBlobStore(settings.store_path, may_create=index.sequence() == 0)


def _secret_keys(settings: Settings) -> list[bytes]:
    if settings.secret_keys:
        return parse_keys([key.get_secret_value() for key in settings.secret_keys])
    return [key_file(Path(settings.data_dir) / "secret.key")]
