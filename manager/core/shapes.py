"""Resources, shapes and grants: what a task asks for, what tasks have in common for placement, and what they are given.

A shape holds every field that placement reads, the tenant and the digest of the function's environment; never priority,
age or arguments. Memory is rounded up to classes so that shapes stay few.
"""

import hashlib
from functools import lru_cache
from typing import Annotated, Final

import msgspec

from manager.core.quantities import GIB, MEMORY_BYTES_MAX, MIB

GPUS_MAX: Final = 64
"""Devices of one request: more than any one node holds today."""
SHARE_MILLI_MAX: Final = 1000
"""The compute of a whole device, in thousandths."""
CPU_MILLI_MAX: Final = 4096 * 1000
"""More CPU than any host has: a request over it is a typing error."""

Labels = tuple[tuple[str, str], ...]
"""Names and values, by name."""


class Resources(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one task needs from one node.

    Attributes:
        memory_bytes: memory on each device.
        gpus: how many devices, all on one node.
        share_milli: of the compute of each device, in thousandths; 0: no share is asked for, and none is counted.
        architectures: of which each device must have one: names (``gfx942``), families (``cdna3``) or beginnings
            (``gfx94*``); none: any does. In the order of the alphabet.
        device_model: what the device's model must contain, in lower case, or several of these with ``|`` between, any of
            which will do; empty: any does.
        labels: what the node's labels must be.
        cpu_milli: of the host's CPUs, in thousandths of one; 0: none is counted.
        host_memory_bytes: of the host's memory; 0: none is counted.
        exclusive: nobody else may have anything on these devices.
        model: what should be loaded already; empty: nothing.
    """

    memory_bytes: Annotated[int, msgspec.Meta(ge=1, le=MEMORY_BYTES_MAX)]
    gpus: Annotated[int, msgspec.Meta(ge=1, le=GPUS_MAX)] = 1
    share_milli: Annotated[int, msgspec.Meta(ge=0, le=SHARE_MILLI_MAX)] = 0
    architectures: tuple[str, ...] = ()
    device_model: str = ""
    labels: Labels = ()
    cpu_milli: Annotated[int, msgspec.Meta(ge=0, le=CPU_MILLI_MAX)] = 0
    host_memory_bytes: Annotated[int, msgspec.Meta(ge=0, le=MEMORY_BYTES_MAX)] = 0
    exclusive: bool = False
    model: str = ""


def asks_for_all_of(resources: Resources, other: Resources) -> bool:
    """Whether what does not fit `other` cannot fit `resources`: they ask for as much of everything, and as strictly."""
    return (
        resources.memory_bytes >= other.memory_bytes
        and resources.gpus >= other.gpus
        and resources.share_milli >= other.share_milli
        and resources.cpu_milli >= other.cpu_milli
        and resources.host_memory_bytes >= other.host_memory_bytes
        and resources.exclusive >= other.exclusive
        and (not other.architectures or resources.architectures == other.architectures)
        and (not other.device_model or resources.device_model == other.device_model)
        and (not other.labels or set(other.labels) <= set(resources.labels))
    )


class Shape(msgspec.Struct, frozen=True, omit_defaults=True):
    """What tasks have in common for placement.

    Attributes:
        tenant: the owner; an executor never serves two.
        environment: digest of what the executor process must be (its interpreter).
        memory_bytes: memory leased on each device, a class (see `memory_class`).
        gpus: devices, all on one node.
        max_tasks_per_slot: how many tasks a slot serves before it ends; 0 is no limit.
        share_milli, architectures, device_model, labels, cpu_milli, host_memory_bytes, exclusive, model: as in `Resources`.
    """

    tenant: str
    environment: str
    memory_bytes: int
    gpus: int = 1
    max_tasks_per_slot: int = 0
    share_milli: int = 0
    architectures: tuple[str, ...] = ()
    device_model: str = ""
    labels: Labels = ()
    cpu_milli: int = 0
    host_memory_bytes: int = 0
    exclusive: bool = False
    model: str = ""

    @property
    def resources(self) -> Resources:
        """What a slot of the shape needs: all that placement reads, and nothing of whose it is."""
        return _resources_of(self)


class Grant(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a slot has of one node: devices, and of each of them memory and a share; and of the host.

    `memory_bytes` and `share_milli` are of each device. `model` is what the slot has loaded, empty: nothing that is known.
    """

    node: str
    devices: tuple[str, ...]
    memory_bytes: int
    share_milli: int = 0
    cpu_milli: int = 0
    host_memory_bytes: int = 0
    exclusive: bool = False
    model: str = ""


def grant_of(resources: Resources, node: str, devices: tuple[str, ...]) -> Grant:
    """What `resources` are on these devices of a node."""
    return Grant(
        node,
        devices,
        resources.memory_bytes,
        resources.share_milli,
        resources.cpu_milli,
        resources.host_memory_bytes,
        resources.exclusive,
        resources.model,
    )


def _class_step(memory_bytes: int) -> int:
    return 256 * MIB if memory_bytes <= 8 * GIB else 512 * MIB if memory_bytes <= 32 * GIB else GIB


def memory_class(memory_bytes: int) -> int:
    """`memory_bytes` rounded up to its class: 256 MiB steps to 8 GiB, 512 MiB to 32 GiB, 1 GiB above."""
    step = _class_step(memory_bytes)
    return -(-memory_bytes // step) * step


def memory_class_within(memory_bytes: int) -> int:
    """The largest class that `memory_bytes` can hold; 0: none."""
    step = _class_step(memory_bytes)
    return max(0, memory_bytes // step * step)


def shape_of(tenant: str, environment: str, resources: Resources, max_tasks_per_slot: int = 0) -> Shape:
    """The shape of a task of `tenant` that asks for `resources`."""
    return Shape(
        tenant=tenant,
        environment=environment,
        memory_bytes=memory_class(resources.memory_bytes),
        gpus=resources.gpus,
        max_tasks_per_slot=max_tasks_per_slot,
        share_milli=resources.share_milli,
        architectures=resources.architectures,
        device_model=resources.device_model,
        labels=resources.labels,
        cpu_milli=resources.cpu_milli,
        host_memory_bytes=resources.host_memory_bytes,
        exclusive=resources.exclusive,
        model=resources.model,
    )


@lru_cache(maxsize=4096)
def _resources_of(shape: Shape) -> Resources:
    return Resources(
        memory_bytes=shape.memory_bytes,
        gpus=shape.gpus,
        share_milli=shape.share_milli,
        architectures=shape.architectures,
        device_model=shape.device_model,
        labels=shape.labels,
        cpu_milli=shape.cpu_milli,
        host_memory_bytes=shape.host_memory_bytes,
        exclusive=shape.exclusive,
        model=shape.model,
    )


_encoder = msgspec.json.Encoder(order="deterministic")


def encode_shape(shape: Shape) -> bytes:
    """The shape's one canonical form, as it lies in the store."""
    return _encoder.encode(shape)


def shape_id(shape: Shape) -> str:
    """16 hexadecimal digits that name the shape; equal shapes have equal ids."""
    return hashlib.blake2b(encode_shape(shape), digest_size=8).hexdigest()
