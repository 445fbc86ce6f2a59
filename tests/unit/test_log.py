"""Logs: one event is one line, and no secret is in it, whoever wrote it."""

import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from manager import log as log_module
from manager.log import configure_logging, get_logger, hide_in_text, hide_secrets, render_json
from manager.settings import LogSettings, Secret

early = get_logger("early")


class Stderr:
    """What the process has written."""

    def __init__(self, capsys) -> None:
        self._capsys = capsys
        self._text = ""

    def text(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text

    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.text().splitlines()]


@pytest.fixture
def stderr(capsys) -> Iterator[Stderr]:
    """Logging as it was is put back."""
    root = logging.getLogger()
    kept = (root.handlers[:], root.level, sys.excepthook, threading.excepthook)
    yield Stderr(capsys)
    root.handlers[:], sys.excepthook, threading.excepthook = kept[0], kept[2], kept[3]
    root.setLevel(kept[1])
    logging.captureWarnings(False)
    structlog.reset_defaults()


def test_an_event_says_when_who_and_about_what(stderr):
    configure_logging("controller", LogSettings())
    with structlog.contextvars.bound_contextvars(task_id="t1"):
        early.warning("slot opened", slot_id="s1", bytes=5, share=0.5, none=None)
    (event,) = stderr.events()
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "slot opened",
        "level": "warning",
        "component": "controller",
        "pid": os.getpid(),
        "logger": "early",
        "task_id": "t1",
        "slot_id": "s1",
        "bytes": 5,
        "share": 0.5,
        "none": None,
    }


def test_libraries_write_the_same_form(stderr):
    dask = logging.getLogger("distributed.worker")
    logging.getLogger("distributed").addHandler(logging.StreamHandler(sys.stderr))
    configure_logging("worker", LogSettings())
    dask.warning("lost %s", "tcp://x", extra={"worker": "w"})
    logging.getLogger("uvicorn.access").info("GET /")
    logging.getLogger("httpx").info("HTTP Request")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    first, second = stderr.events()
    assert (first["event"], first["logger"], first["component"], first["worker"]) == (
        "lost tcp://x",
        "distributed.worker",
        "worker",
        "w",
    )
    assert second["logger"] == "py.warnings"


