"""What `rocyard doctor` asks of a cluster: its store, its API, its scheduler. Each question has a deadline.

It only reads. What runs on this machine is found by its data folder, as `rocyard up` left it; what runs elsewhere by what the
settings and the address of the API say.
"""

import asyncio
import json
import time
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec

from manager import doctor
from manager.cli.doctor_machine import clock_synchronised
from manager.core.addresses import dialled, in_url, is_loopback
from manager.core.answers_cluster import Readiness
from manager.core.errors import RocyardError, SettingsError
from manager.doctor import Check, StoreFacts
from manager.durability import info_lines
from manager.settings import Secret, Settings
from manager.tls import Role, client_context, dask_address, settings_for, tls_files

ASK_S: Final = 5.0
TRIES: Final = 3
"""The controller's deadlines for the scheduler are short, so that it turns to other work; on a busy machine one may pass."""
_CONFIG: Final = ("appendonly", "appendfsync", "maxmemory-policy")


class Target(msgspec.Struct, frozen=True):
    """The cluster that is meant.

    Attributes:
        settings: as read; the store's URL is that of the embedded store, where one runs.
        supervisor: of the cluster that runs on this machine's data folder; None: none does.
        data_dir: that folder.
        url: of the API, empty where nobody knows of one.
        key, ca: for that API.
        asked: whether somebody named the API, so that it must answer.
    """

    settings: Settings
    supervisor: int | None
    data_dir: Path
    url: str
    key: Secret
    ca: str
    asked: bool

    def nothing_runs(self) -> str:
        """Why there is nothing to ask."""
        return f"no cluster runs on {self.data_dir}"


def with_embedded_store(settings: Settings, data_dir: Path) -> Settings:
    """The settings with the URL of the store that `rocyard up` runs on `data_dir`.

    Raises:
        OSError, ValueError, KeyError: its file cannot be read.
    """
    kept = json.loads((data_dir / "store.json").read_text())
    scheme = "rediss" if settings.tls.directory else "redis"
    host = in_url(dialled(settings.store.host))
    url = Secret(f"{scheme}://rocyard:{kept['password']}@{host}:{kept['port']}/0")
    return msgspec.structs.replace(settings, store=msgspec.structs.replace(settings.store, url=url))


def store(target: Target) -> tuple[Check, ...]:
    """The store, and what it says of itself."""
    from manager.supervisor import known_cluster

    settings = target.settings
    runs = target.supervisor is not None
    try:
        if not settings.store.url.value and runs:
            settings = with_embedded_store(settings, target.data_dir)
        if not settings.store.url.value:
            remedy = "rocyard up starts one; to look at another one, set store.url"
            return (doctor.no_store(target.nothing_runs(), remedy, fails=False),)
        expected = settings.store.cluster or known_cluster(target.data_dir)
        facts = asyncio.run(_ask_store(settings_for(settings, role_at_hand(settings)).store.url.value, expected))
    except (RocyardError, OSError, ValueError, KeyError) as error:
        remedy = "see that it runs, what store.url says, and what lies between: a firewall, a password, TLS"
        return (doctor.no_store(str(error), remedy, fails=True),)
    return doctor.store_checks(facts, clock_synchronised())


def role_at_hand(settings: Settings) -> Role:
    """A role whose certificate lies on this machine; the client's where there is none, whose absence is then told."""
    for role in Role:
        try:
            tls_files(settings.tls, role)
        except SettingsError:
            continue
        return role
    return Role.CLIENT


async def _ask_store(url: str, expected: str) -> StoreFacts:
    from manager.core.keys import Keys
    from manager.store.connection import StoreConnection, StoreReplyError
    from manager.store.schema import LIBRARY_VERSION, library_source, library_text, read_facts

    connection = StoreConnection(url, ASK_S, "doctor")
    try:
        info = info_lines((await connection.call("INFO", "everything")).decode())
        before = time.time()
        seconds, microseconds = await connection.call("TIME")
        now = (before + time.time()) / 2
        try:
            answers = [await connection.call("CONFIG", "GET", name) for name in _CONFIG]
            config = {answer[0].decode(): answer[1].decode() for answer in answers if answer}
        except StoreReplyError:
            config = None
        said = await read_facts(connection.call, Keys())
        listed = await connection.call("FUNCTION", "LIST", "LIBRARYNAME", "rocyard", "WITHCODE")
        code = library_text(listed)
        return StoreFacts(
            info=info,
            config=config,
            library=None if code is None else code == library_source(),
            ahead_s=int(seconds) + int(microseconds) / 1e6 - now,
            cluster=said.cluster,
            expected=expected,
            schema=said.schema,
            schema_min=said.schema_min,
            library_newer=code is not None and said.library_version > LIBRARY_VERSION,
        )
    except StoreReplyError as error:
        raise RocyardError(f"the store refuses to say how it is: {error}") from error
    finally:
        await connection.close()


def api(target: Target) -> Check:
    """The API, by its /readyz."""
    if not target.url or (target.supervisor is None and not target.asked):
        return doctor.no_cluster("API", f"{target.nothing_runs()}; --url names another one")
    try:
        verify = client_context(target.ca) if target.url.startswith("https") else False
        reply = httpx.get(f"{target.url}/readyz", timeout=ASK_S, trust_env=False, verify=verify)
        ready = msgspec.json.decode(reply.content, type=Readiness)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, RocyardError) as error:
        return doctor.api_check(target.url, None, str(error) or type(error).__name__)
    except msgspec.DecodeError:
        return doctor.api_check(target.url, None, f"something else listens there (status {reply.status_code})")
    return doctor.api_check(target.url, ready, "")


def scheduler(target: Target) -> Check:
    """The Dask scheduler, by what the placement plugin answers."""
    if target.supervisor is None and is_loopback(target.settings.dask.host):
        return doctor.no_cluster("scheduler", target.nothing_runs())
    try:
        settings = _with_scheduler(target)
        files = tls_files(settings.tls, role_at_hand(settings))
    except RocyardError as error:
        return doctor.no_cluster("scheduler", f"dask.port is 0, and the API does not tell which it is: {error}")
    return asyncio.run(_ask_scheduler(dask_address(settings), files))


def _with_scheduler(target: Target) -> Settings:
    """The settings with the port that the scheduler has; where any free one was asked for, the API knows it."""
    from manager.client import Client

    dask = target.settings.dask
    if dask.port:
        return target.settings
    with Client.at(target.url, target.key.value, target.ca) as client:
        told = client.join().dask
    return msgspec.structs.replace(target.settings, dask=msgspec.structs.replace(dask, host=told.host, port=told.port))


async def _ask_scheduler(address: str, files: Any) -> Check:
    from manager.dask_side import DaskSide, DaskUnavailable

    async def runs_nothing(_slot_id: str) -> str:
        raise NotImplementedError("the doctor submits nothing")

    silence = ""
    for _ in range(TRIES):
        side = DaskSide(address, runs_nothing, files)
        try:
            slots, nodes = await side.slots()
        except DaskUnavailable as error:
            silence = str(error)
        except Exception as error:  # noqa: BLE001  whatever another scheduler answers to a question that it does not know
            return doctor.scheduler_check(address, None, 0, str(error)[:200] or type(error).__name__, ours=True)
        else:
            return doctor.scheduler_check(address, tuple(nodes), len(slots), "", ours=True)
        finally:
            await side.close()
    return doctor.scheduler_check(address, None, 0, silence, ours=False)
