"""From a checked request to what the store takes: defaults, limits, shape, and whether any device could ever hold it.

Pure but for a bounded cache of shapes.
"""

from functools import lru_cache

from manager.core.errors import BadRequest, Infeasible, TooLarge
from manager.core.functions import DEFAULT_ENVIRONMENT, PublishedFunction
from manager.core.model import Submission, TaskSpec
from manager.core.node_kinds import Capacity
from manager.core.quantities import format_duration, format_memory, parse_duration
from manager.core.requests import ResourceRequest, TaskRequest, priority_of
from manager.core.shapes import Resources, Shape, shape_id, shape_of
from manager.core.wanted import WrongField, resources_of
from manager.settings import Settings

TIME_LIMIT_S_MIN = 0.001


def submission_of(
    request: TaskRequest, function: PublishedFunction, tenant: str, task_id: str, settings: Settings, within: str = ""
) -> Submission:
    """What the store takes for a task.

    Args:
        request: its arguments have been checked.
        within: where the request stands in a batch, such as ``tasks[3].``, for errors.

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
    spec = TaskSpec(
        function=request.function,
        args=request.args,
        resources=resources,
        priority=_priority(request.priority, within),
        max_attempts=request.max_attempts,
        time_limit_s=_time_limit(request.time_limit, function.time_limit_s, settings, within),
    )
    return Submission(task_id, identity, shape, spec)


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


def _short(error: ValueError) -> str:
    text = str(error)
    return text if len(text) <= 300 else f"{text[:200]} … {text[-80:]}"