@pytest.mark.parametrize(("level", "written"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_holds_for_all(stderr, level, written):
    configure_logging("api", LogSettings(level=level))
    for logger in (get_logger("ours"), logging.getLogger("theirs")):
        for method in ("debug", "info", "warning", "error"):
            getattr(logger, method)("x")
    assert len(stderr.events()) == 2 * written


def test_configuring_twice_does_not_write_twice(stderr):
    configure_logging("api", LogSettings())
    configure_logging("api", LogSettings())
    logging.getLogger("x").warning("once")
    assert len(stderr.events()) == 1


EVIL = "a\nb\rc\x1b[31md\u2028e\u2029f\x85g\x9bh\u202ei\x7fj\x00k"


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_value_cannot_start_a_line_or_reach_the_terminal(stderr, form):
    configure_logging("api", LogSettings(format=form))
    get_logger("x").info(EVIL, value=EVIL, nested={EVIL: [EVIL]}, **{EVIL: 1})
    logging.getLogger("y").warning("%s", EVIL)
    lines = stderr.text().splitlines(keepends=True)
    assert len(lines) == 2
    assert all(line.endswith("\n") and line[:-1].isprintable() for line in lines)


def test_the_console_keeps_the_lines_of_a_traceback_only(stderr):
    configure_logging("api", LogSettings(format="console"))
    try:
        raise ValueError("bad \x1b[31m")
    except ValueError:
        get_logger("x").exception("failed\nhere")
    text = stderr.text()
    assert "failed\\nhere" in text
    assert "\nTraceback (most recent call last):\n" in text
    assert "\x1b" not in text


SECRETS = {
    "password": "hunter2",
    "db_pass": "hunter2",
    "Authorization": "Bearer hunter2",
    "api_key": "hunter2",
    "API-Key": "hunter2",
    "apikey": "hunter2",
    "token": 12345,
    "secret": Secret("hunter2"),
    "dsn": ["hunter2"],
    "credentials": {"user": "hunter2"},
}


@pytest.mark.parametrize("key", SECRETS)
def test_what_is_called_a_secret_is_hidden_at_any_depth(key):
    event = {key: SECRETS[key], "a": [{"b": {key: SECRETS[key]}}]}
    assert hide_secrets(None, "", event) == {key: "***", "a": [{"b": {key: "***"}}]}


def test_counts_and_flags_are_no_secrets():
    event = {"max_tokens": 100, "tests_passed": 3, "has_password": True, "token": None}
    assert hide_secrets(None, "", event) == event


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("redis://rocyard:hunter2@127.0.0.1:6379/0", "redis://***@127.0.0.1:6379/0"),
        ("at redis://:p/w@x@host/0 and http://h/path", "at redis://***@host/0 and http://h/path"),
        ("key ry_01h_Zx-9 was refused", "key ry_*** was refused"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("Basic dXNlcjpodW50ZXIyISE=", "Basic ***"),
        ("basic functions", "basic functions"),
        ("password=hunter2 user=x", "password=*** user=x"),
        ("{'db_password': 'hunter2', 'a': 1}", "{'db_password': ***, 'a': 1}"),
        ('"api_key": "hun ter2"', '"api_key": ***'),
        ("token: b'hunter2')", "token: ***)"),
        ("the token was refused", "the token was refused"),
        ("user@host", "user@host"),
    ],
)
def test_text_that_looks_like_a_secret_is_hidden(text, hidden):
    assert hide_in_text(text) == hidden
    assert hide_secrets(None, "", {"event": text, "l": [text], "e": ValueError(text)}) == {
        "event": hidden,
        "l": [hidden],
        "e": hidden,
    }


def test_tracebacks_hide_them_too(stderr):
    configure_logging("api", LogSettings())
    url = "redis://rocyard:" + "hunter2@127.0.0.1"
    try:
        raise ConnectionError(f"cannot reach {url}")
    except ConnectionError:
        get_logger("x").exception("store is down")
        logging.getLogger("y").exception("store is down")
    written = stderr.text()
    assert "hunter2@" not in written
    assert [event["exception"].splitlines()[-1] for event in stderr.events()] == [
        "ConnectionError: cannot reach redis://***@127.0.0.1"
    ] * 2


def test_an_uncaught_exception_is_one_event(stderr):
    configure_logging("api", LogSettings())
    thread = threading.Thread(target=lambda: 1 / 0, name="worker-1")
    thread.start()
    thread.join()
    try:
        raise RuntimeError("end")
    except RuntimeError:
        sys.excepthook(*sys.exc_info())
    in_thread, in_main = stderr.events()
    assert (in_thread["thread"], in_thread["level"]) == ("worker-1", "critical")
    assert "ZeroDivisionError" in in_thread["exception"]
    assert "RuntimeError: end" in in_main["exception"]


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (b"\xff", "b'\\xff'"),
        ({1: 2}, {"1": 2}),
        ((1, 2), [1, 2]),
        (10**400, "1" + "0" * 99),
        (Broken(), "<Broken: RuntimeError in str()>"),
        ("\ud800", "\ud800"),
    ],
)
def test_any_value_can_be_logged(value, shown):
    event = hide_secrets(None, "", {"value": value})
    assert event == {"value": shown}
    assert json.loads(render_json(None, "", event)) == event


def test_long_and_deep_values_are_cut():
    deep: list = []
    deep.append(deep)
    event = hide_secrets(None, "", {"text": "x" * 10**6, "deep": deep, "many": list(range(10**5))})
    assert len(render_json(None, "", event)) < 40_000


def test_a_secret_where_a_text_is_cut_is_hidden():
    half = log_module.TEXT_CHARS_MAX // 2
    text = "x" * (half - 20) + " redis://rocyard:hunter2@host " + "y" * 40_000
    assert "hunter2" not in hide_in_text(text)


@pytest.mark.parametrize("unit", ["a", "://", "password", "token=", "bearer ", "ry_", '"', "secret:'"])
def test_hostile_text_costs_little(unit):
    began = time.perf_counter()
    hide_in_text(unit * 300_000)
    assert time.perf_counter() - began < 10


@given(st.recursive(st.none() | st.text() | st.floats() | st.binary(), lambda inner: st.dictionaries(st.text(), inner)))
def test_whatever_is_logged_is_one_line_of_json(value):
    line = render_json(None, "", hide_secrets(None, "", {"event": "x", "value": value}))
    assert line.isascii()
    assert line.isprintable()
    json.loads(line)
