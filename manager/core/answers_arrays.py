"""What the REST API gives of an array of tasks. See `answers`."""

import msgspec

from manager.core.answers import Time, utc
from manager.core.model import ArrayRow


class ArrayView(msgspec.Struct, frozen=True, kw_only=True):
    """An array of tasks: how many of them have ended how.

    Attributes:
        name: the tenant's own for it; null where it has none.
        index_as: the argument in which each task finds its index; null: it is in none.
        count: how many tasks it has.
        made: how many of these have a record yet; the others follow by themselves.
        unfinished: how many have not ended.
    """

    array_id: str
    tenant: str
    function: str
    name: str | None = None
    index_as: str | None = None
    count: int
    made: int
    succeeded: int
    failed: int
    cancelled: int
    unfinished: int
    created_at: Time


class ArrayCancelled(msgspec.Struct, frozen=True):
    """What the cancellation of an array did.

    Attributes:
        cancelled: tasks that have ended by it at once.
        ending: tasks that run, and are being ended.
    """

    array_id: str
    cancelled: int
    ending: int


def array_view(row: ArrayRow) -> ArrayView:
    """The array as it is shown."""
    spec = row.spec
    return ArrayView(
        array_id=row.array_id,
        tenant=row.tenant,
        function=row.function,
        name=spec.name or None if spec is not None else None,
        index_as=spec.index_as or None if spec is not None else None,
        count=row.count,
        made=row.made,
        succeeded=row.succeeded,
        failed=row.failed,
        cancelled=row.cancelled,
        unfinished=row.count - row.succeeded - row.failed - row.cancelled,
        created_at=utc(row.created_ms),
    )
