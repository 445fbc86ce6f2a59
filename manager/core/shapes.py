"""Resources and shapes: what a task asks for, and what tasks have in common for placement.

A shape holds every field that placement reads, the tenant and the digest of the function's environment; never priority,
age or arguments. Memory is rounded up to classes so that shapes stay few.
"""

import hashlib
from typing import Annotated, Final

import msgspec

from manager.core.quantities import GIB, MEMORY_BYTES_MAX, MIB

GPUS_MAX: Final = 64
"""Devices of one request: more than any one node holds today."""


class Resources(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one task needs from one node.

    Attributes:
        memory_bytes: memory on each device.
        gpus: how many devices, all on one node.
    """

    memory_bytes: Annotated[int, msgspec.Meta(ge=1, le=MEMORY_BYTES_MAX)]
    gpus: Annotated[int, msgspec.Meta(ge=1, le=GPUS_MAX)] = 1


class Shape(msgspec.Struct, frozen=True, omit_defaults=True):
    """What tasks have in common for placement.

    Attributes:
        tenant: the owner; an executor never serves two.
        environment: digest of what the executor process must be (its interpreter).
        memory_bytes: memory leased on each device, a class (see `memory_class`).
        gpus: devices, all on one node.
        max_tasks_per_slot: how many tasks a slot serves before it ends; 0 is no limit.
    """

    tenant: str
    environment: str
    memory_bytes: int
    gpus: int = 1
    max_tasks_per_slot: int = 0


def memory_class(memory_bytes: int) -> int:
    """`memory_bytes` rounded up to its class: 256 MiB steps to 8 GiB, 512 MiB to 32 GiB, 1 GiB above."""
    if memory_bytes <= 8 * GIB:
        step = 256 * MIB
    elif memory_bytes <= 32 * GIB:
        step = 512 * MIB
    else:
        step = GIB
    return -(-memory_bytes // step) * step


def shape_of(tenant: str, environment: str, resources: Resources, max_tasks_per_slot: int = 0) -> Shape:
    """The shape of a task of `tenant` that asks for `resources`."""
    return Shape(
        tenant=tenant,
        environment=environment,
        memory_bytes=memory_class(resources.memory_bytes),
        gpus=resources.gpus,
        max_tasks_per_slot=max_tasks_per_slot,
    )


_encoder = msgspec.json.Encoder(order="deterministic")


def encode_shape(shape: Shape) -> bytes:
    """The shape's one canonical form, as it lies in the store."""
    return _encoder.encode(shape)


def shape_id(shape: Shape) -> str:
    """16 hexadecimal digits that name the shape; equal shapes have equal ids."""
    return hashlib.blake2b(encode_shape(shape), digest_size=8).hexdigest()
