"""What the REST API gives, as values, and how a record becomes one. The API and the Python client both use these.

Here is what several answers share; each subject has a module of its own beside this one. They own the names of JSON fields.
Memory is integer bytes (``*_bytes``), times are ISO-8601 in UTC (``*_at``), durations are seconds (``*_s``). Answers may gain
fields; who reads them must not mind.
"""

import datetime as dt
from typing import Annotated

import msgspec

from manager.core.shapes import Resources

AnyJson = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={})]
"""Any JSON, undecoded. (As one of a union, msgspec would not take it.)"""
Time = Annotated[dt.datetime, msgspec.Meta(tz=True)]
TaskId = Annotated[str, msgspec.Meta(description="26 characters, 0-9 and a-z; sorts by the time it was made.")]


class ResourcesView(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is asked for of one node; what is not, is left out.

    Attributes:
        memory_bytes: on each device.
        gpus: how many devices.
        share: of the compute of each device, 0 to 1.
        architecture: of which each device must have one.
        device_model: what its model must be called.
        labels: what the node's labels must be.
        cpus, host_memory_bytes: of the node.
        exclusive: nobody else may have anything on the devices.
        model: what should be loaded already.
    """

    memory_bytes: int
    gpus: int = 1
    share: float = 0  # no 0.0: a default is left out where it is the same object
    architecture: tuple[str, ...] = ()
    device_model: str = ""
    labels: dict[str, str] = {}
    cpus: float = 0
    host_memory_bytes: int = 0
    exclusive: bool = False
    model: str = ""


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error, as application/problem+json (RFC 9457). Clients match on `code`; more fields may stand beside these.

    Attributes:
        type: a URN that names the kind of error.
        title: that kind in words.
        detail: what was wrong here, and what would be right.
        code: PascalCase name of the kind.
        instance: the path that was asked for.
        retryable: whether the same request may succeed later.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    instance: str
    retryable: bool = False


def no_result() -> msgspec.Raw:
    """JSON's null."""
    return msgspec.Raw(b"null")


def utc(ms: int) -> dt.datetime:
    """A time of the store's clock, in milliseconds, as UTC."""
    return dt.datetime.fromtimestamp(ms / 1000, dt.UTC)


def utc_or_none(ms: int | None) -> dt.datetime | None:
    """As `utc`, where there is a time."""
    return None if ms is None else dt.datetime.fromtimestamp(ms / 1000, dt.UTC)


def resources_view(resources: Resources) -> ResourcesView:
    """What was asked for, as people read it."""
    return ResourcesView(
        memory_bytes=resources.memory_bytes,
        gpus=resources.gpus,
        share=resources.share_milli / 1000 or 0,
        architecture=resources.architectures,
        device_model=resources.device_model,
        labels=dict(resources.labels),
        cpus=resources.cpu_milli / 1000 or 0,
        host_memory_bytes=resources.host_memory_bytes,
        exclusive=resources.exclusive,
        model=resources.model,
    )


def resources_in(view: ResourcesView) -> Resources:
    """What `view` was made of."""
    return Resources(
        memory_bytes=view.memory_bytes,
        gpus=view.gpus,
        share_milli=round(view.share * 1000),
        architectures=view.architecture,
        device_model=view.device_model,
        labels=tuple(sorted(view.labels.items())),
        cpu_milli=round(view.cpus * 1000),
        host_memory_bytes=view.host_memory_bytes,
        exclusive=view.exclusive,
        model=view.model,
    )
