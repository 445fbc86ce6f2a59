"""From a checked request to what the store takes: defaults, limits, shape, and whether any device could ever hold it.

What tells a request from another one that came under the same key or name is made here too. Pure but for a bounded cache of
shapes.
"""

import datetime as dt
import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from manager.core.errors import BadRequest, DeadlinePassed, Infeasible, TooLarge, UnknownDependency
from manager.core.functions import DEFAULT_ENVIRONMENT, PublishedFunction
from manager.core.ids import is_id
from manager.core.model import IdempotencyKey, Submission, TaskSpec
from manager.core.node_kinds import Capacity
from manager.core.quantities import format_duration, format_memory, parse_duration
from manager.core.requests import LINKS_MAX, ResourceRequest, TaskRequest, priority_of
from manager.core.shapes import Resources, Shape, shape_id, shape_of
from manager.core.wanted import WrongField, resources_of
from manager.settings import Settings

TIME_LIMIT_S_MIN: Final = 0.001
AHEAD_S_MAX: Final = 366 * 86_400
"""A deadline that is further ahead is a typing error: durations end there too."""


def submission_of(
    request: TaskRequest,
    function: PublishedFunction,
    tenant: str,
    task_id: str,
    settings: Settings,
    within: str = "",
    after: tuple[str, ...] = (),
    digest: str = "",
) -> Submission:
    """What the store takes for a task.

    Args:
        request: its arguments have been checked.
        within: where the request stands in a batch, such as ``tasks[3].``, for errors.
        after: ids of what it comes after, as `parents_of` gives them.
        digest: of what was asked for, where the task has a name.

    Raises:
        BadRequest: a quantity cannot be read or is out of range.
        TooLarge: the arguments are.
    """
    if len(memoryview(request.args)) > settings.api.args_bytes_max:
        raise TooLarge(
            f"{within}args are over the limit of {settings.api.args_bytes_max} bytes (api.args_bytes_max).",
            bytes_max=settings.api.args_bytes_max,
        )
    shape, identity, resources = shape_for(request.resources, function, tenant, within)
    start_s, total_s, deadline_ms = _limits(request, within) if _is_limited(request) else (0.0, 0.0, 0)
    if request.index_as is not None and request.count is None:
        raise BadRequest(f"{within}index_as: only an array has an index; give 'count' too.", field=f"{within}index_as")
    if request.retry_on and request.max_attempts == 1:
        raise BadRequest(
            f"{within}retry_on: the task has one attempt, so no error is worth another; give 'max_attempts' of 2 or more too.",
            field=f"{within}retry_on",
        )
    spec = TaskSpec(
        function=request.function,
        args=request.args,
        resources=resources,
        priority=_priority(request.priority, within),
        max_attempts=request.max_attempts,
        time_limit_s=_time_limit(request.time_limit, function.time_limit_s, settings, within),
        retry_on=request.retry_on,
        start_timeout_s=start_s,
        total_timeout_s=total_s,
        deadline_ms=deadline_ms,
        name=request.name or "",
        after=after,
        after_failed=request.after_failed,
        count=request.count or 0,
        index_as=request.index_as or "",
    )
    return Submission(task_id, identity, shape, spec, digest)


def digest_of(asked: object) -> str:
    """What names a request: the same for every way to write it down."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def idempotency_key(given: bytes, digest: str) -> IdempotencyKey:
    """What the store keeps of a caller's key: nothing that could be a secret of theirs."""
    return IdempotencyKey(hashlib.sha256(given).hexdigest(), digest)


def parents_of(request: TaskRequest, before: Sequence[str] | None, within: str = "") -> tuple[str, ...]:
    """Ids of what the task comes after, each once.

    Args:
        before: ids of the tasks that stand before it in its batch; None: it is in none.

    Raises:
        BadRequest: a number that names no task before it.
        UnknownDependency: what is no id names no task.
    """
    found: dict[str, None] = {}
    for place, parent in enumerate(request.after):
        field = f"{within}after[{place}]"
        if isinstance(parent, str):
            if not is_id(parent):
                raise UnknownDependency(f"{field}: {parent[:80]!r} is no id of a task or an array.", field=field)
            found[parent] = None
        elif before is None:
            raise BadRequest(f"{field}: a number names a task of the same batch, and this is none; write its id.", field=field)
        elif not 0 <= parent < len(before):
            which = f"the tasks before this one are 0 to {len(before) - 1}" if before else "there is no task before this one"
            raise BadRequest(f"{field}: {parent} names no earlier task of the batch; {which}.", field=field)
        else:
            found[before[parent]] = None
    return tuple(found)


def refuse_tangled(links: int, field: str) -> None:
    """Refuse a request whose tasks come after too many others, counted for each of them.

    Raises:
        BadRequest: says what would do instead.
    """
    if links > LINKS_MAX:
        raise BadRequest(
            f"{field}: the tasks of this request come after {links:,} others, counted for each of them; at most "
            f"{LINKS_MAX:,} can be. Submit one task that comes after those others, and let these come after that one.",
            field=field,
        )


def refuse_in_batch(requests: Sequence[TaskRequest]) -> None:
    """Refuse what cannot stand in a batch: arrays, and a name twice.

    Raises:
        BadRequest: says where.
    """
    names: dict[str, int] = {}
    for number, request in enumerate(requests):
        if request.count is not None:
            field = f"tasks[{number}].count"
            raise BadRequest(f"{field}: a batch has no arrays; submit an array by itself, with POST /v1/tasks.", field=field)
        if request.name is not None and (first := names.setdefault(request.name, number)) != number:
            field = f"tasks[{number}].name"
            raise BadRequest(f"{field}: tasks[{first}] has the same name; names are unique.", field=field)


