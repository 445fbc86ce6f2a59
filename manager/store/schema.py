"""Whose the store is and how its data are laid out: its identity, its schema, and which library of functions it has.

Each process asks on every connection that it makes, before anything else is sent, and then once a second beside its other
calls. A store that came back empty, or is another cluster's, is refused until the right data are back; so is one whose data are
newer than this process can work with, and such a process ends. The rules for upgrades stand in docs/operations.md.

It knows no connection: who has one gives a way to ask over it.
"""

import hashlib
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any, Final

import msgspec

from manager.core.errors import StoreNew, StoreReplaced, StoreTooNew, StoreUnavailable
from manager.core.ids import new_id
from manager.core.keys import SCHEMA_VERSION, Keys
from manager.log import get_logger
from manager.metrics import STORE_REFUSED
from manager.store.connection import Ask, StoreReplyError

PROCESS_MIN: Final = 2
"""The oldest process (by the `SCHEMA_VERSION` of its code) that may work beside this one on a store that this one has made."""
LIBRARY_VERSION: Final = 2
"""Of the functions in ``lua/``. A released version never changes: raise it with each release that changes them."""
STEP: Final = 500
"""Records in one step of a migration: a function holds up everybody else for as long as it runs."""
TRIES: Final = 20
"""Processes that start at once load the library one after the other, and each that was passed looks again."""

_FIELDS: Final = ("cluster", "schema", "schema_min", "library_version", "library", "restoring", "sequence")

log = get_logger("rocyard.store")


class Migration(msgspec.Struct, frozen=True):
    """How data of the schema before become those of `schema`.

    Attributes:
        process_min: the oldest process that may go on beside those that know `schema`.
        steps: functions of the library, one after the other, each called with a limit until it says that nothing is left.
            Each call may come twice, and from two processes.
    """

    schema: int
    process_min: int
    steps: tuple[str, ...]


MIGRATIONS: Final = (Migration(2, 2, ("ry_upgrade_ends",)),)
assert [each.schema for each in MIGRATIONS] == list(range(2, SCHEMA_VERSION + 1))
assert MIGRATIONS[-1].process_min == PROCESS_MIN


class Facts(msgspec.Struct, frozen=True):
    """What the store says of itself; 0 and empty where it says nothing."""

    cluster: str
    schema: int
    schema_min: int
    library_version: int
    library: str
    restoring: bool
    used: bool


class Library(msgspec.Struct, frozen=True):
    """A library of functions."""

    version: int
    source: str

    @property
    def digest(self) -> str:
        """What names its text."""
        return hashlib.sha256(self.source.encode()).hexdigest()


def library_source() -> str:
    """The text of our library: its parts in one."""
    parts = sorted(files("manager.store").joinpath("lua").iterdir(), key=lambda part: part.name)
    return "#!lua name=rocyard\n" + "\n".join(part.read_text() for part in parts if part.name.endswith(".lua"))


def own_library() -> Library:
    """The library that this code calls."""
    return Library(LIBRARY_VERSION, library_source())


async def read_facts(ask: Ask, keys: Keys) -> Facts:
    """What the store says of itself."""
    cluster, schema, least, version, digest, restoring, sequence = await ask("HMGET", keys.meta, *_FIELDS)
    return Facts(
        cluster=(cluster or b"").decode(),
        schema=int(schema or 0),
        schema_min=int(least or 0),
        library_version=int(version or 0),
        library=(digest or b"").decode(),
        restoring=restoring is not None,
        used=sequence is not None,
    )


async def identify(ask: Ask, keys: Keys, cluster: str) -> str:
    """The identity of the data in this store; `cluster` becomes it where there is none.

    Raises:
        StoreUnavailable: the store is being restored.
    """
    facts = await read_facts(ask, keys)
    if facts.restoring:
        raise StoreUnavailable("a backup is being restored into the store; if that was broken off, run 'rocyard restore' again")
    # Data that nobody has named were written before schemas were noted by every process.
    await ask("HSETNX", keys.meta, "schema", 1 if facts.used else SCHEMA_VERSION)
    await ask("HSETNX", keys.meta, "schema_min", PROCESS_MIN)
    await ask("HSETNX", keys.meta, "cluster", cluster)
    return (await read_facts(ask, keys)).cluster


def library_text(listed: Sequence[Sequence[Any]]) -> str | None:
    """The text of the library in an answer to ``FUNCTION LIST … WITHCODE``; None: there is none."""
    if not listed:
        return None
    fields = listed[0]
    return str(fields[fields.index(b"library_code") + 1].decode())


