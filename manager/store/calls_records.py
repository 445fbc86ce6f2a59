"""Plain records, with no function of the library behind them: each has one writer, and is written whole."""

from manager.store.calls import Calls


class RecordCalls(Calls):
    """Counts, published functions, API keys, and where processes are."""

    async def counts(self) -> dict[str, int]:
        """Tasks by status."""
        flat = await self._raw("HGETALL", self.keys.counts)
        return {flat[i].decode(): int(flat[i + 1]) for i in range(0, len(flat), 2)}

    async def publish_function(self, name: str, blob: bytes) -> None:
        """Publish a function's schema and defaults."""
        await self._raw("SET", self.keys.function(name), blob)
        await self._raw("SADD", self.keys.functions, name)

    async def forget_functions(self) -> None:
        """Forget what is published; agents publish again when they start."""
        await self._raw("DEL", self.keys.functions)

    async def functions(self) -> dict[str, bytes]:
        """All published functions."""
        names = sorted(name.decode() for name in await self._raw("SMEMBERS", self.keys.functions))
        if not names:
            return {}
        blobs = await self._raw("MGET", *(self.keys.function(name) for name in names))
        return {name: blob for name, blob in zip(names, blobs, strict=True) if blob}

    async def put_api_key(self, key_id: str, blob: bytes) -> None:
        """Keep an API key's record (never its secret)."""
        await self._raw("HSET", self.keys.api_key(key_id), "record", blob)
        await self._raw("SADD", self.keys.api_keys, key_id)

    async def api_key(self, key_id: str) -> bytes | None:
        """An API key's record."""
        blob: bytes | None = await self._raw("HGET", self.keys.api_key(key_id), "record")
        return blob

    async def api_keys(self) -> dict[str, bytes]:
        """All API keys' records by id."""
        ids = sorted(key_id.decode() for key_id in await self._raw("SMEMBERS", self.keys.api_keys))
        found = {key_id: await self.api_key(key_id) for key_id in ids}
        return {key_id: blob for key_id, blob in found.items() if blob is not None}

    async def put_service(self, name: str, blob: bytes) -> None:
        """Say where a process is and where its metrics are."""
        await self._raw("HSET", self.keys.services, name, blob)

    async def services(self) -> dict[str, bytes]:
        """Every process that said where it is."""
        flat = await self._raw("HGETALL", self.keys.services)
        return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}
