"""Settings: where they come from, and how a mistake in them is told."""

import time
from pathlib import Path

import pytest

from manager.core.errors import SettingsError
from manager.core.quantities import GIB, MIB
from manager.settings import FunctionSettings, Secret, Settings, TenantSettings
from manager.settings_load import load_settings, read_settings


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def from_yaml(text: str, environ: dict[str, str] | None = None) -> Settings:
    Path("rocyard.yaml").write_text(text)
    return load_settings(None, environ or {}, {})


def refused(path: Path | None = None, environ: dict[str, str] | None = None, flags: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(path, environ or {}, flags or {})
    return str(caught.value)


def test_with_nothing_set_all_is_default():
    assert load_settings(None, {"PATH": "/bin", "ROCYARDS_X": "1"}, {}) == Settings()


def test_the_later_place_wins(folder: Path):
    names = {"flag": 1, "environment": 2, "dotenv": 3, "yaml": 4}
    yaml = "slots:\n" + "".join(f"  {key}: 40\n" for key in ("idle_s", "residence_s", "open_deadline_s", "drain_target_s"))
    (folder / "rocyard.yaml").write_text(yaml)
    (folder / ".env").write_text(
        "# comment\nOTHER=x\nexport ROCYARD_SLOTS__RESIDENCE_S='3'\n"
        "ROCYARD_SLOTS__OPEN_DEADLINE_S=3\nROCYARD_SLOTS__DRAIN_TARGET_S=3\n"
    )
    environ = {"ROCYARD_SLOTS__OPEN_DEADLINE_S": "2", "ROCYARD_SLOTS__DRAIN_TARGET_S": "2"}
    slots = load_settings(None, environ, {"slots.drain_target_s": "1"}).slots
    read = {
        "flag": slots.drain_target_s,
        "environment": slots.open_deadline_s,
        "dotenv": slots.residence_s,
        "yaml": slots.idle_s,
    }
    assert read == names | {"yaml": 40}


def test_the_yaml_is_the_one_given_else_the_one_named_else_the_one_here(folder: Path):
    for name, port in (("given", 1), ("named", 2), ("rocyard", 3)):
        (folder / f"{name}.yaml").write_text(f"api: {{port: {port}}}")
    named = {"ROCYARD_CONFIG": str(folder / "named.yaml")}
    assert load_settings(folder / "given.yaml", named, {}).api.port == 1
    assert load_settings(None, named, {}).api.port == 2
    assert load_settings(None, {}, {}).api.port == 3
    assert read_settings(None, {}, {}).path == Path("rocyard.yaml")
    assert "missing.yaml is not a file" in refused(folder / "missing.yaml")


def test_sizes_and_durations_may_be_text():
    settings = from_yaml("node: {reserve_bytes: 2GiB}\nslots: {idle_s: 5m}\napi: {args_bytes_max: 0}")
    assert (settings.node.reserve_bytes, settings.slots.idle_s, settings.api.args_bytes_max) == (2 * GIB, 300.0, 0)
    environ = {"ROCYARD_NODE__RESERVE_BYTES": "1 MiB", "ROCYARD_TASKS__TIME_LIMIT_S_MAX": "2d"}
    settings = load_settings(None, environ, {"tasks.retention_s": "90"})
    assert (settings.node.reserve_bytes, settings.tasks.time_limit_s_max) == (MIB, 172_800)
    assert settings.tasks.retention_s == 90
    assert load_settings(None, {"ROCYARD_NODE__RESERVE_BYTES": "0"}, {}).node.reserve_bytes == 0


def test_sections_of_names_of_the_users_choice():
    settings = from_yaml(
        "tenants:\n  a-b: {active_tasks_max: 5}\n"
        "functions:\n  f: {target: 'm:f', memory: 2GiB, time_limit_s: 10m}\n"
        "  g: {target: 'm.n:g', time_limit_s: null}\n",
        {"ROCYARD_TENANTS__TEAM__ACTIVE_TASKS_MAX": "7"},
    )
    assert settings.tenants == {"a-b": TenantSettings(active_tasks_max=5), "team": TenantSettings(active_tasks_max=7)}
    assert settings.functions["f"] == FunctionSettings(target="m:f", memory="2GiB", time_limit_s=600.0)
    assert settings.functions["g"].time_limit_s is None


def test_labels_are_names_and_values_of_the_users_choice():
    settings = from_yaml("node:\n  labels: {Zone.b/c: a1, rack: '7'}", {"ROCYARD_NODE__LABELS__RACK": "8"})
    assert settings.node.labels == {"Zone.b/c": "a1", "rack": "8"}
    assert load_settings(None, {}, {"node.labels.zone": "x"}).node.labels["zone"] == "x"


def test_empty_sections_and_an_empty_file_are_fine():
    assert from_yaml("") == Settings()
    assert from_yaml("api:\nnode: {}\n# nothing\ntenants:\n") == Settings()


@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        ("api: {prot: 1}", "unknown setting 'api.prot' (rocyard.yaml): did you mean 'api.port'?"),
        ("apy: {port: 1}", "unknown setting 'apy' (rocyard.yaml): did you mean 'api'?"),
        ("dashboard_port: 1", "unknown setting 'dashboard_port' (rocyard.yaml): did you mean 'dask.dashboard_port'?"),
        ("log: {zzz: 1}", "unknown setting 'log.zzz' (rocyard.yaml): known here are level, format"),
        ("tenants: {a: {activ_tasks_max: 1}}", "did you mean 'tenants.a.active_tasks_max'?"),
        ("functions: {f: {memory: 1GiB}}", "functions.f.target is missing"),
        ("api: 5", "api is a section with keys below it, not the number 5"),
        ("api: [a]", "api is a section with keys below it, not a list"),
        ("api: {port: {a: 1}}", "api.port is one value, not a mapping"),
        ("api: {port: '8000'}", "api.port: must be a whole number (from 0 up to 65535), not the text '8000'"),
        ("api: {port: 70000}", "must be a whole number (from 0 up to 65535), not the number 70000"),
        ("api: {port: true}", "not the truth value true"),
        ("api: {port: null}", "not nothing"),
        ("api: {port: 2020-01-01}", "not a date"),
        ("api: {host: 5}", "api.host: must be text, not the number 5"),
        ("node: {labels: {rack: 7}}", "node.labels.rack: must be text, not the number 7"),
        ("node: {labels: {rack: {a: b}}}", "node.labels.rack is one value, not a mapping"),
        ("node: {labels: [a]}", "node.labels is a section with keys below it, not a list"),
        ("node: {labels: {rack: 'a b'}}", "node.labels: 'a b' is neither a label's name nor its value"),
        ("log: {level: loud}", "log.level: must be one of debug, error, info, warning, not the text 'loud'"),
        ("node: {reserve_bytes: 2 gigs}", "node.reserve_bytes: '2 gigs' is not a size"),
        ("node: {reserve_bytes: -1}", "must be a size such as 24GiB (from 0), not the number -1"),
        ("slots: {idle_s: 0}", "slots.idle_s: must be a duration such as 90s or 5m (above 0 up to 31622400)"),
        ("slots: {idle_s: .nan}", "slots.idle_s: must be a duration"),
        ("slots: {idle_s: .inf}", "slots.idle_s: must be a duration"),
        ("slots: {idle_s: soon}", "slots.idle_s: 'soon' is not a duration"),
        ("tasks: {time_limit_s: 8d}", "tasks.time_limit_s is above tasks.time_limit_s_max"),
        ("api: {args_bytes_max: 2MiB}", "api.args_bytes_max is above api.body_bytes_max"),
        ("controller: {term_s: 3}", "controller.term_s must be at least twice"),
        ("api: {port: 8787}", "dask.dashboard_port and api.port are both 8787"),
        ("functions: {f: {target: f}}", "functions.f.target must be 'module:callable', not 'f'"),
        ("functions: {f: {target: 'm:f', memory: lots}}", "functions.f.memory: 'lots' is not a size"),
        ("functions: {f: {target: 'm:f', time_limit_s: 30d}}", "functions.f.time_limit_s is above"),
        ("[]", "rocyard.yaml must be a mapping such as 'api: {port: 8000}', not a list"),
        ("just text", "must be a mapping"),
        ("api: {port: 1}\napi: {port: 2}", "rocyard.yaml, line 2, column 1: 'api' stands here twice"),
        ("api:\n  port: 1\n  port: 2", "line 3, column 3: 'port' stands here twice"),
        ("a: &a [x]\nb: *a", "aliases (*name) are not allowed"),
        ("x: &x {port: 1}\napi:\n  <<: *x", "aliases (*name) are not allowed"),
        ("api:\n  <<: {port: 1}", "a key must be a plain name"),
        ("? [a, b]\n: 1", "a key must be a plain name"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("api: {port: 1", "rocyard.yaml, line 1"),
        ("api:\n\tport: 1", "rocyard.yaml, line 2"),
        ("a: 2020-99-99", "not readable as YAML"),
        ("a: 1\n---\nb: 2", "rocyard.yaml, line 2"),
        ("a: " + "[" * 50_000, "nested more than 16 deep"),
        ("a: " + "x" * 1_100_000, "is larger than"),
        ("a: \x00", "rocyard.yaml"),
    ],
)
def test_a_mistake_in_the_yaml_is_told(yaml, told):
    Path("rocyard.yaml").write_text(yaml)
    assert told in refused()


