"""The limits of active operations, checked inside the transaction that adds one more."""

from __future__ import annotations

import sqlalchemy as sa

from dicom_depot.adapters.schema import operations
from dicom_depot.domain.errors import TooManyOperations
from dicom_depot.domain.operation import ACTIVE_STATUSES
from dicom_depot.ports import OperationLimits


def refuse_too_many(connection: sa.Connection, limits: OperationLimits | None, created_by: str) -> None:
    """Raises TooManyOperations when one more active operation of this creator is too many.

    Writers take turns (`Database.write`), so that two requests cannot both take the last place.
    """
    if limits is None:
        return
    is_active = operations.c.status.in_(sorted(ACTIVE_STATUSES))
    in_all = sa.select(sa.func.count()).select_from(operations).where(is_active)
    if created_by and connection.execute(in_all.where(operations.c.created_by == created_by)).scalar_one() >= (
        limits.per_caller
    ):
        raise TooManyOperations(
            f"{limits.per_caller} of this caller's operations are active already "
            "(DICOM_DEPOT_OPERATIONS_MAX_PER_CALLER). Try again when one has ended."
        )
    if connection.execute(in_all).scalar_one() >= limits.in_all:
        raise TooManyOperations(
            f"{limits.in_all} operations are active already (DICOM_DEPOT_OPERATIONS_MAX). Try again when one has ended."
        )
