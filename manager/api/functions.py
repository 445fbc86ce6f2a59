"""The functions that tasks may name, as agents published them, and the check of arguments against their schemas.

A schema is compiled once for each published blob. Names are matched exactly and nothing is imported: what is not
published does not exist here. Refreshed in the background, and once more when a name is not known.
"""

import asyncio
from typing import Any, Final, NoReturn

import jsonschema_rs
import msgspec

from manager.api.body import near
from manager.core.errors import BadRequest, FunctionNotFound, InvalidArguments, StoreUnavailable, Unprocessable
from manager.core.functions import PublishedFunction, decode_published
from manager.store import Store

REFRESH_S: Final = 1.0
MISS_REFRESH_S: Final = 0.04
"""A flood of unknown names reads the store this often at most; each of them waits so long for the next reading."""
ERRORS_SHOWN_MAX: Final = 5
MESSAGE_CHARS_MAX: Final = 300
NAMES_SHOWN_MAX: Final = 50


class FunctionUnavailable(Unprocessable):
    """The function is registered, but cannot be used at the moment."""


class Function:
    """A published function with its compiled schema."""

    __slots__ = ("blob", "published", "validator")

    def __init__(self, blob: bytes, published: PublishedFunction, validator: Any) -> None:
        self.blob = blob
        self.published = published
        self.validator = validator

    def check(self, args: dict[str, Any], field: str) -> None:
        """Check arguments; `field` is where they stand in the request.

        Raises:
            InvalidArguments: names each path and what would be right.
            FunctionUnavailable: nobody can run it.
        """
        if self.validator is None:
            why = self.published.error or "its schema cannot be used"
            raise FunctionUnavailable(f"{self.published.name} cannot be used: {why}", function=self.published.name)
        if not self.validator.is_valid(args):
            self._refuse(args, field)

    def check_array(self, args: dict[str, Any], field: str, index_as: str | None, count: int) -> None:
        """Check the arguments that each task of an array would have; its first and its last stand for all.

        Raises:
            InvalidArguments, FunctionUnavailable: as `check`.
            BadRequest: the index has no place of its own.
        """
        if index_as is None:
            self.check(args, field)
            return
        if index_as in args:
            raise BadRequest(
                f"index_as: {index_as!r} stands in args too; leave it out there, each task has its own.", field="index_as"
            )
        schema = msgspec.json.decode(self.published.schema)
        known = tuple(schema.get("properties", {}))
        if index_as not in known and schema.get("additionalProperties") is False:
            takes = f" It takes: {', '.join(known)}." if known else " It takes no arguments."
            name = self.published.name
            raise InvalidArguments(
                f"index_as: {name} has no argument {index_as[:80]!r}.{near(index_as, known)}{takes}",
                function=name,
                field="index_as",
            )
        for index in dict.fromkeys((0, count - 1)):
            self.check(args | {index_as: index}, field)

    def _refuse(self, args: dict[str, Any], field: str) -> NoReturn:
        known = tuple(msgspec.json.decode(self.published.schema).get("properties", {}))
        found: list[dict[str, str]] = []
        for error in self.validator.iter_errors(args):
            if len(found) == ERRORS_SHOWN_MAX:
                break
            path = field + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path)
            found.append({"path": path[:MESSAGE_CHARS_MAX], "message": error.message[:MESSAGE_CHARS_MAX]})
        unknown = [name for name in args if name not in known]
        hint = near(unknown[0], known) if unknown and known else ""
        first = found[0] if found else {"path": field, "message": "does not fit the schema"}
        takes = f" It takes: {', '.join(known)}." if known else " It takes no arguments."
        raise InvalidArguments(f"{first['path']}: {first['message']}.{hint}{takes}", function=self.published.name, errors=found)


class Functions:
    """All functions, by name.

    Args:
        store: where agents publish them.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._by_name: dict[str, Function] = {}
        self._read_s = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Read all again; what has not changed keeps its compiled schema."""
        blobs = await self._store.functions()
        current = self._by_name
        self._by_name = {
            name: known if (known := current.get(name)) is not None and known.blob == blob else _compiled(blob)
            for name, blob in blobs.items()
        }
        self._read_s = asyncio.get_running_loop().time()

    async def _refresh_soon(self) -> None:
        await asyncio.sleep(max(0.0, self._read_s + MISS_REFRESH_S - asyncio.get_running_loop().time()))
        await self.refresh()

    def known(self, name: str) -> Function | None:
        """The function, as far as is known now."""
        return self._by_name.get(name)

    async def find(self, name: str) -> Function:
        """The function; looks once more where it is not known.

        Raises:
            FunctionNotFound: lists near names.
            StoreUnavailable: nothing is known of any function.
        """
        found = self._by_name.get(name)
        if found is None:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._refresh_soon())
            try:
                await asyncio.shield(self._reading)
            except StoreUnavailable:
                if not self._by_name:
                    raise
            found = self._by_name.get(name)
        if found is not None:
            return found
        names = sorted(self._by_name)
        if not names:
            raise FunctionNotFound(
                "No function is registered yet: they come with the first node agent (rocyard node).", known=[]
            )
        some = names[:NAMES_SHOWN_MAX]
        raise FunctionNotFound(
            f"There is no function {name[:80]!r}.{near(name, names) or ' Known: ' + ', '.join(some) + '.'}", known=some
        )

    def all(self) -> list[PublishedFunction]:
        """Every function, by name."""
        return [self._by_name[name].published for name in sorted(self._by_name)]


def _compiled(blob: bytes) -> Function:
    published = decode_published(blob)
    if published.error:
        return Function(blob, published, None)
    try:
        validator = jsonschema_rs.validator_for(
            msgspec.json.decode(published.schema),
            retriever=_no_retrieval,
            pattern_options=jsonschema_rs.RegexOptions(),  # linear time, whatever the pattern
        )
    except (ValueError, jsonschema_rs.ValidationError) as error:
        broken = msgspec.structs.replace(published, error=f"its schema cannot be used: {str(error)[:MESSAGE_CHARS_MAX]}")
        return Function(blob, broken, None)
    return Function(blob, published, validator)


def _no_retrieval(uri: str) -> NoReturn:
    """A schema stands for itself: nothing is fetched for it."""
    raise ValueError(f"the schema refers to {uri[:100]}, which is not in it")