def refuse_late(spec: TaskSpec, now_ms: int, within: str = "") -> None:
    """Refuse what should have ended already.

    Raises:
        DeadlinePassed: by how much.
    """
    if spec.deadline_ms and spec.deadline_ms <= now_ms:
        ago = format_duration((now_ms - spec.deadline_ms) / 1000)
        when = dt.datetime.fromtimestamp(spec.deadline_ms / 1000, dt.UTC)
        field = f"{within}deadline"
        raise DeadlinePassed(f"{field}: {when:%Y-%m-%dT%H:%M:%SZ} was {ago} ago.", field=field)
    if spec.deadline_ms > now_ms + AHEAD_S_MAX * 1000:
        field = f"{within}deadline"
        raise BadRequest(f"{field}: it is more than 366 days ahead.", field=field)


def shape_for(
    wanted: ResourceRequest, function: PublishedFunction | None, tenant: str, within: str = ""
) -> tuple[Shape, str, Resources]:
    """The shape, its id, and the resources that are asked for: the function's where no others are.

    Raises:
        BadRequest: something of it cannot be read, or no memory is named at all.
    """
    if function is None and wanted.memory is None:
        raise BadRequest("Name a function, or resources.memory.", field="function")
    try:
        resources = resources_of(wanted, None if function is None else function.needs)
    except WrongField as error:
        field = f"{within}resources.{error.field}"
        raise BadRequest(f"{field}: {_short(error)}.", field=field) from None
    if function is None:
        return *_shape(tenant, DEFAULT_ENVIRONMENT, resources, 0), resources
    return *_shape(tenant, function.environment, resources, function.max_tasks_per_slot), resources


def refuse_infeasible(shape: Shape, asked: Resources, capacity: Capacity, within: str = "") -> None:
    """Refuse what no node that is known, or could be added, could ever hold. With none known, nothing is refused.

    Args:
        shape: what a slot would lease.
        asked: what was asked for, for words.
        capacity: what there is.

    Raises:
        Infeasible: says what would have to be otherwise, and what the nearest node is.
    """
    refusal = capacity.refusal(shape.resources)
    if refusal is None:
        return
    field = f"{within}resources.{refusal.field}"
    more = {}
    if refusal.usable_bytes:
        more = {"memory_bytes": shape.memory_bytes, "usable_bytes_max": refusal.usable_bytes}
    raise Infeasible(
        f"{field}: {_amount(refusal.field, shape, asked)}{refusal.detail}",
        reason=refusal.reason.value,
        field=field,
        node=refusal.node,
        **more,
    )


def _amount(field: str, shape: Shape, asked: Resources) -> str:
    """How much was asked for, where that is what is too much."""
    match field:
        case "memory":
            lease = f" (a lease of {format_memory(shape.memory_bytes)})" if shape.memory_bytes != asked.memory_bytes else ""
            return f"{format_memory(asked.memory_bytes)}{lease} is "
        case "host_memory":
            return f"{format_memory(asked.host_memory_bytes)} is "
        case "cpus":
            return f"{asked.cpu_milli / 1000:g} is "
        case _:
            return ""


@lru_cache(maxsize=4096)
def _shape(tenant: str, environment: str, resources: Resources, max_tasks_per_slot: int) -> tuple[Shape, str]:
    shape = shape_of(tenant, environment, resources, max_tasks_per_slot)
    return shape, shape_id(shape)


def _priority(asked: int | str, within: str) -> int:
    try:
        return priority_of(asked)
    except ValueError as error:
        field = f"{within}priority"
        raise BadRequest(f"{field}: {_short(error)}.", field=field) from None


def _time_limit(asked: float | str | None, default_s: float | None, settings: Settings, within: str) -> float:
    limits = settings.tasks
    if asked is None:
        return min(limits.time_limit_s if default_s is None else default_s, limits.time_limit_s_max)
    field = f"{within}time_limit"
    try:
        seconds = parse_duration(asked)
    except ValueError as error:
        raise BadRequest(f"{field}: {_short(error)}.", field=field) from None
    if not TIME_LIMIT_S_MIN <= seconds <= limits.time_limit_s_max:
        most = format_duration(limits.time_limit_s_max)
        raise BadRequest(f"{field}: it must be above 0 and at most {most} (tasks.time_limit_s_max).", field=field)
    return seconds


def _is_limited(request: TaskRequest) -> bool:
    return request.start_timeout is not None or request.total_timeout is not None or request.deadline is not None


def _limits(request: TaskRequest, within: str) -> tuple[float, float, int]:
    """Seconds to the start, seconds in all, and the deadline in ms; 0 is none."""
    start_s = _timeout(request.start_timeout, f"{within}start_timeout")
    total_s = _timeout(request.total_timeout, f"{within}total_timeout")
    if total_s and start_s > total_s:
        field = f"{within}start_timeout"
        raise BadRequest(
            f"{field}: {format_duration(start_s)} is longer than the total_timeout of {format_duration(total_s)}, "
            "by which the task would have ended already.",
            field=field,
        )
    deadline = request.deadline
    # What was before 1970 is as late as that.
    return start_s, total_s, 0 if deadline is None else max(1, int(deadline.timestamp() * 1000))


def _timeout(asked: float | str | None, field: str) -> float:
    if asked is None:
        return 0.0
    try:
        seconds = parse_duration(asked)
    except ValueError as error:
        raise BadRequest(f"{field}: {_short(error)}.", field=field) from None
    if seconds < TIME_LIMIT_S_MIN:
        raise BadRequest(f"{field}: it must be above 0; leave it out for no limit.", field=field)
    return seconds


def _short(error: ValueError) -> str:
    text = str(error)
    return text if len(text) <= 300 else f"{text[:200]} … {text[-80:]}"
