"""The old variables: what they become, where they count, who wins over them, and how a mistake in them is told."""

import re
from pathlib import Path

import pytest

from manager.api.old_paths import OLD_PATHS
from manager.core.errors import SettingsError
from manager.old_names import EXAMPLE_KEY, OLD_NAMES, SWITCH
from manager.settings import Secret, Settings
from manager.settings_load import document_settings, load_settings, read_settings

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-key-of-twenty-chars"
ON = {SWITCH: "true"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_dotenv(text: str, environ: dict[str, str] | None = None) -> Settings:
    Path(".env").write_text(text)
    return load_settings(None, environ or {}, {})


def refused(text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        with_dotenv(text)
    return str(caught.value)


def old_env_file() -> str:
    """The old guide's ``.env`` with all its values, as its users have it; the key is one of their own."""
    return "\n".join(f"{old.name}={KEY if old.name == 'API_KEY' else old.default}" for old in OLD_NAMES)


def test_the_old_env_file_sets_what_it_used_to():
    settings = with_dotenv(old_env_file())
    assert settings.store.url == Secret("redis://localhost:6379/0")
    assert (settings.api.host, settings.api.port, settings.api.key) == ("0.0.0.0", 8000, Secret(KEY))
    assert settings.autoscaler.workers_max == 10
    assert settings.autoscaler.mode == "active"
    assert settings.tasks.time_limit_s == 300
    assert (settings.node.beat_s, settings.node.registration_s, settings.node.memory_ratio_max) == (30, 60, 0.8)
    assert settings.slots.idle_per_node_max == 5
    assert (settings.log.level, settings.log.format) == ("info", "json")


def test_every_old_name_changes_its_setting_and_no_other():
    other = {
        "REDIS_HOST": "h", "REDIS_PORT": "7000", "REDIS_DB": "3", "REDIS_PASSWORD": "pw", "API_HOST": "::", "API_PORT": "9000",
        "API_KEY": KEY, "MAX_WORKERS": "7", "TASK_TIMEOUT": "5m", "HEARTBEAT_INTERVAL": "4",
        "WORKER_REGISTRATION_TIMEOUT": "44", "LOG_LEVEL": "WARN", "LOG_FORMAT": "text", "GPU_MEMORY_THRESHOLD": "0.5",
        "MODEL_CACHE_SIZE": "9", "AUTO_SCALE_ENABLED": "False",
    }  # fmt: skip
    assert other.keys() == {old.name for old in OLD_NAMES}
    names = {doc.name for doc in document_settings()}

    def leaf(settings: object, path: str) -> object:
        for part in path.split("."):
            settings = getattr(settings, part)
        return settings

    for old in OLD_NAMES:
        assert old.setting in names
        settings = with_dotenv(f"{old.name}={other[old.name]}")
        flat = [name for name in names if "NAME" not in name]
        assert [name for name in flat if leaf(settings, name) != leaf(Settings(), name)] == [old.setting], old.name


@pytest.mark.parametrize(
    ("text", "url"),
    [
        pytest.param("REDIS_PORT=7000", "redis://localhost:7000/0", id="what is missing has the old default"),
        pytest.param("REDIS_HOST=r\nREDIS_PASSWORD=", "redis://r:6379/0", id="an empty password is none"),
        pytest.param("REDIS_PASSWORD='p@s/s:#w%'", "redis://:p%40s%2Fs%3A%23w%25@localhost:6379/0", id="signs are quoted"),
        pytest.param("REDIS_HOST=::1\nREDIS_DB=2", "redis://[::1]:6379/2", id="an address of version 6"),
    ],
)
def test_the_url_of_the_store_is_put_together(text: str, url: str):
    assert with_dotenv(text).store.url == Secret(url)


@pytest.mark.parametrize(
    ("word", "level"),
    [
        ("debug", "debug"),
        ("Info", "info"),
        ("WARN", "warning"),
        ("WARNING", "warning"),
        ("CRITICAL", "error"),
        ("ERROR", "error"),
    ],
)
def test_levels_of_logs_in_any_case(word: str, level: str):
    assert with_dotenv(f"LOG_LEVEL={word}").log.level == level


def test_the_environment_counts_only_where_it_is_asked_to():
    """Names as common as LOG_LEVEL may lie there for another program."""
    environ = {"API_PORT": "9001", "LOG_LEVEL": "trace", "API_KEY": "short"}
    assert load_settings(None, environ, {}) == Settings()
    assert load_settings(None, {"API_PORT": "9001"} | ON, {}).api.port == 9001
    assert with_dotenv(f"{SWITCH}=true", {"API_PORT": "9001"}).api.port == 9001, "the switch may stand in .env"


def test_the_switch_turns_them_off_too():
    assert with_dotenv("API_PORT=9001\nAPI_KEY=short", {SWITCH: "false"}) == Settings()
    with pytest.raises(SettingsError, match=f"{SWITCH} must be true or false, not the text 'maybe'"):
        load_settings(None, {SWITCH: "maybe"}, {})


def test_ours_wins_and_the_environment_wins_over_dotenv(folder: Path):
    (folder / "rocyard.yaml").write_text("api: {port: 1}\nslots: {idle_per_node_max: 1}\n")
    both = "API_PORT=3\nMODEL_CACHE_SIZE=3\nTASK_TIMEOUT=3\nROCYARD_TASKS__TIME_LIMIT_S=4\nMAX_WORKERS=3"
    settings = with_dotenv(both, {"ROCYARD_API__PORT": "5", "MAX_WORKERS": "6"} | ON)
    assert settings.api.port == 5, "a variable of ours"
    assert settings.slots.idle_per_node_max == 3, "above the YAML"
    assert settings.tasks.time_limit_s == 4, "a variable of ours in .env"
    assert settings.autoscaler.workers_max == 6, "the environment over .env"


def test_kubernetes_variables_of_services_called_redis_or_api_are_none():
    environ = {"REDIS_PORT": "tcp://10.0.0.1:6379", "API_PORT": "tcp://10.0.0.2:80", "API_PORT_80_TCP": "x"}
    assert load_settings(None, environ | ON, {}) == Settings()


def test_one_line_tells_which_took_effect(folder: Path):
    (folder / ".env").write_text("REDIS_HOST=r\nREDIS_PASSWORD=hunter22\nAPI_PORT=3\nLOG_LEVEL=INFO\nMAX_WORKERS=")
    (note,) = read_settings(None, {"ROCYARD_API__PORT": "5"}, {}).notes
    assert "REDIS_HOST, REDIS_PASSWORD, LOG_LEVEL;" in note
    assert "API_PORT" not in note, "a variable of ours took its place"
    assert "MAX_WORKERS" not in note, "it is empty"
    assert "hunter22" not in note
    assert read_settings(None, {SWITCH: "false"}, {}).notes == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("API_PORT=http", "api.port: must be a whole number .* not the text 'http' .API_PORT, old name in .env."),
        ("REDIS_PORT=x", "REDIS_PORT must be a port from 1 to 65535, not the text 'x' .REDIS_PORT, old name in .env;"),
        ("REDIS_PORT=x", "ROCYARD_OLD_NAMES=false leaves it alone"),
        ("REDIS_DB=-1", "REDIS_DB must be a whole number from 0"),
        ("REDIS_HOST=redis://h", "REDIS_HOST must be the name or the address of a host"),
        (
            "LOG_LEVEL=trace",
            "LOG_LEVEL must be one of debug, info, warn, warning, error, critical, fatal, not the text 'trace'",
        ),
        ("LOG_FORMAT=xml", "LOG_FORMAT must be one of json, text, console"),
        ("AUTO_SCALE_ENABLED=maybe", "AUTO_SCALE_ENABLED must be one of true"),
        ("GPU_MEMORY_THRESHOLD=80", "node.memory_ratio_max: must be .* .GPU_MEMORY_THRESHOLD, old name"),
        ("TASK_TIMEOUT=soon", "tasks.time_limit_s: 'soon' is not a duration.*TASK_TIMEOUT"),
        ("API_KEY=too-short", "api.key: must be 16 to 256 letters, digits and signs.*API_KEY, old name in .env"),
        ("API_KEY='sixteen letters and spaces'", "api.key: must be 16 to 256"),
        (f"API_KEY={EXAMPLE_KEY}", "API_KEY is the example of the old guide, which everybody knows"),
    ],
)
def test_a_wrong_value_names_the_old_variable(text: str, said: str):
    message = refused(text)
    assert re.search(said, message), message
    if text.startswith("API_KEY=too"):
        assert "too-short" not in message, "the key itself is not told"


def test_all_mistakes_are_told_at_once():
    message = refused("API_PORT=x\nLOG_LEVEL=trace\nROCYARD_NODE__BEAT_S=never")
    assert all(name in message for name in ("API_PORT", "LOG_LEVEL", "ROCYARD_NODE__BEAT_S"))


def test_the_page_holds_the_table_of_the_code():
    text = (ROOT / "docs" / "old-names.md").read_text()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    ours = {doc.name: doc.default for doc in document_settings()}
    variables = {row[0]: row[1:] for row in rows if row[0].isupper()}
    assert {name: tuple(row[:3]) for name, row in variables.items()} == {
        old.name: (old.setting, old.default or "empty", ours[old.setting]) for old in OLD_NAMES
    }
    assert all(len(row) == 4 and len(row[3]) > 10 for row in variables.values()), "a row lacks what differs"
    paths = {row[0].split()[-1]: row[1].split()[-1] for row in rows if row[0].startswith(("GET /", "POST /"))}
    assert paths == {old: new for new, old in OLD_PATHS.items()}
