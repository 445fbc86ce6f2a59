"""Nodes on this machine: asks the supervisor of ``rocyard up``, which starts, restarts and ends them.

They are the supervisor's children, so they outlive the autoscaler, and none is left behind.
"""

import asyncio
import os
from pathlib import Path
from typing import Final

import msgspec

from autoscaler.providers.interface import Instance, Listing, ProviderRefused, ProviderUnavailable
from manager.core.fleet import (
    LINE_BYTES_MAX,
    SOCKET_NAME,
    AddNodes,
    FleetAnswer,
    FleetDone,
    FleetNodes,
    FleetRefused,
    FleetRequest,
    ListNodes,
    RemoveNodes,
    decode_answer,
    encode,
    node_name,
    socket_path,
)

DEADLINE_S: Final = 5.0
"""Longest wait for one answer: an autoscaler that waits for longer than a period is blind for that long."""


class LocalProvider:
    """Groups whose nodes run on this machine.

    Args:
        data_dir: the folder of the cluster that ``rocyard up`` runs here.
        deadline_s: longest wait for one answer.
    """

    def __init__(self, data_dir: Path, deadline_s: float = DEADLINE_S) -> None:
        self._folder = data_dir
        self._deadline_s = deadline_s

    async def list(self, group: str) -> Listing:
        """All nodes of the group; `version` is the number of the next one.

        Raises:
            ProviderUnavailable: no answer, or no such group there.
        """
        answer = await self._ask(ListNodes(group))
        if not isinstance(answer, FleetNodes):
            raise ProviderUnavailable(_why(answer))
        instances = tuple(Instance(name=node.name, age_s=node.age_s, problem=node.problem) for node in answer.nodes)
        return Listing(group=group, instances=instances, version=str(answer.following))

    def new_names(self, listing: Listing, count: int) -> tuple[str, ...]:
        """The next numbers: none is given twice, so a call that comes late starts nothing."""
        first = int(listing.version)
        return tuple(node_name(listing.group, number) for number in range(first, first + count))

    async def add(self, listing: Listing, names: tuple[str, ...], token: int) -> None:
        """Start these nodes.

        Raises:
            ProviderUnavailable: nothing is known of the outcome.
            ProviderRefused: the supervisor will not.
        """
        await self._do(AddNodes(listing.group, names, token))

    async def remove(self, listing: Listing, names: tuple[str, ...], token: int) -> None:
        """End these nodes.

        Raises:
            ProviderUnavailable: nothing is known of the outcome.
            ProviderRefused: the supervisor will not.
        """
        await self._do(RemoveNodes(listing.group, names, token))

    async def close(self) -> None:
        """Nothing is kept open."""

    async def _do(self, request: FleetRequest) -> None:
        answer = await self._ask(request)
        if not isinstance(answer, FleetDone):
            raise ProviderRefused(_why(answer))

    async def _ask(self, request: FleetRequest) -> FleetAnswer:
        try:
            async with asyncio.timeout(self._deadline_s):
                folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY)
                try:
                    reader, writer = await asyncio.open_unix_connection(socket_path(folder), limit=LINE_BYTES_MAX)
                finally:
                    os.close(folder)
                try:
                    writer.write(encode(request) + b"\n")
                    line = await reader.readline()
                finally:
                    writer.close()
            answer: FleetAnswer = decode_answer(line)
        except TimeoutError:
            raise ProviderUnavailable(f"the supervisor did not answer within {self._deadline_s:g} s") from None
        except (OSError, ValueError, msgspec.DecodeError) as error:
            where = self._folder / SOCKET_NAME
            raise ProviderUnavailable(f"no supervisor answers at {where} ({error}): 'rocyard up' starts one") from None
        return answer


def _why(answer: FleetAnswer) -> str:
    return answer.reason if isinstance(answer, FleetRefused) else f"an answer that was not asked for: {answer}"
