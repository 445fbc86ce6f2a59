"""What the REST API takes, as values. The API and the Python client both use these, so they cannot differ.

Owns the names of JSON fields. Memory is integer bytes (``*_bytes``), times are ISO-8601 in UTC (``*_at``), durations are
seconds (``*_s``). Unknown fields are refused. What the API gives is `manager.core.answers` and the modules of its subjects.
"""

import datetime as dt
import difflib
import enum
from typing import Annotated, Final, TypedDict

import msgspec

from manager.core.ids import ARRAY_MAX
from manager.core.lifecycle import AfterFailed
from manager.core.model import PRIORITY_MAX, Priority
from manager.core.selectors import LABELS_MAX
from manager.core.shapes import CPU_MILLI_MAX, GPUS_MAX

TASKS_PER_BATCH_MAX: Final = 500
"""Tasks of one batch: the store accepts them in one step, which holds up everybody else."""
PLANNED_MAX: Final = 100_000
"""Tasks that one question is about: more than any queue is meant to hold."""
PLAN_KINDS_MAX: Final = 20
"""Kinds of requests that one question is about: each is a round of the planner."""
SLOTS_WARM_MAX: Final = 10_000
"""Slots that one request keeps warm: each is a process."""
PAGE_MAX: Final = 500
"""Tasks of one page: a page is one step of the store."""
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9-]{0,62}$(?!\n)"
"""What a tenant may be called: it becomes part of names in the store. `$` alone lets a line's end follow."""
TASK_NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$(?!\n)"
"""What a tenant may call a task of its own."""
AFTER_MAX: Final = 100
"""Tasks that one task comes after: who waits for more names an array, or a task that gathers."""
LINKS_MAX: Final = 20_000
"""Links of one request: each of its tasks, those of an array too, has one to each that it comes after. Others wait while the
store writes them."""
RETRY_ON_MAX: Final = 32
"""Errors that one task names as worth another attempt."""
ARCHITECTURES_MAX: Final = 16
"""Architectures of one request: whoever names more means any."""
PRIORITIES: Final[dict[str, int]] = {"low": -5, "normal": 0, "high": 5, "urgent": PRIORITY_MAX}
"""The priorities that have names."""

Size = Annotated[
    int | str,
    msgspec.Meta(description="Bytes, or a number and a unit: '24GiB', '512MiB'.", examples=["24GiB", 25769803776]),
]
Duration = Annotated[
    float | str,
    msgspec.Meta(description="Seconds, or a number and a unit: '90s', '5m', '1.5h'.", examples=["5m", 300]),
]
Share = Annotated[
    float | str,
    msgspec.Meta(description="A share of each device's compute: '50%', or a number from 0 to 1.", examples=[0.5, "50%"]),
]
Architecture = Annotated[
    str | Annotated[tuple[str, ...], msgspec.Meta(max_length=ARCHITECTURES_MAX)],
    msgspec.Meta(
        description="Names ('gfx942', 'sm_90'), families ('cdna3') or beginnings ('gfx94*'), any of which will do.",
        examples=["gfx942", ["cdna3", "cdna4"]],
    ),
]
AnyPriority = Annotated[
    Priority | str,
    msgspec.Meta(
        description=f"A number from -{PRIORITY_MAX} to {PRIORITY_MAX}, or "
        + ", ".join(f"'{name}' ({number})" for name, number in PRIORITIES.items())
        + ".",
        examples=["high", 0],
    ),
]
ErrorName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$(?!\n)")]
Arguments = Annotated[
    msgspec.Raw,
    msgspec.Meta(description="The function's keyword arguments.", extra_json_schema={"type": "object"}),
]