def test_a_file_that_is_no_text_is_told():
    Path("rocyard.yaml").write_bytes(b"api: \xff\xfe")
    assert "rocyard.yaml is not UTF-8 text (byte 5)" in refused()


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"ROCYARD_API_PORT": "9"}, "unknown variable ROCYARD_API_PORT, environment: did you mean ROCYARD_API__PORT?"),
        ({"ROCYARD_API__PROT": "9"}, "did you mean ROCYARD_API__PORT?"),
        ({"ROCYARD_DATADIR": "/x"}, "did you mean ROCYARD_DATA_DIR?"),
        (
            {"Rocyard_Api__Port": "9"},
            "unknown variable Rocyard_Api__Port, environment: did you mean ROCYARD_API__PORT?",
        ),
        ({"ROCYARD_": "9"}, "unknown variable ROCYARD_, environment: docs/settings.md lists all"),
        ({"ROCYARD_API": "9"}, "api is a section with keys below it, not the text '9' (ROCYARD_API, environment)"),
        ({"ROCYARD_API__PORT": "nine"}, "api.port: must be a whole number (from 0 up to 65535), not the text 'nine'"),
        ({"ROCYARD_API__PORT": ""}, "not the text ''"),
        ({"ROCYARD_SLOTS__IDLE_S": "nan"}, "slots.idle_s: must be a duration"),
        ({"ROCYARD_API__PORT__X": "1"}, "api.port is one value, not a mapping (ROCYARD_API__PORT__X, environment)"),
    ],
)
def test_a_mistake_in_a_variable_is_told(environ, told):
    assert told in refused(environ=environ)


