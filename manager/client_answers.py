"""Answers as the client reads them, where msgspec cannot read the API's own type: `Raw | None` only ever takes null."""

import msgspec

from manager.core import requests as rest

NULL = msgspec.Raw(b"null")


class TaskAnswer(rest.TaskView, frozen=True, kw_only=True):
    """A task; `result` is ``null`` until it has one."""

    result: msgspec.Raw = NULL


class FunctionAnswer(rest.FunctionView, frozen=True, kw_only=True):
    """A function; `schema` is ``null`` where it is not known."""

    schema: msgspec.Raw = NULL


class FunctionAnswers(msgspec.Struct, frozen=True):
    """All functions, by name."""

    functions: tuple[FunctionAnswer, ...]
