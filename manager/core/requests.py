"""What the REST API takes, as values. The API and the Python client both use these, so they cannot differ.

Owns the names of JSON fields. Memory is integer bytes (``*_bytes``), times are ISO-8601 in UTC (``*_at``), durations are
seconds (``*_s``). Unknown fields are refused. What the API gives is `manager.core.answers`.
"""

import enum
from typing import Annotated, Final

import msgspec

from manager.core.model import Priority
from manager.core.shapes import GPUS_MAX

TASKS_PER_BATCH_MAX: Final = 500
"""Tasks of one batch: the store accepts them in one step, which holds up everybody else."""
SLOTS_WARM_MAX: Final = 10_000
"""Slots that one request keeps warm: each is a process."""
PAGE_MAX: Final = 500
"""Tasks of one page: a page is one step of the store."""
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9-]{0,62}$"
"""What a tenant may be called: it becomes part of names in the store."""

Size = Annotated[
    int | str,
    msgspec.Meta(description="Bytes, or a number and a unit: '24GiB', '512MiB'.", examples=["24GiB", 25769803776]),
]
Duration = Annotated[
    float | str,
    msgspec.Meta(description="Seconds, or a number and a unit: '90s', '5m', '1.5h'.", examples=["5m", 300]),
]
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
    """

    memory: Size | None = None
    gpus: Annotated[int, msgspec.Meta(ge=1, le=GPUS_MAX)] | None = None


class TaskRequest(Request, frozen=True):
    """One task.

    Attributes:
        function: a registered name, see GET /v1/functions.
        args: JSON object of its keyword arguments.
        resources: what it needs.
        priority: -10 to 10; higher first.
        max_attempts: how often the function may run if it fails.
        time_limit: how long one attempt may take.
    """

    function: Annotated[str, msgspec.Meta(min_length=1, max_length=200, examples=["echo"])]
    args: Arguments = msgspec.field(default_factory=no_arguments)
    resources: ResourceRequest = ResourceRequest()
    priority: Priority = 0
    max_attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    time_limit: Duration | None = None


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
