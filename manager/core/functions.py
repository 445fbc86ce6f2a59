"""A registered function as the store holds it: what the API and the CLI need to know, and nothing that runs.

An agent publishes it under ``fn:NAME``; the API checks arguments against its schema and never imports user code.
"""

import re
from typing import Final

import msgspec

from manager.core.shapes import Resources

NAME_PATTERN: Final = r"^[a-z][a-z0-9_.-]{0,63}$"
_NAME: Final = re.compile(NAME_PATTERN)
DEFAULT_ENVIRONMENT: Final = "default"
"""The agent's own interpreter."""


class PublishedFunction(msgspec.Struct, frozen=True):
    """One function that tasks can name.

    Attributes:
        name: fits `NAME_PATTERN`.
        doc: first paragraph of its documentation.
        schema: JSON Schema of its arguments as one object; ``{}`` where `error` is set.
        memory_bytes, gpus: what a task of it asks for unless it says otherwise.
        resources: all of that; None where an older agent has published it, which knows no more than these two.
        time_limit_s: its own limit; None is the cluster's default.
        environment: digest of the executor that it needs, part of its tasks' shape.
        max_tasks_per_slot: how many of its tasks one slot serves; 0 is no limit.
        error: why it cannot be used, else empty.
    """

    name: str
    doc: str
    schema: msgspec.Raw
    memory_bytes: int
    gpus: int = 1
    time_limit_s: float | None = None
    environment: str = DEFAULT_ENVIRONMENT
    max_tasks_per_slot: int = 0
    error: str = ""
    resources: Resources | None = None

    @property
    def needs(self) -> Resources:
        """What a task of it asks for unless it says otherwise."""
        return self.resources or Resources(self.memory_bytes, self.gpus)


def is_function_name(text: str) -> bool:
    """Whether `text` could name a function."""
    return _NAME.match(text) is not None and not text.endswith("\n")


encode_published: Final = msgspec.json.Encoder().encode
decode_published: Final = msgspec.json.Decoder(PublishedFunction).decode
