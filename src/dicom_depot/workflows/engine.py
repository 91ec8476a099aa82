"""The durable engine. What a step does is in `export.runner`; here is only the order, and the recovery.

Three workflows, whose inputs are ids only and whose own ids say what they are, so that starting one twice starts it
once:

    <operation>-<generation>-plan        begin, then plan page by page; queues the first chunks
    <operation>-<generation>-chunk-<n>   runs one chunk; queues the chunk that its end makes room for
    <operation>-<generation>-finish      started by whichever step found that nothing else is left

An operation that is resumed becomes its next generation, so that its workflows are really run again. The steps ask
whether their generation is still the operation's: what an earlier one left in the queue does nothing.

No workflow waits for another one. At most `window` chunks of an operation are queued: chunk n is queued when chunk
n - window is done, by that chunk's end or, if it was not planned by then, by the planner. Both sides look after they
have committed, so at least one of them sees the other.
"""

from __future__ import annotations

import functools
import json
import logging
import sqlite3
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dbos import DBOS, DBOSConfig, Serializer, SetEnqueueOptions, SetWorkflowID

from dicom_depot.domain.operation import OperationId
from dicom_depot.export.runner import ExportRunner, StepResult
from dicom_depot.ports import OperationStore

_log = logging.getLogger(__name__)

CONTRACT_VERSION = "2"
"""Version of the workflows' order and inputs. Raise it only when running workflows of the old one could not go on."""

CHUNKS_OF_ONE_OPERATION = 3
"""Chunks of one operation that run at the same time in a process: one drains while the next one fills the threads. A
third one stands ready: to a near destination a chunk is copied as fast as the next one is claimed and looked up.
"""
WINDOW = 2 * CHUNKS_OF_ONE_OPERATION

_QUEUE = "export-chunks"
_POLLING_SECONDS = 0.2
"""A look costs 2 ms of CPU, more while much is copied; a shorter time only lets a small export begin earlier."""
_MAINTENANCE_SECONDS = 60.0
_SECOND_LOOK_SECONDS = 5.0
"""How soon after its start the engine looks whether what it resumed did what it was resumed for."""
_DELETED_AT_ONCE = 500


