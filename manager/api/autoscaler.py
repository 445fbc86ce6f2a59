"""Routes about the autoscaler: what it may do, what it decided and why."""

import re
from typing import Final

import msgspec

from manager.api.exchange import Call, Reply
from manager.api.operations import Operation, Parameter
from manager.api.query import parse_query, whole_number
from manager.core.answers import utc
from manager.core.answers_autoscaler import AutoscalerView, DecisionList, DecisionNote, DecisionView, GroupBounds
from manager.core.errors import BadRequest
from manager.core.requests import PAGE_MAX, KeyScope
from manager.settings import Settings
from manager.store import Store

LIMIT: Final = 100
_ENTRY: Final = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(DecisionNote).decode


class AutoscalerRoutes:
    """What these routes need.

    Args:
        store: the process's connection.
        settings: mode and groups.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings

    async def show(self, call: Call) -> Reply:
        """Mode, groups and the last decision."""
        parse_query(call.query, ())
        last = [_decision(*entry) for entry in await self._store.journal(1)]
        groups = tuple(
            GroupBounds(
                name=name,
                provider=group.provider,
                devices=group.devices,
                workers_min=group.workers_min,
                workers_max=group.workers_max,
            )
            for name, group in sorted(self._settings.groups.items())
        )
        view = AutoscalerView(self._settings.autoscaler.mode, groups, last[0] if last else None)
        return Reply(200, _encode(view))

    async def decisions(self, call: Call) -> Reply:
        """A page of the journal."""
        query = parse_query(call.query, ("limit", "before"))
        limit = whole_number(query, "limit", LIMIT, 1, PAGE_MAX)
        before = query.get("before")
        if before is not None and not _ENTRY.fullmatch(before):
            raise BadRequest("before: write the next_cursor of the page before.", field="before")
        entries = await self._store.journal(limit + 1, before or "+")
        found = tuple(_decision(*entry) for entry in entries[:limit])
        return Reply(200, _encode(DecisionList(found, found[-1].id if len(entries) > limit else None)))

    def operations(self) -> tuple[Operation, ...]:
        """The routes."""
        return (
            Operation(
                name="autoscaler", method="GET", path="/v1/autoscaler", access=KeyScope.READ, handler=self.show,
                summary="Show the autoscaler's mode, its groups and what it decided last.", answer=AutoscalerView,
            ),
            Operation(
                name="list_decisions", method="GET", path="/v1/autoscaler/decisions", access=KeyScope.READ,
                handler=self.decisions, summary="List the autoscaler's decisions with what it knew and why, newest first.",
                answer=DecisionList,
                query=(
                    Parameter("limit", f"Decisions of a page; {LIMIT} if left out.", "integer", most=PAGE_MAX),
                    Parameter("before", "The next_cursor of the page before."),
                ),
            ),
        )  # fmt: skip


def _decision(entry_id: str, blob: bytes) -> DecisionView:
    """An entry of the journal. Its id begins with the store's time, in milliseconds."""
    note = _decode(blob)
    return DecisionView(id=entry_id, at=utc(int(entry_id.partition("-")[0])), **msgspec.structs.asdict(note))
