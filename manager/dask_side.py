"""The controller's connection to the Dask scheduler: submit slots, and ask the placement plugin what it knows.

A stock Client gives up for good after its timeout and backs off for as long as an outage lasted; so a client that is not
running is thrown away and a new one is made. Whatever was submitted to the old one is found missing by the reconciler.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from dask.base import annotate
from distributed import Client, Security, fire_and_forget

from manager.core.addresses import in_url
from manager.core.keys import SLOT_TASK_PREFIX
from manager.core.mix import Mix, mix_from
from manager.core.news import News, encode_news
from manager.core.packing import DirectDemand
from manager.core.shapes import Grant, Resources, Shape, encode_shape
from manager.log import get_logger
from manager.tls import TlsFiles, dask_security

CALL_S: Final = 3.0
CONNECT_S: Final = 2.0

RunSlot = Callable[[str], Coroutine[Any, Any, str]]
log = get_logger("rocyard.dask")


class DaskUnavailable(Exception):
    """The Dask scheduler does not answer."""


class SlotOnDask(msgspec.Struct, frozen=True):
    """What the plugin knows of a slot: held, placed, or leased (it lives, but has no Dask task)."""

    state: str
    node: str


class DaskSide:
    """Owns one Dask client.

    Args:
        address: of the scheduler.
        run_slot: the coroutine function that a slot's Dask task runs; given, since this package imports no plugin.
        files: of the controller's certificate, where the scheduler has TLS.
    """

    def __init__(self, address: str, run_slot: RunSlot, files: TlsFiles | None = None) -> None:
        self.address = address
        self.run_slot = run_slot
        self.files = files
        self.direct: tuple[DirectDemand, ...] = ()
        self.mix: Mix | None = None  # of requests, where it is not the one that the scheduler was told to be known
        self._client: Client | None = None

    async def _connected(self) -> Client:
        client = self._client
        if client is not None and client.status == "running":
            return client
        await self.close()
        try:
            place = urlsplit(self.address)
            security = None if self.files is None else Security(**dask_security(self.files, "client"))
            async with asyncio.timeout(CONNECT_S):
                # Dask's own connect backs off for as long as the outage lasted; a bare probe tells at once.
                secure = None if security is None else security.get_connection_args("client")["ssl_context"]
                _, writer = await asyncio.open_connection(place.hostname, place.port, ssl=secure)
                writer.close()
                self._client = await Client(
                    self.address,
                    asynchronous=True,
                    timeout=CONNECT_S,
                    set_as_default=False,
                    name="rocyard-controller",
                    security=security,
                )
        except (OSError, TimeoutError) as error:
            raise DaskUnavailable(str(error) or type(error).__name__) from None
        log.info("dask_connected", address=self.address)
        assert self._client is not None
        return self._client

    async def _call(self, name: str, **arguments: Any) -> Any:
        client = await self._connected()
        try:
            async with asyncio.timeout(CALL_S):
                return await getattr(client.scheduler, name)(**arguments)
        except (OSError, TimeoutError) as error:
            await self.close()
            raise DaskUnavailable(str(error) or type(error).__name__) from None

    async def slots(self) -> tuple[dict[str, SlotOnDask], dict[str, str]]:
        """Every slot that the plugin knows, and the address of each node's Dask worker.

        Raises:
            DaskUnavailable: no answer.
        """
        answer = await self._call("rocyard_slots")
        rows = [(msgspec.convert(row["resources"], Resources), row["count"]) for row in answer["direct"]]
        self.direct = tuple(DirectDemand(needs.memory_bytes, needs.gpus, count, needs) for needs, count in rows)
        self.mix = mix_from(answer.get("mix"))
        return {slot: SlotOnDask(*known) for slot, known in answer["slots"].items()}, dict(answer["nodes"])

    async def submit(self, slot_id: str, shape: Shape, node: str, resources: Resources | None = None) -> None:
        """Submit a slot's task.

        Args:
            slot_id: the slot.
            shape: what it is leased to.
            node: the only one that it may go to, where it has lived before; empty: any.
            resources: what it needs, where that is not what its shape says: more memory, if it has used more.
        """
        client = await self._connected()
        wanted: dict[str, Any] = {"slot": slot_id, "shape": encode_shape(shape).decode(), "node": node}
        if resources is not None and resources != shape.resources:
            wanted["resources"] = msgspec.to_builtins(resources)
        with annotate(gpu=wanted):
            future = client.submit(self.run_slot, slot_id, key=SLOT_TASK_PREFIX + slot_id, pure=False)
        fire_and_forget(future)
        future.release()

    async def lost(self, node: str, incarnation: str) -> None:
        """Nothing more is placed on this incarnation; its leases end."""
        await self._call("rocyard_lost", node=node, incarnation=incarnation)

    async def keep(self, room: Mapping[str, Grant]) -> None:
        """Room that victims give back is kept for these held slots, and for none that is not among them."""
        await self._call("rocyard_keep", slots=msgspec.to_builtins(dict(room)))

    async def tell(self, news: News) -> None:
        """What the plugin cannot know; it replaces what it was told before."""
        await self._call("rocyard_tell", news=encode_news(news))

    async def metrics_places(self, workers: Mapping[str, str]) -> dict[str, str]:
        """Where the Dask scheduler and its workers serve metrics, as HOST:PORT by service name.

        Args:
            workers: node → address of its Dask worker.

        Raises:
            DaskUnavailable: no answer.
        """
        answer = await self._call("identity", n_workers=-1)
        host = str(urlsplit(self.address).hostname)
        places = {"scheduler": f"{in_url(host)}:{answer['services']['dashboard']}"}
        for node, address in workers.items():
            worker = answer["workers"].get(address)
            if worker is not None:
                places[f"worker/{node}"] = f"{in_url(worker['host'])}:{worker['services']['dashboard']}"
        return places

    async def dropped(self, slots: list[str]) -> None:
        """These slots were taken back before anybody had opened them."""
        await self._call("rocyard_dropped", slots=slots)

    async def close(self) -> None:
        """Let the client go; its slots' tasks stay, since they are fire-and-forget."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(CONNECT_S):
                    await client.close()
