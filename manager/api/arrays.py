"""Routes of arrays: how far one is, and its end. They are submitted like tasks (`manager.api.accept`), and listed with them."""

import msgspec

from manager.api.exchange import Call, Reply
from manager.api.operations import Operation
from manager.api.query import parse_query
from manager.api.tasks import TENANT, tenant_of
from manager.core.answers_arrays import ArrayCancelled, ArrayView, array_view
from manager.core.errors import NotFound
from manager.core.ids import is_array_id
from manager.core.requests import KeyScope
from manager.store import Store

_NOT_THERE = "There is no such array."

_encode = msgspec.json.Encoder().encode


class ArrayRoutes:
    """What the routes of arrays need.

    Args:
        store: the process's connection.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get(self, call: Call) -> Reply:
        """How many of its tasks have ended how."""
        array_id, tenant = _addressed(call)
        row = await self._store.array(array_id)
        if row is None or row.tenant != tenant:
            raise NotFound(_NOT_THERE)
        return Reply(200, _encode(array_view(row)))

    async def cancel(self, call: Call) -> Reply:
        """Ask for the end of all its tasks, a bounded part in each step."""
        array_id, tenant = _addressed(call)
        first: int | None = 0
        cancelled = ending = 0
        while first is not None:
            step = await self._store.cancel_array(array_id, tenant, first)
            if step is None:
                raise NotFound(_NOT_THERE)
            first, ended, told = step
            cancelled += ended
            ending += told
        return Reply(200, _encode(ArrayCancelled(array_id, cancelled, ending)))

    def operations(self) -> tuple[Operation, ...]:
        """The routes."""
        one = "/v1/arrays/{array_id}"
        return (
            Operation(
                name="get_array", method="GET", path=one, access=KeyScope.READ, handler=self.get,
                summary="Get an array: how many of its tasks have ended how.", answer=ArrayView, errors=(NotFound,),
                query=(TENANT,),
            ),
            Operation(
                name="cancel_array", method="POST", path=f"{one}/cancel", access=KeyScope.USER, handler=self.cancel,
                summary="Cancel all tasks of an array that have not ended.", answer=ArrayCancelled, errors=(NotFound,),
                query=(TENANT,),
            ),
        )  # fmt: skip


def _addressed(call: Call) -> tuple[str, str]:
    array_id = call.params["array_id"]
    if not is_array_id(array_id):
        raise NotFound(_NOT_THERE)
    return array_id, tenant_of(call, parse_query(call.query, ("tenant",)).get("tenant"))
