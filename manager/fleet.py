"""The node agents of this machine's supervisor: those it began with, and those that the autoscaler adds and removes.

They are children of the supervisor like others: restarted when they end, ended with it, and so never left behind, whatever
becomes of the autoscaler. Who asks comes over a unix socket that only this user can open, with a token; a lower one than was
ever seen is refused, also after a restart.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec

from manager.children import Child
from manager.core.devices import NODES_MAX, SimulatedNode, parse_fleet
from manager.core.errors import StartError
from manager.core.fleet import (
    LINE_BYTES_MAX,
    SOCKET_NAME,
    AddNodes,
    FleetAnswer,
    FleetDone,
    FleetNode,
    FleetNodes,
    FleetRefused,
    FleetRequest,
    ListNodes,
    RemoveNodes,
    decode_request,
    encode,
    node_name,
    socket_path,
)
from manager.log import get_logger
from manager.settings import GroupSettings, Settings

SIMULATED_GROUP: Final = "simulated"
RESTARTS_MAX: Final = 3
"""A node that was restarted more often has a problem, and its last words are told."""

log = get_logger("rocyard.supervisor")

StartNode = Callable[[Settings, Callable[[str], None]], Awaitable[Child]]
"""Starts an agent with the settings that it is given; the other argument is told its name when it has ended for good."""


class _Kept(msgspec.Struct, frozen=True):
    """What outlives the supervisor: the highest token that was seen, and the number of each group's next node."""

    token: int = 0
    following: dict[str, int] = {}


class _Node:
    """One node of this machine. `number` tells simulated devices of one node from those of another."""

    def __init__(self, name: str, group: str, number: int, child: Child) -> None:
        self.name = name
        self.group = group
        self.number = number
        self.child = child
        self.asked_s = time.monotonic()

    def view(self) -> FleetNode:
        problem = ""
        if self.child.restarts >= RESTARTS_MAX:
            problem = f"restarted {self.child.restarts} times; it says: {self.child.tail(1)[:200]}"
        return FleetNode(self.name, time.monotonic() - self.asked_s, problem)


