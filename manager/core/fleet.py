"""What is asked of the machine's supervisor about its nodes, over a unix socket: one line of JSON each way for a request.

Every request names nodes, so a repeat is harmless. Names are ``GROUP-NUMBER`` and are never given twice.
"""

from typing import Final

import msgspec

SOCKET_NAME: Final = "supervisor.sock"
"""In the data folder, for its owner alone."""
LINE_BYTES_MAX: Final = 256 * 1024
"""Over what a listing of as many nodes as a machine may have takes."""


class ListNodes(msgspec.Struct, frozen=True, tag="list"):
    """All nodes of a group."""

    group: str


class AddNodes(msgspec.Struct, frozen=True, tag="add"):
    """Start these nodes; those that are there stay as they are."""

    group: str
    names: tuple[str, ...]
    token: int


class RemoveNodes(msgspec.Struct, frozen=True, tag="remove"):
    """End these nodes; those that are gone are no error."""

    group: str
    names: tuple[str, ...]
    token: int


FleetRequest = ListNodes | AddNodes | RemoveNodes


class FleetNode(msgspec.Struct, frozen=True):
    """One node. `age_s` counts from when it was asked for; `problem`: why it does not stay up."""

    name: str
    age_s: float
    problem: str = ""


class FleetNodes(msgspec.Struct, frozen=True, tag="nodes"):
    """All of a group; `following` is the number of the next new one."""

    nodes: tuple[FleetNode, ...]
    following: int


class FleetDone(msgspec.Struct, frozen=True, tag="done"):
    """It was done."""


class FleetRefused(msgspec.Struct, frozen=True, tag="refused"):
    """It was not, and why."""

    reason: str


FleetAnswer = FleetNodes | FleetDone | FleetRefused

encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(FleetRequest).decode
decode_answer = msgspec.json.Decoder(FleetAnswer).decode


def node_name(group: str, number: int) -> str:
    """The name of a node that was added."""
    return f"{group}-{number}"


def socket_path(folder_fd: int) -> str:
    """The socket's path by its folder's descriptor: the kernel takes at most 107 bytes, and data folders may lie deep."""
    return f"/proc/self/fd/{folder_fd}/{SOCKET_NAME}"
