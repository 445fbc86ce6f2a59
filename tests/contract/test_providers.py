"""What every provider of nodes keeps to: the one that tests play with, and the supervisor's fleet over its socket."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from autoscaler.providers.interface import Provider, ProviderRefused, ProviderUnavailable
from autoscaler.providers.local import LocalProvider
from manager.children import Child, Command
from manager.core.errors import StartError
from manager.core.fleet import SOCKET_NAME
from manager.fleet import Fleet, base_nodes, with_simulated_group
from manager.settings import GroupSettings, NodeSettings, Settings
from tests.sim.autoscaler_world import World

SLEEPER = (sys.executable, "-c", "import time; time.sleep(600)")
SETTINGS = Settings(
    groups={
        "g": GroupSettings(devices="2:mi300x", workers_max=5),
        "pods": GroupSettings(provider="kubernetes", devices="1:h100"),
    }
)


class Bench:
    """A fleet whose nodes only sleep, and what was said of it."""

    def __init__(self, directory: Path, settings: Settings = SETTINGS) -> None:
        self.directory = directory
        self.started: list[Settings] = []
        self.said: list[str] = []
        self.fleet = Fleet(directory, settings, self.start, self.said.append)

    async def start(self, settings: Settings, on_final: Callable[[str], None]) -> Child:
        self.started.append(settings)
        child = Child(Command(settings.node.name, SLEEPER, final=90), self.directory / "logs", lambda *_: None, on_final)
        await child.start()
        return child

    async def close(self) -> None:
        await self.fleet.close()
        await asyncio.gather(*(child.stop() for child in self.fleet.children))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    await made.fleet.serve()
    yield made
    await made.close()


@pytest.fixture(params=["played", "local"])
def provider(request: pytest.FixtureRequest) -> Provider:
    if request.param == "played":
        return World({"g": (2, 192.0, 0, 5)}).providers["g"]
    made: Bench = request.getfixturevalue("bench")
    return LocalProvider(made.directory)


async def names(provider: Provider) -> list[str]:
    return [instance.name for instance in (await provider.list("g")).instances]


async def grow(provider: Provider, count: int, token: int = 1) -> tuple[str, ...]:
    listing = await provider.list("g")
    chosen = provider.new_names(listing, count)
    await provider.add(listing, chosen, token)
    return chosen


async def test_what_is_added_is_listed_and_what_is_removed_is_not(provider: Provider) -> None:
    chosen = await grow(provider, 3)
    assert len(set(chosen)) == 3
    assert await names(provider) == list(chosen)
    listing = await provider.list("g")
    assert all(instance.age_s >= 0 and not instance.problem for instance in listing.instances)
    await provider.remove(listing, chosen[2:], 1)
    assert await names(provider) == list(chosen[:2])


async def test_the_same_listing_gives_the_same_names(provider: Provider) -> None:
    listing = await provider.list("g")
    assert provider.new_names(listing, 3) == provider.new_names(listing, 3)
    assert provider.new_names(listing, 3)[:1] == provider.new_names(listing, 1)


async def test_a_call_that_is_repeated_changes_nothing(provider: Provider) -> None:
    listing = await provider.list("g")
    chosen = provider.new_names(listing, 2)
    for _ in range(2):
        await provider.add(listing, chosen, 1)
    assert await names(provider) == list(chosen)
    for _ in range(2):
        await provider.remove(await provider.list("g"), chosen[1:], 1)
    assert await names(provider) == list(chosen[:1])


async def test_a_token_that_was_replaced_is_refused(provider: Provider) -> None:
    (kept,) = await grow(provider, 1, token=7)
    listing = await provider.list("g")
    with pytest.raises(ProviderRefused, match="token"):
        await provider.add(listing, provider.new_names(listing, 1), 6)
    with pytest.raises(ProviderRefused, match="token"):
        await provider.remove(listing, (kept,), 6)
    assert await names(provider) == [kept]


async def test_where_nobody_answers_nothing_is_known(tmp_path: Path, bench: Bench) -> None:
    provider = LocalProvider(bench.directory)
    await bench.fleet.close()
    for folder in (bench.directory, tmp_path / "nowhere"):
        with pytest.raises(ProviderUnavailable, match="rocyard up"):
            await LocalProvider(folder).list("g")
    with pytest.raises(ProviderUnavailable):
        await provider.list("g")


# --- the fleet alone --------------------------------------------------------------------------------------------------


async def test_the_socket_is_its_owners_alone_and_works_in_a_deep_folder(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    made = Bench(deep)
    await made.fleet.serve()
    try:
        assert (deep / SOCKET_NAME).stat().st_mode & 0o777 == 0o600
        assert (await LocalProvider(deep).list("g")).instances == ()
    finally:
        await made.close()
    assert not (deep / SOCKET_NAME).exists()


async def test_no_name_is_given_twice_and_no_device_is_alike(bench: Bench) -> None:
    provider = LocalProvider(bench.directory)
    assert await grow(provider, 2) == ("g-0", "g-1")
    await provider.remove(await provider.list("g"), ("g-1",), 1)
    assert await grow(provider, 2) == ("g-2", "g-3")
    live = [each.node for each in bench.started if each.node.name != "g-1"]
    assert len({node.simulated_node for node in live}) == 3
    assert all(node.group == "g" and node.devices == "simulated" for node in live)
    assert all(node.simulate == f"{node.simulated_node + 1}x2:mi300x" for node in live)
    listing = msgspec.structs.replace(await provider.list("g"), version="1")
    with pytest.raises(ProviderRefused, match="was removed"):
        await provider.add(listing, provider.new_names(listing, 1), 1)


async def test_token_and_names_outlive_the_supervisor(bench: Bench, tmp_path: Path) -> None:
    provider = LocalProvider(bench.directory)
    await grow(provider, 2, token=5)
    await bench.close()
    following = Bench(tmp_path)
    await following.fleet.serve()
    try:
        assert await names(provider) == []
        with pytest.raises(ProviderRefused, match="replaced by 5"):
            await grow(provider, 1, token=4)
        assert await grow(provider, 1, token=5) == ("g-2",)
    finally:
        await following.close()


@pytest.mark.parametrize(
    ("group", "chosen", "says"),
    [
        ("x", ("x-0",), "no local group 'x'"),
        ("pods", ("pods-0",), "no local group 'pods'"),
        ("g", ("other",), "no name of the group"),
        ("g", ("g-01",), "no name of the group"),
        ("g", ("g-../../etc",), "no name of the group"),
        ("g", tuple(f"g-{n}" for n in range(6)), "may have 5"),
    ],
)
async def test_what_the_fleet_will_not_do(bench: Bench, group: str, chosen: tuple[str, ...], says: str) -> None:
    provider = LocalProvider(bench.directory)
    listing = msgspec.structs.replace(await provider.list("g"), group=group)
    with pytest.raises(ProviderRefused, match=says):
        await provider.add(listing, chosen, 1)
    assert bench.started == []


async def test_what_is_no_request_is_refused_and_the_next_one_is_served(bench: Bench) -> None:
    reader, writer = await asyncio.open_unix_connection(bench.directory / SOCKET_NAME)
    for line in (b"nonsense\n", b'{"type": "end_all"}\n', b'{"type": "list"}\n'):
        writer.write(line)
        assert b"not a request" in await reader.readline()
    writer.write(b'{"type": "list", "group": "g"}\n')
    assert b'"nodes"' in await reader.readline()
    writer.close()


async def test_a_node_that_ends_for_good_is_not_started_again(tmp_path: Path) -> None:
    gone: list[str] = []
    ended = asyncio.Event()

    def note(name: str) -> None:
        gone.append(name)
        ended.set()

    restarts: list[int] = []
    script = (sys.executable, "-c", "import sys; sys.exit(90)")
    child = Child(Command("n", script, final=90), tmp_path, lambda _, code: restarts.append(code), note)
    await child.start()
    await asyncio.wait_for(ended.wait(), 20)
    await child.stop()
    assert gone == ["n"]
    assert restarts == []


async def test_nodes_of_a_group_have_its_labels(tmp_path: Path) -> None:
    group = GroupSettings(devices="2:mi300x", labels={"zone": "a"})
    node = NodeSettings(labels={"zone": "own"})
    made = Bench(tmp_path, Settings(groups={"g": group}, node=node))
    await made.fleet.serve()
    try:
        await grow(LocalProvider(made.directory), 1)
        assert [settings.node.labels for settings in made.started] == [{"zone": "a"}]
    finally:
        await made.close()
    simulated = with_simulated_group(Settings(node=node))
    assert simulated.groups["simulated"].labels == {"zone": "own"}
    assert base_nodes(simulated)[0].node.labels == {"zone": "own"}


def test_a_simulated_cluster_gets_a_group_like_its_first_nodes() -> None:
    made = with_simulated_group(Settings(node=NodeSettings(simulate="2x8:mi300x, 3x1:w7900")))
    assert made.groups == {"simulated": GroupSettings(devices="8:mi300x", workers_min=2, workers_max=4)}
    assert [(each.node.name, each.node.group) for each in base_nodes(made)] == [
        ("node-0", "simulated"),
        ("node-1", "simulated"),
        ("node-2", ""),
        ("node-3", ""),
        ("node-4", ""),
    ]


def test_groups_of_the_settings_are_left_as_they_are() -> None:
    assert with_simulated_group(SETTINGS) is SETTINGS
    assert {each.node.group for each in base_nodes(SETTINGS)} == {""}


def test_a_local_group_that_cannot_be_simulated_stops_the_start() -> None:
    sizes = Settings(groups={"g": GroupSettings(devices="8:192GiB")})
    with pytest.raises(StartError, match=r"groups\.g\.devices"):
        with_simulated_group(sizes)