class DbosEngine:
    """`ports.DurableEngine` on DBOS. One per process: DBOS itself is a singleton."""

    def __init__(self, database: Path, runner: ExportRunner, operations: OperationStore) -> None:
        self._runner = runner
        self._operations = operations
        self._closed = threading.Event()
        _use_wal(database)
        config: DBOSConfig = {
            "name": "dicom-depot",
            "system_database_url": f"sqlite:///{database}",
            "application_version": CONTRACT_VERSION,
            "executor_id": uuid.uuid4().hex,
            "serializer": _JsonSerializer(),
            "log_level": "ERROR",
            "notification_listener_polling_interval_sec": 1.0,
        }
        self._executor_id = config["executor_id"]
        DBOS(config=config)
        _log_with_ours(logging.WARNING)
        self._plan_workflow = _workflow("plan", self._plan)
        self._chunk_workflow = _workflow("chunk", self._chunk)
        self._finish_workflow = _workflow("finish", self._finish)

    def launch(self) -> None:
        """Begin to run workflows, first of all those that a dead process left behind.

        The caller holds the exclusive lock of the data folder: every other executor is dead.
        """
        DBOS.launch()
        DBOS.register_queue(
            _QUEUE,
            partition_worker_concurrency=CHUNKS_OF_ONE_OPERATION,
            polling_interval_sec=_POLLING_SECONDS,
            on_conflict="always_update",
        )
        self._take_over()
        threading.Thread(target=self._maintain, name="engine-maintenance", daemon=True).start()

    def start(self, operation_id: OperationId, generation: int) -> None:
        self._start_plan(operation_id, generation)

    def settle(self, operation_id: OperationId, generation: int) -> None:
        if self._runner.is_settled(operation_id, generation):
            self._start_finish(operation_id, generation)

    def close(self) -> None:
        """Stop; what runs goes on in the next process."""
        self._closed.set()
        self._runner.close()
        _log_with_ours(logging.CRITICAL)  # steps that stop find DBOS's database closed, as they should
        DBOS.destroy(destroy_registry=True)

    def _plan(self, operation_id: str, generation: int) -> None:
        id_ = OperationId(operation_id)
        self._follow(id_, generation, DBOS.run_step({"name": "begin"}, self._runner.begin, id_, generation))
        while (result := DBOS.run_step({"name": "plan"}, self._runner.plan, id_, generation)) is not None:
            self._follow(id_, generation, result)
        # Once more over everything: a page that was planned by a step that failed afterwards is not in any result.
        self._follow(id_, generation, DBOS.run_step({"name": "planned"}, self._runner.begin, id_, generation))

    def _chunk(self, operation_id: str, generation: int, number: int) -> None:
        id_ = OperationId(operation_id)
        result = DBOS.run_step({"name": "run_chunk"}, self._runner.run_chunk, id_, generation, number)
        self._follow(id_, generation, result)

    def _finish(self, operation_id: str, generation: int) -> None:
        DBOS.run_step({"name": "finish"}, self._runner.finish, OperationId(operation_id), generation)

    def _follow(self, operation_id: OperationId, generation: int, result: StepResult) -> None:
        queue, is_settled = result
        for number in queue:
            self._queue_chunk(operation_id, generation, number)
        if is_settled:
            self._start_finish(operation_id, generation)

    def _start_plan(self, operation_id: OperationId, generation: int) -> None:
        with SetWorkflowID(f"{operation_id}-{generation}-plan"):
            DBOS.start_workflow(self._plan_workflow, operation_id, generation)

    def _queue_chunk(self, operation_id: OperationId, generation: int, number: int) -> None:
        with (
            SetWorkflowID(f"{operation_id}-{generation}-chunk-{number}"),
            SetEnqueueOptions(queue_partition_key=operation_id),
        ):
            DBOS.enqueue_workflow(_QUEUE, self._chunk_workflow, operation_id, generation, number)

    def _start_finish(self, operation_id: OperationId, generation: int) -> None:
        with SetWorkflowID(f"{operation_id}-{generation}-finish"):
            DBOS.start_workflow(self._finish_workflow, operation_id, generation)

    def _take_over(self) -> None:
        """Resume what dead processes ran. Workflows of another contract are dropped: the records say all that is needed
        to go on.
        """
        for status in DBOS.list_workflows(status=["PENDING", "ENQUEUED"], load_input=False, load_output=False):
            if status.app_version != CONTRACT_VERSION:
                DBOS.delete_workflow(status.workflow_id)
            elif status.status == "PENDING" and status.executor_id != self._executor_id:
                queue = _QUEUE if status.queue_name == _QUEUE else None
                DBOS.resume_workflow(status.workflow_id, queue_name=queue)
        for operation_id in self._operations.active():
            # Whether its work is done is for the operation's record to say: the two may stem from different backups.
            self._delete(workflow_id_prefix=f"{operation_id}-", status=["SUCCESS", "ERROR"])
        self._go_on()

    def _go_on(self) -> None:
        """Start what an operation's record promises but no workflow stands for: the two databases do not commit
        together, and a workflow that met an error ended with it.
        """
        for operation_id in self._operations.active():
            generation = self._runner.generation(operation_id)
            wanted = self._wanted(operation_id, generation)
            ended = DBOS.list_workflows(
                workflow_ids=sorted(wanted), status=["SUCCESS", "ERROR"], load_input=False, load_output=False
            )
            # Asked again, because an end that is in the record came before the workflow's: the rest ended in vain.
            in_vain = self._wanted(operation_id, generation).intersection(status.workflow_id for status in ended)
            for workflow_id in in_vain:
                _log.warning("workflow %s ended without its work; it is begun again", workflow_id)
                DBOS.delete_workflow(workflow_id)
            self._start_plan(operation_id, generation)
            self._follow(operation_id, generation, self._runner.begin(operation_id, generation))

    def _wanted(self, operation_id: OperationId, generation: int) -> set[str]:
        """The workflows that still have something to do, by the operation's record."""
        chunks, is_settled = self._runner.begin(operation_id, generation)
        wanted = {f"{operation_id}-{generation}-chunk-{number}" for number in chunks}
        if is_settled:
            wanted.add(f"{operation_id}-{generation}-finish")
        elif not self._operations.get(operation_id).is_planned:
            wanted.add(f"{operation_id}-{generation}-plan")
        return wanted

    def _maintain(self) -> None:
        """Now and then remove the workflow rows of ended operations, and see to it that the others go on."""
        pause = _SECOND_LOOK_SECONDS
        while not self._closed.wait(pause):
            pause = _MAINTENANCE_SECONDS
            try:
                self.purge_ended()
                self._go_on()
            except Exception:
                if not self._closed.is_set():
                    _log.exception("the upkeep of the workflows did not complete; trying again later")

    def purge_ended(self, older_than: timedelta = timedelta(minutes=10)) -> None:
        """Remove the workflow rows of operations that ended before a while; of one that was resumed since, those of the
        generation that ended.
        """
        before = (datetime.now(UTC) - older_than).isoformat()
        ended = DBOS.list_workflows(name="finish", status="SUCCESS", completed_before=before, load_input=False)
        for status in ended:
            self._delete(workflow_id_prefix=status.workflow_id.removesuffix("finish"), app_version=status.app_version)

    def _delete(self, **chosen: Any) -> None:
        rows = DBOS.list_workflows(load_input=False, load_output=False, **chosen)
        for start in range(0, len(rows), _DELETED_AT_ONCE):
            DBOS.delete_workflows([row.workflow_id for row in rows[start : start + _DELETED_AT_ONCE]])


def _workflow(name: str, method: Callable[..., None]) -> Callable[..., None]:
    """Register a method as a workflow. DBOS marks the function that it is given, and a bound method takes no marks."""

    @functools.wraps(method)
    def run(*ids: str | int) -> None:
        method(*ids)

    return DBOS.workflow(name=name, max_recovery_attempts=None)(run)


class _JsonSerializer(Serializer):
    """Workflow inputs and step results as JSON: nothing in the database can run code when it is read."""

    def serialize(self, data: Any) -> str:
        return json.dumps(data, default=str)

    def deserialize(self, serialized_data: str) -> Any:
        return json.loads(serialized_data)

    def name(self) -> str:
        return "json"


def _use_wal(database: Path) -> None:
    """Write-ahead logging stays with the file; DBOS does not switch it on by itself."""
    database.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA journal_mode=WAL").close()
    connection.close()


def _log_with_ours(level: int) -> None:
    """DBOS's own log lines go where ours go, instead of to the handler that it made for itself."""
    logger = logging.getLogger("dbos")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(level)