async def deploy(ask: Ask, keys: Keys, library: Library | None = None) -> None:
    """Load a library (ours), unless the store has it or a newer one. Needs a connection to itself: it watches a key.

    What counts is the text that is there, not only what was noted of it: somebody may have replaced it by hand.

    Raises:
        StoreUnavailable: the store's library is gone, and was a newer one.
    """
    own = library or own_library()
    for _ in range(TRIES):
        await ask("WATCH", keys.meta)
        facts = await read_facts(ask, keys)
        there = library_text(await ask("FUNCTION", "LIST", "LIBRARYNAME", "rocyard", "WITHCODE"))
        newer = facts.library_version > own.version
        if newer and there is None:
            raise StoreUnavailable(
                f"the store has lost its functions, and they were of version {facts.library_version}, newer than ours "
                f"({own.version}): a process of the newer version loads them again"
            )
        if newer or (there == own.source and (facts.library_version, facts.library) == (own.version, own.digest)):
            await ask("UNWATCH")
            return
        await ask("MULTI")
        await ask("FUNCTION", "LOAD", "REPLACE", own.source)
        await ask("HSET", keys.meta, "library", own.digest, "library_version", own.version)
        done = await ask("EXEC")
        if done is not None:  # else somebody else was quicker: look again
            if isinstance(done[0], StoreReplyError):
                raise done[0]
            by_hand = there is not None and Library(facts.library_version, there).digest != facts.library
            tell = log.warning if by_hand else log.info
            tell("library_loaded", version=own.version, before=facts.library_version, digest=own.digest[:12], by_hand=by_hand)
            return
    raise StoreUnavailable("the store's functions are replaced again and again: which processes run on it?")


async def migrate(ask: Ask, keys: Keys) -> int:
    """Bring older data to our schema, in small steps; how many steps it took. May be broken off, and run twice at once."""
    steps = 0
    while True:
        schema = (await read_facts(ask, keys)).schema
        following = next((each for each in MIGRATIONS if each.schema == schema + 1), None)
        if schema == 0 or following is None:
            return steps
        for function in following.steps:
            left = 1
            while left:
                left = await ask("FCALL", function, 1, keys.prefix, STEP)
                steps += 1
        await ask("FCALL", "ry_upgraded", 1, keys.prefix, schema, following.schema, following.process_min)
        log.info("store_upgraded", schema=following.schema, steps=steps)


class Membership:
    """The cluster that this process belongs to, and whether the store is that cluster's.

    Args:
        cluster: the identity that the store must have; empty: the first that it is seen to have.
        founder: whether this process gives an identity to a store that has none.
        on_outdated: called once, when the store has become too new for this process, which then must end.
        library: the one that this process calls; None: ours.
    """

    def __init__(
        self,
        cluster: str = "",
        keys: Keys | None = None,
        *,
        founder: bool = False,
        on_outdated: Callable[[], None] = lambda: None,
        library: Library | None = None,
    ) -> None:
        self.cluster = cluster
        self.keys = keys or Keys()
        self.on_outdated = on_outdated
        self.refusal: StoreUnavailable | None = None
        self._founder = founder
        self._library = library

    async def admit(self, ask: Ask) -> None:
        """Look at the store over a new connection, before anybody uses it.

        Raises:
            StoreReplaced, StoreTooNew, StoreNew: nothing may be sent over it.
        """
        facts = await self._judged(ask)
        if not facts.cluster:
            if not self._founder:
                raise StoreNew
            self.cluster = await identify(ask, self.keys, new_id())
            log.warning("store_founded", cluster=self.cluster)
        elif not self.cluster:
            self.cluster = facts.cluster
        await deploy(ask, self.keys, self._library)
        self._note(None)

    async def still(self, ask: Ask) -> None:
        """Look again, beside other calls.

        Raises:
            StoreReplaced, StoreTooNew: nothing more may be sent.
        """
        await self._judged(ask)

    def raise_if_outdated(self) -> None:
        """For the end of a process.

        Raises:
            StoreTooNew: that is why it ended.
        """
        if isinstance(self.refusal, StoreTooNew):
            raise self.refusal

    async def _judged(self, ask: Ask) -> Facts:
        facts = await read_facts(ask, self.keys)
        refusal = self._refusal(facts)
        if refusal is not None:
            self._note(refusal)
            raise refusal
        return facts

    def _refusal(self, facts: Facts) -> StoreUnavailable | None:
        if facts.schema_min > SCHEMA_VERSION:
            return StoreTooNew(
                f"the store has data of schema {facts.schema}, with which processes of schema {facts.schema_min} or newer may "
                f"work; this process knows schema {SCHEMA_VERSION}: start it from the version of Rocyard that the others have",
                schema=facts.schema,
                schema_min=facts.schema_min,
                known=SCHEMA_VERSION,
            )
        if not self.cluster or facts.cluster == self.cluster:
            return None
        if facts.cluster:
            state = f"belongs to another cluster ({facts.cluster})"
        else:
            state = "is being restored" if facts.restoring else "is empty"
        return StoreReplaced(
            f"the store {state}, but this process belongs to cluster {self.cluster}: nothing is read or written until the "
            "right data are back; see 'A store that came back empty' in docs/operations.md",
            cluster=self.cluster,
            found=facts.cluster,
        )

    def _note(self, refusal: StoreUnavailable | None) -> None:
        """Say it once per change."""
        before, self.refusal = self.refusal, refusal
        if str(before or "") == str(refusal or ""):
            return
        STORE_REFUSED.labels(reason="replaced").set(isinstance(refusal, StoreReplaced))
        STORE_REFUSED.labels(reason="too_new").set(isinstance(refusal, StoreTooNew))
        if refusal is None:
            log.warning("store_accepted", cluster=self.cluster)
            return
        log.error("store_refused", reason=refusal.code, error=str(refusal))
        if isinstance(refusal, StoreTooNew):
            self.on_outdated()
