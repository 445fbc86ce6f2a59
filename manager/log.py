"""Structured logs: one event is one line on stderr, from our code and from every library alike.

Owns how an event looks: its time, component, pid and bound ids, what is hidden, and what is escaped. It decides
nothing about what is worth logging. Secrets are hidden by the name of their key and by their look; the values of local
variables never reach a log.
"""

import functools
import json
import logging
import math
import os
import re
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from manager.settings import LogSettings

HIDDEN: Final = "***"
TEXT_CHARS_MAX: Final = 16_384
"""Longer text is cut: a traceback fits, a dumped tensor does not."""
ITEMS_MAX: Final = 200
DEPTH_MAX: Final = 6

_SECRET_KEY: Final = re.compile(r"pass|token|secret|api[_-]?key|authorization|credential|dsn", re.IGNORECASE)
_COUNT_KEY: Final = re.compile(r"(tokens|passes|passed)$", re.IGNORECASE)
# Each quantifier is bounded: hostile text must not cost quadratic time.
_SECRET_TEXT: Final = (
    (re.compile(r"""://[^\s"'<>]{0,512}@"""), f"://{HIDDEN}@"),
    (re.compile(r"\bry_[A-Za-z0-9_-]+"), f"ry_{HIDDEN}"),
    (re.compile(r"\b(bearer\s{1,8}|basic\s{1,8}(?=\S{16}))[\w.~+/=-]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (
        re.compile(
            r"""((?:password|passwd|token|secret|api[_-]?key|credential)\w{0,40}["']?\s{0,8}[=:]\s{0,8})"""
            r"""(?:b?"[^"]{0,512}"|b?'[^']{0,512}'|[^\s,;)}\]]+)""",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
)
# What none of these can match, unless it has a key of ours in it: most values are words, ids and names.
_WORD: Final = re.compile(r"[\w./+-]*")
# Everything that could end a line, move a cursor or turn text around. Tab stays.
_CONTROL: Final = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_CONTROL_BUT_NEWLINE: Final = re.compile(_CONTROL.pattern.replace("\x0a-\x1f", "\x0b-\x1f"))

# Libraries that bring handlers of their own, with the least level at which they say something that matters here.
_LIBRARIES: Final = {
    "asyncio": logging.WARNING,
    "bokeh": logging.WARNING,
    "distributed": logging.INFO,
    "httpx": logging.WARNING,
    "litestar": logging.INFO,
    "tornado": logging.WARNING,
    "tornado.application": logging.ERROR,
    "uvicorn": logging.INFO,
    "uvicorn.access": logging.WARNING,
    "uvicorn.error": logging.INFO,
}


def configure_logging(component: str, settings: LogSettings) -> None:
    """Send all logs of this process to stderr in one form, and bind `component` and the pid to them.

    Safe to repeat. Dask and uvicorn put handlers of their own on their loggers while they start: call this after
    importing `distributed`, and start uvicorn with ``log_config=None``.
    """
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        _add_process(component),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        hide_secrets,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _hide_in_stack,
    ]
    last: list[Processor] = [_escape, _console()] if settings.format == "console" else [render_json]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,  # loggers of modules are made before this runs
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, structlog.stdlib.ExtraAdder(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name, least in _LIBRARIES.items():
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(max(level, least))
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose events bear `name`; it may be made before `configure_logging`."""
    return cast("FilteringBoundLogger", structlog.get_logger(logger_name=name))


def hide_secrets(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """`event` as plain data, without what looks like a secret."""
    return {str(key): value if key == "exc_info" or _is_meta(key) else _hide(key, value) for key, value in event.items()}


def _hide_in_stack(logger: Any, method: str, event: EventDict) -> EventDict:
    """Again: the text of an exception may hold what a key's name would have hidden."""
    return hide_secrets(logger, method, event) if "exception" in event or "stack" in event else event


def render_json(_logger: Any, _method: str, event: EventDict) -> str:
    """`event` as one line of ASCII: whatever a value holds, it cannot start a line or colour a terminal."""
    return json.dumps(event, ensure_ascii=True, default=repr).replace("\x7f", "\\u007f")


def hide_in_text(text: str) -> str:
    """`text` without passwords of URLs, keys of ours, and ``name=value`` of secrets; cut if long."""
    if len(text) <= TEXT_CHARS_MAX and "ry_" not in text and _WORD.fullmatch(text):
        return text
    # Far more than is kept is searched, so that the final cut cannot part a secret from what gives it away.
    text = _cut(text, 16 * TEXT_CHARS_MAX)
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return _cut(text, TEXT_CHARS_MAX)


def _hide(key: Any, value: Any, depth: int = 0) -> Any:
    """`value` as JSON can hold it, with secrets hidden."""
    if value is None or isinstance(value, bool):
        return value
    is_number = isinstance(value, int | float)
    if isinstance(key, str) and _is_secret(key) and not (is_number and _COUNT_KEY.search(key)):
        return HIDDEN
    match value:
        case int():
            return value if abs(value) < 2**63 else str(value)[:100]
        case float():
            return value if math.isfinite(value) else str(value)
        case str():
            return hide_in_text(value)
        case bytes() | bytearray():
            return hide_in_text(repr(bytes(value[:TEXT_CHARS_MAX])))
        case _ if depth >= DEPTH_MAX:
            return "…"
        case Mapping():
            items = list(value.items())[:ITEMS_MAX]
            return {hide_in_text(str(name)): _hide(name, below, depth + 1) for name, below in items}
        case list() | tuple() | set() | frozenset():
            return [_hide(None, below, depth + 1) for below in list(value)[:ITEMS_MAX]]
        case _:
            return hide_in_text(_repr(value))


@functools.lru_cache(maxsize=1024)
def _is_secret(key: str) -> bool:
    return _SECRET_KEY.search(key) is not None


def _cut(text: str, chars_max: int) -> str:
    return text if len(text) <= chars_max else f"{text[: chars_max // 2]} … {text[-chars_max // 2 :]}"


def _repr(value: object) -> str:
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001 -- a log call must not fail for a broken __str__ of somebody's class
        return f"<{type(value).__name__}: {type(error).__name__} in str()>"


def _is_meta(key: Any) -> bool:
    """Whether structlog keeps the record itself under `key`, to be removed before rendering."""
    return key in {"_record", "_from_structlog"}


def _escape(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """`event` without control characters; only a traceback keeps its lines."""
    return {
        _control(key, _CONTROL): _control(value, _CONTROL_BUT_NEWLINE if key in {"exception", "stack"} else _CONTROL)
        for key, value in event.items()
    }


def _control(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), value)
    if isinstance(value, dict | list):
        return _control(json.dumps(value, default=repr), pattern)
    return value


def _console() -> Processor:
    return structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=32
    )


def _add_process(component: str) -> Processor:
    def add(_logger: Any, _method: str, event: EventDict) -> EventDict:
        # Not a context variable: threads start with none. The pid is read anew, for it changes with a fork.
        event["component"] = component
        if "logger_name" in event:  # structlog keeps the word `logger` for itself until here
            event["logger"] = event.pop("logger_name")
        event["pid"] = os.getpid()
        return event

    return add


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    get_logger("uncaught").critical("uncaught exception", exc_info=(kind, error, traceback))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        thread = args.thread.name if args.thread else ""
        exc_info = (args.exc_type, args.exc_value, args.exc_traceback)
        get_logger("uncaught").critical("uncaught exception in a thread", thread=thread, exc_info=exc_info)
