"""What is said of a store by its settings and its INFO."""

import pytest

from manager.durability import Durability, durability_of, info_lines

GOOD = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "save": ""}
WELL = {"role": "master", "aof_last_write_status": "ok", "rdb_last_bgsave_status": "ok", "used_memory": "10", "maxmemory": "0"}


def found(config: dict[str, str] | None = None, **info: str) -> Durability:
    return durability_of(None if config == {} else GOOD | (config or {}), WELL | info)


def test_a_good_store_has_nothing_to_be_said_of():
    assert found() == Durability("always")


@pytest.mark.parametrize(
    ("config", "info", "word"),
    [
        pytest.param({"appendonly": "no"}, {}, "appendonly yes", id="no log"),
        pytest.param({"appendfsync": "no"}, {}, "never syncs", id="never synced"),
        pytest.param(None, {"role": "slave"}, "primary", id="a replica"),
        pytest.param(None, {"aof_last_write_status": "err"}, "disk is full", id="its disk is full"),
        pytest.param(
            {"save": "3600 1", "stop-writes-on-bgsave-error": "yes"}, {"rdb_last_bgsave_status": "err"}, "refuses writes",
            id="a snapshot failed",
        ),
        pytest.param(None, {"maxmemory": "99", "maxmemory_policy": "allkeys-lru"}, "throw tasks away", id="evicts"),
    ],
)  # fmt: skip
def test_what_keeps_tasks_from_being_accepted(config: dict[str, str] | None, info: dict[str, str], word: str):
    said = found(config, **info)
    assert len(said.faults) == 1
    assert word in said.faults[0]


@pytest.mark.parametrize(
    ("config", "info", "word"),
    [
        pytest.param({"appendfsync": "everysec"}, {}, "two seconds", id="synced each second"),
        pytest.param({}, {}, "CONFIG is not allowed", id="settings are not told"),
        pytest.param(
            None, {"used_memory": "95", "maxmemory": "100", "maxmemory_policy": "noeviction"}, "nearly full", id="full"
        ),
    ],
)
def test_what_somebody_should_know(config: dict[str, str] | None, info: dict[str, str], word: str):
    said = found(config, **info)
    assert said.faults == ()
    assert len(said.warnings) == 1
    assert word in said.warnings[0]


@pytest.mark.parametrize(
    ("config", "info"),
    [
        pytest.param({"save": ""}, {"rdb_last_bgsave_status": "err"}, id="a backup failed where no snapshots are taken"),
        pytest.param(None, {"maxmemory": "0", "maxmemory_policy": "allkeys-lru"}, id="nothing to evict for"),
    ],
)
def test_what_is_no_fault(config: dict[str, str] | None, info: dict[str, str]):
    assert found(config, **info).faults == ()


def test_info_is_read():
    assert info_lines("# Memory\r\nused_memory:5\r\nname:a:b\r\n\r\n") == {"used_memory": "5", "name": "a:b"}