class Fleet:
    """All nodes of one supervisor.

    Args:
        directory: the data folder.
        settings: with the groups.
        start: starts an agent.
        changed: told what was added and removed, for people.
    """

    def __init__(self, directory: Path, settings: Settings, start: StartNode, changed: Callable[[str], None]) -> None:
        self.directory = directory
        self.settings = settings
        self._start = start
        self._changed = changed
        self._nodes: dict[str, _Node] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()
        self._closed = False
        self._server: asyncio.Server | None = None
        self._path = directory / "fleet.json"
        self._kept = self._read()

    # --- what there is ------------------------------------------------------------------------------------------

    @property
    def children(self) -> list[Child]:
        """The processes of all nodes."""
        return [node.child for node in self._nodes.values()]

    async def begin_with(self, settings: Settings) -> None:
        """Start a node that nobody has asked for: one of those that the cluster begins with."""
        node = settings.node
        child = await self._start(settings, self._ended)
        self._nodes[node.name] = _Node(node.name, node.group, node.simulated_node, child)

    def _ended(self, name: str) -> None:
        """A node has ended for good, by itself: an operator has removed it."""
        if self._nodes.pop(name, None) is not None:
            self._changed(f"{name} was removed")
            self._tidy(name)

    def _list(self, group: str) -> FleetNodes:
        nodes = sorted((node for node in self._nodes.values() if node.group == group), key=lambda node: node.name)
        return FleetNodes(tuple(node.view() for node in nodes), self._following(group))

    def _following(self, group: str) -> int:
        """The number of the group's next node: none that was given before, and none of a node that is called alike."""
        alike = [name.removeprefix(f"{group}-") for name in self._nodes if name.startswith(f"{group}-")]
        return max(self._kept.following.get(group, 0), *(int(text) + 1 for text in alike if text.isdecimal()), 0)

    # --- what is asked ------------------------------------------------------------------------------------------

    async def answer(self, request: FleetRequest) -> FleetAnswer:
        """Do what is asked, or say why not."""
        group = self.settings.groups.get(request.group)
        if group is None or group.provider != "local":
            known = ", ".join(name for name, each in self.settings.groups.items() if each.provider == "local")
            return FleetRefused(f"there is no local group {request.group!r} here (known: {known or 'none'})")
        if isinstance(request, ListNodes):
            return self._list(request.group)
        async with self._lock:
            if self._closed:
                return FleetRefused("the cluster on this machine stops")
            if request.token < self._kept.token:
                return FleetRefused(f"token {request.token} was replaced by {self._kept.token}")
            if request.token > self._kept.token:
                self._keep(msgspec.structs.replace(self._kept, token=request.token))
            if isinstance(request, AddNodes):
                return await self._add(request, group)
            return self._remove(request)

    async def _add(self, request: AddNodes, group: GroupSettings) -> FleetAnswer:
        following = self._following(request.group)
        fresh: list[int] = []
        for name in request.names:
            if name in self._nodes:
                continue
            text = name.removeprefix(f"{request.group}-")
            number = int(text) if text.isdecimal() else -1
            if node_name(request.group, number) != name:
                return FleetRefused(f"{name!r} is no name of the group: {node_name(request.group, following)} is the next")
            if number < following:
                return FleetRefused(f"{name} was there and was removed; {node_name(request.group, following)} is the next")
            fresh.append(number)
        there = sum(node.group == request.group for node in self._nodes.values())
        if there + len(fresh) > group.workers_max:
            return FleetRefused(f"the group has {there} nodes and may have {group.workers_max}")
        if len(self._nodes) + len(fresh) > NODES_MAX:
            return FleetRefused(f"this machine has {len(self._nodes)} nodes and may have {NODES_MAX}")
        for number in sorted(fresh):
            following = max(following, number + 1)
            # On disk before the node is: a name is given once, also where we are killed in between.
            self._keep(msgspec.structs.replace(self._kept, following={**self._kept.following, request.group: following}))
            await self._add_one(node_name(request.group, number), request.group, group)
        return FleetDone()

    async def _add_one(self, name: str, group_name: str, group: GroupSettings) -> None:
        taken = {node.number for node in self._nodes.values()}
        number = next(n for n in range(NODES_MAX) if n not in taken)
        # The fleet's text up to this node: it names the devices after the node's number, so no two nodes' are alike.
        node = msgspec.structs.replace(
            self.settings.node,
            name=name,
            group=group_name,
            labels=group.labels,
            devices="simulated",
            simulate=f"{number + 1}x{group.devices}",
            simulated_node=number,
        )
        child = await self._start(msgspec.structs.replace(self.settings, node=node), self._ended)
        self._nodes[name] = _Node(name, group_name, number, child)
        log.info("node_added", node=name, group=group_name)
        self._changed(f"{name} was added ({group.devices})")

    def _remove(self, request: RemoveNodes) -> FleetAnswer:
        for name in request.names:
            node = self._nodes.get(name)
            if node is None or node.group != request.group:
                continue
            del self._nodes[name]
            log.info("node_removed", node=name, group=node.group)
            self._changed(f"{name} was removed")
            task = asyncio.create_task(self._end(node))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        return FleetDone()

    async def _end(self, node: _Node) -> None:
        await node.child.stop()
        self._tidy(node.name)

    def _tidy(self, name: str) -> None:
        """What a node that is gone for good has left: its name is not given again. Its log stays."""
        shutil.rmtree(self.directory / "nodes" / name, ignore_errors=True)

    # --- the file and the socket ----------------------------------------------------------------------------------

    def _read(self) -> _Kept:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Kept)
        except FileNotFoundError:
            return _Kept()
        except (OSError, msgspec.DecodeError) as error:
            raise StartError(f"{self._path} cannot be read ({error}): remove it if no autoscaler runs on this folder") from None

    def _keep(self, kept: _Kept) -> None:
        draft = self._path.with_suffix(".new")
        with draft.open("wb") as file:
            file.write(encode(kept))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)
        self._kept = kept

    async def serve(self) -> None:
        """Answer on the socket from now on."""
        self._server = await asyncio.start_unix_server(self._meet, sock=_bound(self.directory), limit=LINE_BYTES_MAX)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.LimitOverrunError, ValueError):
            while line := await reader.readline():
                try:
                    request = decode_request(line)
                except msgspec.DecodeError as error:
                    answer: FleetAnswer = FleetRefused(f"not a request: {error}")
                else:
                    answer = await self.answer(request)
                writer.write(encode(answer) + b"\n")
                await writer.drain()
        writer.close()

    async def close(self) -> None:
        """Answer no more; nodes that are ending are waited for."""
        if self._server is not None:
            self._server.close()
            (self.directory / SOCKET_NAME).unlink(missing_ok=True)
        async with self._lock:
            self._closed = True
        await asyncio.gather(*self._ending)


def _bound(directory: Path) -> socket.socket:
    """The socket, for this user alone, in place of one that a killed supervisor has left."""
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        path = Path(socket_path(folder))
        path.unlink(missing_ok=True)
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(str(path))
        path.chmod(0o600)
    finally:
        os.close(folder)
    return bound


def with_simulated_group(settings: Settings) -> Settings:
    """`settings` with a group for the autoscaler where there is none: nodes like the first ones of the simulated fleet.

    Raises:
        StartError: the fleet, or what a node of a local group has, cannot be simulated.
    """
    _fleet_of("node.simulate", settings.node.simulate)
    for name, group in settings.groups.items():
        if group.provider == "local":
            _fleet_of(f"groups.{name}.devices", f"1x{group.devices}")
    if settings.groups or settings.node.group:
        return settings
    count, _, devices = settings.node.simulate.lower().replace(" ", "").split(",")[0].partition("x")
    most = min(2 * int(count), NODES_MAX)
    group = GroupSettings(devices=devices, workers_min=int(count), workers_max=most, labels=settings.node.labels)
    return msgspec.structs.replace(settings, groups={SIMULATED_GROUP: group})


def base_nodes(settings: Settings) -> list[Settings]:
    """The settings of each node that a simulated cluster begins with. Those of the group that was made are its first ones."""
    node = settings.node
    own = settings.groups.get(SIMULATED_GROUP)
    count = len(_fleet_of("node.simulate", node.simulate))
    first = own.workers_min if own is not None and not node.group else 0
    return [
        msgspec.structs.replace(
            settings,
            node=msgspec.structs.replace(
                node,
                name=node_name(node.name or "node", number),
                group=SIMULATED_GROUP if number < first else node.group,
                devices="simulated",
                simulated_node=number,
            ),
        )
        for number in range(count)
    ]


def _fleet_of(name: str, text: str) -> tuple[SimulatedNode, ...]:
    try:
        return parse_fleet(text)
    except ValueError as error:
        raise StartError(f"{name}: {error}") from None
