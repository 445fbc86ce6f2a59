"""Registration: what is merged from where, what is refused, and what is published."""

import sys
from importlib.metadata import EntryPoint

import msgspec
import pytest

from manager.core.errors import SettingsError
from manager.core.functions import PublishedFunction, decode_published, encode_published, is_function_name
from manager.core.quantities import GIB
from manager.core.shapes import Resources
from manager.settings import FunctionSettings
from plugins.node.registry import BUILTINS, ENTRY_POINT_GROUP, FunctionSpec, environment_id, load_functions, published


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group=ENTRY_POINT_GROUP)


def spec(**changes) -> FunctionSpec:
    return FunctionSpec(**{"name": "f", "target": "m:f", "resources": Resources(GIB)} | changes)


def test_built_in_functions_are_always_there():
    specs = load_functions({}, installed=[])
    assert set(specs) == {"echo", "sleep", "fail", "matmul", "digits_train", "digits_classify"} == set(BUILTINS)
    assert all(environment_id(each) == "default" for each in specs.values())


def test_settings_win_over_packages_and_both_over_built_in_ones():
    specs = load_functions(
        {
            "mine": FunctionSettings(target="settings:f"),
            "echo": FunctionSettings(target="settings:echo", memory="3GiB"),
        },
        installed=[entry("mine", "package:f"), entry("sleep", "package:sleep"), entry("theirs", "package.sub:f.g")],
    )
    assert specs["mine"].target == "settings:f"
    assert specs["echo"].resources == Resources(3 * GIB)
    assert specs["sleep"].target == "package:sleep"
    assert specs["theirs"].target == "package.sub:f.g"
    assert list(specs) == sorted(specs)


def test_everything_set_is_kept(tmp_path):
    settings = FunctionSettings(
        target="m:f", memory="24GiB", gpus=2, time_limit_s=5.0, path=str(tmp_path), max_tasks_per_slot=1
    )
    assert load_functions({"f": settings}, {}, [])["f"] == FunctionSpec(
        "f", "m:f", Resources(24 * GIB, 2), 5.0, "", str(tmp_path), 1
    )


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("Bad", FunctionSettings(target="m:f"), r"'Bad' cannot name a function"),
        ("f", FunctionSettings(target="m.f"), r"functions\.f: target 'm\.f' is not of the form"),
        ("f", FunctionSettings(target="m:f()"), "is not of the form"),
        ("f", FunctionSettings(target="m:f\n"), "is not of the form"),
        ("f", FunctionSettings(target="m:f", memory="lots"), r"functions\.f: memory: 'lots' is not a size"),
        ("f", FunctionSettings(target="m:f", gpus=65), "from 1 to 64"),
        ("f", FunctionSettings(target="m:f", python="/no/such/python"), "'/no/such/python' is not a program"),
        ("f", FunctionSettings(target="m:f", path="/no/such/dir"), "'/no/such/dir' is not a directory"),
    ],
)
def test_what_cannot_work_is_refused_by_name(name, settings, says):
    with pytest.raises(SettingsError, match=says):
        load_functions({name: settings}, installed=[])


def test_two_packages_with_one_name_are_refused_unless_the_settings_choose():
    twice = [entry("f", "one:f"), entry("f", "two:f")]
    with pytest.raises(SettingsError, match=r"have one name: set functions\.f"):
        load_functions({}, installed=twice)
    assert load_functions({"f": FunctionSettings(target="two:f")}, installed=twice)["f"].target == "two:f"


def test_no_package_is_imported():
    load_functions({}, installed=[entry("f", "antigravity:geohash")])
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("name", "fits"),
    [("a", True), ("a-b_c.d9", True), ("a" * 64, True), ("a" * 65, False), ("", False), ("9a", False), ("a\n", False)],
)
def test_names(name, fits):
    assert is_function_name(name) is fits


def test_an_environment_is_interpreter_and_path():
    ids = [environment_id(spec(python=python, path=path)) for python in ("", "/a/python") for path in ("", "/x", "/y")]
    assert ids[0] == "default"
    assert len(set(ids)) == len(ids)
    assert environment_id(spec(name="g", target="other:g", path="/x")) == ids[1]
    assert all(len(each) == 11 for each in ids[1:])
    assert all(each.startswith("py-") for each in ids[1:])


def test_the_agents_own_interpreter_is_no_other_environment():
    own = load_functions({"f": FunctionSettings(target="m:f", python=sys.executable)}, {}, [])["f"]
    assert own.python == ""


def test_what_is_published_is_read_back():
    described = spec(schema=b'{"type":"object"}', doc="Does.", time_limit_s=3.0)
    function = published(described)
    assert decode_published(encode_published(function)) == function
    assert msgspec.json.decode(encode_published(function))["schema"] == {"type": "object"}
    broken = published(spec(error="ModuleNotFoundError: No module named 'm'"))
    assert msgspec.json.decode(encode_published(broken))["schema"] == {}


def test_yesterdays_record_decodes():
    old = b'{"name":"f","doc":"","schema":{},"memory_bytes":1}'
    assert decode_published(old) == PublishedFunction("f", "", msgspec.Raw(b"{}"), 1)