def test_a_mistake_in_a_flag_or_in_dotenv_is_told():
    assert "unknown setting 'api.prot' (flag api.prot): did you mean 'api.port'?" in refused(flags={"api.prot": "1"})
    Path(".env").write_text("A=1\nROCYARD_API__PROT=1\n")
    assert "unknown variable ROCYARD_API__PROT, .env: did you mean ROCYARD_API__PORT?" in refused()
    Path(".env").write_text("A=1\nROCYARD_API__PORT\n")
    assert ".env, line 2: write NAME=value" in refused()


def test_all_mistakes_are_told_at_once():
    Path("rocyard.yaml").write_text("api: {prot: 1, host: 5}\nlog: {level: loud}")
    with pytest.raises(SettingsError) as caught:
        load_settings(None, {"ROCYARD_API__PORT": "x"}, {})
    assert str(caught.value).startswith("4 settings are wrong:\n  - ")
    assert len(caught.value.details["problems"]) == 4


def test_variables_that_are_not_ours_to_judge():
    kubernetes = {
        "ROCYARD_API_SERVICE_HOST": "10.0.0.1",
        "ROCYARD_API_SERVICE_PORT": "8000",
        "ROCYARD_API_SERVICE_PORT_HTTP": "8000",
        "ROCYARD_API_PORT": "tcp://10.0.0.1:8000",
        "ROCYARD_API_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "ROCYARD_API_PORT_8000_TCP_ADDR": "10.0.0.1",
        "ROCYARD_PORT": "tcp://10.0.0.1:8000",
    }
    client = {"ROCYARD_URL": "http://x", "ROCYARD_API_KEY": "ry_x"}
    in_a_task = {
        "ROCYARD_TASK_ID": "t",
        "ROCYARD_ATTEMPT": "1",
        "ROCYARD_ARRAY_INDEX": "0",
        "ROCYARD_ARRAY_COUNT": "3",
        "ROCYARD_SIMULATED_DIR": "/x",
    }
    assert load_settings(None, kubernetes | client | in_a_task, {}) == Settings()


