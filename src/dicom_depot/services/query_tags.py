"""What an operator can do with extended query tags: add, list, enable, remove, and see what could not be indexed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from dicom_depot.domain.access import Caller
from dicom_depot.domain.errors import NotFound
from dicom_depot.domain.export import Everything
from dicom_depot.domain.operation import OperationId, OperationType, new_operation_id
from dicom_depot.domain.query_tags import NewQueryTag, QueryTag
from dicom_depot.ports import DurableEngine, NewOperation, QueryTags

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class QueryTagService:
    """The extended query tag API without HTTP."""

    tags: QueryTags
    engine: DurableEngine

    def add(self, wanted: Sequence[NewQueryTag], caller: Caller) -> OperationId:
        """Record tags and begin to index what is stored already. When this returns, the operation will run to its end,
        whatever dies. Errors as `ports.QueryTags.add`.
        """
        operation = NewOperation(
            id=new_operation_id(),
            cutoff=0,
            source=Everything(),
            destination={},
            sealed_secret=None,
            log_href="",
            log_etag=None,
            fingerprint="",
            idempotency_key=None,
            created_by=caller.key,
            type=OperationType.REINDEX,
            query={"tags": [tag.path for tag in wanted]},
        )
        operation_id = self.tags.add(wanted, operation)
        _log.info("operation %s recorded: index %d extended query tags", operation_id, len(wanted))
        try:
            self.engine.start(operation_id, 1)
        except Exception:
            _log.exception("operation %s is recorded and begins later", operation_id)
        return operation_id

    def get(self, path: str) -> QueryTag:
        """Raises NotFound."""
        for tag in self.tags.all():
            if tag.path == path:
                return tag
        raise NotFound(f"There is no extended query tag {path}.", target="tagPath")
