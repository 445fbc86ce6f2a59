"""From a checked request to what the store takes: defaults, limits, shape, and whether any device could ever hold it.

Pure but for a bounded cache of shapes.
"""

from functools import lru_cache

from manager.api.watch import Largest
from manager.core.errors import BadRequest, Infeasible, TooLarge
from manager.core.functions import DEFAULT_ENVIRONMENT, PublishedFunction
from manager.core.model import Submission, TaskSpec
from manager.core.quantities import format_duration, format_memory, parse_duration, parse_memory
from manager.core.requests import ResourceRequest, TaskRequest
from manager.core.shapes import Resources, Shape, shape_id, shape_of
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
        priority=request.priority,
        max_attempts=request.max_attempts,
        time_limit_s=_time_limit(request.time_limit, function.time_limit_s, settings, within),
    )
    return Submission(task_id, identity, shape, spec)


def shape_for(
    wanted: ResourceRequest, function: PublishedFunction | None, tenant: str, within: str = ""
) -> tuple[Shape, str, Resources]:
    """The shape, its id, and the resources that are asked for: the function's where no others are.

    Raises:
        BadRequest: memory that cannot be read, or none at all.
    """
    if function is None:
        if wanted.memory is None:
            raise BadRequest("Name a function, or resources.memory.", field="function")
        resources = Resources(_memory(wanted.memory, within), wanted.gpus or 1)
        return *_shape(tenant, DEFAULT_ENVIRONMENT, resources, 0), resources
    resources = Resources(
        function.memory_bytes if wanted.memory is None else _memory(wanted.memory, within),
        function.gpus if wanted.gpus is None else wanted.gpus,
    )
    return *_shape(tenant, function.environment, resources, function.max_tasks_per_slot), resources


def refuse_infeasible(shape: Shape, asked_bytes: int, largest: tuple[Largest, ...], within: str = "") -> None:
    """Refuse what no known node could ever hold. With no node known, nothing can be said and nothing is refused.

    Args:
        largest: per number of devices, the best that any node has.

    Raises:
        Infeasible: names the largest and what it could hold.
    """
    if not largest:
        return
    if shape.gpus > len(largest):
        raise Infeasible(
            f"{within}resources.gpus: {shape.gpus} devices on one node are asked for; no node has more than {len(largest)}.",
            gpus=shape.gpus,
            gpus_max=len(largest),
        )
    best = largest[shape.gpus - 1]
    if shape.memory_bytes > best.usable_bytes:
        asked = format_memory(asked_bytes)
        if shape.memory_bytes != asked_bytes:
            asked += f" (a lease of {format_memory(shape.memory_bytes)})"
        where = "The largest device," if shape.gpus == 1 else f"On {shape.gpus} devices at once, the largest,"
        raise Infeasible(
            f"{within}resources.memory: {asked} is more than any device here could ever hold. {where} {best.model} on "
            f"{best.node}, can hold {best.usable_bytes / 2**30:.1f} GiB{' each' if shape.gpus > 1 else ''}.",
            memory_bytes=shape.memory_bytes,
            usable_bytes_max=best.usable_bytes,
            node=best.node,
        )


@lru_cache(maxsize=4096)
def _shape(tenant: str, environment: str, resources: Resources, max_tasks_per_slot: int) -> tuple[Shape, str]:
    shape = shape_of(tenant, environment, resources, max_tasks_per_slot)
    return shape, shape_id(shape)


def _memory(text: str | int, within: str) -> int:
    try:
        return parse_memory(text)
    except ValueError as error:
        field = f"{within}resources.memory"
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