class TestSecrets:
    def test_by_variable(self):
        text = "store: {url: 'env:REDIS_URL'}"
        assert from_yaml(text, {"REDIS_URL": "redis://:pw@h"}).store.url.value == "redis://:pw@h"
        Path(".env").write_text("REDIS_URL=redis://dotenv")
        assert from_yaml(text).store.url.value == "redis://dotenv"
        Path(".env").unlink()
        assert "store.url: the variable REDIS_URL that it names is not set" in refused()

    def test_by_file(self, folder: Path):
        file = folder / "secret"
        file.write_text("redis://:pw@h\n")
        file.chmod(0o640)
        environ = {"ROCYARD_STORE__URL": f"file:{file}"}
        assert load_settings(None, environ, {}).store.url == Secret("redis://:pw@h")
        file.chmod(0o644)
        assert f"can be read by everybody: chmod o-r {file}" in refused(environ=environ)

    @pytest.mark.parametrize(
        ("content", "told"),
        [(b"", "is empty"), (b"\n", "is empty"), (b"\xff", "is not UTF-8 text"), (b"x" * 70_000, "is too large")],
    )
    def test_a_file_that_holds_none(self, folder: Path, content, told):
        file = folder / "secret"
        file.write_bytes(content)
        file.chmod(0o600)
        assert told in refused(environ={"ROCYARD_STORE__URL": f"file:{file}"})

    def test_a_file_that_cannot_be_one(self, folder: Path):
        assert "cannot be read: No such file" in refused(environ={"ROCYARD_STORE__URL": f"file:{folder}/none"})
        assert "needs the absolute path of a plain file" in refused(environ={"ROCYARD_STORE__URL": f"file:{folder}"})
        assert "needs the absolute path" in refused(environ={"ROCYARD_STORE__URL": "file:."})

    def test_written_out_is_taken_and_noted(self):
        Path("rocyard.yaml").write_text("store: {url: 'redis://:pw@h'}")
        loaded = read_settings(None, {}, {})
        assert loaded.settings.store.url.value == "redis://:pw@h"
        assert loaded.notes == ("store.url is written out in rocyard.yaml; 'env:NAME' or 'file:/path' keeps it out of there",)
        Path("rocyard.yaml").unlink()
        assert read_settings(None, {"ROCYARD_STORE__URL": "redis://:pw@h"}, {}).notes == ()

    def test_never_shown(self):
        settings = load_settings(None, {"ROCYARD_STORE__URL": "redis://:hunter2@h"}, {})
        assert "hunter2" not in f"{settings} {settings!r} {settings.store.url}"
        Path("rocyard.yaml").write_text("store: {url: [hunter2]}")
        assert "hunter2" not in refused()
        assert "must be text" in refused()


def test_a_mistake_is_found_at_once():
    Path("rocyard.yaml").write_text("api: {prot: 1}")
    began = time.perf_counter()
    refused()
    assert time.perf_counter() - began < 2