def no_arguments() -> msgspec.Raw:
    """An empty JSON object."""
    return msgspec.Raw(b"{}")


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What comes from outside: unknown fields are refused."""


class ResourceRequest(Request, frozen=True):
    """What the task needs; what is left out comes from the function.

    Attributes:
        memory: memory on each device.
        gpus: how many devices, all on one node.
        share: of the compute of each device; 0: none is counted.
        architecture: what each device must be; an empty text: anything.
        device_model: what the model of each device must be called, or a part of that; an empty text: anything.
        labels: what the node's labels must be.
        cpus: of the node, 0.5 is half of one; 0: none are counted.
        host_memory: of the node; 0: none is counted.
        exclusive: nobody else may have anything on these devices.
        model: what should be loaded already where the task is placed; an empty text: nothing.
    """

    memory: Size | None = None
    gpus: Annotated[int, msgspec.Meta(ge=1, le=GPUS_MAX)] | None = None
    share: Share | None = None
    architecture: Architecture | None = None
    device_model: Annotated[str, msgspec.Meta(max_length=1024, examples=["MI300X"])] | None = None
    labels: Annotated[dict[str, str], msgspec.Meta(max_length=LABELS_MAX)] | None = None
    cpus: Annotated[float, msgspec.Meta(ge=0, le=CPU_MILLI_MAX // 1000)] | None = None
    host_memory: Size | None = None
    exclusive: bool | None = None
    model: Annotated[str, msgspec.Meta(max_length=200)] | None = None


class Needs(TypedDict, total=False):
    """`ResourceRequest` as keyword arguments of the Python client. What is None comes from the function."""

    memory: int | str | None
    gpus: int | None
    share: float | str | None
    architecture: str | tuple[str, ...] | None
    device_model: str | None
    labels: dict[str, str] | None
    cpus: float | None
    host_memory: int | str | None
    exclusive: bool | None
    model: str | None


class TaskRequest(Request, frozen=True):
    """One task.

    Attributes:
        function: a registered name, see GET /v1/functions.
        args: JSON object of its keyword arguments.
        resources: what it needs.
        priority: higher first.
        max_attempts: how often the function may run if it fails.
        retry_on: which errors are worth another attempt: names of exceptions, of their bases, or of reasons; none: all.
        start_timeout: from its submission until it first starts.
        time_limit: how long one attempt may take.
        total_timeout: from its submission to its end, with all attempts and pauses.
        deadline: when it must have ended.
        name: unique among your tasks: asked for again, the same request is the same task.
        after: tasks and arrays that must have ended before; in a batch also numbers, of tasks that stand before it there.
        after_failed: what becomes of it when one of those does not succeed.
        count: makes it an array: so many tasks of the same kind.
        index_as: the argument that gives each task of the array its index, from 0.
        allow_infeasible: accept it although no node that is known, or could be added, could ever hold it.
    """

    function: Annotated[str, msgspec.Meta(min_length=1, max_length=200, examples=["echo"])]
    args: Arguments = msgspec.field(default_factory=no_arguments)
    resources: ResourceRequest = ResourceRequest()
    priority: AnyPriority = 0
    max_attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    retry_on: Annotated[tuple[ErrorName, ...], msgspec.Meta(max_length=RETRY_ON_MAX, examples=[["ConnectionError"]])] = ()
    start_timeout: Duration | None = None
    time_limit: Duration | None = None
    total_timeout: Duration | None = None
    deadline: Annotated[dt.datetime, msgspec.Meta(tz=True)] | None = None
    name: Annotated[str, msgspec.Meta(pattern=TASK_NAME_PATTERN, max_length=128, examples=["train-7"])] | None = None
    after: Annotated[tuple[str | int, ...], msgspec.Meta(max_length=AFTER_MAX)] = ()
    after_failed: AfterFailed = AfterFailed.FAIL
    count: Annotated[int, msgspec.Meta(ge=1, le=ARRAY_MAX)] | None = None
    index_as: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None
    allow_infeasible: bool = False


class PlanRequest(TaskRequest, frozen=True):
    """Tasks that are asked about, and not submitted: fields as of a task. Its arguments are checked where there are any.

    Attributes:
        count: how many of them.
    """

    count: Annotated[int, msgspec.Meta(ge=1, le=PLANNED_MAX)] = 1


class BatchRequest(Request, frozen=True):
    """Tasks that are accepted all or none."""

    tasks: Annotated[tuple[TaskRequest, ...], msgspec.Meta(min_length=1, max_length=TASKS_PER_BATCH_MAX)]


class DrainRequest(Request, frozen=True):
    """How a node is emptied.

    Attributes:
        deadline: what still runs after this goes back to the queue; null: it may take as long as it takes.
        remove: whether its agent ends, for good, once the node is empty.
    """

    deadline: Duration | None = None
    remove: bool = False


class WarmRequest(Request, frozen=True):
    """Slots that are to be open although nothing waits for them. Name a function, or resources, or both.

    Attributes:
        function: for whose tasks: its resources, where no others are named.
        resources: what each slot leases.
        slots: how many; 0: no more than work asks for.
        for_: for how long.
    """

    for_: Duration = msgspec.field(name="for")
    function: Annotated[str, msgspec.Meta(min_length=1, max_length=200, examples=["echo"])] | None = None
    resources: ResourceRequest = ResourceRequest()
    slots: Annotated[int, msgspec.Meta(ge=0, le=SLOTS_WARM_MAX)] = 1


class UnloadRequest(Request, frozen=True):
    """Whose idle slots are to close: those for a function, or for resources, or for both; or all of the tenant."""

    function: Annotated[str, msgspec.Meta(min_length=1, max_length=200, examples=["echo"])] | None = None
    resources: ResourceRequest = ResourceRequest()
    all: bool = False


class KeyScope(enum.StrEnum):
    """What a key may do. Each scope may do what those after it may."""

    ADMIN = "admin"  # keys, and the tasks of every tenant
    USER = "user"  # submit and cancel
    READ = "read"  # look


class KeyRequest(Request, frozen=True):
    """An API key to be made."""

    tenant: Annotated[str, msgspec.Meta(pattern=NAME_PATTERN, max_length=63, examples=["vision"])]
    scope: KeyScope = KeyScope.USER


def priority_of(value: int | str) -> int:
    """The number of a priority that may be given by its name.

    Raises:
        ValueError: says what was wrong and what would be right.
    """
    if isinstance(value, str):
        number = PRIORITIES.get(value.strip().lower())
        if number is None:
            near = difflib.get_close_matches(value.strip().lower()[:40], PRIORITIES, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{value[:40]!r} is not a priority{hint}: write {', '.join(PRIORITIES)}, "
                f"or a number from -{PRIORITY_MAX} to {PRIORITY_MAX}"
            )
        return number
    return value
