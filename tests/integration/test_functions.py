"""Functions of the settings, end to end: their own interpreter, their schema, their tenant's limits."""

import json
import shutil
import venv
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from manager.client import Client
from manager.core.errors import InvalidArguments, QuotaExceeded
from manager.core.lifecycle import TaskStatus
from tests.integration.cluster import WITNESS, Cluster

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter that has msgspec and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    shutil.copytree(Path(msgspec.__file__).parent, site / "msgspec")
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory, python: str) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), {"ROCYARD_TENANTS__SMALL__ACTIVE_TASKS_MAX": "2"})
    config = cluster.directory / "rocyard.yaml"
    settings = json.loads(config.read_text())
    settings["functions"]["where"] = {"target": "typed_functions:where", "path": str(WITNESS), "python": python}
    config.write_text(json.dumps(settings))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.destroy()


def _tenant(cluster: Cluster, name: str) -> Client:
    key = cluster.client.create_key(name).key
    return Client.at(cluster.client.address.url, key)


def test_a_function_runs_in_its_own_interpreter(configured: Cluster, python: str) -> None:
    answer = configured.client.submit("where", {"number": 2, "names": ["a"], "scale": 2.5}).result(60)
    assert Path(answer["python"]) == Path(python)
    assert (answer["number"], answer["names"]) == (5.0, ["a"])


@pytest.mark.parametrize(
    ("args", "told"),
    [
        pytest.param({"number": "two", "names": []}, "number", id="of the wrong type"),
        pytest.param({"number": 1}, "names", id="one is missing"),
        pytest.param({"number": 1, "names": [1]}, "names", id="deep inside"),
        pytest.param({"number": 1, "names": [], "sclae": 2}, "sclae", id="a name that is not there"),
    ],
)
def test_arguments_are_checked_by_the_type_hints(configured: Cluster, args: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidArguments, match=told):
        configured.client.submit("where", args)


def test_an_executor_never_serves_two_tenants(configured: Cluster) -> None:
    pids = {}
    for tenant in ("red", "blue"):
        with _tenant(configured, tenant) as client:
            tasks = [client.submit("where", {"number": 1, "names": []}) for _ in range(4)]
            pids[tenant] = {task.result(60)["pid"] for task in tasks}
    assert pids["red"] & pids["blue"] == set()


def test_a_tenants_limit_stands_in_the_settings(configured: Cluster) -> None:
    gate = configured.directory / "gate"
    args = {"path": str(configured.witness_path), "gate": str(gate)}
    with _tenant(configured, "small") as client:
        tasks = [client.submit("until", args) for _ in range(2)]
        with pytest.raises(QuotaExceeded, match="2"):
            client.submit("until", args)
        gate.touch()
        for task in tasks:
            assert client.wait(task, 60).status is TaskStatus.SUCCEEDED
        assert client.submit("until", args).result(60)
