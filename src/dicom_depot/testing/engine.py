"""A double of the durable engine: the workflows of `workflows.engine`, one after the other, in the calling thread.

What DBOS keeps in its database stands in `WorkflowRecords`, which outlives the engine as a database outlives a process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from dicom_depot.domain.operation import OperationId
from dicom_depot.ports import OperationStore
from dicom_depot.testing.faults import FaultPlan

_T = TypeVar("_T")

_Follows = tuple[list[int], bool]
"""What follows from a step: chunks to queue, and whether only the finish is missing."""


class Steps(Protocol):
    """The durable steps: `export.runner.ExportRunner`, which lies above the test kit."""

    def generation(self, operation_id: OperationId) -> int: ...
    def begin(self, operation_id: OperationId, generation: int) -> _Follows: ...
    def plan(self, operation_id: OperationId, generation: int) -> _Follows | None: ...
    def run_chunk(self, operation_id: OperationId, generation: int, number: int) -> _Follows: ...
    def is_settled(self, operation_id: OperationId, generation: int) -> bool: ...
    def finish(self, operation_id: OperationId, generation: int) -> None: ...


@dataclass(slots=True)
class WorkflowRecords:
    """Which workflows were begun and not ended, which ended, and what each of their steps returned."""

    waiting: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    results: dict[tuple[str, int], Any] = field(default_factory=dict)


class StepEngine:
    """`ports.DurableEngine` that works when `run` is called.

    A step whose result was recorded is not run again. With `faults`, a step is called as `step.<name>`: one that
    crashes after its effect runs again when the next engine takes over, as it does in production.
    """

    def __init__(
        self,
        runner: Steps,
        operations: OperationStore,
        records: WorkflowRecords,
        faults: FaultPlan | None = None,
    ) -> None:
        self._runner = runner
        self._operations = operations
        self._records = records
        self._faults = faults or FaultPlan()
        self._workflow = ""
        self._steps = 0

    def start(self, operation_id: OperationId, generation: int) -> None:
        self._start_plan(operation_id, generation)

    def settle(self, operation_id: OperationId, generation: int) -> None:
        if self._runner.is_settled(operation_id, generation):
            self._start_finish(operation_id, generation)

    def take_over(self) -> None:
        """What an engine does at its launch: go on with every operation that has not ended."""
        for operation_id in self._operations.active():
            generation = self._runner.generation(operation_id)
            self._start_plan(operation_id, generation)
            self._follow(operation_id, generation, self._runner.begin(operation_id, generation))

    def run(self) -> None:
        """Run workflows until none is left."""
        while self._records.waiting:
            self.run_one()

    def run_one(self) -> None:
        """Run the workflow that has waited longest."""
        name, (kind, *arguments) = next(iter(self._records.waiting.items()))
        self._workflow, self._steps = name, 0
        getattr(self, f"_{kind}")(*arguments)
        del self._records.waiting[name]
        self._records.ended.add(name)

    def _plan(self, operation_id: OperationId, generation: int) -> None:
        begun = self._step("begin", lambda: self._runner.begin(operation_id, generation))
        self._follow(operation_id, generation, begun)
        while (result := self._step("plan", lambda: self._runner.plan(operation_id, generation))) is not None:
            self._follow(operation_id, generation, result)
        begun = self._step("planned", lambda: self._runner.begin(operation_id, generation))
        self._follow(operation_id, generation, begun)

    def _chunk(self, operation_id: OperationId, generation: int, number: int) -> None:
        result = self._step("run_chunk", lambda: self._runner.run_chunk(operation_id, generation, number))
        self._follow(operation_id, generation, result)

    def _finish(self, operation_id: OperationId, generation: int) -> None:
        self._step("finish", lambda: self._runner.finish(operation_id, generation))

    def _follow(self, operation_id: OperationId, generation: int, result: _Follows) -> None:
        queue, is_settled = result
        for number in queue:
            self._begin(f"{operation_id}-{generation}-chunk-{number}", "chunk", operation_id, generation, number)
        if is_settled:
            self._start_finish(operation_id, generation)

    def _start_plan(self, operation_id: OperationId, generation: int) -> None:
        self._begin(f"{operation_id}-{generation}-plan", "plan", operation_id, generation)

    def _start_finish(self, operation_id: OperationId, generation: int) -> None:
        self._begin(f"{operation_id}-{generation}-finish", "finish", operation_id, generation)

    def _begin(self, name: str, *workflow: object) -> None:
        if name not in self._records.ended:
            self._records.waiting.setdefault(name, workflow)

    def _step(self, name: str, function: Callable[[], _T]) -> _T:
        self._steps += 1
        place = (self._workflow, self._steps)
        if place not in self._records.results:
            self._records.results[place] = self._faults.call(f"step.{name}", function)
        result: _T = self._records.results[place]
        return result
