"""Upkeep of the store as a whole: whose its data are, their schema, that they are a backup's, and how its server keeps them."""

from manager.durability import SECTIONS, SETTINGS, Durability, durability_of, fsync_of, info_lines
from manager.store import schema
from manager.store.calls import IDS_MAX, Calls
from manager.store.connection import StoreReplyError


class UpkeepCalls(Calls):
    """Calls for who starts, upgrades, restores or examines a cluster."""

    async def identify(self, cluster_id: str) -> str:
        """The identity of the state in this store; `cluster_id` becomes it where there is none."""
        return await schema.identify(self._raw, self.keys, cluster_id)

    async def identity(self) -> str:
        """The identity of the state in this store, empty where there is none."""
        return (await schema.read_facts(self._raw, self.keys)).cluster

    async def migrate(self) -> int:
        """Bring older data to the schema of this code; in how many steps."""
        return await schema.migrate(self._raw, self.keys)

    async def restored(self, restoration: str) -> int:
        """The data are a backup's: see that nobody from before can write. How many slots were closed. May be called again."""
        before = int(await self._raw("SCARD", self.keys.slots))
        while True:
            left = int(await self._run("ry_restored", restoration, IDS_MAX))
            if not left:
                break
        await self._raw("DEL", self.keys.services)  # where processes were that are gone
        return before

    async def fsync_policy(self) -> str:
        """What the server says of its durability: ``always``, ``everysec``, ``no``, ``off`` or ``unknown``."""
        return fsync_of(await self._settings())

    async def durability(self) -> Durability:
        """Whether the server keeps what it accepts, by its settings and by how it fares."""
        info = await self._raw("INFO", *SECTIONS)
        return durability_of(await self._settings(), info_lines(info.decode()))

    async def server(self) -> str:
        """Program and version of the server."""
        info = info_lines((await self._raw("INFO", "server")).decode())
        name, version = ("valkey", info["valkey_version"]) if "valkey_version" in info else ("redis", info["redis_version"])
        return f"{name} {version}"

    async def _settings(self) -> dict[str, str] | None:
        """Settings of the server; None where they may not be read."""
        try:
            flat = await self._raw("CONFIG", "GET", *SETTINGS)
        except StoreReplyError:
            return None
        return {flat[i].decode(): flat[i + 1].decode() for i in range(0, len(flat), 2)}
