"""What the REST API gives of the functions that tasks may name. See `answers`."""

import msgspec

from manager.core.answers import AnyJson, ResourcesView, no_result


class FunctionView(msgspec.Struct, frozen=True, kw_only=True):
    """A function that tasks may name.

    Attributes:
        resources: what a task of it asks for unless it says otherwise.
        schema: JSON Schema of its arguments; null where it cannot be used.
        problem: why it cannot be used at the moment, else empty.
    """

    name: str
    description: str
    memory_bytes: int
    gpus: int
    resources: ResourcesView | None = None
    time_limit_s: float
    schema: AnyJson = msgspec.field(default_factory=no_result)
    problem: str = ""


class FunctionList(msgspec.Struct, frozen=True):
    """All functions, by name."""

    functions: tuple[FunctionView, ...]
